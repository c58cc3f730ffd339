"""The `Trainer` of the pretraining command: exact metrics per part, and runs that survive being interrupted.

`InterruptibleTrainer` is what it has in common with that of distillation.

Weights that are not finite are never written, and a checkpoint that does not fit the run is never taken up.
"""

import itertools
import json
import logging
import math
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction
from transformers.utils import CONFIG_NAME

from lambdabert.text.objectives import OBJECTIVES
from run_folder import CheckpointError, last_whole_checkpoint, read_state, reading, writing

logger = logging.getLogger(__name__)

SENTENCE_LABELS = [objective.sentence_label for objective in OBJECTIVES.values() if objective.has_pairs]
# implementations of one optimizer, which change nothing but rounding
OPTIMIZER_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
# fields of a saved config that say how it was saved
SAVING_FIELDS = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")


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


class StopTogether(TrainerCallback):
    """Ends training after the running step in all processes at once, whichever of them has a reason.

    SIGTERM or Ctrl-C end it with a checkpoint (a second signal kills), a loss that is not finite without one.

    Args:
        trainer: an `InterruptibleTrainer`.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, trainer: "InterruptibleTrainer"):
        self.trainer = trainer
        self.received: str | None = None
        self.previous: dict[signal.Signals, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number, frame):
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self):
        """Gives signals back to whom they belonged."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        reasons = torch.stack([self.trainer.diverged.new_tensor(self.received is not None), self.trainer.diverged])
        signalled, diverged = (count > 0 for count in self.trainer.sum_over_processes(reasons.float()).tolist())
        if diverged:
            raise self.trainer.not_finite(f"The loss of step {state.global_step}")
        if signalled:
            # the signal may reach one process a step earlier than another
            self.received = self.received or "a signal"
            control.should_training_stop = control.should_save = True


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


def non_finite_weights(*modules: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold a NaN or an infinity."""
    weights = [
        (name, weight)
        for module in modules
        for name, weight in itertools.chain(module.named_parameters(), module.named_buffers())
        if weight.is_floating_point()
    ]
    if not weights:
        return []
    # of a sharded weight, the part that is here; one transfer from the device for all
    finite = [(x.to_local() if hasattr(x, "to_local") else x).isfinite().all() for _, x in weights]
    return [name for (name, _), good in zip(weights, torch.stack(finite).tolist(), strict=True) if not good]


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
        # whether a loss of this process was not finite
        self.diverged = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self.stop = StopTogether(self)
        self.add_callback(self.stop)
        if not streamed:
            self.add_callback(EpochMasks(data_collator))
        # wall-clock time of this run: `seconds` so far when `clock` was read
        self.seconds, self.clock = 0.0, time.monotonic()

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values) if self.accelerator.num_processes > 1 else values

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            state = read_state(Path(resume_from_checkpoint))
            self.seconds = max((record.get("seconds", 0.0) for record in state.log_history), default=0.0)
        self.clock = time.monotonic()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.stop.restore()

    def not_finite(self, what: str) -> CheckpointError:
        last = last_whole_checkpoint(str(self.args.output_dir))
        return CheckpointError(
            f"{what} is not a finite number: training stopped and nothing was saved; "
            f"{'there is no checkpoint yet' if last is None else f'{last} is the last checkpoint'}. Give a lower "
            "--learning_rate and another --output_dir."
        )

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.diverged |= ~loss.isfinite()
        return loss

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

    def _init_training_state(self, max_steps, *args, **kwargs):
        trained = super()._init_training_state(max_steps, *args, **kwargs)
        # a checkpoint's state brings how often the run that wrote it logged, evaluated and saved
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        return trained

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading(resume_from_checkpoint):
            self._check_config(Path(resume_from_checkpoint) / CONFIG_NAME)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_config(self, file: Path):
        if not file.exists():  # under FSDP
            return
        own = json.loads(json.dumps(self.accelerator.unwrap_model(self.model).config.to_dict(), default=str))
        for field, value in json.loads(file.read_text(encoding="utf-8")).items():
            if field in own and field not in SAVING_FIELDS and own[field] != value:
                raise ValueError(f"{file.name} has {field}={value!r}, and this run {own[field]!r}")

    def load_weights(self, checkpoint: Path):
        """Takes up the weights of a checkpoint alone."""
        with reading(checkpoint):
            self._check_config(checkpoint / CONFIG_NAME)
            files = [load_file(file) for file in checkpoint.glob("model*.safetensors")]
            weights = {name: weight for file in files for name, weight in file.items()}
            model = self.accelerator.unwrap_model(self.model)
            self._issue_warnings_after_load(model.load_state_dict(weights, strict=False))

    def _load_best_model(self):
        with reading(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        # a tied weight is stored once, under the name of the other
        missing = sorted(set(load_result.missing_keys) - set(self.model.all_tied_weights_keys))
        if missing:
            raise ValueError(f"its weights lack {', '.join(missing[:3])}")
        if load_result.unexpected_keys:
            raise ValueError(f"its weights have no place for {', '.join(sorted(load_result.unexpected_keys)[:3])}")

    def _load_optimizer_and_scheduler(self, checkpoint):
        given = [dict(group) for group in self.optimizer.param_groups]
        rates = getattr(self.lr_scheduler, "base_lrs", None)
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if self.is_fsdp_enabled:
                return
            self._check_optimizer(self.optimizer, given)
            if isinstance(self.lr_scheduler, LambdaLR):
                scheduler = self.lr_scheduler
                self._check_setting("initial_lr", scheduler.base_lrs, rates)
                if not isinstance(scheduler.last_epoch, int) or not 0 <= scheduler.last_epoch <= self.state.global_step:
                    raise ValueError(f"its scheduler is at step {scheduler.last_epoch!r}")
                # the schedule of this run's length, which may be another than the checkpoint's
                scheduler._last_lr = [
                    rate * schedule(scheduler.last_epoch)
                    for rate, schedule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
                ]
                for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
                    group["lr"] = rate

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, given: list[dict]):
        """Compares a loaded optimizer with this run's: its settings, and which states it keeps for which weights."""
        for own, loaded in zip(given, optimizer.param_groups, strict=True):
            for name, value in own.items():
                if name not in ("params", "lr", *OPTIMIZER_IMPLEMENTATION):
                    self._check_setting(name, loaded.get(name), value)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        states = {weight: optimizer.state[weight] for weight in weights if optimizer.state.get(weight)}
        keeps_states = any("betas" in group for group in given)
        if keeps_states and (not states or (len(states) < len(weights) and not self.args.ddp_find_unused_parameters)):
            raise ValueError(f"its optimizer knows {len(states)} of {len(weights)} weights")
        if len({frozenset(state) for state in states.values()}) > 1:
            raise ValueError("its optimizer keeps other values for some weights than for others")
        for weight, state in states.items():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.numel() > 1 and value.shape != weight.shape:
                    raise ValueError(f"{name} of its optimizer has shape {list(value.shape)} for {list(weight.shape)}")
                if not value.isfinite().all():
                    raise ValueError(f"{name} of its optimizer holds values that are not finite")

    def _check_setting(self, name: str, loaded: object, own: object):
        """Refuses a checkpoint of other settings, where no record of them had shown that."""
        if loaded != own:
            name = "learning_rate" if name == "initial_lr" else name
            raise CheckpointError(
                f"The checkpoint in output_dir={self.args.output_dir} has {name}={loaded!r}, and this run {own!r}: "
                "give the same, or another --output_dir."
            )

    def _load_scaler(self, checkpoint):
        with reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if not (Path(checkpoint) / own).exists():
            logger.info(
                f"{checkpoint} was written by another number of processes: each step sees the same examples, but "
                "dropout differs from that of an uninterrupted run."
            )
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next: no process may still be writing when it appears
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None, _internal_call=False):
        bad = non_finite_weights(self.model)
        if self.sum_over_processes(self.diverged.new_tensor(len(bad), dtype=torch.float)) > 0:
            raise self.not_finite(f"A weight after step {self.state.global_step} ({', '.join(bad[:3])})")
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise


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
