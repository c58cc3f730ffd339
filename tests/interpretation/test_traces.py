"""Traces of every class, mask and layout, against what the layers themselves compute."""

import pytest
import torch
from einops import einsum
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import lambda_kernels
from lambdabert.interpretation import attention, feature_rows, models, replace_lambdas, trace_lambdas


def test_shapes(make_model, holey, model_class):
    model = make_model(model_class.__name__)
    trace = trace_lambdas(model, holey(model))
    rows = 6 if "MultipleChoice" in model_class.__name__ else 3
    assert len(trace.layers) == 2 and trace.token_mask.shape == (rows, 9)
    for layer in trace.layers:
        assert layer.queries.shape == (rows, 9, 4, 3)
        assert layer.keys.shape == (rows, 9, 3, 2)
        assert layer.values.shape == (rows, 9, 5, 2)
        assert layer.content.shape == (rows, 3, 5)
        assert layer.outputs.shape == (rows, 9, 4, 5)


def test_keys_are_distributions_over_tokens(make_model, holey, settings):
    model = make_model(**settings)
    trace = trace_lambdas(model, holey(model))
    for layer in trace.layers:
        torch.testing.assert_close(layer.keys.sum(1), torch.ones_like(layer.keys.sum(1)), rtol=0, atol=1e-12)
        assert not layer.keys[~trace.token_mask].any() and not layer.values[~trace.token_mask].any()


def test_content_keys_and_values_make_the_content_lambda(make_model, holey, settings):
    model = make_model(**settings)
    for layer in trace_lambdas(model, holey(model)).layers:
        content = einsum(layer.content_keys, layer.values, "b m k u, b m v u -> b k v")
        torch.testing.assert_close(content, layer.content, rtol=1e-10, atol=1e-12)


def test_leaves_the_model_as_it_was(make_model, holey):
    model = make_model()
    inputs = holey(model)
    model(**inputs, output_hidden_states=True)  # transformers leaves hooks of its own
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = model(**inputs).logits
    trace = trace_lambdas(model, inputs)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(**inputs).logits, before)
    real = trace.token_mask
    torch.testing.assert_close(trace.outputs.logits[real], before[real], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_repetition", [False, True])
def test_a_saved_folder(make_model, holey, tmp_path, repetition, has_repetition):
    model = make_model(**(repetition if has_repetition else {}))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    inputs = holey(model)
    mine, other = trace_lambdas(model, inputs), trace_lambdas(loaded, inputs)
    assert mine.has_repetition == other.has_repetition == has_repetition
    for index in range(2):
        torch.testing.assert_close(mine.layers[index].content, other.layers[index].content)
        torch.testing.assert_close(attention(mine, index), attention(other, index))


def test_an_older_folder_knows_no_repetitions():
    assert models.repetition_embeddings(torch.nn.Module()) is None
    assert models.layer_repetitions(("states", "mask"), {}) is None
    assert models.layer_repetitions(("states", "mask", "layout"), {}) is None


def test_tiles(make_model, make_inputs, monkeypatch):
    monkeypatch.setattr(lambda_kernels, "TILE", 4)
    model = make_model()
    inputs = make_inputs(type(model), model.config)
    with torch.enable_grad():  # in one piece
        outputs = model(**inputs, output_lambda_params=True)
    for layer, content in zip(trace_lambdas(model, inputs).layers, outputs.lambda_params):
        torch.testing.assert_close(layer.content, content, rtol=1e-10, atol=1e-12)


class TestRefusals:
    def test_a_bert(self):
        bert = BertForMaskedLM(
            BertConfig(vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        )
        with pytest.raises(ValueError, match="model=BertForMaskedLM has no lambda layers.*from_bert"):
            trace_lambdas(bert.eval(), {"input_ids": torch.ones(1, 3, dtype=torch.long)})

    def test_training_mode(self, make_model, holey):
        model = make_model().train()
        with pytest.raises(ValueError, match=r"model.training=True.*model.eval\(\)"):
            trace_lambdas(model, holey(model))
        model.eval().bert.encoder.layer[1].train()
        with pytest.raises(ValueError, match="model.training=True, of a part of it"):
            trace_lambdas(model, holey(model))

    def test_a_model_that_peft_wraps(self, make_model, holey):
        model = make_model()
        adapted = get_peft_model(model, LoraConfig(target_modules=["to_queries"])).eval()
        for look in (lambda wrapped, inputs: feature_rows(wrapped, [inputs]), trace_lambdas):
            with pytest.raises(ValueError, match=r"model=PeftModel wraps a LambdaBERT: give model.get_base_model\(\)"):
                look(adapted, holey(model))
        logits = trace_lambdas(adapted.get_base_model(), holey(model)).outputs.logits
        torch.testing.assert_close(logits, adapted(**holey(model)).logits, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("within", [False, True])
    def test_a_compiled_model_would_run_without_hooks(self, make_model, holey, within):
        model = make_model()
        inputs = holey(model)
        if within:
            model.compile(backend="eager")
        compiled = model if within else torch.compile(model, backend="eager")
        for look in (trace_lambdas, lambda model, inputs: replace_lambdas(model, {0: "zero"}).__enter__()):
            with pytest.raises(ValueError, match="model=.* is compiled, and runs without what is hooked into it"):
                look(compiled, inputs)

    def test_text_in_place_of_ids(self, make_model):
        with pytest.raises(ValueError, match="inputs=str holds no tensor of input_ids.*return_tensors"):
            trace_lambdas(make_model(), "a text")

    @pytest.mark.parametrize("scope, position", [(5, "absolute"), (None, "none")])
    def test_a_text_above_the_limit(self, make_model, make_inputs, scope, position):
        model = make_model(local_context_size=scope, position_embedding_type=position)
        with pytest.raises(ValueError, match="41 tokens.*max_position_embeddings=40"):
            trace_lambdas(model, make_inputs(type(model), model.config, length=41))
