"""Speed and memory of whole models side by side: LambdaBERT, the encoders one would pick instead, and the floor.

    python benchmarks/bench_speed.py                              CPU, float32: forward, training and mixed lengths
    python benchmarks/bench_speed.py --dtype bfloat16             the same in bfloat16; takes the GPU where there is one
    python benchmarks/bench_speed.py --parts forward --rows lambda-local floor bert --lengths 512 4096

Every part runs all of its rows in one process: after one unmeasured call of each, every repetition times each row
once, and the table holds the medians. Models are of base shape (width 768) with random weights, and start from random
token ids; `--layers` cuts all of them alike. The parts:

    forward   evaluation, full sequences without a mask, `--tokens` tokens a batch or one sequence if that is longer
    train     forward, backward and AdamW step of the pretraining models (MLM and next sentence), 15 % of the tokens
              masked, `num_items_in_batch` given as the Trainer does
    mixed     evaluation; 32 rows whose lengths are drawn from Beta(1, 3) times the longest length, which one row has,
              and scaled to a mean of a quarter of it. Rows ending in "-full" get as many tokens in sequences of the
              longest length, without padding.

Rows are named below, in `ROWS`. The floor is LambdaBERT whose lambda layers compute their three projections and
nothing else: what its dense products cost, whatever is done about the lambdas. (In evaluation; in training nothing
would reach the projections' gradients.) `-compiled` and `-int8` rows run only if named. Memory is the peak of a call in
a fresh process, with the model's weights, gradients and optimizer states: resident memory beyond that of the imports
on a CPU, allocated memory on a GPU.

The tests of the paths that are timed run first, and nothing is timed unless they pass.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    FNetConfig,
    FNetModel,
    ModernBertConfig,
    ModernBertModel,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configuration_lambdabert import LambdaBertConfig
from environment import environment
from lambda_layer import LambdaLayer
from modeling_lambdabert import LambdaBertForPreTrainingNSP, LambdaBertModel

PARTS = ("forward", "train", "mixed")
LENGTHS = {"forward": [128, 512, 2048, 4096, 8192, 16384], "train": [128, 512], "mixed": [512]}
MIXED_ROWS = 32
VOCABULARY = 30522
MASKED_SHARE = 0.15
LOCAL_SCOPE = 25
TESTS = ["tests/test_lambda_layer.py", "tests/test_modeling.py", "tests/test_packing.py"]
TESTED_PATHS = "Definition or Tiles or Packing or PositionLambda or Padding or Precision or test_packing"


class ProjectionsOnly(LambdaLayer):
    """A lambda layer without lambdas: it projects, and hands its input on."""

    def forward(self, hidden_states, attention_mask=None, packing=None):
        self.to_queries(hidden_states)
        self.to_keys(hidden_states)
        self.to_values(hidden_states)
        return hidden_states, hidden_states.new_empty(0)


def base_shape(layers: int, length: int) -> dict:
    return dict(vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=length)


def lambda_config(layers: int, length: int, scope: int | None) -> LambdaBertConfig:
    return LambdaBertConfig(**base_shape(layers, length), local_context_size=scope)


def lambda_model(layers: int, length: int, scope: int | None, pretraining: bool) -> nn.Module:
    config = lambda_config(layers, length, scope)
    return LambdaBertForPreTrainingNSP(config) if pretraining else LambdaBertModel(config)


def floor_model(layers: int, length: int, pretraining: bool) -> nn.Module:
    model = lambda_model(layers, length, LOCAL_SCOPE, pretraining)
    for block in getattr(model, "bert", model).encoder.layer:
        block.attention.self = ProjectionsOnly(model.config)
    return model


def bert_model(layers: int, length: int, pretraining: bool, attention: str = "sdpa") -> nn.Module:
    config = BertConfig(**base_shape(layers, length), attn_implementation=attention)
    return BertForPreTraining(config) if pretraining else BertModel(config)


def modernbert_model(layers: int, length: int) -> nn.Module:
    # of its own base model, but for the embeddings' and the stack's size
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return ModernBertModel(ModernBertConfig(**base_shape(layers, length), **tokens, attn_implementation="sdpa"))


def fnet_model(layers: int, length: int) -> nn.Module:
    return FNetModel(FNetConfig(**base_shape(layers, length)))


@dataclass
class Row:
    """A model to time.

    Attributes:
        build: makes the model from layers, longest length and whether it pretrains.
        parts: the parts that it can run.
    """

    build: Callable[[int, int, bool], nn.Module]
    parts: tuple[str, ...] = PARTS


ROWS = {
    "lambda-local": Row(lambda layers, length, training: lambda_model(layers, length, LOCAL_SCOPE, training)),
    "lambda-global": Row(lambda layers, length, training: lambda_model(layers, length, None, training)),
    "floor": Row(floor_model),
    "bert": Row(bert_model),
    "bert-flash": Row(lambda *shape: bert_model(*shape, attention="flash_attention_2")),
    "modernbert": Row(lambda layers, length, training: modernbert_model(layers, length), ("forward", "mixed")),
    "fnet": Row(lambda layers, length, training: fnet_model(layers, length), ("forward",)),
}
DEFAULT_ROWS = {
    "forward": ["lambda-local", "lambda-global", "floor", "bert"],
    "train": ["lambda-local", "lambda-global", "bert"],
    "mixed": ["lambda-local", "lambda-local-full", "lambda-global", "lambda-global-full", "bert", "bert-full"],
}


def split_name(name: str) -> tuple[str, set[str]]:
    """A row's model and the variations that its name ends in."""
    variations = set()
    while True:
        base, _, ending = name.rpartition("-")
        if ending not in ("compiled", "int8", "full"):
            return name, variations
        name, _ = base, variations.add(ending)


def runs(row: str, part: str) -> bool:
    """Whether a row belongs into a part: what is quantised does not train, and "-full" compares mixed lengths."""
    name, variations = split_name(row)
    if ("int8" in variations and part == "train") or ("full" in variations and part != "mixed"):
        return False
    return part in ROWS[name].parts


@dataclass
class Cell:
    """One measurement: a row of a part at a length."""

    part: str
    row: str
    length: int
    layers: int
    tokens: int
    dtype: str
    device: str


class Call:
    """A model and its inputs, ready to be run again and again.

    Args:
        cell: what to measure.
    """

    def __init__(self, cell: Cell):
        name, variations = split_name(cell.row)
        self.training = cell.part == "train"
        torch.manual_seed(0)
        self.device = torch.device(cell.device)
        dtype = getattr(torch, cell.dtype)
        # a training step keeps float32 weights, and half precision is autocast
        weights_dtype = torch.float32 if self.training else dtype
        self.autocast = torch.autocast(self.device.type, dtype=dtype, enabled=weights_dtype != dtype)
        model = ROWS[name].build(cell.layers, cell.length, self.training)
        self.model = model.to(self.device, weights_dtype).train(self.training)
        if "int8" in variations:
            with warnings.catch_warnings(action="ignore"):  # it will move to torchao
                self.model = torch.ao.quantization.quantize_dynamic(self.model, {nn.Linear}, dtype=torch.qint8)
        self.run = torch.compile(self.model) if "compiled" in variations else self.model
        self.inputs = {name: tensor.to(self.device) for name, tensor in self._inputs(cell, name, variations).items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters()) if self.training else None

    @staticmethod
    def _inputs(cell: Cell, name: str, variations: set[str]) -> dict[str, torch.Tensor]:
        if cell.part == "mixed":
            if "full" in variations:
                return {"input_ids": random_tokens(mixed_lengths(cell.length).sum() // cell.length, cell.length)}
            lengths = mixed_lengths(cell.length)
            mask = (torch.arange(cell.length) < lengths[:, None]).long()
            return {"input_ids": random_tokens(len(lengths), cell.length) * mask, "attention_mask": mask}
        batch = max(1, cell.tokens // cell.length)
        inputs = {"input_ids": random_tokens(batch, cell.length)}
        if cell.part == "train":
            masked = torch.rand(batch, cell.length) < MASKED_SHARE
            inputs["labels"] = torch.where(masked, inputs["input_ids"], -100)
            inputs["next_sentence_label"] = torch.randint(0, 2, (batch,))
            inputs["num_items_in_batch"] = masked.sum()
        return inputs

    @property
    def real_tokens(self) -> int:
        mask = self.inputs.get("attention_mask")
        return int(self.inputs["input_ids"].numel() if mask is None else mask.sum())

    def __call__(self):
        if not self.training:
            with torch.inference_mode():
                self.run(**self.inputs)
            return
        with self.autocast:
            loss = self.run(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        self.synchronize()
        start = time.perf_counter()
        self()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (int(batch), length))


def mixed_lengths(longest: int) -> torch.Tensor:
    """`MIXED_ROWS` lengths whose sum is a multiple of the longest, which comes first; their mean is a quarter of it."""
    generator = torch.Generator().manual_seed(0)
    # the smallest of three uniform draws is distributed as Beta(1, 3)
    draws = torch.rand(MIXED_ROWS - 1, 3, generator=generator).amin(dim=1)
    rest = (MIXED_ROWS // 4 - 1) * longest
    lengths = (draws * rest / draws.sum()).round().long().clamp(1, longest)
    lengths[lengths.argmax()] += rest - lengths.sum()
    return torch.cat([torch.tensor([longest]), lengths])


def peak_memory(cell: Cell, threads: int) -> int | None:
    """Peak memory of one call in bytes, with the model; for a process of its own."""
    if cell.device == "cuda":
        call = Call(cell)
        call()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    torch.set_num_threads(threads)
    imports = _resident("VmRSS")
    if imports is None:
        return None
    call = Call(cell)
    for _ in range(2 if call.training else 1):  # the first training step makes the optimizer's states
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        call()
    return _resident("VmHWM") - imports


def _resident(field: str) -> int | None:
    """A field of Linux's account of this process's memory, in bytes; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(cell: Cell, threads: int) -> int | None:
    # processes of a fork server start with the imports done and no thread pool that a fork would break
    context = multiprocessing.get_context("forkserver" if cell.device == "cpu" else "spawn")
    context.set_forkserver_preload([Path(__file__).stem])
    with context.Pool(1) as pool:
        return pool.apply(peak_memory, (cell, threads))


def measure(cells: list[Cell], repeats: int, threads: int) -> list[dict]:
    """Times cells of one part and length in turn; a cell that cannot run says why instead."""
    results, calls = [], []
    for cell in cells:
        result = asdict(cell)
        try:
            result["peak_bytes"] = measure_memory(cell, threads)
            call = Call(cell)
            call()
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"  {cell.row}: {result['error']}", file=sys.stderr)
        else:
            result["real_tokens"] = call.real_tokens
            calls.append((call, result))
        results.append(result)
    times = [[] for _ in calls]
    for _ in range(repeats):
        for (call, _), row_times in zip(calls, times):
            row_times.append(call.seconds())
    for (_, result), row_times in zip(calls, times):
        result["seconds"] = statistics.median(row_times)
        result["all_seconds"] = row_times
        result["tokens_per_second"] = result["real_tokens"] / result["seconds"]
    return results


def add_ratios(results: list[dict]):
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


def table(results: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| part | length | row | ms | tokens/s | speed / BERT | time / floor | time / full | MiB | memory / BERT |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(result, key, form):
        return format(result[key], form) if result.get(key) is not None else ""

    for result in results:
        peak = f"{result['peak_bytes'] / 2**20:.0f}" if result.get("peak_bytes") else ""
        milliseconds = f"{result['seconds'] * 1e3:.1f}" if "seconds" in result else result["error"]
        cells = [
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
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict], path: Path):
    """Tokens per second and peak memory of the forward pass against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [result for result in results if result["part"] == "forward" and "seconds" in result]
    if not measured:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row in dict.fromkeys(result["row"] for result in measured):
        points = [result for result in measured if result["row"] == row]
        lengths = [point["length"] for point in points]
        style = "--" if row == "floor" else "-"
        axes[0].plot(lengths, [point["tokens_per_second"] for point in points], style, marker=".", label=row)
        if all(point["peak_bytes"] for point in points):
            axes[1].plot(lengths, [point["peak_bytes"] / 2**20 for point in points], style, marker=".", label=row)
    for axis, label in zip(axes, ("tokens per second", "peak memory, MiB")):
        axis.set(xscale="log", xlabel="tokens in a sequence", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted({result["length"] for result in measured}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)
    pyplot.close(figure)


def run_tests():
    command = [sys.executable, "-m", "pytest", "--numprocesses=0", "--durations=0", "-k", TESTED_PATHS, *TESTS]
    print("Testing the timed paths ...", file=sys.stderr)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"Nothing was timed, because tests of the timed paths fail:\n{result.stdout[-3000:]}{result.stderr}")
    print(next(line for line in reversed(result.stdout.splitlines()) if " passed" in line), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.layers = arguments.layers or (12 if on_gpu else 2)
    arguments.tokens = arguments.tokens or (65536 if on_gpu else 4096)
    for row in arguments.rows or []:
        if split_name(row)[0] not in ROWS:
            parser.error(f"unknown row {row!r}: take one of {', '.join(ROWS)}, with -compiled or -int8 behind it")
    return arguments


def main():
    arguments = parse_arguments()
    run_tests()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("dtype", "layers", "tokens", "repeats")}
    settings["mixed_lengths"] = f"Beta(1, 3) x longest, {MIXED_ROWS} rows, mean longest / 4"
    report = {"environment": environment("einops"), "settings": settings, "results": []}
    for part in arguments.parts:
        for length in arguments.lengths or LENGTHS[part]:
            rows = [row for row in arguments.rows or DEFAULT_ROWS[part] if runs(row, part)]
            print(f"{part} {length}: {', '.join(rows)}", file=sys.stderr)
            cells = [
                Cell(part, row, length, arguments.layers, arguments.tokens, arguments.dtype, arguments.device)
                for row in rows
            ]
            report["results"] += measure(cells, arguments.repeats, arguments.threads)
            add_ratios(report["results"])
            (arguments.output / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
            (arguments.output / "speed.md").write_text(table(report["results"]))
            plot(report["results"], arguments.output / "speed.png")
    print(table(report["results"]), end="")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
