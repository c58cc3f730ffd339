"""Whether a pretraining run that `kill -9` ends again and again reaches the weights of an uninterrupted one.

    python -m benchmarks.interruption --kill_at 130 260 --output results.json -- RECIPE.json --max_steps 400 ...

What follows `--` are the arguments of the pretraining command, without --output_dir. Each run is killed as soon as its
log passes a step of `--kill_at`, and started again with the same command. The uninterrupted run comes last. Every run
uses one process and as many threads. The exit status is 1 where a weight differs.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.environment import ROOT, environment
from benchmarks.report import write_json

POLLING_INTERVAL = 0.05  # seconds


def start(arguments: list[str], output_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts the pretraining command, whose output is added to `log`."""
    command = [sys.executable, str(ROOT / "run_language_modeling.py"), *arguments, "--output_dir", str(output_dir)]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def progress(log: str) -> int:
    """The last training step that the progress bar shows; the bars of other work have other totals."""
    announced = re.search(r"([\d,]+) steps of", log)
    steps = re.findall(rf"\| *(\d+)/{announced[1].replace(',', '')} \[", log) if announced else []
    return int(steps[-1]) if steps else 0


def text_of(log: Path) -> str:
    return log.read_text(errors="replace")


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the end of a run.

    Raises:
        SystemExit: the run failed.
    """
    if process.wait():
        raise SystemExit(f"The run failed:\n{text_of(log)[-2000:]}")


def kill_when(process: subprocess.Popen[bytes], log: Path, step: int) -> int:
    """Kills a run once it has passed `step`; returns the step it was at.

    Raises:
        SystemExit: the run ended before.
    """
    while (reached := progress(text_of(log))) < step:
        if process.poll() is not None:
            raise SystemExit(f"The run ended before step {step}:\n{text_of(log)[-2000:]}")
        time.sleep(POLLING_INTERVAL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return reached


def run_interrupted(arguments: list[str], kill_at: Sequence[int], output_dir: Path, logs: Path) -> tuple[list, list]:
    """Trains to the end, killed at each of the steps on the way.

    Returns:
        The steps at which the runs were killed, and those from which they went on.
    """
    killed: list[int] = []
    went_on: list[int] = []
    for number, step in enumerate([*kill_at, None]):
        log = logs / f"log-{number}"
        process = start(arguments, output_dir, log)
        if step is None:
            finish(process, log)
        else:
            killed.append(kill_when(process, log, step))
        went_on += map(int, re.findall(r"Resuming from \S+, step (\d+)", text_of(log)))
    return killed, went_on


def compare(whole: Path, interrupted: Path) -> dict[str, Any]:
    """Weights and metrics of two finished output folders, side by side."""
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, interrupted))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, interrupted)]
    return {
        "weights compared": len(one),
        "weights that differ in any bit": sum(not torch.equal(weight, other[name]) for name, weight in one.items()),
        "steps": metrics[0]["train"]["step"],
        "eval_mlm_loss, uninterrupted": metrics[0]["eval"].get("eval_mlm_loss"),
        "eval_mlm_loss, interrupted": metrics[1]["eval"].get("eval_mlm_loss"),
        "eval_sentence_accuracy, uninterrupted": metrics[0]["eval"].get("eval_sentence_accuracy"),
        "eval_sentence_accuracy, interrupted": metrics[1]["eval"].get("eval_sentence_accuracy"),
        "seconds, uninterrupted": metrics[0]["train"]["seconds"],
    }


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interruption", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--kill_at", type=int, nargs="+", required=True, metavar="STEP")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("arguments", nargs="+", help="arguments of the pretraining command, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with tempfile.TemporaryDirectory() as folder:
        interrupted, whole, log = Path(folder, "interrupted"), Path(folder, "whole"), Path(folder, "log-whole")
        killed, went_on = run_interrupted(options.arguments, options.kill_at, interrupted, Path(folder))
        finish(start(options.arguments, whole, log), log)
        result = {"killed at step": killed, "went on from step": went_on, **compare(whole, interrupted)}
    for name, value in result.items():
        print(f"{name:40} {value}")
    if options.output:
        write_json(options.output, {"environment": environment("datasets"), "result": result})
    return 1 if result["weights that differ in any bit"] else 0


if __name__ == "__main__":
    sys.exit(main())
