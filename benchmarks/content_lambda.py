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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoTokenizer

import lambda_layer
from benchmarks.environment import environment
from benchmarks.report import write_json
from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from modeling_lambdabert import LambdaBertForMaskedLM

SEED = 42  # of masks and of the order of examples: neighbours are of different articles


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


def losses(model: LambdaBertForMaskedLM, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The loss as it is and with each replacement.

    Args:
        model: in evaluation mode.
        batches: "input_ids" and "labels" [B, N], without padding, of two texts or more.
    """
    layers = model.config.num_hidden_layers
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


def make_batches(tokenizer: Any, file: Path, length: int, examples: int, batch_size: int) -> list[dict[str, Any]]:
    """Masked batches of examples of exactly `length` tokens."""
    arguments = DataArguments(validation_file=[str(file)], objective="mlm", max_seq_length=length)
    documents = load_corpus(arguments, train=False)["validation"]
    rows, _ = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=SEED, training=False)
    rows = rows.filter(lambda row: len(row["input_ids"]) == length).shuffle(seed=SEED)
    rows = rows.select(range(min(len(rows), examples) // batch_size * batch_size))
    collate = masking_collator(tokenizer, arguments, seed=SEED)
    return [collate([rows[i] for i in range(start, start + batch_size)]) for start in range(0, len(rows), batch_size)]


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.content_lambda", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="folder of a LambdaBERT with its tokenizer")
    parser.add_argument("text", type=Path, help="file that the model was not trained on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of an example")
    parser.add_argument("--tokens", type=int, default=65536, help="at most so many tokens of each length")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = LambdaBertForMaskedLM.from_pretrained(options.model, dtype=torch.float32).eval()
    result: dict[str, Any] = {
        "model": options.model.name,
        "text": options.text.name,
        "environment": environment("datasets"),
    }
    if model.config.content_gain:
        gains = [layer.attention.self.content_gain for layer in model.bert.encoder.layer]
        result["root mean square of each layer's gain"] = [gain.square().mean().sqrt().item() for gain in gains]
    for length in options.lengths:
        batches = make_batches(
            tokenizer, options.text, length, options.tokens // length, max(2, options.batch_tokens // length)
        )
        count = int(sum((batch["labels"] != -100).sum() for batch in batches))
        result[f"{length} tokens"] = {"masked tokens": count} | losses(model, batches)
        print(length, result[f"{length} tokens"], flush=True)
    write_json(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
