"""The Hugging Face hub: whether it can be reached, whether a model can be pushed there, and the push."""

from pathlib import Path

import datasets
import huggingface_hub
from transformers import Trainer

from lambdabert.training.arguments import RunArguments
from lambdabert.training.checkpoints import CHECKPOINTS
from lambdabert.training.output_folder import RUN_SETTINGS_NAME


def is_local(name: str | None) -> bool:
    return name is None or Path(name).exists()


def use_cache_if_hub_is_unreachable(*names: str | None) -> None:
    """Asks the hub once, instead of the libraries' minutes of retries, if one of the names is a hub name."""
    if all(is_local(name) for name in names) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the transport library, and so the class of its errors, differs between hub versions
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def check_hub(args: RunArguments) -> None:
    """Raises ValueError if the model is to be pushed to the hub, and nobody is logged in there."""
    if not args.push_to_hub:
        return
    try:
        huggingface_hub.whoami(token=args.hub_token)
    except Exception as error:  # the transport library, and so the class of its errors, differs between hub versions
        raise ValueError(
            f"push_to_hub needs the hub and a login there ({error}); run `hf auth login`, or leave push_to_hub out."
        ) from error


def push_folder(trainer: Trainer) -> None:
    """Pushes the output folder as it is at the end, with report and model card.

    Checkpoints stay here, and so does the record of the settings, which holds paths of this machine. The Trainer's own
    push saves the model again, and writes a card of its own over that of the command.
    """
    trainer._finish_current_push()  # of a checkpoint, in the background
    huggingface_hub.upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=str(trainer.args.output_dir),
        commit_message="End of training",
        token=trainer.args.hub_token,
        revision=trainer.args.hub_revision,
        ignore_patterns=["_*", CHECKPOINTS, RUN_SETTINGS_NAME],
    )
