"""Draws validation MLM loss of the encoders that were trained on 512 tokens, as recorded.

docs/wikipedia_512.png has the runs on a CPU, docs/wikipedia_512_h200.png those on a GPU.

PYTHONPATH=. python docs/draw_wikipedia_512.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import Curve, draw_curves

RECORDS = Path("benchmarks/results/pretraining")
LAST_STEP = 14000
RUNS = {
    "LambdaBERT with repetitions": "wikipedia_512_new_repetitions_14000",
    "ModernBERT": "wikipedia_512_modernbert_14000",
    "BERT": "wikipedia_512_bert",
    "FNet": "wikipedia_512_fnet",
    "LambdaBERT, wikipedia-512": "wikipedia_512",
}
GPU_RUNS = {
    "LambdaBERT with repetitions": ("lambda_s1", "lambda_s2", "lambda_s3"),
    "ModernBERT": ("modernbert_s1", "modernbert_s2", "modernbert_s3"),
    "ConvBERT": ("convbert_s1",),
    "LambdaBERT without repetitions, K = 32": ("content_k32",),
    "LambdaBERT without repetitions, K = 8": ("content_s1",),
}
OF_ANOTHER_DAY = ("LambdaBERT, wikipedia-512", "FNet")  # their minutes are of slower machines


def draw_cpu_runs() -> None:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, record in RUNS.items():
        recorded = json.loads((RECORDS / f"{record}.json").read_text(encoding="utf-8"))
        curve = [point for point in recorded["curve"] if point["step"] <= LAST_STEP]
        tokens_a_step = recorded["train"]["num_input_tokens_seen"] / recorded["train"]["step"]
        losses = [[point["eval_mlm_loss"]] for point in curve]
        tokens = [tokens_a_step * point["step"] / 1e6 for point in curve]
        minutes = [point["seconds"] / 60 for point in curve]
        if name in OF_ANOTHER_DAY:
            draw_curves(panels[:1], {name: Curve((tokens,), losses)}, ["million tokens"])
        else:
            draw_curves(panels, {name: Curve((tokens, minutes), losses)}, ["million tokens", "minutes on one core"])
    panels[0].set_ylabel("validation MLM loss (nats per masked token)")
    panels[0].legend()
    figure.savefig("docs/wikipedia_512.png", dpi=110)


def draw_gpu_runs() -> None:
    recorded = json.loads((RECORDS / "wikipedia_512_h200.json").read_text(encoding="utf-8"))["runs"]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    panel = figure.subplots()
    for name, seeds in GPU_RUNS.items():
        runs = [recorded[seed] for seed in seeds]
        tokens_a_step = runs[0]["train"]["num_input_tokens_seen"] / runs[0]["train"]["step"]
        tokens = [tokens_a_step * point["step"] / 1e6 for point in runs[0]["curve"]]
        losses = [[point["eval_mlm_loss"] for point in points] for points in zip(*(run["curve"] for run in runs))]
        draw_curves([panel], {name: Curve((tokens,), losses)}, ["million tokens"])
    panel.set_ylabel("validation MLM loss (nats per masked token)")
    panel.set_ylim(top=5)
    panel.legend()
    figure.savefig("docs/wikipedia_512_h200.png", dpi=110)


def main() -> None:
    draw_cpu_runs()
    draw_gpu_runs()


if __name__ == "__main__":
    main()
