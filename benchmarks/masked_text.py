"""Masked language models with their tokenizers, and masked text of given lengths: what several measurements share."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.environment import environment
from benchmarks.report import write_json
from lambdabert.saved_models import load_with_missing
from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from modeling_lambdabert import LambdaBertForMaskedLM

SEED = 42  # of masks and of the order of examples: neighbours are of different articles

Batches = list[dict[str, Any]]


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model in float32 and evaluation mode, and its tokenizer.

    Raises:
        ValueError: the folder lacks weights of one, which would be drawn at random, or its tokenizer is another's.
    """
    model, missing = load_with_missing(AutoModelForMaskedLM, folder)
    if missing:
        raise ValueError(
            f"model={folder} is no masked language model: it lacks {missing[0]}; name one with its MLM head."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= model.config.vocab_size:
        raise ValueError(
            f"model={folder} has vocab_size={model.config.vocab_size}, but its tokenizer has {len(tokenizer)} tokens; "
            "save the one that it was trained with there."
        )
    return model, tokenizer


def load_lambdabert(folder: str | Path) -> tuple[LambdaBertForMaskedLM, PreTrainedTokenizerBase]:
    """The same of a LambdaBERT. Raises a `ValueError` also where it is another model."""
    model, tokenizer = load(folder)
    if not isinstance(model, LambdaBertForMaskedLM):
        raise ValueError(f"model={folder} is of type {model.config.model_type}, which has no content lambdas.")
    return model, tokenizer


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    length: int,
    examples: int,
    batch_size: int,
    *,
    seed: int = SEED,
    training: bool = False,
) -> Batches:
    """Masked batches of examples of exactly `length` tokens, masked as for evaluation or for training."""
    arguments = DataArguments(validation_file=[str(file)], objective="mlm", max_seq_length=length)
    documents = load_corpus(arguments, train=False)["validation"]
    rows, _ = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=SEED, training=False)
    rows = rows.filter(lambda row: len(row["input_ids"]) == length).shuffle(seed=seed)
    rows = rows.select(range(min(len(rows), examples) // batch_size * batch_size))
    collate = masking_collator(tokenizer, arguments, seed=seed, training=training)
    return [collate([rows[i] for i in range(start, start + batch_size)]) for start in range(0, len(rows), batch_size)]


def parse_command(command: str, documentation: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of a command that measures a model on a text at several lengths."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=(documentation or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, help="folder of a masked language model with its tokenizer")
    parser.add_argument("text", type=Path, help="file that the model was not trained on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of an example")
    parser.add_argument("--tokens", type=int, default=65536, help="at most so many tokens of each length")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def measure_lengths(
    options: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    measure: Callable[[Batches], dict[str, Any]],
    least: int = 1,
) -> None:
    """Writes what `measure` finds at each length, after what is to be said `about` the model.

    Raises:
        ValueError: the text has fewer than `least` batches of a length.
    """
    result: dict[str, Any] = {
        "model": options.model.name,
        "text": options.text.name,
        "environment": environment("datasets"),
        **about,
    }
    for length in options.lengths:
        batches = make_batches(
            tokenizer, options.text, length, options.tokens // length, max(2, options.batch_tokens // length)
        )
        if len(batches) < least:
            raise ValueError(
                f"text={options.text} has too few examples of {length} tokens to measure with; name a longer one."
            )
        result[f"{length} tokens"] = measure(batches)
        print(length, result[f"{length} tokens"], flush=True)
    write_json(options.output, result)
