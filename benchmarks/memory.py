"""What a content lambda can hold: small tasks whose answer lies beyond the reach of the position lambdas.

    python -m benchmarks.memory --output memory.json

A text is `LENGTH` random tokens. Its first token asks, the model answers there, and everything that it needs stands
further away than position lambdas reach through all layers:

- `recall N`: N pairs of a key and a value, next to each other, stand somewhere in the text; the second token names one
  of the keys, and the answer is its value, of 16;
- `count`: how often one token occurs, from 0 to 15 times;
- `majority`: which of 4 tokens, of which the whole text consists, is the most frequent;
- `topic`: which of 16 distributions a third of the tokens comes from;
- `order`: which of two tokens, each of which occurs once, comes first.

LambdaBERT by its settings, and BERT of the same width and depth, are trained from new weights on texts that are never
seen twice, at each rate of `RATES` with the first seed, and with all seeds at the better one; shown is the accuracy on
`TEST` texts. The output is written after each run, and a run that it has is not run again. A figure beside it, of the
same name, shows the accuracies.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import BertConfig, BertForTokenClassification, get_linear_schedule_with_warmup, set_seed

from benchmarks.environment import add_environment, environment
from benchmarks.lambda_variants import running_variant
from benchmarks.peers import bert_config
from benchmarks.report import markdown_table, spread, write_json
from configuration_lambdabert import LambdaBertConfig
from modeling_lambdabert import LambdaBertForTokenClassification

LENGTH = 128
LAYERS, SCOPE = 2, 7
REACH = LAYERS * (SCOPE // 2)  # places to each side, through all layers
FIRST = REACH + 2  # the first place that the answer may depend on; the question takes two
ASK, MARK = 1, 2  # tokens
ANSWERS = 16  # of every task
KEYS, VALUES, FILLERS = range(8, 24), range(24, 40), range(40, 104)
VOCABULARY = FILLERS.stop

STEPS, BATCH, TEST = 800, 32, 1024
RATES = (1e-3, 3e-3)

Texts = tuple[torch.Tensor, torch.Tensor]  # token ids [B, LENGTH] and answers [B]


def fillers(generator: torch.Generator, batch: int) -> torch.Tensor:
    """Texts [B, LENGTH] of random fillers that begin with the asking token."""
    ids = torch.randint(FILLERS.start, FILLERS.stop, (batch, LENGTH), generator=generator)
    ids[:, 0] = ASK
    return ids


def places(generator: torch.Generator, batch: int, count: int, step: int = 1) -> torch.Tensor:
    """Random places [B, count] beyond the reach of the question, all different and a multiple of `step` apart."""
    spots = torch.rand(batch, (LENGTH - FIRST) // step, generator=generator).argsort(dim=1)[:, :count]
    return FIRST + step * spots


def recall(generator: torch.Generator, batch: int, pairs: int) -> Texts:
    ids = fillers(generator, batch)
    keys = torch.rand(batch, len(KEYS), generator=generator).argsort(dim=1)[:, :pairs]
    values = torch.randint(ANSWERS, (batch, pairs), generator=generator)
    spots = places(generator, batch, pairs, step=2)
    ids.scatter_(1, spots, KEYS.start + keys)
    ids.scatter_(1, spots + 1, VALUES.start + values)
    ids[:, 1] = KEYS.start + keys[:, 0]
    return ids, values[:, 0]


def count(generator: torch.Generator, batch: int) -> Texts:
    ids = fillers(generator, batch)
    counts = torch.randint(ANSWERS, (batch,), generator=generator)
    spots = places(generator, batch, ANSWERS - 1)
    marks = torch.where(torch.arange(ANSWERS - 1) < counts[:, None], MARK, ids.gather(1, spots))
    return ids.scatter(1, spots, marks), counts


def majority(generator: torch.Generator, batch: int) -> Texts:
    ids, kinds = fillers(generator, batch), 4
    text = torch.randint(kinds, (batch, LENGTH - FIRST), generator=generator)
    text[:, 0] = nn.functional.one_hot(text, kinds).sum(1).argmax(1)  # breaks ties
    ids[:, FIRST:] = FILLERS.start + text
    return ids, nn.functional.one_hot(text, kinds).sum(1).argmax(1)


def topic(generator: torch.Generator, batch: int) -> Texts:
    ids, topics = fillers(generator, batch), torch.randint(ANSWERS, (batch,), generator=generator)
    fixed = torch.Generator().manual_seed(0)  # the topics are the same in every text
    distributions = torch.rand(ANSWERS, len(FILLERS), generator=fixed) ** 8
    drawn = torch.multinomial(distributions[topics], LENGTH - FIRST, replacement=True, generator=generator)
    from_topic = torch.rand(batch, LENGTH - FIRST, generator=generator) < 1 / 3
    ids[:, FIRST:] = torch.where(from_topic, FILLERS.start + drawn, ids[:, FIRST:])
    return ids, topics


def order(generator: torch.Generator, batch: int) -> Texts:
    ids, answers = fillers(generator, batch), torch.randint(2, (batch,), generator=generator)
    spots = places(generator, batch, 2).sort(dim=1).values
    marks = torch.stack((answers, 1 - answers), dim=1) + MARK
    return ids.scatter(1, spots, marks), answers


TASKS: dict[str, Callable[[torch.Generator, int], Texts]] = {
    **{f"recall {n}": lambda generator, batch, n=n: recall(generator, batch, n) for n in (1, 4, 16)},  # type: ignore[misc]
    "count": count,
    "majority": majority,
    "topic": topic,
    "order": order,
}


def lambda_config(**fields: Any) -> LambdaBertConfig:
    shape = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=LAYERS, intermediate_size=256)
    task = dict(max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, num_labels=ANSWERS)
    own = dict(num_lambda_queries=4, local_context_size=SCOPE, position_embedding_type="none")
    values: dict[str, Any] = {**shape, **task, **own, **fields}
    return LambdaBertConfig(**values)


def four_headed_bert() -> BertConfig:
    """A BERT of the same shape, with as many heads as LambdaBERT has queries."""
    config = bert_config(lambda_config())
    config.num_attention_heads = 4
    return config


# config and variant
MODELS: dict[str, tuple[Any, str | None]] = {
    "K=8": (lambda_config(), None),
    "K=8, content gain": (lambda_config(content_gain=True), None),
    "K=8, content gain, repetitions": (
        lambda_config(content_gain=True, repetition_context_size=5),
        None,
    ),
    "K=32": (lambda_config(key_depth=32), None),
    "K=32, content gain": (lambda_config(key_depth=32, content_gain=True), None),
    "K=128, content gain": (lambda_config(key_depth=128, content_gain=True), None),
    "K=32, position embeddings": (lambda_config(key_depth=32, position_embedding_type="absolute"), None),
    "K=32, position only": (lambda_config(key_depth=32), "position only"),
    "BERT": (four_headed_bert(), None),
}


def new_model(name: str, seed: int) -> nn.Module:
    set_seed(seed)
    config = MODELS[name][0]
    is_lambda = isinstance(config, LambdaBertConfig)
    return LambdaBertForTokenClassification(config) if is_lambda else BertForTokenClassification(config)


def answer_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, ANSWERS] at the asking token of ids [B, LENGTH]."""
    return model(ids).logits[:, 0]


def accuracy(model: nn.Module, task: str) -> float:
    """Share of `TEST` texts whose answer is the likeliest; they are the same for every model."""
    ids, answers = TASKS[task](torch.Generator().manual_seed(10**6), TEST)
    model.eval()
    with torch.inference_mode():
        return (answer_logits(model, ids).argmax(1) == answers).float().mean().item()


def train(name: str, task: str, rate: float, seed: int) -> float:
    """The test accuracy of a new model that was trained on a task."""
    model, generator = new_model(name, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    with running_variant(MODELS[name][1]):
        for _ in range(STEPS):
            ids, answers = TASKS[task](generator, BATCH)
            nn.functional.cross_entropy(answer_logits(model, ids), answers).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return accuracy(model, task)


def run(
    record: dict[str, Any], file: Path, name: str, task: str, seeds: Sequence[int], taken_with: dict[str, Any]
) -> None:
    """All runs of a model on a task; `record` and file grow by each."""
    found = record["accuracy"].setdefault(task, {}).setdefault(name, {})

    def of(rate: float, seed: int) -> float:
        key = f"{rate:g}, seed {seed}"
        if key not in found:
            found[key] = train(name, task, rate, seed)
            add_environment(record, taken_with)
            print(f"{task}, {name}, {key}: {found[key]:.3f}", flush=True)
            write_json(file, record)
        return found[key]

    best = max(RATES, key=lambda rate: of(rate, seeds[0]))
    record["best"].setdefault(task, {})[name] = [of(best, seed) for seed in seeds]


def table(best: dict[str, dict[str, list[float]]]) -> str:
    """A row for each model, a column for each task; empty where it was not run."""
    names = [name for name in MODELS if any(name in models for models in best.values())]
    rows = [
        [name, *(spread(found) if (found := models.get(name)) else "" for models in best.values())] for name in names
    ]
    return markdown_table(["model", *best], rows)


def draw(best: dict[str, dict[str, list[float]]], file: Path) -> None:
    """A panel for each task: the accuracy of each model, a dot for each seed."""
    figure = Figure(figsize=(2.2 * len(best), 3.2), layout="constrained")
    panels = figure.subplots(1, len(best), sharey=True, squeeze=False)[0]
    names = [name for name in MODELS if any(name in models for models in best.values())]
    for panel, (task, models) in zip(panels, best.items(), strict=True):
        for name, accuracies in models.items():
            row = names.index(name)
            panel.plot(accuracies, [row] * len(accuracies), "o", color=f"C{int(name == 'BERT')}")
            panel.plot(statistics.mean(accuracies), row, "|", color="black", markersize=14)
        panel.set(title=task, xlim=(-0.03, 1.03), xlabel="accuracy")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=110)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    record: dict[str, Any] = {"steps": STEPS, "accuracy": {}, "best": {}}
    if options.output.exists():
        record = json.loads(options.output.read_text(encoding="utf-8"))
    taken_with = environment()
    for task in options.tasks:
        for name in options.models:
            run(record, options.output, name, task, options.seeds, taken_with)
    write_json(options.output, record)
    print(table(record["best"]))
    draw(record["best"], options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
