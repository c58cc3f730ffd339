"""A pretraining run that is interrupted in any way goes on as if nothing had happened, or says why it cannot."""

import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_language_modeling
from pretraining_trainer import is_whole, last_whole_checkpoint
from training_support import finish, start_command, write_recipe, write_text


def recipe_for(text, output_dir, **values):
    return write_recipe(
        output_dir.with_suffix(".json"),
        output_dir=str(output_dir),
        train_file=[str(text / "train.txt")],
        tokenizer_name=str(text / "tokenizer"),
        data_cache_dir=str(text / "cache"),
        gradient_accumulation_steps=2,
        **{"validation_file": [str(text / "valid.txt")], **values},
    )


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The output folder of a run that nothing interrupted; it passes through two epochs, with dropout."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    log = output_dir.with_suffix(".log")
    assert finish(start_command([recipe_for(text, output_dir)], log)) == [0], log.read_text()
    return output_dir


def wait_for(file, process):
    while not file.exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), f"the run ended before it wrote {file}"
        time.sleep(0.005)


def assert_same_weights(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_killed_twice_ends_with_the_weights_of_an_uninterrupted_run(text, finished, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = recipe_for(text, output_dir)
    between = start_command([recipe], log)
    wait_for(output_dir / "checkpoint-4" / "trainer_state.json", between)
    os.kill(between, signal.SIGKILL)
    during = start_command([recipe], log)
    wait_for(output_dir / "checkpoint-8", during)
    os.kill(during, signal.SIGKILL)
    assert finish(between, during) == [-signal.SIGKILL] * 2
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert f"Going on from {output_dir}/checkpoint-4, step 4 of 12" in log.read_text()
    assert_same_weights(finished, output_dir)


def test_sigterm_saves_ends_cleanly_and_goes_on(text, finished, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = recipe_for(text, output_dir)
    process = start_command([recipe], log)
    wait_for(output_dir / "checkpoint-4" / "trainer_state.json", process)
    os.kill(process, signal.SIGTERM)
    assert finish(process) == [0]
    stopped = re.search(r"Stopped by SIGTERM after step (\d+)", log.read_text())
    assert stopped and is_whole(output_dir / f"checkpoint-{stopped[1]}")
    assert not (output_dir / "metrics.json").exists()
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert_same_weights(finished, output_dir)


def test_stream_goes_on_in_a_later_pass(text, tmp_path):
    stream = {"streaming": True, "shuffle_buffer_size": 8, "max_steps": 16, "save_steps": 8, "do_eval": None}
    stream |= {"eval_steps": None, "validation_file": None}
    recipes = [recipe_for(text, tmp_path / name, **stream) for name in ("whole", "killed")]
    log = tmp_path / "log"
    assert finish(start_command([recipes[0]], log)) == [0], log.read_text()
    process = start_command([recipes[1]], log)
    wait_for(tmp_path / "killed" / "checkpoint-8" / "trainer_state.json", process)
    os.kill(process, signal.SIGKILL)
    finish(process)
    assert finish(start_command([recipes[1]], log)) == [0], log.read_text()
    assert "checkpoint-8, step 8 of 16" in log.read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_finished_run_started_again_trains_nothing(text, finished, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    log = tmp_path / "log"
    assert finish(start_command([recipe_for(text, output_dir)], log)) == [0], log.read_text()
    assert "nothing is left to train" in log.read_text()
    assert_same_weights(finished, output_dir)
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, output_dir))
    assert after["eval"]["eval_mlm_loss"] == before["eval"]["eval_mlm_loss"]
    assert {**after["train"], "seconds": None} == {**before["train"], "seconds": None}


def test_checkpoint_that_lacks_a_part_or_is_cut_short_is_never_used(finished, tmp_path):
    checkpoint = max(finished.glob("checkpoint-*"))
    assert is_whole(checkpoint)
    parts = [file.name for file in checkpoint.iterdir() if file.suffix != ".py"]
    resumable = {"trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert resumable < set(parts)
    for name in parts:
        cut = tmp_path / name / "checkpoint-8"
        shutil.copytree(checkpoint, cut)
        with open(cut / name, "r+b") as file:
            file.truncate(os.path.getsize(cut / name) // 2)
        assert not is_whole(cut), f"{name} is cut short"
        (cut / name).unlink()
        assert is_whole(cut) == (name not in resumable | {"config.json"}), f"{name} is missing"


def test_last_whole_checkpoint_is_the_one_of_most_steps(finished, tmp_path):
    whole = max(finished.glob("checkpoint-*"))
    for step in (9, 10, 100):
        shutil.copytree(whole, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "optimizer.pt").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_full_disk_while_saving_leaves_the_last_whole_checkpoint(text, finished, tmp_path, monkeypatch, capfd):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = recipe_for(text, output_dir, save_total_limit=1)
    save = torch.save

    def save_on_a_full_disk(values, file, *args, **kwargs):
        if "checkpoint-8" in str(file) and "optimizer" in str(file):
            Path(file).write_bytes(b"PK half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(values, file, *args, **kwargs)

    with monkeypatch.context() as full_disk:
        full_disk.setattr(torch, "save", save_on_a_full_disk)
        assert finish(start_command([recipe], log)) == [1]
    assert re.search(r"^error: .*checkpoint-8 could not be written .*No space left", log.read_text(), re.MULTILINE)
    assert [folder.name for folder in output_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert_same_weights(finished, output_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 24},
        {"config_overrides": {"hidden_size": 32, "num_hidden_layers": 3}},
        {"objective": "nsp"},
        {"seed": 7},
    ],
)
def test_output_folder_of_another_run_is_refused(text, finished, tmp_path, capfd, change):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    before = {file: file.read_bytes() for file in output_dir.rglob("*") if file.is_file()}
    assert run_language_modeling.main([recipe_for(text, output_dir, **change)]) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: output_dir={output_dir} belongs to another run")
    assert next(iter(change)) in message or "config_overrides" in change
    assert {file: file.read_bytes() for file in output_dir.rglob("*") if file.is_file()} == before


def test_changed_text_is_another_run(text, finished, tmp_path, capfd):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    recipe = recipe_for(text, output_dir)
    changed = write_text(tmp_path / "train.txt", seed=5)
    assert run_language_modeling.main([recipe, "--train_file", changed]) == 1
    assert "belongs to another run" in capfd.readouterr().err


def test_folder_of_something_else_is_refused(text, tmp_path, capfd):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    (output_dir / "README.md").write_text("mine")
    assert run_language_modeling.main([recipe_for(text, output_dir)]) == 1
    assert "README.md" in capfd.readouterr().err
    assert [(file.name, file.read_text()) for file in output_dir.iterdir()] == [("README.md", "mine")]


def test_text_that_disappears_while_it_is_streamed_loses_nothing(text, tmp_path):
    train = tmp_path / "train.txt"
    shutil.copy(text / "train.txt", train)
    stream = {"streaming": True, "shuffle_buffer_size": 8, "max_steps": 40, "do_eval": None, "eval_steps": None}
    stream |= {"validation_file": None}
    recipe = recipe_for(text, tmp_path / "run", **stream)
    log = tmp_path / "log"
    process = start_command([recipe, "--train_file", str(train)], log)
    wait_for(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", process)
    train.rename(tmp_path / "elsewhere.txt")
    assert finish(process) == [1]
    assert re.search(rf"^error: {train} cannot be read to its end .*", log.read_text(), re.MULTILINE)
    assert "Traceback" not in log.read_text()
    train.hardlink_to(tmp_path / "elsewhere.txt")
    assert finish(start_command([recipe, "--train_file", str(train)], log)) == [0], log.read_text()
    assert "Going on from" in log.read_text()
