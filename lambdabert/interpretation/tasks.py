"""Probing tasks in files, and every row of comparison for one."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .features import feature_rows
from .loading import LoadedModel
from .probes import SPLITS, ProbeResult, is_encoded, probe
from .tables import read_columns

logger = logging.getLogger(__name__)

COLUMNS = ("split", "label", "text")
NO_TARGET = "_"


@dataclass
class Task:
    """One label a text.

    Attributes:
        name: of the file.
        texts, labels, splits: [S] each.
        groups: [S], the word that decides each label, for control tasks and intervals; words that occur once share a
            group in pairs. None if the file names no target, or not that of every example.
    """

    name: str
    texts: list[str]
    labels: list[str]
    splits: list[str]
    groups: list[str] | None


def read_task(file: str | Path) -> Task:
    """Reads a task: tab-separated, with a header that names split, label, text and, where known, target.

    Logs a warning where dev or test repeat texts of train.

    Raises:
        ValueError: another shape; an unknown split; a label or a target that is blank; an empty file.
    """
    file = Path(file)
    columns, lines = read_columns(file, f"task={file}")
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(
            f"task={file} lacks the column {missing[0]}: its first line must name split, label, text and, where known, "
            "target, separated by tabs."
        )
    targets = columns.get("target", [])
    for number, split, label in zip(lines, columns["split"], columns["label"], strict=True):
        if split not in SPLITS:
            raise ValueError(f"task={file}, line {number}: split={split!r} is unknown; give {', '.join(SPLITS)}.")
        if not label.strip():
            raise ValueError(f"task={file}, line {number} has no label; give it one, or leave it out.")
    for number, target in zip(lines, targets):
        if not target.strip():
            raise ValueError(f'task={file}, line {number} has no target; write "{NO_TARGET}" where none is known.')
    if not columns["text"]:
        raise ValueError(f"task={file} holds no example; add lines below the header.")
    if len(classes := set(columns["label"])) < 2:
        raise ValueError(f"task={file}: all labels are {classes.pop()!r}, and there is nothing to tell apart.")
    known = {label for label, split in zip(columns["label"], columns["split"]) if split == "train"}
    for number, label, split in zip(lines, columns["label"], columns["split"], strict=True):
        if split != "train" and label not in known:
            raise ValueError(
                f"task={file}, line {number}: label={label!r} of {split} does not occur in train, so that no probe can "
                "learn it; put examples of it there, or correct it."
            )
    seen = {text for text, split in zip(columns["text"], columns["split"]) if split == "train"}
    held_out = zip(lines, columns["text"], columns["split"], strict=True)
    if repeated := [number for number, text, split in held_out if split != "train" and text in seen]:
        logger.warning(
            "task=%s: %d texts of dev and test occur in train as well, the first in line %d; a probe may know their "
            "labels by heart.",
            file,
            len(repeated),
            repeated[0],
        )
    groups = None if not targets or NO_TARGET in targets else _with_common_names(targets, f"task={file}")
    return Task(file.stem, columns["text"], columns["label"], columns["split"], groups)


def check_probes(task: Task, name: str) -> None:
    """Raises ValueError if probes of a task would lack a split, or have a single group."""
    if absent := [split for split in SPLITS if split not in task.splits]:
        raise ValueError(f"{name} has no example of split={absent[0]}; put some there.")
    if task.groups is not None and len(set(task.groups)) == 1:
        raise ValueError(f"{name}: every example has target={task.groups[0]!r}; give several, or leave the column out.")


def _with_common_names(targets: list[str], name: str) -> list[str]:
    """Targets, those of a single example under one name for two of them, or three where their number is odd."""
    counts = Counter(targets)
    single = [target for target, count in counts.items() if count == 1]
    if len(single) == 1:
        raise ValueError(
            f"{name}: target={single[0]!r} is a group with a single member, and the only one, so that it cannot share "
            "a name with another: leave that example out."
        )
    pairs = {target: f"{single[min(i // 2, len(single) // 2 - 1) * 2]} and another" for i, target in enumerate(single)}
    return [pairs.get(target, target) for target in targets]


def task_features(loaded: LoadedModel, task: Task) -> dict[str, torch.Tensor]:
    """`feature_rows` of a task's texts, [S, F] each, computed in the order of their lengths, which saves padding.

    Raises:
        ValueError: a text above the model's limit.
    """
    order = sorted(range(len(task.texts)), key=lambda text: len(task.texts[text]))
    batches = loaded.batches([task.texts[text] for text in order], f"task={task.name}, text")
    place = torch.tensor(order).argsort()
    return {name: rows[place] for name, rows in feature_rows(loaded.model, batches).items()}


def equal_dimension(features: Mapping[str, torch.Tensor]) -> int:
    """The smaller of the dimensions of a hidden state and a content lambda."""
    return min(rows.shape[1] for name, rows in features.items() if "hidden state" in name or "lambda" in name)


def probe_rows(
    task: Task, features: Mapping[str, torch.Tensor], dimension: int | None = None
) -> dict[str, ProbeResult]:
    """Probes of every row of features, by its name.

    Args:
        task: the labels.
        features: of the task's texts.
        dimension: as in `probe`.

    Raises:
        ValueError: as in `probe`.
    """
    rows = tqdm(features.items(), unit="row", desc=task.name)
    return {name: probe(row, task.labels, task.groups, task.splits, dimension) for name, row in rows}


def probe_task(task: Task, features: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Probes of every row of features, each in full and at equal dimension.

    Args:
        task: the labels.
        features: of the task's texts, by `task_features`.

    Returns:
        For each row of features its name, "full" and "equal dimension" (principal components, as many as the smaller of
        a hidden state and a content lambda has; rows with fewer keep theirs), each with what `summary` says.

    Raises:
        ValueError: as in `probe`.
    """
    equal = equal_dimension(features)
    full = probe_rows(task, features)
    wide = {name: rows for name, rows in features.items() if rows.shape[1] > equal}
    small = {**full, **probe_rows(task, wide, equal)}
    return [{"row": name, "full": summary(name, full), "equal dimension": summary(name, small)} for name in features]


def summary(name: str, found: Mapping[str, ProbeResult]) -> dict[str, Any]:
    """What a table says of one row of probes.

    Args:
        name: of the row.
        found: of all rows, "bag of words" among them.

    Returns:
        Accuracy (mean and of each seed), interval, number of groups of test examples, dimension, regularisation
        strength, control accuracy, selectivity, codelength and that of a uniform code, bits on dev, and whether the row
        is "encoded": above bag of words and above the same row of every model of random weights, by more than the
        interval. That is None for rows that are themselves compared with.
    """
    result = found[name]
    of_random_models = [rows for other, rows in found.items() if other.endswith(f", {name}")]
    return {
        "accuracy": result.accuracy,
        "interval": result.interval,
        "test groups": result.test_groups,
        "accuracies": result.accuracies,
        "dimension": result.dimension,
        "strength": result.strength,
        "control accuracy": result.control_accuracy,
        "selectivity": result.selectivity,
        "codelength": result.codelength,
        "uniform codelength": result.uniform_codelength,
        "bits on dev": result.dev_bits,
        "encoded": is_encoded(result, found["bag of words"], of_random_models) if of_random_models else None,
    }
