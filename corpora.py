"""Where the text comes from: hub data sets, local files and the built-in corpus, as one document a row."""

import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

logger = logging.getLogger(__name__)

DOCUMENT_BOUNDARIES = ("auto", "row", "blank_line", "heading")
BUILT_IN_CORPORA = ("python-docs",)
DEFAULT_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")
NO_HUB_ADVICE = (
    "Give local text with --train_file and a tokenizer folder with --tokenizer_name, "
    "or run configs/demo.json, which downloads nothing."
)
HUB_TIMEOUT = 10  # seconds

DOCUMENT_FEATURES = Features({"text": Value("large_string")})
DOCUMENTS_AT_A_TIME = 64
DOCUMENTS_WRITTEN_AT_A_TIME = 256
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
LINES_INSPECTED = 10_000
BYTES_AT_A_TIME = 1 << 20
PREPARATION_CODE = Path(__file__).read_bytes()

# WikiText writes " = Title = " above an article and " = = Section = = " within it.
ARTICLE_HEADING = re.compile(r"= (?!=).*(?<!=) =")
# WikiText writes "17 @-@ year", "1 @,@ 000" and "3 @.@ 5" for 17-year, 1,000 and 3.5.
WIKITEXT_JOINER = re.compile(r" @([-,.])@ ")
PYTHON_DOCS_UNDERLINE = re.compile(r"^([*=~^-])\1+$", flags=re.MULTILINE)


class UnreadableTextError(ValueError):
    """A text source is missing, damaged or not what its name says."""


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
            "help": "Training files or glob patterns: text, JSON lines (.json, .jsonl, .ndjson) or Parquet (.parquet); "
            "text and JSON lines may be compressed (.gz, .xz, .zst)."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Validation files or glob patterns, of the same kinds."}
    )
    corpus: str | None = field(
        default=None,
        metadata={"help": "A corpus that needs no file: python-docs, the reference topics that every CPython carries."},
    )
    text_column: str = field(
        default="text", metadata={"help": "Column that holds the text in data sets, JSON lines and Parquet."}
    )
    document_boundary: str = field(
        default="auto",
        metadata={
            "help": "What a document is: a row (row), the lines between blank lines (blank_line), or the lines from "
            "one WikiText ' = Title = ' heading to the next (heading). auto detects it and logs what it found.",
            "choices": list(DOCUMENT_BOUNDARIES),
        },
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Percentage of the training documents held out where there is no validation data."},
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
        if self.document_boundary not in DOCUMENT_BOUNDARIES:
            raise ValueError(
                f"document_boundary={self.document_boundary!r} is unknown: use one of {', '.join(DOCUMENT_BOUNDARIES)}."
            )
        if self.corpus is not None and self.corpus not in BUILT_IN_CORPORA:
            raise ValueError(f"corpus={self.corpus!r} is unknown: use one of {', '.join(BUILT_IN_CORPORA)}.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage} must lie between 0 and 100."
            )
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise ValueError(f"preprocessing_num_workers={self.preprocessing_num_workers} must be 1 or more.")
        sources = [name for name in ("dataset_name", "train_file", "corpus") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both given: keep one source of training text.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(
                f"dataset_config_name={self.dataset_config_name!r} needs dataset_name: name the data set it belongs to."
            )
        if not sources and not self.validation_file:
            self.dataset_name, self.dataset_config_name = DEFAULT_DATASET


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
        ValueError: If a file, a data set or a column is missing, empty, unreadable or not what its name says, if there
            is nothing to train on, or too little to hold documents out.
    """
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


def detect_boundary(rows: Iterable[str | None], *, rows_are_lines: bool) -> str:
    """Tells what a document is from the first rows.

    Args:
        rows: Lines of a text file, or the values of a text column.
        rows_are_lines: Whether a blank row may separate documents, as in a text file. In a table it is a row without
            text.

    Returns:
        "heading" if the first text is a WikiText title, "blank_line" if a blank line stands between two others,
        else "row".
    """
    text_seen = blank_after_text = False
    for row in itertools.islice(rows, LINES_INSPECTED):
        line = (row or "").strip()
        if not line:
            blank_after_text = text_seen
        elif not text_seen and ARTICLE_HEADING.fullmatch(line):
            return "heading"
        elif blank_after_text:
            return "blank_line"
        elif not rows_are_lines:
            return "row"
        else:
            text_seen = True
    return "row"


def group_rows(rows: Iterable[str | None], boundary: str) -> Iterator[str]:
    """Joins rows into documents, one paragraph a line.

    Args:
        rows: Lines of a text file, or the values of a text column.
        boundary: "row", "blank_line" or "heading". A title counts as one only after a blank line or at the start.

    Yields:
        Documents. With "row" there is one for each row, empty where the row has no text.
    """
    if boundary == "row":
        yield from ((row or "").strip() for row in rows)
        return
    paragraphs: list[str] = []
    after_blank = True
    for row in rows:
        line = (row or "").strip()
        is_title = boundary == "heading" and after_blank and ARTICLE_HEADING.fullmatch(line)
        if paragraphs and (is_title or (boundary == "blank_line" and not line)):
            yield "\n".join(paragraphs)
            paragraphs = []
        if line:
            paragraphs.append(WIKITEXT_JOINER.sub(r"\1", line) if boundary == "heading" else line)
        after_blank = not line
    if paragraphs:
        yield "\n".join(paragraphs)


def read_files(paths: list[str], text_column: str, boundary: str) -> Iterator[dict[str, str]]:
    """Yields the documents of files. No document goes on from one file into the next.

    Raises:
        ValueError: If a file cannot be read to its end, holds no text, or lacks the column.
    """
    for path in paths:
        has_text = False
        for text in group_rows(read_rows(path, text_column), boundary):
            has_text = has_text or bool(text)
            yield {"text": text}
        if not has_text:
            raise UnreadableTextError(f"{path} holds no text: remove it from the files given, or put text into it.")


def read_rows(path: str, text_column: str) -> Iterator[str | None]:
    """Yields the lines of a text file, or the text column of JSON lines or Parquet; None where a row has no text.

    Raises:
        UnreadableTextError: If the file is missing, binary, truncated, not UTF-8, not of its kind, or lacks the column.
    """
    readers = {"parquet": _parquet_rows, "json": _json_rows, "text": _text_lines}
    try:
        yield from readers[_file_kind(path)](path, text_column)
    except UnicodeDecodeError as error:
        raise UnreadableTextError(
            f"{path} is not UTF-8 text ({error.reason}, byte 0x{error.object[error.start]:02x}): "
            "convert it, for example with `iconv -t UTF-8`."
        ) from error
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise UnreadableTextError(
            f"{path} cannot be read to its end ({error}): fetch or write it again, and check that its suffix says "
            "what it is."
        ) from error


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
    held_out = round(len(documents) * arguments.validation_split_percentage / 100)
    split = documents.train_test_split(min(max(held_out, 1), len(documents) - 1), seed=seed)
    logger.info("Held out %d of %d documents for validation.", len(split["test"]), len(documents))
    return {"train": split["train"], "validation": split["test"]}


def _file_documents(arguments: CorpusArguments, field_name: str, *, streaming: bool) -> Dataset | IterableDataset:
    paths = _resolve_files(getattr(arguments, field_name), field_name)
    boundary = arguments.document_boundary
    if boundary == "auto":
        boundary = detect_boundary(
            read_rows(paths[0], arguments.text_column), rows_are_lines=_file_kind(paths[0]) == "text"
        )
    _log_boundary(field_name, boundary, detected=arguments.document_boundary == "auto")
    read_arguments = {"paths": paths, "text_column": arguments.text_column, "boundary": boundary}
    if streaming:
        for path in paths:
            next(read_files([path], arguments.text_column, boundary))
        return IterableDataset.from_generator(read_files, features=DOCUMENT_FEATURES, gen_kwargs=read_arguments)
    contents = [(_file_kind(path), _content_hash(path)) for path in paths]
    return _write_documents(read_files, read_arguments, (contents, arguments.text_column, boundary), arguments)


def _data_set_documents(arguments: CorpusArguments, own_validation: bool) -> dict[str, Dataset | IterableDataset]:
    splits = _load_data_set(arguments)
    if "train" not in splits:
        raise ValueError(
            f"dataset_name={arguments.dataset_name!r} has no train split but {', '.join(splits)}: "
            "name one that has, or give its files with train_file."
        )
    wanted = ("train", "validation") if own_validation else ("train",)
    return {split: _split_documents(splits[split], split, arguments) for split in wanted if split in splits}


def _load_data_set(arguments: CorpusArguments) -> dict[str, Dataset | IterableDataset]:
    name = arguments.dataset_name
    if not Path(name).exists() and not is_offline_mode():
        _check_hub(name)
    try:
        return load_dataset(
            name,
            arguments.dataset_config_name,
            streaming=arguments.streaming,
            num_proc=None if arguments.streaming else arguments.preprocessing_num_workers,
            cache_dir=arguments.data_cache_dir,
        )
    except ConnectionError as error:
        raise ValueError(f"dataset_name={name!r}: the hub cannot be reached. {NO_HUB_ADVICE}") from error
    except DatasetNotFoundError as error:
        raise ValueError(f"dataset_name={name!r}: {error} {NO_HUB_ADVICE}") from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"dataset_name={name!r} cannot be read ({error.__cause__ or error}): check its files, or give them with "
            "train_file."
        ) from error


def _check_hub(name: str) -> None:
    """Asks once, because `load_dataset` goes on asking an unreachable hub for half a minute."""
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"dataset_name={name!r} is not on the hub, or not open to you: check the name (owner/name). {NO_HUB_ADVICE}"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"dataset_name={name!r} is neither a folder nor a hub name (owner/name).") from error
    except Exception as error:  # which HTTP library raises depends on the release of huggingface_hub
        raise ValueError(f"dataset_name={name!r}: the hub cannot be reached. {NO_HUB_ADVICE}") from error


def _split_documents(
    rows: Dataset | IterableDataset, split: str, arguments: CorpusArguments
) -> Dataset | IterableDataset:
    column = arguments.text_column
    columns = rows.column_names or list(next(iter(rows)))
    if column not in columns:
        raise ValueError(
            f"text_column={column!r} is not a column of {arguments.dataset_name!r} ({', '.join(columns)}): name one."
        )
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
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
    try:
        return Dataset.from_generator(
            generator,
            features=DOCUMENT_FEATURES,
            gen_kwargs=generator_arguments,
            cache_dir=arguments.data_cache_dir,
            fingerprint=Hasher.hash((content, PREPARATION_CODE)),
            writer_batch_size=DOCUMENTS_WRITTEN_AT_A_TIME,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _log_boundary(source: str, boundary: str, *, detected: bool) -> None:
    meaning = {
        "row": "each row or line",
        "blank_line": "the lines between blank lines",
        "heading": "the lines from one ' = Title = ' to the next",
    }
    how = "detected; document_boundary sets it" if detected else "as set"
    logger.info("%s: a document is %s (%s, %s).", source, meaning[boundary], boundary, how)


def _resolve_files(patterns: list[str], field_name: str) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else sorted(filter(_is_file, glob.glob(pattern, recursive=True)))
        if not matches:
            raise ValueError(f"{field_name}={pattern!r} matches no file: check the path or the pattern.")
        paths += [path for path in matches if path not in paths]
    kinds = sorted({_file_kind(path) for path in paths})
    if len(kinds) > 1:
        raise ValueError(f"{field_name} mixes {' and '.join(kinds)} files: give files of one kind.")
    return paths


def _is_file(path: str) -> bool:
    return Path(path).is_file()


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


def _text_lines(path: str, text_column: str) -> Iterator[str]:
    with _open(path) as stream:
        if b"\0" in stream.read(BYTES_AT_A_TIME):
            raise UnreadableTextError(
                f"{path} is binary or UTF-16, not UTF-8 text: convert it, or give it the suffix of what it is "
                f"({', '.join((*FILE_KINDS, *COMPRESSION_SUFFIXES))})."
            )
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
        yield from lines


def _json_rows(path: str, text_column: str) -> Iterator[str | None]:
    first_row = True
    for number, line in enumerate(_text_lines(path, text_column), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnreadableTextError(
                f"{path}, line {number}, is not JSON ({error}): write one object a line (JSON lines)."
            ) from error
        if not isinstance(row, dict):
            raise UnreadableTextError(
                f"{path}, line {number}, holds a JSON {type(row).__name__}: write one object a line (JSON lines)."
            )
        if first_row and text_column not in row:
            raise UnreadableTextError(
                f"{path} has no {text_column!r} but {', '.join(row)}: name the column with text_column."
            )
        text = row.get(text_column)
        if not isinstance(text, str | None):
            raise UnreadableTextError(
                f"{path}, line {number}: {text_column!r} holds {type(text).__name__}, not text: "
                "name another column with text_column."
            )
        first_row = False
        yield text


def _parquet_rows(path: str, text_column: str) -> Iterator[str | None]:
    with pq.ParquetFile(path) as file:
        columns = file.schema_arrow
        if text_column not in columns.names:
            raise UnreadableTextError(
                f"{path} has no {text_column!r} but {', '.join(columns.names)}: name the column with text_column."
            )
        if columns.field(text_column).type not in (pa.string(), pa.large_string()):
            raise UnreadableTextError(
                f"{path}: {text_column!r} holds {columns.field(text_column).type}, not text: "
                "name another column with text_column."
            )
        for batch in file.iter_batches(batch_size=DOCUMENTS_AT_A_TIME, columns=[text_column]):
            yield from batch.column(0).to_pylist()
