"""The `Trainer` of the pretraining command: exact metrics per part, and runs that survive being interrupted.

`InterruptibleTrainer` is what it has in common with that of distillation.

A checkpoint is whole once its `trainer_state.json`, which is written after everything else, is there and every file
beside it can be opened; anything else is never loaded.
"""

import itertools
import json
import logging
import math
import re
import shutil
import signal
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction

from lambdabert.text.objectives import OBJECTIVES

logger = logging.getLogger(__name__)

SENTENCE_LABELS = [objective.sentence_label for objective in OBJECTIVES.values() if objective.has_pairs]
RUN_SETTINGS_NAME = "run_settings.json"
# what a run leaves at the top of its output folder, besides the checkpoints
RUN_FILES = (
    "config.json",
    "model*.safetensors*",
    "modules.json",
    "tokenizer*",
    "metrics.json",
    "README.md",
    "training_curves.png",
)
CHECKPOINT_PARTS = (
    ("trainer_state.json",),
    ("config.json", "pytorch_model_fsdp*"),
    ("model*.safetensors", "pytorch_model_fsdp*"),
    ("optimizer*",),
    ("scheduler.pt",),
    ("rng_state*.pth",),
)


class CheckpointError(Exception):
    """A checkpoint could not be written; the text says where and what to do."""


def is_readable(file):
    """Whether a JSON, safetensors or torch file is complete, by its structure alone."""
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return False
    elif file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    return True


def is_whole(checkpoint):
    """Whether nothing is missing from a checkpoint folder and no file in it is cut short."""
    return all(any(any(checkpoint.glob(name)) for name in names) for names in CHECKPOINT_PARTS) and all(
        is_readable(file) for file in checkpoint.rglob("*") if file.is_file()
    )


def last_whole_checkpoint(output_dir):
    """The checkpoint of the most steps that can be resumed from, or None; the log names those that cannot."""
    numbered = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and folder.is_dir()
    ]
    for _, folder in sorted(numbered, reverse=True):
        if is_whole(folder):
            return folder
        logger.warning(f"{folder} was not written to its end and is not used.")
    return None


def check_output_folder(output_dir):
    """Refuses a folder whose files this command did not write.

    Raises:
        ValueError: saving would overwrite files of something else.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={output_dir} is a file; name a folder.")
    if (folder / RUN_SETTINGS_NAME).exists():
        return
    foreign = sorted(file.name for name in (*RUN_FILES, f"{PREFIX_CHECKPOINT_DIR}-*") for file in folder.glob(name))
    if foreign:
        raise ValueError(
            f"output_dir={output_dir} holds {', '.join(foreign[:5])} from something else than this command; "
            "nothing was overwritten; give another --output_dir."
        )


def check_same_run(output_dir, settings):
    """Compares the settings of this run with those recorded in its output folder.

    Args:
        settings: {group: {field: JSON value}}.

    Raises:
        ValueError: the folder belongs to a run with other settings; the text names them.
    """
    file = Path(output_dir) / RUN_SETTINGS_NAME
    if not file.exists():
        return
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} cannot be read as JSON; give another --output_dir.") from None
    differences = [
        f"{field} is {recorded.get(group, {}).get(field)!r} there and {value!r} here"
        for group, fields in settings.items()
        for field, value in fields.items()
        if recorded.get(group, {}).get(field) != value
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError(
            f"output_dir={output_dir} belongs to another run: {'; '.join(differences[:3])}{more}. Nothing was "
            "overwritten; give another --output_dir to start afresh, or the same settings to go on."
        )


def record_run(output_dir, settings):
    """Marks the output folder as this run's."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    file = Path(output_dir) / RUN_SETTINGS_NAME
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def example_sums(logits, sentence_logits, inputs):
    """Reduces a batch's logits to a few sums per example.

    Args:
        logits: of the masked tokens in their order, [M, vocab_size].
        sentence_logits: [B, 2], or None without a sentence task.
        inputs: the batch.

    Returns:
        [B, 6]: masked tokens, their summed loss (nats), how many of them were predicted; real tokens; the
        sentence task's loss (nats; NaN without one) and whether it was predicted.
    """
    labels = inputs["labels"]
    masked = labels != -100
    logits, targets, rows = logits.float(), labels[masked], masked.nonzero()[:, 0]

    def per_example(values):
        return torch.zeros(len(labels), device=labels.device).index_add_(0, rows, values.float())

    sums = [
        masked.sum(dim=1),
        per_example(F.cross_entropy(logits, targets, reduction="none")),
        per_example(logits.argmax(dim=-1) == targets),
        inputs["attention_mask"].sum(dim=1),
    ]
    sentence_labels = next((inputs[name] for name in SENTENCE_LABELS if name in inputs), None)
    if sentence_labels is None:
        sums += [torch.full_like(sums[1], math.nan)] * 2
    else:
        sums += [
            F.cross_entropy(sentence_logits.float(), sentence_labels, reduction="none"),
            sentence_logits.argmax(dim=-1) == sentence_labels,
        ]
    return torch.stack([values.float() for values in sums], dim=1)


def pretraining_metrics(prediction: EvalPrediction):
    """Metrics over all masked tokens and all pairs, from the sums of `example_sums` [examples, 6]."""
    sums = prediction.predictions.astype("float64")
    masked, mlm_loss, mlm_correct, tokens, sentence_loss, sentence_correct = sums.sum(axis=0)
    mlm_loss /= max(masked, 1)
    metrics = {
        "loss": mlm_loss,
        "mlm_loss": mlm_loss,
        "perplexity": math.exp(min(mlm_loss, 700)),
        "mlm_accuracy": mlm_correct / max(masked, 1),
        "masked_tokens": int(masked),
        "tokens": int(tokens),
    }
    if not math.isnan(sentence_loss):
        metrics["sentence_loss"] = sentence_loss / len(sums)
        metrics["sentence_accuracy"] = sentence_correct / len(sums)
        metrics["loss"] += metrics["sentence_loss"]
    return metrics


class StopOnSignal(TrainerCallback):
    """Ends training after the running step, with a checkpoint, at SIGTERM or Ctrl-C; a second signal kills."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number, frame):
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        stop = torch.tensor(float(self.received is not None), device=self.accelerator.device)
        # the signal may reach one process a step earlier than another
        if self.accelerator.num_processes > 1:
            stop = self.accelerator.reduce(stop)
        if stop > 0:
            self.received = self.received or "a signal"
            control.should_training_stop = control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()


class EpochMasks(TrainerCallback):
    """Gives each epoch its own training masks."""

    def __init__(self, collator):
        # shared, so that loader processes that outlive an epoch see the next
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        collator.set_epoch(self.epoch)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch.fill_(int(state.epoch or 0))


class EndlessStream(torch.utils.data.IterableDataset):
    """Passes over a stream again and again, each time in another order and with other masks.

    The Trainer counts the batches of a stream from its start, so that a run can be resumed after several passes only
    if they are one stream.

    Args:
        examples: a `datasets.IterableDataset`.
        collator: masks the examples.
    """

    def __init__(self, examples, collator):
        self.examples = examples
        self.collator = collator

    def __iter__(self):
        for number in itertools.count():
            self.examples.set_epoch(number)
            self.collator.set_epoch(number)
            empty = True
            for example in self.examples:
                empty = False
                yield example
            if empty:
                return


@contextmanager
def logits_of(model, masked):
    """Within it, an MLM head sees the masked tokens alone, and gives logits [M, vocab_size].

    The head, with its product of all tokens by the vocabulary, is most of a small model's work.

    Args:
        model: one with an MLM head.
        masked: bool [B, N].
    """
    hook = model.cls.predictions.register_forward_pre_hook(lambda module, hidden_states: (hidden_states[0][masked],))
    try:
        yield
    finally:
        hook.remove()


def mlm_logits(outputs, masked):
    """The logits [M, vocab_size] of what was computed within `logits_of`."""
    logits = outputs["logits"] if "logits" in outputs else outputs["prediction_logits"]
    # a compiled model leaves the hook out
    return logits[masked] if logits.dim() == 3 else logits


class InterruptibleTrainer(Trainer):
    """A Trainer that saves and ends at SIGTERM, never takes up half a checkpoint, and resumes streams and time.

    Args:
        data_collator: masks training batches; `set_epoch` changes its masks.
        eval_collator: masks evaluation batches, the same way every time.
    """

    def __init__(self, *args, train_dataset, data_collator, eval_collator, **kwargs):
        streamed = isinstance(train_dataset, datasets.IterableDataset)
        super().__init__(
            *args,
            train_dataset=EndlessStream(train_dataset, data_collator) if streamed else train_dataset,
            data_collator=data_collator,
            **kwargs,
        )
        self.eval_collator = eval_collator
        self.stop = StopOnSignal(self.accelerator)
        self.add_callback(self.stop)
        if not streamed:
            self.add_callback(EpochMasks(data_collator))
        # wall-clock time of this run: `seconds` so far when `clock` was read
        self.seconds, self.clock = 0.0, time.monotonic()

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            self.seconds = max((record.get("seconds", 0.0) for record in state.log_history), default=0.0)
        self.clock = time.monotonic()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def log(self, logs, start_time=None):
        if "eval_tokens" in logs:
            logs["eval_tokens_per_second"] = round(logs["eval_tokens"] / max(logs["eval_runtime"], 1e-3), 1)
        logs["seconds"] = round(self.seconds + time.monotonic() - self.clock, 2)
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result):
        # a tied weight is stored once, under the name of the other
        if set(load_result.missing_keys) - set(self.model.all_tied_weights_keys) or load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next: no process may still be writing when it appears
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"{folder} could not be written ({error}). Free or add space and start the same command again: "
                "it goes on from the last whole checkpoint."
            ) from error


class PretrainingTrainer(InterruptibleTrainer):
    """Trains and evaluates masked language modelling with an optional sentence task."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_metrics=pretraining_metrics, **kwargs)
        # summed loss (nats) and number of masked tokens since the last log
        self.mlm_sums = torch.zeros(2, device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # the model divides by the tokens of all micro-batches and processes, the Trainer multiplies by the latter
        mlm_loss = outputs["mlm_loss"] if "mlm_loss" in outputs else loss / self.accelerator.num_processes
        masked = (inputs["labels"] != -100).sum()
        count = masked if num_items_in_batch is None else num_items_in_batch
        self.mlm_sums += torch.stack([mlm_loss.detach().float() * count, masked.float()])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns (None, sums [B, 6], masked tokens [B]), so that evaluation never gathers logits."""
        inputs = self._prepare_inputs(inputs)
        masked = inputs["labels"] != -100
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager(), logits_of(unwrapped, masked):
            outputs = model(**{name: value for name, value in inputs.items() if name not in self.label_names})
        logits = mlm_logits(outputs, masked)
        sums = example_sums(logits, outputs.get("seq_relationship_logits"), inputs)
        return None, sums, sums[:, 0]

    def log(self, logs, start_time=None):
        if "loss" in logs:
            loss, tokens = self.accelerator.reduce(self.mlm_sums).tolist()
            logs["mlm_loss"] = loss / max(tokens, 1)
            self.mlm_sums.zero_()
        super().log(logs, start_time)
