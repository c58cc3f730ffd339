"""Training in two processes is training in one with the same global batch."""

import json

import pytest
import torch
from safetensors.torch import load_file

import pretraining_data
from pretraining_data import train_wordpiece
from training_support import RECIPE, finish, start_command, start_distributed, write_recipe, write_text

WITHOUT_DROPOUT = {**RECIPE["config_overrides"], "hidden_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with train.txt, valid.txt and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "train.txt")
    write_text(folder / "valid.txt", documents=4, seed=1)
    train_wordpiece((folder / "train.txt").read_text().split("\n"), 200).save_pretrained(folder / "tokenizer")
    return folder


def run(text, output_dir, processes=1, **values):
    """Runs the command; returns its output folder's weights and what it printed."""
    recipe = write_recipe(
        output_dir.with_suffix(".json"),
        **{
            "output_dir": str(output_dir),
            "train_file": [str(text / "train.txt")],
            "validation_file": [str(text / "valid.txt")],
            "tokenizer_name": str(text / "tokenizer"),
            "data_cache_dir": str(output_dir.parent / "cache"),
            "config_overrides": WITHOUT_DROPOUT,
            "max_train_samples": 24,
            **values,
        },
    )
    log = output_dir.with_suffix(".log")
    if processes == 1:
        statuses = finish(start_command([recipe], log))
    else:
        statuses = finish(*start_distributed([recipe], log, processes))
    assert statuses == [0] * processes, log.read_text()
    return load_file(output_dir / "model.safetensors"), log.read_text()


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory):
    """Weights and output folder of a run in one process: two epochs, four examples a step."""
    output_dir = tmp_path_factory.mktemp("one") / "run"
    return run(text, output_dir)[0], output_dir


def assert_equal_to_rounding(one, other):
    # twelve steps of Adam at 5e-3 move each weight by up to 6e-2
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-5, msg=name)


def test_two_processes_equal_one_with_the_same_global_batch(text, one_process, tmp_path):
    weights, printed = run(text, tmp_path / "run", processes=2, per_device_train_batch_size=2)
    assert_equal_to_rounding(one_process[0], weights)
    assert "12 steps of 4 examples on 2 process(es)" in printed
    assert printed.count("Building examples: 100%") == 2, "train and validation are prepared by one process only"
    one, two = (
        json.loads((folder / "metrics.json").read_text())["eval"] for folder in (one_process[1], tmp_path / "run")
    )
    for name in ("eval_mlm_loss", "eval_mlm_accuracy", "eval_sentence_loss", "eval_masked_tokens", "eval_tokens"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize(
    "values",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"auto_find_batch_size": True, "gradient_checkpointing": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=["accumulation", "activation checkpointing", "automatic batch size", "lasting loader process"],
)
def test_the_way_a_batch_is_computed_changes_nothing(text, one_process, tmp_path, values):
    assert_equal_to_rounding(one_process[0], run(text, tmp_path / "run", **values)[0])


def test_streams_are_shared_out_among_processes(text, tmp_path):
    stream = {"streaming": True, "shuffle_buffer_size": 8, "max_train_samples": None}
    one, _ = run(text, tmp_path / "one", **stream)
    two, _ = run(text, tmp_path / "two", processes=2, per_device_train_batch_size=2, **stream)
    assert_equal_to_rounding(one, two)


def test_bf16_with_all_savings_of_memory_trains(text, tmp_path):
    run(
        text,
        tmp_path / "run",
        bf16=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        auto_find_batch_size=True,
    )
    history = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    losses = [record["mlm_loss"] for record in history if "mlm_loss" in record]
    assert losses[-1] < losses[0]


def test_every_example_is_seen_once_an_epoch(text, tmp_path, monkeypatch):
    collate = pretraining_data.MaskingCollator.__call__
    seen = tmp_path / "seen"

    def record(self, features, *args, **kwargs):
        with open(seen, "a") as file:
            file.writelines(f"{feature['input_ids']}\n" for feature in features)
        return collate(self, features, *args, **kwargs)

    monkeypatch.setattr(pretraining_data.MaskingCollator, "__call__", record)
    run(
        text,
        tmp_path / "run",
        processes=2,
        per_device_train_batch_size=2,
        max_train_samples=40,
        max_steps=None,
        num_train_epochs=1,
        do_eval=False,
        eval_steps=None,
    )
    examples = seen.read_text().splitlines()
    assert len(examples) == 40
    assert len(set(examples)) == 40
