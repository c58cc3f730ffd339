"""The fine-tuning benchmark runs the examples once each, and its peers are pretrained as LambdaBERT is."""

import json
import re

import pytest
import torch
from transformers import BertForMaskedLM, ModernBertForMaskedLM

from benchmarks import finetuning, pretrain_peer
from benchmarks.environment import ROOT
from benchmarks.runs import read_recipe
from examples.text_classification import TextOptions
from examples.token_classification import TagOptions
from fine_tuning_support import labelled, save_tiny_model, tagged, write_conll, write_csv
from training_support import write_recipe

CHECKPOINT = str(ROOT / "checkpoints" / "wikipedia-small")
RECIPES = sorted((ROOT / "benchmarks" / "recipes" / "finetuning").glob("*.json"))
OPTIONS = {"text_classification": TextOptions, "token_classification": TagOptions}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_complete(file):
    recipe = read_recipe(file, finetuning.FIELDS, finetuning.MODEL_FIELDS)
    finetuning.check_recipe(recipe, file)
    for task in recipe["tasks"].values():
        assert "max_seq_length" in task["options"] and task["options"].keys() & {"num_train_epochs", "max_steps"}
        own = {name for name in task["options"] if name.endswith(("_file", "_column"))}
        assert own <= set(OPTIONS[task["example"]].__dataclass_fields__)
    assert all("learning_rate" in entry["options"] for entry in recipe["models"].values())


@pytest.mark.parametrize("name", [file.stem for file in RECIPES])
def test_recorded_table_is_quoted(name):
    rows = (ROOT / "benchmarks" / "results" / "finetuning" / name / "table.md").read_text().splitlines()[2:]
    assert rows and all(row in (ROOT / "docs" / "finetuning.md").read_text() for row in rows)


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    return save_tiny_model(text / "tokenizer", tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model, tmp_path):
    """A recipe of two tiny tasks and a tiny model, as it is and with new weights."""
    texts = write_csv(tmp_path / "texts.csv", ["text", "label"], labelled(16, 0))
    words = write_conll(tmp_path / "words.conll", tagged(16, 0))
    shared = {"max_seq_length": 32, "max_steps": 2, "use_cpu": True}

    def task(example, metric, file):
        return {"example": example, "metric": metric, "options": {"train_file": file, "test_file": file, **shared}}

    return {
        "tasks": {
            "texts": task("text_classification", "test_accuracy", texts),
            "words": task("token_classification", "test_f1", words),
        },
        "seeds": [1, 2],
        "models": {
            "trained": {"model": model, "options": {"learning_rate": 1e-3}},
            "new": {"model": model, "random": True, "options": {"learning_rate": 1e-3}},
        },
    }


def test_tiny_benchmark_runs_once_and_gives_its_table_again(recipe, tmp_path, monkeypatch, capsys):
    file, output = tmp_path / "recipe.json", tmp_path / "output"
    file.write_text(json.dumps(recipe))
    monkeypatch.setattr(finetuning, "require_passing_tests", lambda *tests: None)
    finetuning.main([str(file), "--output", str(output), "--models", "trained"])
    finetuning.main([str(file), "--output", str(output)])
    results = json.loads((output / "results.json").read_text())
    assert len(list((output / "runs").iterdir())) == 8
    runs = results["runs"]["new"]["texts"]
    assert [run["seed"] for run in runs] == [1, 2] and 0 <= runs[0]["metrics"]["test_accuracy"] <= 1
    assert re.search(r"^\| new \| 2 \| \d\.\d{3} ± \d\.\d{3} \| ", (output / "table.md").read_text(), flags=re.M)
    before = (output / "results.json").read_bytes()
    monkeypatch.setattr(finetuning, "fine_tune", lambda *args: pytest.fail("a finished run was run again"))
    finetuning.main([str(file), "--output", str(output)])
    assert (output / "results.json").read_bytes() == before
    assert capsys.readouterr().out.endswith((output / "table.md").read_text() + "\n")


def test_new_weights_are_of_the_seed_and_not_the_model_s(model, tmp_path):
    from modeling_lambdabert import LambdaBertForMaskedLM

    def weight(folder):
        return LambdaBertForMaskedLM.from_pretrained(folder).bert.encoder.layer[0].intermediate.dense.weight

    first, again, second = (
        weight(finetuning.new_weights(model, seed, tmp_path / str(place))) for place, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, weight(model))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tasks": {"texts": {"example": "chess", "metric": "a", "options": {}}}}, "task 'texts': example='chess'"),
        ({"tasks": {"texts": {"example": "chess"}}}, "task 'texts' lacks metric, options"),
        ({"models": {"a": {"model": "nowhere", "options": {}}}}, "model 'a': nowhere is not the folder of a model"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_run(change, message, recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | change))
    with pytest.raises(SystemExit) as caught:
        finetuning.main([str(tmp_path / "recipe.json"), "--output", str(tmp_path / "output")])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name, model_class", [("bert", BertForMaskedLM), ("modernbert", ModernBertForMaskedLM)])
def test_a_peer_is_pretrained_like_a_lambdabert(name, model_class, text, tmp_path):
    """The command takes the same recipe, resumes, and ends in the folder of a model that `transformers` loads."""
    overrides = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_lambda_queries=4)
    options = {
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "tokenizer_name": str(text / "tokenizer"),
        "output_dir": str(tmp_path / name),
        "data_cache_dir": str(tmp_path / "cache"),
        "objective": "mlm",
        "max_seq_length": 24,
        "max_steps": 4,
        "config_overrides": overrides,
    }
    for steps in (4, 6):
        recipe = write_recipe(tmp_path / "recipe.json", **options | {"max_steps": steps})
        assert pretrain_peer.main([name, recipe, "--use_cpu", "--disable_tqdm=True"]) == 0
    model, loading = model_class.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_attention_heads == 1 and model.config.hidden_size == 32
    assert json.loads((tmp_path / name / "metrics.json").read_text())["eval"]["eval_mlm_loss"] > 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("roberta", {}, "architecture='roberta'; the first argument is one of bert, convbert, fnet, modernbert"),
        ("bert", {"objective": "sop"}, "objective=sop trains on pairs"),
        ("bert", {"tokenizer_name": None, "model_name_or_path": CHECKPOINT}, "a new bert is trained"),
    ],
)
def test_a_peer_that_cannot_be_pretrained_is_refused(name, options, message, text, tmp_path, capsys):
    recipe = write_recipe(
        tmp_path / "recipe.json",
        train_file=[str(text / "train.txt")],
        output_dir=str(tmp_path / "model"),
        data_cache_dir=str(tmp_path / "cache"),
        max_steps=1,
        **{"objective": "mlm", "tokenizer_name": str(text / "tokenizer"), **options},
    )
    assert pretrain_peer.main([name, recipe, "--use_cpu"]) == 1
    assert message in capsys.readouterr().err
