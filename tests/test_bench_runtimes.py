"""The benchmark of runtimes: shapes, ratios, the table, and what is recorded."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import deployed_accuracy, runtimes
from benchmarks.encoders import MASK, VOCABULARY
from benchmarks.environment import ROOT
from configuration_lambdabert import LambdaBertConfig
from modeling_lambdabert import LambdaBertModel

RESULTS = ROOT / "benchmarks" / "results"


def result(model, precision, shape, seconds):
    return {"model": model, "runtime": "onnx", "precision": precision, "shape": shape} | {
        "seconds": seconds,
        "all_seconds": [seconds, seconds, 3 * seconds],
    }


def test_ratios_are_to_bert_of_the_same_runtime_and_shape():
    results = [
        result("lambda-local", "float32", "1x32", 0.01),
        result("lambda-local", "int8", "1x32", 0.005),
        result("bert", "float32", "1x32", 0.02),
        result("bert", "int8", "1x32", 0.006),
        result("lambda-local", "float32", "8x512", 1.0),
    ]
    runtimes.add_ratios(results)
    assert [row.get("speed_over_bert") for row in results] == pytest.approx([2, 1.2, 1, 1, None])
    assert results[1]["speed_over_float32_bert"] == pytest.approx(4)
    lines = runtimes.table(results).splitlines()
    assert lines[0] == "| runtime | precision | model | 1x32 | 8x512 |"
    assert lines[2] == "| onnx | float32 | lambda-local | 10, 30 (2.00) | 1000 |"
    assert lines[4] == "| onnx | float32 | bert | 20, 60 |  |"


@pytest.mark.parametrize("count,place", [(20, 18), (25, 23), (3, 2), (1, 0)])
def test_the_longest_of_most_is_the_smallest_time_that_95_percent_do_not_exceed(count, place):
    assert runtimes.longest_of_most([*reversed(range(count))]) == place


@pytest.mark.parametrize("name", ["lambda-repetitions", "bert"])
def test_exported_rows_are_built_checked_and_run(name, tmp_path, monkeypatch):
    def build(model, layers):
        torch.manual_seed(0)
        sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers)
        if model == "bert":
            return BertModel(
                BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=runtimes.LONGEST)
            ).eval()
        repetitions = dict(local_context_size=5, repetition_context_size=3, mask_token_id=MASK)
        return LambdaBertModel(LambdaBertConfig(**sizes, num_lambda_queries=4, **repetitions)).eval()

    monkeypatch.setattr(runtimes, "build", build)
    calls = runtimes.calls_of(name, 1, ["onnx"], runtimes.PRECISIONS, tmp_path)
    assert [*calls] == ["onnx float32", "onnx int8"]
    measured = runtimes.measure({(name, row): call for row, call in calls.items()}, "2x7", repeats=1)
    assert [(row["runtime"], row["precision"]) for row in measured] == [tuple(row.split()) for row in calls]


def test_shapes():
    mixed = runtimes.make_inputs("mixed")
    assert mixed["input_ids"].shape == (32, 512) and mixed["attention_mask"].sum() == 32 * 128
    assert not mixed["input_ids"][mixed["attention_mask"] == 0].any()
    assert runtimes.make_inputs("3x7")["input_ids"].shape == (3, 7)
    for shape in ("3", "0x4", "3x4x5", "axb", "1x4097"):
        with pytest.raises(SystemExit, match=f"error: shapes: '{shape}' is no shape; give BATCHxLENGTH"):
            runtimes.main(["--shapes", shape])


@pytest.mark.parametrize("file", sorted((RESULTS / "runtimes").glob("*.json")), ids=lambda file: file.stem)
def test_recorded_ratios_are_those_of_the_recorded_times(file):
    recorded = json.loads(file.read_text())["results"]
    results = [{key: value for key, value in row.items() if not key.startswith("speed_over")} for row in recorded]
    runtimes.add_ratios(results)
    assert results == recorded


@pytest.mark.parametrize("file", sorted((RESULTS / "deployment").glob("accuracy*.json")), ids=lambda file: file.stem)
def test_recorded_accuracy_is_quoted(file):
    table = deployed_accuracy.table(json.loads(file.read_text())["results"])
    assert table.split("|---")[-1].partition("\n")[2].strip() in (ROOT / "docs" / "deploying.md").read_text()
