"""What can be known of a run before any text is read: does it fit into memory, and can the Trainer do it?"""

import copy
import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
import psutil
import torch
import transformers
from datasets import Dataset
from transformers import BertTokenizer, IntervalStrategy, PreTrainedConfig, PrinterCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from lambdabert.text.objectives import Objective
from training_options import RunArguments

logger = logging.getLogger(__name__)

TINY_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b")
TINY_SHAPE = dict(vocab_size=8, hidden_size=8, num_hidden_layers=2, intermediate_size=8, max_position_embeddings=64)
TINY_TEXT_SETTINGS = dict(pad_to_multiple_of=None, mlm_probability=0.5)
TINY_TEXT = (5, 6, 5, 6, 5)  # token ids
STEPS = 2
FLOAT_BYTES = 4
GIB = 2**30


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Lets garbage collection, which the Trainer asks for, pass over all that is there already."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_trackers(args: RunArguments) -> None:
    """Raises ValueError if a tracker of `report_to` is unknown or not installed."""
    for name in args.report_to or ():
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"report_to={name} cannot be used: {error}") from error


def check_hub(args: RunArguments) -> None:
    """Raises ValueError if the model is to be pushed to the hub, and nobody is logged in there."""
    if not args.push_to_hub:
        return
    try:
        huggingface_hub.whoami(token=args.hub_token)
    except Exception as error:  # the transport library, and so the class of its errors, differs between hub versions
        raise ValueError(
            f"push_to_hub needs the hub and a login there ({error}); run `hf auth login`, or leave push_to_hub out."
        ) from error


def check_compiler(args: RunArguments) -> None:
    """Raises ValueError if a back end or mode of `torch_compile` is unknown."""
    if not args.torch_compile:
        return
    backends = torch._dynamo.list_backends(exclude_tags=None)
    if args.torch_compile_backend not in backends:
        raise ValueError(
            f"torch_compile_backend={args.torch_compile_backend} is unknown: use one of {', '.join(backends)}."
        )
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    if args.torch_compile_mode not in (None, *modes):
        raise ValueError(f"torch_compile_mode={args.torch_compile_mode} is unknown: use one of {', '.join(modes)}.")


def tiny_tokenizer() -> BertTokenizer:
    """A tokenizer of two words."""
    return BertTokenizer(vocab={token: i for i, token in enumerate(TINY_VOCABULARY)})


def tiny_examples(objective: Objective, count: int) -> Dataset:
    """Examples as `prepare_examples` makes them.

    Args:
        objective: what an example is.
        count: how many.
    """
    cls, sep = (TINY_VOCABULARY.index(token) for token in ("[CLS]", "[SEP]"))
    columns = {"input_ids": [[cls, *TINY_TEXT, sep]] * count}
    if objective.sentence_label:
        columns["input_ids"] = [[cls, *TINY_TEXT, sep, *TINY_TEXT, sep]] * count
        columns["token_type_ids"] = [[0] * (len(TINY_TEXT) + 2) + [1] * (len(TINY_TEXT) + 1)] * count
        columns[objective.sentence_label] = [i % 2 for i in range(count)]
    return Dataset.from_dict(columns)


def tiny_arguments(args: RunArguments, folder: str) -> RunArguments:
    """The Trainer's arguments for a few steps that leave nothing behind; what decides how a step is made stays."""
    args = copy.copy(args)
    args.output_dir, args.max_steps = folder, STEPS
    args.report_to, args.push_to_hub, args.disable_tqdm, args.log_level = [], False, True, "error"
    args.logging_strategy = IntervalStrategy.NO
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    args.eval_delay = 0
    if args.eval_strategy == IntervalStrategy.STEPS:
        args.eval_steps = STEPS
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 2
    args.gradient_accumulation_steps = min(2, args.gradient_accumulation_steps)
    args.dataloader_num_workers = min(1, args.dataloader_num_workers)
    args.torch_compile = False  # takes long, and again for the real model
    return args


def rehearse(run) -> None:
    """Takes two steps of a tiny model on a made-up text, with the run's own options.

    The Trainer and what it is made of refuse much only once it is built, or in its first step.

    Args:
        run: a `TrainingRun`; nothing of it is changed.

    Raises:
        ValueError: something does not work; the text says what.
    """
    args = run.training_args
    check_trackers(args)
    check_compiler(args)
    if not args.dry_run:
        check_hub(args)
    if args.deepspeed:
        return  # its plugin belongs to one model
    tiny = copy.copy(run)
    tiny.tokenizer, tiny.data_args = tiny_tokenizer(), copy.copy(run.data_args)
    vars(tiny.data_args).update(TINY_TEXT_SETTINGS)
    verbosity = transformers.logging.get_verbosity()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), old_objects_kept():
            warnings.simplefilter("ignore")
            tiny.training_args = tiny_arguments(args, folder)
            tiny.become_tiny()
            step = tiny.training_args.train_batch_size * tiny.training_args.gradient_accumulation_steps
            examples = tiny_examples(tiny.data_args.example_recipe().objective, STEPS * step * args.world_size)
            tiny.examples = {"train": examples, "validation": examples} if args.do_eval else {"train": examples}
            trainer = tiny.trainer()
            trainer.pop_callback(PrinterCallback)
            trainer.pop_callback(trainer.stop)  # a signal in these steps ends the command
            if args.do_train or args.dry_run:
                trainer.train()
            elif args.do_eval:
                trainer.evaluate()
    except Exception as error:  # whatever the Trainer and its parts raise comes from the options
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"The Trainer cannot work with these options: {said}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def count_parameters(model_class: type, config: PreTrainedConfig) -> int:
    """Parameters of a model that is not built: layers are counted by the difference that the second one makes.

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
    """All memory that a device has, in bytes; with the CPU's swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total + psutil.swap_memory().total


def check_memory(
    model_class: type,
    config: PreTrainedConfig,
    args: RunArguments,
    max_seq_length: int,
    other_parameters: int = 0,
) -> None:
    """Refuses a model that certainly needs more memory than there is.

    Counted are weights, and for training their gradients and Adam's two moments; and, of a step's activations, the
    input of every layer alone, which even activation checkpointing keeps.

    Args:
        model_class: the model to be built.
        config: its config.
        args: the Trainer's arguments.
        max_seq_length: N, tokens of an example.
        other_parameters: of a model that is not trained.

    Raises:
        ValueError: it cannot fit; the text tells the numbers.
    """
    parameters = count_parameters(model_class, config)
    trains = args.do_train or args.dry_run
    adam = args.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    static = FLOAT_BYTES * (parameters * (1 + trains * (1 + 2 * adam)) + other_parameters)
    batch = 1 if args.auto_find_batch_size or not trains else args.per_device_train_batch_size
    width = 2 if args.bf16 or args.fp16 else FLOAT_BYTES
    activations = trains * batch * max_seq_length * config.hidden_size * config.num_hidden_layers * width
    sharing = args.world_size if args.fsdp or args.deepspeed else 1
    needed, there = static / sharing + activations, memory_of(args.device)
    if needed > there:
        raise ValueError(
            f"The model has {parameters:,} parameters (hidden_size={config.hidden_size}, "
            f"num_hidden_layers={config.num_hidden_layers}, intermediate_size={config.intermediate_size}, "
            f"vocab_size={config.vocab_size}, max_position_embeddings={config.max_position_embeddings}): "
            f"at least {static / sharing / GIB:,.1f} GiB for weights{', gradients and optimizer' if trains else ''}"
            + (
                f" and {activations / GIB:,.1f} GiB for a step of {batch} x {max_seq_length} tokens "
                f"(per_device_train_batch_size x max_seq_length)"
                if trains
                else ""
            )
            + f", where {args.device.type} has {there / GIB:,.1f} GiB; lower one of these sizes."
        )
