"""What pairs and stretches promise, checked on documents of numbered tokens."""

import math
import pickle
import random
from collections import defaultdict

import numpy as np
import pytest

from lambdabert.text import examples, sentence_pairs, tokenizers
from lambdabert.text.objectives import OBJECTIVES
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sentence_pairs import split_sentences
from lambdabert.text.sources import load_corpus
from text_support import (
    END,
    MAX_LENGTH,
    START,
    UNKNOWN,
    NumberedDocuments,
    data_arguments,
    prepare,
    random_documents,
    segments,
)


def is_stretch(tokens):
    return tokens == list(range(tokens[0], tokens[0] + len(tokens)))


@pytest.mark.parametrize("fields", [{}, {"dupe_factor": 3}, {"short_seq_probability": 1.0}])
@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_pairs_mean_what_their_papers_say(tmp_path, tokenizer, objective, fields):
    documents = random_documents()
    examples, _ = prepare(tmp_path, documents, tokenizer, objective=objective, **fields)
    covered, labels = set(), []
    for example in examples:
        first, second = segments(example)
        label = example["next_sentence_label" if objective == "nsp" else "sentence_order_label"]
        labels.append(label)
        assert is_stretch(first)
        assert is_stretch(second)
        same_document = documents.position[first[0]] == documents.position[second[0]]
        for segment in (first, second):
            assert documents.position[segment[0]] == documents.position[segment[-1]]
        covered |= set(first)
        if label == 0:
            assert same_document
            assert second[0] == first[-1] + 1
        elif objective == "sop":
            assert same_document
            assert first[0] == second[-1] + 1
        else:
            assert not same_document
        if objective == "sop" or label == 0:
            covered |= set(second)
    assert covered == documents.tokens()
    # Half of the pairs are positive, within four standard deviations.
    assert abs(np.mean(labels) - 0.5) < 4 * math.sqrt(0.25 / len(labels))
    assert set(examples.column_names) == {"input_ids", "token_type_ids", OBJECTIVES[objective].sentence_label}


@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_segments_are_whole_sentences(tmp_path, tokenizer, objective):
    rng = random.Random(5)
    documents = NumberedDocuments([[rng.randint(1, 6) for _ in range(rng.randint(2, 30))] for _ in range(50)])
    examples, _ = prepare(tmp_path, documents, tokenizer, objective=objective, short_seq_probability=0.0)
    cut = 0
    for example in examples:
        first, second = segments(example)
        for segment in (first, second):
            assert segment[0] in documents.sentence_starts
            cut += segment[-1] not in documents.sentence_ends
    # Only NSP's random B is cut, and only where hardly any of its document's sentences fits.
    assert cut <= (0.02 * len(examples) if objective == "nsp" else 0)


def test_pairs_fill_the_length_and_short_ones_do_not(tmp_path, tokenizer):
    documents = NumberedDocuments([[2] * 200, [2] * 200])
    full, _ = prepare(tmp_path, documents, tokenizer, objective="sop", short_seq_probability=0.0)
    lengths = [len(ids) for ids in full["input_ids"]]
    assert sum(length >= MAX_LENGTH - 1 for length in lengths) >= len(lengths) - 2
    short, _ = prepare(tmp_path, documents, tokenizer, objective="sop", short_seq_probability=1.0)
    assert np.mean([len(ids) for ids in short["input_ids"]]) < 0.75 * MAX_LENGTH


def test_every_copy_of_a_document_is_paired_differently(tmp_path, tokenizer):
    documents = random_documents()
    once, _ = prepare(tmp_path, documents, tokenizer, objective="sop")
    thrice, _ = prepare(tmp_path, documents, tokenizer, objective="sop", dupe_factor=3)
    validation, _ = prepare(tmp_path, documents, tokenizer, objective="sop", dupe_factor=3, training=False)
    assert 2.5 * len(once) < len(thrice) < 3.5 * len(once)
    assert len({tuple(ids) for ids in thrice["input_ids"]}) > 2 * len(once)
    assert validation["input_ids"][:] == once["input_ids"][:]


def test_documents_are_cut_into_full_stretches_without_a_sentence_task(tmp_path, tokenizer):
    documents = random_documents()
    examples, summary = prepare(tmp_path, documents, tokenizer, objective="mlm")
    assert examples.column_names == ["input_ids"]
    stretches = defaultdict(list)
    for ids in examples["input_ids"]:
        assert (ids[0], ids[-1]) == (START, END)
        stretches[documents.position[ids[1]]].append(ids[1:-1])
    for index, document in enumerate(documents.documents):
        assert sum(stretches[index], []) == sum(document, [])
        assert all(len(stretch) == MAX_LENGTH - 2 for stretch in stretches[index][:-1])
    assert summary.tokens == len(documents.tokens()) + 2 * len(examples)


def test_more_copies_without_a_sentence_task_are_cut_elsewhere(tmp_path, tokenizer):
    documents = NumberedDocuments([[4] * 50])
    examples, _ = prepare(tmp_path, documents, tokenizer, objective="mlm", dupe_factor=6)
    once, _ = prepare(tmp_path, documents, tokenizer, objective="mlm")
    tokens = [token for ids in examples["input_ids"] for token in ids[1:-1]]
    assert sorted(tokens) == sorted(list(documents.tokens()) * 6)
    assert examples["input_ids"][: len(once)] == once["input_ids"][:]
    assert len({tuple(ids) for ids in examples["input_ids"]}) == len(examples)


def test_ids_are_small_and_those_of_the_tokenizer_whatever_its_padding(tmp_path, tokenizer):
    documents = NumberedDocuments([[3, 4], [5, 6]])
    used = pickle.loads(pickle.dumps(tokenizer))
    used(["t7 t8"], truncation=True, max_length=3, padding="max_length")
    examples, _ = prepare(tmp_path, documents, used, objective="mlm")
    assert str(examples.features["input_ids"].feature.dtype) == "uint16"
    assert examples["input_ids"][:] == [tokenizer(text)["input_ids"] for text in documents.texts()]
    largest_small_vocabulary = range(1 << 16)
    assert tokenizers.id_type(largest_small_vocabulary) == np.uint16
    assert tokenizers.id_type(range(len(largest_small_vocabulary) + 1)) == np.int32


def test_unknown_words_and_special_tokens_in_text_become_unknown(tmp_path, tokenizer):
    path = tmp_path / "corpus.txt"
    path.write_text("t7 <unk> t8 [SEP] t9 strange [MASK] [UNK]\n")
    arguments = data_arguments(tmp_path, train_file=str(path), objective="mlm")
    documents = load_corpus(arguments, evaluate=False)["train"]
    examples, _ = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=1, training=True)
    assert examples["input_ids"][0] == [START, 7, UNKNOWN, 8, UNKNOWN, 9, UNKNOWN, UNKNOWN, UNKNOWN, END]


def test_an_enormous_line_is_read_in_stretches(tmp_path, tokenizer, monkeypatch):
    documents = NumberedDocuments([[400], [3, 3]])
    whole, _ = prepare(tmp_path, documents, tokenizer, objective="mlm")
    monkeypatch.setattr(sentence_pairs, "LONGEST_SPLIT", 50)
    monkeypatch.setattr(examples, "CHARACTERS_AT_A_TIME", 60)
    arguments = data_arguments(tmp_path, objective="mlm", data_cache_dir=str(tmp_path / "other"))
    arguments.train_file = [str(tmp_path / "corpus.jsonl")]
    loaded = load_corpus(arguments, evaluate=False)["train"]
    in_stretches, summary = prepare_examples(loaded, tokenizer, arguments.example_recipe(), seed=1, training=True)
    assert in_stretches.to_dict() == whole.to_dict()
    assert summary.sentences > 3
    assert "".join(split_sentences("x" * 120)) == "x" * 120


def test_smallest_block_sizes_work(tmp_path, tokenizer):
    documents = NumberedDocuments([[3, 4], [2, 2, 2]])
    for objective, smallest in (("nsp", 5), ("sop", 5), ("mlm", 3)):
        examples, _ = prepare(tmp_path, documents, tokenizer, objective=objective, max_seq_length=smallest)
        assert max(map(len, examples["input_ids"])) == smallest
