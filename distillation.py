"""A LambdaBERT learns what a trained BERT computes: what is compared, how it is weighed, and the Trainer that does it.

Each loss is a sum over the tokens, examples or masked tokens of a batch, divided by their number in the whole step, so
that neither padding nor gradient accumulation changes it:

    layers           every layer's hidden state: squared error over the variance that the teacher's norm gives it
    last_layer       the last layer's alone
    sentences        the sentence vector, pooled as the teacher pools: 1 - cosine
    masked_tokens    the MLM head's distribution at masked tokens: KL divergence, teacher first (nats)
    classes          the classifier's: KL divergence (nats); of a regression, the squared error

Shapes: B examples, N tokens, D hidden_size.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)
from transformers.trainer_utils import EvalPrediction

from pretraining_data import IGNORED_LABEL, list_lengths
from pretraining_trainer import InterruptibleTrainer, logits_of, mlm_logits

ITEMS = ("tokens", "examples", "masked tokens")
ITEM_OF_LOSS = {
    "layers": "tokens",
    "last_layer": "tokens",
    "sentences": "examples",
    "masked_tokens": "masked tokens",
    "classes": "examples",
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

    @cached_property
    def variances(self) -> list[float]:
        """Each layer's variance over D: its norm scales states of unit variance."""
        return [layer.output.LayerNorm.weight.square().mean().item() for layer in self.model.base_model.encoder.layer]

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


def loss_sums(teacher: Teacher, outputs, targets, inputs: dict[str, torch.Tensor], names) -> dict[str, torch.Tensor]:
    """Each example's part of the losses `names`, summed over its tokens where a loss is one of tokens: [B] each.

    Args:
        teacher: pools, and knows its variances and kind of labels.
        outputs: the student's, with hidden states.
        targets: the teacher's.
        inputs: the batch; `labels` are not -100 where tokens are masked.
    """
    tokens = inputs["attention_mask"].bool()
    pairs = list(zip(outputs.hidden_states[1:], targets.hidden_states[1:], strict=True))
    errors = {}

    def error(layer: int) -> torch.Tensor:
        if layer not in errors:
            own, given = pairs[layer]
            squares = (own.float() - given.float()).square().mean(-1)
            errors[layer] = squares.masked_fill(~tokens, 0).sum(1) / teacher.variances[layer]
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


def count_items(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`ITEMS` of each example, [B, 3]."""
    tokens = inputs["attention_mask"].sum(1)
    return torch.stack([tokens, torch.ones_like(tokens), (inputs["labels"] != IGNORED_LABEL).sum(1)], dim=1)


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
    """

    def __init__(self, *args, teacher: Teacher, weights: LossWeights, **kwargs):
        super().__init__(*args, compute_metrics=self.mean_losses, **kwargs)
        self.teacher = teacher.to(self.args.device)
        self.weights = weights.used
        self.loss_is_scaled_for_ga = True  # by the items of the whole step
        # summed losses and numbers of items since the last log
        self.loss_sums = torch.zeros(len(self.weights), device=self.args.device)
        self.item_sums = torch.zeros(len(ITEMS), device=self.args.device)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            lengths = list_lengths(dataset, "input_ids")
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SimilarLengths(torch.tensor(lengths), self.args.train_batch_size, seed)

    def _get_num_items_in_batch(self, batch_samples, device):
        """`ITEMS` of all micro-batches and processes of a step, [3]."""
        counts = sum(count_items(batch).sum(0) for batch in batch_samples) if batch_samples else torch.zeros(len(ITEMS))
        return self.accelerator.reduce(counts.to(device))

    def examples_losses(self, model, inputs) -> torch.Tensor:
        """The losses in use, summed over the items of each example: [B, losses]."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        masked = inputs["labels"] != IGNORED_LABEL

        def run(network, of_head):
            if "masked_tokens" not in self.weights:
                return network(**given, output_hidden_states=True, return_dict=True)
            with logits_of(of_head, masked):
                return network(**given, output_hidden_states=True, return_dict=True)

        with torch.no_grad():
            targets = run(self.teacher.model, self.teacher.model)
        outputs = run(model, self.accelerator.unwrap_model(model))
        sums = loss_sums(self.teacher, outputs, targets, inputs, self.weights)
        return torch.stack([sums[name] for name in self.weights], dim=1)

    def weighted(self, sums: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses, a scalar, and each of them, from sums [losses] and numbers of items [3]."""
        counts = items[[ITEMS.index(ITEM_OF_LOSS[name]) for name in self.weights]].clamp(min=1)
        means = sums / counts
        return (means * means.new_tensor(list(self.weights.values()))).sum(), means

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sums = self.examples_losses(model, inputs).sum(0)
        items = count_items(inputs).sum(0)
        self.loss_sums += sums.detach()
        self.item_sums += items
        loss, _ = self.weighted(sums, items if num_items_in_batch is None else num_items_in_batch)
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
        loss, means = self.weighted(totals[: -len(ITEMS)], totals[-len(ITEMS) :])
        metrics = {"loss": loss.item(), **dict(zip(self.weights, means.tolist(), strict=True))}
        return metrics | {"tokens": int(totals[-len(ITEMS)]), "examples": int(totals[1 - len(ITEMS)])}

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sums, items = self.accelerator.reduce(self.loss_sums), self.accelerator.reduce(self.item_sums)
            logs |= dict(zip(self.weights, self.weighted(sums, items)[1].tolist(), strict=True))
            self.loss_sums.zero_()
            self.item_sums.zero_()
        super().log(logs, start_time)
