"""Documents of data sets: those of the hub, and folders that `datasets` reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lambdabert.text.arguments import CorpusArguments, no_effect
from lambdabert.text.cache import UnwritableCacheError, worker_processes, written_to_cache
from lambdabert.text.documents import DOCUMENT_FEATURES, detect_boundary, group_rows, log_boundary, write_documents
from lambdabert.text.files import DEFAULT_TEXT_COLUMN, UnreadableTextError, column_names, column_value

NO_HUB_ADVICE = (
    "Give local text with --train_file and a tokenizer folder with --tokenizer_name, "
    "or run configs/demo.json, which downloads nothing."
)
HUB_TIMEOUT = 10  # seconds


def data_set_documents(
    name: str, arguments: CorpusArguments, *, own_validation: bool
) -> dict[str, Dataset | IterableDataset]:
    """The documents of a data set's train split, and of its validation split if it is wanted and there.

    Raises:
        ValueError: it cannot be found or read, or has no train split or no such text column.
    """
    with _readable_data_set(name), written_to_cache(arguments.data_cache_dir), worker_processes():
        splits = _load_data_set(name, arguments)
    if "train" not in splits:
        raise ValueError(
            f"dataset_name={name!r} has no train split but {', '.join(splits)}: "
            "name one that has, or give its files with train_file."
        )
    if "validation" in splits and arguments.validation_split_percentage is not None:
        raise no_effect(arguments, "validation_split_percentage", f"{name} has a validation split")
    wanted = ("train", "validation") if own_validation else ("train",)
    with _readable_data_set(name):
        return {split: _split_documents(splits[split], split, arguments) for split in wanted if split in splits}


@contextmanager
def _readable_data_set(name: str) -> Iterator[None]:
    try:
        yield
    except (UnreadableTextError, UnwritableCacheError):
        raise
    except ConnectionError as error:
        raise UnreadableTextError(
            f"dataset_name={name!r} is not a folder here, and the hub cannot be reached. {NO_HUB_ADVICE}"
        ) from error
    except Exception as error:  # the reader of each format raises what it likes
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UnreadableTextError(
            f"dataset_name={name!r} cannot be read ({cause}): check its files, or give them with train_file."
        ) from error


def _load_data_set(name: str, arguments: CorpusArguments) -> dict[str, Dataset | IterableDataset]:
    if Path(name).is_file():
        raise UnreadableTextError(f"dataset_name={name!r} is a file: give it with train_file.")
    if not Path(name).is_dir():
        _check_hub(name)
    return load_dataset(
        name,
        arguments.dataset_config_name,
        streaming=arguments.streaming,
        num_proc=None if arguments.streaming else arguments.preprocessing_num_workers,
        cache_dir=arguments.data_cache_dir,
    )


def _check_hub(name: str) -> None:
    """Asks once, because `load_dataset` goes on asking an unreachable hub for half a minute."""
    try:
        validate_repo_id(name)
        if not is_offline_mode():
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise UnreadableTextError(
            f"dataset_name={name!r} is not a folder here, and on the hub it does not exist or is not open to you: "
            f"check the name (owner/name). {NO_HUB_ADVICE}"
        ) from error
    except HFValidationError as error:
        raise UnreadableTextError(
            f"dataset_name={name!r} is neither a folder nor a hub name (owner/name): check the path."
        ) from error
    except Exception as error:  # which HTTP library raises depends on the release of huggingface_hub
        raise ConnectionError(str(error)) from error


def _split_documents(
    rows: Dataset | IterableDataset, split: str, arguments: CorpusArguments
) -> Dataset | IterableDataset:
    rows = _text_column_of(rows, arguments)
    boundary = arguments.document_boundary
    if boundary == "auto":
        boundary = detect_boundary((row["text"] for row in rows), rows_are_lines=False)
    log_boundary(f"{arguments.dataset_name}, {split}", boundary, detected=arguments.document_boundary == "auto")
    if isinstance(rows, Dataset):
        if boundary == "row":
            return rows
        return write_documents(
            _group_data_set,
            {"rows": rows, "boundary": boundary},
            content=(rows._fingerprint, boundary),
            cache_dir=arguments.data_cache_dir,
        )
    if split == "validation":
        return Dataset.from_list(list(_group_data_set(rows, boundary)), features=DOCUMENT_FEATURES)
    if boundary == "row":
        return rows
    return IterableDataset.from_generator(
        _group_data_set, features=DOCUMENT_FEATURES, gen_kwargs={"rows": rows, "boundary": boundary}
    )


def _text_column_of(rows: Dataset | IterableDataset, arguments: CorpusArguments) -> Dataset | IterableDataset:
    """The data set with its text column alone, named "text"."""
    column = arguments.text_column or DEFAULT_TEXT_COLUMN
    first: dict[str, Any] = next(iter(rows), {})
    columns = column_names(first) or rows.column_names or []
    if column not in columns and column not in first:
        raise UnreadableTextError(
            f"text_column={column!r} is not a column of {arguments.dataset_name!r} ({', '.join(columns)}): name one."
        )
    feature = (rows.features or {}).get(column)
    value = column_value(first, column)
    holds = None
    if feature is not None:
        holds = getattr(feature, "dtype", None) or type(feature).__name__
    elif value is not None:
        holds = "string" if isinstance(value, str) else type(value).__name__
    if holds not in (None, "string", "large_string"):
        raise UnreadableTextError(
            f"text_column={column!r} of {arguments.dataset_name!r} holds {holds}, not text: name another column."
        )
    if column not in first and column not in (rows.column_names or ()):
        if isinstance(rows, Dataset):
            rows = rows.flatten()
        else:
            rows = rows.map(lambda row: {column: column_value(row, column)}, remove_columns=list(first))
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _group_data_set(rows: Dataset | IterableDataset, boundary: str) -> Iterator[dict[str, str]]:
    for text in group_rows((row["text"] for row in rows), boundary):
        yield {"text": text}
