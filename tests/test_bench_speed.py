"""The benchmarks of speed: what they time is what they say, and recorded numbers agree with each other."""

import copy
import json

import pytest
import torch
from torch import nn

from benchmarks import precision, profile_layer, speed
from benchmarks.calls import MIXED_ROWS, mixed_lengths
from benchmarks.encoders import ROWS, floor_model, runs, split_name
from benchmarks.environment import ROOT
from modeling_lambdabert import LambdaBertForMaskedLM

RESULTS = ROOT / "benchmarks" / "results"
RATIOS = ("speed_over_bert", "memory_over_bert", "time_over_floor", "time_over_full")


@pytest.mark.parametrize("file", sorted((RESULTS / "speed").glob("*.json")), ids=lambda file: file.stem)
def test_recorded_ratios_are_those_of_the_recorded_times(file):
    recorded = json.loads(file.read_text())["results"]
    results = [{key: value for key, value in result.items() if key not in RATIOS} for result in recorded]
    speed.add_ratios(results)
    assert results == recorded
    assert speed.table(results).count("\n") == len(recorded) + 2


def test_recorded_profile_is_reprinted():
    recorded = json.loads((RESULTS / "profile_layer" / "cpu.json").read_text())["results"]
    assert [set(result["ms"]) for result in recorded] == [set(profile_layer.PARTS)] * len(recorded)
    assert "| ms for 4096 tokens (share) | local, 128 | local, 512 |" in profile_layer.table(recorded)


def test_rows_and_variations():
    assert split_name("lambda-local-full-int8") == ("lambda-local", {"full", "int8"})
    assert not runs("bert-int8", "train") and not runs("bert-full", "forward") and runs("bert-full", "mixed")
    assert not runs("fnet", "mixed")
    with pytest.raises(SystemExit, match="error: rows: 'lambda' is unknown; use one of lambda-local") as caught:
        speed.main(["--rows", "lambda"])
    assert "\n" not in str(caught.value)
    assert {name for name in ROWS} >= {row for rows in speed.DEFAULT_ROWS.values() for row in map(model_of, rows)}


def model_of(row):
    return split_name(row)[0]


@pytest.mark.parametrize("longest", [64, 512])
def test_mixed_lengths_have_a_mean_of_a_quarter(longest):
    lengths = mixed_lengths(longest)
    assert len(lengths) == MIXED_ROWS and lengths[0] == lengths.max() == longest and lengths.min() >= 1
    assert lengths.sum() == MIXED_ROWS * longest // 4


def test_floor_projects_and_mixes_nothing():
    """Its output at a place depends on that place's token alone."""
    torch.manual_seed(0)
    model = floor_model(1, 8, pretraining=False).eval()
    ids = torch.arange(10, 18)[None]
    with torch.no_grad():
        before, after = (
            model(ids).last_hidden_state,
            model(torch.cat([ids[:, :4], ids[:, 4:] + 9], 1)).last_hidden_state,
        )
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_profile_watches_functions_that_are_called_and_sets_them_back():
    functions = [function for group in profile_layer.FUNCTIONS.values() for function in group]
    before = [getattr(module, name) for module, name in functions]
    local = profile_layer.profile(layers=1, length=16, scope=25, tokens=32, repeats=2)
    whole = profile_layer.profile(layers=1, length=16, scope=None, tokens=32, repeats=2)
    assert [getattr(module, name) for module, name in functions] == before
    for result in (local, whole):
        assert list(result) == profile_layer.PARTS
        assert all(milliseconds > 0 for milliseconds in result.values())


def test_precisions_predict_the_same_tokens(make_config):
    torch.manual_seed(0)
    model = LambdaBertForMaskedLM(make_config(hidden_size=32, intermediate_size=64)).eval()
    ids = torch.arange(5, 35).view(2, 15)
    labels = torch.where(torch.arange(15) % 3 == 0, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    results = precision.compare(precision.precisions(model), iter([copy.copy(batch), copy.copy(batch)]))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(ids).logits[labels != -100], labels[labels != -100])
    assert results["float32"]["mlm_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert results["float32"]["hidden error"] == 0 < results["bfloat16"]["hidden error"] < 0.05
    assert list(results) == ["float32", "bfloat16", "int8 dynamic"] and precision.table(results).count("\n") == 5
