"""Whose an output folder is: a run with other settings and files of something else are refused."""

import fnmatch
import json
import shutil
from dataclasses import fields

import pytest

import run_language_modeling
from lambdabert.training.arguments import RunArguments
from lambdabert.training.output_folder import CODE_FILES, RUN_FILES, check_output_folder
from lambdabert.training.settings import (
    COMPUTING_FIELDS,
    EVALUATION_SCHEDULE_FIELDS,
    LENGTH_FIELDS,
    RATE_FIELDS,
    WATCHING_FIELDS,
)
from training_support import complaint, contents, recipe_for, write_text


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 24},
        {"config_overrides": {"hidden_size": 32, "num_hidden_layers": 3}},
        {"objective": "nsp"},
        {"seed": 7},
        {"adam_beta2": 0.98},
        {"bf16": True},
        {"per_device_train_batch_size": 8},
        {"load_best_model_at_end": True, "save_steps": 6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_output_folder_of_another_run_is_refused(text, finished, tmp_path, capfd, change):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    before = contents(output_dir)
    message = complaint(recipe_for(text, output_dir, **change), capfd)
    assert message.startswith(f"error: output_dir={output_dir} belongs to another run")
    name, value = next(iter(change.items()))
    assert "num_hidden_layers is 2 there and 3 here" in message if name == "config_overrides" else name in message
    if name == "adam_beta2":
        assert f"{name} is 0.999 there and {value} here" in message
    assert contents(output_dir) == before


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


@pytest.mark.parametrize(
    "name",
    [*sorted(CODE_FILES), "training_args.bin", "config.json", "tokenizer.json", "1_Pooling", "run_settings.json"],
)
def test_whatever_a_save_would_overwrite_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"mine": true}')
    with pytest.raises(ValueError, match=name):
        check_output_folder(tmp_path, training=True)


def test_evaluation_overwrites_its_own_report_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    check_output_folder(tmp_path, training=False)
    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps({"train": {}, "eval": {}, "model": {}, "data": {}}))
    check_output_folder(tmp_path, training=False)
    report.write_text(json.dumps({"accuracy": 1.0}))
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        check_output_folder(tmp_path, training=False)


def test_files_of_a_run_are_known(finished):
    known = (*RUN_FILES, "run_settings.json", "checkpoint-*")
    unknown = [file.name for file in finished.iterdir() if not any(fnmatch.fnmatch(file.name, name) for name in known)]
    assert not unknown


def test_arguments_that_may_change_exist():
    known = {field.name for field in fields(RunArguments)}
    assert {*WATCHING_FIELDS, *COMPUTING_FIELDS, *EVALUATION_SCHEDULE_FIELDS} <= known
    of_distillation = {"attention_steps", "attention_learning_rate"}
    assert {*LENGTH_FIELDS, *RATE_FIELDS} - of_distillation <= known
