"""Rules that write the change of a model's output between two inputs as a linear function of what changed.

Every operation of the model gets a straight line through its two values, in place of the tangent that a gradient takes:

    elementwise f       f(a) - f(b) = (f(a) - f(b)) / (a - b) * (a - b)
    product a b         a b - a' b' = (a + a') / 2 * (b - b') + (b + b') / 2 * (a - a')
    quotient c / s      c/s - c'/s' = ((c - c') - (c/s + c'/s') / 2 * (s - s')) / ((s + s') / 2), for norms
    softmax p of a      p - p' = w (a - a' - mean of a - a' weighted by w), w = (p - p') / (log p - log p')

Batch norm in evaluation mode and what is linear anyway stay as they are. Norms and softmax have lines of their own:
composed of products and elementwise functions they would be exact as well, but steep where a softmax is sharp or two
scales are far apart, and would write a small change as a sum of large terms of either sign. (w is the logarithmic mean
of p and p'; with it both sides add up to 0.)

The lines are exact, so their composition is: by the chain rule, a backward pass through them gives coefficients whose
product with the change of the input is the change of the output, to rounding. (Rules of this kind, for other networks:
Shrikumar et al., "Learning Important Features Through Propagating Activation Differences", arXiv 1704.02685.)

A pair is a tensor [2B, ...]: B rows of the input, then the same rows of the reference.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from einops import einsum, rearrange
from torch import nn
from transformers import PreTrainedModel

from .models import (
    REPLACED,
    content_gain,
    hooks,
    lambda_layers,
    layer_mask,
    layer_repetitions,
    normalise,
    repetition_embeddings,
    toeplitz,
)

ACTIVATIONS = ("intermediate_act_fn", "transform_act_fn", "activation")  # feed-forward, MLM head, pooler


@dataclass
class Branches:
    """What enters a lambda layer's output by different ways, as pairs within the graph.

    hidden_states: the layer's input, [2B, N, D], which the residual takes as well.
    queries: [2B, N, H, K]
    key_logits: [2B, M, K U]
    content_values, position_values, repetition_values: the values [2B, M, V, U] that each of the lambdas takes.
    """

    hidden_states: torch.Tensor
    queries: torch.Tensor
    key_logits: torch.Tensor
    content_values: torch.Tensor
    position_values: torch.Tensor
    repetition_values: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            self.hidden_states,
            self.queries,
            self.key_logits,
            self.content_values,
            self.position_values,
            self.repetition_values,
        )


def with_line(value: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """The value, bit by bit, with the gradient of the line."""
    return value.detach() + (line - line.detach())


def _both(half: torch.Tensor) -> torch.Tensor:
    return torch.cat([half, half])


def middle(pair: torch.Tensor) -> torch.Tensor:
    """The mean of the two, as a pair of constants."""
    first, second = pair.detach().chunk(2)
    return _both((first + second) / 2)


def secant(function: Callable[[torch.Tensor], torch.Tensor], pair: torch.Tensor) -> torch.Tensor:
    """Slopes [B, ...] of an elementwise function between the two halves; where these are too close, its tangents."""
    pair = pair.detach()
    change, difference = (first - second for first, second in (pair.chunk(2), function(pair).chunk(2)))
    centre = middle(pair)[: len(change)].requires_grad_()
    with torch.enable_grad():
        (tangent,) = torch.autograd.grad(function(centre).sum(), centre)
    # a quotient loses eps / |change| of its digits, a tangent in the middle change^2
    apart = change.abs() > torch.finfo(pair.dtype).eps ** 0.25
    return torch.where(apart, difference / torch.where(apart, change, 1), tangent)


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], pair: torch.Tensor) -> torch.Tensor:
    """function(pair) with its secant."""
    return with_line(function(pair), _both(secant(function, pair)) * pair)


def product(first: torch.Tensor, second: torch.Tensor, pattern: str) -> torch.Tensor:
    """einsum(first, second, pattern) of two pairs."""
    line = einsum(first, middle(second), pattern) + einsum(middle(first), second, pattern)
    return with_line(einsum(first.detach(), second.detach(), pattern), line)


def norm(module: Any, pair: torch.Tensor) -> torch.Tensor:
    """A layer norm or RMS norm of [2B, ..., C]; other norms of evaluation mode are linear."""
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return normalise(module, pair)
    centred = pair - pair.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else pair
    eps = torch.finfo(pair.dtype).eps if module.eps is None else module.eps
    scale = (centred.detach().square().mean(-1, keepdim=True) + eps).sqrt()
    scale_line = (middle(centred) * centred).mean(-1, keepdim=True) / middle(scale)
    line = (centred - middle(centred / scale) * scale_line) / middle(scale)
    return with_line(module.forward(pair), line * module.weight)


def softmax(pair: torch.Tensor) -> torch.Tensor:
    """Softmax over axis 1 of [2B, M, C]."""
    weight = _both(secant(torch.exp, pair.detach().log_softmax(1)))
    common = (weight * pair).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return with_line(pair.softmax(1), weight * (pair - common))


def lambda_output(
    layer: Any, hidden_states: torch.Tensor, token_mask: torch.Tensor | None, repetitions: Any
) -> tuple[torch.Tensor, Branches]:
    """A lambda layer's output [2B, N, D] and the branches that lead to it.

    Args:
        layer: the lambda layer.
        hidden_states: pair, [2B, N, D].
        token_mask: [2B, N], or None.
        repetitions: which of the tokens are the same, alike in both halves; None where the layer does not ask.
    """
    queries = norm(layer.query_norm, layer.to_queries(hidden_states))
    queries = rearrange(queries, "b n (h k) -> b n h k", h=layer.num_queries)
    key_logits = masked_logits = layer.to_keys(hidden_states)
    values = norm(layer.value_norm, layer.to_values(hidden_states))
    if token_mask is not None:
        padding = ~token_mask.bool()[..., None]
        # a quarter of the lowest number, so that what softmax subtracts and sums over padding stays finite
        masked_logits = key_logits.masked_fill(padding, torch.finfo(key_logits.dtype).min / 4)
        values = values.masked_fill(padding, 0)
    keys = rearrange(softmax(masked_logits), "b m (k u) -> b m k u", u=layer.intra_depth)
    values = rearrange(values, "b m (v u) -> b m v u", u=layer.intra_depth)
    content_values, position_values, repetition_values = (values.view_as(values) for _ in range(3))

    content = product(keys, content_values, "b m k u, b m v u -> b k v")
    content = content * rearrange(content_gain(layer), "k -> k 1")
    embeddings = toeplitz(layer.relative_embeddings, hidden_states.shape[1])
    lambdas = content[:, None] + einsum(embeddings, position_values, "n m k u, b m v u -> b n k v")
    if (table := repetition_embeddings(layer)) is not None:
        around = einsum(toeplitz(table, hidden_states.shape[1]), repetition_values, "n m k u, b m v u -> b n k v")
        lambdas = lambdas + repetitions.mean_of_others(around)
    outputs = product(queries, lambdas, "b n h k, b n k v -> b n h v")
    branches = Branches(hidden_states, queries, key_logits, content_values, position_values, repetition_values)
    return rearrange(outputs, "b n h v -> b n (h v)"), branches


@contextmanager
def secants(model: PreTrainedModel) -> Iterator[dict[Any, Branches]]:
    """Within this context, a backward pass of the model takes secants between the two halves of its batch.

    The values stay those of the model. It must be run with `output_hidden_states=True`, which keeps the batch's layout.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.

    Yields:
        The branches of every lambda layer, filled by the forward pass.
    """
    branches: dict[Any, Branches] = {}
    layers = lambda_layers(model)
    if any(layer in REPLACED for layer in layers):
        raise ValueError("content lambdas are replaced, which are not of the text's keys: leave replace_lambdas first.")
    within = {id(module) for layer in layers for module in layer.modules()}

    def lambda_hook(layer: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        token_mask, repetitions = layer_mask(positional, keywords), layer_repetitions(positional, keywords)
        line, branches[layer] = lambda_output(layer, positional[0], token_mask, repetitions)
        return with_line(output[0], line), output[1]

    handles = [layer.register_forward_hook(lambda_hook, with_kwargs=True) for layer in layers]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and id(module) not in within:
            handles.append(module.register_forward_hook(lambda module, inputs, _: norm(module, inputs[0])))
        for name in ACTIVATIONS:
            if isinstance(activation := getattr(module, name, None), nn.Module):
                handles.append(
                    activation.register_forward_hook(lambda module, inputs, _: elementwise(module.forward, inputs[0]))
                )
    with hooks(handles):
        yield branches
