"""Why a model predicts what it does: contributions of its input tokens, by layer and by part of the layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .models import lambda_layers
from .predictions import Index, Prediction, gradient
from .secants import Branches, secants

# how far the reference goes from each word to [MASK]. Less ranks tokens as leave-one-out does (Spearman 0.78 at 0.3,
# 0.75 at 0.5, 0.65 at 1 on checkpoints/wikipedia-small; 0.69, 0.68, 0.58 on wikipedia-repetitions; a trial of 100
# sentences), and more finds the tokens that matter when removed together.
FADING = 0.5
STEPS_AT_ONCE = 10  # of integrated gradients, in one batch


@dataclass
class Attribution:
    """A logit as a sum over input tokens and a bias.

    Attributes:
        tokens: contributions, shaped as `input_ids`; 0 at padding.
        logit: [B]
        bias: [B], what the logit is without the tokens' contributions.
    """

    tokens: torch.Tensor
    logit: torch.Tensor
    bias: torch.Tensor


@dataclass
class LayerContributions:
    """The contributions that pass one lambda layer, by the part that they pass; each is [B, N] for the layer's input.

    Whatever reaches the logit passes every layer, so for each layer the five add up to the sum of all tokens'
    contributions. Places are those of the layer's input, which in later layers is mixed from several tokens.

    Attributes:
        content: through the content lambda, by keys and values.
        position: through the position lambdas, by values.
        repetition: through the repetition lambdas, by values; zeros in a model without.
        queries: by the queries that the lambdas are applied to.
        residual: past the layer.
    """

    content: torch.Tensor
    position: torch.Tensor
    repetition: torch.Tensor
    queries: torch.Tensor
    residual: torch.Tensor


@dataclass
class Explanation(Attribution):
    """An exact attribution, with what becomes of it in each layer.

    Attributes:
        layers: one `LayerContributions` for each lambda layer.
    """

    layers: list[LayerContributions]


def explain_prediction(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    place: Index | None,
    target: Index | str,
    mask_token_id: int | None = None,
) -> Explanation:
    """Contributions of every input token that add up, with the bias, to a logit.

    The text is compared with a reference, in which each word embedding is half-way to that of [MASK]. The change of
    the logit between the two is written as an exact sum over the tokens, by a backward pass through secants in place of
    tangents (`secants.py`); the bias is the reference's logit. Costs about as much as five gradients. The
    reference has the repetitions of the text: that two tokens are the same does not fade.

    Args:
        model: a LambdaBERT with a head, in evaluation mode.
        inputs: what its tokenizer returns with `return_tensors="pt"`, [B, N] each ([B, C, N] with choices).
        place: the token whose logits these are, one for all rows or [B]; None where the head sees whole sequences.
        target: which of the logits: a token of the vocabulary, a class, a choice, or "start" or "end" of an answer; one
            for all rows or [B].
        mask_token_id: the tokenizer's [MASK]. None = the token at `place`, of a masked language model.

    Raises:
        ValueError: no lambda layers, training mode, no head; a place or target that is missing, superfluous or out of
            range; no [MASK]; a head of one's own with what is neither linear nor a norm nor named as BERT's activations
            are; and what the model refuses.
    """
    prediction = Prediction(model, inputs, place, target)
    words = prediction.embeddings(prediction.input_ids)
    reference = torch.lerp(words, prediction.mask_embedding(mask_token_id), FADING)
    pair = torch.stack([words, reference]).requires_grad_()
    with torch.enable_grad(), secants(model) as branches:
        logit, bias = prediction.run(pair)
        ways = [branches[layer] for layer in lambda_layers(model)]
        tensors = [pair, *(tensor for way in ways for tensor in way.tensors())]
        slopes = torch.autograd.grad(logit.sum(), tensors, materialize_grads=True)  # zeros without a repetition lambda
    tokens = (slopes[0][0] * (words - reference)).sum(-1)
    _check_sum(tokens, bias.detach(), logit.detach())
    per_layer = (len(slopes) - 1) // len(ways)
    layers = [_layer_contributions(way, slopes[1 + i * per_layer :][:per_layer]) for i, way in enumerate(ways)]
    return Explanation(tokens, logit.detach(), bias.detach(), layers)


def _check_sum(tokens: torch.Tensor, bias: torch.Tensor, logit: torch.Tensor) -> None:
    """Refuses contributions that do not add up, as those through a head with operations that have no secants."""
    tokens = tokens.flatten(1)
    rest = (tokens.sum(1) + bias - logit).abs()
    scale = tokens.abs().sum(1) + bias.abs() + logit.abs()
    if (rest > torch.finfo(logit.dtype).eps ** 0.5 * scale).any():
        raise ValueError(
            f"model: contributions and bias miss the logit by {rest.max().item():.3g}: a part of it is neither linear, "
            "nor a norm, nor an activation by one of BERT's names; integrated_gradients takes any model."
        )


def _contributions(slopes: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """[R, N] of a pair [2R, N, ...] and the slopes at its first half."""
    first, second = pair.detach().chunk(2)
    return (slopes[: len(first)] * (first - second)).sum(-1 if pair.dim() == 3 else tuple(range(2, pair.dim())))


def _layer_contributions(way: Branches, slopes: tuple[torch.Tensor, ...]) -> LayerContributions:
    pairs = zip(slopes, way.tensors())
    total, queries, keys, content_values, position, repetition = (_contributions(slope, pair) for slope, pair in pairs)
    content = content_values + keys
    residual = total - content - position - repetition - queries
    return LayerContributions(content, position, repetition, queries, residual)


def integrated_gradients(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    place: Index | None,
    target: Index | str,
    mask_token_id: int | None = None,
    steps: int = 50,
) -> Attribution:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365) along the line from [MASK] for every token.

    The contributions and the bias, the baseline's logit, add up to the logit as far as `steps` gradients in the middles
    of equal parts sum up the integral. A repetition lambda sees the same tokens as repeated all along the line.

    Args:
        model, inputs, place, target, mask_token_id: as in `explain_prediction`.
        steps: gradients.

    Raises:
        ValueError: as in `explain_prediction`; no step.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps}: set it to a whole number from 1 on.")
    prediction = Prediction(model, inputs, place, target)
    words = prediction.embeddings(prediction.input_ids)
    baseline = prediction.mask_embedding(mask_token_id).expand_as(words)
    weights = (torch.arange(steps, device=words.device, dtype=words.dtype) + 0.5) / steps
    slope = torch.zeros_like(words)
    for some in weights.split(STEPS_AT_ONCE):
        points = baseline + some.view(-1, *[1] * words.dim()) * (words - baseline)
        slope += gradient(prediction.run, points)[1].sum(0) / steps
    with torch.no_grad():
        logit, bias = prediction.run(torch.stack([words, baseline]))
    return Attribution((slope * (words - baseline)).sum(-1), logit, bias)


def gradient_times_input(
    model: PreTrainedModel, inputs: Mapping[str, Any], place: Index | None, target: Index | str
) -> Attribution:
    """The gradient of the logit by each word embedding times that embedding; the bias is what they leave.

    Args:
        model, inputs, place, target: as in `explain_prediction`.

    Raises:
        ValueError: as in `explain_prediction`.
    """
    prediction = Prediction(model, inputs, place, target)
    words = prediction.embeddings(prediction.input_ids)
    logits, slopes = gradient(prediction.run, words[None])
    tokens = (slopes[0] * words).sum(-1)
    by_row = tokens.flatten(1).sum(1)
    return Attribution(tokens, logits[0], logits[0] - by_row)
