"""What fine-tuning makes of a LambdaBERT, beside BERT and beside weights that were never pretrained.

    python -m benchmarks.finetuning benchmarks/recipes/finetuning/wikipedia_small.json --output runs/finetuning

Each run is one of the scripts in examples/, as a user would start it. The recipe maps `tasks` to

    "Banking77": {"example": "text_classification", "metric": "test_accuracy", "options": {"num_train_epochs": 2}}

where `options` are those of the script, and `models` to

    "LambdaBERT": {"model": "checkpoints/wikipedia-small", "options": {"learning_rate": 1e-3}}

`random` true keeps a model's config and tokenizer and starts from new weights. A seed decides the new weights and the
order of the data. The seeds are run one after the other, each for all models, so that an interrupted benchmark compares
like with like. Each finished run is kept in the output folder and not run again; `--models` picks some, and the table
shows every model of which each task has a run. Nothing is trained unless the tests of the lambda layer pass.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, set_seed

from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.environment import environment
from benchmarks.report import markdown_table, spread
from benchmarks.runs import Fields, Recipe, Run, RunFolder, digest, one_line_errors, read_recipe, seeds

EXAMPLES = ("text_classification", "token_classification")
FIELDS = Fields(frozenset({"tasks"}), frozenset())
TASK_FIELDS = Fields(frozenset({"example", "metric", "options"}), frozenset())
MODEL_FIELDS = Fields(frozenset({"model", "options"}), frozenset({"random"}))


def check_recipe(recipe: Recipe, file: Path) -> None:
    """Raises ValueError if a task lacks a field or names no example script."""
    for name, task in recipe["tasks"].items():
        TASK_FIELDS.check(task, f"{file}: task {name!r}")
        if task["example"] not in EXAMPLES:
            raise ValueError(f"{file}: task {name!r}: example={task['example']!r}; use one of {', '.join(EXAMPLES)}.")


def check_models(recipe: Recipe, names: Sequence[str]) -> None:
    """Raises ValueError if a model is not a folder."""
    for name in names:
        folder = Path(recipe["models"][name]["model"])
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name!r}: {folder} is not the folder of a model; pretrain or convert it first.")


def new_weights(model: str, seed: int, folder: Path) -> str:
    """Writes a model of the same config with new weights, and the tokenizer; returns its folder."""
    set_seed(seed)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def flags(options: dict[str, Any]) -> list[str]:
    """Options of a command as its arguments."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def fine_tune(recipe: Recipe, task: str, name: str, seed: int, work: Path) -> Run:
    """Runs a script; returns what it found on each split."""
    require_passing_tests(*LAYER_TESTS)
    settings, entry, taken_with = recipe["tasks"][task], recipe["models"][name], environment("datasets")
    model = new_weights(entry["model"], seed, work / "start") if entry.get("random") else entry["model"]
    options = {**settings["options"], **entry["options"], "model": entry["model"], "seed": seed}
    output = work / f"result_{time.time_ns()}"  # the script takes no folder that an interrupted run has written to
    start = time.process_time()
    with one_line_errors():
        found = importlib.import_module(f"examples.{settings['example']}").main(
            flags(options | {"model": model, "output_dir": str(output), "disable_tqdm": True})
        )
    return {
        "task": task,
        "model": name,
        "seed": seed,
        "options": options,
        "metrics": found,
        "processor_seconds": round(time.process_time() - start, 1),
        "environment": taken_with,
    }


def run_all(folder: RunFolder, names: Sequence[str]) -> dict[str, dict[str, list[Run]]]:
    """The runs of each task of each model, one a seed, unless they have been run."""
    recipe = folder.recipe
    runs: dict[str, dict[str, list[Run]]] = {name: {task: [] for task in recipe["tasks"]} for name in names}
    pending = [(seed, name) for name in names for seed in seeds(recipe, name)]
    for seed, name in sorted(pending, key=lambda item: item[0]):
        for task, settings in recipe["tasks"].items():
            run = folder.run(
                digest(task, settings, folder.settings(name), seed),
                f"{task}, {name}, seed {seed}",
                partial(fine_tune, recipe, task, name, seed),
            )
            runs[name][task].append(run)
    return runs


def table(recipe: Recipe, runs: dict[str, dict[str, list[Run]]]) -> str:
    """A row for each model: mean and standard deviation over seeds of each task's metric."""
    rows = []
    for name, tasks in runs.items():
        values = [[run["metrics"][recipe["tasks"][task]["metric"]] for run in found] for task, found in tasks.items()]
        rows.append([name, len(values[0]), *map(spread, values)])
    heads = [f"{task}, {settings['metric'].replace('_', ' ')}" for task, settings in recipe["tasks"].items()]
    return markdown_table(["model", "seeds", *heads], rows)


def parse_command(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--models", nargs="+", help="models of the recipe; default: all")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        recipe = read_recipe(options.recipe, FIELDS, MODEL_FIELDS)
        check_recipe(recipe, options.recipe)
        folder = RunFolder(options.output, recipe)
        names = folder.selected(options.models)
        check_models(recipe, [name for name in names if name not in folder.summary.get("runs", ())])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    runs = run_all(folder, names)
    folder.write_summary({"recipe": recipe, "runs": runs}, table(recipe, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
