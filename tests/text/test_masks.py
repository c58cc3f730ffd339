"""What masks promise."""

import itertools
import math
import pickle
import random

import pytest
import torch
from transformers import BertTokenizer

from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.objectives import OBJECTIVES
from text_support import END, MASK, NUMBER_OF_TOKENS, PAD, SPECIAL_TOKENS, START, UNKNOWN, prepare, random_documents


def collate(tokenizer, examples, seed=3, epoch=0, **fields):
    collator = masking_collator(tokenizer, DataArguments(corpus="python-docs", **fields), seed=seed, training=True)
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
def test_evaluation_has_a_share_of_its_own(tokenizer, whole_words):
    examples, counts = masking_examples(count=200), []
    data_args = DataArguments(corpus="python-docs", whole_word_mask=whole_words, mlm_probability=0.4)
    for training in (True, False):
        collator = masking_collator(tokenizer, data_args, seed=3, training=training)
        counts.append(int((collator([dict(example) for example in examples])["labels"] != -100).sum()))
    assert 0.13 / 0.4 < counts[1] / counts[0] < 0.17 / 0.4


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
    collator = masking_collator(
        tokenizer, DataArguments(corpus="python-docs", whole_word_mask=True), seed=1, training=True
    )
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


@pytest.mark.parametrize("objective", ["nsp", "sop", "mlm"])
def test_batches_carry_what_the_model_takes(tmp_path, tokenizer, objective):
    examples, _ = prepare(tmp_path, random_documents(), tokenizer, objective=objective)
    batch = collate(tokenizer, examples.select(range(8)))
    expected = {"input_ids", "attention_mask", "labels"} | ({"token_type_ids"} if objective != "mlm" else set())
    assert set(batch) == expected | set(OBJECTIVES[objective].label_names)
    assert all(tensor.dtype == torch.int64 and len(tensor) == 8 for tensor in batch.values())
