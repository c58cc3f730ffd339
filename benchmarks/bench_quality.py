"""What a model learns from a fixed budget: LambdaBERT next to BERT of the same shape, or one setting next to another.

    python benchmarks/bench_quality.py benchmarks/quality/wikitext2.json --output results/wikitext2

The recipe maps `pretraining` to options of the pretraining command, which all models share (text, tokenizer, masks,
order of the data, optimizer, batch), and `models` to one entry each:

    "LambdaBERT": {"architecture": "lambdabert", "config": {...}, "learning_rates": [5e-4, 1e-3], "max_steps": 400}

`architecture` is "lambdabert", or "bert" for the `BertForMaskedLM` or `BertForPreTraining` of `transformers`;
`variant` names a change of `lambda_variants.py`; `options` are further options of the command for this model. `seeds`
lists the seeds; an entry may have its own. Each learning rate is tried with the first seed, and the one with the
lowest final validation MLM loss is run with the others. A seed decides the initial weights, the order of the data and
the training masks; the masks of validation and test text stay the same. Times are medians of training steps taken in
turns at the end. Each finished run is kept in the output folder and not run again, and so is a tokenizer that the
recipe trains. The test text (`test_file`) is evaluated once, at the end of a run, and shown for the runs of the best
rate only.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, set_seed

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from environment import environment
from lambda_variants import apply_variant, running_variant
from lambdabert.text.examples import count_tokens
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from run_language_modeling import Pretraining, parse_arguments, start_at_frequencies
from training_report import LAMBDA_FIELDS
from training_run import set_up_logging

DATA_SEED = 42  # of pairs and of evaluation masks


class NextSentenceBert(BertForPreTraining):
    """`BertForPreTraining` under the label name of either sentence task."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        next_sentence_label=None,
        sentence_order_label=None,
    ):
        return super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            labels=labels,
            next_sentence_label=sentence_order_label if next_sentence_label is None else next_sentence_label,
        )


def bert(config, objective: str):
    """BERT of the same width, depth, feed-forward size, vocabulary and dropout."""
    fields = {name: value for name, value in config.to_dict().items() if name in BertConfig().to_dict()}
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures", "auto_map")}
    heads = max(1, config.hidden_size // 64)
    fields |= {"num_attention_heads": heads, "attention_probs_dropout_prob": config.hidden_dropout_prob}
    return (BertForMaskedLM if objective == "mlm" else NextSentenceBert)(BertConfig(**fields))


def digest(*values) -> str:
    """A name for what depends on these JSON values alone."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def prepare(recipe: dict, name: str, learning_rate: float, seed: int, folder: Path) -> Pretraining:
    """Text, tokenizer and a new model, as the pretraining command makes them."""
    model = recipe["models"][name]
    options = {
        **recipe["pretraining"],
        "output_dir": str(folder),
        "config_overrides": {**recipe["pretraining"].get("config_overrides", {}), **model.get("config", {})},
        "learning_rate": learning_rate,
        "max_steps": model["max_steps"],
        "do_train": True,
        "do_eval": True,
        "save_strategy": "no",
        "seed": DATA_SEED,
        "data_seed": seed,
    }
    options |= model.get("options", {})
    tokenizer = folder.parent / f"tokenizer_{digest(recipe['pretraining'])}"
    if options.get("train_tokenizer") and tokenizer.exists():  # one for all models
        del options["train_tokenizer"]
        options["tokenizer_name"] = str(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(options, indent=2))
    model_args, data_args, training_args = parse_arguments([str(folder / "recipe.json")])
    set_up_logging(training_args)
    pretraining = Pretraining(model_args, data_args, training_args)
    if model_args.train_tokenizer:
        pretraining.tokenizer.save_pretrained(tokenizer)
    set_seed(seed)
    if model["architecture"] == "bert":
        pretraining.model = bert(pretraining.model.config, data_args.objective)
    else:
        pretraining.model = type(pretraining.model)(pretraining.model.config)
    start_at_frequencies(pretraining.model, count_tokens(pretraining.examples["train"], pretraining.tokenizer))
    apply_variant(pretraining.model, model.get("variant"))
    return pretraining


def run(recipe: dict, name: str, learning_rate: float, seed: int, folder: Path) -> dict:
    """Trains one model and evaluates it on the test text; returns the run's settings and curve."""
    pretraining = prepare(recipe, name, learning_rate, seed, folder)
    data_args = pretraining.data_args
    with running_variant(recipe["models"][name].get("variant")):
        trainer = pretraining.trainer()
        trainer.data_collator.seed = seed
        trainer.train()
        test = {}
        if "test_file" in recipe:
            rows = load_corpus(replace(data_args, validation_file=[recipe["test_file"]]), train=False)["validation"]
            examples, _ = prepare_examples(
                rows, pretraining.tokenizer, data_args.example_recipe(), seed=DATA_SEED, training=False
            )
            test = trainer.evaluate(examples, metric_key_prefix="test")
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
        "environment": environment("datasets"),
    }


def step_seconds(recipe: dict, names: list[str], output: Path, repeats: int = 15) -> dict[str, float]:
    """Median seconds of a training step of each model, the models taking turns step by step."""
    durations = {name: [] for name in names}
    trainers = {}
    for name in names:
        trainers[name] = trainer = prepare(recipe, name, 1e-4, 0, output / "work" / "timing").trainer()
        trainer.create_optimizer()
        trainer.model = trainer.accelerator.prepare(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
    batches = itertools.cycle(trainers[names[0]].get_train_dataloader())
    for batch in itertools.islice(batches, repeats):
        for name, trainer in trainers.items():
            with running_variant(recipe["models"][name].get("variant")):
                start = time.perf_counter()
                # the count of masked tokens, as in the Trainer's own loop
                trainer.training_step(trainer.model, batch, (batch["labels"] != -100).sum())
                trainer.optimizer.step()
                trainer.model.zero_grad()
                if trainer.args.device.type == "cuda":
                    torch.cuda.synchronize()
                durations[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in durations.items()}  # the first ones warm up


def final(result: dict) -> float:
    return result["curve"][-1]["eval_mlm_loss"]


def cached_run(recipe: dict, name: str, learning_rate: float, seed: int, output: Path) -> dict:
    model = {key: value for key, value in recipe["models"][name].items() if key not in ("learning_rates", "seeds")}
    file = output / "runs" / f"{digest(recipe['pretraining'], model, learning_rate, seed)}.json"
    result = json.loads(file.read_text()) if file.exists() else None
    if result is None or ("test_file" in recipe and not result["test"]):
        print(f"{name}, learning rate {learning_rate:g}, seed {seed}", flush=True)
        result = run(recipe, name, learning_rate, seed, output / "work" / file.stem)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(best: dict[str, list[dict]], seconds: dict[str, float], tested: bool) -> str:
    """A row for each model: mean and standard deviation over seeds."""
    lines = [
        "| model | parameters | learning rate | seeds | steps | tokens | seconds a step | valid MLM loss "
        "| valid accuracy | test MLM loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in best.items():
        last = [result["curve"][-1] for result in results]
        test = spread([result["test"]["test_mlm_loss"] for result in results]) if tested else ""
        lines.append(
            f"| {name} | {results[0]['parameters'] / 1e6:.2f} M | {results[0]['learning_rate']:g} | {len(results)} "
            f"| {last[0]['step']:,} | {last[0]['num_input_tokens_seen'] / 1e6:.2f} M "
            f"| {seconds[name]:.2f} "
            f"| {spread([record['eval_mlm_loss'] for record in last])} "
            f"| {spread([record['eval_mlm_accuracy'] for record in last])} | {test} |"
        )
    return "\n".join(lines) + "\n"


def plot_curves(best: dict[str, list[dict]], seconds: dict[str, float], file: Path):
    """Validation MLM loss over steps, tokens and time; the line is the mean over seeds, the band their range."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2 + 0.1 * len(best)), sharey=True, layout="constrained")
    for name, results in best.items():
        points = list(zip(*(result["curve"] for result in results), strict=True))
        losses = [[record["eval_mlm_loss"] for record in point] for point in points]
        steps = [point[0]["step"] for point in points]
        tokens = [statistics.mean(record["num_input_tokens_seen"] for record in point) / 1e6 for point in points]
        minutes = [step * seconds[name] / 60 for step in steps]
        for panel, places in zip(panels, (steps, tokens, minutes), strict=True):
            (line,) = panel.plot(places, [statistics.mean(values) for values in losses], label=name, marker=".")
            panel.fill_between(
                places, list(map(min, losses)), list(map(max, losses)), alpha=0.2, color=line.get_color()
            )
    for panel, label in zip(panels, ("steps", "million tokens", "minutes of training steps"), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation MLM loss (nats per masked token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_final(best: dict[str, list[dict]], file: Path):
    """Final validation MLM loss, a dot for each seed, against the mean of the first model."""
    figure, panel = plt.subplots(figsize=(8, 1 + 0.3 * len(best)), layout="constrained")
    for row, results in enumerate(best.values()):
        panel.plot([final(result) for result in results], [row] * len(results), "o", color="C0", alpha=0.7)
    panel.axvline(statistics.mean(map(final, next(iter(best.values())))), color="grey", linewidth=1)
    panel.set_yticks(range(len(best)), list(best))
    panel.invert_yaxis()
    panel.set_xlabel("final validation MLM loss (nats per masked token)")
    panel.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plots")
    parser.add_argument("--models", nargs="+", help="only these models of the recipe")
    options = parser.parse_args()
    recipe = json.loads(options.recipe.read_text())

    best, rates = {}, {}
    for name in options.models or recipe["models"]:
        first_seed, *other_seeds = recipe["models"][name].get("seeds", recipe["seeds"])
        sweep = [
            cached_run(recipe, name, rate, first_seed, options.output)
            for rate in recipe["models"][name]["learning_rates"]
        ]
        winner = min(sweep, key=final)
        rates[name] = {f"{result['learning_rate']:g}": final(result) for result in sweep}
        best[name] = [winner] + [
            cached_run(recipe, name, winner["learning_rate"], seed, options.output) for seed in other_seeds
        ]
    seconds = step_seconds(recipe, list(best), options.output)
    summary = {
        "environment": environment("datasets"),
        "recipe": recipe,
        "seconds a step": seconds,
        "valid MLM loss by learning rate, first seed": rates,
        "runs": best,
    }
    (options.output / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = table(best, seconds, "test_file" in recipe)
    print(text)
    (options.output / "table.md").write_text(text)
    plot_curves(best, seconds, options.output / "curves.png")
    plot_final(best, options.output / "final.png")


if __name__ == "__main__":
    main()
