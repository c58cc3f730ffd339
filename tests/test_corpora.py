"""corpora: every source gives the same documents, and every broken one a message that names file, problem and fix."""

import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import resource
import textwrap
from pydoc_data import topics

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import corpora
from corpora import CorpusArguments, DocumentTexts, detect_boundary, group_rows, load_corpus, wrapped_share

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


def test_a_folder_stands_for_its_files(tmp_path, caplog):
    books = tmp_path / "books"
    (books / "more").mkdir(parents=True)
    for number, folder in enumerate((books, books / "more", books)):
        write(folder / f"{number}.txt", f"Book {number}.")
    write(books / ".hidden", b"\0")
    with caplog.at_level("INFO"):
        assert training_texts(tmp_path, train_file=str(books)) == ["Book 0.", "Book 2.", "Book 1."]
    assert "reading 3 files" in caplog.messages[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="matches no file"):
        training_texts(tmp_path, train_file=str(tmp_path / "empty"))


QUOTED = ['A "quoted", listed text.\nIts second line.', "Plain text.", "", "Caf\u00e9."]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV.gz", ".tsv.xz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_are_read_by_column(tmp_path, suffix, streaming):
    content = io.StringIO(newline="")
    table = csv.writer(content, delimiter="," if "csv" in suffix.lower() else "\t")
    table.writerows([["id", "review", "label"], *([f"user{i}", text, i] for i, text in enumerate(QUOTED))])
    compress = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix.rpartition(".")[2], bytes)
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


def test_nested_columns_of_parquet_and_data_sets(tmp_path):
    folder = tmp_path / "data_set"
    folder.mkdir()
    path = write_parquet(folder / "train.parquet", doc=[{"text": text, "n": 1} for text in DOCUMENTS], id=[1, 2, 3])
    sources = [{"train_file": path}, {"dataset_name": str(folder)}, {"dataset_name": str(folder), "streaming": True}]
    for source in sources:
        assert training_texts(tmp_path, text_column="doc.text", **source) == DOCUMENTS
        with pytest.raises(ValueError, match=r"doc\.text"):
            training_texts(tmp_path, **source)
        with pytest.raises(ValueError, match="holds int64|holds int"):
            training_texts(tmp_path, text_column="id", **source)
        with pytest.raises(ValueError, match="'doc' is not a column|no 'doc'|holds dict"):
            training_texts(tmp_path, text_column="doc", **source)


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


def wrapped_book(paragraphs=12, gap="\n\n"):
    rng = random.Random(0)
    words = "the old river ran far away from our house and nobody in town remembered why it had".split()
    texts = [
        " ".join(" ".join(rng.choices(words, k=rng.randint(6, 20))).capitalize() + "." for _ in range(8))
        for _ in range(paragraphs)
    ]
    return texts, gap.join(textwrap.fill(text, 70) for text in texts)


def test_hard_wrapped_lines_are_found_and_joined(tmp_path, caplog):
    texts, book = wrapped_book()
    path = write(tmp_path / "book.txt", book.replace("\n", "\r\n"))
    assert len(training_texts(tmp_path, train_file=path)[0].splitlines()) > 5
    assert "hard-wrapped" in caplog.text and "--line_breaks join" in caplog.text
    caplog.clear()
    assert training_texts(tmp_path, train_file=path, line_breaks="join") == texts
    training_texts(tmp_path, train_file=path, line_breaks="keep")
    assert not caplog.records


def test_chapters_are_the_documents_of_a_wrapped_book(tmp_path):
    texts, _ = wrapped_book()
    chapters = [
        f"CHAPTER {number}\n\n\n" + "\n\n".join(textwrap.fill(text, 70) for text in texts[number::3])
        for number in range(3)
    ]
    path = write(tmp_path / "book.txt", "\n\n\n\n".join(chapters))
    documents = training_texts(tmp_path, train_file=path, line_breaks="join")
    assert documents == ["\n".join([f"CHAPTER {number}", *texts[number::3]]) for number in range(3)]
    assert len(training_texts(tmp_path, train_file=path, document_boundary="blank_line")) == 15


@pytest.mark.parametrize(
    "text",
    [
        WIKITEXT,
        "\n".join(f"Sentence number {number} is about as long as all others are." for number in range(50)),
        "\n".join(f"{'a word ' * (number % 17)}of a message" for number in range(100)),
        "\n".join("ACGT" * 15 for _ in range(50)),
        wrapped_book(1)[0][0],
    ],
    ids=["wikitext", "sentences", "messages", "letters", "one line"],
)
def test_other_lines_do_not_count_as_wrapped(text):
    assert wrapped_share(text.splitlines()) < 0.3


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
    "latin.txt": ("caf\u00e9 au lait\n".encode("latin-1"), "not UTF-8.*0xe9.*--encoding latin-1"),
    "late.txt": (b"one long line of text " * 100_000 + b"\n\xff", "not UTF-8.*0xff"),
    "cut.txt.gz": (gzip.compress(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "cut.txt.xz": (lzma.compress(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "cut.txt.zst": (zstd(COMPRESSIBLE)[:-900], "cannot be read to its end"),
    "plain.txt.gz": (b"not compressed", "cannot be read to its end"),
    "text.parquet": (b"not parquet", "cannot be read to its end"),
    "column.jsonl": (b'{"body": "x"}\n', "no 'text' but body.*text_column"),
    "half.jsonl": (b'{"text": "x"}\n{"text": "y', "line 2, is not JSON"),
    "list.json": (b'[["x"]]', "row 1, holds a JSON list.*objects"),
    "half.json": (b'[{"text": "x"},\n {"text": "y"\n', "line 3, is not JSON"),
    "pretty.json": (b'{\n"text": "x"\n}\n{\n"text": 3}', "row 2: 'text' holds int"),
    "nested.jsonl": (b'{"doc": {"title": "x"}, "id": 1}', "no 'text' but doc.title, id"),
    "column.csv": (b"id,body\n1,x\n", "no 'text' but id, body.*text_column"),
    "twice.csv": (b"text,text\n1,x\n", "several columns 'text'"),
    "fields.csv": (b"id,text\n1,Yes, it is\n", "line 2: 3 fields stand under 2 columns"),
    "quote.tsv": (b'id\ttext\n1\t"Yes," he said\n', "line 2: .*RFC 4180"),
    "header.csv": (b"id,text\n", "holds no text"),
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
        ({"encoding": "klingon"}, "encoding='klingon' is not a text encoding"),
        ({"encoding": "rot13"}, "encoding='rot13' is not a text encoding"),
        ({"line_breaks": "maybe"}, "line_breaks='maybe' is unknown: use one of keep, join"),
        ({"line_breaks": "join", "document_boundary": "row"}, "line_breaks='join' contradicts"),
        ({"dataset_name": ""}, "dataset_name is given without a value"),
        (
            {"train_file": "a", "validation_file": "b", "validation_split_percentage": 5.0},
            "validation_split_percentage=5.0 has no effect: validation_file",
        ),
        ({"streaming": True, "validation_split_percentage": 5.0}, "no effect: documents cannot be held out"),
        (
            {"train_file": "a", "streaming": True, "preprocessing_num_workers": 2},
            "preprocessing_num_workers=2 has no effect",
        ),
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
    for mixed in ([text, table], str(tmp_path)):
        with pytest.raises(ValueError, match="mixes json and text"):
            training_texts(tmp_path, train_file=mixed)
    with pytest.raises(ValueError, match="single document.*validation_file"):
        load_corpus(arguments(tmp_path, train_file=text))
    with pytest.raises(ValueError, match="stream.*validation_file"):
        load_corpus(arguments(tmp_path, train_file=text, streaming=True))
    with pytest.raises(ValueError, match="no text to train on"):
        load_corpus(arguments(tmp_path, validation_file=text))


def test_options_without_effect_on_the_source_are_refused(tmp_path):
    text = write(tmp_path / "one.txt", "A line.\nAnother.")
    table = write_parquet(tmp_path / "one.parquet", text=["A text."])
    folder = tmp_path / "data_set"
    folder.mkdir()
    for split in ("train", "validation"):
        write_parquet(folder / f"{split}.parquet", text=["A text."])
    data_set = {"dataset_name": str(folder)}
    for source, option in (
        ({"train_file": text}, {"text_column": "review"}),
        ({"corpus": "python-docs"}, {"text_column": "text"}),
        ({"corpus": "python-docs"}, {"document_boundary": "row"}),
        ({"corpus": "python-docs"}, {"encoding": "latin-1"}),
        ({"train_file": table}, {"encoding": "latin-1"}),
        (data_set, {"encoding": "latin-1"}),
        (data_set, {"line_breaks": "join"}),
        (data_set, {"validation_split_percentage": 5.0}),
        ({"train_file": table}, {"line_breaks": "keep"}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* has no effect: .*Leave it out"):
            training_texts(tmp_path, **source, **option)
    assert training_texts(tmp_path, train_file=table, validation_file=text, line_breaks="keep") == ["A text."]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_data_sets_are_named_in_one_line(tmp_path, streaming, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file, content in (
        ("empty", None, None),
        ("binary", "a.bin", b"\0"),
        ("arrow", "train.arrow", b"not arrow"),
        ("table", "train.parquet", b"not parquet"),
        ("latin", "train.csv", "text\ncaf\u00e9\n".encode("latin-1")),
        ("json", "train.json", b"{]"),
    ):
        (tmp_path / name).mkdir()
        if file:
            write(tmp_path / name / file, content)
        with pytest.raises(ValueError, match=f"dataset_name='{name}' cannot be read .*train_file"):
            training_texts(tmp_path, dataset_name=name, streaming=streaming)
    write_parquet(tmp_path / "lists.parquet", text=[["a"], ["b"]])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists.parquet").rename(tmp_path / "lists" / "train.parquet")
    for name, problem in (
        ("lists", "text_column='text' of 'lists' holds List"),
        ("lists/train.parquet", "is a file: give it with train_file"),
        ("./mistyped", "is neither a folder nor a hub name"),
        ("mistyped", "is not a folder here, and the hub cannot be reached"),
        ("owner/mistyped", "is not a folder here, and the hub cannot be reached"),
    ):
        with pytest.raises(ValueError, match=f"{problem}") as error:
            training_texts(tmp_path, dataset_name=name, streaming=streaming)
        assert "\n" not in str(error.value)


def test_a_full_cache_is_named(tmp_path):
    """In a process of its own, which may not write files of more than 64 KB."""
    path = write(tmp_path / "corpus.txt", "A line of text.\n" * 20_000)
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            training_texts(tmp_path, train_file=path)
        except corpora.UnwritableCacheError as error:
            os._exit(0 if "data_cache_dir" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_without_a_source_the_default_is_wikitext_and_an_unreachable_hub_is_said(tmp_path):
    fields = arguments(tmp_path)
    assert (fields.dataset_name, fields.dataset_config_name) == corpora.DEFAULT_DATASET
    with pytest.raises(ValueError, match="(?s)hub cannot be reached.*--train_file.*--tokenizer_name.*demo") as error:
        load_corpus(fields)
    assert "\n" not in str(error.value)
