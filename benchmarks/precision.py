"""What bfloat16 and int8 dynamic quantisation do to a trained model on a CPU: accuracy, speed and size.

    python -m benchmarks.precision MODEL_FOLDER --text valid.txt --output results.json

MODEL_FOLDER is a masked language model of the pretraining command. Every precision predicts the same masked tokens of
the text in the same batches; `hidden error` is the distance of the last hidden states of real tokens from float32's,
over their norm. Each batch is timed once for each precision in turn.

Nothing is timed unless the tests of the lambda layer pass.
"""

import argparse
import copy
import io
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.correctness import LAYER_TESTS, require_passing_tests
from benchmarks.environment import environment
from benchmarks.masked_text import load_lambdabert
from benchmarks.report import markdown_table, write_json
from benchmarks.runs import one_line_errors
from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from lambdabert.training.tokenizers import load_tokenizer
from modeling_lambdabert import LambdaBertForMaskedLM

SEED = 42

Batch = dict[str, torch.Tensor]


def precisions(model: LambdaBertForMaskedLM) -> dict[str, LambdaBertForMaskedLM]:
    """The float32 model, which comes first, and its copies in other precisions."""
    with warnings.catch_warnings(action="ignore"):  # quantisation will move to torchao
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(), "int8 dynamic": quantised}


def megabytes(model: nn.Module) -> float:
    """Size of the saved weights, in units of 1,000,000 bytes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def masked_batches(folder: Path, text: str, batch_size: int, count: int) -> Iterator[Batch]:
    """The first batches of a text with the same tokens masked every time: features of `batch_size` examples each."""
    tokenizer = load_tokenizer(str(folder))
    arguments = DataArguments(validation_file=[text], objective="mlm")
    rows = load_corpus(arguments, train=False)["validation"]
    examples, _ = prepare_examples(rows, tokenizer, arguments.example_recipe(), seed=SEED, training=False)
    collate = masking_collator(tokenizer, arguments, seed=SEED, training=False)
    for start in range(0, min(len(examples), count * batch_size), batch_size):
        yield collate([examples[i] for i in range(start, min(start + batch_size, len(examples)))])


def predict(
    model: LambdaBertForMaskedLM,
    inputs: Batch,
    real: torch.Tensor,
    labels: torch.Tensor,
    exact: torch.Tensor | None,
) -> tuple[dict[str, float], torch.Tensor]:
    """Predicts the masked tokens of a batch.

    Args:
        model: a masked language model.
        inputs: what it takes, each [B, N].
        real: which tokens are not padding, [B, N].
        labels: the masked tokens, and -100 elsewhere, [B, N].
        exact: float32's last hidden states of real tokens, [tokens, D]; None for those of this model.

    Returns:
        Sums over the batch, and this model's last hidden states of real tokens in float64, [tokens, D].
    """
    masked = labels != -100
    with torch.inference_mode():
        began = time.perf_counter()
        hidden = model.bert(**inputs).last_hidden_state
        logits = model.cls(hidden[masked])
        seconds = time.perf_counter() - began
    states = hidden[real].double()
    exact = states if exact is None else exact
    sums = {
        "masked": int(masked.sum()),
        "loss": F.cross_entropy(logits.float(), labels[masked], reduction="sum").item(),
        "right": int((logits.argmax(-1) == labels[masked]).sum()),
        "error": (states - exact).square().sum().item(),
        "norm": exact.square().sum().item(),
        "seconds": seconds,
    }
    return sums, states


def compare(models: dict[str, LambdaBertForMaskedLM], batches: Iterator[Batch]) -> dict[str, dict[str, float]]:
    """Loss, accuracy, error, speed and size of each model, float32 first."""
    totals: dict[str, dict[str, float]] = {name: {} for name in models}
    tokens = 0
    for batch in batches:
        labels, real = batch.pop("labels"), batch["attention_mask"].bool()
        tokens += int(real.sum())
        exact = None
        for name, model in models.items():
            sums, states = predict(model, batch, real, labels, exact)
            exact = states if exact is None else exact
            totals[name] = {key: totals[name].get(key, 0) + value for key, value in sums.items()}
    return {
        name: {
            "mlm_loss": total["loss"] / total["masked"],
            "mlm_accuracy": total["right"] / total["masked"],
            "hidden error": (total["error"] / total["norm"]) ** 0.5,
            "tokens_per_second": tokens / total["seconds"],
            "megabytes": megabytes(models[name]),
        }
        for name, total in totals.items()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    head = ["precision", "MLM loss", "accuracy", "hidden error", "tokens/s", "MB"]
    forms = [".4f", ".4f", ".4f", ",.0f", ".1f"]
    return markdown_table(head, [[name, *map(format, result.values(), forms)] for name, result in results.items()])


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="folder of a masked language model")
    parser.add_argument("--text", required=True, help="text file, as --validation_file of the pretraining command")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=32, help="examples")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        if not (options.model / "config.json").is_file():
            raise ValueError(f"model={options.model} is not a folder of a saved model.")
        model, _ = load_lambdabert(options.model)
        batches = list(masked_batches(options.model, options.text, options.batch_size, options.batches))
    require_passing_tests(*LAYER_TESTS)
    taken_with = environment()
    results = compare(precisions(model), iter(batches))
    print(table(results), end="")
    if options.output:
        write_json(options.output, {"environment": taken_with, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
