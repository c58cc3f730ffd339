"""Preparation: what is counted, kept, found again and streamed."""

import dataclasses
import pickle

import pytest
from datasets import Dataset, IterableDataset

from lambdabert.text import examples, preparation
from lambdabert.text.arguments import DataArguments
from lambdabert.text.objectives import MLM, SENTENCES
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from text_support import (
    MAX_LENGTH,
    NUMBER_OF_TOKENS,
    NumberedDocuments,
    data_arguments,
    prepare,
    random_documents,
    segments,
    warnings_in,
)

STREAM = {"objective": "mlm", "streaming": True}


@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_pairs_depend_on_the_seed_but_not_on_workers_or_batches(tmp_path, tokenizer, objective, monkeypatch):
    documents = random_documents()
    for folder in "abc":
        (tmp_path / folder).mkdir()
    alone, _ = prepare(tmp_path / "a", documents, tokenizer, objective=objective)
    together, _ = prepare(tmp_path / "b", documents, tokenizer, objective=objective, preprocessing_num_workers=2)
    monkeypatch.setattr(preparation, "DOCUMENTS_AT_A_TIME", 7)
    in_small_batches, _ = prepare(tmp_path / "c", documents, tokenizer, objective=objective)
    reseeded, _ = prepare(tmp_path / "c", documents, tokenizer, objective=objective, seed=2)
    assert alone.to_dict() == together.to_dict() == in_small_batches.to_dict()
    assert alone.to_dict() != reseeded.to_dict()


def test_the_order_of_a_stream_depends_on_the_seed(tmp_path, tokenizer):
    documents = random_documents()
    first, again, other = (
        [row["input_ids"] for row in prepare(tmp_path, documents, tokenizer, seed=seed, **STREAM)[0]]
        for seed in (1, 1, 2)
    )
    assert first == again != other and sorted(first) == sorted(other)


def test_summary_counts_what_is_there(tmp_path, tokenizer):
    documents = NumberedDocuments([[3, 4], [2, 2, 2], [4], [1]])
    path = documents.write(tmp_path)
    with open(path, "a") as file:
        file.write('{"text": null}\n{"title": "no text"}\n')
    arguments = data_arguments(tmp_path, train_file=path, objective="sop")
    loaded = load_corpus(arguments, evaluate=False)["train"]
    examples, summary = prepare_examples(loaded, tokenizer, arguments.example_recipe(), seed=1, training=True)
    assert (summary.documents, summary.skipped_rows, summary.short_documents, summary.sentences) == (4, 2, 1, 7)
    assert summary.single_sentence_share == pytest.approx(1 / 3)
    assert summary.examples == len(examples)
    assert summary.tokens == sum(map(len, examples["input_ids"]))
    assert summary.cache_directory.startswith(str(tmp_path))
    assert "2 rows without text" in str(summary)
    assert "1 documents of a single token" in str(summary)


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_tokens_are_counted_and_warned_of(tmp_path, tokenizer, caplog, monkeypatch, streaming):
    def summary(words):
        caplog.clear()
        path = tmp_path / "corpus.txt"
        path.write_text(f"{words}\n")
        arguments = data_arguments(tmp_path, train_file=str(path), objective="mlm", streaming=streaming)
        documents = load_corpus(arguments, evaluate=False)["train"]
        return prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=1, training=True)[1]

    few = summary("t7 t8 strange " + "t9 " * 37)
    assert few.unknown_share == pytest.approx(1 / 40)
    assert "2.50% unknown tokens" in str(few)
    assert not warnings_in(caplog)
    assert summary("t7 t8 strange").unknown_share == pytest.approx(1 / 3)
    assert "33.3% of the text's tokens are unknown" in warnings_in(caplog)[-1]
    with pytest.raises(ValueError, match="training text is unknown to the tokenizer, so there is nothing to predict"):
        summary("strange words only")
    monkeypatch.setattr(preparation, "DOCUMENTS_AT_A_TIME", 1)
    assert summary("t7 strange\n\nt8 t9\n\nt10 t11").unknown_share == pytest.approx(1 / 6)


@pytest.mark.parametrize("streaming", [False, True])
def test_halves_of_sentences_are_counted_and_warned_of(tmp_path, tokenizer, caplog, streaming):
    documents = NumberedDocuments([[4]] * 6 + [[3, 3]] * 4)
    _, summary = prepare(tmp_path, documents, tokenizer, objective="nsp", streaming=streaming)
    assert summary.single_sentence_share == pytest.approx(0.6)
    assert "60.0% of the documents a single sentence" in str(summary)
    assert "60.0% of the documents are a single sentence" in warnings_in(caplog)[-1]
    assert "--objective mlm" in warnings_in(caplog)[-1]
    caplog.clear()
    _, summary = prepare(tmp_path, documents, tokenizer, objective="mlm", streaming=streaming)
    assert summary.single_sentence_share is None
    _, summary = prepare(tmp_path, NumberedDocuments([[3, 3]] * 9 + [[4]]), tokenizer, objective="sop")
    assert summary.single_sentence_share == pytest.approx(0.1)
    assert not warnings_in(caplog)


def test_limits_on_examples(tmp_path, tokenizer):
    documents = random_documents()
    fields = {"objective": "sop", "max_train_samples": 5, "max_eval_samples": 3}
    for training, count in ((True, 5), (False, 3)):
        examples, summary = prepare(tmp_path, documents, tokenizer, training=training, **fields)
        assert len(examples) == summary.examples == count
        assert summary.tokens == sum(map(len, examples["input_ids"]))


@pytest.fixture
def calls(monkeypatch):
    """The names of the stages that ran, as often as they did."""
    calls = []
    for stage in (examples.DocumentTokenizer, examples.ExampleBuilder):
        original = stage.__call__

        def counted(self, *args, original=original):
            calls.append(type(self).__name__)
            return original(self, *args)

        monkeypatch.setattr(stage, "__call__", counted)
    return calls


def test_prepared_examples_are_found_again_until_something_changes(tmp_path, tokenizer, calls, monkeypatch):
    documents = random_documents()

    def stages_run(tokenizer=tokenizer, **fields):
        calls.clear()
        prepare(tmp_path, documents, tokenizer, **({"objective": "sop"} | fields))
        return set(calls)

    everything = {"DocumentTokenizer", "ExampleBuilder"}
    assert stages_run() == everything
    assert stages_run() == set()
    tokenizer(["t7"], truncation=True, max_length=3)
    assert stages_run() == set()
    assert stages_run(max_train_samples=3, mlm_probability=0.3) == set()
    for option in ({"objective": "nsp"}, {"max_seq_length": 20}, {"dupe_factor": 2}, {"seed": 5}):
        assert stages_run(**option) == {"ExampleBuilder"}
    assert stages_run(language="de") == everything
    other = pickle.loads(pickle.dumps(tokenizer))
    other.add_tokens(["new"])
    assert stages_run(tokenizer=other) == everything
    documents.documents[0].append([NUMBER_OF_TOKENS - 1])
    assert stages_run() == everything
    monkeypatch.setattr(preparation.importlib.metadata, "version", lambda package: "0")
    assert stages_run() == everything, "another sentencex finds other sentences"


def test_sentences_alone_are_tokenized_anew(tmp_path, tokenizer, calls):
    arguments = data_arguments(tmp_path, train_file=NumberedDocuments([[3, 4], [5, 6]]).write(tmp_path))
    documents = load_corpus(arguments, evaluate=False)["train"]
    for objective in (MLM, SENTENCES):
        calls.clear()
        recipe = dataclasses.replace(arguments.example_recipe(), objective=objective)
        prepare_examples(documents, tokenizer, recipe, seed=1, training=True)
        assert "DocumentTokenizer" in calls


@pytest.mark.parametrize("objective", ["nsp", "sop", "mlm"])
def test_a_stream_gives_the_same_examples(tmp_path, tokenizer, objective):
    documents = random_documents()
    prepared, _ = prepare(tmp_path, documents, tokenizer, objective=objective, training=False)
    streamed, summary = prepare(tmp_path, documents, tokenizer, objective=objective, training=False, streaming=True)
    assert isinstance(streamed, IterableDataset)
    assert summary.examples is None
    assert list(streamed) == list(prepared)


def test_a_stream_is_shuffled_by_seed_and_epoch_and_can_be_resumed(tmp_path, tokenizer):
    fields = {"objective": "sop", "streaming": True, "shuffle_buffer_size": 50}
    documents = random_documents()
    stream, _ = prepare(tmp_path, documents, tokenizer, **fields)
    again, _ = prepare(tmp_path, documents, tokenizer, **fields)
    in_order, _ = prepare(tmp_path, documents, tokenizer, training=False, **fields)
    first_epoch = list(stream)
    assert first_epoch == list(again)
    assert first_epoch != list(in_order)
    assert sorted(map(str, first_epoch)) == sorted(map(str, in_order))
    assert list(stream.skip(17)) == first_epoch[17:]
    stream.set_epoch(1)
    assert list(stream) != first_epoch

    iterator = iter(in_order)
    taken = [next(iterator) for _ in range(17)]
    restarted, _ = prepare(tmp_path, documents, tokenizer, training=False, **fields)
    whole = list(restarted)
    restarted.load_state_dict(in_order.state_dict())
    assert taken + list(restarted) == whole


def test_a_limited_stream_gives_its_first_examples_in_every_epoch(tmp_path, tokenizer):
    fields = {"objective": "sop", "streaming": True}
    stream, _ = prepare(tmp_path, random_documents(), tokenizer, max_train_samples=9, **fields)
    in_order, _ = prepare(tmp_path, random_documents(), tokenizer, training=False, **fields)
    first = sorted(map(str, in_order.take(9)))
    for epoch in range(2):
        stream.set_epoch(epoch)
        assert sorted(map(str, stream)) == first


@pytest.mark.parametrize("training, name", [(True, "training"), (False, "validation")])
@pytest.mark.parametrize("streaming", [False, True])
def test_nsp_needs_a_second_document(tmp_path, tokenizer, streaming, training, name):
    documents = NumberedDocuments([[3, 4, 5, 6]])
    with pytest.raises(ValueError, match=f"'nsp'.*another document.* the {name} text.*document_boundary.*--sop"):
        prepare(tmp_path, documents, tokenizer, objective="nsp", streaming=streaming, training=training)
    examples, _ = prepare(tmp_path, documents, tokenizer, objective="sop", streaming=streaming)
    assert list(examples)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_too_short_for_any_pair(tmp_path, tokenizer, streaming):
    with pytest.raises(ValueError, match="2 documents with 2 tokens make no example.*give more text"):
        prepare(tmp_path, NumberedDocuments([[1], [1]]), tokenizer, objective="nsp", streaming=streaming)


def test_documents_need_no_file(tokenizer):
    documents = Dataset.from_dict({"text": NumberedDocuments([[3, 4, 5], [5, 6]]).texts()})
    arguments = DataArguments(corpus="python-docs", objective="nsp", max_seq_length=MAX_LENGTH)
    examples, _ = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=1, training=True)
    assert all(segments(example) for example in examples)
