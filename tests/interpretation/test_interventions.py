"""Replaced content lambdas: what changes nothing, and what the layer's formula says of the rest."""

import pytest
import torch

import lambda_kernels
from lambdabert.interpretation import attention, explain_prediction, replace_lambdas, token_shares, trace_lambdas


@pytest.mark.parametrize("mask", ["none", "whole", "holes", "tiles and holes"])
def test_its_own_content_lambda_leaves_every_bit(make_model, holey, settings, mask, monkeypatch):
    if mask == "tiles and holes":
        monkeypatch.setattr(lambda_kernels, "TILE", 4)
    model = make_model(**settings)
    inputs = holey(model)
    if mask == "whole":
        inputs["attention_mask"][:] = 1
    if mask == "none":
        del inputs["attention_mask"]
    with torch.no_grad():
        plain = model(**inputs, output_lambda_params=True)
        with replace_lambdas(model, dict(enumerate(plain.lambda_params))):
            replaced = model(**inputs)
        assert torch.equal(replaced.logits, plain.logits)
        assert torch.equal(model(**inputs).logits, plain.logits)


@pytest.mark.parametrize("tile", [256, 4])
def test_a_text_in_its_own_place_changes_nothing(make_model, holey, make_inputs, settings, tile, monkeypatch):
    monkeypatch.setattr(lambda_kernels, "TILE", tile)
    model = make_model(**settings)
    for inputs in (holey(model), make_inputs(type(model), model.config, batch=1)):
        with torch.no_grad():
            plain = model(**inputs).logits
            with replace_lambdas(model, {0: inputs, 1: inputs}):
                swapped = model(**inputs).logits
        torch.testing.assert_close(swapped, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hidden", [True, False])  # padded and packed
def test_outputs_are_those_of_the_formula(make_model, holey, make_inputs, settings, hidden):
    model = make_model(**settings)
    inputs = holey(model)
    other = make_inputs(type(model), model.config, batch=1, length=13, seed=5)
    content = trace_lambdas(model, other).layers[1].content
    trace = trace_lambdas(model, inputs)
    layer = trace.layers[1]
    changed = layer.outputs + layer.queries @ (content - layer.content)[:, None]
    block = model.bert.encoder.layer[1]
    with torch.no_grad():
        hidden_states = block.attention.output(changed.flatten(-2), layer.hidden_states)
        expected = model.cls(block.feed_forward_chunk(hidden_states))
        with replace_lambdas(model, {1: other}):
            outputs = model(**inputs, output_hidden_states=hidden, output_lambda_params=True)
    real = trace.token_mask
    torch.testing.assert_close(outputs.logits[real], expected[real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs.lambda_params[1], content.expand(3, -1, -1))


def test_words(make_model, holey):
    model = make_model()
    inputs = holey(model)
    with torch.no_grad():
        own = model(**inputs, output_lambda_params=True).lambda_params
        with replace_lambdas(model, {0: "mean", 1: "zero"}):
            replaced = model(**inputs, output_lambda_params=True).lambda_params
    torch.testing.assert_close(replaced[0], own[0].mean(0).expand_as(own[0]))
    assert not replaced[1].any()


def test_every_class(make_model, holey, model_class):
    model = make_model(model_class.__name__)
    inputs = holey(model)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with replace_lambdas(model, {0: "zero"}) as same:
            assert same is model
            assert not torch.allclose(model(**inputs)[0], plain)
        assert torch.equal(model(**inputs)[0], plain)


def test_refusals(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(type(model), model.config, batch=1)

    def run(replacements):
        with replace_lambdas(model, replacements):
            model(**inputs)

    with pytest.raises(ValueError, match="layer=2: the model has 2 lambda layers"):
        run({2: "zero"})
    with pytest.raises(ValueError, match=r"replacements\[0\]='none' is not a content lambda.*tokenizer"):
        run({0: "none"})
    with pytest.raises(ValueError, match=r"replacements\[0\] has shape \(4, 5\).*\[1, 3, 5\]"):
        run({0: torch.zeros(4, 5)})
    hooks = len(model.bert.encoder.layer[0].attention.self._forward_hooks)
    with pytest.raises(ValueError, match=r'replacements\[0\]="mean": the batch has 1 row'):
        run({0: "mean"})
    assert len(model.bert.encoder.layer[0].attention.self._forward_hooks) == hooks


def test_what_is_explained_by_keys_is_refused_while_others_lambdas_are_there(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(type(model), model.config, batch=1)
    with replace_lambdas(model, {1: "zero"}):
        trace = trace_lambdas(model, inputs)
        with pytest.raises(ValueError, match="content lambdas are replaced"):
            explain_prediction(model, inputs, 2, 7, mask_token_id=4)
        with pytest.raises(
            ValueError, match=r"replacements\[1\]: the content lambda of this layer is replaced already"
        ):
            with replace_lambdas(model, {1: torch.ones(3, 5)}):
                pass
        with replace_lambdas(model, {0: "zero"}):
            assert not any(content.any() for content in model(**inputs, output_lambda_params=True).lambda_params)
    for of_keys in (attention, token_shares):
        with pytest.raises(ValueError, match="layer=1: its content lambda was replaced"):
            of_keys(trace, 1)
        of_keys(trace, 0)
    explain_prediction(model, inputs, 2, 7, mask_token_id=4)
