"""The losses of distillation, summed for each example.

The Trainer divides each by the number of tokens, examples or masked tokens in the whole step, so that neither padding
nor gradient accumulation changes it:

    layers           every layer's hidden state: squared error over the variance that the teacher's norm gives it
    last_layer       the last layer's alone
    sentences        the sentence vector, pooled as the teacher pools: 1 - cosine
    masked_tokens    the MLM head's distribution at masked tokens: KL divergence, teacher first (nats)
    classes          the classifier's: KL divergence (nats); of a regression, the squared error

A first stage (`stages`) has one of its own:

    attention        each attention block's output: squared error over the variance that the teacher's norm gives it

Shapes: B examples, N tokens, D hidden_size, C classes or tokens of the vocabulary.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from lambdabert.distillation.teacher import Teacher
from lambdabert.text.masks import IGNORED_LABEL
from lambdabert.training.metrics import mlm_logits

ITEMS = ("tokens", "examples", "masked tokens")
ITEM_OF_LOSS = {
    "layers": "tokens",
    "last_layer": "tokens",
    "sentences": "examples",
    "masked_tokens": "masked tokens",
    "classes": "examples",
    "attention": "tokens",
}


def count_items(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`ITEMS` of each example, [B, 3]."""
    tokens = inputs["attention_mask"].sum(1)
    return torch.stack([tokens, torch.ones_like(tokens), (inputs["labels"] != IGNORED_LABEL).sum(1)], dim=1)


def divergence(logits: torch.Tensor, target: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """The divergence of the distributions of logits [..., C] from the target's: KL(target || logits) in nats, [...].

    With `problem_type` "multi_label_classification" each of the C is a distribution of its own; with "regression" the
    squared errors are summed instead.
    """
    logits, target = logits.float(), target.float()
    if problem_type == "regression":
        return (logits - target).square().sum(-1)
    if problem_type == "multi_label_classification":
        logits, target = (torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (logits, target))
        return divergence(logits, target).sum(-1)
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def problem_type(config: PreTrainedConfig) -> str | None:
    """The kind of labels that a classifier predicts."""
    return "regression" if config.problem_type is None and config.num_labels == 1 else config.problem_type


def squared_errors(own: torch.Tensor, given: torch.Tensor, tokens: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Each example's squared error over the variance that a norm gives, summed over its tokens: [B].

    Args:
        own: states of the student, [B, N, D].
        given: the teacher's.
        tokens: bool [B, N], True = token.
        norm: the teacher's norm whose output they are; it scales states of unit variance.
    """
    squares = (own.float() - given.float()).square().mean(-1)
    return squares.masked_fill(~tokens, 0).sum(1) / norm.weight.square().mean()


def loss_sums(
    teacher: Teacher, outputs: Any, targets: Any, inputs: Mapping[str, torch.Tensor], names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Each example's share of the losses `names`, summed over its tokens where a loss is one of tokens: [B] each.

    Args:
        teacher: pools, and knows its norms and kind of labels.
        outputs: the student's, with hidden states.
        targets: the teacher's.
        inputs: the batch; `labels` are not -100 where tokens are masked.
        names: the losses wanted.
    """
    tokens = inputs["attention_mask"].bool()
    pairs = list(zip(outputs.hidden_states[1:], targets.hidden_states[1:], strict=True))
    errors: dict[int, torch.Tensor] = {}

    def error(layer: int) -> torch.Tensor:
        if layer not in errors:
            errors[layer] = squared_errors(*pairs[layer], tokens, teacher.norm(layer))
        return errors[layer]

    sums = {}
    if "layers" in names:
        nothing = torch.zeros((), device=tokens.device)
        sums["layers"] = sum(map(error, range(len(pairs))), nothing) / len(pairs)
    if "last_layer" in names:
        sums["last_layer"] = error(len(pairs) - 1)
    if "sentences" in names:
        own, given = (teacher.sentence_vectors(states.float(), inputs["attention_mask"]) for states in pairs[-1])
        sums["sentences"] = 1 - F.cosine_similarity(own, given, dim=-1)
    if "masked_tokens" in names:
        masked = inputs["labels"] != IGNORED_LABEL
        of_tokens = divergence(mlm_logits(outputs, masked), mlm_logits(targets, masked))
        sums["masked_tokens"] = of_tokens.new_zeros(len(masked)).index_add(0, masked.nonzero()[:, 0], of_tokens)
    if "classes" in names:
        of_classes = divergence(outputs["logits"], targets["logits"], problem_type(teacher.model.config))
        if of_classes.dim() == 2:
            of_classes = of_classes.masked_fill(~tokens, 0).sum(1) / tokens.sum(1).clamp(min=1)
        sums["classes"] = of_classes
    return sums
