"""Whether a pretraining run that `kill -9` ends again and again reaches the weights of an uninterrupted one.

    python benchmarks/check_interruption.py --kill_at 130 260 --output results.json -- RECIPE.json --max_steps 400 ...

What follows `--` are the arguments of the pretraining command, without --output_dir. Each run is killed as soon as its
log passes a step of `--kill_at`, and started again with the same command. The uninterrupted run comes last. Every run
uses one process and as many threads.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from environment import environment

ROOT = Path(__file__).resolve().parent.parent
POLLING_INTERVAL = 0.05  # seconds


def start(arguments: list[str], output_dir: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run_language_modeling.py"), *arguments, "--output_dir", str(output_dir)]
    return subprocess.Popen(command, stdout=log.open("a"), stderr=subprocess.STDOUT)


def progress(log: Path) -> int:
    """The last training step that the progress bar shows; the bars of other work have other totals."""
    text = log.read_text(errors="replace")
    announced = re.search(r"([\d,]+) steps of", text)
    steps = re.findall(rf"\| *(\d+)/{announced[1].replace(',', '')} \[", text) if announced else []
    return int(steps[-1]) if steps else 0


def kill_when(process: subprocess.Popen, log: Path, step: int) -> int:
    """Kills a run once it has passed `step`; returns the step it was at."""
    while (reached := progress(log)) < step:
        if process.poll() is not None:
            raise SystemExit(f"The run ended before step {step}:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(POLLING_INTERVAL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kill_at", type=int, nargs="+", required=True, metavar="STEP")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("arguments", nargs="+", help="arguments of the pretraining command, after --")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        interrupted, whole = Path(folder, "interrupted"), Path(folder, "whole")
        killed, went_on = [], []
        for number, step in enumerate([*options.kill_at, None]):
            log = Path(folder, f"log-{number}")
            process = start(options.arguments, interrupted, log)
            if step is None:
                if process.wait():
                    raise SystemExit(log.read_text(errors="replace")[-2000:])
            else:
                killed.append(kill_when(process, log, step))
            went_on += re.findall(r"Going on from \S+, step (\d+)", log.read_text(errors="replace"))
        if start(options.arguments, whole, Path(folder, "log-whole")).wait():
            raise SystemExit(Path(folder, "log-whole").read_text(errors="replace")[-2000:])
        one, other = (load_file(run / "model.safetensors") for run in (whole, interrupted))
        metrics = [json.loads((run / "metrics.json").read_text()) for run in (whole, interrupted)]

    different = [name for name in one if not torch.equal(one[name], other[name])]
    result = {
        "killed at step": killed,
        "went on from step": [int(step) for step in went_on],
        "weights compared": len(one),
        "weights that differ in any bit": len(different),
        "steps": metrics[0]["train"]["step"],
        "eval_mlm_loss, uninterrupted": metrics[0]["eval"].get("eval_mlm_loss"),
        "eval_mlm_loss, interrupted": metrics[1]["eval"].get("eval_mlm_loss"),
        "eval_sentence_accuracy, uninterrupted": metrics[0]["eval"].get("eval_sentence_accuracy"),
        "eval_sentence_accuracy, interrupted": metrics[1]["eval"].get("eval_sentence_accuracy"),
        "seconds, uninterrupted": metrics[0]["train"]["seconds"],
    }
    for name, value in result.items():
        print(f"{name:40} {value}")
    if options.output:
        options.output.write_text(
            json.dumps({"environment": environment("datasets"), "result": result}, indent=2) + "\n"
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
