"""Fine-tunes a LambdaBERT to sort texts into classes.

    python -m examples.text_classification --train_file banking77/train.csv --test_file banking77/test.csv \
        --label_column category --num_train_epochs 10 --learning_rate 1e-3 --output_dir models/banking77

Each split is a table with a text and a label column. The result is a folder for `pipeline("text-classification")`.
"""

import math
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, Trainer
from transformers.trainer_utils import PredictionOutput

from examples.common import Metrics, Options, Training, check_texts, parse, read_splits, run, train_and_evaluate


@dataclass
class TextOptions(Options):
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or numbers."})


def read_texts(options: TextOptions) -> DatasetDict:
    """The splits. Raises ValueError if the column does not hold text, or is that of the labels too."""
    if options.text_column == options.label_column:
        raise ValueError(f"text_column and label_column are both {options.text_column}; name two columns.")
    splits = read_splits(options, {"text_column": options.text_column, "label_column": options.label_column})
    check_texts(splits, {"text_column": options.text_column})
    return splits


def place(name: str) -> tuple[bool, float, str]:
    """What class names are sorted by: numbers come first, in their order and not in that of their digits."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name


def is_measured(labels: list) -> bool:
    """Whether labels are floating-point numbers, or all of them are numbers and some not whole ones."""
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError):
        return False
    return any(isinstance(label, float) for label in labels) or any(
        math.isfinite(number) and not number.is_integer() for number in numbers
    )


def with_class_labels(splits: DatasetDict, column: str) -> DatasetDict:
    """Labels as numbers with names: those that they have, or the sorted values of the training data.

    Raises:
        ValueError: a row has no label, labels are measurements, or another split has a class that the training data
            lacks.
    """
    if isinstance(splits["train"].features[column], ClassLabel):
        return labelled(splits, column)
    if any(isinstance(label, list | dict) for label in splits["train"][column]):
        raise ValueError(f"label_column={column} holds several labels in a row; this example takes one for each text.")
    for split, rows in splits.items():
        if missing := [i for i, label in enumerate(rows[column]) if label is None or not str(label).strip()]:
            raise ValueError(
                f"label_column={column}: {len(missing)} rows of the {split} data have no label, row {missing[0] + 1} "
                "the first of them; give them labels or leave them out."
            )
        if is_measured(labels := list(rows[column])):
            shown = next((label for label in labels if not float(label).is_integer()), labels[0])
            raise ValueError(
                f"label_column={column} of the {split} data holds {shown}: labels are measurements, and this example "
                "takes classes; give names or whole numbers."
            )
    names = sorted({str(label) for label in splits["train"][column]}, key=place)
    if len(names) < 2:
        raise ValueError(f"label_column={column}: the training data has the one class {names}, nothing to tell apart.")
    for split, rows in splits.items():
        if unknown := sorted(set(map(str, rows[column])) - set(names)):
            raise ValueError(f"{column}={unknown[0]!r} of the {split} data does not occur in the training data.")
    features = splits["train"].features.copy()
    features[column] = ClassLabel(names=names)
    numbers = {name: number for number, name in enumerate(names)}
    return splits.map(lambda row: {column: numbers[str(row[column])]}, features=features)


def labelled(splits: DatasetDict, column: str) -> DatasetDict:
    """The splits whose labels are given: data sets of the hub often keep those of their test data secret, as -1.

    Raises:
        ValueError: some rows of a split have none, or nothing is left to train and to evaluate on.
    """
    without = {split: sum(label is None or label < 0 for label in rows[column]) for split, rows in splits.items()}
    for split, count in without.items():
        if 0 < count < len(splits[split]):
            raise ValueError(f"label_column={column}: {count} rows of the {split} data have no label; leave them out.")
    kept = DatasetDict({split: rows for split, rows in splits.items() if not without[split]})
    if left_out := ", ".join(splits.keys() - kept.keys()):
        print(f"Left out the {left_out} data, which has no labels.")
    if "train" not in kept or len(kept) < 2:
        raise ValueError(f"label_column={column}: the {left_out} data has no labels; give data that has.")
    return kept


def new_classifier(options: TextOptions, splits: DatasetDict) -> PreTrainedModel:
    """The model, with a new head for the classes of the data, unless it has one for as many."""
    names = splits["train"].features[options.label_column].names
    return AutoModelForSequenceClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="single_label_classification",  # whatever the model was for before
        ignore_mismatched_sizes=True,  # a head for other classes is replaced
        dtype=torch.float32,
    )


def accuracy_and_f1(prediction: PredictionOutput) -> Metrics:
    """Accuracy, and F1 as the mean over classes, of logits [B, classes]."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, predicted),
        "macro_f1": f1_score(prediction.label_ids, predicted, average="macro"),
    }


def fine_tune(model: nn.Module, splits: DatasetDict, options: TextOptions, training: Training) -> Metrics:
    """Trains and evaluates a classifier."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(rows: dict) -> dict:
        encoded = tokenizer(rows[options.text_column], truncation=True, max_length=options.max_seq_length)
        return encoded | {"labels": rows[options.label_column]}

    encoded = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    trainer = Trainer(model, training, train_dataset=encoded["train"], processing_class=tokenizer)
    return train_and_evaluate(trainer, splits, lambda split: accuracy_and_f1(trainer.predict(encoded[split])))


def main(argv: list[str] | None = None) -> Metrics:
    options, training = parse(argv, TextOptions, Training)
    splits = with_class_labels(read_texts(options), options.label_column)
    return fine_tune(new_classifier(options, splits), splits, options, training)


if __name__ == "__main__":
    sys.exit(run(main))
