"""Where the text comes from: files, data sets and the built-in corpus, as one document a row."""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

from datasets import Dataset, IterableDataset

from lambdabert.text.arguments import CorpusArguments, no_effect
from lambdabert.text.data_sets import data_set_documents
from lambdabert.text.documents import (
    DOCUMENT_FEATURES,
    LINES_INSPECTED,
    are_lines_wrapped,
    detect_boundary,
    group_rows,
    log_boundary,
    wrapped_share,
    write_documents,
)
from lambdabert.text.files import (
    DEFAULT_ENCODING,
    DEFAULT_TEXT_COLUMN,
    UnreadableTextError,
    file_hash,
    file_kind,
    read_rows,
    resolve_files,
)

logger = logging.getLogger(__name__)

DEFAULT_VALIDATION_PERCENTAGE = 5.0
PYTHON_DOCS_UNDERLINE = re.compile(r"^([*=~^-])\1+$", flags=re.MULTILINE)


def load_corpus(
    arguments: CorpusArguments, *, train: bool = True, evaluate: bool = True, seed: int = 42
) -> dict[str, Dataset | IterableDataset]:
    """Reads the text and finds its documents.

    Args:
        arguments: the sources.
        train: whether training documents are wanted.
        evaluate: whether validation documents are wanted. They are the validation files or the data set's own
            validation split; without either, a share of the training documents is held out.
        seed: chooses the documents that are held out.

    Returns:
        Under "train" and "validation", as wanted, a data set with the column "text" and one document a row; a row
        without text stays as an empty document. With `arguments.streaming` the training documents are an
        `IterableDataset`; validation documents never are.

    Raises:
        ValueError: a file, a data set or a column is missing, empty, unreadable or not what its name says; an
            option has no effect on these sources; there is nothing to train on, or too little to hold documents out.
    """
    _check_source(arguments)
    documents = {}
    if evaluate and arguments.validation_file:
        documents["validation"] = _file_documents(arguments, "validation_file", streaming=False)
    if train or not documents:
        documents = _training_source(arguments, own_validation=evaluate and not documents) | documents
    if evaluate and "validation" not in documents:
        documents = _hold_out(documents["train"], arguments, seed)
        if not train:
            logger.warning(
                "A model that was trained on this text has seen these documents, unless they were held out of it then, "
                "with --do_eval and the same seed: give validation_file."
            )
    return {split: documents[split] for split, wanted in (("train", train), ("validation", evaluate)) if wanted}


def read_files(
    paths: list[str], text_column: str, boundary: str, encoding: str = "utf-8", line_breaks: str = "keep"
) -> Iterator[dict[str, str]]:
    """Yields the documents of files. No document goes on from one file into the next.

    Raises:
        ValueError: a file cannot be read to its end, holds no text, or lacks the column.
    """
    for path in paths:
        has_text = False
        for text in group_rows(read_rows(path, text_column, encoding), boundary, line_breaks):
            has_text = has_text or bool(text)
            yield {"text": text}
        if not has_text:
            raise UnreadableTextError(f"{path} holds no text: remove it from the files given, or put text into it.")


def _check_source(arguments: CorpusArguments) -> None:
    """Refuses files of both, and options that have no effect on the kinds of sources that are given."""
    paths = {
        name: resolve_files(getattr(arguments, name), name) if getattr(arguments, name) else []
        for name in ("train_file", "validation_file")
    }
    trained_on = {Path(path).resolve() for path in paths["train_file"]}
    if both := [path for path in paths["validation_file"] if Path(path).resolve() in trained_on]:
        raise ValueError(
            f"validation_file={both[0]} is among the files of train_file, and would measure what was learnt by heart: "
            "name files that are in one of the two."
        )
    files = {file_kind(path) for of_option in paths.values() for path in of_option}
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
        return data_set_documents(arguments.dataset_name, arguments, own_validation=own_validation)
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
    paths = resolve_files(getattr(arguments, field_name), field_name)
    if any(Path(pattern).is_dir() for pattern in getattr(arguments, field_name)):
        logger.info("%s: reading %d files, from %s to %s.", field_name, len(paths), paths[0], paths[-1])
    column = arguments.text_column or DEFAULT_TEXT_COLUMN
    encoding = arguments.encoding or DEFAULT_ENCODING
    is_text = file_kind(paths[0]) == "text"
    line_breaks = (arguments.line_breaks if is_text else None) or "keep"
    rows: Iterable[str | None] = read_rows(paths[0], column, encoding)
    wrapped = False
    if is_text:
        rows = lines = [row or "" for row in itertools.islice(rows, LINES_INSPECTED)]
        wrapped = are_lines_wrapped(field_name, wrapped_share(lines), arguments.line_breaks)
    boundary = arguments.document_boundary
    if boundary == "auto":
        boundary = detect_boundary(rows, rows_are_lines=is_text, lines_wrapped=wrapped or line_breaks == "join")
        if boundary == "row" and line_breaks == "join":
            boundary = "blank_line"
    log_boundary(field_name, boundary, detected=arguments.document_boundary == "auto")
    read_arguments: dict[str, Any] = {
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
    contents = [(file_kind(path), file_hash(path)) for path in paths]
    return write_documents(
        read_files,
        read_arguments,
        content=(contents, {**read_arguments, "paths": None}),
        cache_dir=arguments.data_cache_dir,
    )


def _python_docs(arguments: CorpusArguments) -> Dataset | IterableDataset:
    if arguments.streaming:
        return IterableDataset.from_generator(_python_doc_topics, features=DOCUMENT_FEATURES)
    return write_documents(_python_doc_topics, {}, content=topics.topics, cache_dir=arguments.data_cache_dir)


def _python_doc_topics() -> Iterator[dict[str, str]]:
    for topic in sorted(topics.topics):
        text = PYTHON_DOCS_UNDERLINE.sub("", topics.topics[topic])
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        yield {"text": "\n".join(filter(None, paragraphs))}
