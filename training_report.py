"""What people see of a pretraining run: the summary at its start, and metrics, curves and model card at its end."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import AutoTokenizer, SchedulerType, pipeline
from transformers.utils import logging as transformers_logging

from lambdabert.text.examples import count_tokens
from modeling_lambdabert import LambdaBertForMaskedLM

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags:
- lambdabert
- fill-mask
---

# {name}

A [LambdaBERT](https://arxiv.org/abs/2102.08602) encoder: BERT with lambda layers in place of self-attention, pretrained
by {objective}.

## Use

The folder carries its own code:

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained({folder}, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained({folder}, trust_remote_code=True)
print(pipeline("fill-mask", model=model.eval(), tokenizer=tokenizer)({sentence}))
```

## Data

{data}

## Recipe

{recipe}

## Metrics

{metrics}

![MLM loss over steps and time](training_curves.png)
"""

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
    "position_embedding_type",
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


def describe_run(model, summaries, steps, args):
    """The lines that a run starts with."""
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    lines = [f"{type(model).__name__}: {model.num_parameters():,} parameters"]
    lines += [f"{split}: {summary}" for split, summary in summaries.items()]
    lines += [
        f"{steps:,} steps of {examples} examples on {args.world_size} process(es), {args.device}",
        f"output folder: {args.output_dir}",
    ]
    return "\n".join(lines)


def unigram_baseline(train_examples, eval_examples, tokenizer):
    """How well token frequencies alone predict the evaluation text, in nats per token.

    Returns:
        `unigram_entropy`: entropy of the evaluation text's own frequencies, which no context-free prediction beats;
        `unigram_cross_entropy`: its cross entropy under the frequencies of the training text, each count plus one
        (missing where the training text is streamed or not there).
    """
    counts = count_tokens(eval_examples, tokenizer)
    frequencies = counts / counts.sum()
    seen = frequencies > 0
    baseline = {"unigram_entropy": float(-(frequencies[seen] * np.log(frequencies[seen])).sum())}
    if hasattr(train_examples, "__len__"):
        smoothed = count_tokens(train_examples, tokenizer) + 1
        baseline["unigram_cross_entropy"] = float(-(frequencies * np.log(smoothed / smoothed.sum())).sum())
    return baseline


def curve(history, name, axis):
    """Values of `axis` and of `name` in the records that have the latter."""
    records = [record for record in history if name in record]
    return [record[axis] for record in records], [record[name] for record in records]


def plot_curves(history, file, loss="mlm_loss", label="MLM loss (nats per masked token)"):
    """Draws a loss of training and validation over steps and over time; returns whether there was anything to draw."""
    names = {loss: "training", f"eval_{loss}": "validation"}
    drawn = {name: split for name, split in names.items() if curve(history, name, "step")[0]}
    if not drawn:
        return False
    longest = max(record["seconds"] for record in history if "seconds" in record)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    figure, (over_steps, over_time) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
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
    plt.close(figure)
    return True


def training_summary(history):
    """Steps, time and throughput of the whole run, from the Trainer's log."""
    last = {name: value for record in history for name, value in record.items()}
    names = ("step", "epoch", "seconds", "mlm_loss", "loss", "num_input_tokens_seen", "train_tokens_per_second")
    return {name: last[name] for name in names if name in last}


def table(values):
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def quoted(text: str) -> str:
    """A text as a string in Python code."""
    return json.dumps(text, ensure_ascii=False)


def write_report(output_dir, run, state, metrics, card=MODEL_CARD, **texts):
    """Writes metrics.json and the model card README.md; without training, evaluation.json alone.

    Args:
        run: a `TrainingRun`.
        state: the `TrainerState` at the end.
        metrics: the final evaluation's.
        card: the model card, with places for `texts`, name, folder (the name in quotes), data, recipe and metrics.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "train": training_summary(state.log_history),
        "eval": metrics,
        "model": {"parameters": run.model.num_parameters()},
        "data": {split: vars(summary) for split, summary in run.summaries.items()},
    }
    name = "metrics.json" if run.training_args.do_train else "evaluation.json"
    (folder / name).write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    if not run.training_args.do_train:
        return
    data = run.data_args
    # the card may be published: it names files without their folders, and no cache
    source = data.dataset_name or data.corpus or ", ".join(Path(file).name for file in data.train_file)
    summaries = {split: str(replace(summary, cache_directory=None)) for split, summary in run.summaries.items()}
    settings = {name: getattr(run.training_args, name) for name in RECIPE_FIELDS}
    settings["lr_scheduler_type"] = str(SchedulerType(settings["lr_scheduler_type"]).value)
    config = {name: getattr(run.model.config, name) for name in CONFIG_FIELDS}
    text = card.format(
        name=folder.resolve().name,
        folder=quoted(folder.resolve().name),
        data=table({"source": source, **summaries}),
        recipe=table({"steps": state.global_step, "max_seq_length": data.max_seq_length, **settings, **config}),
        metrics=table({name: f"{value:.4g}" for name, value in {**report["train"], **metrics}.items()}),
        **texts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def top_predictions(folder, sentence, count=5):
    """The likeliest fillings of the mask in a sentence, by the model saved in `folder`, one a line."""
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
