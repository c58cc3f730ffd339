"""Where the time of inference goes: the share of each part of LambdaBERT's layers, on a CPU.

    python benchmarks/profile_layer.py --output runs/profile

Base shape with random weights, as in `bench_speed.py`. Every part is a function or module of the library whose calls
are timed; a part called within another counts for itself alone, so the parts of a pass add up to the whole. Each number
is the median over the repeats, given in ms for 4096 tokens and as a share of the pass.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_speed import LOCAL_SCOPE, lambda_model, random_tokens

import lambda_kernels
import lambda_layer
from environment import environment

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


class Stopwatch:
    """Adds up the seconds of each part; a part's own, without those of the parts that it calls."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running = ["elsewhere"]
        self.since = time.perf_counter()

    def switch(self):
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, part, function):
        def call(*args, **kwargs):
            self.switch()
            self.running.append(part)
            result = function(*args, **kwargs)
            self.switch()
            self.running.pop()
            return result

        return call

    def watch(self, model):
        """Times the parts of one model; the library's functions stay watched until they are set back."""
        for part, functions in FUNCTIONS.items():
            for module, name in functions:
                setattr(module, name, self.timed(part, getattr(module, name)))
        model.embeddings.forward = self.timed("embeddings", model.embeddings.forward)
        for layer in model.encoder.layer:
            layer.feed_forward_chunk = self.timed("feed-forward", layer.feed_forward_chunk)
            output, mixer = layer.attention.output, layer.attention.self
            output.forward = self.timed("output projection, residual, norm", output.forward)
            mixer.forward = self.timed("softmax, masks and copies of the lambda layer", mixer.forward)
            for projection in (mixer.to_queries, mixer.to_keys, mixer.to_values):
                projection.forward = self.timed("projections to Q, K, V", projection.forward)


def profile(layers: int, length: int, scope: int | None, tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part for 4096 tokens."""
    torch.manual_seed(0)
    model = lambda_model(layers, length, scope, pretraining=False).eval()
    inputs = random_tokens(max(1, tokens // length), length)
    watched = [(module, name, getattr(module, name)) for part in FUNCTIONS.values() for module, name in part]
    stopwatch = Stopwatch()
    stopwatch.watch(model)
    runs = []
    try:
        with torch.inference_mode():
            model(inputs)
            for _ in range(repeats):
                stopwatch.seconds = dict.fromkeys(PARTS, 0.0)
                stopwatch.since = time.perf_counter()
                model(inputs)
                stopwatch.switch()
                runs.append(stopwatch.seconds)
    finally:
        for module, name, function in watched:
            setattr(module, name, function)
    return {part: statistics.median(run[part] for run in runs) * 1e3 * 4096 / inputs.numel() for part in PARTS}


def table(results: list[dict]) -> str:
    heads = [f"{'global' if result['scope'] is None else 'local'}, {result['length']}" for result in results]
    lines = ["| ms for 4096 tokens (share) | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for part in PARTS:
        cells = [f"{r['ms'][part]:.1f} ({r['ms'][part] / sum(r['ms'].values()):.1%})" for r in results]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 4096, 16384])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("runs/profile"))
    options = parser.parse_args()
    results = [
        {
            "scope": scope,
            "length": length,
            "ms": profile(options.layers, length, scope, options.tokens, options.repeats),
        }
        for scope in (LOCAL_SCOPE, None)
        for length in options.lengths
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment("einops"), "layers": options.layers, "results": results}
    (options.output / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "profile.md").write_text(table(results))
    print(table(results), end="")


if __name__ == "__main__":
    main()
