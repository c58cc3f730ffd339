"""Speed and memory of whole models side by side: LambdaBERT, the encoders one would pick instead, and the floor.

    python -m benchmarks.speed                              CPU, float32: forward, training and mixed lengths
    python -m benchmarks.speed --dtype bfloat16             the same in bfloat16; takes the GPU where there is one
    python -m benchmarks.speed --parts forward --rows lambda-local floor bert --lengths 512 4096

Every part runs all of its rows in one process: after one unmeasured call of each, every repetition times each row
once, and the table holds the medians. Models are of base shape (width 768) with random weights, and start from random
token ids; `--layers` cuts all of them alike. The parts:

    forward   evaluation, full sequences without a mask, `--tokens` tokens a batch or one sequence if that is longer
    train     forward, backward and AdamW step of the pretraining models (MLM and next sentence), 15 % of the tokens
              masked, `num_items_in_batch` given as the Trainer does
    mixed     evaluation; 32 rows whose lengths are drawn from Beta(1, 3) times the longest length, which one row has,
              and scaled to a mean of a quarter of it. Rows ending in "-full" get as many tokens in sequences of the
              longest length, without padding.

Rows are named in `ROWS` of `encoders.py`, which says what the floor is. `-compiled` and `-int8` rows run only if named.
Memory is the peak of a call, with the model's weights, gradients and optimizer states: on a CPU resident memory of a
fresh process, beyond that of the imports; on a GPU what is allocated for the call.

The tests of the paths that are timed run first, and nothing is timed unless they pass.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.calls import MIXED_ROWS, Call, Cell, measure_memory
from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.encoders import PARTS, ROWS, runs, split_name
from benchmarks.environment import environment
from benchmarks.report import markdown_table, write_json
from benchmarks.runs import one_line_errors

LENGTHS = {"forward": [128, 512, 2048, 4096, 8192, 16384], "train": [128, 512], "mixed": [512]}
DEFAULT_ROWS = {
    "forward": ["lambda-local", "lambda-global", "floor", "bert"],
    "train": ["lambda-local", "lambda-global", "bert"],
    "mixed": ["lambda-local", "lambda-local-full", "lambda-global", "lambda-global-full", "bert", "bert-full"],
}

Result = dict[str, Any]


def measure(cells: list[Cell], repeats: int, threads: int) -> list[Result]:
    """Times cells of one part and length in turn; a cell that cannot run says why instead."""
    results, calls = [], []
    for cell in cells:
        result: Result = asdict(cell)
        try:
            result["peak_bytes"] = measure_memory(cell, threads)
            call = Call(cell)
            call()
        except Exception as error:  # whatever a library raises where it has no such kernel or too little memory
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"  {cell.row}: {result['error']}", file=sys.stderr)
        else:
            result["real_tokens"] = call.real_tokens
            calls.append((call, result))
        results.append(result)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for (call, _), row_times in zip(calls, times, strict=True):
            row_times.append(call.seconds())
    for (_, result), row_times in zip(calls, times, strict=True):
        result["seconds"] = statistics.median(row_times)
        result["all_seconds"] = row_times
        result["tokens_per_second"] = result["real_tokens"] / result["seconds"]
    return results


def add_ratios(results: list[Result]) -> None:
    """Adds each row's speed over BERT's and its time over the floor's and over that of full sequences."""
    for result in results:
        if "seconds" not in result:
            continue
        peers = {
            other["row"]: other
            for other in results
            if "seconds" in other and (other["part"], other["length"]) == (result["part"], result["length"])
        }
        if "bert" in peers:
            result["speed_over_bert"] = result["tokens_per_second"] / peers["bert"]["tokens_per_second"]
            if result["peak_bytes"]:
                result["memory_over_bert"] = result["peak_bytes"] / peers["bert"]["peak_bytes"]
        if "floor" in peers:
            result["time_over_floor"] = result["seconds"] / peers["floor"]["seconds"]
        full = peers.get(result["row"] + "-full")
        if full:
            result["time_over_full"] = result["seconds"] / full["seconds"]


def table(results: list[Result]) -> str:
    """The results in Markdown."""
    head = ["part", "length", "row", "ms", "tokens/s", "speed / BERT", "time / floor", "time / full"]
    head += ["MiB", "memory / BERT"]

    def shown(result: Result, key: str, form: str) -> str:
        return format(result[key], form) if result.get(key) is not None else ""

    rows = []
    for result in results:
        peak = f"{result['peak_bytes'] / 2**20:.0f}" if result.get("peak_bytes") else ""
        milliseconds = f"{result['seconds'] * 1e3:.1f}" if "seconds" in result else result["error"]
        rows.append(
            [
                result["part"],
                result["length"],
                result["row"],
                milliseconds,
                shown(result, "tokens_per_second", ".0f"),
                shown(result, "speed_over_bert", ".2f"),
                shown(result, "time_over_floor", ".3f"),
                shown(result, "time_over_full", ".3f"),
                peak,
                shown(result, "memory_over_bert", ".2f"),
            ]
        )
    return markdown_table(head, rows)


def plot(results: list[Result], file: Path) -> None:
    """Tokens per second and peak memory of the forward pass against length."""
    measured = [result for result in results if result["part"] == "forward" and "seconds" in result]
    if not measured:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for row in dict.fromkeys(result["row"] for result in measured):
        points = [result for result in measured if result["row"] == row]
        lengths = [point["length"] for point in points]
        style = "--" if row == "floor" else "-"
        speed.plot(lengths, [point["tokens_per_second"] for point in points], style, marker=".", label=row)
        if all(point["peak_bytes"] for point in points):
            memory.plot(lengths, [point["peak_bytes"] / 2**20 for point in points], style, marker=".", label=row)
    for panel, label in ((speed, "tokens per second"), (memory, "peak memory, MiB")):
        panel.set(xscale="log", xlabel="tokens in a sequence", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.set_xticks(sorted({result["length"] for result in measured}))
        panel.get_xaxis().set_major_formatter("{x:.0f}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    speed.legend()
    figure.savefig(file)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", nargs="+", help=f"from {', '.join(ROWS)}, each also with -compiled or -int8")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of the longest sequence; else those of the part")
    parser.add_argument("--layers", type=int, help="in every model; default 2 on a CPU, 12 on a GPU")
    parser.add_argument("--tokens", type=int, help="in a batch; default 4096 on a CPU, 65536 on a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="folder of the table, JSON and plot")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    options.layers = options.layers or (12 if on_gpu else 2)
    options.tokens = options.tokens or (65536 if on_gpu else 4096)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        for row in options.rows or ():
            split_name(row)
    require_passing_tests(*LAYER_TESTS)
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("dtype", "layers", "tokens", "repeats")}
    settings["mixed_lengths"] = f"Beta(1, 3) x longest, {MIXED_ROWS} rows, mean longest / 4"
    results: list[Result] = []
    report = {"environment": environment("einops"), "settings": settings, "results": results}
    for part in options.parts:
        for length in options.lengths or LENGTHS[part]:
            rows = [row for row in options.rows or DEFAULT_ROWS[part] if runs(row, part)]
            print(f"{part} {length}: {', '.join(rows)}", file=sys.stderr)
            cells = [
                Cell(part, row, length, options.layers, options.tokens, options.dtype, options.device) for row in rows
            ]
            results += measure(cells, options.repeats, options.threads)
            add_ratios(results)
            write_json(options.output / "speed.json", report)
            (options.output / "speed.md").write_text(table(results), encoding="utf-8")
            plot(results, options.output / "speed.png")
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
