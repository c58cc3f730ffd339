"""Each rule is exact between the two halves of a pair, and leaves the value as it is."""

import pytest
import torch
from torch import nn

from lambdabert.interpretation import secants


def pair(*shape, distance=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    second = first + distance * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return torch.cat([first, second]).requires_grad_()


def check(rule, plain, at):
    value = rule(at)
    torch.testing.assert_close(value, plain(at), rtol=0, atol=1e-14)
    weights = torch.randn(value[:2].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (slopes,) = torch.autograd.grad((weights * value[:2]).sum(), at)
    change = (weights * (value[:2] - value[2:])).sum()
    torch.testing.assert_close((slopes[:2] * (at[:2] - at[2:])).sum(), change, rtol=1e-10, atol=1e-13)
    assert not slopes[2:].any()


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-5, 0.0])
class TestExactness:
    @pytest.mark.parametrize("function", [nn.functional.gelu, torch.tanh, torch.relu, torch.exp])
    def test_elementwise(self, function, distance):
        check(lambda at: secants.elementwise(function, at), function, pair(5, 7, distance=distance))

    @pytest.mark.parametrize(
        "module", [nn.LayerNorm(7), nn.RMSNorm(7), nn.RMSNorm(7, eps=1e-5), nn.Identity()], ids=str
    )
    def test_norm(self, module, distance):
        module.double()
        if not isinstance(module, nn.Identity):
            nn.init.normal_(module.weight)
        check(lambda at: secants.norm(module, at), module, pair(5, 7, distance=distance))

    def test_softmax(self, distance):
        check(secants.softmax, lambda at: at.softmax(1), pair(5, 7, distance=distance))

    def test_product(self, distance):
        def rule(at):
            return secants.product(at[..., :3], at[..., 3:], "b m k, b m v -> b k v")

        def plain(at):
            return at[..., :3].transpose(1, 2) @ at[..., 3:]

        check(rule, plain, pair(5, 7, distance=distance))


def test_softmax_where_nothing_is_a_token():
    at = pair(5, 3)
    padded = at.masked_fill(torch.ones(4, 5, 1, dtype=torch.bool), torch.finfo(at.dtype).min)
    value = secants.softmax(padded)
    (slopes,) = torch.autograd.grad(value.sum(), at)
    assert value.isfinite().all() and not slopes.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lines_of_a_sharp_softmax_are_no_steeper_than_softmax(dtype):
    """Of logits that agree with one token in the text, and with another in the reference."""
    at = (40 * pair(20, 3)).to(dtype).detach().requires_grad_()
    change = at[:2] - at[2:]
    for token in range(20):
        value = secants.softmax(at)
        (slopes,) = torch.autograd.grad(value[:2, token].sum(), at)
        assert slopes.abs().max() <= 1  # w is at most max(p, p')
        expected = value[:2, token] - value[2:, token]
        torch.testing.assert_close((slopes[:2] * change).sum(1), expected, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("module", [nn.LayerNorm(16), nn.RMSNorm(16, eps=1e-5)], ids=str)
def test_lines_of_a_norm_are_no_steeper_than_its_mean_scale(module):
    """Where one of the two is a thousand times as large as the other."""
    at = (pair(5, 16) * torch.tensor([1, 1, 1e-3, 1e-3]).view(4, 1, 1)).detach().requires_grad_()
    value, mean_scale = secants.norm(module.double(), at), at.detach()[:2].std(-1).min() / 2
    for channel in range(16):
        (slopes,) = torch.autograd.grad(value[:2, :, channel].sum(), at, retain_graph=True)
        assert slopes.abs().max() * mean_scale < 4  # 1 by the change itself, |c/s| |c/s| / 16 by that of the scale
