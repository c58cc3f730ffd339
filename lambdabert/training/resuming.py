"""Whether a checkpoint belongs to the run that is to be resumed from it. All of it is checked before any is loaded.

Errors are raised within `checkpoints.reading`, which turns them into a `CheckpointError`; nothing in a file is run.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from lambdabert.training.checkpoints import CheckpointError, load_values, step_of

FACTORS = {"exp_avg_sq_row", "exp_avg_sq_col"}  # of Adafactor's second moment
# how the same optimizer is computed, which changes rounding alone
OPTIMIZER_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
# fields of a saved config that say how it was saved
SAVING_FIELDS = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")


def check_config(checkpoint: Path, config: PreTrainedConfig) -> None:
    """Compares the config that was saved with the model's. Raises ValueError if they differ.

    A field that the saved one lacks, because it is younger, has its default there.
    """
    file = checkpoint / CONFIG_NAME
    if not file.exists():  # under FSDP
        return
    own, defaults = (json.loads(json.dumps(c.to_dict(), default=str)) for c in (config, type(config)()))
    saved = json.loads(file.read_text(encoding="utf-8"))
    for field, value in {**defaults, **saved}.items():
        if field in own and field not in SAVING_FIELDS and own[field] != value:
            raise ValueError(f"{file.name} has {field}={value!r}, and this run {own[field]!r}")


def check_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Compares names and shapes of the weights that were saved with the model's. Raises ValueError if they differ."""
    files = list(checkpoint.glob("model*.safetensors"))
    if not files:  # sharded by FSDP
        return
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    own = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    # a tied weight is stored once, under the name of the other
    missing = sorted(set(own) - set(shapes) - set(model.all_tied_weights_keys))
    if missing:
        raise ValueError(f"its weights lack {', '.join(missing[:3])}")
    unknown = sorted(set(shapes) - set(own))
    if unknown:
        raise ValueError(f"its weights have no place for {', '.join(unknown[:3])}")
    for name, shape in shapes.items():
        if shape != own[name]:
            raise ValueError(f"{name} has shape {shape}, and this run's {own[name]}")


def check_random_states(checkpoint: Path) -> None:
    """Tries the states of the random number generators on others. Raises whatever a generator raises."""
    for file in checkpoint.glob("rng_state*.pth"):
        states = load_values(file)
        random.Random().setstate(states["python"])
        np.random.RandomState().set_state(states["numpy"])
        torch.Generator().set_state(states["cpu"])


def check_schedule(checkpoint: Path, rate: float, groups: int) -> None:
    """Compares the schedule that was saved with the run's.

    Args:
        checkpoint: the folder.
        rate: the peak learning rate of the checkpoint's steps.
        groups: the number of parameter groups.

    Raises:
        ValueError: its values are of the wrong type.
        CheckpointError: its rate is another.
    """
    saved = load_values(checkpoint / "scheduler.pt")
    for saved_rate, own_rate in zip(saved["base_lrs"], [rate] * groups, strict=True):
        check_same(checkpoint, "learning_rate", saved_rate, own_rate)
    if not isinstance(saved["last_epoch"], int) or not 0 <= saved["last_epoch"] <= step_of(checkpoint):
        raise ValueError(f"its scheduler is at step {saved['last_epoch']!r}")


def check_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, earlier: Mapping[str, Any], *, all_weights: bool
) -> None:
    """Compares the optimizer that was saved with the run's: its settings, and which states it keeps for which weights.

    Args:
        checkpoint: the folder.
        optimizer: the run's, before its first step.
        earlier: settings of the checkpoint's steps that differ from the run's.
        all_weights: whether every weight must have a state.

    Raises:
        ValueError: states are missing, not finite or of other shapes.
        CheckpointError: a setting differs.
    """
    saved = load_values(checkpoint / "optimizer.pt")
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if len(own["params"]) != len(group["params"]):
            raise ValueError(f"its optimizer has {len(group['params'])} weights in a group of {len(own['params'])}")
        for name, value in own.items():
            if name in ("params", "lr", "initial_lr", *OPTIMIZER_IMPLEMENTATION):
                continue
            # the first group is the one whose weights decay
            changed = name in earlier and (name != "weight_decay" or own is optimizer.param_groups[0])
            check_same(checkpoint, name, group.get(name), earlier[name] if changed else value)
    weights = [weight for own in optimizer.param_groups for weight in own["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    states = [saved["state"].get(index) for index in indices]
    keeps_states = any("betas" in own for own in optimizer.param_groups)
    check_states(weights, states, required=keeps_states, all_weights=all_weights)


def check_states(
    weights: Sequence[nn.Parameter], states: Sequence[dict[str, Any] | None], *, required: bool, all_weights: bool
) -> None:
    """Compares the states of an optimizer with the weights that they belong to.

    Args:
        weights: the run's.
        states: the checkpoint's of each, or None.
        required: whether the optimizer keeps states.
        all_weights: whether every weight must have one.

    Raises:
        ValueError: states are missing, not finite or of other shapes.
    """
    there = [(weight, state) for weight, state in zip(weights, states, strict=True) if state]
    if required and (not there or (len(there) < len(weights) and all_weights)):
        raise ValueError(f"its optimizer knows {len(there)} of {len(weights)} weights")
    # Adafactor keeps rows and columns of a matrix in place of it
    has_factors = any(set(state) & FACTORS for _, state in there)
    if len({frozenset(state) for _, state in there}) > 1 and not has_factors:
        raise ValueError("its optimizer keeps other values for some weights than for others")
    for weight, state in there:
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.numel() > 1 and name not in FACTORS and value.shape != weight.shape:
                raise ValueError(f"{name} of its optimizer has shape {list(value.shape)} for {list(weight.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} of its optimizer holds values that are not finite")


def check_same(checkpoint: Path, name: str, saved: object, own: object) -> None:
    """Refuses a checkpoint of other settings than recorded, or than this run's where there is no record of them."""
    if saved != own:
        raise CheckpointError(
            f"The checkpoint in output_dir={checkpoint.parent} has {name}={saved!r}, and this run {own!r}: "
            "give the same, or another --output_dir."
        )
