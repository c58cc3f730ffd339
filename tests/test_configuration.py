"""LambdaBertConfig: defaults, refusals that name field and value, and round trips."""

import copy
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig

import modeling_lambdabert
from configuration_lambdabert import LambdaBertConfig

LAMBDA_DEFAULTS = {
    "num_lambda_queries": 8,
    "key_depth": 8,
    "intra_depth": 1,
    "local_context_size": None,
    "output_lambda_params": False,
    "content_gain": False,
    "repetition_context_size": None,
    "mask_token_id": None,
    "classifier_pooling": "cls",
}
CUSTOM = {
    "hidden_size": 48,
    "num_lambda_queries": 6,
    "key_depth": 5,
    "intra_depth": 3,
    "local_context_size": 7,
    "output_lambda_params": True,
    "lambda_norm": "rms",
    "content_gain": True,
    "repetition_context_size": 5,
    "mask_token_id": 103,
    "position_embedding_type": "none",
    "classifier_pooling": "sep",
    "max_position_embeddings": 77,
}


def test_defaults():
    config = LambdaBertConfig()
    assert isinstance(config, BertConfig)
    assert config.model_type == "lambdabert"
    assert {name: getattr(config, name) for name in LAMBDA_DEFAULTS} == LAMBDA_DEFAULTS
    assert config.lambda_norm in ("layer", "rms", "none"), "the default must not mix the examples of a batch"
    assert config.hidden_size == 768 and config.max_position_embeddings == 512
    assert "lambda_params" in config.keys_to_ignore_at_inference


@pytest.mark.parametrize("scope", [None, 1, 3, 25, 1023])
@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "none"])
def test_good_values(scope, norm):
    config = LambdaBertConfig(local_context_size=scope, lambda_norm=norm)
    assert (config.local_context_size, config.lambda_norm) == (scope, norm)


def test_attention_heads_need_not_divide_the_hidden_size():
    assert LambdaBertConfig(hidden_size=40, num_lambda_queries=8).hidden_size == 40


@pytest.mark.parametrize(
    "field, value",
    [
        ("local_context_size", 2),
        ("local_context_size", 24),
        ("local_context_size", 0),
        ("local_context_size", -1),
        ("local_context_size", -3),
        ("local_context_size", 5.0),
        ("local_context_size", "25"),
        ("num_lambda_queries", 7),
        ("num_lambda_queries", 1000),
        ("num_lambda_queries", 0),
        ("num_lambda_queries", -8),
        ("num_lambda_queries", 8.0),
        ("num_lambda_queries", None),
        ("key_depth", 0),
        ("key_depth", -4),
        ("key_depth", 8.0),
        ("key_depth", "8"),
        ("intra_depth", 0),
        ("intra_depth", -1),
        ("intra_depth", 1.5),
        ("lambda_norm", "instance"),
        ("lambda_norm", "Batch"),
        ("lambda_norm", ""),
        ("lambda_norm", None),
        ("content_gain", "yes"),
        ("content_gain", 0.0),
        ("content_gain", None),
        ("repetition_context_size", 2),
        ("repetition_context_size", 0),
        ("repetition_context_size", -3),
        ("repetition_context_size", 5.0),
        ("mask_token_id", -1),
        ("mask_token_id", 30522),
        ("mask_token_id", "[MASK]"),
        ("position_embedding_type", "relative_key"),
        ("position_embedding_type", ""),
        ("position_embedding_type", None),
        ("problem_type", "regresion"),
        ("id2label", {}),
        ("id2label", {1: "a", 2: "b"}),
        ("classifier_pooling", "mean"),
        ("classifier_pooling", None),
        ("output_lambda_params", "yes"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_size", 100),
        ("hidden_size", 0),
        ("hidden_size", 768.0),
        ("max_position_embeddings", 0),
        ("num_hidden_layers", 0),
        ("intermediate_size", 0),
        ("vocab_size", -3),
        ("type_vocab_size", 0),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", float("inf")),
        ("layer_norm_eps", -1e-12),
        ("initializer_range", float("nan")),
        ("initializer_range", float("inf")),
        ("initializer_range", -0.02),
        ("hidden_dropout_prob", 1.0),
        ("hidden_dropout_prob", -0.1),
        ("hidden_dropout_prob", float("nan")),
        ("attention_probs_dropout_prob", 1.5),
        ("classifier_dropout", 1),
        ("classifier_dropout", float("nan")),
        ("hidden_act", "gelou"),
        ("pad_token_id", -1),
        ("pad_token_id", 30522),
    ],
)
def test_bad_value_is_refused_by_name(field, value):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        LambdaBertConfig(**{field: value})
    message = str(error.value)
    assert field in message
    assert str(value) in message


def test_values_at_the_ends_of_their_ranges():
    fields = {"hidden_dropout_prob": 0, "classifier_dropout": None, "initializer_range": 0.0, "pad_token_id": None}
    config = LambdaBertConfig(**fields, hidden_act="relu", num_hidden_layers=1, vocab_size=1, type_vocab_size=1)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("field, value", [("layer_norm_eps", float("nan")), ("num_hidden_layers", 0)])
def test_a_value_set_afterwards_is_refused_by_the_model(field, value):
    config = LambdaBertConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    setattr(config, field, value)
    with pytest.raises((ValueError, StrictDataclassError), match=field):
        modeling_lambdabert.LambdaBertModel(config)


def test_hidden_size_that_is_no_multiple_names_both_fields():
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        LambdaBertConfig(hidden_size=100, num_lambda_queries=8)
    for part in ("hidden_size", "100", "num_lambda_queries", "8"):
        assert part in str(error.value)


def test_unknown_norm_lists_the_known_ones():
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        LambdaBertConfig(lambda_norm="instance")
    for known in ("batch", "layer", "rms", "none"):
        assert known in str(error.value)


def test_layer_norm_of_a_single_channel_of_values_is_refused():
    with pytest.raises((ValueError, StrictDataclassError), match="num_lambda_queries=16.* lambda_norm='layer'"):
        LambdaBertConfig(hidden_size=16, num_lambda_queries=16)
    for fields in ({"lambda_norm": "rms"}, {"intra_depth": 2}):
        assert LambdaBertConfig(hidden_size=16, num_lambda_queries=16, **fields).hidden_size == 16


@pytest.mark.parametrize(
    "positions, scope, longest", [("absolute", None, 77), ("absolute", 25, 77), ("none", None, 77), ("none", 25, None)]
)
def test_longest_sequence(positions, scope, longest):
    config = LambdaBertConfig(position_embedding_type=positions, local_context_size=scope, max_position_embeddings=77)
    assert config.longest_sequence == longest


def test_assigning_a_wrong_type_is_refused():
    config = LambdaBertConfig()
    with pytest.raises((ValueError, StrictDataclassError), match="key_depth"):
        config.key_depth = "8"


def test_json_round_trip():
    config = LambdaBertConfig(**CUSTOM)
    again = LambdaBertConfig(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert LambdaBertConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_save_and_load(tmp_path):
    config = LambdaBertConfig(**CUSTOM)
    config.save_pretrained(tmp_path)
    for loaded in (LambdaBertConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LambdaBertConfig
        assert {name: getattr(loaded, name) for name in CUSTOM} == CUSTOM


def test_null_scope_survives_saving(tmp_path):
    LambdaBertConfig(local_context_size=None).save_pretrained(tmp_path)
    assert LambdaBertConfig.from_pretrained(tmp_path).local_context_size is None


def test_saved_file_holds_what_differs_from_the_defaults():
    assert LambdaBertConfig(**CUSTOM).to_diff_dict().items() >= CUSTOM.items()


def test_a_config_saved_before_a_field_existed_means_the_same(tmp_path):
    LambdaBertConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["content_gain"], fields["repetition_context_size"]
    file.write_text(json.dumps(fields))
    loaded = LambdaBertConfig.from_pretrained(tmp_path)
    assert loaded.content_gain is False and loaded.repetition_context_size is None


def test_unknown_fields_still_load(tmp_path):
    LambdaBertConfig(**CUSTOM).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"a_field_of_another_version": [1, 2], "lambda_dropout": 0.5}))
    loaded = LambdaBertConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in CUSTOM} == CUSTOM


def test_bad_value_in_a_file_is_refused(tmp_path):
    LambdaBertConfig(**CUSTOM).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"local_context_size": 8}))
    with pytest.raises((ValueError, StrictDataclassError), match="local_context_size"):
        LambdaBertConfig.from_pretrained(tmp_path)


def test_overrides_when_loading(tmp_path):
    LambdaBertConfig(**CUSTOM).save_pretrained(tmp_path)
    assert LambdaBertConfig.from_pretrained(tmp_path, key_depth=9).key_depth == 9


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies(copier):
    config = LambdaBertConfig(**CUSTOM)
    twin = copier(config)
    assert type(twin) is LambdaBertConfig and twin.to_dict() == config.to_dict()
    twin.key_depth = 11
    assert config.key_depth == CUSTOM["key_depth"]


def test_label_names_and_numbers():
    config = LambdaBertConfig(num_labels=3)
    assert config.num_labels == 3 and len(config.id2label) == 3
