"""What a trained model's content lambdas are worth: its loss with each of them replaced.

    python -m benchmarks.content_lambda checkpoints/wikipedia-small articles.txt --lengths 128 512 --output content.json

The text is cut into examples as in pretraining, and those of exactly the given length are masked, always the same way.
MLM loss in nats per masked token, in float32, with the content lambdas of all layers at once

- `as they are`;
- `mean`: replaced by their mean over all examples, layer by layer, so that they say nothing of the text;
- `another text's`: replaced by those of another example of the batch;
- `zero`: left out, so that position lambdas remain.

A model with repetition lambdas is measured with these replaced as well (`repetition: ...`), and with both
(`both: ...`). Those belong to a token: the mean is that over all places of the token in all examples, and another
text's is of the token's occurrences there, zero where it has none.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import lambda_layer
from benchmarks import masked_text
from benchmarks.runs import one_line_errors
from modeling_lambdabert import LambdaBertForMaskedLM
from repetitions_lambdabert import Repetitions

ORIGINAL_MEAN = Repetitions.mean_of_others


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


class RepetitionLambdas:
    """Takes the place of `Repetitions.mean_of_others` in a model of so many layers, whose calls come layer by layer.

    What it replaces are the mean values at each offset around the other occurrences of a token, of which the table of a
    layer makes its repetition lambda.

    Args:
        layers: number of lambda layers.
        vocabulary: number of tokens.
        replacement: "mean", "another text's", "zero" or None, which leaves them as they are.
        means: of every layer, the mean of each token, [vocabulary, ...]; for "mean".

    Attributes:
        ids: [B, N], the tokens of the batch that is computed; -1 where one is hidden.
    """

    ids: torch.Tensor

    def __init__(
        self, layers: int, vocabulary: int, replacement: str | None = None, means: Sequence[torch.Tensor] = ()
    ):
        self.layers, self.vocabulary, self.replacement = layers, vocabulary, replacement
        self.means_to_use, self.calls = means, 0
        self.sums: list[Any] = [0.0] * layers
        self.counts: list[Any] = [0.0] * layers

    @contextmanager
    def in_place(self) -> Iterator[None]:
        def replaced(repetitions: Repetitions, given: torch.Tensor) -> torch.Tensor:
            layer = self.calls % self.layers
            self.calls += 1
            if self.replacement is None:
                own = ORIGINAL_MEAN(repetitions, given)
                self._add(own, layer)
                return own
            if self.replacement == "zero":
                return torch.zeros_like(given)
            if self.replacement == "mean":
                is_hidden = (self.ids < 0).view(*self.ids.shape, *[1] * (given.dim() - 2))
                return self.means_to_use[layer][self.ids.clamp(min=0)].masked_fill(is_hidden, 0)
            return self._of_another_text(given)

        with patch.object(Repetitions, "mean_of_others", replaced):
            yield

    @property
    def means(self) -> list[torch.Tensor]:
        """Of every layer, the mean of each token over its places so far, [vocabulary, ...]; 0 where it has none."""
        return [sums / counts.clamp(min=1) for sums, counts in zip(self.sums, self.counts, strict=True)]

    def _add(self, own: torch.Tensor, layer: int) -> None:
        """Adds [B, N, ...] to the sums of a layer by token."""
        is_seen = self.ids >= 0
        tokens, of_tokens = self.ids[is_seen], own[is_seen]
        sums = own.new_zeros(self.vocabulary, *own.shape[2:]).index_add(0, tokens, of_tokens)
        counts = tokens.bincount(minlength=self.vocabulary).view(-1, *[1] * (own.dim() - 2))
        self.sums[layer] = self.sums[layer] + sums
        self.counts[layer] = self.counts[layer] + counts

    def _of_another_text(self, given: torch.Tensor) -> torch.Tensor:
        """At each place, the mean of [B, N, ...] over its token's places in the row before; 0 where it has none."""
        others = given.roll(1, dims=0)
        both = torch.cat([given, others], dim=1)
        length = given.shape[1]
        ids = torch.cat([self.ids, self.ids.roll(1, dims=0)], dim=1)
        is_of_other = torch.arange(2 * length) >= length
        # of a place that does not count itself, the mean of others is that over the other text
        mean = ORIGINAL_MEAN(Repetitions(ids, is_of_other.expand_as(ids)), both)
        return mean[:, :length]


def loss(
    model: LambdaBertForMaskedLM,
    batches: Sequence[dict[str, Any]],
    contents: ContentLambdas,
    repetitions: RepetitionLambdas,
) -> float:
    """MLM loss over all masked tokens of batches without padding."""
    total, count, hidden = 0.0, 0, model.config.mask_token_id
    with torch.inference_mode(), patch.object(lambda_layer, "content_lambda", contents), repetitions.in_place():
        for batch in batches:
            ids = batch["input_ids"]
            repetitions.ids = ids if hidden is None else ids.masked_fill(ids == hidden, -1)
            masked = int((batch["labels"] != -100).sum())
            total += model(ids, labels=batch["labels"]).loss.item() * masked
            count += masked
    return total / count


def losses(model: LambdaBertForMaskedLM, batches: Sequence[dict[str, Any]], *, per_layer: int = 1) -> dict[str, float]:
    """The loss as it is and with each replacement.

    Args:
        model: in evaluation mode.
        batches: "input_ids" and "labels" [B, N], without padding, of two texts or more.
        per_layer: how many content lambdas a layer has.
    """
    layers, vocabulary = model.config.num_hidden_layers, model.config.vocab_size
    content, repetition = ContentLambdas(layers * per_layer), RepetitionLambdas(layers, vocabulary)
    found = {"as they are": loss(model, batches, content, repetition)}
    means = content.means
    contents: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
        "mean": lambda content, layer: means[layer].expand_as(content),
        "another text's": lambda content, layer: content.roll(1, dims=0),
        "zero": lambda content, layer: torch.zeros_like(content),
    }
    has_repetitions = model.config.repetition_context_size is not None
    for prefix in ("", *(("repetition: ", "both: ") if has_repetitions else ())):
        for name, replace in contents.items():
            content = ContentLambdas(layers * per_layer, *(() if prefix == "repetition: " else (replace,)))
            replacement = (name, repetition.means if name == "mean" else ()) if prefix else ()
            found[prefix + name] = loss(model, batches, content, RepetitionLambdas(layers, vocabulary, *replacement))
    return found


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
