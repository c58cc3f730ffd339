"""What onnxruntime and int8 do to the results of a trained model.

    python -m benchmarks.deployed_accuracy mlm checkpoints/wikipedia-small --text enwiki2015/validation.parquet
    python -m benchmarks.deployed_accuracy sentences models/minilm_student --sts_folder stsb

`mlm` predicts the same masked tokens of a text in every way, as `benchmarks.precision` draws them; `sentences` takes
the Spearman correlation of cosines with the similarities of the STS benchmark's development pairs. The ways:

    PyTorch                 float32
    PyTorch int8            torchao: linear layers, activations as they come, one scale for each output channel
    onnxruntime             the folder that export_model.py writes
    onnxruntime int8        the same with --quantize int8

Megabytes are of the weights as saved, or of the ONNX file.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from benchmarks.conversion import read_pairs
from benchmarks.environment import environment
from benchmarks.precision import masked_batches, megabytes
from benchmarks.report import markdown_table, write_json
from benchmarks.runs import one_line_errors
from benchmarks.runtimes import inference, quantise_in_torch
from lambdabert.deployment import export_model
from lambdabert.deployment.checks import onnx_call
from lambdabert.deployment.loading import INPUTS, LoadedProgram, load_program

SENTENCES = 32  # in a batch

Inputs = dict[str, torch.Tensor]
Call = Callable[[Inputs], Any]


def ways(loaded: LoadedProgram, folder: Path, work: Path) -> dict[str, tuple[Call, float]]:
    """Each way as a function from inputs to named outputs, and its megabytes."""
    quantised = copy.deepcopy(loaded.program)
    quantise_in_torch(quantised)
    found = {
        "PyTorch": (inference(loaded.program), megabytes(loaded.program)),
        "PyTorch int8": (inference(quantised), megabytes(quantised)),
    }
    for name, quantize in (("onnxruntime", None), ("onnxruntime int8", "int8")):
        file = export_model(folder, work / name, quantize=quantize).file
        found[name] = (onnx_call(file), file.stat().st_size / 1e6)
    return found


def mlm_scores(call: Call, batches: Iterable[Inputs]) -> dict[str, float]:
    """Loss and accuracy over the masked tokens of all batches."""
    count = right = loss = 0.0
    for batch in batches:
        labels = batch["labels"]
        inputs = {"token_type_ids": torch.zeros_like(labels)} | dict(batch)  # a collator may leave out the types
        logits = call({name: inputs[name] for name in INPUTS})["logits"][labels != -100]
        wanted = labels[labels != -100]
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return {"mlm_loss": loss / count, "mlm_accuracy": right / count}


def sentence_scores(call: Call, tokenizer: Any, pairs: Any) -> dict[str, float]:
    """Spearman correlation of the cosines of pairs with their similarities."""
    *texts, similarities = pairs
    vectors = []
    for side in texts:
        batches = (side[start : start + SENTENCES] for start in range(0, len(side), SENTENCES))
        encoded = (tokenizer(list(batch), padding=True, truncation=True, return_tensors="pt") for batch in batches)
        found = [call({name: inputs[name] for name in INPUTS})["sentence_embedding"] for inputs in encoded]
        vectors.append(F.normalize(torch.cat(found), dim=-1))
    return {"spearman": float(spearmanr((vectors[0] * vectors[1]).sum(-1), similarities).statistic)}


def measure(options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Scores and size of each way."""
    loaded = load_program(options.model)
    score: Callable[[Call], dict[str, float]]
    if options.task == "mlm":
        batches = list(masked_batches(options.model, options.text, options.batch_size, options.batches))
        score = partial(mlm_scores, batches=batches)
    else:
        pairs = read_pairs(options.sts_folder)
        score = partial(sentence_scores, tokenizer=loaded.tokenizer, pairs=pairs)
    return {
        name: score(call) | {"megabytes": megabytes}
        for name, (call, megabytes) in ways(loaded, options.model, work).items()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    head = list(next(iter(results.values())))
    forms = {"megabytes": ".1f"}
    rows = [[name, *(format(row[key], forms.get(key, ".4f")) for key in head)] for name, row in results.items()]
    return markdown_table(["", *head], rows)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deployed_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    mlm = tasks.add_parser("mlm", help="masked tokens of a text")
    mlm.add_argument("--text", required=True, help="text file, as --validation_file of the pretraining command")
    mlm.add_argument("--batches", type=int, default=20)
    mlm.add_argument("--batch_size", type=int, default=32, help="examples")
    sentences = tasks.add_parser("sentences", help="similarities of sentences")
    sentences.add_argument("--sts_folder", type=Path, required=True, help="folder with the STS benchmark")
    for task in (mlm, sentences):
        task.add_argument("model", type=Path, help="folder of a model")
        task.add_argument("--output", type=Path, help="JSON file for the numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    versions = environment("onnxruntime", "onnx", "torchao")
    with tempfile.TemporaryDirectory() as work, one_line_errors():
        results = measure(options, Path(work))
    print(table(results), end="")
    if options.output:
        recorded = {name: str(value) for name, value in vars(options).items() if name != "output"}
        write_json(options.output, {"environment": versions, "options": recorded, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
