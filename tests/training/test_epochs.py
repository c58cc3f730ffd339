"""Each pass over the text has masks of its own, and a stream another order."""

import itertools

import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState

import run_language_modeling
from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.training.epochs import EndlessStream, EpochMasks


class Recorder:
    """A collator that remembers its epochs."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_each_epoch_has_masks_of_its_own(text):
    tokenizer = run_language_modeling.load_tokenizer(text / "tokenizer")
    collator = masking_collator(tokenizer, DataArguments(corpus="python-docs"), seed=0, training=True)
    callback, state = EpochMasks(collator), TrainerState()
    row = [tokenizer.cls_token_id, *range(50, 80), tokenizer.sep_token_id]
    found = []
    for epoch in (0, 1.0, 2.0, 0):  # the Trainer counts in fractions
        state.epoch = epoch
        callback.on_epoch_begin(None, state, TrainerControl())
        found.append(collator([{"input_ids": row}] * 4)["labels"])
    for first, second in itertools.combinations(found[:3], 2):
        assert not torch.equal(first, second)
    assert torch.equal(found[3], found[0])


def test_each_pass_over_a_stream_has_an_order_and_masks_of_its_own():
    rows = Dataset.from_dict({"number": range(20)}).to_iterable_dataset().shuffle(seed=0, buffer_size=20)
    recorder = Recorder()
    stream = iter(EndlessStream(rows, recorder))
    passes = [[next(stream)["number"] for _ in range(20)] for _ in range(3)]
    assert all(sorted(numbers) == list(range(20)) for numbers in passes)
    assert all(first != second for first, second in itertools.combinations(passes, 2))
    assert recorder.epochs == [0, 1, 2]
