"""The layer as a map: how each value enters each output, and how each token enters the content lambda.

The lambda layer is linear in its values. Without forming lambdas, y[n,h] = sum_m sum_u A[h,n,m,u] V[m,:,u] with the
signed map A[h,n,m,u] = sum_k Q[n,h,k] (g[k] K[m,k,u] + E[m - n,k,u]). g is the content gain, 1 where there is none.
A repetition lambda adds to the bracket the mean of T[m - m',k,u] over the other places m' that hold n's token.
"""

from dataclasses import dataclass

import torch
from einops import einsum

from .models import check_layer, toeplitz
from .traces import LambdaTrace, LayerTrace

PARTS = ("content", "position", "repetition", "all")


def attention(trace: LambdaTrace, layer: int, part: str = "all") -> torch.Tensor:
    """The signed map A of a layer, [B, H, N, M, U]: its product with the values, summed over M and U, is the output.

    Args:
        trace: of `trace_lambdas`.
        layer: 0 for the first.
        part: "content" for the keys' part, "position" for that of E, "repetition" for that of T, "all" for the sum.

    Returns:
        [B, H, N, M, U], zero where m is padding.

    Raises:
        ValueError: an unknown layer or part; the part of T in a model without; a replaced content lambda.
    """
    one = _layer_of_own_keys(trace, layer)
    if part not in PARTS:
        raise ValueError(f"part={part!r} is unknown; give one of {', '.join(PARTS)}.")
    if part == "repetition" and one.repetition_embeddings is None:
        raise ValueError(
            'part="repetition": the model has no repetition lambda (repetition_context_size=None); give another part.'
        )
    batch, length = one.queries.shape[:2]
    parts = []
    if part in ("content", "all"):
        parts.append(einsum(one.queries, one.content_keys, "b n h k, b m k u -> b h n m u"))
    if part in ("position", "all"):
        embeddings = toeplitz(one.relative_embeddings, length)
        parts.append(einsum(one.queries, embeddings, "b n h k, n m k u -> b h n m u"))
    if one.repetition_embeddings is not None and part in ("repetition", "all"):
        around = toeplitz(one.repetition_embeddings, length).expand(batch, -1, -1, -1, -1)
        around = one.repetitions.mean_of_others(around)
        parts.append(einsum(one.queries, around, "b n h k, b n m k u -> b h n m u"))
    return sum(parts[1:], parts[0]) * trace.token_mask[:, None, None, :, None]


@dataclass
class TokenShares:
    """How the tokens of a text make its content lambda.

    Attributes:
        contributions: [B, M, K, V]; their sum over M is the content lambda.
        shares: [B, M, K], the part of each contribution along the content lambda of its key channel, in units of its
            length; their sum over M is 1 (0 where the content lambda is 0). May be negative.
        left_out: [B, M, K, V], the content lambda with the place left out of the layer's keys. The layer's input is
            unchanged: what earlier layers mixed of the token into other places stays.
    """

    contributions: torch.Tensor
    shares: torch.Tensor
    left_out: torch.Tensor


def token_shares(trace: LambdaTrace, layer: int) -> TokenShares:
    """The content lambda of a layer by token and key channel, with every leave-one-out in closed form.

    A token's keys leave the softmax with it, and the others grow by 1 / (1 - K[m]):
    lc without m = g sum_u (sum of K V over the others) / (sum of K over the others).

    Args:
        trace: of `trace_lambdas`.
        layer: 0 for the first.

    Raises:
        ValueError: an unknown layer; a replaced content lambda.
    """
    one = _layer_of_own_keys(trace, layer)
    is_token = trace.token_mask[:, :, None, None]  # a row without a token has uniform keys
    products = einsum(one.content_keys * is_token, one.values, "b m k u, b m v u -> b m k v u")
    contributions = products.sum(-1)
    content = contributions.sum(1, keepdim=True)
    square = content.square().sum(-1)
    along = (contributions * content).sum(-1)
    shares = torch.where(square > 0, along / square, 0)
    others = _sum_of_others(one.keys * is_token)[:, :, :, None]
    left_out = torch.where(others > 0, _sum_of_others(products) / others, 0).sum(-1)
    return TokenShares(contributions, shares, left_out)


def _layer_of_own_keys(trace: LambdaTrace, layer: int) -> LayerTrace:
    check_layer(layer, len(trace.layers))
    if trace.layers[layer].is_replaced:
        raise ValueError(
            f"layer={layer}: its content lambda was replaced while it was traced, and is not of its keys; trace the "
            "text outside of replace_lambdas."
        )
    return trace.layers[layer]


def _sum_of_others(terms: torch.Tensor) -> torch.Tensor:
    """For each m of [B, M, ...] the sum over all other places, without the loss of digits of a difference."""
    before = terms.cumsum(1).roll(1, dims=1)
    after = terms.flip(1).cumsum(1).flip(1).roll(-1, dims=1)
    before[:, 0] = 0
    after[:, -1] = 0
    return before + after
