"""How far single words tell the order of two segments: a linear baseline of sentence order prediction (SOP).

    python -m benchmarks.sentence_order_words --tokenizer_name checkpoints/wikipedia-small --output words.json \
        --train_file 'enwiki2015/train-0[0-2].parquet' --validation_file enwiki2015/validation.parquet

Takes the options of `DataArguments`, and makes the pairs of the pretraining command. A pair's score is the sum of one
number for each token of segment A, less that of segment B; logistic regression finds the numbers.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm import trange

from benchmarks.environment import environment
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.text.arguments import DataArguments
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from lambdabert.training.arguments import parse_arguments
from lambdabert.training.tokenizers import load_tokenizer


@dataclass
class BaselineArguments:
    """The baseline's own options."""

    tokenizer_name: str = field(metadata={"help": "A folder, vocab.txt or hub name."})
    output: str = field(metadata={"help": "JSON file for the accuracy after each epoch."})
    epochs: int = 6
    learning_rate: float = 3e-3
    batch_size: int = field(default=256, metadata={"help": "Pairs in a step."})
    seed: int = 42


def scores(weights: torch.nn.EmbeddingBag, pairs: dict[str, list[Any]]) -> torch.Tensor:
    """[pairs]; above 0 means swapped. [CLS] adds a constant, and of the two [SEP] nothing is left."""
    ids = [torch.tensor(ids) for ids in pairs["input_ids"]]
    signs = 1 - 2 * torch.tensor([segment for types in pairs["token_type_ids"] for segment in types])
    starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
    return weights(torch.cat(ids), starts, per_sample_weights=signs.float())[:, 0]


def accuracy(weights: torch.nn.EmbeddingBag, examples: Dataset, batch_size: int) -> float:
    """Share of the pairs whose order is told."""
    with torch.no_grad():
        correct = sum(
            ((scores(weights, pairs) > 0) == torch.tensor(pairs["sentence_order_label"]).bool()).sum().item()
            for pairs in examples.iter(batch_size)
        )
    return correct / len(examples)


def train(examples: dict[str, Dataset], vocab_size: int, args: BaselineArguments) -> list[float]:
    """Validation accuracy after each epoch."""
    weights = torch.nn.EmbeddingBag(vocab_size, 1, mode="sum")
    torch.nn.init.zeros_(weights.weight)
    optimizer = torch.optim.Adam(weights.parameters(), lr=args.learning_rate)
    accuracies = []
    for epoch in trange(args.epochs, unit="epoch"):
        for pairs in examples["train"].shuffle(seed=args.seed + epoch).iter(args.batch_size):
            labels = torch.tensor(pairs["sentence_order_label"]).float()
            loss = F.binary_cross_entropy_with_logits(scores(weights, pairs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracies.append(accuracy(weights, examples["validation"], args.batch_size))
    return accuracies


def parse_command(argv: Sequence[str] | None) -> tuple[BaselineArguments, DataArguments]:
    given = sys.argv[1:] if argv is None else argv
    args, data_args = parse_arguments([*given, "--sop"], (BaselineArguments, DataArguments))
    return args, data_args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    with one_line_errors():
        args, data_args = parse_command(argv)
        tokenizer = load_tokenizer(args.tokenizer_name)
        examples = {
            split: prepare_examples(
                documents, tokenizer, data_args.example_recipe(), seed=args.seed, training=split == "train"
            )[0]
            for split, documents in load_corpus(data_args, seed=args.seed).items()
        }
    result = {
        "arguments": asdict(args),
        "data": asdict(data_args),
        "pairs": {split: len(pairs) for split, pairs in examples.items()},
        "validation accuracy by epoch": train(examples, len(tokenizer), args),
        "environment": environment("datasets"),
    }
    write_json(Path(args.output), result)
    print(json.dumps(result["validation accuracy by epoch"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
