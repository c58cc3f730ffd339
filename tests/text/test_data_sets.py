"""Data sets: splits, columns, and what is said of those that cannot be used."""

import pytest

from lambdabert.text.documents import DocumentTexts, group_rows
from lambdabert.text.sources import load_corpus
from text_support import DOCUMENTS, WIKITEXT, arguments, training_texts, write, write_parquet


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
