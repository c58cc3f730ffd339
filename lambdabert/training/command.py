"""A command from its arguments to its exit status."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from huggingface_hub.errors import StrictDataclassError

from lambdabert.command_line import error_line
from lambdabert.text.files import UnreadableTextError
from lambdabert.training.arguments import RunArguments, parse_arguments
from lambdabert.training.checkpoints import CheckpointError
from lambdabert.training.run import TrainingRun

logger = logging.getLogger(__name__)


def set_up_logging(training_args: RunArguments) -> None:
    """Logs messages of the package, of one process only, as they are; those of libraries by `--log_level`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if training_args.process_index == 0:
        logging.getLogger("lambdabert").setLevel(min(training_args.get_process_log_level(), logging.INFO))
    else:
        datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Excludes objects that already exist, mostly modules, from the Trainer's garbage collections."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@old_objects_kept()
def run_training_command(
    argv: list[str], groups: tuple[Any, ...], run_class: type[TrainingRun], description: str | None = None
) -> int:
    """Runs a command that trains.

    Args:
        argv: its arguments.
        groups: the dataclasses of its options: model, data, training.
        run_class: its run.
        description: what it does, for `--help`.

    Returns:
        The exit status.
    """
    try:
        arguments = parse_arguments(argv, groups, description)
        set_up_logging(arguments[-1])
        for note in arguments[-1].notes:
            logger.info(note)
        run = run_class(*arguments)
        run.prepare()
    except (ValueError, ImportError, OSError, StrictDataclassError, CheckpointError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return interrupted()
    except Exception as error:
        return fail(error, unexpected=True)
    try:
        return run.run()
    except (CheckpointError, UnreadableTextError, ImportError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return interrupted()
    except Exception as error:
        return fail(error, unexpected=True)


def interrupted() -> int:
    """Ends a command at Ctrl-C while nothing was trained; the exit status of a shell's own commands then."""
    print("Interrupted.", file=sys.stderr)
    return 130


def fail(error: Exception, *, unexpected: bool = False) -> int:
    """Prints one line on stderr.

    Args:
        error: what happened.
        unexpected: it may be a bug, and may have happened in one process alone: the line names the error's type, every
            process prints it, and `--log_level debug` shows the traceback.

    Returns:
        The exit status.
    """
    logger.debug("", exc_info=error)
    if unexpected:
        named = RuntimeError(f"{type(error).__name__}: {error} (--log_level debug shows where)")
        print(error_line(named), file=sys.stderr)
    elif os.environ.get("RANK", "0") == "0":
        print(error_line(error), file=sys.stderr)
    return 1
