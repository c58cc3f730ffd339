"""The Trainer of distillation: it adds up the losses, in two stages.

Shapes: B examples, N tokens.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_utils import EvalPrediction

from lambdabert.distillation.losses import ITEM_OF_LOSS, ITEMS, count_items, loss_sums, squared_errors
from lambdabert.distillation.stages import attention_alone, attention_outputs, steps_of_first_stage, two_schedules
from lambdabert.distillation.teacher import LossWeights, Teacher
from lambdabert.text.masks import IGNORED_LABEL
from lambdabert.training.metrics import logits_of
from lambdabert.training.trainer import InterruptibleTrainer


class DistillationTrainer(InterruptibleTrainer):
    """Trains a model to compute what a teacher computes.

    Args:
        teacher: the teacher.
        weights: the losses.
        attention_steps: steps of the first stage; below 1, its share of all steps.
        attention_learning_rate: its peak learning rate; warm-up and decay are those of the second stage.
    """

    def __init__(
        self,
        *,
        teacher: Teacher,
        weights: LossWeights,
        attention_steps: float = 0,
        attention_learning_rate: float = 1e-3,
        **kwargs: Any,
    ):
        super().__init__(compute_metrics=self.mean_losses, **kwargs)
        self.teacher = teacher.to(self.args.device)
        self.weights = weights.used
        self.attention_steps = attention_steps
        self.attention_learning_rate = attention_learning_rate
        self.loss_is_scaled_for_ga = True  # by the items of the whole step
        # of each loss, its sum and the number of its items since the last log
        self.totals: dict[str, torch.Tensor] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, IterableDataset):
            return None
        return self.similar_lengths(dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Two schedules one after the other, each with warm-up and decay, if there are two stages."""
        first = steps_of_first_stage(self.attention_steps, num_training_steps)
        if first == 0 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        super().create_scheduler(num_training_steps, optimizer)  # for what the Trainer records of it
        steps = first, num_training_steps - first
        ratio = self.attention_learning_rate / self.args.learning_rate
        self.lr_scheduler = two_schedules(self.args, optimizer or self.create_optimizer(), steps, ratio)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of a step, and the `ITEMS` of all of them and of all processes, [3]."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.items_of_step(batches, device)

    def items_of_step(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
        """`ITEMS` of all micro-batches and processes of a step, [3]."""
        counts = [count_items(batch).sum(0) for batch in batches] or [torch.zeros(len(ITEMS), dtype=torch.long)]
        return self.accelerator.reduce(torch.stack(counts).sum(0).to(device))

    def examples_losses(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The losses in use, summed over the items of each example: [B, losses]."""
        masked = inputs["labels"] != IGNORED_LABEL
        with torch.no_grad():
            targets = self.hidden_states_and_logits(self.teacher.model, inputs, masked)
        outputs = self.hidden_states_and_logits(model, inputs, masked)
        sums = loss_sums(self.teacher, outputs, targets, inputs, self.weights)
        return torch.stack([sums[name] for name in self.weights], dim=1)

    def attention_losses(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of the first stage, a mean over layers, summed over the tokens of each example: [B, 1]."""
        nowhere = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        with torch.no_grad(), attention_outputs(self.teacher.model) as given:
            states = self.hidden_states_and_logits(self.teacher.model, inputs, nowhere).hidden_states
        self.layer_inputs[:] = states[:-1]
        own = self.hidden_states_and_logits(model, inputs, nowhere).hidden_states[1:]
        tokens = inputs["attention_mask"].bool()
        errors = [
            squared_errors(x, y, tokens, self.teacher.attention_norm(layer))
            for layer, (x, y) in enumerate(zip(own, given, strict=True))
        ]
        return torch.stack(errors).mean(0)[:, None]

    def hidden_states_and_logits(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], masked: torch.Tensor
    ) -> Any:
        """Outputs of teacher or student; an MLM head's only where `masked`, bool [B, N]."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        reads_tokens = "masked_tokens" in self.weights
        with logits_of(self.accelerator.unwrap_model(model), masked) if reads_tokens else nullcontext():
            return model(**given, output_hidden_states=True, return_dict=True)

    def weighted(
        self, sums: torch.Tensor, items: torch.Tensor, weights: Mapping[str, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses, a scalar, and the means of each, from sums [losses] and numbers of items [3]."""
        means = sums / self.items_of(items, weights).clamp(min=1)
        return (means * means.new_tensor(list(weights.values()))).sum(), means

    def items_of(self, items: torch.Tensor, names: Collection[str]) -> torch.Tensor:
        """The number of items of each loss, [losses], from those of all kinds, [3]."""
        return items[[ITEMS.index(ITEM_OF_LOSS[name]) for name in names]]

    def steps_left_alone(self) -> int:
        """How many steps are left of the first stage; 0 in the first step after it, and negative later."""
        return steps_of_first_stage(self.attention_steps, self.state.max_steps) - self.state.global_step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        left = self.steps_left_alone()
        if left <= 0:
            if left == 0 < self.state.global_step:
                # gradients become many times larger, and by the mean squares of the first stage so would Adam's steps
                assert self.optimizer is not None
                self.optimizer.state.clear()
            return super().training_step(model, inputs, num_items_in_batch)
        # until the backward pass has ended, because activation checkpointing computes layers again in it
        with (
            attention_alone(self.accelerator.unwrap_model(model)) as self.layer_inputs,
            torch.compiler.set_stance("force_eager"),  # one graph would be compiled for each step
        ):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        alone = self.steps_left_alone() > 0
        weights = {"attention": 1.0} if alone else self.weights
        sums = (self.attention_losses if alone else self.examples_losses)(model, inputs).sum(0)
        items = count_items(inputs).sum(0)
        for name, total in zip(weights, torch.stack([sums.detach(), self.items_of(items, weights)], dim=1)):
            self.totals[name] = self.totals.get(name, 0) + total
        loss, _ = self.weighted(sums, items if num_items_in_batch is None else num_items_in_batch, weights)
        # gradients are averaged over processes, and the items are those of all
        return loss if num_items_in_batch is None else loss * self.accelerator.num_processes

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Returns (None, losses and items of each example [B, losses + 3], items [B, 3])."""
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.examples_losses(model, inputs)
        items = count_items(inputs)
        return None, torch.cat([sums.float(), items], dim=1), items

    def mean_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        """The losses over all of the evaluation's items."""
        totals = torch.from_numpy(prediction.predictions).double().sum(0)
        loss, means = self.weighted(totals[: -len(ITEMS)], totals[-len(ITEMS) :], self.weights)
        metrics = {"loss": loss.item(), **dict(zip(self.weights, means.tolist(), strict=True))}
        return metrics | {"tokens": int(totals[-len(ITEMS)]), "examples": int(totals[1 - len(ITEMS)])}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, total in self.totals.items():
                sums, items = self.accelerator.reduce(total).tolist()
                logs[name] = sums / max(items, 1)
            self.totals = {}
        super().log(logs, start_time)
