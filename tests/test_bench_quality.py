"""The quality benchmark: its recipes are complete, and its variants are what they are called."""

import itertools
import json
import re
import statistics

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, set_seed

from benchmarks import quality
from benchmarks.environment import ROOT
from benchmarks.lambda_variants import BERT_VARIANTS, VARIANTS, apply_variant, running_variant
from benchmarks.peers import PEERS, bert, used_fields
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.objectives import OBJECTIVES
from lambdabert.training import models
from lambdabert.training.trainer import PretrainingTrainer
from modeling_lambdabert import LambdaBertForMaskedLM
from run_language_modeling import parse_arguments, start_at_frequencies
from training_support import benchmark_options

RECIPES = sorted((ROOT / "benchmarks" / "recipes" / "quality").glob("*.json"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_what_a_recipe_does_not_say_is_what_it_was(file, tmp_path):
    """The command's defaults may change, the runs of a recipe may not."""
    recipe = quality.read_recipe(file, quality.FIELDS, quality.MODEL_FIELDS)
    for name, model in recipe["models"].items():
        options = quality.command_options(recipe, name, 1e-3, 1, tmp_path)
        said = recipe["pretraining"] | model.get("options", {})
        fields = recipe["pretraining"].get("config_overrides", {}) | model.get("config", {})
        objective = OBJECTIVES[said["objective"]]
        config = models.make_config(
            None, "config_name", options["config_overrides"], objective=objective, tokens=60, padding=0, mask=4
        )
        for field in models.NEW_MODEL_OF_PAIRS:
            assert getattr(config, field) == fields.get(field, getattr(LambdaBertConfig(), field)), (name, field)
        assert options["mlm_probability"] == said.get("mlm_probability", 0.15)


@pytest.fixture
def variant_model(make_config):
    """Builds a model with the variant applied; always with the same weights before."""

    def build(name, **fields):
        set_seed(0)
        model = LambdaBertForMaskedLM(make_config(**fields)).eval()
        start_at_frequencies(model, np.arange(model.config.vocab_size))
        apply_variant(model, name)
        return model

    return build


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_complete(file, tmp_path):
    recipe = quality.read_recipe(file, quality.FIELDS, quality.MODEL_FIELDS)
    options = tmp_path / "options.json"
    for name, model in recipe["models"].items():
        overrides = recipe["pretraining"].get("config_overrides", {}) | model.get("config", {})
        values = recipe["pretraining"] | {"config_overrides": overrides, "output_dir": str(tmp_path), "bf16": False}
        options.write_text(json.dumps(values))
        _, data_args, _ = parse_arguments([str(options)])
        config = LambdaBertConfig(**overrides)
        assert data_args.max_seq_length <= config.max_position_embeddings
        assert model["architecture"] in quality.ARCHITECTURES, name
        assert model.get("variant") in {None, *VARIANTS}, name
        assert model["learning_rates"] and model["max_steps"] > 0


def test_unknown_variant_is_refused(variant_model):
    with pytest.raises(ValueError, match="variant='sideways' is unknown"):
        variant_model("sideways")


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_change_the_model_and_what_they_keep_is_trained(name, variant_model):
    ids = torch.arange(5, 25)[None]
    plain, changed = logits(variant_model(None), ids), variant_model(name)
    with running_variant(name):
        assert not torch.allclose(plain, logits(changed, ids))
        changed(ids, labels=ids).loss.backward()
    unused = {key for key, p in changed.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert all(key.endswith("to_keys.weight") for key in unused) and bool(unused) == (name == "position only")


def test_content_only_does_not_see_places(variant_model):
    """Without position lambdas and absolute positions, permuting the tokens permutes the outputs."""
    model = variant_model("content only", position_embedding_type="none")
    ids, order = torch.arange(5, 25)[None], torch.randperm(20)
    torch.testing.assert_close(logits(model, ids[:, order]), logits(model, ids)[:, order])
    assert not torch.allclose(logits(variant_model("content only"), ids[:, order]), logits(model, ids)[:, order])


def test_position_only_sees_its_scope_alone(variant_model):
    """Two layers of scope 5 reach four places; a content lambda reaches everything."""
    model, ids = variant_model("position only"), torch.arange(5, 25)[None]
    other = ids.clone()
    other[0, -1] = 40
    with running_variant("position only"):
        torch.testing.assert_close(logits(model, ids)[:, :-5], logits(model, other)[:, :-5])
        assert not torch.allclose(logits(model, ids)[:, -5], logits(model, other)[:, -5], rtol=0, atol=0)
        assert all(not params.any() for params in model(ids, output_lambda_params=True).lambda_params)
    assert not torch.allclose(logits(model, ids)[:, :-5], logits(model, other)[:, :-5], rtol=0, atol=0)


def test_flat_embeddings_have_one_scale(variant_model):
    table = variant_model("flat E", local_context_size=39, key_depth=64).bert.encoder.layer[0].attention.self
    scales = table.relative_embeddings.std((1, 2))
    assert scales.max() / scales.min() < 1.6
    assert table.relative_embeddings.square().sum().item() == pytest.approx(1, rel=0.1)


def test_tiny_benchmark_runs_once_and_gives_every_model_the_same_data(text, tmp_path, monkeypatch, capsys):
    recipe = {
        "pretraining": benchmark_options(text, tmp_path),
        "test_file": str(text / "valid.txt"),
        "seeds": [1, 2],
        "models": {
            "BERT": {"architecture": "bert", "learning_rates": [1e-3, 3e-3], "max_steps": 12},
            "LambdaBERT": {"architecture": "lambdabert", "learning_rates": [1e-3], "max_steps": 12},
        },
    }
    file, output = tmp_path / "recipe.json", tmp_path / "output"
    file.write_text(json.dumps(recipe))
    monkeypatch.setattr(quality, "require_passing_tests", lambda *tests: None)
    quality.main([str(file), "--output", str(output)])
    results = json.loads((output / "results.json").read_text())
    assert len(list((output / "runs").iterdir())) == 5
    assert {name: len(times) for name, times in results["seconds of each timed step"].items()} == dict.fromkeys(
        recipe["models"], 13
    )
    for name, times in results["seconds of each timed step"].items():
        assert results["seconds a step"][name] == statistics.median(times)
    bert, lambdabert = results["runs"]["BERT"], results["runs"]["LambdaBERT"]
    rates = results["valid MLM loss by learning rate, first seed"]["BERT"]
    assert str(bert[0]["learning_rate"]) == f"{float(min(rates, key=rates.get)):g}"
    for one, other in zip(bert, lambdabert, strict=True):
        for field in ("step", "num_input_tokens_seen", "eval_masked_tokens"):
            assert [point[field] for point in one["curve"]] == [point[field] for point in other["curve"]]
    # the same text under the same masks: the last validation and the test are one evaluation
    assert bert[0]["test"]["test_mlm_loss"] == bert[0]["curve"][-1]["eval_mlm_loss"]
    assert all((output / name).stat().st_size > 10_000 for name in ("curves.png", "final.png"))

    table = (output / "table.md").read_text()
    monkeypatch.setattr(quality, "prepare", lambda *args: pytest.fail("a finished run was run or timed again"))
    quality.main([str(file), "--models", "LambdaBERT", "--output", str(output)])
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "table.md").read_text() == table and table in capsys.readouterr().out
    assert len(list(output.glob("tokenizer_*"))) == 1


@pytest.mark.parametrize(
    "change,message",
    [
        ({"architecture": "gpt"}, "model 'one': architecture='gpt'; use one of"),
        ({"variant": "sideways"}, "variant='sideways' is unknown"),
        ({"architecture": "fnet", "variant": "flat E"}, "variant='flat E' changes lambda layers, which fnet lacks"),
        (
            {"architecture": "fnet", "config": {"hidden_size": 32, "key_depth": 4}},
            "config: key_depth=4 would change nothing of fnet; leave it out",
        ),
        ({"architecture": "fnet", "options": {"objective": "nsp"}}, "fnet has no head for pairs of sentences"),
        ({"architecture": "bert", "options": {"model_name_or_path": "x"}}, "bert cannot go on from model_name_or_path"),
        ({"learning_rates": []}, "model 'one' has no learning_rates"),
        ({"options": {"max_seq_lenght": 5}}, "unknown options: max_seq_lenght"),
    ],
)
def test_faulty_models_are_refused_before_anything_runs(change, message, tmp_path, monkeypatch):
    model = {"architecture": "lambdabert", "learning_rates": [1e-3], "max_steps": 1} | change
    recipe = {"pretraining": {"objective": "mlm", "use_cpu": True}, "seeds": [1], "models": {"one": model}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(quality, "prepare", lambda *args: pytest.fail("something was prepared"))
    with pytest.raises(SystemExit, match=f"error: .*{message}") as caught:
        quality.main([str(tmp_path / "recipe.json"), "--output", str(tmp_path / "output")])
    assert "\n" not in str(caught.value) and not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", sorted(BERT_VARIANTS))
def test_variants_of_bert_change_it(name, variant_model):
    model = bert(variant_model(None).config, "mlm")
    start_at_frequencies(model, np.arange(model.config.vocab_size))
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    apply_variant(model, name)
    assert any(not torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_have_the_same_shape_and_start(name, make_config):
    config = make_config(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    model, counts = PEERS[name](config, "mlm"), np.arange(config.vocab_size)
    start_at_frequencies(model, counts)
    feed_forward = re.compile(r"\.(intermediate\.dense|mlp\.Wi|mlp\.Wo|\d+\.output\.dense)\.weight$")
    sizes = [weight.numel() for key, weight in model.named_parameters() if feed_forward.search(key)]
    assert len(sizes) == 4 and sum(sizes) == 2 * 2 * 64 * 96
    assert model.get_input_embeddings().weight.shape == (config.vocab_size, 64)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    frequencies = (counts + 1) / (counts + 1).sum()
    np.testing.assert_allclose(model.get_output_embeddings().bias.exp().detach(), frequencies, rtol=1e-5)
    ids, mask = torch.arange(5, 25)[None], torch.ones(1, 20, dtype=torch.long)
    assert model(input_ids=ids, attention_mask=mask, labels=ids).loss.isfinite()


@pytest.mark.parametrize("name", sorted(PEERS))
def test_only_used_fields_change_a_peer(name):
    """Of the sizes and rates in a config; what else a BERT shares with LambdaBERT, it takes as it is."""
    plain = LambdaBertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=1, intermediate_size=96)
    peer = PEERS[name](plain, "mlm").config.to_dict()
    numbers = [field for field, value in plain.to_dict().items() if type(value) in (int, float)]
    assert {"initializer_range", "key_depth", "hidden_dropout_prob"} <= set(numbers)
    for field in numbers:
        value = getattr(plain, field)
        config = LambdaBertConfig(**plain.to_dict() | {field: 2 * value or 1})
        changed = PEERS[name](config, "mlm").config.to_dict()
        assert (changed != peer) == (field in used_fields(name)), field


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_start_in_the_range_of_the_config(name, make_config):
    narrow, wide = (
        PEERS[name](make_config(hidden_size=64, initializer_range=width), "mlm").get_input_embeddings().weight
        for width in (0.02, 0.2)
    )
    assert 8 < wide.std() / narrow.std() < 12


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_is_the_library_class_without_needless_logits(name, make_config):
    """The loss and gradients of the class of `transformers`, in training and evaluation."""
    peer = PEERS[name](make_config(hidden_size=64, num_hidden_layers=1), "mlm")
    stock = AutoModelForMaskedLM.from_config(peer.config)
    stock.load_state_dict(peer.state_dict())
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(27).view(3, 9) % 4 == 0, ids, -100)
    inputs = {"input_ids": ids, "labels": labels}
    if name != "fnet":
        inputs["attention_mask"] = torch.ones_like(ids)
    for training in (True, False):
        outputs = [model.train(training)(**inputs) for model in (peer, stock)]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
        assert outputs[0].logits.shape[:-1] == ((7,) if training else (3, 9))
        gradients = [
            torch.autograd.grad(output.loss, model.get_input_embeddings().weight)[0]
            for output, model in zip(outputs, (peer, stock), strict=True)
        ]
        torch.testing.assert_close(*gradients)
    half = peer.train()(**inputs, num_items_in_batch=14).loss
    torch.testing.assert_close(2 * half, stock.train()(**inputs).loss)


def test_rows_under_other_masks_are_warned_of(capsys):
    def best(*counts):
        return {str(i): [{"curve": [{"eval_masked_tokens": count}]}] for i, count in enumerate(counts)}

    quality.warn_of_other_masks(best(7, 7))
    assert not capsys.readouterr().err
    quality.warn_of_other_masks(best(7, 8, 7))
    assert "different masks, of 7, 8 tokens" in capsys.readouterr().err


def test_an_interrupted_run_ends_as_an_uninterrupted_one(text, tmp_path, monkeypatch):
    recipe = {
        "pretraining": benchmark_options(text, tmp_path) | {"eval_steps": 4},
        "seeds": [1],
        "models": {"LambdaBERT": {"architecture": "lambdabert", "learning_rates": [1e-3], "max_steps": 12}},
    }
    monkeypatch.setattr(quality, "require_passing_tests", lambda *tests: None)
    processes = itertools.count()
    monkeypatch.setattr(quality, "environment", lambda *packages: {"process": next(processes)})
    whole = quality.RunFolder(tmp_path / "whole", recipe)
    expected = quality.train(whole, "LambdaBERT", 1e-3, 1, tmp_path / "work whole")

    class Interrupted(Exception):
        pass

    def interrupt(trainer, *args, **kwargs):
        if trainer.state.global_step == 6:
            raise Interrupted
        return step(trainer, *args, **kwargs)

    step, work = PretrainingTrainer.training_step, tmp_path / "work"
    folder = quality.RunFolder(tmp_path / "interrupted", recipe)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(PretrainingTrainer, "training_step", interrupt)
        quality.train(folder, "LambdaBERT", 1e-3, 1, work)
    assert [checkpoint.name for checkpoint in work.glob("checkpoints/*")] == ["checkpoint-4"]
    run = quality.train(folder, "LambdaBERT", 1e-3, 1, work)
    assert [point["eval_mlm_loss"] for point in run["curve"]] == [point["eval_mlm_loss"] for point in expected["curve"]]
    assert len(run["curve"]) == 3 and not work.exists()
    assert (expected["environments"], run["environments"]) == ([{"process": 0}], [{"process": 1}, {"process": 2}])


def test_a_seed_decides_weights_order_and_training_masks(text, tmp_path, monkeypatch):
    recipe = {
        "pretraining": benchmark_options(text, tmp_path),
        "seeds": [1],
        "models": {"LambdaBERT": {"architecture": "lambdabert", "learning_rates": [1e-3], "max_steps": 2}},
    }
    trainers, kept = [], []

    class Prepared(Exception):
        pass

    def prepared(trainer, *args):
        if not trainer.args.output_dir.endswith("checkpoints"):  # the rehearsal's
            return train(trainer, *args)
        trainers.append(trainer)
        raise Prepared

    train = PretrainingTrainer.train
    monkeypatch.setattr(quality, "require_passing_tests", lambda *tests: None)
    monkeypatch.setattr(quality, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(PretrainingTrainer, "train", prepared)
    folder = quality.RunFolder(tmp_path / "output", recipe)
    for run, seed in enumerate((1, 1, 2)):
        with pytest.raises(Prepared):
            quality.train(folder, "LambdaBERT", 1e-3, seed, tmp_path / f"work {run}")
    assert len(kept) == 3, "a run keeps freed memory, as the command's do"
    rows = list(trainers[0].train_dataset)[:8]
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in trainers]
    found = {
        "weights": [trainer.model.bert.encoder.layer[0].attention.self.to_values.weight for trainer in trainers],
        "masks": [trainer.data_collator(rows)["labels"] for trainer in trainers],
        "order": [torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]) for batch in batches],
        "evaluation": [next(iter(trainer.get_eval_dataloader()))["labels"] for trainer in trainers],
    }
    for what, (first, again, other) in found.items():
        assert torch.equal(first, again), what
        assert torch.equal(first, other) == (what == "evaluation"), what


def test_a_recipe_goes_on_from_a_model(text, tmp_path, monkeypatch):
    options = benchmark_options(text, tmp_path)
    monkeypatch.setattr(quality, "require_passing_tests", lambda *tests: None)
    recipe = {
        "pretraining": options,
        "seeds": [1],
        "models": {"LambdaBERT": {"architecture": "lambdabert", "learning_rates": [1e-3], "max_steps": 2}},
    }
    start = quality.prepare(quality.RunFolder(tmp_path / "first", recipe), "LambdaBERT", 1e-3, 1, tmp_path / "work")
    folder = tmp_path / "model"
    start.model.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    on = {
        key: value for key, value in options.items() if key not in ("config_overrides", "train_tokenizer", "vocab_size")
    }
    recipe["pretraining"] = on | {"model_name_or_path": str(folder)}
    again = quality.prepare(quality.RunFolder(tmp_path / "second", recipe), "LambdaBERT", 1e-3, 2, tmp_path / "work 2")
    for key, weight in again.model.state_dict().items():
        torch.testing.assert_close(weight, start.model.state_dict()[key], rtol=0, atol=0)
