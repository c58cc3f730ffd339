"""What a masked language model leaves unused of its text: its loss with a unigram cache beside it.

    python -m benchmarks.unigram_cache checkpoints/wikipedia-small articles.txt --lengths 128 512 --output cache.json

A cache (Grave, Joulin and Usunier, "Improving Neural Language Models with a Continuous Cache", arXiv 1612.04426, in its
plainest form) knows the words of a text and neither their order nor their places. Of a text with N unmasked tokens,
c(w) of them the word w, whose frequency elsewhere is q(w), it makes of the model's distribution p

    p'(w) ~ p(w) ((c(w) + b) / (N q(w) + b))^a

A model that has taken in which words its text uses gains nothing by it. q, a and b are fitted to every second batch;
the losses, in nats per masked token, are of the others. Any masked language model will do.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks import masked_text
from benchmarks.runs import one_line_errors
from lambdabert.text.masks import IGNORED_LABEL
from lambdabert.training.metrics import logits_of

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # a
SMOOTHINGS = (0.03, 0.1, 0.3, 1.0, 3.0)  # b


class Predictions(NamedTuple):
    """Of M masked tokens in S texts, with a vocabulary of W.

    Attributes:
        log_probabilities: [M, W]
        truths: [M]
        texts: [M], the text of each
        counts: [S, W], of each text's unmasked tokens
    """

    log_probabilities: torch.Tensor
    truths: torch.Tensor
    texts: torch.Tensor
    counts: torch.Tensor


@torch.inference_mode()
def predict(model: PreTrainedModel, batches: Sequence[dict[str, Any]]) -> Predictions:
    """What a model says of batches of whole texts, "input_ids" and "labels" [B, N]."""
    found, seen = [], 0
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        masked = labels != IGNORED_LABEL
        with logits_of(model, masked):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        visible = F.one_hot(ids, logits.shape[-1]) * ~masked[..., None]
        texts = masked.nonzero()[:, 0] + seen
        found.append(Predictions(logits.log_softmax(-1), labels[masked], texts, visible.sum(1).float()))
        seen += len(ids)
    return Predictions(*map(torch.cat, zip(*found, strict=True)))


def frequencies(predictions: Predictions) -> torch.Tensor:
    """q, [W]: of the unmasked tokens of all texts, with one more of each."""
    counts = predictions.counts.sum(0) + 1
    return counts / counts.sum()


def loss(predictions: Predictions, frequencies: torch.Tensor, weight: float, smoothing: float) -> float:
    """Nats per masked token of p', with a = `weight` and b = `smoothing`."""
    counts = predictions.counts
    expected = counts.sum(1, keepdim=True) * frequencies
    boosts = weight * torch.log((counts + smoothing) / (expected + smoothing))
    return F.cross_entropy(predictions.log_probabilities + boosts[predictions.texts], predictions.truths).item()


def measure(model: PreTrainedModel, batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Losses without and with the cache over half of the batches, and the a and b that were best on the others."""
    fitted, held_out = predict(model, batches[::2]), predict(model, batches[1::2])
    q = frequencies(fitted)
    _, weight, smoothing = min((loss(fitted, q, a, b), a, b) for a in WEIGHTS for b in SMOOTHINGS)
    without, with_it = loss(held_out, q, 0.0, 1.0), loss(held_out, q, weight, smoothing)
    named = held_out.counts[held_out.texts, held_out.truths] > 0
    return {
        "texts": len(held_out.counts),
        "masked tokens": len(held_out.truths),
        "masked tokens that occur elsewhere in their text": named.float().mean().item(),
        "loss": without,
        "loss with the cache": with_it,
        "left unused": without - with_it,
        "a": weight,
        "b": smoothing,
    }


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    return masked_text.parse_command("unigram_cache", __doc__, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        model, tokenizer = masked_text.load(options.model)
        masked_text.measure_lengths(options, tokenizer, {}, lambda batches: measure(model, batches), least=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
