"""The Trainers: runs that survive being interrupted, and pretraining with exact metrics of each part.

Weights that are not finite are never written, and a checkpoint that does not fit the run is never loaded.
"""

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, align_special_tokens

from lambdabert.text.examples import list_lengths
from lambdabert.text.masks import IGNORED_LABEL, MaskingCollator
from lambdabert.training.batches import SimilarLengths
from lambdabert.training.callbacks import LogEnd, OwnSchedule, StopTogether
from lambdabert.training.checkpoints import (
    CheckpointError,
    last_complete_checkpoint,
    load_values,
    read_state,
    reading,
    writing,
)
from lambdabert.training.epochs import EndlessStream, EpochMasks
from lambdabert.training.metrics import example_sums, logits_of, mlm_logits, pretraining_metrics
from lambdabert.training.models import non_finite_weights
from lambdabert.training.option_rules import SCHEDULES_BY_EVALUATION
from lambdabert.training.resuming import (
    check_config,
    check_optimizer,
    check_random_states,
    check_schedule,
    check_weights,
)

logger = logging.getLogger(__name__)


class InterruptibleTrainer(Trainer):
    """A Trainer that saves and ends at SIGTERM, never loads half a checkpoint, and resumes streams and time.

    Args:
        data_collator: masks training batches; `set_epoch` changes its masks.
        eval_collator: masks evaluation batches, the same way every time.
    """

    def __init__(
        self,
        *,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None,
        data_collator: MaskingCollator,
        eval_collator: MaskingCollator,
        **kwargs: Any,
    ):
        streamed = isinstance(train_dataset, datasets.IterableDataset)
        super().__init__(
            train_dataset=EndlessStream(train_dataset, data_collator) if streamed else train_dataset,
            data_collator=data_collator,
            **kwargs,
        )
        # as `train` does, but before a checkpoint's config is compared with the model's
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            align_special_tokens(self.model, self.processing_class)
        self.eval_collator = eval_collator
        # whether a loss of this process was not finite
        self.diverged = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self.stop = StopTogether(self)
        self.add_callback(self.stop)
        self.add_callback(LogEnd())
        if not streamed:
            self.add_callback(EpochMasks(data_collator))
        self.saved_step = 0  # of the last checkpoint that this process wrote
        # wall-clock time of this run: `seconds` so far when `clock` was read
        self.seconds, self.clock = 0.0, time.monotonic()

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values) if self.accelerator.num_processes > 1 else values

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        earlier: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: the folder of the checkpoint.
            earlier: settings of the checkpoint's steps that differ from this run's; see `settings.earlier_values`.
            args, kwargs: as of `transformers.Trainer.train`.

        Raises:
            CheckpointError: the checkpoint does not fit the run, the loss is not finite, or the disk is full.
        """
        history = []
        if isinstance(resume_from_checkpoint, str):
            checkpoint = Path(resume_from_checkpoint)
            self.check_checkpoint(checkpoint, earlier or {})
            self.best_checkpoint(checkpoint)
            history = read_state(checkpoint).log_history
            self.add_callback(OwnSchedule(self, earlier or {}))
        self.start_clock(history)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self.stop.ask_all()
            is_saved = self.saved_step == self.state.global_step
            # a signal in the last evaluation; the weights may be the best's by now, which have a checkpoint
            if self.stop.stopping and not is_saved and not self.args.load_best_model_at_end:
                self._save_checkpoint(self.model_wrapped, None)
            return result
        finally:
            self.stop.restore()

    def start_clock(self, history: Sequence[Mapping[str, float]]) -> None:
        """Counts the seconds of the run from where the log of its earlier steps ends."""
        self.seconds = max((record.get("seconds", 0.0) for record in history), default=0.0)
        self.clock = time.monotonic()

    def check_checkpoint(self, checkpoint: Path, earlier: Mapping[str, Any]) -> None:
        """Reads all that the Trainer will load, and compares it with this run.

        Raises:
            CheckpointError: something cannot be read or does not fit.
        """
        model = self.accelerator.unwrap_model(self.model)
        with reading(checkpoint):
            check_config(checkpoint, model.config)
            check_weights(checkpoint, model)
            check_random_states(checkpoint)
            if (checkpoint / "scaler.pt").exists():
                load_values(checkpoint / "scaler.pt")
            if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
                optimizer = self.create_optimizer()
                all_weights = not self.args.ddp_find_unused_parameters
                check_optimizer(checkpoint, optimizer, earlier, all_weights=all_weights)
                if self.args.lr_scheduler_type not in SCHEDULES_BY_EVALUATION:
                    rate = earlier.get("learning_rate", self.args.learning_rate)
                    check_schedule(checkpoint, rate, len(optimizer.param_groups))
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if not (checkpoint / own).exists():
            logger.info(
                f"{checkpoint} was written by another number of processes: each step sees the same examples, but "
                "dropout differs from that of an uninterrupted run."
            )

    def load_weights(self, checkpoint: Path) -> None:
        """Loads the weights of a checkpoint alone.

        Raises:
            CheckpointError: they cannot be read or do not fit.
        """
        model = self.accelerator.unwrap_model(self.model)
        with reading(checkpoint):
            check_config(checkpoint, model.config)
            check_weights(checkpoint, model)
            files = [load_file(file) for file in checkpoint.glob("model*.safetensors")]
            # tied weights are stored once
            model.load_state_dict({name: weight for file in files for name, weight in file.items()}, strict=False)

    def best_checkpoint(self, checkpoint: Path) -> Path | None:
        """The best checkpoint that `checkpoint` records; None if there is none, or the best is not asked for.

        Raises:
            CheckpointError: it is gone.
        """
        best_step = read_state(checkpoint).best_global_step
        if not self.args.load_best_model_at_end or not best_step:
            return None
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{best_step}")
        if not best.is_dir():
            raise CheckpointError(
                f"{best}, the best of this run, is gone, so that its result cannot be the best: put it back, or give "
                "another --output_dir. Nothing was overwritten."
            )
        return best

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            # the state names the folder that the checkpoint was written to, which may have been copied since
            best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.load_weights(Path(str(self.args.output_dir)) / best)

    def not_finite(self, what: str) -> CheckpointError:
        last = last_complete_checkpoint(str(self.args.output_dir))
        return CheckpointError(
            f"{what} is not a finite number: training stopped and nothing was saved; "
            f"{'there is no checkpoint yet' if last is None else f'{last} is the last checkpoint'}. Give a lower "
            "--learning_rate and another --output_dir."
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.diverged |= ~loss.isfinite()
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, datasets.Dataset):
            return super()._get_train_sampler(train_dataset)
        # a step's examples, however they are split
        return self.similar_lengths(dataset, self.args.gradient_accumulation_steps * self.args.world_size)

    def similar_lengths(self, dataset: Any, batches: int = 1) -> SimilarLengths:
        """An order in which as many examples as there are in `batches` of a device are of similar length."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = torch.tensor(list_lengths(dataset, "input_ids"))
        return SimilarLengths(lengths, self._train_batch_size * batches, seed)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):
            # the loader of a run that is resumed by several processes tells the epoch to this attribute alone
            shard.sampler = getattr(shard.batch_sampler, "sampler", shard.batch_sampler)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        # an incomplete batch counts, whatever training does with one
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = train_collator, drop_last

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics. Raises CheckpointError if a loss is not finite."""
        metrics = super().evaluate(*args, **kwargs)
        if not all(math.isfinite(value) for name, value in metrics.items() if name.endswith("_loss")):
            if metrics.get("eval_masked_tokens") == 0:
                raise CheckpointError(
                    "No token of the evaluation text is masked, so that its loss is not known: give more text, or a "
                    "higher --eval_mlm_probability."
                )
            raise CheckpointError(
                f"The evaluation's loss after step {self.state.global_step} is not a finite number, so these weights "
                "are of no use: give a lower --learning_rate and another --output_dir, or evaluate another model."
            )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_tokens" in logs:
            logs["eval_tokens_per_second"] = round(logs["eval_tokens"] / max(logs["eval_runtime"], 1e-3), 1)
        logs["seconds"] = round(self.seconds + time.monotonic() - self.clock, 2)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        assert isinstance(self.model, nn.Module)
        bad = non_finite_weights(self.model)
        if self.sum_over_processes(self.diverged.new_tensor(len(bad), dtype=torch.float)) > 0:
            raise self.not_finite(f"A weight after step {self.state.global_step} ({', '.join(bad[:3])})")
        super().save_model(output_dir, *args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Whether to save under save_strategy="best": a run that a signal ends saves its last step in any case."""
        return super()._determine_best_metric(*args, **kwargs) or self.stop.stopping

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next: no process may still be writing when it appears
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.saved_step = self.state.global_step


class PretrainingTrainer(InterruptibleTrainer):
    """Trains and evaluates masked language modelling with an optional sentence task.

    Shapes: B examples, N tokens.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(compute_metrics=pretraining_metrics, **kwargs)
        # summed loss (nats) and number of masked tokens since the last log
        self.mlm_sums = torch.zeros(2, device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # the model divides by the tokens of all micro-batches and processes, the Trainer multiplies by the latter
        is_scaled = self.args.average_tokens_across_devices and num_items_in_batch is not None
        own_loss = loss / self.accelerator.num_processes if is_scaled else loss
        mlm_loss = outputs["mlm_loss"] if "mlm_loss" in outputs else own_loss
        masked = (inputs["labels"] != IGNORED_LABEL).sum()
        count = masked if num_items_in_batch is None else num_items_in_batch
        self.mlm_sums += torch.stack([mlm_loss.detach().float() * count, masked.float()])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Returns (None, sums [B, 6], masked tokens [B]), so that evaluation never gathers logits."""
        masked = inputs["labels"] != IGNORED_LABEL
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager(), logits_of(unwrapped, masked):
            outputs = model(**{name: value for name, value in inputs.items() if name not in self.label_names})
        logits = mlm_logits(outputs, masked)
        sums = example_sums(logits, outputs.get("seq_relationship_logits"), inputs)
        return None, sums, sums[:, 0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            loss, tokens = self.accelerator.reduce(self.mlm_sums).tolist()
            logs["mlm_loss"] = loss / max(tokens, 1)
            self.mlm_sums.zero_()
        super().log(logs, start_time)
