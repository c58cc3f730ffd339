"""Exports a LambdaBERT for other runtimes: ONNX, in float32 or int8, or a program of torch.export.

    python export_model.py models/mine --format onnx --output models/mine_onnx
    python export_model.py models/mine --format onnx --quantize int8 --output models/mine_int8

The output is a folder with the program, the tokenizer and the config. It is written only when the program, run on
padded batches of other sizes, gives what PyTorch gives: within 1e-5 of the norm of each output in float32, and 0.25 in
int8. docs/deploying.md shows how it is used.
"""

import argparse
import sys
from collections.abc import Sequence

from lambdabert.command_line import Parser, run_command
from lambdabert.deployment import FORMATS, export_model


def build_parser() -> Parser:
    description, _, epilog = __doc__.partition("\n")
    parser = Parser(
        prog="export_model.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="The folder of a LambdaBERT, or of a sentence-transformers model of one.")
    parser.add_argument("--format", default="onnx", help=f"One of {', '.join(FORMATS)}; onnx if not given.")
    parser.add_argument("--quantize", help="int8: linear layers with 8-bit weights; float32 if not given.")
    parser.add_argument("--output", required=True, help="The folder to write, new or empty.")
    return parser


def run(options: argparse.Namespace) -> None:
    export = export_model(options.model, options.output, options.format, options.quantize)
    length = "any length" if export.limit is None else f"up to {export.limit} tokens"
    print(f"{export.file}: {export.file.stat().st_size / 1e6:.1f} MB, {length}; outputs {', '.join(export.outputs)}")
    print(
        f"largest deviation from PyTorch: {export.deviation:.1e} of an output's norm (tolerance {export.tolerance:g})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(build_parser(), argv, run)


if __name__ == "__main__":
    sys.exit(main())
