"""Which pairs a model of sentence order prediction (SOP) gets right, and the pairs that it gets wrong, to be read.

    python -m benchmarks.sentence_order models/sop articles.txt --output order.json

Makes the pairs of the pretraining command and records the accuracy, with its standard error,

- of all of them;
- by the joint, the [SEP] between the segments: whether it lies within the reach of the position lambdas from the token
  that the sentence head reads. Through L layers with a scope of R that is L (R // 2) tokens from [CLS]; with
  `classifier_pooling="sep"` the head reads the joint itself;
- by the opening: whether either segment begins with a word that points back, such as "He", "This" or "However".

The Markdown file beside the output holds the pairs that it is most sure of and wrong about. They are passages of the
text; mind its licence.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.environment import environment
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.saved_models import load_with_missing
from lambdabert.text.arguments import DataArguments
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from modeling_lambdabert import LambdaBertForPreTrainingSOP

SEED = 42  # of the pairs
POINTING_BACK = frozenset(
    "he she it they his her its their him them this that these those such however but also then thus therefore "
    "instead another both later afterwards meanwhile although though nevertheless moreover".split()
)
SHOWN = 20

Pair = dict[str, Any]


def reach(model: LambdaBertForPreTrainingSOP) -> int | None:
    """To how many tokens on each side position lambdas reach through all layers; None: to all."""
    scope = model.config.local_context_size
    return None if scope is None else model.config.num_hidden_layers * (scope // 2)


def joint(pair: Pair) -> int:
    """The place of the [SEP] between the segments."""
    return pair["token_type_ids"].index(1) - 1


def segments(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Both segments as text."""
    ids, place = pair["input_ids"], joint(pair)
    return str(tokenizer.decode(ids[1:place])), str(tokenizer.decode(ids[place + 1 : -1]))


def points_back(segment: str) -> bool:
    """Whether a segment begins with a word that needs one before it."""
    first, *_ = [*segment.replace(",", " ").split(), ""]
    return first.lower() in POINTING_BACK


@torch.inference_mode()
def swapped_probabilities(
    model: LambdaBertForPreTrainingSOP, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int = 32
) -> list[float]:
    """Of each pair, how likely the model finds it that the segments are swapped."""
    found: list[float] = []
    for start in range(0, len(pairs), batch_size):
        some = [
            {name: pair[name] for name in ("input_ids", "token_type_ids")} for pair in pairs[start : start + batch_size]
        ]
        logits = model(**tokenizer.pad(some, return_tensors="pt")).seq_relationship_logits
        found += logits.softmax(-1)[:, 1].tolist()
    return found


def share(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy, its standard error, and over how many pairs."""
    count = len(right)
    if count == 0:
        return {"pairs": 0}
    accuracy = sum(right) / count
    return {"pairs": count, "accuracy": accuracy, "standard error": (accuracy * (1 - accuracy) / count) ** 0.5}


def measure(
    model: LambdaBertForPreTrainingSOP,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    probabilities: Sequence[float],
) -> dict[str, Any]:
    """The accuracy of all pairs and of each kind."""
    right = [(p > 0.5) == bool(pair["sentence_order_label"]) for p, pair in zip(probabilities, pairs, strict=True)]
    limit = reach(model)
    at_joint = model.config.classifier_pooling == "sep"
    near = [limit is None or at_joint or joint(pair) <= limit for pair in pairs]
    back = [any(map(points_back, segments(pair, tokenizer))) for pair in pairs]
    kinds = {
        "joint within reach": near,
        "joint out of reach": [not it for it in near],
        "a segment points back": back,
        "neither does": [not it for it in back],
    }
    return {
        "reach": limit,
        "all": share(right),
        **{name: share([r for r, it in zip(right, kind, strict=True) if it]) for name, kind in kinds.items()},
    }


def errors(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], probabilities: Sequence[float]) -> str:
    """Markdown of the pairs that the model is most sure of and wrong about."""
    sure = [
        (p if not pair["sentence_order_label"] else 1 - p, pair) for p, pair in zip(probabilities, pairs, strict=True)
    ]
    wrong = sorted((item for item in sure if item[0] > 0.5), key=lambda item: -item[0])[:SHOWN]
    lines = ["# Pairs whose order the model gets wrong", ""]
    for confidence, pair in wrong:
        first, second = segments(pair, tokenizer)
        truth = "swapped" if pair["sentence_order_label"] else "in order"
        lines += [
            f"**{truth}**, held for the opposite with {confidence:.2f}",
            "",
            f"- A: {first}",
            f"- B: {second}",
            "",
        ]
    return "\n".join(lines)


def load(folder: Path) -> LambdaBertForPreTrainingSOP:
    """The model in float32 and evaluation mode. Raises a `ValueError` where its sentence head would be drawn anew."""
    model: Any
    model, missing = load_with_missing(LambdaBertForPreTrainingSOP, folder)
    if missing:
        raise ValueError(f"model={folder} lacks {missing[0]}; name a LambdaBERT that was trained with --sop.")
    return model


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sentence_order", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="folder of a LambdaBERT with its SOP head and tokenizer")
    parser.add_argument("text", type=Path, help="file that the model was not trained on")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens of a pair, at most")
    parser.add_argument("--pairs", type=int, default=4000, help="at most so many")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the errors are written beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        model = load(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        arguments = DataArguments(
            validation_file=[str(options.text)], objective="sop", max_seq_length=options.max_seq_length
        )
        documents = load_corpus(arguments, train=False)["validation"]
        rows, _ = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=SEED, training=False)
        rows = rows.shuffle(seed=SEED)
        pairs = list(rows.select(range(min(len(rows), options.pairs))))
    probabilities = swapped_probabilities(model, tokenizer, pairs)
    found = measure(model, tokenizer, pairs, probabilities)
    result = {"model": options.model.name, "text": options.text.name, **found, "environment": environment("datasets")}
    write_json(options.output, result)
    options.output.with_suffix(".md").write_text(errors(tokenizer, pairs, probabilities), encoding="utf-8")
    for kind in list(found)[1:]:
        print(kind, found[kind])
    return 0


if __name__ == "__main__":
    sys.exit(main())
