"""What the fine-tuning examples share: options, data from files or the hub, and mistakes reported in one line."""

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, Trainer, TrainingArguments

import modeling_lambdabert  # noqa: F401  makes the model type known to transformers
from lambdabert.command_line import DataclassParser, error_line

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}
SPLITS = ("train", "validation", "test")
WITHOUT_EFFECT = ("do_predict", "eval_steps", "eval_on_start", "metric_for_best_model", "label_names")

Metrics = dict[str, float]


@dataclass
class Options:
    """What to fine-tune, and on which data."""

    model: str = field(
        default="checkpoints/wikipedia-small", metadata={"help": "Folder or hub name of a LambdaBERT, or of a BERT."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Data to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Data to evaluate the result on."})
    test_file: str | None = field(default=None, metadata={"help": "More data to evaluate the result on."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the hub, or a folder, in place of files; its splits are used."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Which configuration of that data set."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text; what is beyond is cut off."})


@dataclass
class Training(TrainingArguments):
    """The Trainer's arguments, with defaults that suit a small data set."""

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples a step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples at a time in evaluation."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 the share of them, of warm-up."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints besides the result."})
    report_to: str = field(default="none", metadata={"help": "Where to log to."})


def parse(argv: list[str] | None, *groups: Any) -> tuple[Any, ...]:
    """Reads flags into one instance of each dataclass.

    Raises:
        ValueError: options contradict each other or have no effect, there is no such model, or the output folder holds
            something.
    """
    options, training = DataclassParser(dataclass_types=groups).parse_args_into_dataclasses(argv)
    if (options.dataset_name is None) == (options.train_file is None):
        raise ValueError("Name the data by either --train_file or --dataset_name.")
    if options.dataset_name:
        for name in ("validation_file", "test_file"):
            if file := getattr(options, name):
                raise ValueError(f"{name}={file} has no effect: dataset_name has splits of its own; leave one out.")
    elif options.dataset_config is not None:
        raise ValueError(f"dataset_config={options.dataset_config} has no effect without --dataset_name; leave it out.")
    if options.train_file and not (options.validation_file or options.test_file):
        raise ValueError(f"train_file={options.train_file}: give a --validation_file or --test_file to evaluate on.")
    for name, value in (("eval_do_concat_batches", False), ("prediction_loss_only", True)):
        if type(training) is Training and getattr(training, name) is value:  # sentence vectors need no predictions
            raise ValueError(f"{name}={value}: the results are computed from all predictions; leave it out.")
    if type(training) is Training and not training.remove_unused_columns:
        raise ValueError("remove_unused_columns=False: examples keep columns that no model takes; leave it out.")
    for name in WITHOUT_EFFECT:
        if getattr(training, name) not in (None, False):
            raise ValueError(
                f"{name}={getattr(training, name)}: the result is evaluated once, at the end, on all files but that "
                "which trains; leave it out."
            )
    if training.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint={training.resume_from_checkpoint} has no effect: the result is trained from the "
            "start, in a new folder; give the checkpoint as --model, or leave it out."
        )
    if training.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value}: the result is evaluated at the end, and nothing before; "
            "leave it out, and with it load_best_model_at_end."
        )
    if training.do_eval and not training.do_train:
        raise ValueError("do_eval=True: the model is trained, and then evaluated in any case; leave it out.")
    if options.max_seq_length < 3:
        raise ValueError(f"max_seq_length={options.max_seq_length} leaves no token between [CLS] and [SEP]; give more.")
    folder = Path(training.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output_dir={folder} holds something already; name another folder.")
    check_model(options)
    transformers.set_seed(training.seed)
    return options, training


def check_smoothing(training: Training) -> None:
    """Raises ValueError if label smoothing is asked for, of which the Trainer smooths `labels` alone."""
    if training.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={training.label_smoothing_factor} has no effect on this loss; leave it out."
        )


def check_model(options: Options) -> None:
    """Raises ValueError if there is no such model, or it takes fewer tokens than `max_seq_length`."""
    try:
        config = AutoConfig.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={options.model} is not the folder or hub name of a model ({error}).") from error
    limit = config.longest_sequence if config.model_type == "lambdabert" else config.max_position_embeddings
    if limit is not None and options.max_seq_length > limit:
        raise ValueError(f"max_seq_length={options.max_seq_length}: {options.model} takes {limit} tokens at most.")


def read_table(file: str) -> Dataset:
    """Reads a CSV file with a header, a JSON list of objects, or JSON lines. Raises ValueError."""
    reader = READERS.get(Path(file).suffix.lower())
    if reader is None:
        raise ValueError(f"{file}: the name should end in {', '.join(READERS)}, as its format does.")
    given: dict[str, Any] = {}
    try:
        if reader == "csv":  # everything as it stands there: "NA" is a text, and "01" and "1" are two labels
            with open(file, encoding="utf-8-sig", newline="") as lines:
                names = [name or f"Unnamed: {i}" for i, name in enumerate(next(csv.reader(lines), []))]
            given = {"keep_default_na": False, "features": Features({name: Value("string") for name in names})}
        return load_dataset(reader, data_files=file, split="train", **given)
    except Exception as error:  # a broken file raises whatever its reader stumbles over
        if "corresponds to no data" in str(error):
            raise ValueError(f"{file} has no rows.") from error
        raise ValueError(f"{file} cannot be read as {reader.upper()} ({error.__cause__ or error}).") from error


def read_splits(options: Options, columns: dict[str, str], read: Callable[[str], Dataset] = read_table) -> DatasetDict:
    """The splits to train and evaluate on: "train", and "validation", "test" or both; of columns, those that are used.

    Args:
        options: where they are.
        columns: those that each must have, by the option that names them.
        read: reads a file.

    Raises:
        ValueError: a file cannot be read, or a split or column is missing or empty.
    """
    if options.dataset_name:
        where = f"dataset_name={options.dataset_name}"
        try:
            data = load_dataset(options.dataset_name, options.dataset_config)
        except Exception as error:  # as of a broken file
            raise ValueError(f"{where} cannot be loaded ({error.__cause__ or error}).") from error
        if "train" not in data or len(data.keys() & set(SPLITS)) < 2:
            raise ValueError(f"{where} has the splits {', '.join(data)}; it takes train, and validation or test.")
    else:
        files = {split: getattr(options, f"{split}_file") for split in SPLITS}
        if missing := [f"{split}_file={file}" for split, file in files.items() if file and not Path(file).is_file()]:
            raise ValueError(f"{', '.join(missing)}: no such file.")
        data = DatasetDict({split: read(file) for split, file in files.items() if file})
    data = DatasetDict({split: data[split] for split in SPLITS if split in data})
    for split in data:
        check_columns(data, split, columns)
    used = {*columns.values(), *(value for name, value in vars(options).items() if name.endswith("_column"))}
    kept = {split: [name for name in rows.column_names if name in used] for split, rows in data.items()}
    return DatasetDict({split: rows.select_columns(kept[split]) for split, rows in data.items()})


def check_texts(splits: DatasetDict, columns: dict[str, str]) -> None:
    """Raises ValueError if one of `columns`, which map an option to the column it names, holds something else."""
    for split, rows in splits.items():
        for option, column in columns.items():
            feature = rows.features[column]
            kind = getattr(feature, "dtype", type(feature).__name__)  # lists and objects have none
            if kind not in ("string", "large_string"):
                raise ValueError(
                    f"{option}={column} of the {split} data holds values of type {kind}, not texts; name another."
                )
            if missing := [i for i, text in enumerate(rows[column], 1) if not (text and text.strip())]:
                raise ValueError(
                    f"{option}={column}: {len(missing)} rows of the {split} data have no text, row {missing[0]} the "
                    "first of them; leave them out."
                )


def check_columns(data: DatasetDict, split: str, columns: dict[str, str]) -> None:
    """Raises ValueError if a split is empty or lacks one of `columns`, which map an option to the column it names."""
    if not len(data[split]):
        raise ValueError(f"The {split} data is empty.")
    for option, column in columns.items():
        if column not in data[split].column_names:
            has = ", ".join(data[split].column_names)
            raise ValueError(f"{option}={column}: the {split} data has no such column; it has {has}.")


def evaluated(splits: DatasetDict) -> list[str]:
    """The splits that are not trained on."""
    return [split for split in splits if split != "train"]


def train_and_evaluate(trainer: Trainer, splits: DatasetDict, evaluate: Callable[[str], Metrics]) -> Metrics:
    """Trains, saves the model, and prints and writes what `evaluate` finds on each of the other splits."""
    trainer.train()
    trainer.save_model()
    trainer.args.dataloader_drop_last = False  # of training alone: results are of all rows
    trainer.args.train_sampling_strategy = "random"  # by length, it would order what is evaluated, too
    found: Metrics = {}
    for split in evaluated(splits):
        metrics = {f"{split}_{name}": value for name, value in evaluate(split).items()}
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        found |= metrics
    return found


def run(work: Callable[[list[str] | None], Metrics]) -> int:
    """Runs an example on the command's flags; returns its exit status. A mistake is reported in one line on stderr."""
    try:
        work(None)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        print(error_line(error), file=sys.stderr)
        return 1
    return 0
