"""Maps and shares against the layer: map times values is its output, leave-one-out is the layer rerun."""

import pytest
import torch
from einops import einsum

import lambda_kernels
from lambdabert.interpretation import attention, token_shares, trace_lambdas


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def mapped(trace, layer, part="both"):
    """Map times values, [B, N, H, V]."""
    return einsum(attention(trace, layer, part), trace.layers[layer].values, "b h n m u, b m v u -> b n h v")


@pytest.mark.parametrize("tile", [256, 4])
def test_map_times_values_is_the_output(make_model, holey, settings, tile, monkeypatch):
    monkeypatch.setattr(lambda_kernels, "TILE", tile)
    model = make_model(**settings)
    trace = trace_lambdas(model, holey(model))
    for index, layer in enumerate(trace.layers):
        assert relative_error(mapped(trace, index), layer.outputs) < 1e-10
        content = einsum(layer.queries, layer.content, "b n h k, b k v -> b n h v")
        assert relative_error(mapped(trace, index, "content"), content) < 1e-10
        assert relative_error(mapped(trace, index, "position"), layer.outputs - content) < 1e-10


def test_map_times_values_is_the_output_of_packed_tokens(make_model, holey, settings):
    model = make_model(**settings)
    inputs = holey(model)
    packed = []

    def unpack(layer, positional, keywords, output):
        packing = keywords["packing"] if "packing" in keywords else positional[2]
        assert positional[0].shape[0] == 1  # or the batch was not packed
        packed.append(packing.unpack(output[0]))

    handles = [
        block.attention.self.register_forward_hook(unpack, with_kwargs=True) for block in model.bert.encoder.layer
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    trace = trace_lambdas(model, inputs)
    for index, outputs in enumerate(packed):
        expected = outputs[trace.token_mask]
        assert relative_error(mapped(trace, index).flatten(-2)[trace.token_mask], expected) < 1e-10


def test_shares_add_up(make_model, holey, settings):
    model = make_model(**settings)
    trace = trace_lambdas(model, holey(model))
    for index, layer in enumerate(trace.layers):
        found = token_shares(trace, index)
        assert relative_error(found.contributions.sum(1), layer.content) < 1e-10
        torch.testing.assert_close(found.shares.sum(1), torch.ones(3, 3, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        assert not found.contributions[~trace.token_mask].any()


@pytest.mark.parametrize("tile", [256, 4])
def test_leave_one_out_is_the_layer_rerun(make_model, holey, settings, tile, monkeypatch):
    monkeypatch.setattr(lambda_kernels, "TILE", tile)
    model = make_model(**settings)
    inputs = holey(model)
    trace = trace_lambdas(model, inputs)
    for index, block in enumerate(model.bert.encoder.layer):
        left_out = token_shares(trace, index).left_out
        for place in range(9):
            mask = inputs["attention_mask"].clone()
            mask[:, place] = 0
            with torch.no_grad():
                _, content = block.attention.self(trace.layers[index].hidden_states, mask)
            assert relative_error(left_out[:, place], content) < 1e-10


def test_leaving_out_the_token_that_holds_a_channel_loses_no_digits(make_model, make_inputs):
    model = make_model()
    layer = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        layer.to_keys.weight.mul_(12)
    inputs = make_inputs(type(model), model.config)
    trace = trace_lambdas(model, inputs)
    assert trace.layers[0].keys.max() > 1 - 1e-9
    left_out = token_shares(trace, 0).left_out
    for place in range(9):
        inputs["attention_mask"][:] = 1
        inputs["attention_mask"][:, place] = 0
        with torch.no_grad():
            _, content = layer(trace.layers[0].hidden_states, inputs["attention_mask"])
        assert relative_error(left_out[:, place], content) < 1e-10


def test_without_its_only_token_the_content_lambda_is_zero(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(type(model), model.config)
    inputs["attention_mask"][0, 1:] = 0
    found = token_shares(trace_lambdas(model, inputs), 0)
    assert not found.left_out[0, 0].any() and found.left_out.isfinite().all()


def test_refusals(make_model, holey):
    model = make_model()
    trace = trace_lambdas(model, holey(model))
    with pytest.raises(ValueError, match="layer=2: the model has 2 lambda layers; give one of 0 ... 1"):
        attention(trace, 2)
    with pytest.raises(ValueError, match="layer=-1"):
        token_shares(trace, -1)
    with pytest.raises(ValueError, match="part='keys' is unknown; give one of content, position, both"):
        attention(trace, 0, "keys")
