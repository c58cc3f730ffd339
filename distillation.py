"""A LambdaBERT learns what a trained BERT computes: what is compared, how it is weighed, and the Trainer that does it.

Each loss is a sum over the tokens, examples or masked tokens of a batch, divided by their number in the whole step, so
that neither padding nor gradient accumulation changes it:

    layers           every layer's hidden state: squared error over the variance that the teacher's norm gives it
    last_layer       the last layer's alone
    sentences        the sentence vector, pooled as the teacher pools: 1 - cosine
    masked_tokens    the MLM head's distribution at masked tokens: KL divergence, teacher first (nats)
    classes          the classifier's: KL divergence (nats); of a regression, the squared error

Training may begin with a stage in which every lambda layer learns by itself, given the teacher's hidden states:

    attention        what each attention block gives: squared error over the variance that the teacher's norm gives it

An attention block is attention or a lambda layer, its output projection, the residual and the norm.

Shapes: B examples, N tokens, D hidden_size.
"""

import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    get_scheduler,
)
from transformers.trainer_utils import EvalPrediction

from lambdabert.text.examples import list_lengths
from lambdabert.text.masks import IGNORED_LABEL
from pretraining_trainer import InterruptibleTrainer, logits_of, mlm_logits

ITEMS = ("tokens", "examples", "masked tokens")
ITEM_OF_LOSS = {
    "layers": "tokens",
    "last_layer": "tokens",
    "sentences": "examples",
    "masked_tokens": "masked tokens",
    "classes": "examples",
    "attention": "tokens",
}
BATCHES_SORTED_TOGETHER = 50


@dataclass(frozen=True)
class LossWeights:
    """The weight of each loss in the sum; 0 leaves it out."""

    layers: float = 0.0
    last_layer: float = 0.0
    sentences: float = 0.0
    masked_tokens: float = 0.0
    classes: float = 0.0

    @property
    def used(self) -> dict[str, float]:
        return {name: weight for name, weight in asdict(self).items() if weight}


class Teacher:
    """A trained BERT, and what it offers to learn from.

    Args:
        model: a BERT of `transformers`.
        sentence_modules: what `sentence-transformers` lets follow it: pooling, and whatever else makes its vectors.
    """

    def __init__(self, model: PreTrainedModel, sentence_modules: tuple[nn.Module, ...] = ()):
        self.model = model.eval().requires_grad_(False)
        self.sentence_modules = [module.eval().requires_grad_(False) for module in sentence_modules]

    @property
    def default_weights(self) -> LossWeights:
        """Every layer, and what the teacher was trained to give."""
        return LossWeights(layers=1.0, **{name: 1.0 for name in self.offers if name not in ("layers", "last_layer")})

    @property
    def offers(self) -> tuple[str, ...]:
        """The losses that can be computed."""
        offered = ["layers", "last_layer"]
        if self.sentence_modules:
            offered.append("sentences")
        if isinstance(self.model, BertForMaskedLM | BertForPreTraining):
            offered.append("masked_tokens")
        if isinstance(self.model, BertForSequenceClassification | BertForTokenClassification):
            offered.append("classes")
        return tuple(offered)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.base_model.encoder.layer

    def sentence_vectors(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sentence vectors of last hidden states [B, N, D], the teacher's own or others."""
        features = {"token_embeddings": hidden_states, "attention_mask": attention_mask}
        for module in self.sentence_modules:
            features = module(features)
        return features["sentence_embedding"]

    def to(self, device: torch.device):
        for module in (self.model, *self.sentence_modules):
            module.to(device)
        return self


def divergence(logits: torch.Tensor, target: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """How far the distributions of logits [..., C] are from the target's: KL(target || logits) in nats, [...].

    With `problem_type` "multi_label_classification" each of the C is a distribution of its own; with "regression" the
    squared errors are summed instead.
    """
    logits, target = logits.float(), target.float()
    if problem_type == "regression":
        return (logits - target).square().sum(-1)
    if problem_type == "multi_label_classification":
        logits, target = (torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (logits, target))
        return divergence(logits, target).sum(-1)
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def problem_type(config) -> str | None:
    return "regression" if config.problem_type is None and config.num_labels == 1 else config.problem_type


def squared_errors(own: torch.Tensor, given: torch.Tensor, tokens: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Each example's squared error over the variance that a norm gives, summed over its tokens: [B].

    Args:
        own: states of the student, [B, N, D].
        given: the teacher's.
        tokens: bool [B, N], True = token.
        norm: the teacher's norm that gave them; it scales states of unit variance.
    """
    squares = (own.float() - given.float()).square().mean(-1)
    return squares.masked_fill(~tokens, 0).sum(1) / norm.weight.square().mean()


def loss_sums(teacher: Teacher, outputs, targets, inputs: dict[str, torch.Tensor], names) -> dict[str, torch.Tensor]:
    """Each example's part of the losses `names`, summed over its tokens where a loss is one of tokens: [B] each.

    Args:
        teacher: pools, and knows its norms and kind of labels.
        outputs: the student's, with hidden states.
        targets: the teacher's.
        inputs: the batch; `labels` are not -100 where tokens are masked.
    """
    tokens = inputs["attention_mask"].bool()
    pairs = list(zip(outputs.hidden_states[1:], targets.hidden_states[1:], strict=True))
    errors = {}

    def error(layer: int) -> torch.Tensor:
        if layer not in errors:
            errors[layer] = squared_errors(*pairs[layer], tokens, teacher.layers[layer].output.LayerNorm)
        return errors[layer]

    sums = {}
    if "layers" in names:
        sums["layers"] = sum(map(error, range(len(pairs)))) / len(pairs)
    if "last_layer" in names:
        sums["last_layer"] = error(len(pairs) - 1)
    if "sentences" in names:
        vectors = (teacher.sentence_vectors(states.float(), inputs["attention_mask"]) for states in pairs[-1])
        sums["sentences"] = 1 - F.cosine_similarity(*vectors, dim=-1)
    if "masked_tokens" in names:
        masked = inputs["labels"] != IGNORED_LABEL
        of_tokens = divergence(mlm_logits(outputs, masked), mlm_logits(targets, masked))
        sums["masked_tokens"] = of_tokens.new_zeros(len(masked)).index_add(0, masked.nonzero()[:, 0], of_tokens)
    if "classes" in names:
        of_classes = divergence(outputs["logits"], targets["logits"], problem_type(teacher.model.config))
        if of_classes.dim() == 2:
            of_classes = of_classes.masked_fill(~tokens, 0).sum(1) / tokens.sum(1).clamp(min=1)
        sums["classes"] = of_classes
    return sums


@contextmanager
def attention_outputs(bert: PreTrainedModel):
    """Collects what the attention block of each layer gives, [B, N, D] each, while a BERT runs."""
    outputs = []

    def collect(block, inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.attention.register_forward_hook(collect) for layer in bert.base_model.encoder.layer]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_alone(model: PreTrainedModel):
    """Makes each layer of a LambdaBERT give what its attention block gives for inputs of its own.

    The model then runs as usual, under whatever wraps it, and its hidden states are those of the blocks.

    Yields:
        A list, for the inputs of the layers: [B, N, D] each.
    """
    given = []
    layers = model.base_model.encoder.layer
    for i, layer in enumerate(layers):
        layer.forward = lambda states, mask=None, packing=None, i=i: layers[i].attention(given[i], mask, packing)
    try:
        yield given
    finally:
        for layer in layers:
            del layer.forward


def count_items(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`ITEMS` of each example, [B, 3]."""
    tokens = inputs["attention_mask"].sum(1)
    return torch.stack([tokens, torch.ones_like(tokens), (inputs["labels"] != IGNORED_LABEL).sum(1)], dim=1)


def steps_of_first_stage(attention_steps: float, steps: int) -> int:
    """How many of all steps belong to it, by a number or, below 1, by a share."""
    return min(steps, math.ceil(steps * attention_steps) if attention_steps < 1 else int(attention_steps))


class SimilarLengths(Sampler):
    """A random order in which the examples of a batch are of similar length, another one in each epoch.

    Args:
        lengths: tokens of each example, [examples].
        batch_size: examples in a batch.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, lengths: torch.Tensor, batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.lengths)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        some = self.batch_size * BATCHES_SORTED_TOGETHER
        order = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in order.split(some)])
        batches = order.split(self.batch_size)
        whole = batches[: len(self) // self.batch_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator)]
        return iter(torch.cat([*shuffled, *batches[len(whole) :]]).tolist())


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
        *args,
        teacher: Teacher,
        weights: LossWeights,
        attention_steps: float = 0,
        attention_learning_rate: float = 1e-3,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=self.mean_losses, **kwargs)
        self.teacher = teacher.to(self.args.device)
        self.weights = weights.used
        self.attention_steps = attention_steps
        self.attention_learning_rate = attention_learning_rate
        self.loss_is_scaled_for_ga = True  # by the items of the whole step
        # of each loss, its sum and the number of its items since the last log
        self.totals: dict[str, torch.Tensor] = {}

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            lengths = list_lengths(dataset, "input_ids")
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SimilarLengths(torch.tensor(lengths), self.args.train_batch_size, seed)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Two schedules one after the other, each with warm-up and decay, if there are two stages."""
        first = steps_of_first_stage(self.attention_steps, num_training_steps)
        if first == 0 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        of_first, of_second = (
            get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=self.args.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            ).lr_lambdas[0]
            for steps in (first, num_training_steps - first)
        )
        ratio = self.attention_learning_rate / self.args.learning_rate
        self.lr_scheduler = LambdaLR(
            optimizer, lambda step: ratio * of_first(step) if step < first else of_second(step - first)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_num_items_in_batch(self, batch_samples, device):
        """`ITEMS` of all micro-batches and processes of a step, [3]."""
        counts = sum(count_items(batch).sum(0) for batch in batch_samples) if batch_samples else torch.zeros(len(ITEMS))
        return self.accelerator.reduce(counts.to(device))

    def examples_losses(self, model, inputs) -> torch.Tensor:
        """The losses in use, summed over the items of each example: [B, losses]."""
        masked = inputs["labels"] != IGNORED_LABEL
        with torch.no_grad():
            targets = self.hidden_states_and_logits(self.teacher.model, inputs, masked)
        outputs = self.hidden_states_and_logits(model, inputs, masked)
        sums = loss_sums(self.teacher, outputs, targets, inputs, self.weights)
        return torch.stack([sums[name] for name in self.weights], dim=1)

    def attention_losses(self, model, inputs) -> torch.Tensor:
        """The loss of the first stage, a mean over layers, summed over the tokens of each example: [B, 1]."""
        nowhere = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        with torch.no_grad(), attention_outputs(self.teacher.model) as given:
            states = self.hidden_states_and_logits(self.teacher.model, inputs, nowhere).hidden_states
        self.layer_inputs[:] = states[:-1]
        own = self.hidden_states_and_logits(model, inputs, nowhere).hidden_states[1:]
        tokens = inputs["attention_mask"].bool()
        errors = [
            squared_errors(x, y, tokens, layer.attention.output.LayerNorm)
            for x, y, layer in zip(own, given, self.teacher.layers, strict=True)
        ]
        return torch.stack(errors).mean(0)[:, None]

    def hidden_states_and_logits(self, model, inputs, masked: torch.Tensor):
        """Outputs of teacher or student; an MLM head's only where `masked`, bool [B, N]."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if "masked_tokens" not in self.weights:
            return model(**given, output_hidden_states=True, return_dict=True)
        with logits_of(self.accelerator.unwrap_model(model), masked):
            return model(**given, output_hidden_states=True, return_dict=True)

    def weighted(self, sums: torch.Tensor, items: torch.Tensor, weights: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses, a scalar, and the means of each, from sums [losses] and numbers of items [3]."""
        means = sums / self.items_of(items, weights).clamp(min=1)
        return (means * means.new_tensor(list(weights.values()))).sum(), means

    def items_of(self, items: torch.Tensor, names) -> torch.Tensor:
        """The number of items of each loss, [losses], from those of all kinds, [3]."""
        return items[[ITEMS.index(ITEM_OF_LOSS[name]) for name in names]]

    def steps_left_alone(self) -> int:
        """How many steps are left of the first stage; 0 in the first step after it, and negative later."""
        return steps_of_first_stage(self.attention_steps, self.state.max_steps) - self.state.global_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        left = self.steps_left_alone()
        if left <= 0:
            if left == 0 < self.state.global_step:
                # gradients become many times larger: by the first stage's mean squares Adam's steps would be, too
                self.optimizer.state.clear()
            return super().training_step(model, inputs, num_items_in_batch)
        # until the backward pass has ended, because activation checkpointing computes layers again in it
        with (
            attention_alone(self.accelerator.unwrap_model(model)) as self.layer_inputs,
            torch.compiler.set_stance("force_eager"),  # one graph would be compiled for each step
        ):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        alone = self.steps_left_alone() > 0
        weights = {"attention": 1.0} if alone else self.weights
        sums = (self.attention_losses if alone else self.examples_losses)(model, inputs).sum(0)
        items = count_items(inputs).sum(0)
        for name, total in zip(weights, torch.stack([sums.detach(), self.items_of(items, weights)], dim=1)):
            self.totals[name] = self.totals.get(name, 0) + total
        loss, _ = self.weighted(sums, items if num_items_in_batch is None else num_items_in_batch, weights)
        # gradients are averaged over processes, and the items are those of all
        return loss if num_items_in_batch is None else loss * self.accelerator.num_processes

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns (None, losses and items of each example [B, losses + 3], items [B, 3])."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.examples_losses(model, inputs)
        items = count_items(inputs)
        return None, torch.cat([sums.double(), items], dim=1), items

    def mean_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        """The losses over all of the evaluation's items."""
        totals = torch.from_numpy(prediction.predictions).double().sum(0)
        loss, means = self.weighted(totals[: -len(ITEMS)], totals[-len(ITEMS) :], self.weights)
        metrics = {"loss": loss.item(), **dict(zip(self.weights, means.tolist(), strict=True))}
        return metrics | {"tokens": int(totals[-len(ITEMS)]), "examples": int(totals[1 - len(ITEMS)])}

    def log(self, logs, start_time=None):
        if "loss" in logs:
            for name, total in self.totals.items():
                sums, items = self.accelerator.reduce(total).tolist()
                logs[name] = sums / max(items, 1)
            self.totals = {}
        super().log(logs, start_time)
