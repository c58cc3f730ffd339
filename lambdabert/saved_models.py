"""A saved LambdaBERT as the class that it was saved as, without random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

import modeling_lambdabert
from modeling_lambdabert import LambdaBertModel


def load_as_saved(name: str | Path) -> PreTrainedModel:
    """Loads a LambdaBERT. No code of its folder is run: the classes are those of this installation.

    Args:
        name: a folder or a hub name.

    Returns:
        The model in float32 and evaluation mode. A bare encoder whose pooler was not saved comes without one.

    Raises:
        ValueError: weights are missing, which would be random.
    """
    fields, _ = PreTrainedConfig.get_config_dict(name)
    architecture = next(iter(fields.get("architectures") or ()), None)
    known = architecture if architecture in modeling_lambdabert.__all__ else LambdaBertModel.__name__
    model_class: Any = getattr(modeling_lambdabert, known)
    model, found = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = set(found["missing_keys"])
    if isinstance(model, LambdaBertModel) and (pooler := {name for name in missing if name.startswith("pooler.")}):
        model.pooler = None
        missing -= pooler
    if missing:
        raise ValueError(
            f"model={name} has no weights for {', '.join(sorted(missing)[:3])}, which would be random; train or save "
            f"it as a {known}, or name in `architectures` of its {CONFIG_NAME} the class that it is."
        )
    return model.eval()
