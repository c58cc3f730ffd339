"""The first stage of distillation, in which every lambda layer learns by itself, given the teacher's hidden states.

An attention block is attention or a lambda layer, its output projection, the residual and the norm.

Shapes: B examples, N tokens, D hidden_size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments, get_scheduler

from lambdabert.distillation.teacher import encoder_layers


def steps_of_first_stage(attention_steps: float, steps: int) -> int:
    """The number of steps that belong to the first stage: `attention_steps` itself, or a share of all if below 1."""
    return min(steps, math.ceil(steps * attention_steps) if attention_steps < 1 else int(attention_steps))


def two_schedules(
    args: TrainingArguments, optimizer: torch.optim.Optimizer, steps: tuple[int, int], ratio: float
) -> LambdaLR:
    """Two schedules one after the other, each with the warm-up and decay of the arguments.

    Args:
        args: the Trainer's.
        optimizer: its optimizer.
        steps: of the first stage and of the second.
        ratio: the peak rate of the first stage over that of the second.
    """

    settings: Any = args.lr_scheduler_kwargs

    def course(steps: int) -> Callable[[int], float]:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=settings,
        ).lr_lambdas[0]

    first, second = (course(max(1, of_stage)) for of_stage in steps)  # one may have none
    return LambdaLR(optimizer, lambda step: ratio * first(step) if step < steps[0] else second(step - steps[0]))


@contextmanager
def attention_outputs(bert: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the output of each layer's attention block, [B, N, D] each, while a BERT runs."""
    outputs: list[torch.Tensor] = []

    def collect(block: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.get_submodule("attention").register_forward_hook(collect) for layer in encoder_layers(bert)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_alone(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Reduces each layer of a LambdaBERT to its attention block, with an input of its own.

    The model then runs as usual, under whatever wraps it, and its hidden states are those of the blocks.

    Yields:
        A list, for the inputs of the layers: [B, N, D] each.
    """
    given: list[torch.Tensor] = []
    layers = encoder_layers(model)
    blocks = [layer.get_submodule("attention") for layer in layers]
    for i, layer in enumerate(layers):
        layer.forward = lambda states, mask=None, layout=None, i=i: blocks[i](given[i], mask, layout)
    try:
        yield given
    finally:
        for layer in layers:
            del layer.forward
