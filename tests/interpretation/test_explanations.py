"""Explanations add up to the logit, see what the model sees, and compare with plain implementations."""

import pytest
import torch
from captum.attr import IntegratedGradients

import lambda_kernels
import modeling_lambdabert
from lambdabert.interpretation import (
    explain_prediction,
    explanations,
    gradient_times_input,
    integrated_gradients,
    secants,
)
from lambdabert.interpretation.predictions import Prediction

MASK = 4
NAMES_AND_QUESTIONS = [
    ("LambdaBertForMaskedLM", 2, 7),
    ("LambdaBertForPreTrainingNSP", 2, 7),
    ("LambdaBertForPreTrainingSOP", None, 1),
    ("LambdaBertForNextSentencePrediction", None, 0),
    ("LambdaBertForSequenceClassification", None, 1),
    ("LambdaBertForTokenClassification", 5, 1),
    ("LambdaBertForQuestionAnswering", 2, "end"),
    ("LambdaBertForMultipleChoice", None, 1),
]


@pytest.fixture
def masked(holey):
    """Builds a batch with holes in its masks and [MASK] at place 2."""

    def build(model):
        inputs = holey(model)
        inputs["input_ids"][..., 2] = MASK
        return inputs

    return build


def logits_of(model, inputs, place, token):
    """[B] logits, in a plain forward."""
    with torch.no_grad():
        outputs = model(**inputs)
    if "start_logits" in outputs:
        return outputs[f"{token}_logits"][:, place]
    if place is not None:
        return outputs[0][:, place, token]
    return outputs.get("logits", outputs.get("seq_relationship_logits"))[:, token]


@pytest.mark.parametrize("scope", [5, None])
@pytest.mark.parametrize("name, place, token", NAMES_AND_QUESTIONS)
def test_adds_up_in_every_class(make_model, masked, name, place, token, scope):
    model = make_model(name, local_context_size=scope)
    check_sums(model, masked(model), place, token)


@pytest.mark.parametrize("name, place, token", NAMES_AND_QUESTIONS)
def test_adds_up_in_every_class_with_repetitions(make_model, masked, repetition, name, place, token):
    model = make_model(name, **repetition)
    found = check_sums(model, masked(model), place, token)
    assert all(layer.repetition.abs().max() > 1e-6 for layer in found.layers[:-1])


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "gelu_new", "silu"])
def test_adds_up_with_every_activation(make_model, masked, hidden_act):
    model = make_model(hidden_act=hidden_act)
    check_sums(model, masked(model), 2, 7)


@pytest.mark.parametrize("tile", [256, 4])
def test_adds_up_with_every_setting(make_model, masked, settings, tile, monkeypatch):
    monkeypatch.setattr(lambda_kernels, "TILE", tile)
    model = make_model(**settings)
    check_sums(model, masked(model), 2, 7)


def check_sums(model, inputs, place, token):
    found = explain_prediction(model, inputs, place, token, mask_token_id=MASK)
    torch.testing.assert_close(found.logit, logits_of(model, inputs, place, token), rtol=1e-10, atol=1e-10)
    assert found.tokens.shape == inputs["input_ids"].shape
    assert not found.tokens[inputs["attention_mask"] == 0].any()
    total = found.tokens.flatten(1).sum(1)
    assert (total + found.bias - found.logit).abs().max() < 1e-9
    assert total.abs().min() > 1e-6
    for layer in found.layers:
        passed = layer.content + layer.position + layer.repetition + layer.queries + layer.residual
        torch.testing.assert_close(passed.reshape(len(total), -1).sum(1), total, rtol=1e-9, atol=1e-9)
    return found


def test_keys_and_values_are_the_content_part(make_model, masked):
    """By the slopes at each, where the residual is what the parts leave."""
    model = make_model(content_gain=True)
    inputs = masked(model)
    found = explain_prediction(model, inputs, 2, 7, MASK)
    prediction = Prediction(model, inputs, 2, 7)
    words = prediction.embeddings(inputs["input_ids"])
    pair = torch.stack([words, torch.lerp(words, prediction.mask_embedding(MASK), explanations.FADING)])
    with secants.secants(model) as branches:
        logit, _ = prediction.run(pair.requires_grad_())
    for layer, block in zip(found.layers, model.bert.encoder.layer, strict=True):
        way = branches[block.attention.self]
        expected = torch.zeros_like(words[..., 0])
        for branch in (way.key_logits, way.content_values):
            (slopes,) = torch.autograd.grad(logit.sum(), branch, retain_graph=True)
            first, second = branch.detach().flatten(2).chunk(2)
            part = (slopes[: len(first)].flatten(2) * (first - second)).sum(-1)
            assert part.abs().max() > 1e-6
            expected += part
        torch.testing.assert_close(layer.content, expected, rtol=1e-9, atol=1e-12)


def test_the_bias_is_the_logit_of_the_faded_text(make_model, masked):
    model = make_model()
    inputs = masked(model)
    words = model.get_input_embeddings().weight
    faded = torch.lerp(words[inputs["input_ids"]], words[MASK], explanations.FADING)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    expected = model(inputs_embeds=faded, **rest).logits[:, 2, 7]
    torch.testing.assert_close(explain_prediction(model, inputs, 2, 7).bias, expected, rtol=1e-10, atol=1e-10)


def test_layers_show_the_part_that_is_there(make_model, masked):
    model = make_model()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.relative_embeddings.zero_()
        model.bert.encoder.layer[1].attention.self.to_queries.weight.zero_()
        model.bert.encoder.layer[1].attention.self.query_norm.bias.zero_()
    first, second = explain_prediction(model, masked(model), 2, 7).layers
    assert first.position.abs().max() < 1e-12 < first.content.abs().max()
    for part in (second.content, second.position, second.queries):
        assert part.abs().max() < 1e-12
    assert not first.repetition.any() and not second.repetition.any()


def test_layers_show_the_repetition_lambda_that_is_there(make_model, masked, repetition):
    model = make_model(content_gain=True, **repetition)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.relative_embeddings.zero_()
        model.bert.encoder.layer[0].attention.self.content_gain.zero_()
        model.bert.encoder.layer[1].attention.self.repetition_embeddings.zero_()
    first, second = explain_prediction(model, masked(model), 2, 7, MASK).layers
    assert max(first.content.abs().max(), first.position.abs().max()) < 1e-12 < 1e-3 < first.repetition.abs().max()
    assert second.repetition.abs().max() < 1e-12 < 1e-3 < second.position.abs().max()


def test_repetitions_contribute_where_they_stand(make_model, make_inputs, repetition):
    model = make_model(num_hidden_layers=1, **repetition)
    inputs = make_inputs(type(model), model.config, batch=1)
    inputs["input_ids"][:] = torch.tensor([7, 8, 9, 10, 7, 11, 5, 8, 9])
    (layer,) = explain_prediction(model, inputs, 0, 7, MASK).layers
    assert layer.repetition[0].abs().gt(1e-9).tolist() == [3 <= place <= 5 for place in range(9)]
    inputs["input_ids"][0, [0, 4]] = model.config.mask_token_id
    (layer,) = explain_prediction(model, inputs, 0, 7, MASK).layers
    assert not layer.repetition.any()


def test_one_row_is_explained_as_in_a_batch(make_model, masked):
    model = make_model()
    inputs = masked(model)
    whole = explain_prediction(model, inputs, torch.tensor([2, 1, 0]), torch.tensor([7, 8, 9]), MASK)
    for row, (place, token) in enumerate([(2, 7), (1, 8), (0, 9)]):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = explain_prediction(model, one, place, token, MASK)
        torch.testing.assert_close(whole.tokens[row], alone.tokens[0], rtol=1e-9, atol=1e-12)


def test_a_token_out_of_sight_contributes_nothing(make_model, make_inputs):
    model = make_model(num_hidden_layers=1)  # content sees all, and so its keys must not
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.to_keys.weight.zero_()
        model.bert.encoder.layer[0].attention.self.relative_embeddings[:, :, 0] = 0
    inputs = make_inputs(type(model), model.config)
    inputs["input_ids"][:, 0] = MASK
    found = explain_prediction(model, inputs, 0, 7)
    assert found.layers[0].position[:, 3:].abs().max() == 0


def test_leaves_the_model_as_it_was(make_model, masked):
    model = make_model()
    inputs = masked(model)
    model(**inputs, output_hidden_states=True)  # transformers leaves hooks of its own
    hooks = [len(module._forward_hooks) for module in model.modules()]
    explain_prediction(model, inputs, 2, 7)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_secants_leave_every_bit_outside_of_lambda_layers(make_model, make_inputs, monkeypatch):
    model = make_model()
    monkeypatch.setattr(
        secants, "lambda_output", lambda layer, hidden_states, *_: (torch.zeros_like(hidden_states), None)
    )
    inputs = make_inputs(type(model), model.config, batch=4)
    plain = model(**inputs, output_hidden_states=True).logits
    with secants.secants(model):
        assert torch.equal(model(**inputs, output_hidden_states=True).logits, plain)


class TestIntegratedGradients:
    def test_is_the_mean_gradient_along_the_line(self, make_model, masked):
        model = make_model()
        inputs = masked(model)
        words = model.get_input_embeddings().weight.detach()
        first = words[inputs["input_ids"]]
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        total = torch.zeros_like(first)
        for step in range(12):
            point = (words[MASK] + (step + 0.5) / 12 * (first - words[MASK])).requires_grad_()
            model(inputs_embeds=point, **rest).logits[:, 2, 7].sum().backward()
            total += point.grad / 12
        expected = ((first - words[MASK]) * total).sum(-1)
        found = integrated_gradients(model, inputs, 2, 7, steps=12)
        torch.testing.assert_close(found.tokens, expected, rtol=1e-9, atol=1e-12)

    def test_is_that_of_captum(self, make_model, masked):
        model = make_model()
        inputs = masked(model)
        words = model.get_input_embeddings().weight.detach()
        names = [name for name in inputs if name != "input_ids"]

        def logit(embeddings, *rest):
            return model(inputs_embeds=embeddings, **dict(zip(names, rest))).logits[:, 2, 7]

        first = words[inputs["input_ids"]]
        captums, delta = IntegratedGradients(logit).attribute(
            first,
            words[MASK].expand_as(first),
            additional_forward_args=tuple(inputs[name] for name in names),
            n_steps=50,
            method="riemann_middle",
            return_convergence_delta=True,
        )
        found = integrated_gradients(model, inputs, 2, 7)
        # captum has its steps in float32
        torch.testing.assert_close(found.tokens, captums.sum(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.tokens.sum(1) + found.bias - found.logit, delta, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name, place, token", NAMES_AND_QUESTIONS)
    def test_completeness(self, make_model, masked, name, place, token):
        model = make_model(name)
        inputs = masked(model)
        found = integrated_gradients(model, inputs, place, token, mask_token_id=MASK, steps=400)
        total = found.tokens.flatten(1).sum(1)
        torch.testing.assert_close(total + found.bias, found.logit, rtol=1e-3, atol=1e-3)
        inputs["input_ids"][:] = MASK
        torch.testing.assert_close(found.bias, logits_of(model, inputs, place, token), rtol=1e-9, atol=1e-9)

    def test_completeness_with_repetitions(self, make_model, masked, repetition):
        model = make_model(**repetition)
        inputs = masked(model)
        found = integrated_gradients(model, inputs, 2, 7, MASK, steps=400)
        torch.testing.assert_close(found.logit, logits_of(model, inputs, 2, 7), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.tokens.sum(1) + found.bias, found.logit, rtol=1e-3, atol=1e-3)

    def test_no_step(self, make_model, masked):
        model = make_model()
        with pytest.raises(ValueError, match="steps=0"):
            integrated_gradients(model, masked(model), 2, 7, steps=0)


def test_gradient_times_input(make_model, masked):
    model = make_model()
    inputs = masked(model)
    words = model.get_input_embeddings().weight.detach()[inputs["input_ids"]].requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    logit = model(inputs_embeds=words, **rest).logits[:, 2, 7]
    logit.sum().backward()
    found = gradient_times_input(model, inputs, 2, 7)
    torch.testing.assert_close(found.tokens, (words.grad * words).sum(-1).detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.bias + found.tokens.sum(1), logit.detach(), rtol=1e-9, atol=1e-12)


class TestRefusals:
    @pytest.mark.parametrize(
        "name, place, token, message",
        [
            ("LambdaBertModel", 2, 1, "model=LambdaBertModel has no head"),
            ("LambdaBertForMaskedLM", None, 1, "place=None: the model predicts at every token"),
            ("LambdaBertForMaskedLM", 9, 1, "place=9: the rows have 9 places; give one of 0 ... 8"),
            ("LambdaBertForMaskedLM", -1, 1, "place=-1: the rows have 9 places"),
            ("LambdaBertForMaskedLM", 7, 1, "place=7 is padding"),
            ("LambdaBertForMaskedLM", 2, 60, "target=60: the model tells 60 apart; give one of 0 ... 59"),
            ("LambdaBertForMaskedLM", 2, "dog", "target='dog' is not an index"),
            ("LambdaBertForSequenceClassification", 2, 1, "place=2: the model predicts once"),
            ("LambdaBertForSequenceClassification", None, 2, "target=2: the model tells 2 apart"),
            ("LambdaBertForQuestionAnswering", 2, 0, 'target=0.*"start" or "end"'),
            ("LambdaBertForMaskedLM", "2", 1, "place='2': give a whole number for all rows, or a tensor"),
            ("LambdaBertForMaskedLM", True, 1, "place=True: give a whole number"),
            (
                "LambdaBertForMaskedLM",
                torch.arange(4),
                1,
                "place=tensor.*: give a whole number for all rows, or a tensor",
            ),
            ("LambdaBertForMaskedLM", 2, None, "target=None: give a whole number"),
            ("LambdaBertForMaskedLM", 2, 1.0, "target=1.0: give a whole number"),
        ],
    )
    def test_questions(self, make_model, masked, name, place, token, message):
        model = make_model(name)
        for method in (explain_prediction, integrated_gradients):
            with pytest.raises(ValueError, match=message):
                method(model, masked(model), place, token, mask_token_id=MASK)

    def test_no_mask_token(self, make_model, masked, holey):
        classifier = make_model("LambdaBertForTokenClassification")
        with pytest.raises(ValueError, match="mask_token_id=None.*give the tokenizer's mask_token_id"):
            explain_prediction(classifier, masked(classifier), 2, 1)
        model = make_model()
        with pytest.raises(ValueError, match=r"place=2: the rows have different tokens.*not all \[MASK\]"):
            explain_prediction(model, holey(model), 2, 1)
        with pytest.raises(ValueError, match="mask_token_id=60 is not in the vocabulary"):
            explain_prediction(model, masked(model), 2, 1, mask_token_id=60)
        inputs = masked(model)
        inputs["input_ids"][:, 2] = 9
        model.config.mask_token_id = MASK
        with pytest.raises(ValueError, match=r"place=2 holds token 9, and \[MASK\] is 4: mask the place"):
            explain_prediction(model, inputs, 2, 1)
        with pytest.raises(ValueError, match="steps=1.5: set it to a whole number"):
            integrated_gradients(model, masked(model), 2, 1, steps=1.5)

    @pytest.mark.parametrize("act", [torch.nn.GELU(), torch.nn.Tanh()], ids=str)
    def test_a_head_that_has_no_secants(self, make_model, masked, act):
        model = make_model("LambdaBertForSequenceClassification")
        head = model.classifier
        model.classifier = torch.nn.Sequential(torch.nn.Linear(head.in_features, 5), act, torch.nn.Linear(5, 3))
        model.classifier.double().eval()
        with pytest.raises(ValueError, match="model: contributions and bias miss the logit by .*integrated_gradients"):
            explain_prediction(model, masked(model), None, 1, MASK)
        found = integrated_gradients(model, masked(model), None, 1, MASK)
        torch.testing.assert_close(found.tokens.sum(1) + found.bias, found.logit, rtol=1e-3, atol=1e-3)

    def test_no_lambda_layers(self):
        with pytest.raises(ValueError, match="model=Linear has no lambda layers"):
            explain_prediction(torch.nn.Linear(2, 2), {}, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_padding_leaves_finite_numbers_in_every_precision(make_model, masked, dtype):
    """The scores of the keys are far apart, and one row is padding alone."""
    model = make_model("LambdaBertForSequenceClassification").to(dtype)
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            block.attention.self.to_keys.weight.mul_(30)
    inputs = masked(model)
    inputs["attention_mask"][2] = 0
    found = explain_prediction(model, inputs, None, 1, MASK)
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(found.tokens.sum(1) + found.bias, found.logit, rtol=tolerance, atol=tolerance)
    assert not found.tokens[inputs["attention_mask"] == 0].any()


def test_every_class_is_asked(make_model):
    asked = {name for name, _, _ in NAMES_AND_QUESTIONS} | {"LambdaBertModel", "LambdaBertPreTrainedModel"}
    assert asked == set(modeling_lambdabert.__all__)
