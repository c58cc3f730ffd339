"""The plateau benchmark: its numbers are what they are called, and watching changes nothing."""

import json
import signal

import pytest
import torch

from benchmarks import plateau, quality
from benchmarks.plateau import Probe, group_of, shares
from benchmarks.runs import RunFolder
from modeling_lambdabert import LambdaBertForMaskedLM
from training_support import benchmark_options


def test_shares_of_what_is_known():
    common = torch.full((3, 5, 2), 2.0)
    assert shares(common) == pytest.approx({"common": 1, "text": 0, "token": 0})
    of_text = torch.tensor([-1.0, 0, 1])[:, None, None].expand(3, 5, 2)
    assert shares(of_text) == pytest.approx({"common": 0, "text": 1, "token": 0}, abs=1e-6)
    of_token = torch.tensor([-2.0, -1, 0, 1, 2])[None, :, None].expand(3, 5, 2)
    assert shares(of_token) == pytest.approx({"common": 0, "text": 0, "token": 1}, abs=1e-6)
    # mean squares 4, 2 / 3 and 2
    assert shares(common + of_text + of_token) == pytest.approx({"common": 0.6, "text": 0.1, "token": 0.3}, abs=1e-6)


def test_groups_hold_every_parameter(make_config):
    groups = {group_of(name) for name, _ in LambdaBertForMaskedLM(make_config()).named_parameters()}
    halves = {f"layer {layer} {half}" for layer in (0, 1) for half in ("mixing", "feed-forward")}
    assert groups == {"embeddings", "head", *halves}


@pytest.mark.parametrize("gain", [None, 0.0, 2.0])
def test_probe(make_config, gain):
    """Outputs scaled by hand show in the ratios, and the content lambda's part in what the gain makes of it."""
    torch.manual_seed(0)
    config = make_config(content_gain=gain is not None)
    model = LambdaBertForMaskedLM(config)
    ids = torch.randint(5, config.vocab_size, (4, 9))
    expected = model(ids, labels=ids).loss.item()
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        if gain is not None:
            layer.attention.self.content_gain.fill_(gain)
        layer.output.dense.weight.zero_()
        layer.output.dense.bias.fill_(0.5)  # the residual has a mean square of 1
    report = Probe(model, {"input_ids": ids, "labels": ids})()
    assert model.training and not layer.output._forward_hooks
    assert len(report["hidden"]) == 3 and len(report["branches"]) == len(report["lambdas"]) == 2
    assert all(sum(parts.values()) == pytest.approx(1, abs=1e-5) for parts in report["hidden"])
    feed_forward = report["branches"][1]["feed-forward"]
    assert feed_forward == pytest.approx({"over residual": 0.5, "common": 1}, rel=1e-4)
    lambdas = report["lambdas"][1]
    assert lambdas["gain"] == (1 if gain is None else gain)
    assert (lambdas["content over position"] > 0) == (gain != 0)
    assert ("content common to texts" in lambdas) == (gain != 0)
    content = model.eval()(ids, output_lambda_params=True).lambda_params[1]
    if gain != 0:
        for name, axis in (("texts", 0), ("channels", 1)):
            expected_share = (content.mean(axis).square().mean() / content.square().mean()).item()
            assert lambdas[f"content common to {name}"] == pytest.approx(expected_share, rel=1e-4)
    if gain is None:
        layer.attention.self.content_gain = torch.nn.Parameter(torch.full((config.key_depth,), 2.0))
        doubled = Probe(model, {"input_ids": ids, "labels": ids})()["lambdas"][1]
        assert doubled["content over position"] == pytest.approx(2 * lambdas["content over position"], rel=1e-4)
    assert report["loss"] != expected


def test_watching_changes_nothing_that_is_learned(text, tmp_path, monkeypatch):
    models = {
        name: {"architecture": name.lower(), "learning_rates": [1e-3], "max_steps": 12}
        for name in ("BERT", "LambdaBERT")
    }
    recipe = {"pretraining": benchmark_options(text, tmp_path, eval_steps=4), "seeds": [1], "models": models}
    recipe["pretraining"] |= {"objective": "mlm", "per_device_eval_batch_size": 1000}
    recipe["pretraining"]["config_overrides"]["hidden_dropout_prob"] = 0.0
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    output = tmp_path / "output"
    command = [str(tmp_path / "recipe.json"), "--output", str(output), "--steps", "8", "--every", "4"]
    monkeypatch.setattr(quality, "require_passing_tests", lambda *tests: None)
    plateau.main(command)
    watched = json.loads((output / "results.json").read_text())["models"]
    for name in models:
        records = watched[name]["records"]
        assert [record["step"] for record in records] == [0, 4, 8]
        curve = quality.train(RunFolder(output, recipe), name, 1e-3, 1, output / "work" / name)["curve"]
        # the batch is the whole validation text, so that its loss is the evaluation's
        losses = [point["eval_mlm_loss"] for point in curve[:2]]
        assert [record["loss"] for record in records[1:]] == pytest.approx(losses, rel=1e-5)
        for record in records[1:]:
            assert set(record["gradients"]) == set(record["updates"]) and len(record["updates"]) == 6
            assert all(0 < value < 1 for value in record["updates"].values())

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(SystemExit, match="BERT is not recorded"):
            patched.setattr(plateau.Watch, "on_pre_optimizer_step", interrupt)
            plateau.watch(recipe, "BERT", 8, 4, tmp_path / "stopped")

    monkeypatch.setattr(plateau, "watch", lambda *args: pytest.fail("a finished model was watched again"))
    plateau.main(command)
    for steps, every, message in (
        ("12", "4", r"'BERT' at 3 steps up to 8; steps=12, every=4 ask for 4 up to 12"),
        ("8", "2", "ask for 5 up to 8"),
        ("8", "0", "every=0"),
        ("-1", "4", "steps=-1"),
    ):
        with pytest.raises(SystemExit, match=message):
            plateau.main([*command[:-4], "--steps", steps, "--every", every])
