"""Models without absolute position embeddings: as with a zero table, equivariant to shifts, of any length."""

import pytest
import torch
from transformers import AutoModel

from configuration_lambdabert import LambdaBertConfig
from conversion_lambdabert import POSITION_TABLE
from modeling_lambdabert import LambdaBertModel

SCOPES = [5, None]
NORMS = ["none", "layer", "rms", "batch"]


def build(model_class, config, seed=0):
    torch.manual_seed(seed)
    return model_class(config).double()


def without(config):
    return LambdaBertConfig(**config.to_dict() | {"position_embedding_type": "none"})


def test_embeddings_are_dropped_out(make_config, make_inputs):
    model = build(LambdaBertModel, without(make_config(hidden_dropout_prob=0.5)))
    ids = make_inputs(LambdaBertModel, model.config, batch=8)["input_ids"]
    assert 0.4 < (model.train().embeddings(ids) == 0).double().mean() < 0.6
    assert (model.eval().embeddings(ids) != 0).all()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_a_zero_table(make_config, make_inputs, make_labels, model_class, scope, training):
    config = make_config(local_context_size=scope)
    reference = build(model_class, config)
    torch.nn.init.zeros_(reference.base_model.embeddings.position_embeddings.weight)
    model = build(model_class, without(config))
    assert [name for name, _ in reference.named_parameters() if not name.endswith(POSITION_TABLE)] == [
        name for name, _ in model.named_parameters()
    ]
    model.load_state_dict(reference.state_dict(), strict=False)
    inputs = make_inputs(model_class, config) | make_labels(model_class, config)
    inputs["attention_mask"][1, ..., 6:] = 0
    results = []
    with torch.set_grad_enabled(training):
        for each in (model, reference):
            output = each.train(training)(**inputs)
            if training:
                output[0].sum().backward()
            gradients = {
                name: torch.zeros(()) if parameter.grad is None else parameter.grad
                for name, parameter in each.named_parameters()
                if not name.endswith(POSITION_TABLE)
            }
            results.append((output.to_tuple(), gradients))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_padding_before_tokens_changes_nothing(make_config, scope, norm, training):
    """No position is a place in the row; with a table it is."""
    config = make_config(local_context_size=scope, lambda_norm=norm)
    tokens = torch.arange(10, 21)[None]
    padded = torch.nn.functional.pad(tokens, (7, 3))
    with torch.set_grad_enabled(training):
        for config, equal in ((without(config), True), (config, False)):
            model = build(LambdaBertModel, config).train(training)
            states = model(tokens).last_hidden_state
            shifted = model(padded, (padded > 0).long()).last_hidden_state[:, 7:-3]
            assert torch.allclose(shifted, states, rtol=1e-9, atol=1e-9) is equal


@pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
def test_local_scope_takes_any_length(make_config, by):
    """Far from the edges of what a layer's scope reaches, a repeated text has repeated states."""
    config = make_config(local_context_size=5, position_embedding_type="none")
    assert config.longest_sequence is None
    model = build(LambdaBertModel, config).eval()
    tokens = torch.randint(5, 60, (2, 10)).repeat(1, 20)
    inputs = {by: tokens if by == "input_ids" else model.embeddings.word_embeddings(tokens)}
    states = model(**inputs).last_hidden_state
    assert states.shape == (2, 200, 20)
    torch.testing.assert_close(states[:, 10:20], states[:, 150:160], rtol=1e-10, atol=1e-10)


def test_global_scope_keeps_its_limit(make_config):
    config = make_config(local_context_size=None, position_embedding_type="none")
    assert config.longest_sequence == 40
    model = build(LambdaBertModel, config)
    assert model(torch.ones(1, 40, dtype=torch.long))[0].shape == (1, 40, 20)
    with pytest.raises(ValueError, match=r"41 tokens, but max_position_embeddings=40 .*local_context_size"):
        model(torch.ones(1, 41, dtype=torch.long))


@pytest.mark.parametrize("masked", [False, True])
def test_position_ids_have_no_effect(make_config, make_inputs, masked):
    config = make_config(position_embedding_type="none")
    model = build(LambdaBertModel, config).eval()
    inputs = make_inputs(LambdaBertModel, config)
    inputs["attention_mask"][1, 4:] = 1 - int(masked)
    outputs = [model(**inputs, position_ids=given) for given in (None, torch.randint(0, 500, (3, 9)))]
    torch.testing.assert_close(outputs[0].to_tuple(), outputs[1].to_tuple(), rtol=0, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_save_and_load(make_config, make_inputs, model_class, scope, tmp_path):
    config = make_config(local_context_size=scope, position_embedding_type="none")
    model = build(model_class, config).eval()
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.position_embedding_type == "none"
    inputs = make_inputs(model_class, config)
    torch.testing.assert_close(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), rtol=1e-9, atol=1e-9)
    if model_class is LambdaBertModel:
        assert AutoModel.from_pretrained(tmp_path).embeddings.position_embeddings is None


def test_a_config_written_without_the_field_has_the_table(make_config, tmp_path):
    config = make_config()
    saved = {name: value for name, value in config.to_dict().items() if name != "position_embedding_type"}
    model = LambdaBertModel(LambdaBertConfig.from_dict(saved))
    assert model.embeddings.position_embeddings.weight.shape == (40, 20)


def test_compiled_for_any_length(make_config):
    config = make_config(local_context_size=5, position_embedding_type="none", num_hidden_layers=1)
    model = build(LambdaBertModel, config).eval()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (9, 55, 130):
        tokens = torch.randint(5, 60, (2, length))
        torch.testing.assert_close(compiled(tokens).to_tuple(), model(tokens).to_tuple(), rtol=1e-9, atol=1e-9)
