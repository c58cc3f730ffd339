"""What a run leaves in its output folder: the record of its settings, checkpoints, the model and its report.

A checkpoint is whole once its `trainer_state.json`, which is written after everything else, is there and every file
beside it can be opened; anything else is never loaded.
"""

import json
import logging
import pickle
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

import modeling_lambdabert

logger = logging.getLogger(__name__)

RUN_SETTINGS_NAME = "run_settings.json"
EVALUATION_NAME = "evaluation.json"
# what `write_report` puts into the latter
REPORT_GROUPS = {"train", "eval", "model", "data"}
# of a `RUN_SETTINGS_NAME` that a command wrote
SETTINGS_GROUPS = ("data", "model", "training")
# a saved model brings the file that defines it and its flat siblings
CODE_FILES = {
    Path(file).name for file in (modeling_lambdabert.__file__, *get_relative_import_files(modeling_lambdabert.__file__))
}
# what training leaves at the top of its output folder: patterns
RUN_FILES = (
    *sorted(CODE_FILES),
    CONFIG_NAME,
    "model*.safetensors*",
    "tokenizer*",
    TRAINING_ARGS_NAME,
    "metrics.json",
    "README.md",
    "training_curves.png",
    # of sentence-transformers
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*",
)
CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*"
CHECKPOINT_PARTS = (
    (TRAINER_STATE_NAME,),
    (CONFIG_NAME, "pytorch_model_fsdp*"),
    ("model*.safetensors", "pytorch_model_fsdp*"),
    ("optimizer*",),
    ("scheduler.pt",),
    ("rng_state*.pth",),
)
# how long a run is; a checkpoint is gone on from to another length by a rule of its own (`TrainingRun.check_length`)
LENGTH_FIELDS = ("max_steps", "num_train_epochs", "attention_steps")


class CheckpointError(Exception):
    """A run cannot go on from a checkpoint, or not to the next; the text says why and what to do."""


@contextmanager
def reading(folder):
    """Turns whatever is wrong with a checkpoint's content into a `CheckpointError`."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file may hold anything
        first_line = (str(error).splitlines() or [""])[0]
        reason = (
            "a file holds more than tensors and plain values, and nothing in it was run"
            if isinstance(error, pickle.UnpicklingError)
            else f"{type(error).__name__}: {first_line}"
        )
        raise CheckpointError(
            f"{folder} cannot be gone on from ({reason}). Remove it and start the same command again: it goes on from "
            "the checkpoint before it, if there is one."
        ) from error


@contextmanager
def writing(folder):
    """Turns a full disk, in whatever words a library reports it, into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        # tokenizers raise Exception itself
        if not isinstance(error, OSError | RuntimeError | SafetensorError) and type(error) is not Exception:
            raise
        raise CheckpointError(
            f"{folder} could not be written ({error}). Free or add space and start the same command again: "
            "it goes on from the last whole checkpoint."
        ) from error


def is_readable(file: Path) -> bool:
    """Whether a JSON, safetensors or torch file is complete, by its structure alone."""
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


def is_whole(checkpoint: Path) -> bool:
    """Whether nothing is missing from a checkpoint folder and no file in it is cut short."""
    return all(any(any(checkpoint.glob(name)) for name in names) for names in CHECKPOINT_PARTS) and all(
        is_readable(file) for file in checkpoint.rglob("*") if file.is_file()
    )


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the most steps that can be resumed from, or None; the log names those that cannot."""
    numbered = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob(CHECKPOINTS)
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and folder.is_dir()
    ]
    for _, folder in sorted(numbered, reverse=True):
        if is_whole(folder):
            return folder
        logger.warning(f"{folder} was not written to its end and is not used.")
    return None


def is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def read_state(checkpoint: Path) -> TrainerState:
    """The `trainer_state.json` of a checkpoint.

    Raises:
        CheckpointError: it holds something else, or another step's state.
    """
    with reading(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        expected = {
            **dict.fromkeys(("global_step", "max_steps", "train_batch_size", "num_input_tokens_seen"), (int,)),
            **dict.fromkeys(("epoch", "total_flos"), (int, float)),
        }
        for name, kind in expected.items():
            value = getattr(state, name)
            if not is_number(value, kind) or not 0 <= value < float("inf"):
                raise ValueError(f"{TRAINER_STATE_NAME} has {name}={value!r}, which is no count")
        for name, kind in (("best_global_step", (int,)), ("best_metric", (int, float))):
            if (value := getattr(state, name)) is not None and not is_number(value, kind):
                raise ValueError(f"{TRAINER_STATE_NAME} has {name}={value!r}, which is no number")
        if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}":
            raise ValueError(f"{TRAINER_STATE_NAME} has global_step={state.global_step}")
        history = state.log_history
        if not isinstance(history, list) or not all(
            isinstance(record, dict) and "step" in record and all(map(is_number, record.values())) for record in history
        ):
            raise ValueError(f"log_history of {TRAINER_STATE_NAME} is no list of records of numbers")
        if not isinstance(state.best_model_checkpoint, str | None) or not isinstance(state.stateful_callbacks, dict):
            raise ValueError(f"{TRAINER_STATE_NAME} has values of a wrong type")
    return state


def read_record(output_dir: str | Path) -> dict | None:
    """The settings of the run that an output folder belongs to; None if it belongs to none.

    Raises:
        ValueError: its `run_settings.json` is something else's.
    """
    file = Path(output_dir) / RUN_SETTINGS_NAME
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not (
        isinstance(record, dict)
        and all(isinstance(record.get(group), dict) for group in SETTINGS_GROUPS)
        and "tokenizer" in record["data"]
        and "seed" in record["training"]
    ):
        raise ValueError(
            f"{file} is no record of this command; nothing was overwritten; give another --output_dir, or remove the "
            "file if the folder may be overwritten."
        )
    return record


def is_evaluation(file: Path) -> bool:
    """Whether a file is the report of an evaluation without training."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and set(report) == REPORT_GROUPS


def check_output_folder(output_dir: str | Path, training: bool):
    """Refuses a folder with files that a command would overwrite and did not write.

    Args:
        training: whether more than the report of an evaluation will be written.

    Raises:
        ValueError: there are some; the text names them.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={output_dir} is a file; name a folder.")
    if read_record(folder) is not None:
        return
    patterns = (*RUN_FILES, CHECKPOINTS) if training else (EVALUATION_NAME,)
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    foreign = sorted(file.name for file in found if file.name != EVALUATION_NAME or not is_evaluation(file))
    if foreign:
        raise ValueError(
            f"output_dir={output_dir} holds {', '.join(foreign[:5])} from something else than this command; "
            "nothing was overwritten; give another --output_dir."
        )


def first_of(items: list[str], separator: str, count: int = 10) -> str:
    """The first of many things to be named, and how many there are more."""
    more = f" (and {len(items) - count} more)" if len(items) > count else ""
    return separator.join(items[:count]) + more


def check_same_run(output_dir: str | Path, settings: dict, resumed: bool):
    """Compares the settings of this run with those recorded in its output folder.

    What is not recorded, because an earlier version wrote the record, is taken as given, and the log says so; the
    optimizer's own settings are then compared with those in the checkpoint (`InterruptibleTrainer`).

    Args:
        settings: {group: {field: JSON value}}.
        resumed: whether a checkpoint is gone on from, so that the length may change.

    Raises:
        ValueError: the folder belongs to a run with other settings; the text names them.
    """
    record = read_record(output_dir)
    if record is None:
        return
    differences, unrecorded = [], []
    for group in SETTINGS_GROUPS:
        for field, value in settings[group].items():
            if field not in record[group]:
                unrecorded.append(field)
            elif record[group][field] != value and not (resumed and field in LENGTH_FIELDS):
                differences.append(f"{field} is {record[group][field]!r} there and {value!r} here")
    if differences:
        raise ValueError(
            f"output_dir={output_dir} belongs to another run: {first_of(differences, '; ')}. "
            "Nothing was overwritten; give another --output_dir to start afresh, or the same settings to go on."
        )
    if unrecorded:
        logger.warning(
            f"{Path(output_dir) / RUN_SETTINGS_NAME} does not record {first_of(unrecorded, ', ')}: taken to be what "
            "this command gives."
        )


def record_run(output_dir: str | Path, record: dict):
    """Marks the output folder as this run's."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    file = Path(output_dir) / RUN_SETTINGS_NAME
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def result_files(output_dir: str | Path) -> dict[str, int]:
    """The model and its report: names and sizes, bytes."""
    files = {file for pattern in RUN_FILES for file in Path(output_dir).glob(pattern) if file.is_file()}
    return {file.name: file.stat().st_size for file in sorted(files)}
