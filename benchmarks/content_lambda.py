"""What a trained model's content lambdas are worth: its loss with each of them replaced.

    python -m benchmarks.content_lambda checkpoints/wikipedia-small articles.txt --lengths 128 512 --output content.json

The text is cut into examples as in pretraining, and those of exactly the given length are masked, always the same way.
MLM loss in nats per masked token, in float32, with the content lambdas of all layers at once

- `as they are`;
- `mean`: replaced by their mean over all examples, layer by layer, so that they say nothing of the text;
- `another text's`: replaced by those of another example of the batch;
- `zero`: left out, so that position lambdas remain.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

import lambda_layer
from benchmarks import masked_text
from benchmarks.runs import one_line_errors
from modeling_lambdabert import LambdaBertForMaskedLM


class ContentLambdas:
    """Takes the place of `content_lambda` in a model of so many layers, whose calls come layer by layer.

    Args:
        layers: number of lambda layers.
        replace: what becomes of a content lambda [B, K, V] of a layer, which is counted from 0; the layer multiplies it
            by its gain, where it has one.
    """

    def __init__(
        self, layers: int, replace: Callable[[torch.Tensor, int], torch.Tensor] = lambda content, layer: content
    ):
        self.layers, self.replace, self.calls = layers, replace, 0
        self.original = lambda_layer.content_lambda
        self.sums: list[Any] = [0.0] * layers
        self.texts = 0

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        content, layer = self.original(keys, values), self.calls % self.layers
        self.calls += 1
        self.sums[layer] = self.sums[layer] + content.sum(0)
        self.texts += len(content) if layer == 0 else 0
        return self.replace(content, layer)

    @property
    def means(self) -> list[torch.Tensor]:
        """Of every layer, the mean [K, V] over the texts seen so far."""
        return [total / self.texts for total in self.sums]


def loss(model: LambdaBertForMaskedLM, batches: Sequence[dict[str, Any]], lambdas: ContentLambdas) -> float:
    """MLM loss over all masked tokens of batches without padding."""
    total, count = 0.0, 0
    with torch.inference_mode(), patch.object(lambda_layer, "content_lambda", lambdas):
        for batch in batches:
            masked = int((batch["labels"] != -100).sum())
            total += model(batch["input_ids"], labels=batch["labels"]).loss.item() * masked
            count += masked
    return total / count


def losses(model: LambdaBertForMaskedLM, batches: Sequence[dict[str, Any]], *, per_layer: int = 1) -> dict[str, float]:
    """The loss as it is and with each replacement.

    Args:
        model: in evaluation mode.
        batches: "input_ids" and "labels" [B, N], without padding, of two texts or more.
        per_layer: how many content lambdas a layer has.
    """
    layers = model.config.num_hidden_layers * per_layer
    as_they_are = ContentLambdas(layers)
    found = {"as they are": loss(model, batches, as_they_are)}
    means = as_they_are.means
    replacements = {
        "mean": lambda content, layer: means[layer].expand_as(content),
        "another text's": lambda content, layer: content.roll(1, dims=0),
        "zero": lambda content, layer: torch.zeros_like(content),
    }
    return found | {
        name: loss(model, batches, ContentLambdas(layers, replace)) for name, replace in replacements.items()
    }


def measure(model: LambdaBertForMaskedLM, batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The losses, and over how many masked tokens they are taken."""
    count = int(sum((batch["labels"] != -100).sum() for batch in batches))
    return {"masked tokens": count} | losses(model, batches)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    return masked_text.parse_command("content_lambda", __doc__, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        model, tokenizer = masked_text.load_lambdabert(options.model)
        about = {}
        if model.config.content_gain:
            gains = [layer.attention.self.content_gain for layer in model.bert.encoder.layer]
            about["root mean square of each layer's gain"] = [gain.square().mean().sqrt().item() for gain in gains]
        masked_text.measure_lengths(options, tokenizer, about, lambda batches: measure(model, batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
