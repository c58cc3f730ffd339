"""Saved models without random weights, and where sentence-transformers keeps one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, BertModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

import modeling_lambdabert
from modeling_lambdabert import LambdaBertModel

SENTENCE_MODULES = "modules.json"  # what makes a folder one of sentence-transformers


def sentence_module_paths(folder: Path) -> list[str]:
    """Subfolders of a sentence-transformers model's modules, the transformer's first; none for another folder."""
    try:
        modules = json.loads((folder / SENTENCE_MODULES).read_text(encoding="utf-8"))
        return [module["path"] for module in modules]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / SENTENCE_MODULES} cannot be read ({error}); save the model again.") from None


def compute_whole(model: nn.Module) -> None:
    """Switches off computing feed-forward layers in chunks: the results stay the same, and any length works."""
    module: Any
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0


def check_case(sentence_transformer: Any, name: str) -> None:
    """Refuses lower-casing that sentence-transformers adds to a cased tokenizer, which no saved tokenizer keeps.

    Args:
        sentence_transformer: a loaded model of it.
        name: how the message calls it.

    Raises:
        ValueError: the model lower-cases text before a cased tokenizer.
    """
    lowers = getattr(sentence_transformer[0], "do_lower_case", False)
    if lowers and not getattr(sentence_transformer.tokenizer, "do_lower_case", False):
        raise ValueError(
            f"{name} puts do_lower_case=true before a cased tokenizer, which is lost when the tokenizer is saved: set "
            "it to false in sentence_bert_config.json, and save the tokenizer with do_lower_case=True."
        )


def load_with_missing(model_class: Any, name: str | Path, subfolder: str = "") -> tuple[PreTrainedModel, list[str]]:
    """Loads a model.

    Args:
        model_class: a class of BERT's or of LambdaBERT's family.
        name: a folder or a hub name.
        subfolder: where in it the model is.

    Returns:
        The model in float32 and evaluation mode, a bare encoder whose pooler was not saved without one; and the names
        of all other weights that were not saved, which are random.

    Raises:
        ValueError: the weights cannot be read, or are of other shapes.
    """
    try:
        model, found = model_class.from_pretrained(
            name, subfolder=subfolder, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name}: its weights are damaged or do not fit its config ({reason}); save or download the model again."
        ) from error
    missing = set(found["missing_keys"])
    if isinstance(model, BertModel) and (pooler := {weight for weight in missing if weight.startswith("pooler.")}):
        model.pooler = None
        missing -= pooler
    return model.eval(), sorted(missing)


def load_saved_tokenizer(name: str | Path) -> Any:
    """The tokenizer that was saved with a model. No code of its folder is run.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever its reader stumbles over
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"model={name} has no tokenizer that can be read ({reason}); save it there.") from error


def load_as_saved(name: str | Path) -> PreTrainedModel:
    """Loads a LambdaBERT as the class that it was saved as.

    No code of its folder is run: the classes are those of this installation.

    Args:
        name: a folder or a hub name.

    Returns:
        The model in float32 and evaluation mode. A bare encoder whose pooler was not saved comes without one.

    Raises:
        ValueError: weights are missing, which would be random; the folder holds an adapter alone, or a class of others.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"model={name} holds an adapter and not its model: load both with peft, save what merge_and_unload() "
            "gives, with the tokenizer, and name that folder."
        )
    fields, _ = PreTrainedConfig.get_config_dict(name)
    architecture = next(iter(fields.get("architectures") or ()), None)
    class_name = LambdaBertModel.__name__ if architecture is None else architecture
    if class_name not in modeling_lambdabert.__all__:
        raise ValueError(
            f"model={name} was saved as a {class_name}, which is not of this library: name in `architectures` of its "
            f"{CONFIG_NAME} the class of {modeling_lambdabert.__name__} that it is."
        )
    model_class: Any = getattr(modeling_lambdabert, class_name)
    model, missing = load_with_missing(model_class, name)
    if missing:
        raise ValueError(
            f"model={name} has no weights for {', '.join(missing[:3])}, which would be random; train or save "
            f"it as a {class_name}, or name in `architectures` of its {CONFIG_NAME} the class that it is."
        )
    return model
