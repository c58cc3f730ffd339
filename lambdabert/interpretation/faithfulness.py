"""Whether contributions say what the model does when tokens are taken away.

Taken away means replaced by [MASK]. Leave-one-out is the fall of the logit when one token is taken away. A method of
attribution is faithful as far as it ranks the tokens of a text likewise, and as far as the logit falls when its highest
are taken away.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .explanations import explain_prediction, gradient_times_input, integrated_gradients
from .intervals import bootstrap_interval
from .predictions import Index, Prediction

ROWS_AT_ONCE = 32
FRACTIONS = (0.1, 0.2, 0.5)  # of the tokens of a text, taken away together


@dataclass
class Example:
    """A prediction about one text.

    Attributes:
        inputs: of one row, [1, N] each.
        place, target: the logit, as in `explain_prediction`.
        candidates: int [T], the places that may be taken away; 3 or more.
    """

    inputs: Mapping[str, torch.Tensor]
    place: int | None
    target: int | str
    candidates: torch.Tensor


Method = Callable[[PreTrainedModel, Example, int], torch.Tensor]


def nearness(model: PreTrainedModel, example: Example, mask_token_id: int) -> torch.Tensor:
    """[N], minus the distance to the place: what needs no model."""
    if example.place is None:
        raise ValueError("place=None: nothing is near to a prediction about the whole text; leave this method out.")
    return -(torch.arange(example.inputs["input_ids"].shape[1]) - example.place).abs().double()


def _explanation(model: PreTrainedModel, example: Example, mask_token_id: int) -> torch.Tensor:
    return explain_prediction(model, example.inputs, example.place, example.target, mask_token_id).tokens[0]


def _integrated_gradients(model: PreTrainedModel, example: Example, mask_token_id: int) -> torch.Tensor:
    return integrated_gradients(model, example.inputs, example.place, example.target, mask_token_id).tokens[0]


def _gradient_times_input(model: PreTrainedModel, example: Example, mask_token_id: int) -> torch.Tensor:
    return gradient_times_input(model, example.inputs, example.place, example.target).tokens[0]


METHODS: dict[str, Method] = {
    "explanation": _explanation,
    "integrated gradients": _integrated_gradients,
    "gradient x input": _gradient_times_input,
    "nearness": nearness,
}


@torch.no_grad()
def leave_one_out(
    model: PreTrainedModel, inputs: Mapping[str, Any], place: Index | None, target: Index | str, mask_token_id: int
) -> torch.Tensor:
    """How far the logit falls when a token is replaced by [MASK], for each token.

    Args:
        model, inputs, place, target: as in `explain_prediction`.
        mask_token_id: the tokenizer's [MASK].

    Returns:
        Shaped as `input_ids`; 0 at padding.

    Raises:
        ValueError: as in `explain_prediction`.
    """
    prediction = Prediction(model, inputs, place, target)
    ids = prediction.input_ids
    mask = prediction.mask_token(mask_token_id)
    whole = prediction.run_texts(ids[None])[0]
    falls = whole.new_zeros(ids.shape)
    for places in _places(prediction.token_mask):
        removed = torch.stack([ids.index_put(tuple(of_rows.T), mask) for of_rows in places])
        logits = prediction.run_texts(removed)
        for of_rows, logit in zip(places, logits):
            falls[tuple(of_rows.T)] = (whole - logit)[of_rows[:, 0]]
    return falls


def _places(token_mask: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The tokens of [B, ..., N] in turns, one of each row that has one left, in batches of turns."""
    by_row: dict[int, list[torch.Tensor]] = {}
    for place in token_mask.nonzero():
        by_row.setdefault(int(place[0]), []).append(place)
    turns = [torch.stack([place for place in turn if place is not None]) for turn in zip_longest(*by_row.values())]
    at_once = max(1, ROWS_AT_ONCE // len(token_mask))
    return [tuple(turns[start : start + at_once]) for start in range(0, len(turns), at_once)]


@torch.no_grad()
def removal(model: PreTrainedModel, example: Example, scores: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """How far the logit falls without the candidates with the highest scores [T], one number for each fraction."""
    prediction = Prediction(model, example.inputs, example.place, example.target)
    order = example.candidates.cpu()[scores.cpu().argsort(descending=True, stable=True)]
    texts = [prediction.input_ids]
    for fraction in FRACTIONS:
        removed = prediction.input_ids.clone()
        removed[0, order[: math.ceil(fraction * len(order))]] = prediction.mask_token(mask_token_id)
        texts.append(removed)
    logits = prediction.run_texts(torch.stack(texts))[:, 0]
    return logits[0] - logits[1:]


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Rank correlation of two [T], ties at their mean rank; NaN where one is constant."""
    ranks = [
        ((values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2).double()
        for values in (first, second)
    ]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def masked_examples(tokenizer: Any, texts: Iterable[str], max_length: int = 128, seed: int = 0) -> list[Example]:
    """One example from each text: a token of it masked at random, to be predicted by a masked language model.

    Any token but the special ones may be drawn, a piece of a word or a punctuation mark too; the other pieces of its
    word stay visible.

    Args:
        tokenizer: with a [MASK].
        texts: those that leave fewer than 3 tokens beside the masked one are passed over.
        max_length: tokens; longer texts are cut.
        seed: of the masks.

    Raises:
        ValueError: the tokenizer has no [MASK]; one text in place of several.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts={texts[:40]!r} is a single text; give a list of them.")
    if tokenizer.mask_token_id is None:
        raise ValueError(f"tokenizer={type(tokenizer).__name__} has no [MASK]; give one of a masked language model.")
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(tokenizer.all_special_ids)
    examples = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        ordinary = (~torch.isin(inputs["input_ids"][0], special)).nonzero()[:, 0]
        if len(ordinary) < 4:
            continue
        place = int(ordinary[torch.randint(len(ordinary), (), generator=generator)])
        token = int(inputs["input_ids"][0, place])
        inputs["input_ids"][0, place] = tokenizer.mask_token_id
        examples.append(Example(inputs, place, token, ordinary[ordinary != place]))
    return examples


def faithfulness(
    model: PreTrainedModel, examples: list[Example], mask_token_id: int, methods: Mapping[str, Method] | None = None
) -> dict[str, dict[str, Any]]:
    """How faithful methods of attribution are.

    Args:
        model: a LambdaBERT with a head, in evaluation mode.
        examples: predictions, for example of `masked_examples`.
        mask_token_id: the tokenizer's [MASK].
        methods: by name, functions of model, example and mask_token_id that give scores [N]; None = `METHODS`. The
            others are compared with the first.

    Returns:
        For each method: "spearman" with leave-one-out, the mean over examples (0 for an example in which either is
        constant), with its "interval" (95 %, bootstrap);
        "below the first" and its interval, of the same examples; "removal", the mean fall of the logit by fraction of
        tokens removed, with intervals; "processor seconds" for an example.

    Raises:
        ValueError: no example, no method, or an example with fewer than 3 candidates; as in `explain_prediction`.
    """
    methods = METHODS if methods is None else methods
    if not methods:
        raise ValueError("methods={}: there is nothing to measure; give one or more, or None for all.")
    if not examples:
        raise ValueError("examples=[]: there is nothing to measure; give texts of 4 tokens or more.")
    for number, example in enumerate(examples):
        if (rows := len(example.inputs["input_ids"])) != 1:
            raise ValueError(f"examples[{number}] has {rows} rows; give one text each.")
        if len(example.candidates) < 3:
            raise ValueError(
                f"examples[{number}] has {len(example.candidates)} candidates, too few for ranks; give 3 or more."
            )
    correlations: dict[str, list[float]] = {name: [] for name in methods}
    falls: dict[str, list[torch.Tensor]] = {name: [] for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for example in tqdm(examples, unit="text"):
        candidates = example.candidates.cpu()
        falls_alone = leave_one_out(model, example.inputs, example.place, example.target, mask_token_id)[0]
        truth = falls_alone.cpu()[candidates]
        for name, method in methods.items():
            start = time.process_time()
            scores = method(model, example, mask_token_id).cpu()[candidates]
            seconds[name] += time.process_time() - start
            correlations[name].append(spearman(scores, truth))
            falls[name].append(removal(model, example, scores, mask_token_id))
    by_method = {name: torch.tensor(found, dtype=torch.double).nan_to_num() for name, found in correlations.items()}
    first = next(iter(by_method.values()))
    results = {}
    for name, found in by_method.items():
        removed = torch.stack(falls[name])
        results[name] = {
            "spearman": found.mean().item(),
            "interval": bootstrap_interval(found),
            "below the first": (first - found).mean().item(),
            "below the first, interval": bootstrap_interval(first - found),
            "removal": {
                str(fraction): {"fall": column.mean().item(), "interval": bootstrap_interval(column)}
                for fraction, column in zip(FRACTIONS, removed.T)
            },
            "processor seconds": seconds[name] / len(examples),
        }
    return results
