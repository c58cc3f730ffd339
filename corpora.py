"""Where the text comes from: hub data sets, local files and the built-in corpus, as one document a row."""

import codecs
import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)

DOCUMENT_BOUNDARIES = ("auto", "row", "blank_line", "section", "heading")
LINE_BREAKS = ("keep", "join")
BUILT_IN_CORPORA = ("python-docs",)
DEFAULT_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")
NO_HUB_ADVICE = (
    "Give local text with --train_file and a tokenizer folder with --tokenizer_name, "
    "or run configs/demo.json, which downloads nothing."
)
DEFAULT_TEXT_COLUMN = "text"
DEFAULT_ENCODING = "utf-8"
DEFAULT_VALIDATION_PERCENTAGE = 5.0
HUB_TIMEOUT = 10  # seconds

DOCUMENT_FEATURES = Features({"text": Value("large_string")})
DOCUMENTS_AT_A_TIME = 64
DOCUMENTS_WRITTEN_AT_A_TIME = 256
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
FILE_KINDS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
LINES_INSPECTED = 10_000
BYTES_AT_A_TIME = 1 << 20
SECONDS_BETWEEN_LOOKS = 1.0
PREPARATION_CODE = Path(__file__).read_bytes()

# WikiText writes " = Title = " above an article and " = = Section = = " within it.
ARTICLE_HEADING = re.compile(r"= (?!=).*(?<!=) =")
# WikiText writes "17 @-@ year", "1 @,@ 000" and "3 @.@ 5" for 17-year, 1,000 and 3.5.
WIKITEXT_JOINER = re.compile(r" @([-,.])@ ")
# Lines are hard-wrapped if a share of `MOSTLY_WRAPPED` of `FEWEST_BREAKS` or more breaks within paragraphs are wraps.
WIDEST_WRAP = 120  # characters
FEWEST_BREAKS = 10
MOSTLY_WRAPPED = 0.5
SENTENCE_END = re.compile(r"[.!?…。！？:;][\"'”’»)\]]*$")
JSON_SPACE = re.compile(r"\s*")
PYTHON_DOCS_UNDERLINE = re.compile(r"^([*=~^-])\1+$", flags=re.MULTILINE)


class UnreadableTextError(ValueError):
    """A text source is missing, damaged or not what its name says."""


class UnwritableCacheError(ValueError):
    """Prepared text cannot be written into the data cache."""


@dataclass
class CorpusArguments:
    """Which text to read, and how it falls into documents.

    Raises:
        ValueError: If two sources are given, or a field holds a value that it cannot have.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or local folder of a data set, such as wikimedia/wikipedia. "
            f"Without any source: {DEFAULT_DATASET[0]}, {DEFAULT_DATASET[1]}."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set, such as 20231101.en."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training files, folders or glob patterns: text, CSV (.csv, .tsv), JSON (.json, .jsonl, .ndjson) "
            "or Parquet (.parquet); all but Parquet may be compressed (.gz, .xz, .zst)."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Validation files, folders or glob patterns, of the same kinds."}
    )
    corpus: str | None = field(
        default=None,
        metadata={"help": "A corpus that needs no file: python-docs, the reference topics that every CPython carries."},
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the text in data sets, CSV, JSON and Parquet; 'text' if not given. A column "
            "within another is named as in 'article.body'."
        },
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of text, CSV and JSON files, such as latin-1 or utf-16; UTF-8 if not given."},
    )
    line_breaks: str | None = field(
        default=None,
        metadata={
            "help": "What a line break in a text file is: the end of a paragraph (keep, if not given), or a space "
            "within one that ends at a blank line (join), as in books with hard-wrapped lines.",
            "choices": list(LINE_BREAKS),
        },
    )
    document_boundary: str = field(
        default="auto",
        metadata={
            "help": "What a document is: a row or line (row), the lines between blank lines (blank_line) or between "
            "gaps of several blank lines (section), or the lines from one WikiText ' = Title = ' heading to the next "
            "(heading). auto detects it and logs what it found.",
            "choices": list(DOCUMENT_BOUNDARIES),
        },
    )
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": "Percentage of the training documents held out where there is no validation data; 5 if not given."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training text while training instead of preparing it on disk."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare the text; one if not given."}
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared data is kept; the cache of `datasets` if not given."}
    )

    def __post_init__(self):
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self._check_values()
        self._check_combinations()
        if not any((self.dataset_name, self.train_file, self.corpus, self.validation_file)):
            self.dataset_name, self.dataset_config_name = DEFAULT_DATASET

    def _check_values(self):
        choices = {
            "document_boundary": DOCUMENT_BOUNDARIES,
            "corpus": (None, *BUILT_IN_CORPORA),
            "line_breaks": (None, *LINE_BREAKS),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                known = ", ".join(filter(None, values))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {known}.")
        for name in ("dataset_name", "train_file", "validation_file", "text_column"):
            if getattr(self, name) in ("", [], [""]):
                raise ValueError(f"{name} is given without a value: name something, or leave it out.")
        if self.encoding is not None:
            _check_encoding(self.encoding)
        if self.validation_split_percentage is not None and not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage} must lie between 0 and 100."
            )
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise ValueError(f"preprocessing_num_workers={self.preprocessing_num_workers} must be 1 or more.")

    def _check_combinations(self):
        sources = [name for name in ("dataset_name", "train_file", "corpus") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both given: keep one source of training text.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(
                f"dataset_config_name={self.dataset_config_name!r} needs dataset_name: name the data set it belongs to."
            )
        if self.line_breaks == "join" and self.document_boundary == "row":
            raise ValueError(
                "line_breaks='join' contradicts document_boundary='row', which makes each line a document: leave one "
                "of them out."
            )
        if self.validation_split_percentage is not None:
            if self.validation_file:
                raise no_effect(self, "validation_split_percentage", "validation_file is given")
            if self.streaming:
                raise no_effect(self, "validation_split_percentage", "documents cannot be held out of a stream")
        if self.preprocessing_num_workers is not None and self.streaming and not self.validation_file:
            if self.train_file or self.corpus:
                raise no_effect(self, "preprocessing_num_workers", "a stream is prepared while it is read")


def no_effect(arguments: object, name: str, reason: str) -> ValueError:
    """The error of an option that cannot take effect."""
    return ValueError(f"{name}={getattr(arguments, name)!r} has no effect: {reason}. Leave it out.")


def load_corpus(
    arguments: CorpusArguments, *, train: bool = True, evaluate: bool = True, seed: int = 42
) -> dict[str, Dataset | IterableDataset]:
    """Reads the text and finds its documents.

    Args:
        arguments: The sources.
        train: Whether training documents are wanted.
        evaluate: Whether validation documents are wanted. They are the validation files or the data set's own
            validation split; without either, a share of the training documents is held out.
        seed: Chooses the documents that are held out.

    Returns:
        Under "train" and "validation", as wanted, a data set with the column "text" and one document a row; a row
        without text stays as an empty document. With `arguments.streaming` the training documents are an
        `IterableDataset`; validation documents never are.

    Raises:
        ValueError: If a file, a data set or a column is missing, empty, unreadable or not what its name says, if an
            option has no effect on these sources, if there is nothing to train on, or too little to hold documents
            out.
    """
    _check_source(arguments)
    documents = {}
    if evaluate and arguments.validation_file:
        documents["validation"] = _file_documents(arguments, "validation_file", streaming=False)
    if train or not documents:
        documents = _training_source(arguments, own_validation=evaluate and not documents) | documents
    if evaluate and "validation" not in documents:
        documents = _hold_out(documents["train"], arguments, seed)
    return {split: documents[split] for split, wanted in (("train", train), ("validation", evaluate)) if wanted}


@dataclass(frozen=True)
class DocumentTexts:
    """The text of each document that has any; read anew each time it is gone through.

    Attributes:
        documents: One document a row, in the column "text".
        limit: How many texts to give at most; all if None.
    """

    documents: Dataset | IterableDataset
    limit: int | None = None

    def __iter__(self) -> Iterator[str]:
        batches = self.documents.iter(batch_size=DOCUMENTS_AT_A_TIME)
        texts = itertools.chain.from_iterable(batch["text"] for batch in batches)
        return itertools.islice(filter(None, texts), self.limit)


def detect_boundary(rows: Iterable[str | None], *, rows_are_lines: bool, lines_wrapped: bool = False) -> str:
    """Tells what a document is from the first rows.

    Args:
        rows: Lines of a text file, or the values of a text column.
        rows_are_lines: Whether a blank row may separate documents, as in a text file. In a table it is a row without
            text.
        lines_wrapped: Whether a paragraph goes over several lines, so that a blank line need not end a document.

    Returns:
        "heading" if the first text is a WikiText title, "section" if lines are wrapped and there are gaps of one and
        gaps of several blank lines, "blank_line" if a blank line stands between two others, else "row".
    """
    gaps = set()
    text_seen, gap = False, 0
    for row in itertools.islice(rows, LINES_INSPECTED):
        line = (row or "").strip()
        if not line:
            gap += 1
            continue
        if not text_seen and ARTICLE_HEADING.fullmatch(line):
            return "heading"
        if not rows_are_lines:
            return "row"
        if text_seen and gap:
            if not lines_wrapped:
                return "blank_line"
            gaps.add(min(gap, 2))
        text_seen, gap = True, 0
    return "section" if len(gaps) == 2 else "blank_line" if gaps else "row"


def wrapped_share(lines: Iterable[str]) -> float:
    """Share of the line breaks within paragraphs that are wraps; 0 where the lines are not wrapped to a width.

    A break is a wrap if the line does not end a sentence and the next line's first word would not have fitted into the
    width of the text, less a tenth. The width is the length that 98 of 100 lines before a break keep.
    """
    stripped = [line.strip() for line in lines]
    breaks = [(line, following) for line, following in itertools.pairwise(stripped) if line and following]
    if len(breaks) < FEWEST_BREAKS:
        return 0.0
    width = sorted(len(line) for line, _ in breaks)[int(0.98 * (len(breaks) - 1))]
    if width > WIDEST_WRAP:
        return 0.0
    wraps = sum(
        " " in line
        and not SENTENCE_END.search(line)
        and len(line) + 1 + len(following.split(maxsplit=1)[0]) > 0.9 * width
        for line, following in breaks
    )
    return wraps / len(breaks)


def group_rows(rows: Iterable[str | None], boundary: str, line_breaks: str = "keep") -> Iterator[str]:
    """Joins rows into documents, one paragraph a line.

    Args:
        rows: Lines of a text file, or the values of a text column.
        boundary: "row", "blank_line", "section" or "heading". A title counts as one only after a blank line or at the
            start; a line that stands alone between two gaps belongs to the section after it.
        line_breaks: "keep" if a row is a paragraph, "join" if a paragraph goes on to the next blank row.

    Yields:
        Documents. With "row" there is one for each row, empty where the row has no text.
    """
    if boundary == "row":
        yield from ((row or "").strip() for row in rows)
        return
    paragraphs: list[list[str]] = []
    blank_rows = 1
    for row in rows:
        line = (row or "").strip()
        if not line:
            blank_rows += 1
            continue
        starts_document = {
            "heading": bool(blank_rows and ARTICLE_HEADING.fullmatch(line)),
            "blank_line": blank_rows > 0,
            "section": blank_rows > 1 and sum(map(len, paragraphs)) > 1,
        }[boundary]
        if paragraphs and starts_document:
            yield _document(paragraphs)
            paragraphs = []
        if boundary == "heading":
            line = WIKITEXT_JOINER.sub(r"\1", line)
        if line_breaks == "join" and paragraphs and not blank_rows:
            paragraphs[-1].append(line)
        else:
            paragraphs.append([line])
        blank_rows = 0
    if paragraphs:
        yield _document(paragraphs)


def _document(paragraphs: list[list[str]]) -> str:
    return "\n".join(map(" ".join, paragraphs))


def read_files(
    paths: list[str], text_column: str, boundary: str, encoding: str = "utf-8", line_breaks: str = "keep"
) -> Iterator[dict[str, str]]:
    """Yields the documents of files. No document goes on from one file into the next.

    Raises:
        ValueError: If a file cannot be read to its end, holds no text, or lacks the column.
    """
    for path in paths:
        has_text = False
        for text in group_rows(read_rows(path, text_column, encoding), boundary, line_breaks):
            has_text = has_text or bool(text)
            yield {"text": text}
        if not has_text:
            raise UnreadableTextError(f"{path} holds no text: remove it from the files given, or put text into it.")


def read_rows(path: str, text_column: str, encoding: str = "utf-8") -> Iterator[str | None]:
    """Yields the lines of a text file, or the text column of CSV, JSON or Parquet; None where a row has no text.

    Raises:
        UnreadableTextError: If the file is missing, binary, truncated, not of its encoding or kind, or lacks the
            column.
    """
    kind = _file_kind(path)
    try:
        if kind == "text":
            with _open_text(path, encoding) as lines:
                yield from lines
        elif kind == "json":
            yield from _json_rows(path, text_column, encoding)
        elif kind == "parquet":
            yield from _parquet_rows(path, text_column)
        else:
            yield from _csv_rows(path, text_column, encoding, DELIMITERS[kind])
    except UnicodeError as error:
        byte = f", byte 0x{error.object[error.start]:02x}" if isinstance(error, UnicodeDecodeError) else ""
        raise UnreadableTextError(
            f"{path} is not {encoding.upper()} text ({getattr(error, 'reason', error)}{byte}): say what it is encoded "
            "in, for example --encoding latin-1 or --encoding utf-16."
        ) from error
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise UnreadableTextError(
            f"{path} cannot be read to its end ({error}): fetch or write it again, and check that its suffix says "
            "what it is."
        ) from error


def _check_encoding(name: str) -> None:
    try:
        "a".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"encoding={name!r} is not a text encoding that Python knows: use one such as utf-8, utf-16, latin-1, "
            "cp1252 or shift_jis."
        ) from error


def _check_source(arguments: CorpusArguments) -> None:
    """Refuses options that have no effect on the kinds of sources that are given."""
    files = {
        _file_kind(path)
        for name in ("train_file", "validation_file")
        if getattr(arguments, name)
        for path in _resolve_files(getattr(arguments, name), name)
    }
    if arguments.text_column is not None and not arguments.dataset_name and files <= {"text"}:
        raise no_effect(arguments, "text_column", "the source is plain text, which has no columns")
    if arguments.encoding is not None and files <= {"parquet"}:
        raise no_effect(arguments, "encoding", "only text, CSV and JSON files have one")
    if arguments.line_breaks is not None and "text" not in files:
        raise no_effect(arguments, "line_breaks", "only the lines of text files can be joined")
    if arguments.document_boundary != "auto" and arguments.corpus and not files:
        raise no_effect(arguments, "document_boundary", f"each topic of {arguments.corpus} is a document")


def _training_source(arguments: CorpusArguments, own_validation: bool) -> dict[str, Dataset | IterableDataset]:
    if arguments.train_file:
        return {"train": _file_documents(arguments, "train_file", streaming=arguments.streaming)}
    if arguments.corpus:
        return {"train": _python_docs(arguments)}
    if arguments.dataset_name:
        return _data_set_documents(arguments, own_validation)
    raise ValueError("There is no text to train on: give train_file, dataset_name or corpus beside validation_file.")


def _hold_out(documents: Dataset | IterableDataset, arguments: CorpusArguments, seed: int) -> dict[str, Dataset]:
    if isinstance(documents, IterableDataset):
        raise ValueError("streaming=True cannot hold validation documents out of a stream: give validation_file.")
    if len(documents) < 2:
        raise ValueError(
            "The training text is a single document, so none can be held out for validation: give validation_file, "
            "or set document_boundary if the text does hold several."
        )
    percentage = arguments.validation_split_percentage or DEFAULT_VALIDATION_PERCENTAGE
    held_out = round(len(documents) * percentage / 100)
    split = documents.train_test_split(min(max(held_out, 1), len(documents) - 1), seed=seed)
    logger.info("Held out %d of %d documents for validation.", len(split["test"]), len(documents))
    return {"train": split["train"], "validation": split["test"]}


def _file_documents(arguments: CorpusArguments, field_name: str, *, streaming: bool) -> Dataset | IterableDataset:
    paths = _resolve_files(getattr(arguments, field_name), field_name)
    if any(Path(pattern).is_dir() for pattern in getattr(arguments, field_name)):
        logger.info("%s: reading %d files, from %s to %s.", field_name, len(paths), paths[0], paths[-1])
    column = arguments.text_column or DEFAULT_TEXT_COLUMN
    encoding = arguments.encoding or DEFAULT_ENCODING
    is_text = _file_kind(paths[0]) == "text"
    line_breaks = (arguments.line_breaks if is_text else None) or "keep"
    rows = read_rows(paths[0], column, encoding)
    wrapped = False
    if is_text:
        rows = list(itertools.islice(rows, LINES_INSPECTED))
        wrapped = _log_line_breaks(field_name, wrapped_share(rows), arguments.line_breaks)
    boundary = arguments.document_boundary
    if boundary == "auto":
        boundary = detect_boundary(rows, rows_are_lines=is_text, lines_wrapped=wrapped or line_breaks == "join")
        if boundary == "row" and line_breaks == "join":
            boundary = "blank_line"
    _log_boundary(field_name, boundary, detected=arguments.document_boundary == "auto")
    read_arguments = {
        "paths": paths,
        "text_column": column,
        "boundary": boundary,
        "encoding": encoding,
        "line_breaks": line_breaks,
    }
    if streaming:
        for path in paths:
            next(read_files(**{**read_arguments, "paths": [path]}))
        return IterableDataset.from_generator(read_files, features=DOCUMENT_FEATURES, gen_kwargs=read_arguments)
    contents = [(_file_kind(path), _content_hash(path)) for path in paths]
    return _write_documents(read_files, read_arguments, (contents, {**read_arguments, "paths": None}), arguments)


def _data_set_documents(arguments: CorpusArguments, own_validation: bool) -> dict[str, Dataset | IterableDataset]:
    with _readable_data_set(arguments), written_to_cache(arguments), worker_processes():
        splits = _load_data_set(arguments)
    if "train" not in splits:
        raise ValueError(
            f"dataset_name={arguments.dataset_name!r} has no train split but {', '.join(splits)}: "
            "name one that has, or give its files with train_file."
        )
    if "validation" in splits and arguments.validation_split_percentage is not None:
        raise no_effect(arguments, "validation_split_percentage", f"{arguments.dataset_name} has a validation split")
    wanted = ("train", "validation") if own_validation else ("train",)
    with _readable_data_set(arguments):
        return {split: _split_documents(splits[split], split, arguments) for split in wanted if split in splits}


@contextmanager
def _readable_data_set(arguments: CorpusArguments) -> Iterator[None]:
    name = arguments.dataset_name
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


def _load_data_set(arguments: CorpusArguments) -> dict[str, Dataset | IterableDataset]:
    name = arguments.dataset_name
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
    _log_boundary(f"{arguments.dataset_name}, {split}", boundary, detected=arguments.document_boundary == "auto")
    if isinstance(rows, Dataset):
        if boundary == "row":
            return rows
        return _write_documents(
            _group_data_set, {"rows": rows, "boundary": boundary}, (rows._fingerprint, boundary), arguments
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
    first = next(iter(rows), {})
    columns = _column_names(first) or rows.column_names or []
    if column not in columns and column not in first:
        raise UnreadableTextError(
            f"text_column={column!r} is not a column of {arguments.dataset_name!r} ({', '.join(columns)}): name one."
        )
    feature = (rows.features or {}).get(column)
    value = first.get(column)
    if column not in first and first:
        value = _value(first, column)
    holds = None if value is None or isinstance(value, str) else type(value).__name__
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        holds = getattr(feature, "dtype", None) or type(feature).__name__
    if holds is not None:
        raise UnreadableTextError(
            f"text_column={column!r} of {arguments.dataset_name!r} holds {holds}, not text: name another column."
        )
    if column in (rows.column_names or first):
        rows = rows.select_columns([column])
        return rows if column == "text" else rows.rename_column(column, "text")
    if isinstance(rows, Dataset):
        return rows.flatten().select_columns([column]).rename_column(column, "text")
    return rows.map(lambda row: {"text": _value(row, column)}, remove_columns=list(first), features=DOCUMENT_FEATURES)


def _group_data_set(rows: Dataset | IterableDataset, boundary: str) -> Iterator[dict[str, str]]:
    for text in group_rows((row["text"] for row in rows), boundary):
        yield {"text": text}


def _python_docs(arguments: CorpusArguments) -> Dataset | IterableDataset:
    if arguments.streaming:
        return IterableDataset.from_generator(_python_doc_topics, features=DOCUMENT_FEATURES)
    return _write_documents(_python_doc_topics, {}, topics.topics, arguments)


def _python_doc_topics() -> Iterator[dict[str, str]]:
    for topic in sorted(topics.topics):
        text = PYTHON_DOCS_UNDERLINE.sub("", topics.topics[topic])
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        yield {"text": "\n".join(filter(None, paragraphs))}


def _write_documents(
    generator: Callable[..., Iterator[dict[str, str]]], generator_arguments: dict, content: object, arguments
) -> Dataset:
    """Writes documents into the cache, or finds them there if `content` and this file are as they were."""
    with written_to_cache(arguments):
        return Dataset.from_generator(
            generator,
            features=DOCUMENT_FEATURES,
            gen_kwargs=generator_arguments,
            cache_dir=arguments.data_cache_dir,
            fingerprint=Hasher.hash((content, PREPARATION_CODE)),
            writer_batch_size=DOCUMENTS_WRITTEN_AT_A_TIME,
        )


@contextmanager
def written_to_cache(arguments: CorpusArguments) -> Iterator[None]:
    """Says in one line why text could not be prepared.

    Raises:
        UnwritableCacheError: If the cache is full, or closed to writing.
        UnreadableTextError: If the text that is written could not be read.
    """
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UnreadableTextError):
            raise cause from None
        if not isinstance(cause, OSError) or cause.errno is None:  # those of `datasets` about its sources have none
            raise
        place = str(arguments.data_cache_dir or datasets.config.HF_DATASETS_CACHE)
        raise UnwritableCacheError(
            f"data_cache_dir={place!r}: prepared text cannot be written there ({cause.strerror}): free space, "
            "or name another folder."
        ) from error


# The process whose forks are workers, while it has any.
_employer: int | None = None


@contextmanager
def worker_processes() -> Iterator[None]:
    """Processes that are forked within end with this one, even if it is killed."""
    global _employer
    _employer = os.getpid()
    try:
        yield
    finally:
        _employer = None


def _end_with_employer() -> None:
    global _employer
    employer, _employer = _employer, None
    if employer is not None:
        threading.Thread(target=_watch, args=(employer,), daemon=True).start()


def _watch(employer: int) -> None:
    while os.getppid() == employer:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


os.register_at_fork(after_in_child=_end_with_employer)


def _log_line_breaks(source: str, share: float, line_breaks: str | None) -> bool:
    """Says whether the lines of a text file are hard-wrapped, and returns it."""
    if share < MOSTLY_WRAPPED:
        return False
    found = f"{share:.0%} of the line breaks within paragraphs are wraps"
    if line_breaks == "join":
        logger.info("%s: %s; lines are joined into paragraphs.", source, found)
    elif line_breaks == "keep":
        logger.info("%s: %s; each line stays a paragraph, as set.", source, found)
    else:
        logger.warning(
            "Warning, %s: its lines are hard-wrapped (%s), and each is taken as a paragraph, which cuts sentences: "
            "join them with --line_breaks join, or silence this warning with --line_breaks keep.",
            source,
            found,
        )
    return True


def _log_boundary(source: str, boundary: str, *, detected: bool) -> None:
    meaning = {
        "row": "each row or line",
        "blank_line": "the lines between blank lines",
        "section": "the lines between gaps of several blank lines",
        "heading": "the lines from one ' = Title = ' to the next",
    }
    how = "detected; document_boundary sets it" if detected else "as set"
    logger.info("%s: a document is %s (%s, %s).", source, meaning[boundary], boundary, how)


def _resolve_files(patterns: list[str], field_name: str) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            matches = sorted(str(file) for file in Path(pattern).rglob("*") if file.is_file() and file.name[0] != ".")
        elif Path(pattern).is_file():
            matches = [pattern]
        else:
            matches = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not matches:
            raise ValueError(f"{field_name}={pattern!r} matches no file: check the path or the pattern.")
        paths += [path for path in matches if path not in paths]
    kinds = sorted({_file_kind(path) for path in paths})
    if len(kinds) > 1:
        raise ValueError(
            f"{field_name} mixes {' and '.join(kinds)} files: give files of one kind, for example 'folder/*.txt'."
        )
    return paths


def _file_kind(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return FILE_KINDS.get(suffixes[-1], "text") if suffixes else "text"


def _content_hash(path: str) -> str:
    content = hashlib.blake2b()
    try:
        with open(path, "rb") as file:
            while block := file.read(BYTES_AT_A_TIME):
                content.update(block)
    except OSError as error:
        raise UnreadableTextError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    return content.hexdigest()


def _open(path: str) -> io.IOBase:
    """Opens for reading bytes, decompressed as the suffix says; a truncated archive raises, whatever its kind."""
    return lzma.open(path) if path.lower().endswith(".xz") else pa.input_stream(path)


@contextmanager
def _open_text(path: str, encoding: str, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    has_wide_characters = b"\0" in "a".encode(encoding)
    with _open(path) as stream:
        if not has_wide_characters and b"\0" in stream.read(BYTES_AT_A_TIME):
            raise UnreadableTextError(
                f"{path} is binary or UTF-16, not {encoding.upper()} text: give --encoding utf-16, or the suffix of "
                f"what it is ({', '.join((*FILE_KINDS, *COMPRESSION_SUFFIXES))})."
            )
    if codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"
    with _open(path) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
        yield text


def _column_names(row: dict, prefix: str = "") -> list[str]:
    """The columns of a row of JSON, those within others as "outer.inner"."""
    return [
        name
        for key, value in row.items()
        for name in (_column_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]


def _value(row: dict, column: str) -> object:
    """The value of a column, or of one within another; None where it is missing."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _no_column(path: str, column: str, columns: Iterable[str]) -> UnreadableTextError:
    return UnreadableTextError(f"{path} has no {column!r} but {', '.join(columns)}: name the column with text_column.")


def _no_text_in_column(place: str, column: str, holds: object) -> UnreadableTextError:
    return UnreadableTextError(f"{place}: {column!r} holds {holds}, not text: name another column with text_column.")


def _csv_rows(path: str, text_column: str, encoding: str, delimiter: str) -> Iterator[str | None]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a field may be a whole book
    with _open_text(path, encoding, newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(filter(None, rows), [])
            if text_column not in header:
                raise _no_column(path, text_column, header)
            if header.count(text_column) > 1:
                raise UnreadableTextError(f"{path} has several columns {text_column!r}: rename all but one.")
            column = header.index(text_column)
            for row in rows:
                if len(row) > len(header):
                    raise UnreadableTextError(
                        f"{path}, line {rows.line_num}: {len(row)} fields stand under {len(header)} columns: put "
                        "fields that hold the delimiter in quotes."
                    )
                yield row[column] if column < len(row) else None
        except csv.Error as error:
            raise UnreadableTextError(
                f"{path}, line {rows.line_num}: {error}: quote fields as RFC 4180 says, or write JSON lines."
            ) from error


def _json_rows(path: str, text_column: str, encoding: str) -> Iterator[str | None]:
    for number, (place, row) in enumerate(_json_values(path, encoding)):
        if not isinstance(row, dict):
            raise UnreadableTextError(
                f"{path}, {place}, holds a JSON {type(row).__name__}: write objects, in an array or one a line."
            )
        if number == 0 and text_column not in row and text_column not in _column_names(row):
            raise _no_column(path, text_column, _column_names(row))
        text = _value(row, text_column)
        if not isinstance(text, str | None):
            raise _no_text_in_column(f"{path}, {place}", text_column, type(text).__name__)
        yield text


def _json_values(path: str, encoding: str) -> Iterator[tuple[str, object]]:
    """Yields where each value stands and the value: of JSON lines line by line, of other JSON from memory."""
    with _open_text(path, encoding) as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if not line.isspace())
        first = next(numbered, (0, ""))
        if _is_whole_object(first[1]):
            for number, line in itertools.chain([first], numbered):
                yield f"line {number}", _parsed(path, line, number)
            return
    with _open_text(path, encoding) as stream:
        text = stream.read()
    if text.lstrip().startswith("["):
        yield from ((f"row {number}", value) for number, value in enumerate(_parsed(path, text), start=1))
        return
    position = number = 0
    while (position := JSON_SPACE.match(text, position).end()) < len(text):
        number += 1
        try:
            value, position = json.JSONDecoder().raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _no_json(path, error, error.lineno) from error
        yield f"row {number}", value


def _is_whole_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parsed(path: str, text: str, first_line: int = 1) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _no_json(path, error, first_line + error.lineno - 1) from error


def _no_json(path: str, error: json.JSONDecodeError, line: int) -> UnreadableTextError:
    return UnreadableTextError(
        f"{path}, line {line}, is not JSON ({error.msg}): write an array of objects, or one object a line."
    )


def _parquet_rows(path: str, text_column: str) -> Iterator[str | None]:
    with pq.ParquetFile(path) as file:
        columns = dict(_leaves(file.schema_arrow))
        if text_column not in columns:
            raise _no_column(path, text_column, columns)
        if columns[text_column] not in (pa.string(), pa.large_string()):
            raise _no_text_in_column(path, text_column, columns[text_column])
        for batch in file.iter_batches(batch_size=DOCUMENTS_AT_A_TIME, columns=[text_column]):
            table = pa.Table.from_batches([batch])
            while table.column_names != [text_column]:
                table = table.flatten()
            yield from table.column(0).to_pylist()


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """The columns of a schema, those within others as "outer.inner", with their types."""
    for column in fields:
        if pa.types.is_struct(column.type):
            yield from _leaves(column.type, f"{prefix}{column.name}.")
        else:
            yield prefix + column.name, column.type
