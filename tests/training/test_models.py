"""Models to be pretrained: what a new one is like, and loading one to be trained further."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.objectives import MLM, NSP, SOP
from lambdabert.training.models import make_config, make_model, non_finite_weights, peak_learning_rate
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingSOP
from training_support import RECIPE

NEW = {"local_context_size": 25, "position_embedding_type": "none", "content_gain": True, "repetition_context_size": 5}


def lambda_fields(config):
    return {name: getattr(config, name) for name in NEW}


class TestNewModel:
    def test_starts_as_measured_unless_told_otherwise(self):
        config = make_config(None, "config_name", "hidden_size=192", objective=MLM, tokens=60, padding=0, mask=4)
        assert lambda_fields(config) == NEW and (config.hidden_size, config.mask_token_id) == (192, 4)
        assert config.longest_sequence is None
        told = {
            "local_context_size": None,
            "position_embedding_type": "absolute",
            "content_gain": False,
            "repetition_context_size": None,
        }
        config = make_config(None, "config_name", told, objective=MLM, tokens=60, padding=0, mask=4)
        assert lambda_fields(config) == told

    @pytest.mark.parametrize("objective, pooling", [(MLM, "cls"), (NSP, "sep"), (SOP, "sep")])
    def test_pairs_are_judged_where_they_meet(self, objective, pooling):
        config = make_config(None, "config_name", None, objective=objective, tokens=60, padding=0, mask=4)
        assert lambda_fields(config) == NEW and config.classifier_pooling == pooling
        told = {"classifier_pooling": "cls"}
        config = make_config(None, "config_name", told, objective=objective, tokens=60, padding=0, mask=4)
        assert config.classifier_pooling == "cls"

    @pytest.mark.parametrize("objective", [MLM, SOP])
    def test_a_saved_config_keeps_its_meaning(self, tmp_path, objective):
        LambdaBertConfig().save_pretrained(tmp_path)
        config = make_config(str(tmp_path), "config_name", None, objective=objective, tokens=60, padding=0, mask=4)
        assert lambda_fields(config) == lambda_fields(LambdaBertConfig()) and config.classifier_pooling == "cls"

    def test_rate_falls_with_depth_width_and_small_steps(self):
        assert peak_learning_rate(4, 192, 4096) == 4e-3 == peak_learning_rate(4, 192, 65536)
        assert peak_learning_rate(16, 192, 4096) == pytest.approx(2e-3)
        assert peak_learning_rate(4, 768, 4096) == pytest.approx(1e-3)
        assert peak_learning_rate(4, 192, 1024) == pytest.approx(2e-3)
        assert peak_learning_rate(12, 768, 4096) == 5.77e-4


def test_running_statistics_that_are_not_finite_are_named():
    model = LambdaBertForMaskedLM(LambdaBertConfig(vocab_size=60, lambda_norm="batch", **RECIPE["config_overrides"]))
    model.bert.encoder.layer[1].attention.self.value_norm.running_var[0] = math.nan
    assert non_finite_weights(model) == ["bert.encoder.layer.1.attention.self.value_norm.running_var"]


class TestStoredModel:
    """What a run starts from."""

    @pytest.fixture
    def stored(self, tmp_path):
        """A small model and its folder."""
        torch.manual_seed(0)
        model = LambdaBertForMaskedLM(LambdaBertConfig(vocab_size=60, **RECIPE["config_overrides"]))
        model.save_pretrained(tmp_path)
        return model, tmp_path

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_computes_in_float32_whatever_it_is_stored_in(self, stored, caplog, dtype):
        model, folder = stored
        model.to(dtype).save_pretrained(folder)
        with caplog.at_level("INFO"):
            loaded = make_model(
                LambdaBertForMaskedLM, LambdaBertConfig.from_pretrained(folder), str(folder), overridden=False
            )
        assert f"stored in {str(dtype).removeprefix('torch.')} and computed in float32" in caplog.text
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight.float()), name
        loaded.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"

    def test_new_and_left_out_heads_are_named(self, stored, caplog):
        model, folder = stored
        with caplog.at_level("INFO"):
            grown = make_model(LambdaBertForPreTrainingSOP, model.config, str(folder), overridden=False)
        assert "New weights" in caplog.text and "bert.pooler.dense.weight" in caplog.text
        grown.save_pretrained(folder)
        with caplog.at_level("INFO"):
            make_model(LambdaBertForMaskedLM, model.config, str(folder), overridden=False)
        assert "Left out weights" in caplog.text and "cls.seq_relationship.weight" in caplog.text

    def test_a_trained_model_takes_on_a_repetition_lambda(self, stored, caplog):
        model, folder = stored
        fields = {"repetition_context_size": 3, "mask_token_id": 4}
        config = type(model.config).from_dict(model.config.to_dict() | fields)
        with caplog.at_level("INFO"):
            grown = make_model(LambdaBertForMaskedLM, config, str(folder), overridden=True)
        assert "start at 0: bert.encoder.layer.0.attention.self.repetition_embeddings" in caplog.text
        assert not grown.bert.encoder.layer[0].attention.self.repetition_embeddings.any()

    @pytest.mark.parametrize("overridden", [False, True])
    def test_a_repetition_lambda_that_was_lost_is_a_damage(self, stored, overridden):
        model, folder = stored
        fields = {"repetition_context_size": 3, "mask_token_id": 4}
        config = type(model.config).from_dict(model.config.to_dict() | fields)
        config.save_pretrained(folder)
        with pytest.raises(ValueError, match="lacks bert.encoder.layer.0.attention.self.repetition_embeddings"):
            make_model(LambdaBertForMaskedLM, config, str(folder), overridden=overridden)

    @pytest.mark.parametrize(
        "change, named",
        [
            (lambda weights: weights.pop("bert.encoder.layer.1.attention.self.to_keys.weight"), "lacks bert.encoder"),
            (lambda weights: weights.update({"bert.encoder.layer.2.more": torch.ones(2)}), "no place for bert.encoder"),
            (lambda weights: weights.update({"cls.predictions.bias": torch.ones(7)}), "another shape"),
            (lambda weights: weights["cls.predictions.bias"].fill_(math.inf), r"not finite \(cls.predictions.bias"),
        ],
        ids=["missing", "unknown", "shape", "not finite"],
    )
    def test_damaged_weights_are_refused(self, stored, change, named):
        model, folder = stored
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=named) as error:
            make_model(LambdaBertForMaskedLM, model.config, str(folder), overridden=False)
        assert "config_overrides" not in str(error.value), "none were given"
