"""Exact metrics of masked language modelling and a sentence task, from a few sums per example instead of logits.

Shapes: B examples, N tokens, M masked tokens of a batch.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from lambdabert.text.masks import IGNORED_LABEL
from lambdabert.text.objectives import OBJECTIVES

SENTENCE_LABELS = [objective.sentence_label for objective in OBJECTIVES.values() if objective.sentence_label]


@contextmanager
def logits_of(model: PreTrainedModel, masked: torch.Tensor) -> Iterator[None]:
    """Within this context an MLM head gives the logits of the masked tokens alone, [M, vocab_size].

    Its product with the whole vocabulary is most of a small model's work.

    Args:
        model: one with an MLM head.
        masked: bool [B, N].
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, hidden_states: (hidden_states[0][masked],)
    )
    try:
        yield
    finally:
        hook.remove()


def mlm_logits(outputs: Mapping[str, Any], masked: torch.Tensor) -> torch.Tensor:
    """The logits [M, vocab_size] of outputs that were computed within `logits_of`."""
    logits = outputs["logits"] if "logits" in outputs else outputs["prediction_logits"]
    # a compiled model ignores the hook
    return logits[masked] if logits.dim() == 3 else logits


def example_sums(
    logits: torch.Tensor, sentence_logits: torch.Tensor | None, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Reduces a batch's logits to a few sums per example.

    Args:
        logits: of the masked tokens, in order, [M, vocab_size].
        sentence_logits: [B, 2], or None without a sentence task.
        inputs: the batch.

    Returns:
        [B, 6]: masked tokens, their summed loss (nats), how many of them were predicted; real tokens; the
        sentence task's loss (nats; NaN without one) and whether it was predicted.
    """
    labels = inputs["labels"]
    masked = labels != IGNORED_LABEL
    logits, targets, rows = logits.float(), labels[masked], masked.nonzero()[:, 0]

    def per_example(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(labels), device=labels.device).index_add_(0, rows, values.float())

    sums = [
        masked.sum(dim=1),
        per_example(F.cross_entropy(logits, targets, reduction="none")),
        per_example(logits.argmax(dim=-1) == targets),
        inputs["attention_mask"].sum(dim=1),
    ]
    sentence_labels = next((inputs[name] for name in SENTENCE_LABELS if name in inputs), None)
    if sentence_logits is None or sentence_labels is None:
        sums += [torch.full_like(sums[1], math.nan)] * 2
    else:
        sums += [
            F.cross_entropy(sentence_logits.float(), sentence_labels, reduction="none"),
            sentence_logits.argmax(dim=-1) == sentence_labels,
        ]
    return torch.stack([values.float() for values in sums], dim=1)


def pretraining_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics over all masked tokens and all pairs, from the sums of `example_sums` [examples, 6].

    The mean over no masked token is NaN.
    """
    sums = np.asarray(prediction.predictions, dtype=np.float64)
    masked, mlm_loss, mlm_correct, tokens, sentence_loss, sentence_correct = sums.sum(axis=0)
    mlm_loss, mlm_accuracy = (value / masked if masked else math.nan for value in (mlm_loss, mlm_correct))
    metrics = {
        "loss": mlm_loss,
        "mlm_loss": mlm_loss,
        "perplexity": math.exp(min(mlm_loss, 700)),
        "mlm_accuracy": mlm_accuracy,
        "masked_tokens": int(masked),
        "tokens": int(tokens),
    }
    if not math.isnan(sentence_loss):
        metrics["sentence_loss"] = sentence_loss / len(sums)
        metrics["sentence_accuracy"] = sentence_correct / len(sums)
        metrics["loss"] += metrics["sentence_loss"]
    return metrics
