"""The output folder of a run: the record of its settings, the files of its result, and whose they are."""

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME

import modeling_lambdabert
from lambdabert.training.checkpoints import CHECKPOINTS

logger = logging.getLogger(__name__)

RUN_SETTINGS_NAME = "run_settings.json"
EVALUATION_NAME = "evaluation.json"
CARD_NAME = "README.md"
# top-level keys of evaluation.json: now, and before it recorded model and text
REPORTS_OF_EVALUATIONS = ({"evaluated", "eval", "model", "data"}, {"train", "eval", "model", "data"})
# what every `RUN_SETTINGS_NAME` holds
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
    CARD_NAME,
    "training_curves.png",
    # of sentence-transformers
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*",
)


def read_record(output_dir: str | Path) -> dict[str, Any] | None:
    """Reads the settings of the run that an output folder belongs to; None if it belongs to no run.

    Raises:
        ValueError: its `run_settings.json` was written by something else.
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
        and isinstance(record.get("earlier", {}), dict)
    ):
        raise ValueError(
            f"{file} is not a record of this command. Nothing was overwritten; give another --output_dir, or remove "
            "the file if the folder may be overwritten."
        )
    return record


def read_evaluation(file: Path) -> dict[str, Any] | None:
    """The report of a run that evaluated without training; None if a file is none."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and set(report) in REPORTS_OF_EVALUATIONS else None


def check_same_evaluation(output_dir: str | Path, evaluated: Mapping[str, Any]) -> None:
    """Refuses to replace the evaluation of another model, or of another text.

    Args:
        output_dir: the folder.
        evaluated: what the report is to say of model and text.

    Raises:
        ValueError: the folder has the report of another; the text says what differs.
    """
    report = read_evaluation(Path(output_dir) / EVALUATION_NAME) or {}
    before = report.get("evaluated", evaluated)
    if differing := [name for name in evaluated if name in before and before[name] != evaluated[name]]:
        name = differing[0]
        raise ValueError(
            f"output_dir={output_dir} holds {EVALUATION_NAME} of {name}={before[name]}, and this is of "
            f"{evaluated[name]}; nothing was overwritten; give another --output_dir."
        )


def check_output_folder(output_dir: str | Path, training: bool) -> None:
    """Refuses a folder with files that a command would overwrite but did not write.

    Args:
        output_dir: the folder.
        training: whether more than the report of an evaluation will be written.

    Raises:
        ValueError: there are such files; the message names them.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={output_dir} is a file; name a folder.")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"output_dir={output_dir} cannot be written, because {nearest} is not a folder in which this user may "
            "write; name another."
        )
    if read_record(folder) is not None:
        return
    patterns = (*RUN_FILES, CHECKPOINTS) if training else (EVALUATION_NAME,)
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    foreign = sorted(file.name for file in found if file.name != EVALUATION_NAME or read_evaluation(file) is None)
    if foreign:
        raise ValueError(
            f"output_dir={output_dir} holds {', '.join(foreign[:5])}, which this command did not write; "
            "nothing was overwritten; give another --output_dir."
        )


def first_of(items: list[str], separator: str, count: int = 10) -> str:
    """Lists the first few of many items, and says how many more there are."""
    more = f" (and {len(items) - count} more)" if len(items) > count else ""
    return separator.join(items[:count]) + more


def differing(
    record: Mapping[str, Any], settings: Mapping[str, dict[str, Any]], may_change: Collection[str] = ()
) -> list[str]:
    """Says in which recorded settings, other than those of `may_change`, a run differs from its record."""
    return [
        f"{field} is {record[group][field]!r} there and {value!r} here"
        for group in SETTINGS_GROUPS
        for field, value in settings[group].items()
        if field not in may_change and record[group].get(field, value) != value
    ]


def check_same_run(output_dir: str | Path, settings: dict[str, dict[str, Any]], may_change: Collection[str]) -> None:
    """Compares the settings of this run with those recorded in its output folder.

    Settings that are not recorded, because an earlier version wrote the record, are assumed to be the same, and the log
    says so; those of the optimizer are then compared with the checkpoint's (`resuming`).

    Args:
        output_dir: the folder.
        settings: {group: {field: JSON value}}.
        may_change: fields that may differ.

    Raises:
        ValueError: the folder belongs to a run with other settings; the message names them.
    """
    record = read_record(output_dir)
    if record is None:
        return
    unrecorded = [field for group in SETTINGS_GROUPS for field in settings[group] if field not in record[group]]
    if differences := differing(record, settings, may_change):
        raise ValueError(
            f"output_dir={output_dir} belongs to another run: {first_of(differences, '; ')}. "
            "Nothing was overwritten; give another --output_dir to start afresh, or the same settings to resume."
        )
    if unrecorded:
        logger.warning(
            f"{Path(output_dir) / RUN_SETTINGS_NAME} does not record {first_of(unrecorded, ', ')}: assumed to be as "
            "given now."
        )


def record_run(output_dir: str | Path, record: dict[str, Any]) -> None:
    """Records the settings of a run in its output folder, which is this run's from then on."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    file = Path(output_dir) / RUN_SETTINGS_NAME
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def result_files(output_dir: str | Path) -> dict[str, int]:
    """The files of the model and its report: {name: bytes}."""
    files = {file for pattern in RUN_FILES for file in Path(output_dir).glob(pattern) if file.is_file()}
    return {file.name: file.stat().st_size for file in sorted(files)}
