"""What a model learns from a fixed budget: LambdaBERT next to BERT of the same shape, or one setting next to another.

    python -m benchmarks.quality benchmarks/recipes/quality/wikitext2.json --output runs/wikitext2

The recipe maps `pretraining` to options of the pretraining command, which all models share (text, tokenizer, masks,
order of the data, optimizer, batch), and `models` to one entry each:

    "LambdaBERT": {"architecture": "lambdabert", "config": {...}, "learning_rates": [5e-4, 1e-3], "max_steps": 400}

`architecture` is "lambdabert", or one of the encoders of `peers.py`: "bert", "modernbert", "convbert", "fnet", of the
same width, depth, feed-forward parameters, vocabulary and dropout, whose `config` may set only what they share with
LambdaBERT. `variant` names a change of `lambda_variants.py`; `options` are further options of the command for this
model. `seeds` lists the seeds; an entry may have its own. Each learning rate is tried with the first seed, and the one
with the lowest final validation MLM loss is run with the others. A seed decides the initial weights, the order of the
data and the training masks; the masks of validation and test text stay the same. The test text (`test_file`) is
evaluated once, at the end of a run, and shown for the runs of the best rate only.

A recipe whose options name a `model_name_or_path` goes on from that model instead of a new one.

Each finished run is kept in the output folder and not run again, and so is a tokenizer that the recipe trains; a run
that was interrupted goes on from its last evaluation. Times are medians of training steps, all models taking turns once
they are trained; they are taken again only when the summary covers other models than before. So a folder of finished
runs gives its tables and plots again without text. Nothing is trained or timed unless the tests of the lambda layer
pass.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import set_seed

from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.environment import add_environment, environment
from benchmarks.lambda_variants import BERT_VARIANTS, apply_variant, check_variant, running_variant
from benchmarks.peers import OF_PAIRS, PEERS, used_fields
from benchmarks.report import Curve, draw_curves, markdown_table, spread, write_json
from benchmarks.runs import (
    Fields,
    Recipe,
    Run,
    RunFolder,
    digest,
    one_line_errors,
    read_recipe,
    seeds,
    write_options,
)
from lambdabert.text.examples import count_tokens
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from lambdabert.training.checkpoints import CheckpointError, last_complete_checkpoint
from lambdabert.training.command import set_up_logging
from lambdabert.training.memory import keep_freed_memory
from lambdabert.training.models import start_at_frequencies
from lambdabert.training.report import LAMBDA_FIELDS
from run_language_modeling import Pretraining, parse_arguments

DATA_SEED = 42  # of pairs and of evaluation masks
# what the recipes mean that do not say otherwise: BERT's share of masked tokens, and the defaults of a config
UNCHANGED = {"mlm_probability": 0.15}
UNCHANGED_CONFIG = {
    "local_context_size": None,
    "position_embedding_type": "absolute",
    "content_gain": False,
    "repetition_context_size": None,
    "classifier_pooling": "cls",
}
TIMING = ("seconds a step", "seconds of each timed step")  # of a summary; earlier ones lack the second
ARCHITECTURES = ("lambdabert", *PEERS)
FIELDS = Fields(frozenset({"pretraining"}), frozenset({"test_file"}))
MODEL_FIELDS = Fields(
    frozenset({"architecture", "learning_rates", "max_steps"}), frozenset({"config", "variant", "options"})
)


def command_options(recipe: Recipe, name: str, learning_rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Options of the pretraining command for one run, which writes into `folder`."""
    model = recipe["models"][name]
    options = recipe["pretraining"] | model.get("options", {})
    evaluations = options.get("eval_steps")
    return {
        **UNCHANGED,
        **recipe["pretraining"],
        "output_dir": str(folder),
        "config_overrides": {
            **({} if options.get("model_name_or_path") else UNCHANGED_CONFIG),
            **recipe["pretraining"].get("config_overrides", {}),
            **model.get("config", {}),
        },
        "learning_rate": learning_rate,
        "max_steps": model["max_steps"],
        "do_train": True,
        "do_eval": True,
        "save_strategy": "steps",
        "save_steps": evaluations or model["max_steps"],
        "save_total_limit": 1,
        "seed": DATA_SEED,
        "data_seed": seed,
        **model.get("options", {}),
    }


def check_peer(recipe: Recipe, name: str) -> None:
    """Checks that a peer can do what its entry asks for.

    Raises:
        ValueError: it has no lambda layers to change, no such config field, no head for pairs, or no weights to go on
            from.
    """
    model, options = recipe["models"][name], recipe["pretraining"] | recipe["models"][name].get("options", {})
    architecture = model["architecture"]
    if model.get("variant") not in {None, *BERT_VARIANTS}:
        raise ValueError(
            f"model {name!r}: variant={model['variant']!r} changes lambda layers, which {architecture} lacks."
        )
    if unused := sorted(set(model.get("config", {})) - used_fields(architecture)):
        given = ", ".join(f"{field}={model['config'][field]!r}" for field in unused)
        raise ValueError(f"model {name!r}: config: {given} would change nothing of {architecture}; leave it out.")
    if options.get("objective") != "mlm" and architecture not in OF_PAIRS:
        raise ValueError(f"model {name!r}: {architecture} has no head for pairs of sentences; set objective to 'mlm'.")
    if options.get("model_name_or_path"):
        raise ValueError(f"model {name!r}: {architecture} cannot go on from model_name_or_path, a LambdaBERT.")


def check_models(recipe: Recipe, names: Sequence[str]) -> None:
    """Checks what can be known of models before the first of them is trained.

    Raises:
        ValueError: an architecture, variant or option does not exist, or no learning rate is given.
    """
    for name in names:
        model = recipe["models"][name]
        if model["architecture"] not in ARCHITECTURES:
            raise ValueError(f"model {name!r}: architecture={model['architecture']!r}; use one of {ARCHITECTURES}.")
        if not model["learning_rates"]:
            raise ValueError(f"model {name!r} has no learning_rates; give at least one.")
        check_variant(model.get("variant"))
        if model["architecture"] in PEERS:
            check_peer(recipe, name)
        with tempfile.TemporaryDirectory() as folder:
            options = command_options(recipe, name, model["learning_rates"][0], 0, Path(folder))
            parse_arguments([write_options(options, Path(folder))])


def prepare(folder: RunFolder, name: str, learning_rate: float, seed: int, work: Path) -> Pretraining:
    """Text, tokenizer and a new model, as the pretraining command makes them.

    Args:
        folder: of the recipe; keeps the tokenizer that it trains.
        name: of the model.
        learning_rate: the peak.
        seed: of weights and order of the data.
        work: what the run writes into.

    Raises:
        SystemExit: the code does not pass its tests, or the recipe asks for something that does not work.
    """
    require_passing_tests(*LAYER_TESTS)
    recipe = folder.recipe
    model = recipe["models"][name]
    options = command_options(recipe, name, learning_rate, seed, work)
    tokenizer = folder.path / f"tokenizer_{digest(recipe['pretraining'])}"
    if options.get("train_tokenizer") and tokenizer.exists():  # one for all models, or their masks would differ
        options = {
            key: value for key, value in options.items() if key not in ("train_tokenizer", "vocab_size", "lowercase")
        }
        options["tokenizer_name"] = str(tokenizer)
    with one_line_errors():
        model_args, data_args, training_args = parse_arguments([write_options(options, work)])
        set_up_logging(training_args)
        if training_args.device.type == "cpu":
            keep_freed_memory()  # as the command does
        pretraining = Pretraining(model_args, data_args, training_args)
        pretraining.prepare()
    if model_args.train_tokenizer:
        pretraining.tokenizer.save_pretrained(tokenizer)
    set_seed(seed)
    if not model_args.model_name_or_path:
        make = PEERS.get(model["architecture"], lambda config, objective: type(pretraining.model)(config))
        pretraining.model = make(pretraining.model.config, data_args.objective)
        start_at_frequencies(pretraining.model, count_tokens(pretraining.examples["train"], pretraining.tokenizer))
    apply_variant(pretraining.model, model.get("variant"))
    return pretraining


def train(folder: RunFolder, name: str, learning_rate: float, seed: int, work: Path) -> Run:
    """Trains one model and evaluates it on the test text; returns the run's settings and curve."""
    recipe, taken_with = folder.recipe, environment("datasets")
    pretraining = prepare(folder, name, learning_rate, seed, work)
    data_args = pretraining.data_args
    with running_variant(recipe["models"][name].get("variant")):
        checkpoints = work / "checkpoints"  # a folder of their own: the command refuses those that it did not write
        pretraining.training_args.output_dir = str(checkpoints)
        trainer = pretraining.trainer()
        trainer.data_collator.seed = seed
        checkpoint = last_complete_checkpoint(checkpoints)
        environments = work / "environments.json"  # of the processes that trained: an interrupted run has several
        record = json.loads(environments.read_text()) if checkpoint and environments.exists() else {}
        add_environment(record, taken_with)
        write_json(environments, record)
        try:
            trainer.train(str(checkpoint) if checkpoint else None)
        except CheckpointError as error:  # as of a rate at which it diverges
            of_run = f"{name}, learning rate {learning_rate:g}, seed {seed}"
            raise SystemExit(f"error: {of_run}: {error} To go on without it, leave it out of the recipe.") from None
        if trainer.stop.received:
            raise SystemExit(f"Stopped by {trainer.stop.received}; the same command goes on from here.")
        test = {}
        if "test_file" in recipe:
            rows = load_corpus(replace(data_args, validation_file=[recipe["test_file"]]), train=False)["validation"]
            examples, _ = prepare_examples(
                rows, pretraining.tokenizer, data_args.example_recipe(), seed=DATA_SEED, training=False
            )
            test = trainer.evaluate(examples, metric_key_prefix="test")
    shutil.rmtree(work)  # its checkpoints
    curve = [
        {name: record[name] for name in ("step", "num_input_tokens_seen", "seconds")}
        | {key: value for key, value in record.items() if key.startswith("eval_")}
        for record in trainer.state.log_history
        if "eval_mlm_loss" in record
    ]
    return {
        "model": name,
        "learning_rate": learning_rate,
        "seed": seed,
        "parameters": pretraining.model.num_parameters(),
        "lambda": {field: getattr(pretraining.model.config, field, None) for field in LAMBDA_FIELDS},
        "curve": curve,
        "test": test,
        **record,
    }


def time_steps(folder: RunFolder, names: Sequence[str], repeats: int = 15) -> dict[str, list[float]]:
    """Seconds of training steps of each model, the models taking turns step by step."""
    variants = {name: folder.recipe["models"][name].get("variant") for name in names}
    durations: dict[str, list[float]] = {name: [] for name in names}
    trainers = {}
    for name in names:
        trainers[name] = trainer = prepare(folder, name, 1e-4, 0, folder.path / "work" / "timing").trainer()
        trainer.create_optimizer()
        trainer.model = trainer.accelerator.prepare(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
    batches = itertools.cycle(trainers[names[0]].get_train_dataloader())
    for batch in itertools.islice(batches, repeats):
        for name, trainer in trainers.items():
            with running_variant(variants[name]):
                start = time.perf_counter()
                # the count of masked tokens, as in the Trainer's own loop
                trainer.training_step(trainer.model, batch, (batch["labels"] != -100).sum())
                trainer.optimizer.step()
                trainer.model.zero_grad()
                if trainer.args.device.type == "cuda":
                    torch.cuda.synchronize()
                durations[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in durations.items()}  # the first ones warm up


def final(run: Run) -> float:
    """The final validation MLM loss, nats per masked token."""
    return run["curve"][-1]["eval_mlm_loss"]


def run_key(recipe: Recipe, settings: dict[str, Any], learning_rate: float, seed: int) -> str:
    """The key of a run: `settings` are all of its model's entry but learning rates and seeds."""
    return digest(recipe["pretraining"], settings, learning_rate, seed)


def run_model(folder: RunFolder, name: str) -> tuple[list[Run], dict[str, float]]:
    """Runs a model, unless it has been run.

    Returns:
        The runs of the best learning rate, one for each seed, and the final validation loss of the first seed by rate.
    """
    recipe = folder.recipe

    def run(learning_rate: float, seed: int) -> Run:
        return folder.run(
            run_key(recipe, folder.settings(name), learning_rate, seed),
            f"{name}, learning rate {learning_rate:g}, seed {seed}",
            lambda work: train(folder, name, learning_rate, seed, work),
            complete=lambda run: "test_file" not in recipe or bool(run["test"]),
        )

    first_seed, *other_seeds = seeds(recipe, name)
    sweep = [run(rate, first_seed) for rate in recipe["models"][name]["learning_rates"]]
    winner = min(sweep, key=final)
    rates = {f"{run['learning_rate']:g}": final(run) for run in sweep}
    return [winner] + [run(winner["learning_rate"], seed) for seed in other_seeds], rates


def warn_of_other_masks(best: dict[str, list[Run]]) -> None:
    """Says on stderr that the losses cannot be compared: a tokenizer that was trained anew splits and masks anew."""
    masked = {run["curve"][-1]["eval_masked_tokens"] for runs in best.values() for run in runs}
    if len(masked) > 1:
        counts = ", ".join(map(str, sorted(masked)))
        print(f"warning: the runs were evaluated under different masks, of {counts} tokens.", file=sys.stderr)


def table(best: dict[str, list[Run]], seconds: dict[str, float], tested: bool) -> str:
    """A row for each model: mean and standard deviation over seeds."""
    head = ["model", "parameters", "learning rate", "seeds", "steps", "tokens", "seconds a step"]
    head += ["valid MLM loss", "valid accuracy", "test MLM loss"]
    rows = []
    for name, runs in best.items():
        last = [run["curve"][-1] for run in runs]
        rows.append(
            [
                name,
                f"{runs[0]['parameters'] / 1e6:.2f} M",
                f"{runs[0]['learning_rate']:g}",
                len(runs),
                f"{last[0]['step']:,}",
                f"{last[0]['num_input_tokens_seen'] / 1e6:.2f} M",
                f"{seconds[name]:.2f}",
                spread([record["eval_mlm_loss"] for record in last]),
                spread([record["eval_mlm_accuracy"] for record in last]),
                spread([run["test"]["test_mlm_loss"] for run in runs]) if tested else "",
            ]
        )
    return markdown_table(head, rows)


def plot_curves(best: dict[str, list[Run]], seconds: dict[str, float], file: Path) -> None:
    """Validation MLM loss over steps, tokens and time; the line is the mean over seeds, the band their range."""
    curves = {}
    for name, runs in best.items():
        points = list(zip(*(run["curve"] for run in runs), strict=True))
        steps = [point[0]["step"] for point in points]
        tokens = [statistics.mean(record["num_input_tokens_seen"] for record in point) / 1e6 for point in points]
        minutes = [step * seconds[name] / 60 for step in steps]
        losses = [[record["eval_mlm_loss"] for record in point] for point in points]
        curves[name] = Curve((steps, tokens, minutes), losses)
    figure = Figure(figsize=(14, 4.2 + 0.1 * len(best)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    draw_curves(panels, curves, ("steps", "million tokens", "minutes of training steps"))
    panels[0].set_ylabel("validation MLM loss (nats per masked token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)


def plot_final(best: dict[str, list[Run]], file: Path) -> None:
    """Final validation MLM loss, a dot for each seed, against the mean of the first model."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(best)), layout="constrained")
    panel = figure.subplots()
    for row, runs in enumerate(best.values()):
        panel.plot([final(run) for run in runs], [row] * len(runs), "o", color="C0", alpha=0.7)
    panel.axvline(statistics.mean(map(final, next(iter(best.values())))), color="grey", linewidth=1)
    panel.set_yticks(range(len(best)), list(best))
    panel.invert_yaxis()
    panel.set_xlabel("final validation MLM loss (nats per masked token)")
    panel.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plots of this recipe")
    parser.add_argument("--models", nargs="+", help="only these models of the recipe, and those recorded before")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        recipe = read_recipe(options.recipe, FIELDS, MODEL_FIELDS)
        folder = RunFolder(options.output, recipe, lists=("learning_rates", "seeds"))
        names = folder.selected(options.models)
        check_models(recipe, [name for name in names if name not in folder.summary.get("runs", ())])
    best, rates = {}, {}
    for name in names:
        best[name], rates[name] = run_model(folder, name)
    warn_of_other_masks(best)
    timing = {key: folder.summary[key] for key in TIMING if key in folder.summary}
    machine = folder.summary.get("environment")
    if list(timing.get("seconds a step", {})) != names:
        machine, steps = environment("datasets"), time_steps(folder, names)
        medians = {name: statistics.median(times) for name, times in steps.items()}
        timing = dict(zip(TIMING, (medians, steps), strict=True))
    seconds = timing["seconds a step"]
    summary = {
        "environment": machine,
        "recipe": recipe,
        **timing,
        "valid MLM loss by learning rate, first seed": rates,
        "runs": best,
    }
    folder.write_summary(summary, table(best, seconds, "test_file" in recipe))
    plot_curves(best, seconds, folder.path / "curves.png")
    plot_final(best, folder.path / "final.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
