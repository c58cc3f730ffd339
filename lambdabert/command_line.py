"""What the commands share: parsers that report a mistake in one line, and that line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser
from transformers.utils import logging


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated options, reports a mistake as a `ValueError`, and prints no usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists all options.")


class DataclassParser(Parser, HfArgumentParser):
    """The same for options that are the fields of dataclasses."""


def error_line(error: Exception) -> str:
    """What a command says of an error, in one line."""
    return f"error: {' '.join(str(error).split())}"


def run_command(parser: Parser, argv: Sequence[str] | None, run: Callable[[argparse.Namespace], None]) -> int:
    """Runs a command that trains nothing; what a user can fix is reported in one line on stderr.

    Args:
        parser: of its arguments.
        argv: these; None = those of the process.
        run: does what the parsed arguments ask for.

    Returns:
        The exit status.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading
    try:
        run(parser.parse_args(argv))
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        print(error_line(error), file=sys.stderr)
        return 1
    return 0
