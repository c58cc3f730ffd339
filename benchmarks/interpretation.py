"""Measurements of what interprets a model.

    python -m benchmarks.interpretation faithfulness --model checkpoints/wikipedia-small \
        --texts enwiki2015/validation.parquet --examples 500 --output faithfulness.json

`faithfulness` masks a word in each of many sentences, at most two of an article, and compares attributions of the
word's logit with leave-one-out (lambdabert/interpretation/faithfulness.py).
"""

import argparse
import json
import random
from pathlib import Path

import pyarrow.parquet
import torch
from sentencex import segment
from transformers import AutoTokenizer

from benchmarks.environment import environment
from lambdabert.interpretation.faithfulness import faithfulness, masked_examples
from modeling_lambdabert import LambdaBertForMaskedLM

WORDS = range(8, 41)  # in a sentence
SENTENCES_PER_ARTICLE = 2


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
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LambdaBertForMaskedLM.from_pretrained(args.model, dtype=torch.float32).eval()
    examples = masked_examples(tokenizer, draw_sentences(args.texts, args.examples, args.seed), seed=args.seed)
    tokens = [example.inputs["input_ids"].shape[1] for example in examples]
    return {
        "examples": len(examples),
        "tokens, mean": sum(tokens) / len(tokens),
        "methods": faithfulness(model, examples, tokenizer.mask_token_id),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("faithfulness", help="attributions against leave-one-out")
    command.set_defaults(measure=measure_faithfulness)
    command.add_argument("--model", required=True, help="Folder of a masked language model with its tokenizer.")
    command.add_argument("--texts", required=True, help="Parquet file with a column of articles, text.")
    command.add_argument("--examples", type=int, default=500)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", required=True, help="JSON file for the results.")
    args = parser.parse_args()
    arguments = {name: value for name, value in vars(args).items() if name != "measure"}
    result = {"arguments": arguments, **args.measure(args), "environment": environment()}
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    for name, found in result["methods"].items():
        low, high = found["interval"]
        print(
            f"{name:24} Spearman {found['spearman']:.3f} ({low:.3f} to {high:.3f}), {found['processor seconds']:.3f} s"
        )


if __name__ == "__main__":
    main()
