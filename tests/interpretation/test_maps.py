"""Maps and shares against the layer: map times values is its output, leave-one-out is the layer rerun."""

import pytest
import torch
from einops import einsum

import lambda_kernels
import reference
from lambdabert.interpretation import (
    Attribution,
    attention,
    draw_contributions,
    draw_maps,
    draw_probes,
    token_shares,
    trace_lambdas,
)
from packing_lambdabert import Padded


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def mapped(trace, layer, part="all"):
    """Map times values, [B, N, H, V]."""
    return einsum(attention(trace, layer, part), trace.layers[layer].values, "b h n m u, b m v u -> b n h v")


def repetition_output(model, inputs, trace, index):
    """What the repetition lambda of a layer adds by its definition, [B, N, H, V]; 0 where the model has none."""
    layer, table = trace.layers[index], model.bert.encoder.layer[index].attention.self.repetition_embeddings
    if table is None:
        return torch.zeros_like(layer.outputs)
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.mask_token_id, -1)
    lambdas = reference.repetition_lambda(
        layer.values.flatten(2).tolist(),
        inputs["attention_mask"].tolist(),
        ids.tolist(),
        table.tolist(),
        *layer.content.shape[1:],
        layer.values.shape[-1],
    )
    return einsum(layer.queries, torch.tensor(lambdas, dtype=torch.double), "b n h k, b n k v -> b n h v")


@pytest.mark.parametrize("tile", [256, 4])
def test_map_times_values_is_the_output(make_model, holey, settings, tile, monkeypatch):
    monkeypatch.setattr(lambda_kernels, "TILE", tile)
    model = make_model(**settings)
    inputs = holey(model)
    trace = trace_lambdas(model, inputs)
    for index, layer in enumerate(trace.layers):
        assert relative_error(mapped(trace, index), layer.outputs) < 1e-10
        content = einsum(layer.queries, layer.content, "b n h k, b k v -> b n h v")
        repetition = repetition_output(model, inputs, trace, index)
        assert relative_error(mapped(trace, index, "content"), content) < 1e-10
        assert relative_error(mapped(trace, index, "position"), layer.outputs - content - repetition) < 1e-10
        assert trace.has_repetition == ("repetition_context_size" in settings)
        if trace.has_repetition:
            assert relative_error(mapped(trace, index, "repetition"), repetition) < 1e-10
            assert repetition.abs().max() > 0.1


def test_the_repetition_map_by_its_definition(make_model, holey, repetition):
    model = make_model(**repetition)
    inputs = holey(model)
    trace = trace_lambdas(model, inputs)
    table = model.bert.encoder.layer[1].attention.self.repetition_embeddings
    ids, mask = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
    expected = torch.zeros_like(attention(trace, 1))
    for row in range(3):
        for n in range(9):
            same = [
                m
                for m in range(9)
                if m != n and mask[row][m] and ids[row][m] == ids[row][n] != model.config.mask_token_id
            ]
            for other in same:
                for m in range(max(0, other - 1), min(9, other + 2)):
                    of_queries = trace.layers[1].queries[row, n] @ table[m - other + 1]  # [H, U]
                    expected[row, :, n, m] += of_queries * mask[row][m] / len(same)
    assert any(len(set(some)) < 9 for some in ids) and expected.any()
    torch.testing.assert_close(attention(trace, 1, "repetition"), expected, rtol=1e-10, atol=1e-12)


def test_choices_have_repetitions_of_their_own(make_model, holey, repetition):
    model = make_model("LambdaBertForMultipleChoice", **repetition)
    trace = trace_lambdas(model, holey(model))
    assert trace.layers[0].queries.shape[0] == 6
    for index, layer in enumerate(trace.layers):
        assert relative_error(mapped(trace, index), layer.outputs) < 1e-10


def test_map_times_values_is_the_output_of_packed_tokens(make_model, holey, settings):
    model = make_model(**settings)
    inputs = holey(model)
    packed = []

    def unpack(layer, positional, keywords, output):
        packing = keywords["packing"] if "packing" in keywords else positional[2]
        assert positional[0].shape[0] == 1  # or the batch was not packed
        packed.append(packing.unpack(output[0]))

    unpack.__module__ = "lambdabert.interpretation"  # whose hooks know of packed rows
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
                layout = Padded(mask.bool(), inputs["input_ids"])
                _, content = block.attention.self(trace.layers[index].hidden_states, mask, layout)
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


def test_figures_have_the_parts_of_the_model(make_model, holey, repetition):
    pytest.importorskip("matplotlib")
    for fields, parts in (({}, []), (repetition, ["repetition"])):
        model = make_model(**fields)
        figure = draw_maps(trace_lambdas(model, holey(model)), ["word"] * 9, layers=[1])
        labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
        assert labels == [f"layer 1, {part}" for part in ["content", "position", *parts]]


def test_a_figure_has_each_cell_at_its_place(make_model, holey):
    """Outputs from top to bottom, values from left to right."""
    pytest.importorskip("matplotlib")
    model = make_model()
    trace = trace_lambdas(model, holey(model))
    kept = trace.token_mask[1].nonzero()[:, 0]
    expected = attention(trace, 1, "content")[1, 0].sum(-1)[kept][:, kept].float()
    (cells,) = draw_maps(trace, ["word"] * 9, layers=[1], row=1).axes[0].collections
    found = torch.full_like(expected, torch.nan)
    for path, value in zip(cells.get_paths(), cells.get_array(), strict=True):
        x, y = path.vertices[:4].mean(0)
        found[round(y), round(x)] = float(value)
    drawn = ~found.isnan()
    scaled = expected / expected.abs().max()
    torch.testing.assert_close(found[drawn], scaled[drawn])
    assert drawn.sum() > 20 and (scaled[~drawn].abs() < 0.01).all()


def test_figures_that_cannot_be_drawn(make_model, holey):
    pytest.importorskip("matplotlib")
    model = make_model()
    trace = trace_lambdas(model, holey(model))
    words = ["word"] * 9
    for options, message in (
        ({"row": 3}, "row=3: the batch has 3 rows; give one of 0 ... 2"),
        ({"layers": []}, r"layers=\[\]: there is no map"),
        ({"layers": [2]}, "layer=2: the model has 2"),
        ({"tokens": words[1:]}, "tokens has 8 entries for 9 places"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_maps(**({"trace": trace, "tokens": words} | options))
    way = Attribution(torch.zeros(3, 9), torch.zeros(3), torch.zeros(3))
    for options, message in (
        ({"row": 3}, "row=3: the batch has 3 rows"),
        ({"tokens": words[1:]}, "tokens has 8 entries for 9 places"),
        ({"ways": {}}, "ways={}: there is nothing to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_contributions(**({"tokens": words, "ways": {"exact": way}, "title": "a token"} | options))
    with pytest.raises(ValueError, match="tasks={}: there is nothing to draw"):
        draw_probes({})
    with pytest.raises(ValueError, match=r"tasks\['tense'\] has other rows than tasks\['length'\]; draw them apart"):
        draw_probes({"length": [{"row": "majority"}], "tense": [{"row": "bag of words"}]})


def test_refusals(make_model, holey):
    model = make_model()
    trace = trace_lambdas(model, holey(model))
    with pytest.raises(ValueError, match="layer=2: the model has 2 lambda layers; give one of 0 ... 1"):
        attention(trace, 2)
    with pytest.raises(ValueError, match='part="repetition": the model has no repetition lambda'):
        attention(trace, 0, "repetition")
    with pytest.raises(ValueError, match="layer=-1"):
        token_shares(trace, -1)
    with pytest.raises(ValueError, match="part='keys' is unknown; give one of content, position, repetition, all"):
        attention(trace, 0, "keys")
