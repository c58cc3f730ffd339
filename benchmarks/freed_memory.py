"""What it is worth that the training commands keep freed memory (`lambdabert.training.memory.keep_freed_memory`).

    python -m benchmarks.freed_memory --output freed_memory.json

Forward passes and training steps of `benchmarks.speed` on a CPU, float32, in processes of their own: in turn one in
which the C library does with freed memory what it does by itself, and one that keeps it. Shown are medians over the
calls of all processes, the pages that the system had to clear in a call, and the highest peak of memory.
"""

import argparse
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.calls import Call, Cell, in_new_process
from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.encoders import runs
from benchmarks.environment import environment
from benchmarks.report import markdown_table, write_json
from benchmarks.runs import one_line_errors
from lambdabert.training.memory import keep_freed_memory, peak_memory

LENGTHS = {"forward": [512, 16384], "train": [512]}
WARM_UP = 2  # calls: the first training step makes the optimizer's states

Result = dict[str, Any]


def repeat(cell: Cell, keeps: bool, count: int, threads: int) -> Result:
    """Calls in this process, which is to do nothing else.

    Args:
        cell: what is called.
        keeps: whether freed memory is kept.
        count: of calls, after those of warm-up.
        threads: of PyTorch.

    Returns:
        "seconds" of each call, "page_faults" a call, and "peak_bytes" of the process.
    """
    torch.set_num_threads(threads)
    if keeps and not keep_freed_memory():
        raise ValueError("freed_memory: this system's C library is not glibc, so there is nothing to compare.")
    call = Call(cell)
    for _ in range(WARM_UP):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = [call.seconds() for _ in range(count)]
    page_faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count
    return {"seconds": seconds, "page_faults": page_faults, "peak_bytes": peak_memory(torch.device("cpu"))}


def measure(cell: Cell, rounds: int, count: int, threads: int) -> list[Result]:
    """The cell with and without, in turn, each time in a new process."""
    found: dict[bool, list[Result]] = {False: [], True: []}
    for _ in tqdm(range(rounds), desc=f"{cell.part} {cell.length} {cell.row}", unit="round"):
        for keeps, results in found.items():
            results.append(in_new_process(repeat, cell, keeps, count, threads))
    return [
        asdict(cell)
        | {
            "keeps": keeps,
            "seconds": statistics.median(second for result in results for second in result["seconds"]),
            "all_seconds": [result["seconds"] for result in results],
            "page_faults": statistics.median(result["page_faults"] for result in results),
            "peak_bytes": max(result["peak_bytes"] for result in results),
        }
        for keeps, results in found.items()
    ]


def table(results: list[Result]) -> str:
    """A line for each part, length and row, without and with."""
    lines = []
    for without, kept in zip(results[::2], results[1::2], strict=True):
        lines.append(
            [
                without["part"],
                without["length"],
                without["row"],
                *(f"{result['seconds'] * 1e3:.0f}" for result in (without, kept)),
                f"{without['seconds'] / kept['seconds']:.2f}",
                *(f"{result['page_faults'] / 1e3:.1f}" for result in (without, kept)),
                *(f"{result['peak_bytes'] / 2**20:.0f}" for result in (without, kept)),
            ]
        )
    head = ["part", "length", "row", "ms", "ms, kept", "speed", "thousand pages", "kept", "peak MiB", "kept"]
    return markdown_table(head, lines)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.freed_memory", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", default=["lambda-local", "lambda-repetitions", "bert"])
    parser.add_argument("--parts", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; else those of the part")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--calls", type=int, default=4, help="timed in each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        for row in options.rows:
            if missing := [part for part in options.parts if not runs(row, part)]:
                raise ValueError(f"rows: {row!r} cannot be measured in parts={missing[0]}; leave one of them out.")
    require_passing_tests(*LAYER_TESTS)
    results: list[Result] = []
    settings = {name: getattr(options, name) for name in ("layers", "tokens", "rounds", "calls")}
    report = {"environment": environment("einops"), "settings": settings, "results": results}
    for part in options.parts:
        for length, row in product(options.lengths or LENGTHS[part], options.rows):
            cell = Cell(part, row, length, options.layers, options.tokens, "float32", "cpu")
            results += measure(cell, options.rounds, options.calls, options.threads)
            write_json(options.output, report)
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
