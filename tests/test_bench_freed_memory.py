"""The benchmark of freed memory: its table, what it refuses, and what is recorded."""

import json
import statistics

import pytest

from benchmarks import freed_memory
from benchmarks.calls import Cell
from benchmarks.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "freed_memory"


def test_a_step_is_measured_and_told():
    cell = Cell("train", "lambda-local", 16, 1, 32, "float32", "cpu")
    results = freed_memory.measure(cell, rounds=1, count=2, threads=1)
    assert [result["keeps"] for result in results] == [False, True]
    for result in results:
        (seconds,) = result["all_seconds"]
        assert len(seconds) == 2 and result["seconds"] == statistics.median(seconds) > 0
        assert result["peak_bytes"] > 0 and result["page_faults"] >= 0
    assert results[1]["page_faults"] < results[0]["page_faults"]
    assert freed_memory.table(results).splitlines()[2].startswith("| train | 16 | lambda-local |")


@pytest.mark.parametrize("file", ["train", "forward"])
def test_recorded_medians_are_those_of_the_recorded_calls(file):
    results = json.loads((RESULTS / f"{file}.json").read_text())["results"]
    for result in results:
        assert result["seconds"] == statistics.median(sum(result["all_seconds"], []))
    for without, kept in zip(results[::2], results[1::2], strict=True):
        assert (without["keeps"], kept["keeps"]) == (False, True)
        assert all(without[name] == kept[name] for name in ("part", "row", "length", "layers", "tokens"))


@pytest.mark.parametrize(
    "row, message",
    [("lambda", "rows: 'lambda' is unknown"), ("bert-full", "rows: 'bert-full' cannot be measured in parts=forward")],
)
def test_rows_that_are_not_trained(row, message, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        freed_memory.main(["--rows", row, "--output", str(tmp_path / "out.json")])
