"""pretraining_data: what pairs, stretches, features and masks promise, checked on documents of numbered tokens."""

import itertools
import json
import math
import os
import pickle
import random
import resource
import signal
import time
from collections import defaultdict

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset, IterableDataset, load_from_disk
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer, HfArgumentParser, PreTrainedTokenizerFast

import pretraining_data
from corpora import UnwritableCacheError, load_corpus
from pretraining_data import (
    LABEL_NAMES,
    DataArguments,
    check_tokenizer,
    draw_pairs,
    masking_collator,
    prepare_examples,
    sentence_bounds,
    split_sentences,
    train_wordpiece,
)

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, START, END, MASK = range(5)
MAX_LENGTH = 24
NUMBER_OF_TOKENS = 9_000


@pytest.fixture(scope="module")
def tokenizer():
    """Knows the words t5, t6, ...; the token of t7 is 7."""
    words = [f"t{number}" for number in range(len(SPECIAL_TOKENS), NUMBER_OF_TOKENS)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(SPECIAL_TOKENS + words)})


class NumberedDocuments:
    """Documents whose tokens are all different, so that each segment shows where it comes from."""

    def __init__(self, sentence_lengths):
        numbers = itertools.count(len(SPECIAL_TOKENS))
        self.documents = [
            [list(itertools.islice(numbers, length)) for length in document] for document in sentence_lengths
        ]
        self.position = {}
        self.sentence_starts, self.sentence_ends = set(), set()
        for index, document in enumerate(self.documents):
            for sentence in document:
                self.sentence_starts.add(sentence[0])
                self.sentence_ends.add(sentence[-1])
                self.position.update(dict.fromkeys(sentence, index))

    def texts(self):
        return ["\n".join(" ".join(f"t{number}" for number in s) for s in document) for document in self.documents]

    def write(self, folder):
        path = folder / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts()))
        return str(path)

    def tokens(self):
        return set(self.position)


def random_documents(count=60, longest=MAX_LENGTH - 3, seed=0):
    rng = random.Random(seed)
    lengths = [[rng.randint(1, longest // 2) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    lengths += [[2], [7], [1, 1], [longest * 3], [1, longest * 2, 3]]
    return NumberedDocuments(lengths)


def prepare(folder, documents, tokenizer, training=True, seed=1, **fields):
    arguments = data_arguments(folder, train_file=documents.write(folder), **fields)
    loaded = load_corpus(arguments, evaluate=False)["train"]
    return prepare_examples(loaded, tokenizer, arguments, seed=seed, training=training)


def data_arguments(folder, **fields):
    fields = {"max_seq_length": MAX_LENGTH, "data_cache_dir": str(folder / "cache")} | fields
    return DataArguments(**fields)


def segments(example):
    """Takes an example apart and checks its special tokens, types and length."""
    ids = example["input_ids"]
    assert len(ids) <= MAX_LENGTH
    assert ids[0] == START
    assert ids[-1] == END
    middle = ids.index(END)
    first, second = ids[1:middle], ids[middle + 1 : -1]
    assert first
    assert second
    assert not set(first + second) & set(range(5))
    assert example["token_type_ids"] == [0] * (middle + 1) + [1] * (len(second) + 1)
    return first, second


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
    assert set(examples.column_names) == {"input_ids", "token_type_ids", LABEL_NAMES[objective][1]}


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


@pytest.mark.parametrize("sentence_lengths", [[1, 2], [5, 5, 5], [100], [9, 1, 9, 1, 9], [3] * 50])
def test_drawn_pairs_end_and_cover_the_document(sentence_lengths):
    budget = 20
    bounds = sentence_bounds(sentence_lengths, budget // 2)
    assert max(np.diff(bounds)) <= budget // 2
    for seed, replace_second in itertools.product(range(50), (False, True)):
        pairs = list(draw_pairs(bounds, budget, 0.3, random.Random(seed), replace_second=replace_second))
        covered = set()
        for pair in pairs:
            assert pair.start < pair.middle
            assert pair.stop - pair.start <= budget
            assert 1 <= pair.room <= budget - (pair.middle - pair.start)
            replaced = replace_second and not pair.positive
            covered |= set(range(pair.start, pair.middle if replaced else pair.stop))
        assert covered == set(range(sum(sentence_lengths)))


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
    examples, _ = prepare(tmp_path, documents, tokenizer, objective="mlm", dupe_factor=2)
    once, _ = prepare(tmp_path, documents, tokenizer, objective="mlm")
    tokens = [token for ids in examples["input_ids"] for token in ids[1:-1]]
    assert sorted(tokens) == sorted(list(documents.tokens()) * 2)
    assert examples["input_ids"][: len(once)] == once["input_ids"][:]
    assert len({tuple(ids) for ids in examples["input_ids"]}) == len(examples)


@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_pairs_depend_on_the_seed_but_not_on_workers_or_batches(tmp_path, tokenizer, objective, monkeypatch):
    documents = random_documents()
    for folder in "abc":
        (tmp_path / folder).mkdir()
    alone, _ = prepare(tmp_path / "a", documents, tokenizer, objective=objective)
    together, _ = prepare(tmp_path / "b", documents, tokenizer, objective=objective, preprocessing_num_workers=2)
    monkeypatch.setattr(pretraining_data, "DOCUMENTS_AT_A_TIME", 7)
    in_small_batches, _ = prepare(tmp_path / "c", documents, tokenizer, objective=objective)
    reseeded, _ = prepare(tmp_path / "c", documents, tokenizer, objective=objective, seed=2)
    assert alone.to_dict() == together.to_dict() == in_small_batches.to_dict()
    assert alone.to_dict() != reseeded.to_dict()


def test_summary_counts_what_is_there(tmp_path, tokenizer):
    documents = NumberedDocuments([[3, 4], [2, 2, 2], [1]])
    path = documents.write(tmp_path)
    with open(path, "a") as file:
        file.write('{"text": null}\n{"title": "no text"}\n')
    arguments = data_arguments(tmp_path, train_file=path, objective="sop")
    loaded = load_corpus(arguments, evaluate=False)["train"]
    examples, summary = prepare_examples(loaded, tokenizer, arguments, seed=1, training=True)
    assert (summary.documents, summary.skipped_rows, summary.short_documents, summary.sentences) == (3, 2, 1, 6)
    assert summary.examples == len(examples)
    assert summary.tokens == sum(map(len, examples["input_ids"]))
    assert summary.cache_directory.startswith(str(tmp_path))
    assert "2 rows without text" in str(summary)
    assert "1 documents of a single token" in str(summary)


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_tokens_are_counted_and_warned_of(tmp_path, tokenizer, caplog, streaming):
    def summary(words):
        caplog.clear()
        path = tmp_path / "corpus.txt"
        path.write_text(f"{words}\n")
        arguments = data_arguments(tmp_path, train_file=str(path), objective="mlm", streaming=streaming)
        documents = load_corpus(arguments, evaluate=False)["train"]
        return prepare_examples(documents, tokenizer, arguments, seed=1, training=True)[1]

    few = summary("t7 t8 strange " + "t9 " * 37)
    assert few.unknown_share == pytest.approx(1 / 40)
    assert "2.50% unknown tokens" in str(few)
    assert not caplog.records
    assert summary("t7 t8 strange").unknown_share == pytest.approx(1 / 3)
    assert "33.3% of the text's tokens are unknown" in caplog.messages[-1]
    with pytest.raises(ValueError, match="training text is unknown to the tokenizer, so there is nothing to predict"):
        summary("strange words only")


@pytest.mark.parametrize("streaming", [False, True])
def test_halves_of_sentences_are_counted_and_warned_of(tmp_path, tokenizer, caplog, streaming):
    documents = NumberedDocuments([[4]] * 6 + [[3, 3]] * 4)
    _, summary = prepare(tmp_path, documents, tokenizer, objective="nsp", streaming=streaming)
    assert summary.single_sentence_share == pytest.approx(0.6)
    assert "60.0% of the documents a single sentence" in str(summary)
    assert "60.0% of the documents are a single sentence" in caplog.messages[-1]
    assert "--objective mlm" in caplog.messages[-1]
    caplog.clear()
    _, summary = prepare(tmp_path, documents, tokenizer, objective="mlm", streaming=streaming)
    assert summary.single_sentence_share is None
    _, summary = prepare(tmp_path, NumberedDocuments([[3, 3]] * 9 + [[4]]), tokenizer, objective="sop")
    assert summary.single_sentence_share == pytest.approx(0.1)
    assert not caplog.records


def test_limits_on_examples(tmp_path, tokenizer):
    documents = random_documents()
    fields = {"objective": "sop", "max_train_samples": 5, "max_eval_samples": 3}
    for training, count in ((True, 5), (False, 3)):
        examples, summary = prepare(tmp_path, documents, tokenizer, training=training, **fields)
        assert len(examples) == summary.examples == count
        assert summary.tokens == sum(map(len, examples["input_ids"]))


def test_ids_are_small_and_those_of_the_tokenizer_whatever_its_padding(tmp_path, tokenizer):
    documents = NumberedDocuments([[3, 4], [5, 6]])
    used = pickle.loads(pickle.dumps(tokenizer))
    used(["t7 t8"], truncation=True, max_length=3, padding="max_length")
    examples, _ = prepare(tmp_path, documents, used, objective="mlm")
    assert str(examples.features["input_ids"].feature.dtype) == "uint16"
    assert examples["input_ids"][:] == [tokenizer(text)["input_ids"] for text in documents.texts()]
    largest_small_vocabulary = range(1 << 16)
    assert pretraining_data._id_type(largest_small_vocabulary) == np.uint16
    assert pretraining_data._id_type(range(len(largest_small_vocabulary) + 1)) == np.int32


def test_unknown_words_and_special_tokens_in_text_become_unknown(tmp_path, tokenizer):
    path = tmp_path / "corpus.txt"
    path.write_text("t7 <unk> t8 [SEP] t9 strange [MASK] [UNK]\n")
    arguments = data_arguments(tmp_path, train_file=str(path), objective="mlm")
    documents = load_corpus(arguments, evaluate=False)["train"]
    examples, _ = prepare_examples(documents, tokenizer, arguments, seed=1, training=True)
    assert examples["input_ids"][0] == [START, 7, UNKNOWN, 8, UNKNOWN, 9, UNKNOWN, UNKNOWN, UNKNOWN, END]


def test_an_enormous_line_is_read_in_stretches(tmp_path, tokenizer, monkeypatch):
    documents = NumberedDocuments([[400], [3, 3]])
    whole, _ = prepare(tmp_path, documents, tokenizer, objective="mlm")
    monkeypatch.setattr(pretraining_data, "LONGEST_SPLIT", 50)
    monkeypatch.setattr(pretraining_data, "CHARACTERS_AT_A_TIME", 60)
    arguments = data_arguments(tmp_path, objective="mlm", data_cache_dir=str(tmp_path / "other"))
    arguments.train_file = [str(tmp_path / "corpus.jsonl")]
    loaded = load_corpus(arguments, evaluate=False)["train"]
    in_stretches, summary = prepare_examples(loaded, tokenizer, arguments, seed=1, training=True)
    assert in_stretches.to_dict() == whole.to_dict()
    assert summary.sentences > 3
    assert "".join(split_sentences("x" * 120)) == "x" * 120


def test_prepared_examples_are_found_again_until_something_changes(tmp_path, tokenizer, monkeypatch):
    documents = random_documents()
    calls = []
    for stage in (pretraining_data.DocumentTokenizer, pretraining_data.ExampleBuilder):
        original = stage.__call__

        def counted(self, *args, original=original):
            calls.append(type(self).__name__)
            return original(self, *args)

        monkeypatch.setattr(stage, "__call__", counted)

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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_cache_is_named(tmp_path, tokenizer, workers):
    """In a process of its own, which may not write files of more than 64 KB."""
    documents = Dataset.from_dict({"text": ["t7 t8 t9 " * 300] * 500})
    arguments = data_arguments(tmp_path, corpus="python-docs", preprocessing_num_workers=workers)
    documents.save_to_disk(tmp_path / "documents")
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            prepare_examples(load_from_disk(tmp_path / "documents"), tokenizer, arguments, seed=1, training=True)
        except UnwritableCacheError as error:
            os._exit(0 if "data_cache_dir" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_prepares(tmp_path, tokenizer, monkeypatch, number):
    def work_forever(self, documents):
        (tmp_path / f"worker-{os.getpid()}").touch()
        time.sleep(600)

    monkeypatch.setattr(pretraining_data.DocumentTokenizer, "__call__", work_forever)
    process = os.fork()
    if process == 0:
        try:
            prepare(tmp_path, random_documents(), tokenizer, preprocessing_num_workers=2)
        finally:
            os._exit(1)
    while len(list(tmp_path.glob("worker-*"))) < 2:
        time.sleep(0.05)
    workers = psutil.Process(process).children(recursive=True)
    assert len(workers) >= 2
    os.kill(process, number)
    os.waitpid(process, 0)
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        worker.kill()
    assert not left


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


def test_a_stream_can_be_limited(tmp_path, tokenizer):
    documents = random_documents()
    stream, _ = prepare(tmp_path, documents, tokenizer, objective="sop", streaming=True, max_train_samples=9)
    assert len(list(stream)) == 9


@pytest.mark.parametrize("streaming", [False, True])
def test_nsp_needs_a_second_document(tmp_path, tokenizer, streaming):
    documents = NumberedDocuments([[3, 4, 5, 6]])
    with pytest.raises(ValueError, match="(?s)'nsp'.*another document.*document_boundary.*--sop"):
        prepare(tmp_path, documents, tokenizer, objective="nsp", streaming=streaming)
    examples, _ = prepare(tmp_path, documents, tokenizer, objective="sop", streaming=streaming)
    assert list(examples)


def test_text_too_short_for_any_pair(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="2 documents with 2 tokens make no example.*give more text"):
        prepare(tmp_path, NumberedDocuments([[1], [1]]), tokenizer, objective="nsp")


@pytest.mark.parametrize("missing", ["mask_token", "cls_token", "sep_token", "pad_token", "unk_token"])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, tokenizer, missing):
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    del names[missing]
    incomplete = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    with pytest.raises(ValueError, match=f"no {missing}.*--train_tokenizer"):
        check_tokenizer(incomplete)
    with pytest.raises(ValueError, match=f"no {missing}"):
        prepare(tmp_path, NumberedDocuments([[2, 2], [2, 2]]), incomplete)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_seq_length": 4}, "max_seq_length=4 is too small.*needs 5"),
        ({"max_seq_length": 2, "objective": "mlm"}, "max_seq_length=2 is too small.*needs 3"),
        ({"objective": "rtd"}, "objective='rtd' is unknown: use one of nsp, sop, mlm"),
        ({"objective": "mlm", "sop": True}, "sop=True contradicts"),
        ({"objective": "nsp", "sop": True}, "sop=True contradicts"),
        ({"objective": "mlm", "language": "de"}, "language='de' has no effect"),
        ({"objective": "mlm", "short_seq_probability": 0.1}, "short_seq_probability=0.1 has no effect"),
        ({"shuffle_buffer_size": 10}, "shuffle_buffer_size=10 has no effect"),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"mlm_probability": 0.0}, "nothing to predict"),
        ({"mask_replace_prob": 0.9, "random_replace_prob": 0.2}, "exceed 1 together"),
        ({"dupe_factor": 0}, "dupe_factor=0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
    ],
)
def test_impossible_recipes_are_refused(fields, problem):
    with pytest.raises(ValueError, match=problem):
        DataArguments(corpus="python-docs", **fields)


def test_smallest_block_sizes_work(tmp_path, tokenizer):
    documents = NumberedDocuments([[3, 4], [2, 2, 2]])
    for objective, smallest in (("nsp", 5), ("sop", 5), ("mlm", 3)):
        examples, _ = prepare(tmp_path, documents, tokenizer, objective=objective, max_seq_length=smallest)
        assert max(map(len, examples["input_ids"])) == smallest


def test_arguments_are_flags():
    (parsed,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--train_file", "a.txt", "b.txt", "--sop", "--max_seq_length", "64"]
    )
    assert (parsed.train_file, parsed.objective, parsed.max_seq_length) == (["a.txt", "b.txt"], "sop", 64)


def collate(tokenizer, examples, seed=3, epoch=0, **fields):
    collator = masking_collator(tokenizer, DataArguments(corpus="python-docs", **fields), seed=seed)
    collator.set_epoch(epoch)
    return collator([dict(example) for example in examples])


def masking_examples(count=64, length=200, seed=0):
    rng = random.Random(seed)
    return [
        {"input_ids": [START, *(rng.randrange(5, NUMBER_OF_TOKENS) for _ in range(rng.randint(1, length))), END]}
        for _ in range(count)
    ]


def test_only_real_words_are_targets_and_the_rest_stays(tokenizer):
    examples = masking_examples()
    for example in examples:
        example["input_ids"][1::7] = [UNKNOWN] * len(example["input_ids"][1::7])
        example["input_ids"][-1] = END
    batch = collate(tokenizer, examples, mlm_probability=0.5)
    for row, example in enumerate(examples):
        ids = torch.tensor(example["input_ids"])
        assert batch["attention_mask"][row].sum() == len(ids)
        labels, inputs = batch["labels"][row, : len(ids)], batch["input_ids"][row, : len(ids)]
        target = labels != -100
        assert torch.equal(labels[target], ids[target])
        assert torch.equal(inputs[~target], ids[~target])
        assert not torch.isin(ids[target], torch.arange(5)).any()
        assert (batch["labels"][row, len(ids) :] == -100).all()
        assert (batch["input_ids"][row, len(ids) :] == PAD).all()


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_rates_are_those_asked_for(tokenizer, whole_words, shares):
    mask_share, random_share = shares
    examples = masking_examples(count=100)
    batch = collate(
        tokenizer,
        examples,
        mlm_probability=0.25,
        mask_replace_prob=mask_share,
        random_replace_prob=random_share,
        whole_word_mask=whole_words,
    )
    target = batch["labels"] != -100
    eligible = batch["attention_mask"].sum() - 2 * len(examples)
    masked = batch["input_ids"][target] == MASK
    kept = batch["input_ids"][target] == batch["labels"][target]

    def expect(observed, share, count):
        deviation = math.sqrt(max(share * (1 - share), 1e-3) / float(count))
        assert abs(float(observed) / float(count) - share) < 4.5 * deviation

    expect(target.sum(), 0.25, eligible)
    expect(masked.sum(), mask_share, target.sum())
    expect(kept.sum(), 1 - mask_share - random_share, target.sum())


def test_a_mask_depends_only_on_seed_epoch_and_the_example(tokenizer):
    examples = masking_examples(count=20)
    together = collate(tokenizer, examples)
    backwards = collate(tokenizer, examples[::-1])
    length = together["input_ids"].shape[1]
    assert torch.equal(together["labels"], backwards["labels"].flip(0))
    assert torch.equal(together["input_ids"], backwards["input_ids"].flip(0))
    for row, example in enumerate(examples):
        alone = collate(tokenizer, [example], pad_to_multiple_of=16)
        assert alone["input_ids"].shape[1] % 16 == 0
        shared = min(alone["input_ids"].shape[1], length)
        assert torch.equal(alone["labels"][0, :shared], together["labels"][row, :shared])
        assert torch.equal(alone["input_ids"][0, :shared], together["input_ids"][row, :shared])
    for change in ({"seed": 4}, {"epoch": 1}):
        assert not torch.equal(collate(tokenizer, examples, **change)["labels"], together["labels"])


def test_a_used_collator_travels_to_a_worker(tokenizer):
    collator = masking_collator(tokenizer, DataArguments(corpus="python-docs", whole_word_mask=True), seed=1)
    examples = masking_examples(count=4)
    before = collator([dict(example) for example in examples])
    after = pickle.loads(pickle.dumps(collator))([dict(example) for example in examples])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_whole_words_are_chosen_in_ragged_batches_on_either_side():
    vocabulary = [
        *SPECIAL_TOKENS,
        *(f"w{number}" for number in range(50)),
        *(f"##{number}" for number in range(50, 100)),
    ]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)})
    starts, parts = range(5, 55), range(55, 105)
    rng = random.Random(1)
    examples, words = [], []
    for _ in range(60):
        words.append(
            [[rng.choice(starts), *rng.choices(parts, k=rng.randint(0, 3))] for _ in range(rng.randint(1, 40))]
        )
        examples.append({"input_ids": [START, *itertools.chain.from_iterable(words[-1]), END]})
    partly_masked = 0
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = collate(tokenizer, examples, whole_word_mask=True, mlm_probability=0.4)
        for row, example_words in enumerate(words):
            real = batch["attention_mask"][row].bool()
            target = (batch["labels"][row][real] != -100).tolist()[1:-1]
            inputs = batch["input_ids"][row][real].tolist()[1:-1]
            position = 0
            for word in example_words:
                chosen = target[position : position + len(word)]
                assert len(set(chosen)) == 1
                seen = inputs[position : position + len(word)]
                partly_masked += chosen[0] and 0 < seen.count(MASK) < len(word)
                position += len(word)
    # 80/10/10 applies to each token of a chosen word.
    assert partly_masked > 0


def test_whole_words_need_a_tokenizer_that_marks_word_parts(tokenizer):
    backend = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(SPECIAL_TOKENS)}, unk_token="[UNK]")
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    check_tokenizer(other)
    with pytest.raises(ValueError, match="whole_word_mask=True needs a WordPiece tokenizer"):
        check_tokenizer(other, whole_word_mask=True)
    with pytest.raises(ValueError, match="whole_word_mask=True needs a WordPiece tokenizer"):
        masking_collator(other, DataArguments(corpus="python-docs", whole_word_mask=True), seed=1)


@pytest.mark.parametrize("objective", ["nsp", "sop", "mlm"])
def test_batches_carry_what_the_model_takes(tmp_path, tokenizer, objective):
    examples, _ = prepare(tmp_path, random_documents(), tokenizer, objective=objective)
    batch = collate(tokenizer, examples.select(range(8)))
    expected = {"input_ids", "attention_mask", "labels"} | ({"token_type_ids"} if objective != "mlm" else set())
    assert set(batch) == expected | set(LABEL_NAMES[objective])
    assert all(tensor.dtype == torch.int64 and len(tensor) == 8 for tensor in batch.values())


SENTENCES = [
    "Dr. Smith moved to Washington, D.C. in 1990.",
    "It cost $3.5 million, i.e. a lot!",
    "Was it J. R. R. Tolkien's idea?",
    "St. Louis won 3 – 2.",
]


def test_sentences_survive_abbreviations_and_spaced_full_stops():
    assert split_sentences(" ".join(SENTENCES) + "\n\n Next line \n") == [*SENTENCES, "Next line"]
    spaced = ["The U.S. Army left Dr. Brown 's house in 1990 .", "It rained , and nobody came ."]
    assert split_sentences(" ".join(spaced)) == spaced


TRAINING_TEXTS = [
    "The river <unk> runs to the sea and the sea is wide .",
    "Running rivers run ; wide seas widen <unk> .",
] * 5


def test_trained_tokenizer_works_like_any_other(tmp_path):
    trained = train_wordpiece(TRAINING_TEXTS, 90, max_length=64)
    check_tokenizer(trained)
    assert len(trained) <= 90
    assert not {"<", "unk", ">", "##nk"} & set(trained.get_vocab())
    assert trained.unk_token_id not in trained("The sea runs wide .")["input_ids"]
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 64
    assert loaded("The sea", "runs") == trained("The sea", "runs")
    assert 1 in loaded("The sea", "runs")["token_type_ids"]
    assert trained.tokenize("THE SEA") != trained.tokenize("the sea")
    lower = train_wordpiece(TRAINING_TEXTS, 90, lowercase=True)
    assert lower.tokenize("THE SEA") == lower.tokenize("the sea")


def words_of_equal_frequency(syllables, count=2000, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)]
    return [" ".join(rng.choices(words, k=200)) for _ in range(10)]


@pytest.mark.parametrize("syllables", ["ka ti mo re su la ni po".split(), list(map(chr, range(0xAC00, 0xB200)))])
def test_the_same_text_gives_the_same_tokenizer(syllables):
    texts = words_of_equal_frequency(syllables)
    vocabularies = [train_wordpiece(texts, 2500).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    letters = set("".join(texts)) - {" "}
    assert sum(len(piece) == 1 for piece in vocabularies[0]) == min(len(letters), pretraining_data.LARGEST_ALPHABET)


def test_a_trained_tokenizer_covers_text_without_spaces(tmp_path):
    rng = random.Random(0)
    lines = ["".join(rng.choices("ACGT", k=600)) for _ in range(20)]
    train_wordpiece(lines, 60).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(lines[0])["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == lines[0]


def test_tokenizer_training_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="empty after the first pass"):
        train_wordpiece(iter(TRAINING_TEXTS), 90)
    with pytest.raises(ValueError, match="vocab_size=8 is too small"):
        train_wordpiece(TRAINING_TEXTS, 8)
    with pytest.raises(ValueError, match="no text to train a tokenizer"):
        train_wordpiece([], 100)


def test_documents_need_no_file(tokenizer):
    documents = Dataset.from_dict({"text": NumberedDocuments([[3, 4, 5], [5, 6]]).texts()})
    arguments = DataArguments(corpus="python-docs", objective="nsp", max_seq_length=MAX_LENGTH)
    examples, _ = prepare_examples(documents, tokenizer, arguments, seed=1, training=True)
    assert all(segments(example) for example in examples)
