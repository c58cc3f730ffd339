"""Packing: which tokens it keeps, where it puts them, and how it groups rows."""

import gc
import weakref

import pytest
import torch

from packing_lambdabert import GROUP_SPREAD, Packing, Padded, lay_out

MASKS = {
    "tails": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]],
    "left": [[0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 1]],
    "empty rows": [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
    "one token": [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
    "whole": [[1, 1, 1, 1, 1]] * 3,
}


@pytest.fixture(params=MASKS)
def mask(request):
    return torch.tensor(MASKS[request.param], dtype=torch.bool)


@pytest.mark.parametrize("layout", [Packing, Padded])
def test_a_mask_of_numbers_is_refused(layout):
    with pytest.raises(ValueError, match=r"token_mask is of torch.int64: give attention_mask.bool\(\)"):
        layout(torch.tensor([[1, 1, 0]]))


def test_unpack_undoes_pack(mask):
    padded = torch.randn(3, 5, 2)
    packing = Packing(mask)
    packed = packing.pack(padded)
    assert packed.shape == (1, mask.sum(), 2)
    torch.testing.assert_close(packing.unpack(packed), padded * mask[..., None], rtol=0, atol=0)


def test_pack_takes_what_has_no_channels(mask):
    tokens = torch.arange(15).view(3, 5)
    packed = Packing(mask).pack(tokens)
    assert sorted(packed[0].tolist()) == tokens[mask].tolist()


def test_groups_hold_every_token_once_and_keep_offsets(mask):
    tokens = torch.arange(1, 16).view(3, 5, 1)
    packing = Packing(mask)
    packed = packing.pack(tokens)
    torch.testing.assert_close(torch.cat([group.unpad(group.pad(packed)) for group in packing.groups]), packed[0])
    rows = [row for group in packing.groups for row in group.pad(packed)[..., 0].tolist()]
    assert len(rows) == len(packing.rows) == mask.any(dim=1).sum()
    for row, place in zip(rows, packing.rows.tolist()):
        expected = (tokens[place, :, 0] * mask[place]).tolist()
        first = min(index for index, token in enumerate(expected) if token)
        kept = expected[first : first + len(row)]
        assert row == kept + [0] * (len(row) - len(kept))


def test_rows_of_a_group_are_of_similar_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (64,), generator=generator)
    packing = Packing(torch.arange(200) < lengths[:, None])
    computed = sum(rows * places for rows, places in (group.shape for group in packing.groups))
    assert computed <= lengths.sum() / GROUP_SPREAD
    assert len(packing.groups) < 20


def test_join_rows(mask):
    packing = Packing(mask)
    values = torch.arange(1.0, len(packing.rows) + 1)
    joined = packing.join_rows(values.split([group.shape[0] for group in packing.groups]))
    assert (joined[~mask.any(dim=1)] == 0).all()
    torch.testing.assert_close(joined[packing.rows], values)


@pytest.mark.parametrize("masked", [True, False])
def test_padded_does_nothing_but_clear_padding(mask, masked):
    layout = Padded(mask if masked else None)
    padded = torch.randn(3, 5, 2)
    assert layout.pack(padded) is padded and layout.position_ids(None) is None
    (group,) = layout.groups
    torch.testing.assert_close(layout.join([group.pad(padded)]), padded, rtol=0, atol=0)
    torch.testing.assert_close(layout.unpack(padded), padded * mask[..., None] if masked else padded, rtol=0, atol=0)


def test_both_layouts_lay_out_the_same(mask):
    """What is packed, grouped, joined and unpacked again is what stays padded, but for padding."""
    padded = torch.randn(3, 5, 2)
    results = []
    for layout in (Padded(mask), Packing(mask)):
        computed = layout.pack(padded)
        groups = [group.pad(computed) for group in layout.groups]
        sums = [
            (rows if group.mask is None else rows * group.mask[..., None]).sum(1)
            for group, rows in zip(layout.groups, groups)
        ]
        results.append((layout.unpack(layout.join(groups)), layout.join_rows(sums)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("may_pack", [True, False])
def test_lay_out(mask, may_pack):
    layout = lay_out(mask, may_pack)
    assert isinstance(layout, Packing) == (may_pack and not mask.all())
    assert (layout.token_mask is None) == (may_pack and bool(mask.all()))
    assert isinstance(lay_out(torch.zeros_like(mask), may_pack), Padded)
    assert isinstance(lay_out(None, may_pack), Padded)


def test_a_layout_is_freed_with_its_last_reference():
    """Not when Python next looks for cycles: on a GPU it holds matrices [B, N, N]."""
    layout = Padded(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.long))
    repetitions = weakref.ref(layout.repetitions)
    gc.disable()
    try:
        del layout
        assert repetitions() is None
    finally:
        gc.enable()
