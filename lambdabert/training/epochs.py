"""Each pass over the text has masks of its own, and a stream another order."""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lambdabert.text.masks import MaskingCollator


class EpochMasks(TrainerCallback):
    """Gives each epoch its own training masks."""

    def __init__(self, collator: MaskingCollator):
        # in shared memory, so that loader processes that outlive an epoch see the next
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        collator.set_epoch(self.epoch)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch.fill_(int(state.epoch or 0))


class EndlessStream(torch.utils.data.IterableDataset):
    """Repeats a stream without end, each time in another order and with other masks.

    The Trainer counts the batches of a stream from its start, so a run can be resumed after several passes only if
    they are one stream.

    Args:
        examples: the stream.
        collator: masks the examples.
    """

    def __init__(self, examples: datasets.IterableDataset, collator: MaskingCollator):
        self.examples = examples
        self.collator = collator

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            self.examples.set_epoch(number)
            self.collator.set_epoch(number)
            empty = True
            for example in self.examples:
                empty = False
                yield example
            if empty:
                return
