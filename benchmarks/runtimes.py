"""Speed of LambdaBERT and BERT where they are deployed: PyTorch, compiled, and onnxruntime, in float32 and int8.

    python -m benchmarks.runtimes --output runs/runtimes                 every row, base shape
    python -m benchmarks.runtimes --models lambda-local bert --runtimes onnx --shapes 1x32 8x512

Models are of base shape (width 768) with random weights; `--layers` cuts all of them alike. Each shape is a batch and a
length of full sequences without padding, or `mixed`: 32 rows whose mean length is a quarter of the longest, 512, padded
(`mixed_lengths` of `calls.py`). LambdaBERT in PyTorch leaves padding out; the other rows compute it.

All rows of a shape run in one process: after one unmeasured call of each, every repetition times each row once. The
table holds medians, and for a batch of one, where a user waits for each call, also the 95th percentile; such shapes are
repeated five times as often. Ratios are to BERT in the same runtime and precision.

    torch      eager; int8 by torchao, activations as they come and one scale for each output channel
    compiled   `torch.compile`, for each shape anew
    onnx       onnxruntime on the CPU; int8 as `export_model.py --quantize int8` makes it, of both models

BERT is exported with opset 23, whose attention operator onnxruntime runs as one kernel, and was faster than with the
decomposed attention of opset 20, and than either after `onnxruntime.transformers.optimizer`.

The tests of exported programs run first, and nothing is timed unless they pass; each file is compared with PyTorch.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.calls import mixed_batch, random_tokens
from benchmarks.correctness import EXPORT_TESTS, LAYER_TESTS, require_passing_tests
from benchmarks.encoders import ROWS
from benchmarks.environment import environment
from benchmarks.report import markdown_table, write_json
from benchmarks.runs import one_line_errors
from lambdabert.deployment.checks import TOLERANCES, onnx_call
from lambdabert.deployment.loading import INPUTS, LoadedProgram, ModelProgram
from lambdabert.deployment.programs import quantise, silence, write_onnx

MODELS = ("lambda-local", "lambda-global", "lambda-repetitions", "bert")
RUNTIMES = ("torch", "compiled", "onnx")
PRECISIONS = ("float32", "int8")
SHAPES = ("1x32", "1x128", "1x512", "32x128", "8x512", "2x2048", "1x4096", "mixed")
MIXED_LONGEST = 512
LONGEST = 4096
ATTENTION_OPSET = 23

Inputs = dict[str, torch.Tensor]
Call = Callable[[Inputs], Any]
Result = dict[str, Any]


def build(model: str, layers: int) -> nn.Module:
    """A model of base shape in evaluation mode."""
    torch.manual_seed(0)
    return ROWS[model].build(layers, LONGEST, False).eval()


def export_bert(loaded: LoadedProgram, file: Path) -> None:
    """Writes BERT as an ONNX file for every batch and length."""
    example = make_inputs("2x16")
    example["attention_mask"][0, 9:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=LONGEST)}
    with silence(), torch.no_grad():
        program = torch.export.export(loaded.program, (), example, dynamic_shapes={name: axes for name in INPUTS})
        torch.onnx.export(
            program, (), file, kwargs=example, opset_version=ATTENTION_OPSET, external_data=False, verbose=False
        )


def export(name: str, model: nn.Module, precisions: Sequence[str], work: Path) -> dict[str, Path]:
    """Writes a model as ONNX files; returns them by precision."""
    loaded = LoadedProgram(ModelProgram(model), model.config, tokenizer=None, takes_choices=False)
    files = {precision: work / f"{name}_{precision}.onnx" for precision in PRECISIONS}
    (export_bert if name == "bert" else write_onnx)(loaded, files["float32"])
    if "int8" in precisions:
        quantise(files["float32"], files["int8"], loaded)
    return {precision: files[precision] for precision in precisions}


def calls_of(name: str, layers: int, runtimes: Sequence[str], precisions: Sequence[str], work: Path) -> dict[str, Call]:
    """The rows of a model: {"runtime precision": call}; those that are compiled are compiled when they are called."""
    model = build(name, layers)
    quantised = copy.deepcopy(model)
    if "int8" in precisions and {"torch", "compiled"} & set(runtimes):
        quantise_in_torch(quantised)
    in_torch = {"float32": model, "int8": quantised}
    calls: dict[str, Call] = {}
    for precision in precisions:
        if "torch" in runtimes:
            calls[f"torch {precision}"] = inference(in_torch[precision])
        if "compiled" in runtimes:
            calls[f"compiled {precision}"] = inference(torch.compile(in_torch[precision], dynamic=False))
    if "onnx" in runtimes:
        for precision, file in export(name, model, precisions, work).items():
            calls[f"onnx {precision}"] = onnx_call(file)
            check(f"{name} onnx {precision}", calls[f"onnx {precision}"], model, TOLERANCES[precision])
    return calls


def quantise_in_torch(model: nn.Module) -> None:
    """Turns the weights of linear layers into int8, in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def inference(model: Callable[..., Any]) -> Call:
    def call(inputs: Inputs) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return call


def check(row: str, call: Call, model: nn.Module, tolerance: float) -> None:
    """Compares hidden states of a batch whose size the export has not seen.

    Raises:
        ValueError: they deviate.
    """
    inputs = make_inputs("3x130")
    expected = inference(model)(inputs).last_hidden_state
    actual = next(iter(call(inputs).values()))
    deviation = ((actual - expected).norm() / expected.norm()).item()
    if not deviation <= tolerance:
        raise ValueError(f"{row} deviates by {deviation:.2g} from PyTorch, above {tolerance:g}; nothing was timed.")


def make_inputs(shape: str) -> Inputs:
    """The inputs of a shape; see the module.

    Raises:
        ValueError: there is no such shape.
    """
    torch.manual_seed(0)
    if shape == "mixed":
        ids, mask = mixed_batch(MIXED_LONGEST)
    else:
        sizes = shape.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes) or int(sizes[1]) > LONGEST:
            raise ValueError(f"shapes: {shape!r} is no shape; give BATCHxLENGTH up to {LONGEST}, or mixed.")
        ids = random_tokens(*map(int, sizes))
        mask = torch.ones_like(ids)
    return dict(zip(INPUTS, (ids, mask, torch.zeros_like(ids)), strict=True))


def measure(calls: dict[tuple[str, str], Call], shape: str, repeats: int) -> list[Result]:
    """Times the rows of a shape in turn."""
    inputs = make_inputs(shape)
    tokens = int(inputs["attention_mask"].sum())
    torch.compiler.reset()  # compiled rows then serve this shape alone
    for call in calls.values():
        call(inputs)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(repeats * (5 if is_single(shape) else 1)):
        for key, call in calls.items():
            began = time.perf_counter()
            call(inputs)
            times[key].append(time.perf_counter() - began)
    return [
        {"model": model, "runtime": row.split()[0], "precision": row.split()[1], "shape": shape, "tokens": tokens}
        | {"seconds": statistics.median(taken), "all_seconds": taken}
        for (model, row), taken in times.items()
    ]


def is_single(shape: str) -> bool:
    return shape.startswith("1x")


def add_ratios(results: list[Result]) -> None:
    """Adds each row's speed over BERT in its runtime and precision, and over BERT in float32 in its runtime."""
    bert = {(r["shape"], r["runtime"], r["precision"]): r["seconds"] for r in results if r["model"] == "bert"}
    for result in results:
        place = (result["shape"], result["runtime"])
        for name, precision in (("speed_over_bert", result["precision"]), ("speed_over_float32_bert", "float32")):
            if (*place, precision) in bert:
                result[name] = bert[(*place, precision)] / result["seconds"]


def longest_of_most(taken: Sequence[float]) -> float:
    """The 95th percentile: the smallest time that 95 % of all do not exceed."""
    return float(np.quantile(taken, 0.95, method="inverted_cdf"))


def table(results: Sequence[Result]) -> str:
    """Shapes by rows: milliseconds, and behind them the speed over BERT in the same runtime and precision."""
    shapes = list(dict.fromkeys(result["shape"] for result in results))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        cell = f"{1e3 * result['seconds']:.0f}"
        if is_single(result["shape"]):
            cell += f", {1e3 * longest_of_most(result['all_seconds']):.0f}"
        if result["model"] != "bert" and "speed_over_bert" in result:
            cell += f" ({result['speed_over_bert']:.2f})"
        rows.setdefault((result["runtime"], result["precision"], result["model"]), {})[result["shape"]] = cell
    head = ["runtime", "precision", "model", *shapes]
    return markdown_table(head, [[*row, *(cells.get(shape, "") for shape in shapes)] for row, cells in rows.items()])


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runtimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BATCHxLENGTH, or mixed")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="folder for runtimes.json and runtimes.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        for shape in options.shapes:
            make_inputs(shape)
        if (
            "int8" in options.precisions
            and find_spec("torchao") is None
            and {"torch", "compiled"} & {*options.runtimes}
        ):
            raise ValueError(
                "torchao is not installed: pip install torchao, or leave out int8 by --precisions float32."
            )
    require_passing_tests(*LAYER_TESTS)
    require_passing_tests(*EXPORT_TESTS)
    torch.set_num_threads(options.threads)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as work, one_line_errors():
        calls = {
            (model, row): call
            for model in options.models
            for row, call in calls_of(model, options.layers, options.runtimes, options.precisions, Path(work)).items()
        }
        for shape in options.shapes:
            results += measure(calls, shape, options.repeats)
            print(f"{shape} is measured", file=sys.stderr, flush=True)
    add_ratios(results)
    print(table(results), end="")
    if options.output:
        recorded = {name: value for name, value in vars(options).items() if name != "output"}
        packages = ["onnxruntime", "onnx", *(["torchao"] if find_spec("torchao") else [])]
        versions = environment(*packages)
        write_json(options.output / "runtimes.json", {"environment": versions, "options": recorded, "results": results})
        (options.output / "runtimes.md").write_text(table(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
