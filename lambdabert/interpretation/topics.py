"""Which texts are alike: nearest neighbours by the content lambda of each layer, next to the mean hidden state."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .features import mean_of_tokens
from .intervals import bootstrap_interval
from .traces import trace_lambdas


@dataclass
class Neighbours:
    """Nearest neighbours by one row of features.

    Attributes:
        row: the features: "content lambda i", "content lambda, all layers" or "mean hidden state i".
        nearest: int [S, T], the texts nearest to each, nearest first; texts count from 0.
        cosines: [S, T]
        same_topic: share of the texts whose nearest neighbour has their topic; None without topics.
        interval: of that, 95 %, bootstrap over topics.
    """

    row: str
    nearest: torch.Tensor
    cosines: torch.Tensor
    same_topic: float | None = None
    interval: tuple[float, float] | None = None


def topic_features(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Features [S, F] of the S texts of all batches, by the row's name.

    "mean hidden state i" is the mean over real tokens of layer i's output, the rest is λc; layers count from 0.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.
        batches: what its tokenizer returns with `return_tensors="pt"`, [B, N] each.

    Raises:
        ValueError: as in `trace_lambdas`.
    """
    encoder: Any = model.base_model
    rows: dict[str, list[torch.Tensor]] = {}
    for inputs in batches:
        trace = trace_lambdas(encoder, inputs)
        contents = [layer.content.flatten(1) for layer in trace.layers]
        found = {f"content lambda {i}": content for i, content in enumerate(contents)}
        found["content lambda, all layers"] = torch.cat([F.normalize(content, dim=-1) for content in contents], 1)
        for i, states in enumerate(trace.outputs.hidden_states[1:]):
            found[f"mean hidden state {i}"] = mean_of_tokens(states, trace.token_mask)
        for name, features in found.items():
            rows.setdefault(name, []).append(features.float().cpu())
    return {name: torch.cat(found) for name, found in rows.items()}


def neighbours(
    features: Mapping[str, torch.Tensor], topics: Sequence[Any] | None = None, count: int = 5
) -> list[Neighbours]:
    """The nearest neighbours of every text by cosine, for each row of features.

    The mean over the texts is taken off first: most of a content lambda is common to all texts.

    Args:
        features: by name, [S, F].
        topics: [S], what a text is about, for example its article. None = unknown.
        count: neighbours of each text.

    Raises:
        ValueError: fewer than 3 texts, other than S topics, no neighbour, features that are not finite or the same for
            all texts.
    """
    found = []
    topics = None if topics is None else as_list(topics)
    number_of = {topic: number for number, topic in enumerate(dict.fromkeys(topics or ()))}
    for name, rows in features.items():
        texts = len(rows)
        if texts < 3:
            raise ValueError(f"features have {texts} texts, of which none is nearer than another; give 3 or more.")
        if not 1 <= count < texts:
            raise ValueError(f"count={count}: each text has {texts - 1} others; give 1 to {texts - 1}.")
        if topics is not None and len(topics) != texts:
            raise ValueError(f"topics has {len(topics)} entries for {texts} texts; give one for each.")
        if not rows.isfinite().all():
            raise ValueError(f"features[{name!r}] holds numbers that are not finite; leave these texts out.")
        if (rows == rows[0]).all():
            raise ValueError(f"features[{name!r}] are the same for all texts, so that none is nearer; leave them out.")
        directions = F.normalize(rows.double() - rows.double().mean(0), dim=-1)
        cosines = (directions @ directions.T).fill_diagonal_(-torch.inf)
        nearest = cosines.topk(count)
        row = Neighbours(name, nearest.indices, nearest.values)
        if topics is not None:
            numbers = torch.tensor([number_of[topic] for topic in topics])
            same = (numbers[nearest.indices[:, 0]] == numbers).double()
            row.same_topic, row.interval = same.mean().item(), bootstrap_interval(same, numbers)
        found.append(row)
    return found


def as_list(given: Any) -> list[Any]:
    """Topics or labels as values that are alike where they are equal; those of a tensor or an array are not."""
    values = given.tolist() if hasattr(given, "tolist") else given
    return [value.item() if hasattr(value, "item") else value for value in values]


def chance(topics: Sequence[Any]) -> float:
    """The share of texts that would have a neighbour of their topic if neighbours were drawn at random."""
    topics = as_list(topics)
    if len(topics) < 2:
        raise ValueError(f"topics has {len(topics)} entries, and a text without another has no neighbour; give more.")
    counts = Counter(topics).values()
    return sum(count * (count - 1) for count in counts) / (len(topics) * (len(topics) - 1))
