"""A rehearsal: before any text is read, a tiny model takes two steps with the options of the run.

The Trainer and its parts refuse much only once they are built, or in the first step.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import BertTokenizer, IntervalStrategy, PrinterCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy

from lambdabert.text.objectives import Objective
from lambdabert.training.arguments import RunArguments
from lambdabert.training.hub import check_hub
from lambdabert.training.tokenizers import SPECIAL_TOKENS
from lambdabert.training.trainer import InterruptibleTrainer

TINY_VOCABULARY = (*SPECIAL_TOKENS, "a", "b")
TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}
TINY_TEXT = (5, 6, 5, 6, 5)  # token ids
STEPS = 2

# makes a Trainer of its arguments, a tokenizer and the examples of "train" and "validation"
TrainerMaker = Callable[[RunArguments, BertTokenizer, dict[str, Dataset]], InterruptibleTrainer]


def check_trackers(args: RunArguments) -> None:
    """Raises ValueError if a tracker of `report_to` is unknown or not installed."""
    for name in args.report_to or ():
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"report_to={name} cannot be used: {error}") from error


def check_compiler(args: RunArguments) -> None:
    """Raises ValueError if a back end or mode of `torch_compile` is unknown."""
    if not args.torch_compile:
        return
    backends = torch.compiler.list_backends(exclude_tags=None)
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
    """Makes examples of the columns that `prepare_examples` gives.

    Args:
        objective: what they are for.
        count: how many.
    """
    cls, sep = (TINY_VOCABULARY.index(token) for token in ("[CLS]", "[SEP]"))
    columns: dict[str, list] = {"input_ids": [[cls, *TINY_TEXT, sep]] * count}
    if objective.sentence_label is not None:
        columns["input_ids"] = [[cls, *TINY_TEXT, sep, *TINY_TEXT, sep]] * count
        columns["token_type_ids"] = [[0] * (len(TINY_TEXT) + 2) + [1] * (len(TINY_TEXT) + 1)] * count
        columns[objective.sentence_label] = [i % 2 for i in range(count)]
    return Dataset.from_dict(columns)


def tiny_arguments(args: RunArguments, folder: str) -> RunArguments:
    """The Trainer's arguments for a few steps that leave no trace; what decides how a step is computed stays."""
    args = copy.copy(args)
    args.output_dir, args.max_steps = folder, STEPS
    args.report_to, args.push_to_hub, args.disable_tqdm, args.log_level = [], False, True, "error"
    args.logging_strategy = IntervalStrategy.NO
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    args.eval_delay = args.warmup_steps = 0
    if args.eval_strategy == IntervalStrategy.STEPS:
        args.eval_steps = STEPS
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 2
    args.gradient_accumulation_steps = min(2, args.gradient_accumulation_steps)
    args.dataloader_num_workers = min(1, args.dataloader_num_workers)
    args.torch_compile = False  # takes long, and again for the real model
    return args


def rehearse(args: RunArguments, objective: Objective, make_trainer: TrainerMaker) -> None:
    """Takes two steps of a tiny model on a made-up text, with the run's own options.

    Args:
        args: the Trainer's arguments; they stay as they are.
        objective: what the examples are made for.
        make_trainer: makes the run's Trainer, with a tiny model.

    Raises:
        ValueError: something does not work; the message says what.
    """
    check_trackers(args)
    check_compiler(args)
    if not args.dry_run:
        check_hub(args)
    if args.deepspeed:
        return  # its plugin belongs to one model
    verbosity = transformers.logging.get_verbosity()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny_args = tiny_arguments(args, folder)
            step = tiny_args.train_batch_size * tiny_args.gradient_accumulation_steps
            examples = tiny_examples(objective, STEPS * step * args.world_size)
            splits = {"train": examples, "validation": examples} if args.do_eval else {"train": examples}
            trainer = make_trainer(tiny_args, tiny_tokenizer(), splits)
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
