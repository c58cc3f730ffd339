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
FIVE_LAYERS = "wikipedia_512_new_repetitions_five_layers"
MODERNBERT = "wikipedia_512_modernbert_14000"
# records of each curve, one a seed; minutes are those of the first
RUNS = {
    "LambdaBERT with repetitions": ("wikipedia_512_new_repetitions_14000",),
    "LambdaBERT with repetitions, five layers": (FIVE_LAYERS, f"{FIVE_LAYERS}_seed_2", f"{FIVE_LAYERS}_seed_3"),
    "ModernBERT": (MODERNBERT, f"{MODERNBERT}_seed_2", f"{MODERNBERT}_seed_3"),
    "BERT": ("wikipedia_512_bert",),
    "FNet": ("wikipedia_512_fnet",),
    "LambdaBERT, wikipedia-512": ("wikipedia_512",),
}
GPU_RUNS = {
    "LambdaBERT with repetitions": ("lambda_s1", "lambda_s2", "lambda_s3"),
    "ModernBERT": ("modernbert_s1", "modernbert_s2", "modernbert_s3"),
    "ConvBERT": ("convbert_s1",),
    "LambdaBERT without repetitions, K = 32": ("content_k32",),
    "LambdaBERT without repetitions, K = 8": ("content_s1",),
}
# their minutes are of other machines, or of more work beside them
OF_ANOTHER_DAY = ("LambdaBERT with repetitions, five layers", "LambdaBERT, wikipedia-512", "FNet")


def draw_cpu_runs() -> None:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, records in RUNS.items():
        seeds = [json.loads((RECORDS / f"{record}.json").read_text(encoding="utf-8")) for record in records]
        curves = [{point["step"]: point for point in seed["curve"]} for seed in seeds]
        steps = [step for step in curves[0] if step <= LAST_STEP and all(step in curve for curve in curves)]
        tokens_a_step = seeds[0]["train"]["num_input_tokens_seen"] / seeds[0]["train"]["step"]
        losses = [[curve[step]["eval_mlm_loss"] for curve in curves] for step in steps]
        tokens = [tokens_a_step * step / 1e6 for step in steps]
        minutes = [curves[0][step]["seconds"] / 60 for step in steps]
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
