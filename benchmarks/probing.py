"""What linear probes read from content lambdas, next to what these must beat, and to a BERT's attention weights.

    python -m benchmarks.probing probing/sentence/*.tsv --model checkpoints/wikipedia-small --output probes.json
    python -m benchmarks.probing probing/sentence/*.tsv --model STUDENT --bert TEACHER --output probes.json

Tasks are files for `interpret_lambdas.py probe`, of which at most `--examples` of train, dev and test are drawn, the
same for every row. With `--bert`, of which the model is the conversion, its attention weights
(attention_features.py) and hidden states are rows as well, and all rows are probed at equal dimension only.

A family is one kind of features; its pick is the layer, or all of them, with the fewest bits on dev, so that no layer
is chosen on test. Families are compared by their picks at equal dimension, on the same examples. A family is encoded
where its pick is above bag of words and above the picks of all random models, each by more than the interval.

The output is written after each task, and a task that it has is not run again. A figure beside it, of the same name,
shows every layer.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import BertModel

from benchmarks.attention_features import bert_rows
from benchmarks.environment import add_environment, environment
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.interpretation import ProbeResult, Task, difference, is_encoded, probe_rows, read_task, task_features
from lambdabert.interpretation.features import RANDOM_MODELS
from lambdabert.interpretation.intervals import FEWEST_GROUPS
from lambdabert.interpretation.loading import LoadedModel
from lambdabert.interpretation.probes import SPLITS
from lambdabert.interpretation.tables import read_columns
from lambdabert.interpretation.tasks import NO_TARGET, equal_dimension, summary

MOST = (600, 150, 400)  # examples of train, dev and test
FAMILIES = (
    "content lambda",
    "random-key content lambda",
    "mean value",
    "mean hidden state",
    "attention",
    "BERT's mean hidden state",
)
SINGLE = ("majority", "length", "bag of words", "mean embedding")
COMPARED = (
    *(("content lambda", other) for other in (*SINGLE[1:], *FAMILIES[1:])),
    ("attention", "bag of words"),
    ("attention", "length"),
    ("attention", "BERT's mean hidden state"),
)
COLUMNS = 4  # panels beside each other in the figure


def sample_task(file: Path, most: Mapping[str, int], seed: int) -> Task:
    """A task of at most so many examples of each split, drawn at random.

    Where a single target has no second example, which could share its name with no other, it is left out.
    """
    columns, _ = read_columns(file, f"task={file}")
    splits = columns.get("split", [])
    of_rows = columns.get("target", [NO_TARGET] * len(splits))
    kept: list[int] = []
    for split, count in most.items():
        of_split = [i for i, other in enumerate(splits) if other == split]
        kept += random.Random(seed).sample(of_split, min(count, len(of_split)))
    targets = Counter(of_rows[i] for i in kept)
    single = [i for i in kept if targets[of_rows[i]] == 1 and NO_TARGET not in targets]
    if len(single) == 1:
        kept.remove(single[0])
    with tempfile.TemporaryDirectory() as folder:
        sampled = Path(folder) / file.name
        rows = [[column, *(values[i] for i in kept)] for column, values in columns.items()]
        sampled.write_text("\n".join("\t".join(row) for row in zip(*rows)) + "\n", encoding="utf-8")
        return read_task(sampled)


def features_of_bert(bert: BertModel, loaded: LoadedModel, task: Task) -> dict[str, torch.Tensor]:
    """`bert_rows` of a task's texts, in their order; the conversion has its BERT's tokenizer."""
    order = sorted(range(len(task.texts)), key=lambda text: len(task.texts[text]))
    rows = bert_rows(bert, loaded.batches([task.texts[text] for text in order], "text"))
    place = torch.tensor(order).argsort()
    return {name: row[place] for name, row in rows.items()}


def picks(found: Mapping[str, ProbeResult]) -> dict[str, str]:
    """The row of each family, and of each random model's, that has the fewest bits on dev."""
    chosen = {}
    for prefix in ("", *(f"random {kind} {i}, " for kind in ("model", "BERT") for i in range(RANDOM_MODELS))):
        for family in FAMILIES:
            layers = [name for name in found if name.startswith((f"{prefix}{family} ", f"{prefix}{family}, "))]
            if layers:
                chosen[prefix + family] = min(layers, key=lambda name: found[name].dev_bits)
    return chosen


def compare(found: Mapping[str, ProbeResult]) -> dict[str, Any]:
    """Families by their picks: accuracy, whether encoded, and differences."""
    chosen = picks(found)
    of_row = {**{name: found[name] for name in SINGLE}, **{name: found[pick] for name, pick in chosen.items()}}
    families: dict[str, Any] = {}
    for family in FAMILIES:
        if family not in chosen:
            continue
        random_models = [of_row[name] for name in chosen if name.startswith("random ") and name.endswith(f", {family}")]
        families[family] = {
            "pick": chosen[family],
            "accuracy": of_row[family].accuracy,
            "interval": of_row[family].interval,
            "test groups": of_row[family].test_groups,
            "selectivity": of_row[family].selectivity,
            "codelength": of_row[family].codelength,
            "random models": [result.accuracy for result in random_models],
            "encoded": is_encoded(of_row[family], found["bag of words"], random_models) if random_models else None,
        }
    differences = {}
    for first, second in COMPARED:
        if first in of_row and second in of_row:
            gain, interval = difference(of_row[first], of_row[second])
            differences[f"{first} - {second}"] = {"difference": gain, "interval": interval}
    return {"families": families, "differences": differences}


def measure(task: Task, loaded: LoadedModel, bert: BertModel | None) -> dict[str, Any]:
    """Everything about one task."""
    features = task_features(loaded, task)
    if bert is not None:
        features |= features_of_bert(bert, loaded, task)
    small = probe_rows(task, features, equal_dimension(features))
    rows = {name: {"equal dimension": summary(name, small)} for name in features}
    if bert is None:
        wide = {name: row for name, row in features.items() if not name.startswith("random ")}
        full = probe_rows(task, wide)
        for name in wide:
            rows[name]["full"] = summary(name, full)
    counts = {split: task.splits.count(split) for split in SPLITS}
    return {"classes": len(set(task.labels)), "examples": counts, "rows": rows, **compare(small)}


def draw(tasks: Mapping[str, Any], file: Path) -> None:
    """Accuracy by layer at equal dimension, a panel for each task; what has no layers is a horizontal line."""
    lines = -(-len(tasks) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.5 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for panel, (name, task) in zip(panels, tasks.items()):
        rows = {row: sizes["equal dimension"] for row, sizes in task["rows"].items()}
        has_intervals = task["families"]["content lambda"]["test groups"] >= FEWEST_GROUPS
        layers = sum(row.startswith("mean hidden state") for row in rows)
        for number, row in enumerate(SINGLE):
            style = (":", "-.", "--", "-")[number]
            panel.axhline(rows[row]["accuracy"], color="grey", linestyle=style, linewidth=1, label=row)
        for number, family in enumerate(FAMILIES):
            known = [i for i in range(layers) if f"{family} {i}" in rows]
            values = [rows[f"{family} {i}"]["accuracy"] for i in known]
            errors = [[abs(rows[f"{family} {i}"]["interval"][end] - value) for i, value in zip(known, values)]
                      for end in (0, 1)]  # fmt: skip
            if known and family != "random-key content lambda":
                bars = errors if has_intervals else None
                panel.errorbar(known, values, bars, color=f"C{number}", marker=".", linewidth=1, label=family)
            elif known:
                panel.plot(known, values, color=f"C{number}", marker="x", linewidth=1, label=family)
        for kind, family, number in (("model", "content lambda", 0), ("BERT", "attention", 4)):
            names = [[f"random {kind} {j}, {family} {i}" for j in range(RANDOM_MODELS)] for i in range(layers)]
            if names[0][0] in rows:
                means = [sum(rows[one]["accuracy"] for one in of_layer) / RANDOM_MODELS for of_layer in names]
                panel.plot(means, color=f"C{number}", linestyle=":", label=f"{family}, random weights")
        panel.set_title(name if has_intervals else f"{name} (no intervals: few targets)", fontsize=9)
        panel.set_xticks(range(layers))
        panel.set_xlabel("layer", fontsize=7, labelpad=0)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels[len(tasks) :]:
        panel.axis("off")
    figure.supylabel("accuracy on test, 95 % interval", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
    figure.savefig(file, dpi=110)


def show(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        shown = [f"{row} {task['rows'][row]['equal dimension']['accuracy']:.3f}" for row in SINGLE]
        for family, found in task["families"].items():
            encoded = {True: ", encoded", False: ", not encoded", None: ""}[found["encoded"]]
            shown.append(f"{found['pick']} {found['accuracy']:.3f}{encoded}")
        print(f"{name}: " + "; ".join(shown), flush=True)


def recorded(output: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The record that a run goes on with.

    Raises:
        ValueError: it is none of the same arguments.
    """
    record = json.loads(output.read_text(encoding="utf-8"))
    if record.get("arguments") != arguments:
        raise ValueError(f"output={output} has the arguments {record.get('arguments')}; name another file.")
    return record


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probing", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("tasks", type=Path, nargs="+", help="task files")
    parser.add_argument("--model", required=True, help="folder of a LambdaBERT with its tokenizer")
    parser.add_argument("--bert", help="folder of the BERT that it is the conversion of")
    parser.add_argument("--examples", type=int, nargs=3, default=MOST, help="most examples of train, dev and test")
    parser.add_argument("--seed", type=int, default=0, help="of the examples drawn")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        loaded = LoadedModel(options.model)
        bert = None
        if options.bert is not None:
            bert = BertModel.from_pretrained(options.bert, attn_implementation="eager", dtype=torch.float32).eval()
        most = dict(zip(SPLITS, options.examples))
        sampled = {file.stem: sample_task(file, most, options.seed) for file in options.tasks}
    arguments = {"model": options.model, "bert": options.bert, "seed": options.seed, "most": most}
    record: dict[str, Any] = {"arguments": arguments, "tasks": {}}
    if options.output.exists():
        with one_line_errors():
            record = recorded(options.output, arguments)
    taken_with = environment("scikit-learn")
    for name, task in sampled.items():
        if name not in record["tasks"]:
            record["tasks"][name] = measure(task, loaded, bert)
            add_environment(record, taken_with)
            write_json(options.output, record)
            show({name: record["tasks"][name]})
    draw(record["tasks"], options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
