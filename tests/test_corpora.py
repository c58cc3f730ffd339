"""corpora: every source gives the same documents, and every broken one a message that names file, problem and fix."""

import gzip
import json
import lzma
import os
import re
from pydoc_data import topics

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import corpora
from corpora import CorpusArguments, DocumentTexts, detect_boundary, group_rows, load_corpus

DOCUMENTS = [
    "Rivers carry water to the sea.\nSome of them are long.",
    "Bread is baked from flour.",
    "Café owners rise early.\nThey open at six.\nThey close at nine.",
]
BLANK_LINE_TEXT = "\n\n".join(DOCUMENTS) + "\n"
WIKITEXT = """ 
 = First title = 
 
 A 17 @-@ year @-@ old sold 1 @,@ 000 kites . 
 
 = = Section = = 
 
 It cost 3 @.@ 5 pounds , where x 
 = 5 and y = 
 2 . 
 
 = Second title = 
 
 Another article . 
"""


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def arguments(tmp_path, **fields):
    return CorpusArguments(data_cache_dir=str(tmp_path / "cache"), **fields)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def training_texts(tmp_path, **fields):
    documents = load_corpus(arguments(tmp_path, **fields), evaluate=False)["train"]
    return list(DocumentTexts(documents))


@pytest.mark.parametrize(
    ("text", "boundary"),
    [
        (WIKITEXT, "heading"),
        (BLANK_LINE_TEXT, "blank_line"),
        ("\n\nOne line.\nAnother line.\n\n", "row"),
        (" = = Section = = \n\nText.\n", "blank_line"),
        ("", "row"),
    ],
)
def test_boundary_of_a_text_file_is_detected(text, boundary):
    assert detect_boundary(text.splitlines(), rows_are_lines=True) == boundary


def test_boundary_of_a_table_is_a_row_unless_its_rows_are_wikitext_lines():
    assert detect_boundary(["One text.", "", None, "Another."], rows_are_lines=False) == "row"
    assert detect_boundary(["A text\n = of lines = \nin a row."], rows_are_lines=False) == "row"
    assert detect_boundary(WIKITEXT.splitlines(), rows_are_lines=False) == "heading"


def test_only_titles_open_a_wikitext_document_and_joiners_go():
    first, second = group_rows(WIKITEXT.splitlines(), "heading")
    assert first.splitlines() == [
        "= First title =",
        "A 17-year-old sold 1,000 kites .",
        "= = Section = =",
        "It cost 3.5 pounds , where x",
        "= 5 and y =",
        "2 .",
    ]
    assert second.splitlines() == ["= Second title =", "Another article ."]


def test_text_before_the_first_title_is_kept():
    assert list(group_rows(["tail of an article", "", "= Title =", "text"], "heading")) == [
        "tail of an article",
        "= Title =\ntext",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_json_lines_read_the_same_in_every_compression(tmp_path, suffix, streaming):
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
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


def test_several_files_and_globs_are_read_once_each_in_order(tmp_path):
    for number, text in enumerate(DOCUMENTS):
        write(tmp_path / f"part-{number}.txt", text.replace("\n", "\n\n"))
    texts = training_texts(
        tmp_path, train_file=[str(tmp_path / "part-[01].txt"), str(tmp_path / "part-*.txt")], document_boundary="row"
    )
    assert texts == [line for text in DOCUMENTS for line in text.splitlines()]


def test_no_document_goes_on_into_the_next_file(tmp_path):
    paths = [write(tmp_path / f"{name}.txt", f"Text of {name}.") for name in "ab"]
    assert training_texts(tmp_path, train_file=paths, document_boundary="blank_line") == ["Text of a.", "Text of b."]


def test_boundary_can_be_set_and_is_logged(tmp_path, caplog):
    path = write(tmp_path / "corpus.txt", BLANK_LINE_TEXT)
    with caplog.at_level("INFO"):
        assert len(training_texts(tmp_path, train_file=path)) == 3
        assert len(training_texts(tmp_path, train_file=path, document_boundary="row")) == 6
    assert "blank_line, detected" in caplog.messages[0]
    assert "row, as set" in caplog.messages[1]


def test_rows_without_text_stay_as_empty_documents(tmp_path):
    rows = [{"text": "One."}, {"other": 1}, {"text": None}, {"text": " "}, {"text": "Two."}]
    path = write(tmp_path / "corpus.jsonl", json_lines(rows))
    documents = load_corpus(arguments(tmp_path, train_file=path), evaluate=False)["train"]
    assert documents["text"] == ["One.", "", "", "", "Two."]


def test_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path):
    content = BLANK_LINE_TEXT.replace("\n", "\r\n").encode("utf-8-sig")
    assert training_texts(tmp_path, train_file=write(tmp_path / "dos.txt", content)) == DOCUMENTS


def test_built_in_corpus_holds_the_words_of_every_topic(tmp_path):
    texts = training_texts(tmp_path, corpus="python-docs")
    assert len(texts) == len(topics.topics)
    for text, topic in zip(texts, sorted(topics.topics), strict=True):
        words = [word for word in topics.topics[topic].split() if not re.fullmatch(r"([*=~^-])\1+", word)]
        assert [word for word in text.split() if not re.fullmatch(r"([*=~^-])\1+", word)] == words


def test_hold_out_is_a_seeded_share_of_the_documents(tmp_path):
    path = write(tmp_path / "lines.txt", "".join(f"Line number {number}.\n" for number in range(40)))
    whole = training_texts(tmp_path, train_file=path)
    fields = arguments(tmp_path, train_file=path, validation_split_percentage=10.0)
    first, again, other = (load_corpus(fields, seed=seed) for seed in (1, 1, 2))
    assert len(first["validation"]) == 4
    assert sorted([*first["train"]["text"], *first["validation"]["text"]]) == sorted(whole)
    assert first["validation"]["text"] == again["validation"]["text"] != other["validation"]["text"]
    assert load_corpus(fields, train=False, seed=1)["validation"]["text"] == first["validation"]["text"]


def test_validation_file_leaves_the_training_text_whole(tmp_path):
    train_file = write(tmp_path / "train.txt", BLANK_LINE_TEXT)
    validation_file = write(tmp_path / "validation.txt", "Held out.\nText.\n")
    for streaming in (False, True):
        loaded = load_corpus(
            arguments(tmp_path, train_file=train_file, validation_file=validation_file, streaming=streaming)
        )
        assert list(DocumentTexts(loaded["train"])) == DOCUMENTS
        assert isinstance(loaded["validation"], datasets.Dataset)
        assert loaded["validation"]["text"] == ["Held out.", "Text."]
    only = load_corpus(arguments(tmp_path, validation_file=validation_file), train=False)
    assert list(only) == ["validation"]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_with_its_own_validation_split(tmp_path, streaming):
    folder = tmp_path / "data_set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", body=[f"{line}\n" for line in WIKITEXT.splitlines()])
    write_parquet(folder / "validation.parquet", body=[*DOCUMENTS, None])
    fields = arguments(tmp_path, dataset_name=str(folder), text_column="body", streaming=streaming)
    loaded = load_corpus(fields)
    assert list(DocumentTexts(loaded["train"])) == list(group_rows(WIKITEXT.splitlines(), "heading"))
    assert list(DocumentTexts(loaded["validation"])) == DOCUMENTS
    with pytest.raises(ValueError, match=r"text_column='text' is not a column .*body"):
        load_corpus(arguments(tmp_path, dataset_name=str(folder), streaming=streaming))


def test_cache_follows_the_content_not_the_date(tmp_path, monkeypatch):
    path = write(tmp_path / "corpus.txt", BLANK_LINE_TEXT)
    date = os.stat(path).st_mtime_ns
    texts = training_texts(tmp_path, train_file=path)

    write(tmp_path / "corpus.txt", BLANK_LINE_TEXT.replace("Bread", "Toast"))
    os.utime(path, ns=(date, date))
    changed = training_texts(tmp_path, train_file=path)
    assert changed == [text.replace("Bread", "Toast") for text in texts]

    def fail(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(corpora, "group_rows", fail)
    assert training_texts(tmp_path, train_file=path) == changed
    with pytest.raises(Exception, match="generating the dataset"):
        training_texts(tmp_path, train_file=path, document_boundary="row")


COMPRESSIBLE = "".join(map(str, range(30_000))).encode()
BROKEN_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b"\n \n\n", "holds no text"),
    "binary.txt": (b"text\0\1\2", "binary"),
    "utf16.txt": (("text\n" * 9).encode("utf-16"), "UTF-16"),
    "latin.txt": ("caf\u00e9 au lait\n".encode("latin-1"), "not UTF-8.*0xe9.*iconv"),
    "late.txt": (b"one long line of text " * 100_000 + b"\n\xff", "not UTF-8.*0xff"),
    "cut.txt.gz": (gzip.compress(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "cut.txt.xz": (lzma.compress(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "cut.txt.zst": (zstd(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "plain.txt.gz": (b"not compressed", "cannot be read to its end"),
    "text.parquet": (b"not parquet", "cannot be read to its end"),
    "column.jsonl": (b'{"body": "x"}\n', "no 'text' but body.*text_column"),
    "half.jsonl": (b'{"text": "x"}\n{"text": "y', "line 2, is not JSON"),
    "list.json": (b'[{"text": "x"}]', "line 1, holds a JSON list.*JSON lines"),
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


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"corpus": "klingon"}, "corpus='klingon' is unknown: use one of python-docs"),
        ({"document_boundary": "page"}, "document_boundary='page'"),
        ({"train_file": "a.txt", "corpus": "python-docs"}, "train_file and corpus are both given"),
        ({"dataset_config_name": "x"}, "needs dataset_name"),
        ({"validation_split_percentage": 100.0}, "validation_split_percentage=100.0"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers=0"),
    ],
)
def test_contradictory_arguments(fields, problem):
    with pytest.raises(ValueError, match=problem):
        CorpusArguments(**fields)


def test_unusable_sources(tmp_path):
    text = write(tmp_path / "one.txt", "A single line.")
    table = write(tmp_path / "one.jsonl", '{"text": "A single row."}')
    with pytest.raises(ValueError, match="matches no file"):
        training_texts(tmp_path, train_file=str(tmp_path / "nothing-*.txt"))
    with pytest.raises(ValueError, match="matches no file"):
        training_texts(tmp_path, train_file=str(tmp_path))
    with pytest.raises(ValueError, match="mixes json and text"):
        training_texts(tmp_path, train_file=[text, table])
    with pytest.raises(ValueError, match="single document.*validation_file"):
        load_corpus(arguments(tmp_path, train_file=text))
    with pytest.raises(ValueError, match="stream.*validation_file"):
        load_corpus(arguments(tmp_path, train_file=text, streaming=True))
    with pytest.raises(ValueError, match="no text to train on"):
        load_corpus(arguments(tmp_path, validation_file=text))


def test_without_a_source_the_default_is_wikitext_and_an_unreachable_hub_is_said(tmp_path):
    fields = arguments(tmp_path)
    assert (fields.dataset_name, fields.dataset_config_name) == corpora.DEFAULT_DATASET
    with pytest.raises(ValueError, match="(?s)hub cannot be reached.*--train_file.*--tokenizer_name.*demo") as error:
        load_corpus(fields)
    assert "\n" not in str(error.value)
