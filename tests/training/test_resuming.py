"""A pretraining run that is interrupted in any way goes on as if nothing had happened, or says why it cannot."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, modeling_utils

import run_language_modeling
from lambdabert.training import rehearsal
from lambdabert.training.arguments import RunArguments
from lambdabert.training.checkpoints import is_complete, last_complete_checkpoint
from lambdabert.training.settings import examples_hash, training_settings
from lambdabert.training.trainer import PretrainingTrainer
from training_support import (
    RECIPE,
    assert_same_weights,
    complaint,
    contents,
    finish,
    recipe_for,
    sources,
    start_command,
    wait_for,
    write_recipe,
    write_text,
)

TIMES = re.compile("time|per_second")


def test_killed_twice_ends_with_the_weights_of_an_uninterrupted_run(text, finished, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = recipe_for(text, output_dir)
    between = start_command([recipe], tmp_path / "first log")
    wait_for(output_dir / "checkpoint-4" / "trainer_state.json", between)
    os.kill(between, signal.SIGKILL)
    during = start_command([recipe], tmp_path / "second log")
    wait_for(output_dir / "checkpoint-8", during)
    os.kill(during, signal.SIGKILL)
    assert finish(between, during) == [-signal.SIGKILL] * 2
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert f"Resuming from {output_dir}/checkpoint-4, step 4 of 12" in log.read_text()
    assert_same_weights(finished, output_dir)


def test_killed_before_the_first_checkpoint_starts_again_from_the_same_weights(text, finished, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = recipe_for(text, output_dir)
    process = start_command([recipe], log)
    wait_for(output_dir / "run_settings.json", process)
    os.kill(process, signal.SIGKILL)
    finish(process)
    assert not list(output_dir.glob("checkpoint-*/trainer_state.json"))
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert_same_weights(finished, output_dir)


def test_sigterm_saves_ends_cleanly_and_goes_on(text, finished, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = recipe_for(text, output_dir)
    process = start_command([recipe], log)
    wait_for(output_dir / "checkpoint-4" / "trainer_state.json", process)
    os.kill(process, signal.SIGTERM)
    assert finish(process) == [128 + signal.SIGTERM]
    stopped = re.search(r"Stopped by SIGTERM after step (\d+)", log.read_text())
    assert stopped and is_complete(output_dir / f"checkpoint-{stopped[1]}")
    assert not (output_dir / "metrics.json").exists()
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert_same_weights(finished, output_dir)


@pytest.mark.parametrize(
    "length", [{"max_steps": 8}, {"max_steps": None, "num_train_epochs": 2.0}], ids=["steps", "epochs"]
)
def test_batch_that_was_found_to_fit_is_recorded_and_resumed(text, tmp_path, monkeypatch, length):
    training_step, kill_at = PretrainingTrainer.training_step, []

    def small_memory(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if kill_at == [self.state.global_step]:
            kill_at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(PretrainingTrainer, "training_step", small_memory)
    values = dict(auto_find_batch_size=True, per_device_train_batch_size=8, learning_rate=None, **length)
    recipes = [recipe_for(text, tmp_path / name, **values) for name in ("whole", "killed")]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run_language_modeling.main([recipes[0]]) == 0
    record = json.loads((tmp_path / "whole" / "run_settings.json").read_text())
    assert record["training"]["per_device_train_batch_size x gradient_accumulation_steps x processes"] == 4
    assert "| per_device_train_batch_size | 2 |" in (tmp_path / "whole" / "README.md").read_text()
    kill_at.append(5)
    assert run_language_modeling.main([recipes[1]]) == 128 + signal.SIGTERM
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert run_language_modeling.main([recipes[1]]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    before = contents(tmp_path / "whole")
    assert run_language_modeling.main([recipes[0]]) == 0
    assert contents(tmp_path / "whole") == before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_batch_that_was_found_to_fit_stays_when_there_is_less_memory(text, tmp_path, monkeypatch, capfd):
    """Fewer examples a step would be another run."""
    training_step, limit = PretrainingTrainer.training_step, [4]

    def small_memory(self, model, inputs, *args):
        if len(inputs["input_ids"]) > limit[0]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.state.global_step == 5 and limit == [4]:
            limit.append("killed")
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(PretrainingTrainer, "training_step", small_memory)
    recipe = recipe_for(text, tmp_path / "run", auto_find_batch_size=True, per_device_train_batch_size=5)
    assert run_language_modeling.main([recipe]) == 128 + signal.SIGTERM
    before = contents(tmp_path / "run")
    limit[:] = [2]
    message = complaint(recipe, capfd)
    assert "per_device_train_batch_size=4" in message and "does not fit into memory now" in message
    assert contents(tmp_path / "run").keys() == before.keys()
    limit[0] = 8
    assert run_language_modeling.main([recipe]) == 0
    step = "per_device_train_batch_size x gradient_accumulation_steps x processes"
    assert json.loads((tmp_path / "run" / "run_settings.json").read_text())["training"][step] == 8


def test_an_attempt_that_ran_out_of_memory_leaves_nothing(text, tmp_path, monkeypatch):
    """Neither weights, nor what the optimizer has seen, nor a checkpoint."""
    training_step, weights = PretrainingTrainer.training_step, []
    values = dict(auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=6, save_steps=2)
    values |= dict(config_overrides=RECIPE["config_overrides"] | {"hidden_dropout_prob": 0.0})
    for fails_after in (0, 3):

        def small_memory(self, model, inputs, *args):
            if len(inputs["input_ids"]) > 2 and self.state.global_step >= fails_after:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if self.state.global_step == 0:
                assert last_complete_checkpoint(self.args.output_dir) is None
            return training_step(self, model, inputs, *args)

        monkeypatch.setattr(PretrainingTrainer, "training_step", small_memory)
        output_dir = tmp_path / str(fails_after)
        assert run_language_modeling.main([recipe_for(text, output_dir, **values)]) == 0
        weights.append(output_dir)
    assert_same_weights(*weights)


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_signal_saves_its_step_and_evaluates_nothing_more(text, tmp_path, monkeypatch, strategy):
    """Neither at the end of the epoch that it cuts off, nor only if the step's model is better than all before.

    It goes on elsewhere: the best checkpoint before the signal is that of the folder, wherever it is.
    """
    schedule = {"epoch": {"eval_strategy": "epoch", "eval_steps": None}, "best": {"eval_steps": 2}}[strategy]
    schedule |= {"save_strategy": strategy, "save_steps": None, "load_best_model_at_end": True, "max_steps": 10}
    # which stays the same, so that none is better than the first
    schedule |= {"metric_for_best_model": "eval_tokens", "greater_is_better": True}
    recipes = [recipe_for(text, tmp_path / name, **schedule) for name in ("whole", "killed", "moved")]
    assert run_language_modeling.main([recipes[0]]) == 0
    training_step, kill_at = PretrainingTrainer.training_step, [5 if strategy == "best" else 2]

    def killed(self, *args):
        if kill_at == [self.state.global_step]:
            kill_at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args)

    monkeypatch.setattr(PretrainingTrainer, "training_step", killed)
    assert run_language_modeling.main([recipes[1]]) == 128 + signal.SIGTERM
    last = last_complete_checkpoint(str(tmp_path / "killed"))
    assert last.name == ("checkpoint-6" if strategy == "best" else "checkpoint-3")
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert [logs["step"] for logs in history if "eval_loss" in logs] == ([2, 4, 6] if strategy == "best" else [])
    (tmp_path / "killed").rename(tmp_path / "moved")
    assert run_language_modeling.main([recipes[2]]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "moved")


def test_a_signal_in_the_last_evaluation_saves_the_step(text, finished, tmp_path, monkeypatch, caplog):
    evaluate, seen = PretrainingTrainer.evaluate, []

    def killed(self, *args, **kwargs):
        if self.state.global_step == 12 and not seen:
            seen.append("the last evaluation")
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "evaluate", killed)
    recipe = recipe_for(text, tmp_path / "run", save_strategy="no", save_steps=None)
    assert run_language_modeling.main([recipe]) == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after step 12, with a checkpoint" in caplog.text
    assert is_complete(tmp_path / "run" / "checkpoint-12") and not (tmp_path / "run" / "metrics.json").exists()
    assert run_language_modeling.main([recipe]) == 0
    assert_same_weights(finished, tmp_path / "run")


def test_the_hub_is_given_the_whole_folder_at_the_end(text, tmp_path, monkeypatch):
    pushed, ignored = [], []

    def upload(*, folder_path, **kwargs):
        pushed.append(contents(Path(folder_path)))
        ignored.extend(kwargs["ignore_patterns"])

    monkeypatch.setattr(rehearsal, "check_hub", lambda args: None)
    name_it = lambda trainer, *args, **kwargs: setattr(trainer, "hub_model_id", "me/it")  # noqa: E731
    monkeypatch.setattr(PretrainingTrainer, "init_hf_repo", name_it)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    recipe = recipe_for(text, tmp_path / "run", push_to_hub=True, hub_strategy="end", max_steps=2)
    assert run_language_modeling.main([recipe]) == 0
    (files,) = pushed
    assert {file.name for file in files} >= {"README.md", "metrics.json", "training_curves.png", "model.safetensors"}
    assert "run_settings.json" in ignored, "it holds paths of this machine"
    published = [content for file, (content, _) in files.items() if file.suffix in (".json", ".md")]
    assert str(text).encode() not in b"".join(content for content in published if b'"reported"' not in content)
    card = hashlib.sha256(files[tmp_path / "run" / "README.md"][0]).hexdigest()
    assert json.loads((tmp_path / "run" / "run_settings.json").read_text())["card"] == card


def test_stream_goes_on_in_a_later_pass(text, tmp_path, capfd):
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
    message = complaint(recipes[1], capfd, "--dataloader_num_workers", "2")
    assert "dataloader_num_workers is 0 there and 2 here" in message, "the order of a stream depends on it"


def test_finished_run_started_again_changes_no_file(text, finished, tmp_path, caplog):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    before = contents(output_dir)
    watching = dict(logging_steps=1, save_steps=2, eval_steps=3, per_device_eval_batch_size=2, save_total_limit=1)
    assert run_language_modeling.main([recipe_for(text, output_dir, **watching, dataloader_num_workers=1)]) == 0
    assert "nothing is left to train" in caplog.text and "stays as it is" in caplog.text
    assert (
        run_language_modeling.main([recipe_for(text, output_dir, do_eval=False, eval_steps=None, validation_file=None)])
        == 0
    )
    assert contents(output_dir) == before


@pytest.mark.parametrize("full", ["model", "report"])
def test_full_disk_at_the_end_is_said_and_the_same_command_completes_the_result(
    text, finished, tmp_path, monkeypatch, capfd, full
):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    for name in ("model.safetensors", "README.md", "training_curves.png"):
        (output_dir / name).unlink()
    recipe = recipe_for(text, output_dir)

    def fail(*args, **kwargs):
        raise {"model": SafetensorError, "report": OSError}[full](os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full_disk:
        saves = {"model": (modeling_utils, "safe_save_file"), "report": (run_language_modeling, "plot_curves")}
        full_disk.setattr(*saves[full], fail)
        assert "No space left" in complaint(recipe, capfd)
    assert is_complete(output_dir / "checkpoint-12")
    assert run_language_modeling.main([recipe]) == 0
    assert_same_weights(finished, output_dir)
    assert (output_dir / "training_curves.png").exists()
    # the last checkpoint was written a moment before the end
    cards = [set((folder / "README.md").read_text().splitlines()) for folder in (finished, output_dir)]
    assert all(line.startswith("| seconds |") or TIMES.search(line) for line in cards[0] ^ cards[1])
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, output_dir))
    assert after["train"]["seconds"] >= before["train"]["seconds"] / 2
    for part, of_time in (("train", ["seconds"]), ("eval", [name for name in after["eval"] if TIMES.search(name)])):
        assert {**after[part], **dict.fromkeys(of_time)} == {**before[part], **dict.fromkeys(of_time)}
    assert after.keys() == before.keys() and after["model"] == before["model"] and after["data"] == before["data"]


def test_other_evaluation_text_of_a_finished_run_is_evaluated(text, finished, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    flags = ["--validation_file", write_text(tmp_path / "other.txt", documents=3, seed=9)]
    before, losses = contents(output_dir)[output_dir / "model.safetensors"], []
    for _ in range(2):
        assert run_language_modeling.main([recipe_for(text, output_dir), *flags]) == 0
        losses.append(json.loads((output_dir / "metrics.json").read_text())["eval"]["eval_mlm_loss"])
    assert losses[0] == losses[1] != json.loads((finished / "metrics.json").read_text())["eval"]["eval_mlm_loss"]
    assert contents(output_dir)[output_dir / "model.safetensors"] == before, "it was not written again"


@pytest.mark.parametrize("validation", ["same", "other"])
def test_a_result_that_was_changed_is_not_overwritten(text, finished, tmp_path, capfd, validation):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    (output_dir / "config.json").write_text((output_dir / "config.json").read_text() + "\n")
    (output_dir / "training_curves.png").unlink()
    flags = []
    if validation == "other":
        flags = ["--validation_file", write_text(tmp_path / "other.txt", documents=3, seed=9)]
    before = contents(output_dir)
    message = complaint(recipe_for(text, output_dir), capfd, *flags)
    assert "config.json changed since" in message and "training_curves" not in message
    assert contents(output_dir) == before


def test_a_split_counts_where_it_decides_what_a_step_sees(tmp_path, monkeypatch):
    """What is dropped at the end of an epoch depends on the batch and on the number of processes."""

    def settings(batch, accumulation, processes=1, **values):
        monkeypatch.setattr(RunArguments, "world_size", processes)
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return training_settings(RunArguments(output_dir=str(tmp_path), use_cpu=True, **split, **values))

    for strategy in ("random", "group_by_length"):
        one, *others = (settings(*split, train_sampling_strategy=strategy) for split in ((4, 2), (2, 4), (2, 2, 2)))
        assert all(other == one for other in others)
    one, *others = (settings(*split, dataloader_drop_last=True) for split in ((4, 2), (2, 4), (4, 1, 2)))
    assert all(other != one for other in others)


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def spoil_tensors(file, change):
    values = torch.load(file, weights_only=False)
    change(values)
    torch.save(values, file)


def spoil_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(file, field):
    values = json.loads(file.read_text())
    del values[field]
    file.write_text(json.dumps(values))


def spoil_weights(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: torch.save(Attack(folder / "attacked"), folder / "optimizer.pt"),
        lambda folder: torch.save({"cpu": Attack(folder / "attacked")}, folder / "rng_state.pth"),
        lambda folder: spoil_tensors(folder / "optimizer.pt", lambda values: values["state"].pop(3)),
        lambda folder: spoil_tensors(folder / "optimizer.pt", lambda values: values["state"].clear()),
        lambda folder: spoil_tensors(
            folder / "optimizer.pt", lambda values: values["state"][3]["exp_avg"].fill_(math.nan)
        ),
        lambda folder: spoil_tensors(
            folder / "optimizer.pt", lambda values: values["state"][3].update(exp_avg=torch.zeros(7))
        ),
        lambda folder: spoil_tensors(folder / "optimizer.pt", lambda values: values["state"][3].update(more=1.0)),
        lambda folder: spoil_tensors(
            folder / "optimizer.pt", lambda values: values["param_groups"][0].update(lr=1, eps=1)
        ),
        lambda folder: spoil_tensors(folder / "scheduler.pt", lambda values: values.update(base_lrs=[1.0, 1.0])),
        lambda folder: spoil_tensors(folder / "scheduler.pt", lambda values: values.update(last_epoch="8")),
        lambda folder: spoil_tensors(folder / "scheduler.pt", lambda values: values.update(last_epoch=9)),
        lambda folder: torch.save({}, folder / "rng_state.pth"),
        lambda folder: spoil_weights(folder / "model.safetensors", lambda weights: weights.popitem()),
        lambda folder: spoil_weights(folder / "model.safetensors", lambda weights: weights.update(more=torch.ones(2))),
        lambda folder: spoil_json(folder / "config.json", hidden_size=64),
        lambda folder: without(folder / "config.json", "classifier_pooling"),  # saved before the field was there
        lambda folder: spoil_json(folder / "trainer_state.json", global_step="8"),
        lambda folder: spoil_json(folder / "trainer_state.json", global_step=4),
        lambda folder: spoil_json(folder / "trainer_state.json", max_steps=-1),
        lambda folder: spoil_json(folder / "trainer_state.json", epoch=math.nan),
        lambda folder: spoil_json(folder / "trainer_state.json", train_batch_size=None),
        lambda folder: spoil_json(folder / "trainer_state.json", log_history=[{"step": "8"}]),
        lambda folder: spoil_json(folder / "trainer_state.json", another=1),
    ],
    ids=[
        *("optimizer with code", "random state with code", "optimizer lacks a weight", "optimizer is empty"),
        *("optimizer holds nan", "optimizer of another shape", "optimizer keeps more for a weight"),
        *("optimizer of other settings", "scheduler of another rate", "scheduler of wrong type", "scheduler is ahead"),
        *("random state is empty", "weight missing", "weight unknown", "config contradicts"),
        "config of an earlier default",
        *("step of wrong type", "step of another checkpoint", "length below 0", "epoch is nan"),
        *("batch of wrong type", "history of wrong type", "state unknown"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(text, after_8_of_12_steps, capfd, spoil):
    spoil(after_8_of_12_steps / "checkpoint-8")
    message = complaint(recipe_for(text, after_8_of_12_steps), capfd)
    assert re.search("checkpoint-8 cannot be resumed from|The checkpoint in .* has (eps|learning_rate)=", message)
    assert not (after_8_of_12_steps / "checkpoint-8" / "attacked").exists()
    assert not (after_8_of_12_steps / "model.safetensors").exists()


def test_record_of_an_earlier_version_can_be_resumed_from(text, finished, after_8_of_12_steps, tmp_path, capfd):
    """Such a record has seeds alone of the Trainer's arguments; the rate is then compared with the checkpoint's."""
    file = after_8_of_12_steps / "run_settings.json"
    record = json.loads(file.read_text())
    del record["reported"], record["card"], record["model"]["command"], record["data"]["content of the examples"]
    seeds = {name: record["training"][name] for name in ("seed", "data_seed")}
    file.write_text(json.dumps(record | {"training": seeds}))
    before = contents(after_8_of_12_steps)
    recipe, log = recipe_for(text, after_8_of_12_steps), tmp_path / "log"
    assert "has learning_rate=0.005, and this run 0.001" in complaint(recipe, capfd, "--learning_rate", "0.001")
    assert contents(after_8_of_12_steps) == before
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert "does not record" in log.read_text()
    assert_same_weights(finished, after_8_of_12_steps)


def test_checkpoint_that_lacks_a_part_or_is_cut_short_is_never_used(finished, tmp_path):
    checkpoint = max(finished.glob("checkpoint-*"))
    assert is_complete(checkpoint)
    parts = [file.name for file in checkpoint.iterdir() if file.suffix != ".py"]
    resumable = {"trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert resumable < set(parts)
    for name in parts:
        cut = tmp_path / name / "checkpoint-8"
        shutil.copytree(checkpoint, cut)
        with open(cut / name, "r+b") as file:
            file.truncate(os.path.getsize(cut / name) // 2)
        assert not is_complete(cut), f"{name} is cut short"
        (cut / name).unlink()
        assert is_complete(cut) == (name not in resumable | {"config.json"}), f"{name} is missing"


def test_last_whole_checkpoint_is_the_one_of_most_steps(finished, tmp_path):
    whole = max(finished.glob("checkpoint-*"))
    for step in (9, 10, 100):
        shutil.copytree(whole, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


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
    assert "Resuming from" in log.read_text()


def test_optimizer_that_keeps_factors_resumes(text, tmp_path):
    values = {"optim": "adafactor", "learning_rate": 1e-2, "max_steps": 8}
    assert run_language_modeling.main([recipe_for(text, tmp_path / "whole", **values)]) == 0
    recipe = recipe_for(text, tmp_path / "cut", **values)
    assert run_language_modeling.main([recipe]) == 0
    for name in ("checkpoint-8", "model.safetensors", "metrics.json"):
        target = tmp_path / "cut" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert run_language_modeling.main([recipe]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_tokenizer_with_other_special_tokens_resumes(text, tmp_path):
    """The Trainer writes these into the config that is saved."""
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = sources(text, output_dir=str(tmp_path / "run"), tokenizer_name=str(tmp_path / "tokenizer"))
    recipe = write_recipe(tmp_path / "run.json", max_steps=8, **given)
    assert run_language_modeling.main([recipe]) == 0
    before = load_file(tmp_path / "run" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    assert run_language_modeling.main([recipe]) == 0
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "values",
    [
        {"save_strategy": "no", "save_steps": None},
        {"save_strategy": "best", "save_steps": None, "eval_steps": 2},
        {"load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 2, "eval_steps": 2},
    ],
    ids=["no checkpoint", "the best alone", "the best and no last"],
)
def test_a_finished_run_stays_whichever_checkpoints_are_left(text, tmp_path, values):
    recipe = recipe_for(text, tmp_path / "run", max_steps=6, **values)
    assert run_language_modeling.main([recipe]) == 0
    before = contents(tmp_path / "run")
    assert run_language_modeling.main([recipe]) == 0
    assert contents(tmp_path / "run") == before


def test_a_finished_run_with_an_edited_card_stays(text, finished, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    (output_dir / "README.md").write_text("What this model is for.\n")
    before = contents(output_dir)
    assert run_language_modeling.main([recipe_for(text, output_dir)]) == 0
    assert contents(output_dir) == before
    shutil.rmtree(output_dir / "checkpoint-12")
    before = contents(output_dir)
    assert run_language_modeling.main([recipe_for(text, output_dir)]) == 0
    assert contents(output_dir) == before


def test_a_result_without_its_last_checkpoint_is_not_trained_again(text, finished, tmp_path, capfd):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    shutil.rmtree(output_dir / "checkpoint-12")
    before = contents(output_dir)
    other = ["--validation_file", write_text(tmp_path / "other.txt", documents=3, seed=9)]
    message = complaint(recipe_for(text, output_dir), capfd, *other)
    assert "its last checkpoint is gone, but it is not known to be evaluated on this text" in message
    assert contents(output_dir) == before
    (output_dir / "training_curves.png").unlink()
    before = contents(output_dir)
    message = complaint(recipe_for(text, output_dir), capfd)
    assert "its last checkpoint is gone, but training_curves.png changed since" in message
    assert contents(output_dir) == before
    message = complaint(recipe_for(text, output_dir, max_steps=10), capfd)
    assert "holds the result of 12 steps, and this run has 10: give --max_steps 12" in message
    assert contents(output_dir) == before
    advice = [*other, "--model_name_or_path", str(output_dir), "--output_dir", str(tmp_path / "evaluated")]
    evaluation = ["--do_eval", "--sop", "--max_seq_length=32", "--use_cpu", "--disable_tqdm=true", *advice]
    assert run_language_modeling.main([*evaluation, "--data_cache_dir", str(text / "cache")]) == 0
    assert (tmp_path / "evaluated" / "evaluation.json").is_file() and contents(output_dir) == before


def test_text_prepared_by_other_code_is_the_same_run_if_the_examples_are(text, finished, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    before = contents(output_dir)
    monkeypatch.setattr("lambdabert.text.cache.CODE", "another version")
    assert run_language_modeling.main([recipe_for(text, output_dir)]) == 0
    assert contents(output_dir) == before


def test_the_hash_of_examples_is_that_of_their_content():
    rows = [[1, 2, 3], [4], [5, 6]]
    examples = Dataset.from_dict({"input_ids": rows, "label": [0, 1, 0]})
    known = examples_hash(examples)
    again = Dataset.from_dict({"label": [0, 1, 0, 1], "input_ids": [*rows, [7]]}).select([0, 1, 2])
    assert known == examples_hash(again)
    pieces = [Dataset.from_dict({"input_ids": rows[i : i + 1], "label": [i % 2]}) for i in range(3)]
    assert known == examples_hash(concatenate_datasets(pieces))
    for changed, labels in (
        ([[1, 2], [3, 4], [5, 6]], [0, 1, 0]),
        ([[1, 2, 3], [4], [5, 7]], [0, 1, 0]),
        (rows, [0, 1, 1]),
        ([rows[1], rows[0], rows[2]], [0, 1, 0]),
    ):
        assert known != examples_hash(Dataset.from_dict({"input_ids": changed, "label": labels}))
    assert examples_hash(examples.to_iterable_dataset()) is None


def test_an_edited_card_stays_when_the_result_is_evaluated_on_another_text(text, finished, tmp_path, caplog):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    (output_dir / "README.md").write_text("What this model is for.\n")
    for name in ("other", "third"):
        other = ["--validation_file", write_text(tmp_path / f"{name}.txt", documents=3, seed=len(name) + ord(name[0]))]
        assert run_language_modeling.main([recipe_for(text, output_dir), *other]) == 0
        assert (output_dir / "README.md").read_text() == "What this model is for.\n"
    assert "README.md was edited and stays as it is" in caplog.text
    assert_same_weights(finished, output_dir)


def test_a_checkpoint_does_not_lend_its_evaluation_to_another_text(text, finished, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    other = ["--validation_file", write_text(tmp_path / "other.txt", documents=3, seed=9)]
    record = json.loads((output_dir / "run_settings.json").read_text())
    del record["reported"]  # as after the start of a longer run that was killed
    (output_dir / "run_settings.json").write_text(json.dumps(record))
    assert run_language_modeling.main([recipe_for(text, output_dir), *other]) == 0
    found = json.loads((output_dir / "metrics.json").read_text())["eval"]
    assert found["eval_tokens"] != json.loads((finished / "metrics.json").read_text())["eval"]["eval_tokens"]


def test_the_best_weights_are_the_result_or_nothing_is(text, tmp_path, capfd):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "sentence_accuracy", "greater_is_better": True}
    recipe = recipe_for(text, tmp_path / "run", eval_steps=4, learning_rate=1e-9, **best)
    assert run_language_modeling.main([recipe]) == 0  # the first evaluation is as good as the later
    state = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4
    longer = ["--max_steps", "16"]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", tmp_path / "other")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # a copied folder does not go back to it
    assert run_language_modeling.main([recipe, *longer, "--output_dir", str(tmp_path / "copy")]) == 0
    assert_same_weights(tmp_path / "copy", tmp_path / "copy" / "checkpoint-4")
    shutil.rmtree(tmp_path / "other" / "checkpoint-4")
    (tmp_path / "other" / "training_curves.png").unlink()
    before = contents(tmp_path / "other")
    for flags in ([], longer):
        message = complaint(recipe, capfd, *flags, "--output_dir", str(tmp_path / "other"))
        assert "checkpoint-4, the best of this run, is gone" in message
        assert contents(tmp_path / "other") == before
