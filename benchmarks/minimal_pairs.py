"""What grammar a masked language model needs its content lambdas for: BLiMP's minimal pairs.

    python -m benchmarks.minimal_pairs probing/blimp/blimp.tsv --model checkpoints/wikipedia-small --output pairs.json

Of each paradigm (Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", arXiv 1912.00582) as
many pairs are drawn as asked for. A pair is right where its good sentence has the higher pseudo-log-likelihood: the sum
over its tokens of the log-probability of each with that token masked (Salazar et al., "Masked Language Model Scoring",
arXiv 1910.14659). With the content lambdas of all layers

- `intact`: those of the masked sentence;
- `mean`: their mean over all sentences drawn, which says nothing of a sentence;
- `swapped`: those of another sentence, the good one of a pair of another paradigm, the same for both of a pair;
- `zero`: left out.

A masked language model of another architecture is judged intact alone. `right` holds a digit for each pair of a
paradigm, 1 where it is right: two models that judge the same file with the same `--seed` and `--per_paradigm` can be
compared pair by pair. Intervals are bootstraps over pairs for a phenomenon, over paradigms for all of them.
"""

import argparse
import csv
import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.environment import environment
from benchmarks.masked_text import load
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.interpretation import replace_lambdas, trace_lambdas
from lambdabert.interpretation.intervals import bootstrap_interval
from lambdabert.training.metrics import logits_of
from modeling_lambdabert import LambdaBertPreTrainedModel

PAIRS_AT_ONCE = 8
BATCH = 32  # sentences
COLUMNS = ("term", "paradigm", "good", "bad")

Pair = dict[str, str]
Contents = dict[int, torch.Tensor]  # by layer


def draw_pairs(file: Path, count: int, seed: int) -> list[Pair]:
    """`count` pairs of each paradigm, in a random order.

    Raises:
        ValueError: a file without the columns, with too few pairs, or with a pair that lacks a sentence.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise ValueError(f"pairs={file} lacks one of the columns {', '.join(COLUMNS)}, separated by tabs.")
    generator = random.Random(seed)
    if any(not (row["good"] or "").strip() or not (row["bad"] or "").strip() for row in rows):
        raise ValueError(f"pairs={file} has a pair without a good or without a bad sentence; give both.")
    found = []
    for paradigm in dict.fromkeys(row["paradigm"] for row in rows):
        pairs = [row for row in rows if row["paradigm"] == paradigm]
        if len(pairs) < count:
            raise ValueError(f"per_paradigm={count}: {paradigm} has {len(pairs)} pairs; lower it.")
        found += generator.sample(pairs, count)
    generator.shuffle(found)
    return found


def shifts(pairs: Sequence[Pair]) -> list[int]:
    """For each pair the next one of another paradigm."""
    count = len(pairs)
    return [
        next((i + j) % count for j in range(1, count) if pairs[(i + j) % count]["paradigm"] != pair["paradigm"])
        for i, pair in enumerate(pairs)
    ]


def encode(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> Any:
    return tokenizer(list(sentences), return_tensors="pt", padding=True)


def whole_contents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> list[torch.Tensor]:
    """Content lambdas of each layer, [S, K, V], of sentences without a mask."""
    batches = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
    traces = [trace_lambdas(model, encode(tokenizer, batch)) for batch in batches]
    return [torch.cat(layer) for layer in zip(*([one.content for one in trace.layers] for trace in traces))]


@torch.no_grad()
def pseudo_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], contents: Contents
) -> torch.Tensor:
    """[S], nats; contents are [S, K, V] in the place of the sentences' own."""
    inputs = encode(tokenizer, sentences)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    special = torch.tensor(tokenizer.all_special_ids)
    rows, places = (mask.bool() & ~torch.isin(ids, special)).nonzero(as_tuple=True)
    masked = ids[rows]
    at = torch.nn.functional.one_hot(places, ids.shape[1]).bool()
    truth = masked[at]
    masked[at] = tokenizer.mask_token_id
    replaced = {layer: content[rows] for layer, content in contents.items()}
    with replace_lambdas(model, replaced) if replaced else nullcontext(), logits_of(model, at):
        logits = model(input_ids=masked, attention_mask=mask[rows]).logits
    likelihoods = -torch.nn.functional.cross_entropy(logits, truth, reduction="none")
    return torch.zeros(len(ids)).index_add(0, rows, likelihoods)


def contents_of_conditions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> dict[str, list[torch.Tensor]]:
    """For each condition but `intact` the content lambdas of each layer, [pairs, K, V]."""
    good = whole_contents(model, tokenizer, [pair["good"] for pair in pairs])
    bad = whole_contents(model, tokenizer, [pair["bad"] for pair in pairs])
    others = shifts(pairs)
    return {
        "mean": [torch.cat(both).mean(0).expand_as(both[0]) for both in zip(good, bad)],
        "swapped": [content[others] for content in good],
        "zero": [torch.zeros_like(content) for content in good],
    }


def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """[pairs], 1 where the good sentence is likelier, in each condition."""
    replaced: dict[str, list[torch.Tensor]] = {"intact": []}
    if isinstance(model, LambdaBertPreTrainedModel):
        replaced |= contents_of_conditions(model, tokenizer, pairs)
    right: dict[str, list[torch.Tensor]] = {condition: [] for condition in replaced}
    for start in tqdm(range(0, len(pairs), PAIRS_AT_ONCE), unit="batch"):
        some = slice(start, start + PAIRS_AT_ONCE)
        sentences = [pair[which] for which in ("good", "bad") for pair in pairs[some]]
        for condition, layers in replaced.items():
            contents = {layer: content[some].repeat(2, 1, 1) for layer, content in enumerate(layers)}
            first, second = pseudo_log_likelihoods(model, tokenizer, sentences, contents).chunk(2)
            right[condition].append((first > second).double())
    return {condition: torch.cat(found) for condition, found in right.items()}


def summarise(right: dict[str, torch.Tensor], chosen: torch.Tensor, groups: torch.Tensor | None) -> dict[str, Any]:
    """Accuracies of the chosen pairs, and what the intact lambdas add to each other condition."""
    within = None if groups is None else groups[chosen]
    found: dict[str, Any] = {"pairs": int(chosen.sum())}
    for condition, of_pairs in right.items():
        values = of_pairs[chosen]
        found[condition] = {"accuracy": values.mean().item(), "interval": bootstrap_interval(values, within)}
        if condition != "intact":
            gain = right["intact"][chosen] - values
            found[condition] |= {"intact - it": gain.mean().item(), "its interval": bootstrap_interval(gain, within)}
    return found


def digits(right: dict[str, torch.Tensor], pairs: Sequence[Pair]) -> dict[str, dict[str, str]]:
    """For each condition and paradigm a digit for each pair, in the order of `pairs`."""
    paradigms = sorted({pair["paradigm"] for pair in pairs})
    return {
        condition: {
            paradigm: "".join(str(int(one)) for one, pair in zip(found, pairs) if pair["paradigm"] == paradigm)
            for paradigm in paradigms
        }
        for condition, found in right.items()
    }


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.minimal_pairs", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("pairs", type=Path, help="tab-separated, with the columns term, paradigm, good and bad")
    parser.add_argument("--model", required=True, help="folder of a masked language model with its tokenizer")
    parser.add_argument("--per_paradigm", type=int, default=20, help="pairs of each paradigm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        pairs = draw_pairs(options.pairs, options.per_paradigm, options.seed)
        model, tokenizer = load(options.model)
    taken_with = environment()
    right = judge(model, tokenizer, pairs)
    paradigms = list(dict.fromkeys(pair["paradigm"] for pair in pairs))
    groups = torch.tensor([paradigms.index(pair["paradigm"]) for pair in pairs])
    results = {"all": summarise(right, torch.ones(len(pairs), dtype=torch.bool), groups)}
    for term in sorted({pair["term"] for pair in pairs}):
        results[term] = summarise(right, torch.tensor([pair["term"] == term for pair in pairs]), None)
    arguments = {name: str(value) for name, value in vars(options).items() if name != "output"}
    record = {"arguments": arguments, "phenomena": results, "right": digits(right, pairs), "environment": taken_with}
    write_json(options.output, record)
    for name, found in results.items():
        shown = "  ".join(f"{condition} {found[condition]['accuracy']:.3f}" for condition in right)
        print(f"{name:28}{found['pairs']:6}  {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
