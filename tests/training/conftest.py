"""Finished pretraining runs, and a copy of one from before its end."""

import shutil

import pytest

from training_support import finish, recipe_for, sources, start_command, write_recipe


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """The output folder of a run that nothing interrupted; it passes through two epochs, with dropout."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    log = output_dir.with_suffix(".log")
    assert finish(start_command([recipe_for(text, output_dir)], log)) == [0], log.read_text()
    return output_dir


@pytest.fixture
def after_8_of_12_steps(finished, tmp_path):
    """A copy of that folder from before the end of the run."""
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    shutil.copy(finished / "run_settings.json", output_dir)
    shutil.copytree(finished / "checkpoint-8", output_dir / "checkpoint-8")
    return output_dir


@pytest.fixture(scope="session")
def pretrained(text, tmp_path_factory):
    """The output folder of a run that trained its tokenizer, too, and what it printed."""
    output_dir = tmp_path_factory.mktemp("pretrained") / "run"
    recipe = write_recipe(
        output_dir.with_suffix(".json"),
        output_dir=str(output_dir),
        masked_sentence='"The fox" sees the [MASK].',
        **sources(text, tokenizer_name=None, train_tokenizer=True, vocab_size=120),
    )
    log = output_dir.with_suffix(".log")
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    return output_dir, log.read_text()
