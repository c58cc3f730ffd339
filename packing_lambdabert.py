"""How a batch is laid out while it is computed: its real tokens packed in one row, or in rows with padding, as given.

Embeddings, projections and feed-forward layers treat every token on its own, so they can take the T real tokens of a
batch as one row [1, T, ...], and padding is not computed. A lambda layer needs the rows: it takes them in groups of
similar length, in which little padding is left. Offsets between places are kept, across holes too.

    B rows    N places in a row    T real tokens
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

try:  # the flat form serves this repository, the relative one a saved model's folder
    from .repetitions_lambdabert import Repetitions
except ImportError:
    if __package__:
        raise
    from repetitions_lambdabert import Repetitions

GROUP_SPREAD = 0.75  # shortest row of a group over its longest; less makes fewer groups and more padding in them
ONE_GROUP_ON_GPU = 2**17  # places of a batch whose padding costs a GPU less than starting the kernels of more groups


def _check_bool(token_mask: torch.Tensor | None) -> None:
    if token_mask is not None and token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask is of {token_mask.dtype}: give attention_mask.bool().")


class Padded:
    """The layout of a batch that is computed as it is given, padding included.

    Args:
        token_mask: bool [B, N], True = token; None = all are tokens.
        token_ids: [B, N], as `Repetitions` takes them; None where no layer asks which tokens are the same.

    Attributes:
        token_mask: the mask of the batch.
        attention_mask: the mask of what is computed.
        groups: the groups of rows that a lambda layer takes; only this one.
        mask: the mask of this group.
        repetitions: its places that hold the same token; None without `token_ids`.
        computed_shape: rows and places of what is computed; None without a mask.

    Raises:
        ValueError: a mask that is not bool.
    """

    def __init__(self, token_mask: torch.Tensor | None, token_ids: torch.Tensor | None = None):
        _check_bool(token_mask)
        self.token_mask = self.attention_mask = self.mask = token_mask
        self.computed_shape: Sequence[int] | None = None if token_mask is None else token_mask.shape
        self.repetitions = None if token_ids is None else Repetitions(token_ids, token_mask)

    @property
    def groups(self) -> tuple["Padded", ...]:  # as an attribute, a cycle that holds its tensors until it is collected
        return (self,)

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Padded":
        """The same layout on another device. `accelerate` calls it where a model is spread over several."""
        moved = copy(self)
        if self.token_mask is not None:
            moved.token_mask = moved.attention_mask = moved.mask = self.token_mask.to(device, **kwargs)
        moved.repetitions = None if self.repetitions is None else self.repetitions.to(device, **kwargs)
        return moved

    def pack(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """[B, N, ...] as it is computed."""
        return given

    def position_ids(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """Positions [B, N] or [1, N] as the embeddings take them; None = counted from the row's first place."""
        return given

    def unpack(self, computed: torch.Tensor) -> torch.Tensor:
        """[B, N, C] with zeros at padding."""
        if self.token_mask is None:
            return computed
        padding = ~self.token_mask[..., None].to(computed.device)  # of the last layer, which may be on another
        return computed.masked_fill(padding, 0)

    def pad(self, computed: torch.Tensor) -> torch.Tensor:
        """[B, N, C] as a group of rows."""
        return computed

    def join(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, N, C] of the only group, as it is computed."""
        return outputs[0]

    def join_rows(self, contents: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, ...] of the only group's rows."""
        return contents[0]


@dataclass
class RowGroup:
    """Rows of similar length.

    Attributes:
        tokens: where its t tokens stand in the packed row.
        mask: bool [b, n], True = token, of its b rows cut to the n places of the longest; None where all are tokens.
        places: [t], the place of each token among the b n; None where all are tokens.
        shape: b, n.
        repetitions: the places of its rows that hold the same token; None where no layer asks.
    """

    tokens: slice
    mask: torch.Tensor | None
    places: torch.Tensor | None
    shape: tuple[int, int]
    repetitions: Repetitions | None = None

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T, C] of all tokens to [b, n, C] of the group's, with zeros at padding."""
        tokens = packed[0, self.tokens]
        if self.places is None:
            return tokens.unflatten(0, self.shape)
        padded = tokens.new_zeros(self.shape[0] * self.shape[1], tokens.shape[-1])
        return padded.index_copy(0, self.places, tokens).unflatten(0, self.shape)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[b, n, C] to the group's tokens in their packed order, [t, C]."""
        tokens = padded.flatten(0, 1)
        return tokens if self.places is None else tokens[self.places]


class Packing:
    """The layout of a batch whose padding is left out.

    Args:
        token_mask: bool [B, N], True = token; at least one is.
        token_ids: [B, N], as `Repetitions` takes them; None where no layer asks which tokens are the same.

    Attributes:
        token_mask: the mask of the batch.
        attention_mask: the mask of what is computed: None, because all of it is tokens.
        shape: B, N.
        groups: the rows that hold a token, by length.
        rows: the groups' rows, in their order.
        places: [T], the place of each packed token among the B N of the batch.
        computed_shape: 1, T.

    Raises:
        ValueError: a mask that is not bool.
    """

    attention_mask: torch.Tensor | None = None

    def __init__(self, token_mask: torch.Tensor, token_ids: torch.Tensor | None = None):
        _check_bool(token_mask)
        self.token_mask = token_mask
        batch, length = token_mask.shape
        self.shape = batch, length
        firsts = token_mask.to(torch.uint8).argmax(dim=1)
        ends = length - token_mask.flip(1).to(torch.uint8).argmax(dim=1)
        extents = torch.where(token_mask.any(dim=1), ends - firsts, 0).tolist()
        occupied = sorted((row for row in range(batch) if extents[row]), key=lambda row: -extents[row])

        is_one_group = token_mask.device.type == "cuda" and token_mask.numel() <= ONE_GROUP_ON_GPU
        spread = 0 if is_one_group else GROUP_SPREAD
        self.groups: list[RowGroup] = []
        rows_of_groups, places, start = [], [], 0
        while occupied:
            longest = extents[occupied[0]]
            count = sum(extents[row] >= spread * longest for row in occupied)
            rows = torch.tensor(occupied[:count], device=token_mask.device)
            occupied = occupied[count:]
            columns = firsts[rows, None] + torch.arange(longest, device=token_mask.device)
            within = rows[:, None], columns.clamp(max=length - 1)
            mask = (columns < length) & token_mask[within]
            repetitions = None if token_ids is None else Repetitions(token_ids[within], mask)
            of_tokens = mask.flatten().nonzero()[:, 0]
            rows_of_groups.append(rows)
            places.append((rows[:, None] * length + columns).flatten()[of_tokens])
            tokens = slice(start, start + len(of_tokens))
            shape = count, longest
            if len(of_tokens) == mask.numel():
                self.groups.append(RowGroup(tokens, None, None, shape, repetitions))
            else:
                self.groups.append(RowGroup(tokens, mask, of_tokens, shape, repetitions))
            start = tokens.stop
        self.rows = torch.cat(rows_of_groups)
        self.places = torch.cat(places)
        self.computed_shape: Sequence[int] | None = (1, len(self.places))

    def pack(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """[B, N, ...] to the real tokens of all rows, [1, T, ...]."""
        return None if given is None else given.flatten(0, 1)[self.places][None]

    def position_ids(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """Positions [B, N] or [1, N] to those of the tokens, [1, T]; None = counted from the row's first place."""
        positions = torch.arange(self.shape[1], device=self.places.device)[None] if given is None else given
        return self.pack(positions.expand(self.shape))

    def unpack(self, computed: torch.Tensor) -> torch.Tensor:
        """[1, T, C] to [B, N, C], with zeros at padding."""
        batch, length = self.shape
        padded = computed.new_zeros(batch * length, computed.shape[-1])
        return padded.index_copy(0, self.places, computed[0]).unflatten(0, self.shape)

    def join(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """[b, n, C] of each group to [1, T, C]."""
        return torch.cat([group.unpad(output) for group, output in zip(self.groups, outputs, strict=True)])[None]

    def join_rows(self, contents: Sequence[torch.Tensor]) -> torch.Tensor:
        """[b, ...] of each group's rows to [B, ...], with zeros for rows without a token."""
        joined = torch.cat([*contents])
        return joined.new_zeros(self.shape[0], *joined.shape[1:]).index_copy(0, self.rows, joined)


def lay_out(token_mask: torch.Tensor | None, may_pack: bool, token_ids: torch.Tensor | None = None) -> Padded | Packing:
    """The layout of a batch: without its padding, if there is any and it may be left out.

    Args:
        token_mask: bool [B, N], True = token; None = all are tokens.
        may_pack: whether padding may be left out, and the mask be looked at.
        token_ids: [B, N], as `Repetitions` takes them; None where no layer asks which tokens are the same.
    """
    if token_mask is not None and may_pack:
        if token_mask.all():
            return Padded(None, token_ids)
        if token_mask.any():
            return Packing(token_mask, token_ids)
    return Padded(token_mask, token_ids)
