"""Where the time of inference goes: the share of each part of LambdaBERT's layers, on a CPU.

    python -m benchmarks.profile_layer --output runs/profile

Base shape with random weights, as in `speed.py`. Every part is a function or module of the library whose calls are
timed; a part called within another counts for itself alone, so the parts of a pass add up to the whole. Each number is
the median over the repeats, given in ms for 4096 tokens and as a share of the pass.

Nothing is timed unless the tests of the lambda layer pass.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import lambda_kernels
import lambda_layer
from benchmarks.calls import random_tokens
from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.encoders import LOCAL_SCOPE, lambda_model
from benchmarks.environment import environment
from benchmarks.report import markdown_table, write_json

REPORTED_TOKENS = 4096
FUNCTIONS = {  # of each part, where they are called from
    "position lambda": (
        (lambda_kernels, "position_lambda_within"),
        (lambda_kernels, "fft_position_lambda"),
        (lambda_layer, "global_position_lambda"),
    ),
    "content lambda": ((lambda_layer, "content_lambda"),),
    "application to the queries": ((lambda_layer, "apply_lambdas"),),
    "norms of queries and values": ((lambda_layer, "_normalise"),),
}
PARTS = [
    "feed-forward",
    "output projection, residual, norm",
    "projections to Q, K, V",
    "norms of queries and values",
    "content lambda",
    "position lambda",
    "application to the queries",
    "softmax, masks and copies of the lambda layer",
    "embeddings",
    "elsewhere",
]


class PartStopwatch:
    """Adds up the seconds of each part; a part's own, without those of the parts that it calls.

    Attributes:
        seconds: of each part since `reset`.
    """

    def __init__(self) -> None:
        self.running = ["elsewhere"]
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.since = time.perf_counter()

    def switch(self) -> None:
        """Counts the time until now for the part that is running."""
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted for `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(part)
            result = function(*args, **kwargs)
            self.switch()
            self.running.pop()
            return result

        return call

    def watch_functions(self) -> ExitStack:
        """A context in which the library's functions are timed."""
        stack = ExitStack()
        for part, functions in FUNCTIONS.items():
            for module, name in functions:
                stack.enter_context(patch.object(module, name, self.timed(part, getattr(module, name))))
        return stack

    def watch_modules(self, model: Any) -> None:
        """Times the modules of a `LambdaBertModel` from now on."""
        model.embeddings.forward = self.timed("embeddings", model.embeddings.forward)
        for layer in model.encoder.layer:
            layer.feed_forward_chunk = self.timed("feed-forward", layer.feed_forward_chunk)
            output, mixer = layer.attention.output, layer.attention.self
            output.forward = self.timed("output projection, residual, norm", output.forward)
            mixer.forward = self.timed("softmax, masks and copies of the lambda layer", mixer.forward)
            for projection in (mixer.to_queries, mixer.to_keys, mixer.to_values):
                projection.forward = self.timed("projections to Q, K, V", projection.forward)


def profile(layers: int, length: int, scope: int | None, tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part for 4096 tokens.

    Args:
        layers: of the model.
        length: of each sequence, in tokens.
        scope: R, or None for a global one.
        tokens: in a batch, or one sequence if that is longer.
        repeats: timed passes.
    """
    torch.manual_seed(0)
    model = lambda_model(layers, length, scope, pretraining=False).eval()
    inputs = random_tokens(max(1, tokens // length), length)
    stopwatch = PartStopwatch()
    runs = []
    with stopwatch.watch_functions(), torch.inference_mode():
        stopwatch.watch_modules(model)
        model(inputs)
        for _ in range(repeats):
            stopwatch.reset()
            model(inputs)
            stopwatch.switch()
            runs.append(stopwatch.seconds)
    scale = 1e3 * REPORTED_TOKENS / inputs.numel()
    return {part: statistics.median(run[part] for run in runs) * scale for part in PARTS}


def table(results: list[dict[str, Any]]) -> str:
    """A column for each scope and length, a row for each part."""
    head = [f"ms for {REPORTED_TOKENS} tokens (share)"]
    head += [f"{'global' if result['scope'] is None else 'local'}, {result['length']}" for result in results]
    rows = []
    for part in PARTS:
        shares = [f"{r['ms'][part]:.1f} ({r['ms'][part] / sum(r['ms'].values()):.1%})" for r in results]
        rows.append([part, *shares])
    return markdown_table(head, rows)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_layer", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 4096, 16384], help="tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("runs/profile"), help="folder of the table and JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    require_passing_tests(*LAYER_TESTS)
    results: list[dict[str, Any]] = []
    for scope in (LOCAL_SCOPE, None):
        for length in options.lengths:
            milliseconds = profile(options.layers, length, scope, options.tokens, options.repeats)
            results.append({"scope": scope, "length": length, "ms": milliseconds})
    report = {"environment": environment("einops"), "layers": options.layers, "results": results}
    write_json(options.output / "profile.json", report)
    (options.output / "profile.md").write_text(table(results), encoding="utf-8")
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
