"""What bfloat16 and int8 dynamic quantisation do to a trained model on a CPU: accuracy, speed and size.

    python benchmarks/bench_precision.py MODEL_FOLDER --text valid.txt --output results.json

MODEL_FOLDER is a masked language model of the pretraining command. Every precision predicts the same masked tokens of
the text in the same batches; `hidden error` is the distance of the last hidden states of real tokens from float32's,
over their norm. Each batch is timed once for each precision in turn.
"""

import argparse
import copy
import io
import json
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from environment import environment
from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from modeling_lambdabert import LambdaBertForMaskedLM
from run_language_modeling import load_tokenizer

SEED = 42


def precisions(model: nn.Module) -> dict[str, nn.Module]:
    with warnings.catch_warnings(action="ignore"):  # quantisation will move to torchao
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(), "int8 dynamic": quantised}


def megabytes(model: nn.Module) -> float:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help="text file, as --validation_file of the pretraining command")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=32, help="examples")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.model)
    models = precisions(LambdaBertForMaskedLM.from_pretrained(options.model, dtype=torch.float32).eval())
    arguments = DataArguments(validation_file=[options.text], objective="mlm")
    rows = load_corpus(arguments, train=False)["validation"]
    examples, _ = prepare_examples(rows, tokenizer, arguments.example_recipe(), seed=SEED, training=False)
    collate = masking_collator(tokenizer, arguments, seed=SEED)

    sums = {name: {"masked": 0, "loss": 0.0, "right": 0, "error": 0.0, "norm": 0.0, "seconds": 0.0} for name in models}
    tokens = 0
    for start in range(0, min(len(examples), options.batches * options.batch_size), options.batch_size):
        batch = collate([examples[i] for i in range(start, min(start + options.batch_size, len(examples)))])
        labels, real = batch.pop("labels"), batch["attention_mask"].bool()
        masked = labels != -100
        tokens += int(real.sum())
        for name, model in models.items():
            with torch.inference_mode():
                began = time.perf_counter()
                hidden = model.bert(**batch).last_hidden_state
                logits = model.cls(hidden[masked])
                seconds = time.perf_counter() - began
            hidden = hidden[real].double()
            if name == "float32":
                exact = hidden
            counted = {
                "masked": int(masked.sum()),
                "loss": F.cross_entropy(logits.float(), labels[masked], reduction="sum").item(),
                "right": int((logits.argmax(-1) == labels[masked]).sum()),
                "error": (hidden - exact).square().sum().item(),
                "norm": exact.square().sum().item(),
                "seconds": seconds,
            }
            sums[name] = {key: value + counted[key] for key, value in sums[name].items()}

    results = {
        name: {
            "mlm_loss": total["loss"] / total["masked"],
            "mlm_accuracy": total["right"] / total["masked"],
            "hidden error": (total["error"] / total["norm"]) ** 0.5,
            "tokens_per_second": tokens / total["seconds"],
            "megabytes": megabytes(models[name]),
        }
        for name, total in sums.items()
    }
    print("| precision | MLM loss | accuracy | hidden error | tokens/s | MB |\n|---|---|---|---|---|---|")
    for name, result in results.items():
        loss, accuracy, error, speed, size = result.values()
        print(f"| {name} | {loss:.4f} | {accuracy:.4f} | {error:.4f} | {speed:,.0f} | {size:.1f} |")
    if options.output:
        options.output.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
