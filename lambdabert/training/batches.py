"""Batches of examples of similar length, so that little of them is padding."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 50


class SimilarLengths(Sampler):
    """A random order in which the examples of a batch are of similar length, another one in each epoch.

    Args:
        lengths: tokens of each example, [examples].
        batch_size: examples in a batch.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, lengths: torch.Tensor, batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        window = self.batch_size * BATCHES_SORTED_TOGETHER
        order = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in order.split(window)])
        batches = order.split(self.batch_size)
        whole = batches[: len(self) // self.batch_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator)]
        return iter(torch.cat([*shuffled, *batches[len(whole) :]]).tolist())
