"""Sources: files, the built-in corpus, what is held out, and what is refused."""

import os
import re
from pydoc_data import topics

import datasets
import pytest

from lambdabert.text import sources
from lambdabert.text.arguments import DEFAULT_DATASET
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.sources import load_corpus
from text_support import BLANK_LINE_TEXT, DOCUMENTS, arguments, training_texts, write, write_parquet


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
    (books / ".git").mkdir()
    write(books / ".git" / "index.json", b"\0")
    with caplog.at_level("INFO"):
        assert training_texts(tmp_path, train_file=str(books)) == ["Book 0.", "Book 2.", "Book 1."]
    assert "reading 3 files" in caplog.messages[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="matches no file"):
        training_texts(tmp_path, train_file=str(tmp_path / "empty"))


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

    monkeypatch.setattr(sources, "group_rows", fail)
    assert training_texts(tmp_path, train_file=path) == changed
    with pytest.raises(Exception, match="generating the dataset"):
        training_texts(tmp_path, train_file=path, document_boundary="row")


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


def test_without_a_source_the_default_is_wikitext_and_an_unreachable_hub_is_said(tmp_path):
    fields = arguments(tmp_path)
    assert (fields.dataset_name, fields.dataset_config_name) == DEFAULT_DATASET
    with pytest.raises(ValueError, match="(?s)hub cannot be reached.*--train_file.*--tokenizer_name.*demo") as error:
        load_corpus(fields)
    assert "\n" not in str(error.value)


def test_a_file_of_both_training_and_validation_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in "ab":
        write(tmp_path / "folder" / f"{name}.txt", "A line.\n")
    both = str(tmp_path / "folder" / ".." / "folder" / "a.txt")
    with pytest.raises(ValueError, match=r"validation_file=.*a\.txt is among the files of train_file"):
        load_corpus(
            arguments(tmp_path, train_file=str(tmp_path / "folder"), validation_file=both), train=True, evaluate=True
        )
    twice = [str(tmp_path / "folder" / "b.txt"), str(tmp_path / "folder" / ".." / "folder" / "b.txt")]
    assert training_texts(tmp_path, train_file=twice) == ["A line."]
