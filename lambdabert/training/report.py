"""What people see of a run: the summary at its start, and metrics, curves and model card at its end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    TrainerState,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from lambdabert.text.arguments import TextArguments
from lambdabert.text.examples import count_tokens
from lambdabert.text.preparation import PreparationSummary
from lambdabert.training.settings import examples_of_a_step, with_earlier_values
from modeling_lambdabert import LambdaBertForMaskedLM

History = list[dict[str, float]]

RECIPE_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "seed",
)
LAMBDA_FIELDS = (
    "num_lambda_queries",
    "key_depth",
    "intra_depth",
    "local_context_size",
    "lambda_norm",
    "content_gain",
    "repetition_context_size",
    "position_embedding_type",
    "classifier_pooling",
)
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    *LAMBDA_FIELDS,
    "hidden_dropout_prob",
    "longest_sequence",
)


def describe_run(
    model: PreTrainedModel, summaries: Mapping[str, PreparationSummary], steps: int, args: TrainingArguments
) -> str:
    """The lines that a run starts with."""
    lines = [f"{type(model).__name__}: {model.num_parameters():,} parameters"]
    lines += [f"{split}: {summary}" for split, summary in summaries.items()]
    lines += [
        f"{steps:,} steps of {examples_of_a_step(args)} examples on {args.world_size} process(es), {args.device}",
        f"output folder: {args.output_dir}",
    ]
    return "\n".join(lines)


def unigram_baseline(train_examples: Any, eval_examples: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How well token frequencies alone predict the evaluation text, in nats per token.

    Of each text, the first 200,000 examples are counted, special tokens left out.

    Args:
        train_examples: prepared training text, a stream of it, or None.
        eval_examples: prepared evaluation text.
        tokenizer: the tokenizer of both.

    Returns:
        `unigram_entropy`: entropy of the evaluation text's own frequencies, which no context-free prediction beats;
        `unigram_cross_entropy`: its cross entropy under the frequencies of the training text, each count plus one
        (missing if the training text is streamed or there is none).
    """
    counts = count_tokens(eval_examples, tokenizer)
    frequencies = counts / counts.sum()
    seen = frequencies > 0
    baseline = {"unigram_entropy": float(-(frequencies[seen] * np.log(frequencies[seen])).sum())}
    if hasattr(train_examples, "__len__"):
        smoothed = count_tokens(train_examples, tokenizer) + 1
        baseline["unigram_cross_entropy"] = float(-(frequencies * np.log(smoothed / smoothed.sum())).sum())
    return baseline


def curve(history: History, name: str, axis: str) -> tuple[list[float], list[float]]:
    """Values of `axis` and of `name` in the records that have the latter."""
    records = [record for record in history if name in record]
    return [record[axis] for record in records], [record[name] for record in records]


def plot_curves(
    history: History, file: str | Path, loss: str = "mlm_loss", label: str = "MLM loss (nats per masked token)"
) -> None:
    """Draws a loss of training and validation over steps and over time, if there is anything to draw."""
    names = {loss: "training", f"eval_{loss}": "validation"}
    drawn = {name: split for name, split in names.items() if curve(history, name, "step")[0]}
    if not drawn:
        return
    longest = max(record["seconds"] for record in history if "seconds" in record)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for name, split in drawn.items():
        marker = "o" if name.startswith("eval") else None
        over_steps.plot(*curve(history, name, "step"), label=split, marker=marker, markersize=3)
        times, values = curve(history, name, "seconds")
        over_time.plot([time / seconds for time in times], values, label=split, marker=marker, markersize=3)
    over_steps.set(xlabel="steps", ylabel=label)
    over_time.set(xlabel=f"time ({unit})")
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=150)


def training_summary(history: History) -> dict[str, float]:
    """Steps and time of the whole run, from the Trainer's log.

    Its tokens per second are those since it was last resumed, and count the time of evaluations and checkpoints, too.
    """
    last = {name: value for record in history for name, value in record.items()}
    names = ("step", "epoch", "seconds", "mlm_loss", "loss", "num_input_tokens_seen", "train_tokens_per_second")
    return {name: last[name] for name in names if name in last}


def metrics_report(
    model: PreTrainedModel,
    summaries: Mapping[str, PreparationSummary],
    history: History,
    metrics: Mapping[str, float],
    evaluated: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """All numbers of a run, as JSON values.

    Args:
        model: what was trained or evaluated.
        summaries: of the prepared texts.
        history: the Trainer's log.
        metrics: the final evaluation's.
        evaluated: which model on which text, where nothing was trained.
    """
    of_run = {"train": training_summary(history)} if evaluated is None else {"evaluated": dict(evaluated)}
    return {
        **of_run,
        "eval": dict(metrics),
        "model": {"parameters": model.num_parameters()},
        "data": {split: vars(replace(each, cache_directory=None)) for split, each in summaries.items()},
    }


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def quoted(text: str) -> str:
    """A text as a string in Python code."""
    return json.dumps(text, ensure_ascii=False)


def read_template(package: str, name: str) -> str:
    """A template file that lies beside the modules of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def describe_data(data_args: TextArguments, summaries: Mapping[str, PreparationSummary]) -> str:
    """The data of a model card. It may be published: files are named without their folders, and no cache."""
    files: Sequence[str] = data_args.train_file or ()
    name = ", ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
    source = name or data_args.corpus or ", ".join(Path(file).name for file in files)
    return table(
        {"source": source, **{split: replace(each, cache_directory=None) for split, each in summaries.items()}}
    )


def describe_recipe(
    text: Mapping[str, Any],
    training_args: TrainingArguments,
    model: PreTrainedModel,
    state: TrainerState,
    earlier: Mapping[str, list[dict]],
) -> str:
    """The recipe of a model card: steps, the Trainer's settings and the config, with the values that some had before.

    Args:
        text: options of how the text was prepared.
        training_args: the Trainer's arguments.
        model: the trained model.
        state: the Trainer's at the end.
        earlier: as of `settings.earlier_values`.
    """
    settings = {name: getattr(training_args, name) for name in RECIPE_FIELDS}
    settings["lr_scheduler_type"] = SchedulerType(settings["lr_scheduler_type"]).value
    settings = {name: with_earlier_values(value, earlier.get(name)) for name, value in settings.items()}
    config = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    return table({"steps": state.global_step, **text, **settings, **config})


def describe_metrics(report: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of a model card, from `metrics_report`."""
    return table({name: f"{value:.4g}" for name, value in {**report["train"], **report["eval"]}.items()})


def top_predictions(folder: str, sentence: str, count: int = 5) -> str:
    """The most likely words for the mask in a sentence, by the model saved in `folder`, one a line."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    fill = pipeline(
        "fill-mask",
        model=LambdaBertForMaskedLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    predictions = fill(sentence, top_k=count)
    return "\n".join([sentence, *(f"  {p['score']:6.1%}  {p['token_str']}" for p in predictions)])
