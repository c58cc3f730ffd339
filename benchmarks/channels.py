"""What a trained model's key channels select, and what its relative embeddings E have learned.

    python -m benchmarks.channels probing/conllu/en_ewt-ud-train-part.conllu --model checkpoints/wikipedia-small \
        --output channels.json

Sentences with parts of speech (CoNLL-U) go through the model. For each layer and key channel: the mean weight of a kind
of token over the weight of a uniform channel, and over how many of a sentence's tokens the weight is spread, exp of its
entropy over their number. For each layer and query: the mean weight of each offset in the position map, E met by real
queries; the part of E's square within some offsets; and the size of the content part of the outputs over that of the
position part.

Two figures stand beside the output, with `_keys.png` and `_positions.png` after its name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from matplotlib.figure import Figure

from benchmarks.environment import environment
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.interpretation import LambdaTrace, LayerTrace, trace_lambdas
from lambdabert.interpretation.figures import PALETTE, colour_map
from lambdabert.interpretation.loading import BATCH, LoadedModel

WORDS = range(5, 41)  # in a sentence
INSIDE = "inside a word"  # a piece that is not its word's first
RARE = 10  # occurrences below which a piece is not named
NAMED = 6  # pieces that a channel likes best
WITHIN = (0, 1, 2, 4, 8)  # offsets

Sentence = list[tuple[str, str]]  # words with their part of speech


def read_sentences(file: Path) -> list[Sentence]:
    """Sentences of a CoNLL-U file.

    Raises:
        ValueError: none has so many words.
    """
    found: list[Sentence] = []
    for block in file.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n") if line[:1].isdigit()]
        sentence = [(row[1], row[3]) for row in rows if row[0].isdigit()]
        if len(sentence) in WORDS:
            found.append(sentence)
    if not found:
        raise ValueError(f"sentences={file} has none of {WORDS[0]} to {WORDS[-1]} words; name a CoNLL-U file.")
    return sorted(found, key=len)


def encode(loaded: LoadedModel, sentences: Sequence[Sentence]) -> tuple[Any, list[list[str]]]:
    """Inputs, and the kind of each of their tokens: its part of speech, its name if special."""
    inputs = loaded.tokenizer(
        [[word for word, _ in sentence] for sentence in sentences],
        is_split_into_words=True,
        return_tensors="pt",
        padding=True,
    )
    kinds = []
    for row, sentence in enumerate(sentences):
        words = inputs.word_ids(row)
        names = loaded.tokenizer.convert_ids_to_tokens(inputs["input_ids"][row].tolist())
        kinds.append(
            [
                name if word is None else INSIDE if place and words[place - 1] == word else sentence[word][1]
                for place, (name, word) in enumerate(zip(names, words))
            ]
        )
    return inputs, kinds


class Channels:
    """Sums over texts of one layer's key weights by kind of token and by piece, in units of uniform weights.

    Args:
        kinds: names of the kinds.
        vocabulary: number of pieces.
        channels: K U.
    """

    def __init__(self, kinds: Sequence[str], vocabulary: int, channels: int):
        self.kinds = kinds
        self.by_kind = torch.zeros(len(kinds), channels)
        self.of_kind = torch.zeros(len(kinds))
        self.by_piece = torch.zeros(vocabulary, channels)
        self.of_piece = torch.zeros(vocabulary)
        self.spread: list[torch.Tensor] = []

    def add(self, layer: LayerTrace, mask: torch.Tensor, ids: torch.Tensor, kinds: list[list[str]]) -> None:
        keys = layer.keys.flatten(2)
        tokens = mask.sum(1)
        weights = (keys * tokens[:, None, None])[mask]
        numbers = torch.tensor([self.kinds.index(kind) for row, kept in zip(kinds, mask) for kind in _kept(row, kept)])
        self.by_kind.index_add_(0, numbers, weights)
        self.of_kind.index_add_(0, numbers, torch.ones(len(numbers)))
        self.by_piece.index_add_(0, ids[mask], weights)
        self.of_piece.index_add_(0, ids[mask], torch.ones(len(numbers)))
        entropy = -torch.special.xlogy(keys, keys).sum(1)
        self.spread.append(entropy.exp() / tokens[:, None])

    def summary(self, tokenizer: Any) -> dict[str, Any]:
        """For each channel the weight of each kind, the pieces it likes best, and its spread."""
        weights = self.by_kind / self.of_kind[:, None].clamp(min=1)
        pieces = self.by_piece / self.of_piece[:, None].clamp(min=1)
        pieces[self.of_piece < RARE] = 0
        best = pieces.topk(NAMED, dim=0).indices.T.tolist()
        spread = torch.cat(self.spread).mean(0)
        return {
            "weight by kind": {kind: row.tolist() for kind, row in zip(self.kinds, weights)},
            "liked best": [tokenizer.convert_ids_to_tokens(some) for some in best],
            "spread": spread.tolist(),
        }


def _kept(row: list[str], kept: torch.Tensor) -> list[str]:
    return [kind for kind, is_token in zip(row, kept.tolist()) if is_token]


class Positions:
    """Sums over texts of one layer's position map by offset, [H, R], and of both parts of the outputs' squares."""

    def __init__(self) -> None:
        self.maps: Any = 0
        self.tokens = 0
        self.squares = torch.zeros(2)

    def add(self, layer: LayerTrace, mask: torch.Tensor) -> None:
        queries = layer.queries[mask]
        self.maps += einsum(queries, layer.relative_embeddings.sum(-1), "t h k, r k -> h r")
        self.tokens += len(queries)
        content = einsum(layer.queries, layer.content, "b n h k, b k v -> b n h v")[mask]
        position = layer.outputs[mask] - content
        self.squares += torch.stack([content.square().sum(), position.square().sum()])
        self.embeddings = layer.relative_embeddings

    def summary(self) -> dict[str, Any]:
        squares = self.embeddings.square().sum((1, 2))
        centre = len(squares) // 2
        within = {str(w): (squares[max(0, centre - w) : centre + w + 1].sum() / squares.sum()).item() for w in WITHIN}
        return {
            "mean weight by query and offset": (self.maps / self.tokens).tolist(),
            "part of E's square within offsets": within,
            "content part over position part": (self.squares[0] / self.squares[1]).sqrt().item(),
        }


def draw_keys(layers: list[dict[str, Any]], kinds: Sequence[str], file: Path) -> None:
    """Each channel's weight of each kind of token, log2 of its ratio to uniform."""
    figure = Figure(figsize=(1.5 + 2.3 * len(layers), 0.24 * len(kinds) + 1), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for number, (panel, layer) in enumerate(zip(panels, layers)):
        ratios = torch.tensor([layer["weight by kind"][kind] for kind in kinds]).clamp(min=2**-9).log2()
        image = panel.imshow(ratios.numpy(), cmap=colour_map(), vmin=-4, vmax=4, aspect="auto")
        panel.set_title(f"layer {number}", fontsize=9)
        panel.set_xlabel("key channel", fontsize=8)
        panel.set_xticks(range(ratios.shape[1]))
        panel.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=panels, label="log2 of weight over uniform weight", extend="both")
    figure.savefig(file, dpi=120)


def draw_positions(layers: list[Positions], file: Path) -> None:
    """E by channel and offset, and below it the mean weight of each offset in the map of each query."""
    figure = Figure(figsize=(1 + 2.8 * len(layers), 4.6), layout="constrained")
    panels = figure.subplots(2, len(layers), squeeze=False)
    for number, layer in enumerate(layers):
        embeddings = layer.embeddings.flatten(1).T
        centre = embeddings.shape[1] // 2
        most = embeddings.abs().max().item()
        extent = (-centre - 0.5, centre + 0.5, len(embeddings) - 0.5, -0.5)
        upper, lower = panels[:, number]
        upper.imshow(embeddings.numpy(), cmap=colour_map(), vmin=-most, vmax=most, aspect="auto", extent=extent)
        upper.set_title(f"layer {number}: E, ±{most:.2g}", fontsize=9)
        for query, weights in enumerate(layer.maps / layer.tokens):
            lower.plot(range(-centre, centre + 1), weights, linewidth=1, label=f"query {query}")
        lower.axvline(0, color=PALETTE[1], zorder=0)
        lower.set_xlabel("offset m - n", fontsize=8)
        for panel in (upper, lower):
            panel.tick_params(labelsize=7)
    panels[0][0].set_ylabel("channel", fontsize=8)
    panels[1][0].set_ylabel("mean weight of the map", fontsize=8)
    panels[1][-1].legend(fontsize=7)
    figure.savefig(file, dpi=120)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.channels", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("sentences", type=Path, help="CoNLL-U file")
    parser.add_argument("--model", required=True, help="folder of a LambdaBERT with its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        sentences = read_sentences(options.sentences)
        loaded = LoadedModel(options.model)
        if getattr(loaded.model.config, "repetition_context_size", None) is not None:
            raise ValueError(f"model={options.model}: repetition lambdas would count as position; name one without.")
    taken_with = environment()
    batches = [encode(loaded, sentences[start : start + BATCH]) for start in range(0, len(sentences), BATCH)]
    padding = loaded.tokenizer.pad_token
    kinds = sorted({kind for _, rows in batches for row in rows for kind in row} - {padding})
    config = loaded.model.config
    layers = range(config.num_hidden_layers)
    width = config.key_depth * config.intra_depth
    channels = [Channels([*kinds, padding], config.vocab_size, width) for _ in layers]
    positions = [Positions() for _ in layers]
    for inputs, names in batches:
        trace: LambdaTrace = trace_lambdas(loaded.model.base_model, inputs)
        for i, layer in enumerate(trace.layers):
            channels[i].add(layer, trace.token_mask, inputs["input_ids"], names)
            positions[i].add(layer, trace.token_mask)
    keys = [one.summary(loaded.tokenizer) for one in channels]
    tokens = {kind: int(count) for kind, count in zip(kinds, channels[0].of_kind)}
    record: dict[str, Any] = {
        "arguments": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "sentences": len(sentences),
        "tokens": tokens,
        "layers": [found | one.summary() for found, one in zip(keys, positions)],
        "environment": taken_with,
    }
    write_json(options.output, record)
    stem = options.output.with_suffix("")
    frequent = [kind for kind in kinds if tokens[kind] >= RARE]
    draw_keys(keys, frequent, Path(f"{stem}_keys.png"))
    draw_positions(positions, Path(f"{stem}_positions.png"))
    for i, found in enumerate(record["layers"]):
        for channel, pieces in enumerate(found["liked best"]):
            print(f"layer {i}, channel {channel}: spread {found['spread'][channel]:.2f}, {' '.join(pieces)}")
        print(f"layer {i}: content over position {found['content part over position part']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
