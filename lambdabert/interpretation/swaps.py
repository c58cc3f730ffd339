"""What changes in a text when another text's content lambda takes the place of its own, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .interventions import replace_lambdas
from .models import lambda_layers
from .traces import trace_lambdas


@dataclass
class SwapEffect:
    """What the exchange in one layer, or in all, does to a text.

    Attributes:
        layer: None = all.
        cosine: between the two texts' content lambdas; None for all layers. Most of a content lambda is common to all
            texts, and nothing is taken off here, so it is high for any two: compare it between pairs, not with 0.
        hidden_states: length of the change of the last hidden states over their own, mean over tokens.
        divergence: of the predictions after from those before, Kullback-Leibler, nats, mean over the predictions;
            None without a head that classifies.
        changed: share of the predictions whose likeliest class is another; None likewise.
        likeliest: for each place asked for, the likeliest classes after it.
    """

    layer: int | None
    cosine: float | None
    hidden_states: float
    divergence: float | None
    changed: float | None
    likeliest: list[int]


@torch.no_grad()
def swap_effects(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    other: Mapping[str, Any],
    places: Sequence[int] = (),
    predicted: Sequence[int] | None = None,
) -> list[SwapEffect]:
    """What changes in a text with the content lambdas of another, in each layer alone and in all.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.
        inputs: of the text, one row.
        other: of the other text, one row; its lambdas are those of the model unchanged.
        places: whose likeliest token is reported.
        predicted: the places at which the model was trained to predict, [CLS] and [SEP] not among them; None = all that
            hold a token. Without effect where it classifies whole texts.

    Raises:
        ValueError: as in `trace_lambdas`; several rows; a place without a token; no place in `predicted`.
    """
    for name, some in (("inputs", inputs), ("other", other)):
        if len(some["input_ids"]) != 1:
            raise ValueError(f"{name} has {len(some['input_ids'])} rows; give one text.")
    count = len(lambda_layers(model))
    own, others = trace_lambdas(model, inputs), trace_lambdas(model, other)
    of_text = own.token_mask[0].nonzero()[:, 0].tolist()
    for name, given in (("places", places), ("predicted", predicted)):
        if outside := [place for place in given or () if place not in of_text]:
            raise ValueError(f"{name} holds {outside[0]}, where the text has no token; give some of {of_text}.")
    if predicted is not None and not len(predicted):
        raise ValueError("predicted=[]: there is no prediction to compare; give one place or more, or None for all.")
    before, states = _log_probabilities(model, own.outputs), own.outputs.hidden_states[-1]
    effects = []
    for layer in (*range(count), None):
        replaced = range(count) if layer is None else (layer,)
        with replace_lambdas(model, {index: others.layers[index].content for index in replaced}):
            swapped = trace_lambdas(model, inputs).outputs
        change = ((swapped.hidden_states[-1] - states).norm(dim=-1) / states.norm(dim=-1))[own.token_mask]
        after = _log_probabilities(model, swapped)
        divergence = changed = None
        if before is not None and after is not None:
            nats = (before.exp() * (before - after)).sum(-1)  # [1, N] of tokens, [1] of classes, [1, C] of labels
            of_tokens = nats.dim() == 2 and model.config.problem_type != "multi_label_classification"
            others_likeliest = before.argmax(-1) != after.argmax(-1)
            if of_tokens:
                compared = of_text if predicted is None else [*predicted]
                nats, others_likeliest = nats[:, compared], others_likeliest[:, compared]
            divergence, changed = nats.mean().item(), others_likeliest.double().mean().item()
        cosine = None
        if layer is not None:
            content, content_of_other = (one.layers[layer].content.flatten() for one in (own, others))
            cosine = torch.cosine_similarity(content, content_of_other, dim=0).item()
        if len(places) and after is not None and not of_tokens:
            raise ValueError("places: the model predicts once for a text, and not at a place; leave them out.")
        likeliest = [int(after[0, place].argmax()) for place in places] if after is not None else []
        effects.append(SwapEffect(layer, cosine, change.mean().item(), divergence, changed, likeliest))
    return effects


def _log_probabilities(model: Any, outputs: Any) -> torch.Tensor | None:
    """Of each token's or each sequence's classes, [B, ..., C], or of each label and its absence, [B, C, 2]."""
    logits = outputs.get("prediction_logits", outputs.get("logits"))
    if logits is None or model.config.problem_type == "regression":
        return None
    if model.config.problem_type == "multi_label_classification":
        return F.logsigmoid(torch.stack((logits, -logits), dim=-1))
    return None if logits.shape[-1] < 2 else logits.log_softmax(-1)
