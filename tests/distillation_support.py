"""What the tests of distillation share: a small recipe, runs of it, and another layout of a sentence model."""

import json
from pathlib import Path

import distill_from_bert
from training_support import SCHEDULE, finish, start_command

RECIPE = {
    "do_train": True,
    "do_eval": True,
    "config_overrides": {"key_depth": 8, "intra_depth": 2, "local_context_size": 5},
    "max_seq_length": 32,
    "gradient_accumulation_steps": 2,
    **SCHEDULE,
}


def write_recipe(file, text, teacher, **values):
    """Writes the small recipe with `values` in it; a value of None leaves an option out."""
    recipe = {
        **RECIPE,
        "teacher": None if teacher is None else str(teacher),
        "output_dir": str(file.with_suffix("")),
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "data_cache_dir": str(text / "cache"),
        **values,
    }
    file.write_text(json.dumps({name: value for name, value in recipe.items() if value is not None}))
    return str(file)


def distil(recipe, log):
    """Starts the command; returns its process's id."""
    return start_command([recipe], log, command=distill_from_bert.main)


def distilled(tmp_path, text, teacher, **values):
    """The output folder of a run, and what it printed."""
    log = tmp_path / "log"
    assert finish(distil(write_recipe(tmp_path / "run.json", text, teacher, **values), log)) == [0], log.read_text()
    return tmp_path / "run", log.read_text()


def move_encoder_to_subfolder(folder):
    """Moves the encoder of a saved sentence-transformers model to a subfolder, which is returned."""
    encoder = folder / "0_Transformer"
    encoder.mkdir()
    for file in filter(Path.is_file, list(folder.iterdir())):
        if file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            file.rename(encoder / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = encoder.name
    (folder / "modules.json").write_text(json.dumps(modules))
    return encoder
