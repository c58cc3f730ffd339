"""Files: each kind gives the same documents, and each broken one a message with file, problem and fix."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re

import pyarrow as pa
import pytest

from lambdabert.text.sources import load_corpus
from text_support import BLANK_LINE_TEXT, DOCUMENTS, arguments, json_lines, training_texts, write, write_parquet


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", ["", ".bz2", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_json_lines_read_the_same_in_every_compression(tmp_path, suffix, streaming):
    compress = {"": bytes, ".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    text_file = write(tmp_path / f"corpus.v1.txt{suffix}", compress(BLANK_LINE_TEXT.encode()))
    json_file = write(
        tmp_path / f"corpus.jsonl{suffix}", compress(json_lines({"text": text} for text in DOCUMENTS).encode())
    )
    for path in (text_file, json_file):
        assert training_texts(tmp_path, train_file=path, streaming=streaming) == DOCUMENTS


@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_rows_are_documents(tmp_path, column, streaming):
    path = write_parquet(tmp_path / "corpus.parquet", title=["a", "b", "c"], **{column: DOCUMENTS})
    assert training_texts(tmp_path, train_file=path, text_column=column, streaming=streaming) == DOCUMENTS


QUOTED = ['A "quoted", listed text.\nIts second line.', "Plain text.", "", "Caf\u00e9."]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV.gz", ".tsv.xz", ".csv.bz2"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_are_read_by_column(tmp_path, suffix, streaming):
    content = io.StringIO(newline="")
    table = csv.writer(content, delimiter="," if "csv" in suffix.lower() else "\t")
    table.writerows([["id", "review", "label"], *([f"user{i}", text, i] for i, text in enumerate(QUOTED))])
    compress = {"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress}.get(suffix.rpartition(".")[2], bytes)
    path = write(tmp_path / f"reviews{suffix}", compress(content.getvalue().encode()))
    texts = training_texts(tmp_path, train_file=path, text_column="review", streaming=streaming)
    assert texts == [text for text in QUOTED if text]
    with pytest.raises(ValueError, match="no 'text' but id, review, label"):
        training_texts(tmp_path, train_file=path, streaming=streaming)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"doc": {"text": text}} for text in DOCUMENTS]),
        json.dumps([{"doc": {"text": text}} for text in DOCUMENTS], indent=2),
        "\n".join(json.dumps({"doc": {"text": text}}, indent=2) for text in DOCUMENTS),
        "\n\n".join(json.dumps({"doc": {"text": text}}) for text in DOCUMENTS),
        "\n".join(json.dumps({"doc.text": text}) for text in DOCUMENTS),
    ],
    ids=["array", "indented array", "indented objects", "lines", "lines with a dotted name"],
)
def test_every_layout_of_json_and_nested_columns(tmp_path, content):
    path = write(tmp_path / "corpus.json", content)
    assert training_texts(tmp_path, train_file=path, text_column="doc.text") == DOCUMENTS


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "UTF8", "utf-16-le"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_other_encodings(tmp_path, encoding, suffix):
    rows = {
        "txt": "\n\n".join(DOCUMENTS),
        "jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS),
        "csv": "text\n" + "\n".join(f'"{text}"' for text in DOCUMENTS),
    }
    path = write(tmp_path / f"corpus.{suffix}", rows[suffix].encode(encoding))
    assert training_texts(tmp_path, train_file=path, encoding=encoding) == DOCUMENTS


def test_rows_without_text_stay_as_empty_documents(tmp_path):
    rows = [{"text": "One."}, {"other": 1}, {"text": None}, {"text": " "}, {"text": "Two."}]
    path = write(tmp_path / "corpus.jsonl", json_lines(rows))
    documents = load_corpus(arguments(tmp_path, train_file=path), evaluate=False)["train"]
    assert documents["text"] == ["One.", "", "", "", "Two."]


def test_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path):
    content = BLANK_LINE_TEXT.replace("\n", "\r\n").encode("utf-8-sig")
    assert training_texts(tmp_path, train_file=write(tmp_path / "dos.txt", content)) == DOCUMENTS


COMPRESSIBLE = "".join(map(str, range(30_000))).encode()


BROKEN_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b"\n \n\n", "holds no text"),
    "binary.txt": (b"text\0\1\2", "binary"),
    "utf16.txt": (("text\n" * 9).encode("utf-16"), "UTF-16"),
    "latin.txt": ("caf\u00e9 au lait\n".encode("latin-1"), "not UTF-8.*0xe9.*--encoding latin-1"),
    "late.txt": (b"one long line of text " * 100_000 + b"\n\xff", "not UTF-8.*0xff"),
    "cut.txt.gz": (gzip.compress(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "cut.txt.bz2": (bz2.compress(COMPRESSIBLE)[:-30], "cannot be read to its end"),
    "cut.txt.xz": (lzma.compress(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "cut.txt.zst": (zstd(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "corpus.txt.lz4": (pa.compress(COMPRESSIBLE, codec="lz4", asbytes=True), "binary.*the suffix of"),
    "plain.txt.gz": (b"not compressed", "cannot be read to its end"),
    "text.parquet": (b"not parquet", "cannot be read to its end"),
    "column.jsonl": (b'{"body": "x"}\n', "no 'text' but body.*text_column"),
    "half.jsonl": (b'{"text": "x"}\n{"text": "y', "line 2, is not JSON"),
    "list.json": (b'[["x"]]', "row 1, holds a JSON list.*objects"),
    "half.json": (b'[{"text": "x"},\n {"text": "y"\n', "line 3, is not JSON"),
    "pretty.json": (b'{\n"text": "x"\n}\n{\n"text": 3}', "row 2: 'text' holds int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: 'text' holds half of a surrogate pair"),
    "deep.json": (b"[" * 100_000, "cannot be read to its end"),
    "nested.jsonl": (b'{"doc": {"title": "x"}, "id": 1}', "no 'text' but doc.title, id"),
    "column.csv": (b"id,body\n1,x\n", "no 'text' but id, body.*text_column"),
    "twice.csv": (b"text,text\n1,x\n", "several columns 'text'"),
    "fields.csv": (b"id,text\n1,Yes, it is\n", "line 2: 3 fields stand under 2 columns"),
    "quote.tsv": (b'id\ttext\n1\t"Yes," he said\n', "line 2: .*RFC 4180"),
    "header.csv": (b"id,text\n", "holds no text"),
    "empty.csv": (b"", "holds no text"),
    "number.jsonl": (b'{"text": "x"}\n{"text": 3}\n', "line 2: 'text' holds int"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_file_is_named_with_problem_and_fix(tmp_path, name):
    content, problem = BROKEN_FILES[name]
    path = write(tmp_path / name, content)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"{re.escape(path)}.*{problem}"):
            training_texts(tmp_path, train_file=path, streaming=streaming)


def test_one_empty_file_among_several_is_named(tmp_path):
    write(tmp_path / "a.txt", BLANK_LINE_TEXT)
    write(tmp_path / "b.txt", "")
    with pytest.raises(ValueError, match="b.txt holds no text"):
        training_texts(tmp_path, train_file=str(tmp_path / "*.txt"))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [({"body": ["x"]}, "no 'text' but body"), ({"text": [1]}, "holds int64, not text")],
)
def test_parquet_without_a_text_column(tmp_path, columns, problem):
    path = write_parquet(tmp_path / "corpus.parquet", **columns)
    with pytest.raises(ValueError, match=problem):
        training_texts(tmp_path, train_file=path)


def test_parquet_cut_short(tmp_path):
    path = tmp_path / "corpus.parquet"
    write_parquet(path, text=DOCUMENTS * 50)
    write(path, path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="corpus.parquet cannot be read to its end"):
        training_texts(tmp_path, train_file=str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_a_quotation_mark_joins_are_refused(tmp_path, streaming):
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\t"Hello, he said.\n2\tShe went.\n3\tIt is the end"\n')
    with pytest.raises(ValueError, match=r"a\.tsv, line 4: a field that begins with a quotation mark"):
        training_texts(tmp_path, train_file=path, streaming=streaming)
