"""Files of text: their kinds, compression and encoding, and their rows."""

import bz2
import codecs
import csv
import glob
import hashlib
import io
import itertools
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSION_SUFFIXES = (".bz2", ".gz", ".xz", ".zst")
FILE_KINDS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
ROWS_AT_A_TIME = 64
BYTES_AT_A_TIME = 1 << 20
DEFAULT_TEXT_COLUMN = "text"
DEFAULT_ENCODING = "utf-8"
JSON_SPACE = re.compile(r"\s*")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot


class UnreadableTextError(ValueError):
    """A text source is missing, damaged or not what its name says."""


def resolve_files(patterns: list[str], field_name: str) -> list[str]:
    """The files of paths, folders and glob patterns, each once.

    Raises:
        ValueError: there are none, or files of several kinds; it names `field_name`.
    """
    paths: dict[Path, str] = {}  # by where a name leads
    for pattern in patterns:
        if Path(pattern).is_dir():
            files = (file for file in Path(pattern).rglob("*") if file.is_file())
            matches = sorted(str(file) for file in files if not _is_hidden(file.relative_to(pattern)))
        elif Path(pattern).is_file():
            matches = [pattern]
        else:
            matches = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not matches:
            raise ValueError(f"{field_name}={pattern!r} matches no file: check the path or the pattern.")
        for path in matches:
            paths.setdefault(Path(path).resolve(), path)
    kinds = sorted({file_kind(path) for path in paths.values()})
    if len(kinds) > 1:
        raise ValueError(
            f"{field_name} mixes {' and '.join(kinds)} files: give files of one kind, for example 'folder/*.txt'."
        )
    return list(paths.values())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_kind(path: str) -> str:
    """What a file holds by its suffix: "text", "csv", "tsv", "json" or "parquet"."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return FILE_KINDS.get(suffixes[-1], "text") if suffixes else "text"


def file_hash(path: str) -> str:
    """A hash of the bytes of a file."""
    content = hashlib.blake2b()
    try:
        with open(path, "rb") as file:
            while block := file.read(BYTES_AT_A_TIME):
                content.update(block)
    except OSError as error:
        raise UnreadableTextError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    return content.hexdigest()


def read_rows(path: str, text_column: str, encoding: str = "utf-8") -> Iterator[str | None]:
    """Yields the lines of a text file, or the text column of CSV, JSON or Parquet; None where a row has no text.

    Raises:
        UnreadableTextError: the file is missing, binary, truncated, not of its encoding or kind, or lacks the
            column.
    """
    kind = file_kind(path)
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
    except (OSError, EOFError, RecursionError, lzma.LZMAError, pa.ArrowException) as error:
        raise UnreadableTextError(
            f"{path} cannot be read to its end ({error}): fetch or write it again, and check that its suffix says "
            "what it is."
        ) from error


def check_encoding(name: str) -> None:
    """Raises ValueError if Python knows no such encoding of text."""
    try:
        "a".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"encoding={name!r} is not a text encoding that Python knows: use one such as utf-8, utf-16, latin-1, "
            "cp1252 or shift_jis."
        ) from error


def column_names(row: dict, prefix: str = "") -> list[str]:
    """The columns of a row of JSON, those within others as "outer.inner"."""
    return [
        name
        for key, value in row.items()
        for name in (column_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]


def column_value(row: dict, column: str) -> object:
    """The value of a column, or of one within another; None where it is missing."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _open(path: str) -> BinaryIO:
    """Opens for reading bytes, decompressed as the suffix says; a truncated archive raises, whatever its kind."""
    suffix = Path(path).suffix.lower()
    if suffix in (".bz2", ".xz"):
        return cast(BinaryIO, bz2.open(path) if suffix == ".bz2" else lzma.open(path))
    return cast(BinaryIO, pa.input_stream(path, compression="detect" if suffix in COMPRESSION_SUFFIXES else None))


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


def _no_column(path: str, column: str, columns: Iterable[str]) -> UnreadableTextError:
    return UnreadableTextError(f"{path} has no {column!r} but {', '.join(columns)}: name the column with text_column.")


def _no_text_in_column(place: str, column: str, holds: object) -> UnreadableTextError:
    return UnreadableTextError(f"{place}: {column!r} holds {holds}, not text: name another column with text_column.")


def _csv_rows(path: str, text_column: str, encoding: str, delimiter: str) -> Iterator[str | None]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a field may be a whole book
    with _open_text(path, encoding, newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(filter(None, rows), None)
            if header is None:
                return
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
                if delimiter == "\t" and any("\t" in field and "\n" in field for field in row):
                    raise UnreadableTextError(
                        f"{path}, line {rows.line_num}: a field that begins with a quotation mark goes on over several "
                        "rows: double the quotation marks of texts and put such texts in quotes, or write JSON lines."
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
        if number == 0 and text_column not in row and text_column not in column_names(row):
            raise _no_column(path, text_column, column_names(row))
        text = column_value(row, text_column)
        if not isinstance(text, str | None):
            raise _no_text_in_column(f"{path}, {place}", text_column, type(text).__name__)
        if text and SURROGATE.search(text):
            raise UnreadableTextError(f"{path}, {place}: {text_column!r} holds half of a surrogate pair: repair it.")
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
    while (position := _next_value(text, position)) < len(text):
        number += 1
        try:
            value, position = json.JSONDecoder().raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _no_json(path, error, error.lineno) from error
        yield f"row {number}", value


def _next_value(text: str, position: int) -> int:
    space = JSON_SPACE.match(text, position)
    return space.end() if space else position


def _is_whole_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parsed(path: str, text: str, first_line: int = 1) -> Any:
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
        for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[text_column]):
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
