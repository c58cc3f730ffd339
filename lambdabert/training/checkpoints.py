"""Checkpoints: which of them are complete, and what is said if one cannot be read or written.

A checkpoint is complete once its `trainer_state.json`, which is written after everything else, is there and every file
beside it can be opened; anything else is never loaded.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

logger = logging.getLogger(__name__)

CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*"
CHECKPOINT_PARTS = (
    (TRAINER_STATE_NAME,),
    (CONFIG_NAME, "pytorch_model_fsdp*"),
    ("model*.safetensors", "pytorch_model_fsdp*"),
    ("optimizer*",),
    ("scheduler.pt",),
    ("rng_state*.pth",),
)


class CheckpointError(Exception):
    """A checkpoint cannot be resumed from or written, or training failed; the message says why and what to do."""


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turns any error in reading a checkpoint into a `CheckpointError`."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file may hold anything
        first_line = (str(error).splitlines() or [""])[0]
        reason = (
            "a file holds something other than tensors and plain values, and nothing in it was run"
            if isinstance(error, pickle.UnpicklingError)
            else f"{type(error).__name__}: {first_line}"
        )
        raise CheckpointError(
            f"{folder} cannot be resumed from ({reason}). Remove it and start the same command again: it resumes from "
            "the checkpoint before it, if there is one."
        ) from error


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turns a full disk, however a library reports it, into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        # tokenizers raise Exception itself
        if not isinstance(error, OSError | RuntimeError | SafetensorError) and type(error) is not Exception:
            raise
        raise CheckpointError(
            f"{folder} could not be written ({error}). Free or add space and start the same command again: "
            "it resumes from the last complete checkpoint."
        ) from error


def load_values(file: Path) -> Any:
    """Reads a torch file of tensors and plain values, without copying the tensors. Anything else is an error."""
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def is_readable(file: Path) -> bool:
    """Whether a JSON, safetensors or torch file is complete, judged by its structure alone."""
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return False
    elif file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    return True


def is_complete(checkpoint: Path) -> bool:
    """Whether no file of a checkpoint is missing or truncated."""
    return all(any(any(checkpoint.glob(name)) for name in names) for names in CHECKPOINT_PARTS) and all(
        is_readable(file) for file in checkpoint.rglob("*") if file.is_file()
    )


def numbered_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The steps and the folder of each checkpoint, complete or not; the most steps first."""
    numbered = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob(CHECKPOINTS)
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and folder.is_dir()
    ]
    return sorted(numbered, reverse=True)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the most steps, or None; the log names the incomplete ones."""
    for _, folder in numbered_checkpoints(output_dir):
        if is_complete(folder):
            return folder
        logger.warning(f"{folder} is incomplete and is not used.")
    return None


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def read_state(checkpoint: Path) -> TrainerState:
    """The `trainer_state.json` of a checkpoint.

    Raises:
        CheckpointError: the file holds something else, or the state of another step.
    """
    with reading(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        expected: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("global_step", "max_steps", "train_batch_size", "num_input_tokens_seen"), (int,)),
            **dict.fromkeys(("epoch", "total_flos"), (int, float)),
        }
        for name, kinds in expected.items():
            value = getattr(state, name)
            if not is_number(value, kinds) or not 0 <= value < float("inf"):
                raise ValueError(f"{TRAINER_STATE_NAME} has {name}={value!r}, which is not a count")
        optional: dict[str, tuple[type, ...]] = {"best_global_step": (int,), "best_metric": (int, float)}
        for name, kinds in optional.items():
            if (value := getattr(state, name)) is not None and not is_number(value, kinds):
                raise ValueError(f"{TRAINER_STATE_NAME} has {name}={value!r}, which is not a number")
        if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}":
            raise ValueError(f"{TRAINER_STATE_NAME} has global_step={state.global_step}")
        history = state.log_history
        if not isinstance(history, list) or not all(
            isinstance(record, dict) and "step" in record and all(map(is_number, record.values())) for record in history
        ):
            raise ValueError(f"log_history of {TRAINER_STATE_NAME} is not a list of records of numbers")
        if not isinstance(state.best_model_checkpoint, str | None) or not isinstance(state.stateful_callbacks, dict):
            raise ValueError(f"{TRAINER_STATE_NAME} has values of the wrong type")
    return state
