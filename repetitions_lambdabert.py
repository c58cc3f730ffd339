"""Which tokens of a row are the same, for the lambda of a token's other occurrences."""

from copy import copy
from typing import Any

import torch

try:  # the flat form serves this repository, the relative one a saved model's folder
    from .lambda_kernels import is_exporting
except ImportError:
    if __package__:
        raise
    from lambda_kernels import is_exporting

MATRIX_LENGTH = 2048  # places of a row up to which a GPU multiplies with a matrix sooner than it scatters
MATRIX_NUMBERS = 2**28  # in the matrices of a batch at most, 0.5 GB in bfloat16


def prefers_matrix(token_ids: torch.Tensor) -> bool:
    """Whether means over the occurrences of tokens [B, N] are products with matrices [N, N]: in short rows on a GPU."""
    if token_ids.device.type != "cuda" or is_exporting() or torch.jit.is_tracing():
        return False  # before a size is looked at, which would bound that of an exported program
    batch, length = token_ids.shape
    return length <= MATRIX_LENGTH and batch * length**2 <= MATRIX_NUMBERS


class Repetitions:
    """The places of each row that hold the same token, in O(N log N) time and O(N) memory.

    In short rows on a GPU, the mean over other occurrences is a product with a matrix instead, in O(N^2).

    Args:
        token_ids: [B, N]; a negative one is like no other token.
        token_mask: bool [B, N], True = token; None = all are tokens.

    Attributes:
        slots: [B N], a number below B N for each place; places share one if they hold the same token in the same row.
        occurs: bool [B, N], whether a place is an occurrence of its token.
        others: [B N, 1], how many other occurrences each place's token has, in float32.
        same: bool [B, N, N], True at the other occurrences of each place's token; None where no matrix is used.
        matrix: `same` over `others`, [B, N, N], made in the precision of the first layer that asks.
    """

    def __init__(self, token_ids: torch.Tensor, token_mask: torch.Tensor | None):
        batch, length = token_ids.shape
        in_order, places = token_ids.sort(dim=1)
        previous = (torch.arange(length, device=token_ids.device) - 1).clamp(min=0)
        ranks = (in_order != in_order[:, previous]).long().cumsum(dim=1)
        rows = torch.arange(batch, device=token_ids.device)[:, None]
        self.slots = (rows * length + torch.zeros_like(ranks).scatter(1, places, ranks)).flatten()
        self.occurs = token_ids >= 0 if token_mask is None else token_mask & (token_ids >= 0)
        self.same: torch.Tensor | None = None
        self.matrix: torch.Tensor | None = None
        if prefers_matrix(token_ids):
            slots = self.slots.view(batch, length)
            self.same = (slots[:, :, None] == slots[:, None]) & self.occurs[:, None]
            self.same.diagonal(dim1=1, dim2=2).fill_(False)
            self.others = self.same.sum(dim=2).flatten()[:, None].float()
        else:
            ones = self.occurs.flatten()[:, None].float()
            self.others = self._sum_of_slot(ones) - ones

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Repetitions":
        """The same on another device."""
        moved = copy(self)
        for name, value in vars(self).items():
            if value is not None:
                setattr(moved, name, value.to(device, **kwargs))
        return moved

    def mean_of_others(self, given: torch.Tensor) -> torch.Tensor:
        """The mean of [B, N, ...] over the other occurrences of each place's token, in float32 at least while it is
        summed; 0 where there are none."""
        sum_dtype = torch.promote_types(given.dtype, torch.float32)
        others = self.others.to(sum_dtype)
        if self.same is not None:
            if self.matrix is None or self.matrix.dtype != given.dtype:
                self.matrix = (self.same / others.view(*self.occurs.shape, 1).clamp(min=1)).to(given.dtype)
            return (self.matrix @ given.flatten(2)).view(given.shape)
        rows = given.flatten(2).flatten(0, 1).to(sum_dtype) * self.occurs.flatten()[:, None]
        mean = (self._sum_of_slot(rows) - rows) * ((others > 0) / others.clamp(min=1))
        return mean.view(given.shape).to(given.dtype)

    def _sum_of_slot(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of rows [B N, C] over each slot, at every place of the slot."""
        sums = torch.zeros_like(rows)
        if torch.jit.is_tracing():  # ONNX files of traces would add one row to each slot by index_add
            slots = self.slots[:, None].expand_as(rows)
            return sums.scatter_add(0, slots, rows).gather(0, slots)
        return sums.index_add(0, self.slots, rows).index_select(0, self.slots)
