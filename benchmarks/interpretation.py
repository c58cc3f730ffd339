"""Measurements of what interprets a model.

    python -m benchmarks.interpretation faithfulness --model checkpoints/wikipedia-small \
        --texts enwiki2015/validation.parquet --examples 500 --output faithfulness.json
    python -m benchmarks.interpretation topics --model checkpoints/wikipedia-small \
        --texts enwiki2015/validation.parquet --output topics.json

`topics` takes stretches of articles, several of each: how many have their nearest neighbour, by cosine of the content
lambda, in the same article; and the loss of masked tokens with the content lambda of every layer, and of all, left as
it is, or that of another stretch of the article, of another article, the mean of all stretches, or zero.

`faithfulness` masks a word in each of many sentences, at most two of an article, and compares attributions of the
word's logit with leave-one-out (lambdabert/interpretation/faithfulness.py).
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from sentencex import segment

from benchmarks.environment import environment
from benchmarks.masked_text import load_lambdabert
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.interpretation import (
    chance,
    faithfulness,
    masked_examples,
    neighbours,
    replace_lambdas,
    topic_features,
    trace_lambdas,
)
from lambdabert.interpretation.intervals import bootstrap_interval

WORDS = range(8, 41)  # in a sentence
SENTENCES_PER_ARTICLE = 2
STRETCHES = 5  # of an article
TOKENS = 126  # of a stretch, beside [CLS] and [SEP]
MASKED = 0.15  # of the tokens


def draw_sentences(file: str, count: int, seed: int) -> list[str]:
    """Sentences of the articles in column `text` of a parquet file, in a random order."""
    articles = pyarrow.parquet.read_table(file, columns=["text"]).column("text").to_pylist()
    generator = random.Random(seed)
    generator.shuffle(articles)
    found: list[str] = []
    for article in articles:
        paragraphs = generator.sample(lines := article.split("\n"), len(lines))
        sentences = [s.strip() for p in paragraphs[:10] for s in segment("en", p) if len(s.split()) in WORDS]
        found += generator.sample(sentences, min(SENTENCES_PER_ARTICLE, len(sentences)))
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"texts={file} has {len(found)} sentences to draw, not examples={count}: lower it.")


def measure_faithfulness(args: argparse.Namespace) -> dict:
    model, tokenizer = load_lambdabert(args.model)
    examples = masked_examples(tokenizer, draw_sentences(args.texts, args.examples, args.seed), seed=args.seed)
    tokens = [example.inputs["input_ids"].shape[1] for example in examples]
    return {
        "examples": len(examples),
        "tokens, mean": sum(tokens) / len(tokens),
        "methods": faithfulness(model, examples, tokenizer.mask_token_id),
    }


def draw_stretches(file: str, tokenizer: Any, articles: int, seed: int) -> torch.Tensor:
    """Stretches of `TOKENS` tokens with [CLS] and [SEP], evenly over each of the articles, [articles, STRETCHES, N]."""
    texts = pyarrow.parquet.read_table(file, columns=["text"]).column("text").to_pylist()
    random.Random(seed).shuffle(texts)
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= 2 * STRETCHES * TOKENS:
            starts = [part * len(ids) // STRETCHES for part in range(STRETCHES)]
            found.append([[tokenizer.cls_token_id, *ids[s : s + TOKENS], tokenizer.sep_token_id] for s in starts])
        if len(found) == articles:
            return torch.tensor(found)
    raise ValueError(f"texts={file} has {len(found)} articles that are long enough, not articles={articles}: lower it.")


@torch.no_grad()
def measure_topics(args: argparse.Namespace) -> dict:
    model, tokenizer = load_lambdabert(args.model)
    ids = draw_stretches(args.texts, tokenizer, args.articles, args.seed)
    articles, stretches, _ = ids.shape
    topics = [article for article in range(articles) for _ in range(stretches)]
    features = topic_features(model, [{"input_ids": some} for some in ids])
    nearest = {
        row.row: {"same article": row.same_topic, "interval": row.interval} for row in neighbours(features, topics, 1)
    }

    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.rand(ids.shape, generator=generator) < MASKED
    chosen[..., [0, -1]] = False
    masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
    traces = [trace_lambdas(model, {"input_ids": some}) for some in masked]
    layers = len(traces[0].layers)
    contents = [torch.stack([trace.layers[i].content for trace in traces]) for i in range(layers)]  # [A, S, K, V]
    others = {
        "same article": [content.roll(1, dims=1) for content in contents],
        "another article": [content.roll(1, dims=0) for content in contents],
        "mean": [content.mean((0, 1)).expand_as(content) for content in contents],
        "zero": [torch.zeros_like(content) for content in contents],
    }
    whole = _losses(model, masked, ids, chosen, {})
    loss = {"as it is": {"loss": whole.mean().item(), "interval": bootstrap_interval(whole)}}
    for name, replacement in others.items():
        for replaced in (*([i] for i in range(layers)), list(range(layers))):
            rise = _losses(model, masked, ids, chosen, {i: replacement[i] for i in replaced}) - whole
            where = "all layers" if len(replaced) > 1 else f"layer {replaced[0]}"
            loss[f"{name}, {where}"] = {"rise": rise.mean().item(), "interval": bootstrap_interval(rise)}
    return {"stretches": len(topics), "chance": chance(topics), "nearest": nearest, "loss of masked tokens, nats": loss}


def _losses(model: Any, masked: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor, contents: dict) -> torch.Tensor:
    """Loss of the masked tokens of each article, [A]; contents are [A, S, K, V] by layer."""
    losses = []
    for article in range(len(ids)):
        with replace_lambdas(model, {layer: content[article] for layer, content in contents.items()}):
            logits = model(input_ids=masked[article]).logits[chosen[article]]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[article][chosen[article]]))
    return torch.stack(losses)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interpretation", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True)
    faithful = commands.add_parser("faithfulness", help="attributions against leave-one-out")
    faithful.set_defaults(measure=measure_faithfulness)
    faithful.add_argument("--examples", type=int, default=500)
    topics = commands.add_parser("topics", help="what the content lambda knows of an article, and is worth")
    topics.set_defaults(measure=measure_topics)
    topics.add_argument("--articles", type=int, default=144)
    for command in (faithful, topics):
        command.add_argument("--model", required=True, help="Folder of a masked language model with its tokenizer.")
        command.add_argument("--texts", required=True, help="Parquet file with a column of articles, text.")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--output", type=Path, required=True, help="JSON file for the results.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    args = parse_command(argv)
    arguments = {name: value for name, value in vars(args).items() if name not in ("measure", "output")}
    taken_with = environment()  # before the code that runs can change
    with one_line_errors():
        result = {"arguments": arguments, **args.measure(args), "environment": taken_with}
    write_json(args.output, result)
    for name, found in result.get("methods", {}).items():
        low, high = found["interval"]
        print(
            f"{name:24} Spearman {found['spearman']:.3f} ({low:.3f} to {high:.3f}), {found['processor seconds']:.3f} s"
        )
    for name, found in result.get("nearest", {}).items():
        print(f"{name:30} nearest of the same article: {found['same article']:.3f}")
    for name, found in result.get("loss of masked tokens, nats", {}).items():
        print(f"{name:30} {found.get('rise', found.get('loss')):+.3f} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
