"""How much memory a model needs at least, before it is built, how much a run has needed, and what is kept of it."""

import ctypes
import resource
import sys

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.training_args import OptimizerNames

from lambdabert.text.arguments import TextArguments
from lambdabert.training.arguments import RunArguments

FLOAT_BYTES = 4
GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def count_parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Counts the parameters of a model without building it: a layer's are the difference that the second one makes.

    Raises:
        ValueError: a size is larger than a tensor can have.
    """

    def count(layers: int) -> int:
        with torch.device("meta"):
            fewer = type(config)(**{**config.to_dict(), "num_hidden_layers": layers})
            return model_class(fewer).num_parameters()

    try:
        if config.num_hidden_layers < 2:
            return count(config.num_hidden_layers)
        one, two = count(1), count(2)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"The config's sizes are larger than a tensor can have ({error}); lower them.") from error
    return one + (config.num_hidden_layers - 1) * (two - one)


def memory_of(device: torch.device) -> int:
    """All memory that a device has, the CPU's with its swap; bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total + psutil.swap_memory().total


def check_memory(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    args: RunArguments,
    data_args: TextArguments,
    other_parameters: int = 0,
) -> None:
    """Refuses a model that certainly needs more memory than there is.

    This counts the weights and, for training, their gradients, Adam's two moments and the input of every layer, the
    part of a step's activations that even activation checkpointing keeps.

    Args:
        model_class: the model to be built.
        config: its config.
        args: the Trainer's arguments.
        data_args: how long the rows of a batch are.
        other_parameters: of a model that is not trained.

    Raises:
        ValueError: it cannot fit; the message gives the numbers.
    """
    parameters = count_parameters(model_class, config)
    trains = args.do_train or args.dry_run
    adam = args.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    static = FLOAT_BYTES * (parameters * (1 + trains * (1 + 2 * adam)) + other_parameters)
    batch = 1 if args.auto_find_batch_size or not trains else args.per_device_train_batch_size
    width = 2 if args.bf16 or args.fp16 else FLOAT_BYTES
    activations = trains * batch * data_args.longest_row * config.hidden_size * config.num_hidden_layers * width
    sharing = args.world_size if args.fsdp or args.deepspeed else 1
    needed, there = static / sharing + activations, memory_of(args.device)
    if needed > there:
        padded = data_args.longest_row > data_args.max_seq_length
        row = f"pad_to_multiple_of={data_args.pad_to_multiple_of}" if padded else "max_seq_length"
        raise ValueError(
            f"The model has {parameters:,} parameters (hidden_size={config.hidden_size}, "
            f"num_hidden_layers={config.num_hidden_layers}, intermediate_size={config.intermediate_size}, "
            f"vocab_size={config.vocab_size}, max_position_embeddings={config.max_position_embeddings}): "
            f"at least {static / sharing / GIB:,.1f} GiB for weights{', gradients and optimizer' if trains else ''}"
            + (
                f" and {activations / GIB:,.1f} GiB for a step of {batch} x {data_args.longest_row} tokens "
                f"(per_device_train_batch_size x {row})"
                if trains
                else ""
            )
            + f", where {args.device.type} has {there / GIB:,.1f} GiB; lower one of these sizes."
        )


def peak_memory(device: torch.device) -> int:
    """Most memory held so far: the accelerator's, or the process's on the CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed for what is allocated next; returns whether it is glibc, which can.

    By itself glibc gives arrays above 32 MB, and what is free at the end of its heap, back to the system, which clears
    every page anew in the next step (docs/speed.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = ((M_MMAP_THRESHOLD, GIB), (M_TRIM_THRESHOLD, GIB))
    return mallopt is not None and all(mallopt(*option) for option in options)
