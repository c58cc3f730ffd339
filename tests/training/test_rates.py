"""A run may be resumed with another length, learning rate or weight decay: they hold from the checkpoint on."""

import json
import math
import shutil

import pytest
import torch

from lambdabert.training.checkpoints import is_complete
from lambdabert.training.settings import LENGTH_FIELDS, changeable_fields, earlier_values
from training_support import assert_same_weights, complaint, contents, finish, recipe_for, start_command

OTHER_RATES = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}


def rates(checkpoint):
    """The logged learning rate of each step."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {record["step"]: record["learning_rate"] for record in history if "learning_rate" in record}


def test_longer_run_follows_the_schedule_of_its_new_length(text, finished, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(finished, output_dir)
    recipe = recipe_for(text, output_dir, max_steps=20, logging_steps=1, save_steps=5)
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert "planned for 12 steps and now has 20" in log.read_text()
    assert is_complete(output_dir / "checkpoint-15"), "how often it is saved may change"
    logged = rates(output_dir / "checkpoint-20")
    warmup = 2  # 0.06 of 20 steps
    for step in range(13, 21):
        assert logged[step] == pytest.approx(5e-3 * (20 - (step - 1)) / (20 - warmup)), step


def test_fewer_steps_than_are_done_are_refused(text, after_8_of_12_steps, tmp_path, capfd):
    before = contents(after_8_of_12_steps)
    message = complaint(recipe_for(text, after_8_of_12_steps), capfd, "--max_steps", "7")
    assert "checkpoint-8" in message and "--max_steps 8" in message
    assert contents(after_8_of_12_steps) == before


def test_other_rates_hold_from_the_checkpoint_on(text, after_8_of_12_steps, tmp_path):
    output_dir, log = after_8_of_12_steps, tmp_path / "log"
    recipe = recipe_for(text, output_dir, logging_steps=1, save_steps=2, **OTHER_RATES)
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    changes = [line for line in log.read_text().splitlines() if line.startswith("From step 8 on, ")]
    assert len(changes) == 1
    for said in (
        "learning_rate is 0.0001 (0.005 until then)",
        "lr_scheduler_type is cosine (linear until then)",
        "weight_decay is 0.1 (0.01 until then)",
    ):
        assert said in changes[0]
    logged = rates(output_dir / "checkpoint-12")
    for step in range(9, 13):
        course = (1 + math.cos(math.pi * (step - 1 - 2) / (12 - 2))) / 2
        assert logged[step] == pytest.approx(1e-4 * course), step
    optimizer = torch.load(output_dir / "checkpoint-12" / "optimizer.pt")
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.1, 0.0]
    record = json.loads((output_dir / "run_settings.json").read_text())
    assert record["training"]["learning_rate"] == 1e-4
    assert record["earlier"]["learning_rate"] == [{"value": 5e-3, "until_step": 8}]
    card = (output_dir / "README.md").read_text()
    assert "| learning_rate | 0.0001 (0.005 until step 8) |" in card and "| adam_beta1 | 0.9 |" in card

    # interrupted again, it is resumed with the same weights
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    shutil.copytree(output_dir / "checkpoint-10", interrupted / "checkpoint-10")
    (interrupted / "run_settings.json").write_text(json.dumps({**record, "reported": None}))
    again = tmp_path / "again.log"
    recipe = recipe_for(text, interrupted, logging_steps=1, save_steps=2, **OTHER_RATES)
    assert finish(start_command([recipe], again)) == [0], again.read_text()
    assert "until then" not in again.read_text()
    assert_same_weights(output_dir, interrupted)
    assert json.loads((interrupted / "run_settings.json").read_text())["earlier"] == record["earlier"]


@pytest.mark.parametrize("change", [{"learning_rate": 1e-5}, {"lr_scheduler_type": "cosine"}, {"warmup_steps": 3}])
def test_other_rates_of_a_finished_run_are_refused(text, finished, tmp_path, capfd, change):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    before = contents(output_dir)
    message = complaint(recipe_for(text, output_dir, **change), capfd)
    name, value = next(iter(change.items()))
    assert f"{name} is {value}" in message and "change nothing: give --max_steps above 12" in message
    assert contents(output_dir) == before


def test_rate_of_the_checkpoint_must_be_the_recorded_one(text, after_8_of_12_steps, capfd):
    file = after_8_of_12_steps / "run_settings.json"
    record = json.loads(file.read_text())
    record["training"]["learning_rate"] = 2e-3
    file.write_text(json.dumps(record))
    assert "has learning_rate=0.005, and this run 0.002" in complaint(
        recipe_for(text, after_8_of_12_steps, learning_rate=1e-4), capfd
    )


class TestEarlierValues:
    """What a record keeps of a rate that changes."""

    @pytest.mark.parametrize(
        "earlier, before, now, step, expected",
        [
            ([], 1, 1, 8, []),
            ([], 1, 2, 8, [(1, 8)]),
            ([(1, 8)], 2, 2, 8, [(1, 8)]),
            ([(1, 8)], 2, 2, 12, [(1, 8)]),
            ([(1, 8)], 2, 3, 12, [(1, 8), (2, 12)]),
            ([(1, 8)], 2, 3, 8, [(1, 8)]),
            ([(1, 8)], 2, 1, 8, []),
            ([(1, 8)], 2, 3, 4, [(1, 4)]),
            ([(1, 8), (2, 12)], 3, 2, 10, [(1, 8)]),
            ([(1, 8)], 2, 1, 12, [(1, 8), (2, 12)]),
        ],
        ids=[
            *("the same", "another", "resumed at once", "resumed later", "changed twice", "changed before a step"),
            *("changed back before a step", "from an earlier checkpoint", "as it was there", "changed back later"),
        ],
    )
    def test_values(self, earlier, before, now, step, expected):
        earlier, expected = (
            [{"value": value, "until_step": until} for value, until in values] for values in (earlier, expected)
        )
        record = {"training": {"learning_rate": before}, "earlier": {"learning_rate": earlier}}
        values = earlier_values(record, {"learning_rate": now}, step)
        assert values == ({"learning_rate": expected} if expected else {})

    def test_schedules_with_a_state_may_not_change(self):
        linear, plateau = ({"lr_scheduler_type": name} for name in ("linear", "reduce_lr_on_plateau"))
        assert "learning_rate" in changeable_fields(linear, linear)
        for pair in ((linear, plateau), (plateau, linear), (plateau, plateau)):
            assert changeable_fields(*pair) == LENGTH_FIELDS
