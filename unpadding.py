"""Padding that is not computed: real tokens in one row, and where they stood.

Embeddings, projections and feed-forward layers treat every token alone, so they may see the T real tokens of a batch
as one row [1, T, ...]. A lambda layer needs the layout: it takes the rows in groups of similar length, in which little
padding is left. Offsets between places are kept, holes included.

    B rows    N places in a row    T real tokens
"""

from dataclasses import dataclass

import torch

GROUP_SPREAD = 0.75  # shortest row of a group over its longest; less makes fewer groups and more padding in them


@dataclass
class RowGroup:
    """Rows of similar length.

    Attributes:
        tokens: where its t tokens stand in the packed row.
        mask: bool [b, n], True = token, of its b rows cut to the n places of the longest; None where all are tokens.
        shape: b, n.
    """

    tokens: slice
    mask: torch.Tensor | None
    shape: tuple[int, int]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T, C] of all tokens to [b, n, C] of the group's, with zeros at padding."""
        tokens = packed[0, self.tokens]
        if self.mask is None:
            return tokens.unflatten(0, self.shape)
        return tokens.new_zeros(*self.shape, tokens.shape[-1]).masked_scatter(self.mask[..., None], tokens)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[b, n, C] to the group's tokens in their packed order, [t, C]."""
        return padded.flatten(0, 1) if self.mask is None else padded[self.mask]


class Packing:
    """The layout of a batch whose padding is left out.

    Args:
        token_mask: bool [B, N], True = token; at least one is.

    Attributes:
        shape: B, N.
        groups: the rows that hold a token, by length.
        rows: the groups' rows, in their order.
        places: [T], the place of each packed token among the B N of the batch.
    """

    def __init__(self, token_mask: torch.Tensor):
        self.shape = batch, length = tuple(token_mask.shape)
        firsts = token_mask.to(torch.uint8).argmax(dim=1)
        ends = length - token_mask.flip(1).to(torch.uint8).argmax(dim=1)
        extents = torch.where(token_mask.any(dim=1), ends - firsts, 0).tolist()
        occupied = sorted((row for row in range(batch) if extents[row]), key=lambda row: -extents[row])

        self.groups, rows_of_groups, places, start = [], [], [], 0
        while occupied:
            longest = extents[occupied[0]]
            count = sum(extents[row] >= GROUP_SPREAD * longest for row in occupied)
            rows = torch.tensor(occupied[:count], device=token_mask.device)
            occupied = occupied[count:]
            columns = firsts[rows, None] + torch.arange(longest, device=token_mask.device)
            mask = (columns < length) & token_mask[rows[:, None], columns.clamp(max=length - 1)]
            rows_of_groups.append(rows)
            places.append((rows[:, None] * length + columns)[mask])
            tokens = slice(start, start + len(places[-1]))
            has_gaps = len(places[-1]) < mask.numel()
            self.groups.append(RowGroup(tokens, mask if has_gaps else None, (count, longest)))
            start = tokens.stop
        self.rows = torch.cat(rows_of_groups)
        self.places = torch.cat(places)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, N, ...] to the real tokens of all rows, [1, T, ...]."""
        return padded.flatten(0, 1)[self.places][None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T, C] to [B, N, C], with zeros at padding."""
        batch, length = self.shape
        padded = packed.new_zeros(batch * length, packed.shape[-1])
        return padded.index_copy(0, self.places, packed[0]).unflatten(0, self.shape)

    def unpack_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """One [...] for each row of the groups, in their order, to [B, ...], with zeros for rows without a token."""
        return packed.new_zeros(self.shape[0], *packed.shape[1:]).index_copy(0, self.rows, packed)
