"""What happens at the events of training: a run ends in all processes at once, and resumes with its own schedule."""

import shutil
import signal
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lambdabert.training.checkpoints import numbered_checkpoints
from lambdabert.training.output_folder import record_run
from lambdabert.training.settings import BATCH_FIELDS, EXAMPLES_OF_A_STEP, examples_of_a_step


class Interruptible(Protocol):
    """What `StopTogether` asks of a trainer.

    Attributes:
        diverged: whether a loss of this process was not finite, a bool.
    """

    diverged: torch.Tensor

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor: ...

    def not_finite(self, what: str) -> Exception: ...


class StopTogether(TrainerCallback):
    """Ends training after the current step in all processes at once, whichever of them has a reason.

    SIGTERM or Ctrl-C end it with a checkpoint (a second signal kills), a loss that is not finite without one.

    Args:
        trainer: the trainer to end.

    Attributes:
        received: the signal that reached this process, or None.
        stopping: whether one reached any process, as all of them know.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, trainer: Interruptible):
        self.trainer = trainer
        self.received: str | None = None
        self.stopping = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()  # an attempt that ran out of memory has left its own
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        """Restores the handlers that the signals had before training."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask_all(self) -> bool:
        """Sets `stopping`, in all processes at once; returns whether a loss of any was not finite."""
        reasons = torch.stack([self.trainer.diverged.new_tensor(self.received is not None), self.trainer.diverged])
        signalled, diverged = (count > 0 for count in self.trainer.sum_over_processes(reasons.float()).tolist())
        if signalled:
            # the signal may reach one process a step earlier than another
            self.received = self.received or "a signal"
            self.stopping = True
        return diverged

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.ask_all():
            raise self.trainer.not_finite(f"The loss of step {state.global_step}")
        if self.stopping:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopping and state.epoch != round(state.epoch or 0):  # cut off, and not at its end
            control.should_log = control.should_evaluate = control.should_save = False

    @property
    def exit_status(self) -> int:
        """Exit status after a signal: 128 and its number, 130 for Ctrl-C and 143 for SIGTERM."""
        return 128 + getattr(signal, str(self.received), signal.SIGTERM)


class LogEnd(TrainerCallback):
    """Logs the last step too, so that the loss which the report gives is of the end."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or (
            state.global_step == state.max_steps and args.logging_strategy != "no"
        )


class OwnSchedule(TrainerCallback):
    """Gives a run that was resumed its own schedules in place of the checkpoint's.

    These are how often it logs, evaluates and saves, and the rates from here on: the peak of the learning rate, its
    course over the run's whole length, and the weight decay.

    Args:
        trainer: the trainer that was resumed.
        changed: names of the settings that differ from those of the checkpoint's steps.
    """

    def __init__(self, trainer: Trainer, changed: Collection[str]):
        self.trainer = trainer
        self.changed = changed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        state.train_batch_size = args.train_batch_size
        best = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            # it is recorded by the folder of that time, which may have been moved or copied since
            state.best_model_checkpoint = str(best)
        scheduler, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
        if self.trainer.is_deepspeed_enabled or not isinstance(scheduler, LambdaLR):
            return
        for group in optimizer.param_groups:
            group["initial_lr"] = args.learning_rate
        if "weight_decay" in self.changed:  # the first group is the one whose weights decay
            optimizer.param_groups[0]["weight_decay"] = args.weight_decay
        # its construction takes one step: to where the checkpoint's is
        resumed = LambdaLR(optimizer, scheduler.lr_lambdas, last_epoch=scheduler.last_epoch - 1)
        self.trainer.lr_scheduler = self.trainer.callback_handler.lr_scheduler = resumed


def use_batch_of(state: TrainerState, args: TrainingArguments) -> None:
    """Sets the arguments to the batch that training has found to fit into memory."""
    args.per_device_train_batch_size = state.train_batch_size or args.per_device_train_batch_size


class StartAnew(TrainerCallback):
    """Gives each attempt of `auto_find_batch_size` the weights that the first began with, and a new optimizer's state.

    Otherwise the Trainer continues from the weights of the attempt that ran out of memory, and the next start of the
    command from its checkpoints.
    """

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if not self.weights:
            self.weights = {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}
            return
        model.load_state_dict(self.weights)
        kwargs["optimizer"].state.clear()
        if args.should_save:
            for _, checkpoint in numbered_checkpoints(str(args.output_dir)):
                shutil.rmtree(checkpoint)


class RecordRun(TrainerCallback):
    """Records the run in its output folder before its first step, when all that can be refused has been.

    With `auto_find_batch_size` each attempt begins anew, with fewer examples than the one that ran out of memory: the
    arguments and the record then hold the batch that fits.
    """

    def __init__(self, record: dict[str, Any]):
        self.record = record

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.auto_find_batch_size:
            use_batch_of(state, args)
            training = self.record["training"]
            found = {name: getattr(args, name) for name in BATCH_FIELDS} | {
                EXAMPLES_OF_A_STEP: examples_of_a_step(args)
            }
            training |= {name: value for name, value in found.items() if name in training}
        if state.is_world_process_zero:
            record_run(str(args.output_dir), self.record)
