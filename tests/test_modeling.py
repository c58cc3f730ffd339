"""The model family: outputs, losses, accumulation, checkpointing, compilation, padding, and what it refuses."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import attach_execution_device_hook
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, BertConfig, BertForMaskedLM, Trainer, TrainingArguments

import modeling_lambdabert as modeling
from lambda_layer import LambdaLayer
from modeling_lambdabert import (
    LambdaBertForMaskedLM,
    LambdaBertForMultipleChoice,
    LambdaBertForNextSentencePrediction,
    LambdaBertForPreTrainingNSP,
    LambdaBertForPreTrainingSOP,
    LambdaBertForQuestionAnswering,
    LambdaBertForSequenceClassification,
    LambdaBertForTokenClassification,
    LambdaBertModel,
)

NORMS = ["none", "layer", "rms", "batch"]
SCOPES = [5, None]
PRETRAINING = [
    (LambdaBertForPreTrainingNSP, "next_sentence_label", "nsp_loss"),
    (LambdaBertForPreTrainingSOP, "sentence_order_label", "sop_loss"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant.*")


# an answer that ends beyond the text is none, and no mistake
NAMES_WITH_CLASSES = sorted({*modeling.__all__} - {"LambdaBertModel", "LambdaBertForQuestionAnswering"})
NAMES_WITH_CLASSES.remove("LambdaBertPreTrainedModel")


def build(model_class, config, seed=0):
    torch.manual_seed(seed)
    return model_class(config)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


class TestOutputs:
    def test_base_model(self, make_config, make_inputs):
        config = make_config(output_hidden_states=True, output_lambda_params=True)
        model = build(LambdaBertModel, config).eval()
        output = model(**make_inputs(LambdaBertModel, config))
        assert list(output.keys()) == ["last_hidden_state", "pooler_output", "hidden_states", "lambda_params"]
        assert output[0] is output.last_hidden_state and output[1] is output.pooler_output
        assert output.last_hidden_state.shape == (3, 9, 20)
        assert output.pooler_output.shape == (3, 20)
        assert [tuple(state.shape) for state in output.hidden_states] == [(3, 9, 20)] * 3
        assert [tuple(content.shape) for content in output.lambda_params] == [(3, 3, 5)] * 2
        torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state, rtol=0, atol=0)

    @pytest.mark.parametrize("model_class, label, part", PRETRAINING)
    def test_pretraining(self, make_config, make_inputs, make_labels, model_class, label, part):
        config = make_config()
        model = build(model_class, config).eval()
        inputs = make_inputs(model_class, config)
        output = model(
            **inputs, **make_labels(model_class, config), output_hidden_states=True, output_lambda_params=True
        )
        assert set(output.keys()) == {
            "loss",
            "prediction_logits",
            "seq_relationship_logits",
            "hidden_states",
            "lambda_params",
            "mlm_loss",
            part,
        }
        assert list(output.keys())[:3] == ["loss", "prediction_logits", "seq_relationship_logits"]
        assert output.prediction_logits.shape == (3, 9, config.vocab_size)
        assert output.seq_relationship_logits.shape == (3, 2)
        assert list(model(**inputs).keys()) == ["prediction_logits", "seq_relationship_logits"]

    @pytest.mark.parametrize(
        "name, shapes",
        [
            ("LambdaBertForMaskedLM", {"logits": (3, 9, 60)}),
            ("LambdaBertForNextSentencePrediction", {"logits": (3, 2)}),
            ("LambdaBertForSequenceClassification", {"logits": (3, 4)}),
            ("LambdaBertForTokenClassification", {"logits": (3, 9, 4)}),
            ("LambdaBertForQuestionAnswering", {"start_logits": (3, 9), "end_logits": (3, 9)}),
            ("LambdaBertForMultipleChoice", {"logits": (3, 2)}),
        ],
    )
    def test_heads(self, make_config, make_inputs, make_labels, name, shapes):
        model_class = getattr(modeling, name)
        config = make_config(num_labels=2 if name.endswith("QuestionAnswering") else 4)
        model = build(model_class, config).eval()
        inputs = make_inputs(model_class, config)
        assert {key: tuple(value.shape) for key, value in model(**inputs).items()} == shapes
        labelled = model(**inputs, **make_labels(model_class, config))
        assert list(labelled.keys()) == ["loss", *shapes]

    @pytest.mark.parametrize("by", ["call", "config"])
    def test_lambda_params_of_every_class(self, make_config, make_inputs, model_class, by):
        config = make_config(output_lambda_params=by == "config")
        model = build(model_class, config).eval()
        inputs = make_inputs(model_class, config)
        output = model(**inputs) if by == "config" else model(**inputs, output_lambda_params=True)
        batch = inputs["input_ids"].reshape(-1, 9).shape[0]
        assert [tuple(content.shape) for content in output.lambda_params] == [(batch, 3, 5)] * 2
        silent = model(**inputs, output_lambda_params=False)
        assert getattr(silent, "lambda_params", None) is None

    def test_lambda_params_are_the_layers_content_lambdas(self, make_config, make_inputs):
        config = make_config()
        model = build(LambdaBertModel, config).eval()
        inputs = make_inputs(LambdaBertModel, config)
        inputs["attention_mask"][1, 5:] = 0
        output = model(**inputs, output_hidden_states=True, output_lambda_params=True)
        for block, state, content in zip(model.encoder.layer, output.hidden_states, output.lambda_params):
            torch.testing.assert_close(block.attention.self(state, inputs["attention_mask"])[1], content)
        assert not torch.allclose(output.lambda_params[0][0], output.lambda_params[0][2])

    def test_tuple_equals_dict(self, make_config, make_inputs, make_labels, model_class):
        config = make_config()
        model = build(model_class, config).eval()
        inputs = make_inputs(model_class, config) | make_labels(model_class, config)
        flags = {"output_hidden_states": True, "output_lambda_params": True}
        as_dict = model(**inputs, **flags)
        as_tuple = model(**inputs, **flags, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict)
        torch.testing.assert_close(as_tuple, as_dict.to_tuple(), rtol=0, atol=0)
        model.config.return_dict = False
        torch.testing.assert_close(model(**inputs, **flags), as_tuple, rtol=0, atol=0)

    def test_inputs_embeds_equal_input_ids(self, make_config, make_inputs, model_class):
        config = make_config()
        model = build(model_class, config).eval()
        inputs = make_inputs(model_class, config)
        expected = model(**inputs)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(
            model(**inputs, inputs_embeds=embeddings).to_tuple(), expected.to_tuple(), rtol=0, atol=0
        )


class TestLosses:
    def test_every_head(self, make_config, make_inputs, make_labels, head_class):
        """Against torch's own cross entropy of the returned logits."""
        model_class = head_class
        config = make_config()
        model = build(model_class, config).eval()
        labels = make_labels(model_class, config)
        output = model(**make_inputs(model_class, config), **labels)
        if "start_positions" in labels:
            expected = (
                F.cross_entropy(output.start_logits, labels["start_positions"])
                + F.cross_entropy(output.end_logits, labels["end_positions"])
            ) / 2
        elif "prediction_logits" in output:
            token_labels = labels.pop("labels")
            expected = F.cross_entropy(output.prediction_logits.flatten(0, 1), token_labels.flatten())
            expected = expected + F.cross_entropy(output.seq_relationship_logits, *labels.values())
        else:
            logits = output.logits.reshape(-1, output.logits.shape[-1])
            expected = F.cross_entropy(logits, labels["labels"].flatten())
        torch.testing.assert_close(output.loss, expected)

    @pytest.mark.parametrize("label", [0, 5, 7, 8, 9, 1000, -1], ids=str)
    def test_answer_outside_of_the_tokens_does_not_count(self, make_config, make_inputs, label):
        """Tokens of row 1 stand at 1 to 6; padding and what lies beyond the row cannot be predicted."""
        config = make_config()
        model = build(LambdaBertForQuestionAnswering, config)
        inputs = make_inputs(LambdaBertForQuestionAnswering, config)
        inputs["attention_mask"][1, [0, 7, 8]] = 0
        labels = torch.tensor([3, label, 4])
        output = model(**inputs, start_positions=labels, end_positions=labels)
        rows = [0, 1, 2] if 1 <= label <= 6 else [0, 2]
        ends = [F.cross_entropy(logits[rows], labels[rows]) for logits in (output.start_logits, output.end_logits)]
        torch.testing.assert_close(output.loss, sum(ends) / 2)
        assert output.loss < 10
        output.loss.backward()
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients(model).values())

    @pytest.mark.parametrize("given", [torch.tensor([2]), torch.tensor([1, 2]), torch.tensor([1.0, 2, 3])], ids=str)
    @pytest.mark.parametrize("masked", [True, False])
    def test_places_of_other_answers_are_refused(self, make_config, make_inputs, given, masked):
        inputs = make_inputs(LambdaBertForQuestionAnswering, make_config())
        inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])} if masked else {}
        with pytest.raises(ValueError, match="start_positions and end_positions: .* for 3 texts"):
            build(LambdaBertForQuestionAnswering, make_config())(**inputs, start_positions=given, end_positions=given)

    def test_no_answer_among_the_tokens(self, make_config, make_inputs):
        config = make_config()
        inputs = make_inputs(LambdaBertForQuestionAnswering, config)
        labels = torch.full((3,), 9)
        assert (
            build(LambdaBertForQuestionAnswering, config)(**inputs, start_positions=labels, end_positions=labels).loss
            == 0
        )

    @pytest.mark.parametrize("given, missing", [("start", "end"), ("end", "start")])
    def test_one_end_of_an_answer_is_no_answer(self, make_config, make_inputs, given, missing):
        config = make_config()
        inputs = make_inputs(LambdaBertForQuestionAnswering, config)
        with pytest.raises(ValueError, match=f"{missing}_positions is missing"):
            build(LambdaBertForQuestionAnswering, config)(**inputs, **{f"{given}_positions": torch.tensor([1, 2, 3])})

    def test_places_of_answers_may_be_columns(self, make_config, make_inputs):
        config = make_config()
        model = build(LambdaBertForQuestionAnswering, config).eval()
        inputs = make_inputs(LambdaBertForQuestionAnswering, config)
        starts, ends = torch.tensor([1, 2, 3]), torch.tensor([4, 4, 5])
        row, column = (
            model(**inputs, start_positions=starts.view(shape), end_positions=ends.view(shape)).loss
            for shape in ((3,), (3, 1))
        )
        assert torch.equal(row, column)

    def test_regression(self, make_config, make_inputs):
        config = make_config(num_labels=1)
        model = build(LambdaBertForSequenceClassification, config).eval()
        labels = torch.randn(3)
        output = model(**make_inputs(LambdaBertForSequenceClassification, config), labels=labels)
        torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], labels))

    def test_an_unknown_problem_type_is_refused(self, make_config, make_inputs):
        config = make_config(num_labels=3)
        model = build(LambdaBertForSequenceClassification, config)
        model.config.problem_type = "regresion"
        with pytest.raises(ValueError, match="^problem_type='regresion' is unknown; set it to one of"):
            model(**make_inputs(LambdaBertForSequenceClassification, config), labels=torch.zeros(3))

    def test_several_classes_of_a_text_as_whole_numbers(self, make_config, make_inputs):
        config = make_config(num_labels=3)
        model = build(LambdaBertForSequenceClassification, config).eval()
        inputs = make_inputs(LambdaBertForSequenceClassification, config)
        labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
        found = model(**inputs, labels=labels)
        assert model.config.problem_type == "multi_label_classification"
        expected = torch.nn.functional.binary_cross_entropy_with_logits(found.logits, labels.float())
        torch.testing.assert_close(found.loss, expected)

    def test_labels_that_are_refused_decide_nothing(self, make_config, make_inputs):
        config = make_config(num_labels=3)
        model = build(LambdaBertForSequenceClassification, config)
        inputs = make_inputs(LambdaBertForSequenceClassification, config)
        with pytest.raises(ValueError, match=r"labels is \[3, 2\], but the logits are \[3, 3\]: give \[3\]"):
            model(**inputs, labels=torch.zeros(3, 2, dtype=torch.long))
        assert model.config.problem_type is None

    @pytest.mark.parametrize("shape", [(9, 3), (27,), (3, 8)], ids=str)
    @pytest.mark.parametrize("training_step", [False, True])
    @pytest.mark.parametrize("head", [LambdaBertForTokenClassification, LambdaBertForMaskedLM])
    def test_labels_of_other_tokens_are_refused(self, make_config, make_inputs, head, training_step, shape):
        """Among them a transposed batch, which flattened has as many."""
        config = make_config()
        step = {"num_items_in_batch": torch.tensor(5)} if training_step else {}
        with pytest.raises(ValueError, match=re.escape(f"labels is {list(shape)}, but")):
            build(head, config)(**make_inputs(head, config), **step, labels=torch.zeros(shape, dtype=torch.long))

    def test_a_single_class(self, make_config, make_inputs, tmp_path):
        """What a classifier that becomes a regression has: its cross entropy would be 0, whatever it gives."""
        head, config = LambdaBertForSequenceClassification, make_config(num_labels=3)
        inputs = make_inputs(head, config)
        model = build(head, config)
        model(**inputs, labels=torch.tensor([0, 1, 2]))
        model.save_pretrained(tmp_path)
        arguments = {"num_labels": 1, "ignore_mismatched_sizes": True}
        with pytest.raises(ValueError, match="single_label_classification'.*num_labels=1: set problem_type='regress"):
            head.from_pretrained(tmp_path, **arguments)(**inputs, labels=torch.tensor([0, 0, 0]))
        model = head.from_pretrained(tmp_path, **arguments, problem_type="regression").eval()
        output = model(**inputs, labels=torch.tensor([0.5, 1.0, 2.0]))
        torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], torch.tensor([0.5, 1.0, 2.0])))

    @pytest.mark.parametrize("head_class", NAMES_WITH_CLASSES, indirect=True)
    def test_numbers_are_no_classes(self, make_config, make_inputs, make_labels, head_class):
        config = make_config()
        model, inputs = build(head_class, config), make_inputs(head_class, config)
        if head_class is LambdaBertForSequenceClassification:  # takes them for several classes of a text
            config.problem_type = "single_label_classification"
        for name, label in make_labels(head_class, config).items():
            with pytest.raises(ValueError, match=f"{name} is of torch.float32: classes are whole numbers"):
                model(**inputs, **{name: label.float() + 0.5})

    @pytest.mark.parametrize("head_class", NAMES_WITH_CLASSES, indirect=True)
    def test_a_class_that_is_not_there(self, make_config, make_inputs, make_labels, head_class):
        config = make_config(num_labels=3)
        model, inputs = build(head_class, config), make_inputs(head_class, config)
        for name, label in make_labels(head_class, config).items():
            labels = {name: label.clone()}
            classes = {"labels": config.vocab_size, "next_sentence_label": 2, "sentence_order_label": 2}[name]
            if "PreTraining" not in head_class.__name__ and head_class is not LambdaBertForMaskedLM:
                classes = model(**inputs).logits.shape[-1]
            for wrong in (classes, -1):
                labels[name].view(-1)[-1] = wrong
                with pytest.raises(ValueError, match=f"^{name} holds {wrong}, but the model tells {classes} classes"):
                    model(**inputs, **labels)

    def test_classes_of_32_bits_are_classes(self, make_config, make_inputs):
        config = make_config(num_labels=3)
        model = build(LambdaBertForSequenceClassification, config).eval()
        inputs, labels = make_inputs(LambdaBertForSequenceClassification, config), torch.tensor([2, 0, 1])
        assert torch.equal(model(**inputs, labels=labels.int()).loss, model(**inputs, labels=labels).loss)

    def test_regression_in_half_precision_keeps_its_targets(self, make_config, make_inputs):
        """1985 and 1989 are 1984 and 1992 in bfloat16."""
        config = make_config(num_labels=1)
        model = build(LambdaBertForSequenceClassification, config).eval()
        labels = torch.tensor([1985.0, 1986.0, 1989.0])
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**make_inputs(LambdaBertForSequenceClassification, config), labels=labels)
        torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0].float(), labels))

    def test_multi_label(self, make_config, make_inputs):
        config = make_config(num_labels=4)
        model = build(LambdaBertForSequenceClassification, config).eval()
        labels = torch.randint(0, 2, (3, 4)).float()
        output = model(**make_inputs(LambdaBertForSequenceClassification, config), labels=labels)
        torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))
        for wrong in (5.0, -100.0, float("nan")):
            labels[1, 2] = wrong
            with pytest.raises(ValueError, match="labels: with problem_type='multi_label_classification'"):
                model(**make_inputs(LambdaBertForSequenceClassification, config), labels=labels)

    @pytest.mark.parametrize("model_class, label, part", PRETRAINING)
    def test_pretraining_parts(self, make_config, make_inputs, make_labels, model_class, label, part):
        config = make_config()
        model = build(model_class, config).eval()
        inputs, labels = make_inputs(model_class, config), make_labels(model_class, config)
        both = model(**inputs, **labels)
        tokens_only = model(**inputs, labels=labels["labels"])
        sentence_only = model(**inputs, **{label: labels[label]})
        mlm = F.cross_entropy(both.prediction_logits.flatten(0, 1), labels["labels"].flatten())
        sentence = F.cross_entropy(both.seq_relationship_logits, labels[label])
        torch.testing.assert_close(both.loss, mlm + sentence)
        torch.testing.assert_close(both.mlm_loss, mlm)
        torch.testing.assert_close(both[part], sentence)
        torch.testing.assert_close(tokens_only.loss, mlm)
        torch.testing.assert_close(tokens_only.mlm_loss, mlm)
        assert tokens_only[part] is None if part in tokens_only else True
        torch.testing.assert_close(sentence_only.loss, sentence)
        torch.testing.assert_close(sentence_only[part], sentence)
        assert getattr(sentence_only, "mlm_loss", None) is None
        assert getattr(model(**inputs), "loss", None) is None

    @pytest.mark.parametrize("model_class, label, part", PRETRAINING)
    def test_nothing_masked_in_pretraining(self, make_config, make_inputs, make_labels, model_class, label, part):
        config = make_config()
        model = build(model_class, config)
        labels = make_labels(model_class, config)
        labels["labels"].fill_(-100)
        output = model(**make_inputs(model_class, config), **labels)
        torch.testing.assert_close(output.loss, output[part])
        assert output.mlm_loss == 0
        output.loss.backward()
        for name, gradient in gradients(model).items():
            assert gradient is None or torch.isfinite(gradient).all(), name
            if name.startswith("cls.predictions"):
                assert gradient is None or (gradient == 0).all(), name

    @pytest.mark.parametrize("accumulated", [0, 5])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("model_class, label, part", PRETRAINING)
    def test_pairs_count_without_masked_tokens(
        self, make_config, make_inputs, make_labels, model_class, label, part, training, accumulated
    ):
        """The stock Trainer gives `num_items_in_batch` in evaluation as well."""
        config = make_config()
        model = build(model_class, config).train(training)
        inputs, labels = make_inputs(model_class, config), make_labels(model_class, config)
        labels["labels"].fill_(-100)
        expected = model(**inputs, **{label: labels[label]})[part]
        found = model(**inputs, **labels, num_items_in_batch=torch.tensor(accumulated))[part]
        if accumulated:  # of other micro-batches or processes
            expected = expected * 0
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("model_class, label, part", PRETRAINING)
    def test_evaluation_in_several_processes(self, make_config, make_inputs, make_labels, model_class, label, part):
        """The stock Trainer counts masked tokens over all of them, and adds up what each gives."""
        config = make_config()
        model = build(model_class, config).eval()
        inputs, labels = make_inputs(model_class, config), make_labels(model_class, config)
        labels["labels"][1, 3:] = -100
        masked = (labels["labels"] != -100).sum()
        alone = model(**inputs, **labels)
        together = model(**inputs, **labels, num_items_in_batch=masked)
        torch.testing.assert_close((together.loss, together[part]), (alone.loss, alone[part]))
        of_four = model(**inputs, **labels, num_items_in_batch=4 * masked)
        torch.testing.assert_close((4 * of_four.loss, 4 * of_four[part]), (alone.loss, alone[part]))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("model_class, label, part", PRETRAINING)
    def test_a_pair_without_a_label(self, make_config, make_inputs, model_class, label, part, training):
        config = make_config()
        model, inputs = build(model_class, config).train(training), make_inputs(model_class, config)
        given = torch.tensor([0, -100, 1])
        output = model(**inputs, **{label: given})
        expected = torch.nn.functional.cross_entropy(output.seq_relationship_logits[given >= 0], given[given >= 0])
        torch.testing.assert_close((output.loss, output[part]), (expected, expected))

    @pytest.mark.parametrize("items", [None, 0, 3])
    def test_nothing_masked_in_masked_lm(self, make_config, make_inputs, items):
        config = make_config()
        model = build(LambdaBertForMaskedLM, config)
        arguments = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
        output = model(**make_inputs(LambdaBertForMaskedLM, config), labels=torch.full((3, 9), -100), **arguments)
        assert output.loss == 0
        output.loss.backward()
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients(model).values())


def ragged_examples(model_class, masked_counts=None, labels="all"):
    """Eight examples of 4 to 11 tokens; `masked_counts` says how many tokens of each are MLM targets."""
    generator = torch.Generator().manual_seed(3)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    name = model_class.__name__
    examples = []
    for index in range(8):
        length = 8 if "QuestionAnswering" in name else 4 + (index * 5) % 8
        choices = (2, length) if "MultipleChoice" in name else (length,)
        example = {"input_ids": draw(5, 60, *choices), "attention_mask": torch.ones(choices, dtype=torch.long)}
        token_labels = draw(5, 60, length)
        if masked_counts is not None:
            token_labels[masked_counts[index] :] = -100
        if "PreTraining" in name:
            sentence = "next_sentence_label" if name.endswith("NSP") else "sentence_order_label"
            if labels in ("all", "tokens"):
                example["labels"] = token_labels
            if labels in ("all", "sentence"):
                example[sentence] = draw(0, 2)
        elif "MaskedLM" in name:
            example["labels"] = token_labels
        elif "TokenClassification" in name:
            example["labels"] = draw(0, 2, length)
            example["labels"][::3] = -100
        elif "QuestionAnswering" in name:
            example |= {"start_positions": draw(0, length), "end_positions": draw(0, length)}
        elif labels == "regression":
            example["labels"] = torch.randn((), generator=generator, dtype=torch.float64)
        elif labels == "multi-label":
            example["labels"] = draw(0, 2, 3).double()
        else:
            example["labels"] = draw(0, 2)
        examples.append(example)
    return examples


def pad_to_longest(examples):
    """Pads on the right: labels with -100, everything else with 0."""

    def stack(name):
        values = [example[name] for example in examples]
        if values[0].dim() == 0 or values[0].is_floating_point():
            return torch.stack(values)
        padded = pad_sequence(
            [value.movedim(-1, 0) for value in values], True, padding_value=-100 if name == "labels" else 0
        )
        return padded.movedim(1, -1)

    return {name: stack(name) for name in examples[0]}


EQUAL_COUNTS = [2] * 8
UNEQUAL_COUNTS = [3, 1, 0, 0, 4, 2, 1, 4]


class TestStart:
    def test_output_projections_start_smaller_by_the_depth(self, make_config):
        """As GPT-2's: by the root of two branches a layer."""
        torch.manual_seed(0)
        model = LambdaBertModel(make_config(hidden_size=200, num_hidden_layers=8, initializer_range=0.1))
        for layer in model.encoder.layer:
            assert layer.attention.output.dense.weight.std().item() == pytest.approx(0.1 / 4, rel=0.02)


class TestDropout:
    @pytest.mark.parametrize("given, used", [(None, 0.3), (0.0, 0.0), (0.2, 0.2)])
    def test_of_classifiers(self, make_config, given, used):
        config = make_config(hidden_dropout_prob=0.3, classifier_dropout=given)
        assert modeling.LambdaBertForSequenceClassification(config).dropout.p == used

    @pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "MultipleChoice"])
    def test_stands_before_the_head(self, make_config, make_inputs, task):
        model_class = getattr(modeling, f"LambdaBertFor{task}")
        config = make_config(classifier_dropout=0.9)
        model, inputs = build(model_class, config), make_inputs(model_class, config)
        assert not torch.equal(model.train()(**inputs).logits, model.eval()(**inputs).logits)


class TestGradientAccumulation:
    """The stock Trainer's step over 8 examples is the same for 8 x 1, 2 x 4 and one plain backward."""

    LEARNING_RATE = 0.5

    def trainer_step(self, model, examples, batch_size, tmp_path):
        """The gradient that one SGD step applied, and the loss the Trainer reports."""
        before = copy.deepcopy(model.state_dict())
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=1,
            learning_rate=self.LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=pad_to_longest)
        loss = trainer.train().training_loss
        return {name: (before[name] - value) / self.LEARNING_RATE for name, value in model.state_dict().items()}, loss

    @pytest.mark.parametrize(
        "model_class, masked_counts, labels",
        [
            pytest.param(LambdaBertForMaskedLM, EQUAL_COUNTS, "all", id="MLM, equal"),
            pytest.param(LambdaBertForMaskedLM, UNEQUAL_COUNTS, "all", id="MLM, unequal"),
            pytest.param(LambdaBertForPreTrainingSOP, EQUAL_COUNTS, "all", id="SOP, equal"),
            pytest.param(LambdaBertForPreTrainingSOP, UNEQUAL_COUNTS, "all", id="SOP, unequal"),
            pytest.param(LambdaBertForPreTrainingSOP, UNEQUAL_COUNTS, "tokens", id="SOP, tokens only"),
            pytest.param(LambdaBertForPreTrainingSOP, UNEQUAL_COUNTS, "sentence", id="SOP, sentence only"),
            pytest.param(LambdaBertForPreTrainingNSP, EQUAL_COUNTS, "all", id="NSP, equal"),
            pytest.param(LambdaBertForPreTrainingNSP, UNEQUAL_COUNTS, "all", id="NSP, unequal"),
            pytest.param(LambdaBertForNextSentencePrediction, None, "all", id="next sentence"),
            pytest.param(LambdaBertForSequenceClassification, None, "all", id="classification"),
            pytest.param(LambdaBertForSequenceClassification, None, "regression", id="regression"),
            pytest.param(LambdaBertForSequenceClassification, None, "multi-label", id="multi-label"),
            pytest.param(LambdaBertForTokenClassification, None, "all", id="token classification"),
            pytest.param(LambdaBertForQuestionAnswering, None, "all", id="question answering"),
            pytest.param(LambdaBertForMultipleChoice, None, "all", id="multiple choice"),
        ],
    )
    def test_eight_by_one_equals_two_by_four(self, make_config, tmp_path, model_class, masked_counts, labels):
        config = make_config(num_labels={"regression": 1, "multi-label": 3}.get(labels, 2), num_hidden_layers=1)
        examples = ragged_examples(model_class, masked_counts, labels)

        model = build(model_class, config).double()
        loss = model(**pad_to_longest(examples)).loss
        loss.backward()
        plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        (whole, whole_loss), (accumulated, accumulated_loss) = (
            self.trainer_step(build(model_class, config).double(), examples, batch_size, tmp_path)
            for batch_size in (8, 2)
        )
        assert accumulated_loss == pytest.approx(whole_loss, rel=1e-6)
        for name in plain:
            torch.testing.assert_close(
                accumulated[name], whole[name], rtol=1e-8, atol=1e-10, msg=lambda message: f"{name}: {message}"
            )
        # no Trainer tells a model how many sentence pairs a step holds, only how many masked tokens
        if not ("PreTraining" in model_class.__name__ and masked_counts is UNEQUAL_COUNTS and labels == "all"):
            assert whole_loss == pytest.approx(loss.item(), rel=1e-6)
            for name, gradient in plain.items():
                torch.testing.assert_close(
                    whole[name], gradient, rtol=1e-8, atol=1e-10, msg=lambda message: f"{name}: {message}"
                )


class TestActivationCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_same_gradients_and_statistics(self, make_config, make_inputs, make_labels, scope, norm, use_reentrant):
        config = make_config(local_context_size=scope, lambda_norm=norm, hidden_dropout_prob=0.1)
        model_class = LambdaBertForPreTrainingSOP
        inputs = make_inputs(model_class, config) | make_labels(model_class, config)
        inputs["attention_mask"][0, 6:] = 0
        plain, checkpointed = (build(model_class, config).double().train() for _ in range(2))
        checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for model in (plain, checkpointed):
            torch.manual_seed(1)
            model(**inputs).loss.backward()
        torch.testing.assert_close(gradients(checkpointed), gradients(plain), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_recorded_outputs_appear_once(self, make_config, make_inputs, use_reentrant):
        config = make_config()
        model = build(LambdaBertModel, config).train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        output = model(**make_inputs(LambdaBertModel, config), output_hidden_states=True, output_lambda_params=True)
        output.last_hidden_state.sum().backward()
        assert len(output.hidden_states) == 3 and len(output.lambda_params) == 2


class TestCompile:
    @staticmethod
    def forward_and_backward(call, model, inputs):
        model.zero_grad()
        output = call(**inputs)
        weights = torch.linspace(-1, 1, output.last_hidden_state.numel(), dtype=output.last_hidden_state.dtype)
        (output.last_hidden_state.flatten() * weights).sum().backward()
        return output.last_hidden_state.detach(), gradients(model)

    @pytest.mark.parametrize("scope, masked", [(5, True), (None, False)], ids=["local, mask", "global, no mask"])
    def test_model(self, make_config, make_inputs, scope, masked):
        config = make_config(local_context_size=scope, num_hidden_layers=1)
        inputs = make_inputs(LambdaBertModel, config)
        if masked:
            inputs["attention_mask"][1, 5:] = 0
        else:
            del inputs["attention_mask"]
        torch.manual_seed(0)
        model = LambdaBertModel(config, add_pooling_layer=False).train()
        expected = self.forward_and_backward(model, model, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(self.forward_and_backward(compiled, model, inputs), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_layer_with_a_mask(self, make_config, scope, norm):
        self.assert_layer_compiles(make_config, scope, norm, [(3, 9)], backend="aot_eager")

    @pytest.mark.parametrize("scope", SCOPES)
    def test_layer_without_a_mask(self, make_config, scope):
        self.assert_layer_compiles(make_config, scope, "batch", [(3, 9)], masked=False, backend="aot_eager")

    @pytest.mark.parametrize("scope", SCOPES)
    def test_layer_with_the_default_backend(self, make_config, scope):
        self.assert_layer_compiles(make_config, scope, "layer", [(3, 9)])

    @pytest.mark.parametrize("scope", SCOPES)
    def test_dynamic_lengths(self, make_config, scope):
        shapes = [(3, 20), (2, 300)]
        self.assert_layer_compiles(make_config, scope, "layer", shapes, backend="aot_eager", dynamic=True)

    @staticmethod
    def assert_layer_compiles(make_config, scope, norm, shapes, masked=True, **options):
        torch.manual_seed(0)
        config = make_config(local_context_size=scope, lambda_norm=norm, max_position_embeddings=300)
        eager = LambdaLayer(config).train()
        twin = copy.deepcopy(eager)
        torch._dynamo.reset()
        compiled = torch.compile(twin, fullgraph=True, **options)
        for batch, length in shapes:
            hidden_states = torch.randn(batch, length, 20)
            mask = torch.ones(batch, length, dtype=torch.long) if masked else None
            if masked:
                mask[0] = 0
                mask[1, 5:] = 0
            for layer, call in ((eager, eager), (twin, compiled)):
                layer.zero_grad()
                output, content = call(hidden_states, mask)
                (output.sin().sum() + content.sin().sum()).backward()
            torch.testing.assert_close(gradients(twin), gradients(eager), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(dict(twin.named_buffers()), dict(eager.named_buffers()))

    def test_whole_pretraining_model(self, make_config, make_inputs, make_labels):
        config = make_config(num_hidden_layers=1)
        model_class = LambdaBertForPreTrainingSOP
        model = build(model_class, config).train()
        inputs = make_inputs(model_class, config) | make_labels(model_class, config)
        expected = model(**inputs)
        torch._dynamo.reset()
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.prediction_logits, expected.prediction_logits)


class TestResize:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("model_class", [LambdaBertForMaskedLM, LambdaBertForPreTrainingSOP])
    def test_vocabulary(self, make_config, make_inputs, model_class, tied):
        config = make_config(tie_word_embeddings=tied)
        model = build(model_class, config).eval()
        with torch.no_grad():
            model.get_output_embeddings().bias.normal_()
        inputs = make_inputs(model_class, config)
        before = model(**inputs)[0]
        for size in (70, 60):
            model.resize_token_embeddings(size)
            decoder = model.get_output_embeddings()
            assert model.config.vocab_size == size
            assert model.get_input_embeddings().weight.shape == (size, 20)
            assert decoder.weight.shape == (size, 20)
            assert decoder.bias.shape == model.cls.predictions.bias.shape == (size,)
            assert decoder.bias is model.cls.predictions.bias
            assert (decoder.weight is model.get_input_embeddings().weight) == tied
            after = model(**inputs)[0]
            assert after.shape[-1] == size
            torch.testing.assert_close(after[..., :60], before)
        labels = torch.full((3, 9), 59)
        assert torch.isfinite(model(**inputs, labels=labels).loss)

    @pytest.mark.parametrize("field", ["pad_token_id", "mask_token_id"])
    def test_special_tokens_are_not_cut_off(self, make_config, field):
        config = make_config()
        model = build(LambdaBertForMaskedLM, config)
        setattr(config, field, 50)
        with pytest.raises(ValueError, match=f"50 tokens leave out {field}=50"):
            model.resize_token_embeddings(50)
        assert model.get_input_embeddings().num_embeddings == config.vocab_size == 60
        assert model.resize_token_embeddings(50, pad_to_multiple_of=8).num_embeddings == 56
        model.resize_token_embeddings(51)
        config.validate()

    def test_every_class(self, make_config, make_inputs, model_class):
        config = make_config()
        model = build(model_class, config).eval()
        model.resize_token_embeddings(65)
        inputs = make_inputs(model_class, config)
        inputs["input_ids"].fill_(64)
        model(**inputs)
        assert model.get_input_embeddings().num_embeddings == 65


class TestPadding:
    """Outputs, loss, gradients and statistics of a model in training do not change with padding."""

    ROWS = [list(range(5, 14)), list(range(20, 26))]

    def batch(self, before, after, filler=0):
        """The two rows of `ROWS`, with masks, labels and explicit positions, between `before` and `after` padding."""
        width = max(map(len, self.ROWS))

        def pad(values, fill):
            return [fill] * (before + width - len(values) if before else 0) + values

        inputs = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
        for row in self.ROWS:
            columns = {
                "input_ids": (row, filler),
                "attention_mask": ([1] * len(row), 0),
                "position_ids": (list(range(len(row))), 0),
                "labels": ([token if token % 3 == 0 else -100 for token in row], -100),
            }
            for name, (values, fill) in columns.items():
                padded = pad(values, fill)
                inputs[name].append(padded + [fill] * (before + width + after - len(padded)))
        return {name: torch.tensor(value) for name, value in inputs.items()}

    @pytest.mark.parametrize("before, after", [(0, 9), (5, 0), (3, 4)])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [1, 5, 25, None])
    def test_amount_and_place(self, make_config, scope, norm, before, after):
        config = make_config(local_context_size=scope, lambda_norm=norm)
        results = []
        for inputs in (self.batch(0, 0), self.batch(before, after, filler=17)):
            model = build(LambdaBertForMaskedLM, config).double().train()
            output = model(**inputs)
            output.loss.backward()
            logits = output.logits[inputs["attention_mask"].bool()].detach()
            statistics = {name: value for name, value in model.named_buffers() if "norm" in name}
            results.append((output.loss.detach(), logits, statistics, gradients(model)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("before, after", [(0, 9), (5, 0), (3, 4)])
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("pooling, segment_ends", [("cls", None), ("sep", None), ("sep", (3, 1)), ("sep", (9, 6))])
    def test_pooled_token(self, make_config, scope, before, after, pooling, segment_ends):
        config = make_config(local_context_size=scope, classifier_pooling=pooling)
        label = {"sentence_order_label": torch.tensor([0, 1])}
        results = []
        for inputs in (self.batch(0, 0), self.batch(before, after, filler=17)):
            if segment_ends:
                in_second = inputs["position_ids"] >= torch.tensor(segment_ends)[:, None]
                inputs["token_type_ids"] = (in_second & inputs["attention_mask"].bool()).long()
            model = build(LambdaBertForPreTrainingSOP, config).double().train()
            output = model(**inputs, **label)
            output.loss.backward()
            results.append((output.seq_relationship_logits.detach(), output.sop_loss.detach(), gradients(model)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_sep_pools_the_end_of_the_first_segment(self, make_config, with_mask):
        """In the rows, places 3 and 8 = the last where there is no second segment; padded to 12 with a mask."""
        config = make_config(classifier_pooling="sep")
        model = build(LambdaBertModel, config).double().eval()
        ids = torch.arange(5, 17).repeat(2, 1)
        mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3]) if with_mask else None
        types = torch.tensor([[0] * 4 + [1] * 8, [0] * 12])
        output = model(ids, mask, types)
        ends = output.last_hidden_state[[0, 1], [3, 8 if with_mask else 11]]
        torch.testing.assert_close(output.pooler_output, model.pooler.dense(ends).tanh())
        alone = model(ids[1:], None if mask is None else mask[1:]).pooler_output
        torch.testing.assert_close(alone, output.pooler_output[1:])

    def test_loss_of_every_head(self, make_config, make_inputs, make_labels, head_class):
        """Padding on the right adds nothing to a loss and its gradients."""
        config = make_config()
        inputs, labels = make_inputs(head_class, config), make_labels(head_class, config)
        padded_labels = {
            name: F.pad(value, (0, 6), value=-100) if value.shape == (3, 9) else value for name, value in labels.items()
        }
        results = []
        for batch in (inputs | labels, {name: F.pad(value, (0, 6)) for name, value in inputs.items()} | padded_labels):
            model = build(head_class, config).double().train()
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), gradients(model)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_hole_keeps_its_width_and_not_its_content(self, make_config, scope, norm):
        config = make_config(local_context_size=scope, lambda_norm=norm)
        model = build(LambdaBertModel, config).double().eval()
        kept = [0, 1, 2, 5, 6, 7]
        tokens = torch.arange(10, 18)[None]
        mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
        output = model(tokens, mask).last_hidden_state[:, kept]
        other = model(torch.where(mask.bool(), tokens, 40), mask).last_hidden_state[:, kept]
        torch.testing.assert_close(other, output, rtol=1e-10, atol=1e-10)
        closed = model(tokens[:, kept], position_ids=torch.tensor([kept])).last_hidden_state
        assert not torch.allclose(closed, output, rtol=1e-3, atol=1e-3)

    def test_a_row_without_a_token_stays_finite(self, make_config, make_inputs, make_labels, model_class):
        config = make_config(lambda_norm="batch")
        model = build(model_class, config).train()
        inputs = make_inputs(model_class, config)
        inputs["attention_mask"][1] = 0
        output = model(**inputs, **make_labels(model_class, config))
        output[0].sum().backward()
        assert torch.isfinite(output[0]).all()
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients(model).values())


def sizes_of_first_layer(model):
    """A list that gets the first two axes of what the first layer is given, without a hook."""
    sizes, layer = [], model.encoder.layer[0]

    class Measured(type(layer)):
        def forward(self, hidden_states, *args, **kwargs):
            sizes.append(hidden_states.shape[:2])
            return super().forward(hidden_states, *args, **kwargs)

    Measured.__module__ = type(layer).__module__  # code of others gets whole rows
    layer.__class__ = Measured
    return sizes


class TestPacking:
    """A batch whose padding is left out gives what it gives with it."""

    @pytest.mark.parametrize(
        "place", ["embeddings.word_embeddings", "encoder.layer.1", "encoder.layer.0.attention.self.to_keys"]
    )
    @pytest.mark.parametrize(
        "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    )
    def test_hooks_get_rows(self, make_config, make_inputs, kind, place):
        """As in BERT: one that steers a place, or adds noise by a row's length (NEFTune), would else do another."""
        config = make_config()
        model, inputs = build(LambdaBertModel, config), make_inputs(LambdaBertModel, config)
        inputs["attention_mask"][1, 5:] = 0
        sizes = []

        def watch(module, *values):
            sizes.append(next(value for value in values[-1] if isinstance(value, torch.Tensor)).shape[:2])

        def watch_output(module, inputs, output):
            sizes.append(output.shape[:2])

        module = model.get_submodule(place)
        handle = getattr(module, f"register_{kind}")(watch_output if kind == "forward_hook" else watch)
        model(**inputs).last_hidden_state.sum().backward()
        handle.remove()
        assert sizes == [inputs["input_ids"].shape]

    def test_steering_a_place_is_the_same_with_padding(self, make_config):
        model = build(LambdaBertModel, make_config()).double()
        direction = torch.randn(20, dtype=torch.float64)

        def steer(module, inputs, output):
            return torch.cat([output[:, :1], output[:, 1:2] + direction, output[:, 2:]], dim=1)

        ids = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
        lengths = [5, 9, 7]
        mask = torch.arange(9) < torch.tensor(lengths)[:, None]
        model.encoder.layer[0].register_forward_hook(steer)
        together = model(ids, mask).last_hidden_state
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).last_hidden_state[0]
            torch.testing.assert_close(together[row, :length], alone, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
    def test_a_hook_on_all_gradients(self, make_config, make_inputs, kind):
        config = make_config()
        model, inputs = build(LambdaBertModel, config), make_inputs(LambdaBertModel, config)
        inputs["attention_mask"][1, 5:] = 0
        layer, sizes = model.encoder.layer[0], []
        handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(
            lambda module, *given: sizes.append(given[-1][0].shape[:2]) if module is layer else None
        )
        model(**inputs).last_hidden_state.sum().backward()
        handle.remove()
        assert sizes == [inputs["input_ids"].shape]

    @pytest.mark.parametrize("way", ["hook on all modules", "forward of one", "module in its place"])
    def test_other_ways_to_watch_a_layer(self, make_config, make_inputs, way):
        config = make_config()
        model, inputs = build(LambdaBertModel, config), make_inputs(LambdaBertModel, config)
        inputs["attention_mask"][1, 5:] = 0
        layer, sizes = model.encoder.layer[0], []
        forward = layer.forward

        def watched(hidden_states, *args):
            sizes.append(hidden_states.shape[:2])
            return forward(hidden_states, *args)

        if way == "hook on all modules":
            handle = torch.nn.modules.module.register_module_forward_hook(
                lambda module, given, output: sizes.append(output.shape[:2]) if module is layer else None
            )
            model(**inputs)
            handle.remove()
        else:
            if way == "forward of one":
                layer.forward = watched
            else:
                model.encoder.layer[0] = torch.nn.Module()
                model.encoder.layer[0].forward = watched
            model(**inputs)
        assert sizes == [inputs["input_ids"].shape]

    @pytest.mark.parametrize("place", ["output", "intermediate", "attention.output"])
    def test_a_part_in_the_place_of_another_gets_rows(self, make_config, make_inputs, place):
        """It may read along the sequence."""
        config = make_config()
        model, inputs = build(LambdaBertModel, config), make_inputs(LambdaBertModel, config)
        inputs["attention_mask"][1, 5:] = 0
        part, sizes = model.encoder.layer[0].get_submodule(place), []

        class Other(type(part)):
            def forward(self, hidden_states, *args):
                sizes.append(hidden_states.shape[:2])
                return super().forward(hidden_states, *args)

        part.__class__ = Other
        model(**inputs)
        with torch.no_grad():
            model.eval()(**inputs)
        assert sizes == [inputs["input_ids"].shape] * 2

    def test_hooks_of_transformers_do_not_count(self, make_config, make_inputs):
        """Those that record hidden states stay on a model."""
        config = make_config()
        model, inputs = build(LambdaBertModel, config), make_inputs(LambdaBertModel, config)
        inputs["attention_mask"][1, 5:] = 0
        model(**inputs, output_hidden_states=True)
        sizes = sizes_of_first_layer(model)
        model(**inputs)
        assert sizes == [(1, inputs["attention_mask"].sum())]

    MASKS = {
        "tails": lambda mask: mask[1:].copy_(torch.arange(23) < torch.tensor([[4], [22], [16], [11]])),
        "left": lambda mask: mask[1:].copy_(torch.arange(23) >= torch.tensor([[4], [22], [16], [11]])),
        "holes": lambda mask: mask[1:, ::3].zero_(),
        "empty row": lambda mask: mask[2].zero_(),
    }

    @staticmethod
    def results(model, inputs, monkeypatch, packed):
        sizes = sizes_of_first_layer(model)
        with monkeypatch.context() as patch:
            if not packed:
                patch.setattr(LambdaBertModel, "_may_pack", lambda *args, **kwargs: False)
            output = model(**inputs, output_lambda_params=True)
        mask = inputs["attention_mask"]
        assert sizes == [(1, mask.sum()) if packed else mask.shape]
        if torch.is_grad_enabled():
            (output.last_hidden_state.sin().sum() + output.pooler_output.sum()).backward()
        statistics = {name: value.clone() for name, value in model.named_buffers() if "norm" in name}
        outputs = output.last_hidden_state, output.pooler_output, output.lambda_params
        return outputs, statistics, gradients(model)

    @pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_same_results(self, make_config, make_inputs, monkeypatch, scope, norm, kind, training):
        config = make_config(local_context_size=scope, lambda_norm=norm)
        inputs = make_inputs(LambdaBertModel, config, batch=5, length=23)
        self.MASKS[kind](inputs["attention_mask"])
        with torch.set_grad_enabled(training):
            packed, padded = (
                self.results(
                    build(LambdaBertModel, config).double().train(training), inputs, monkeypatch, packed=packed
                )
                for packed in (True, False)
            )
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("given", ["position_ids", "one row of position_ids", "inputs_embeds"])
    def test_other_inputs(self, make_config, make_inputs, monkeypatch, given):
        config = make_config()
        inputs = make_inputs(LambdaBertModel, config, batch=5, length=23)
        self.MASKS["tails"](inputs["attention_mask"])
        if given == "inputs_embeds":
            inputs["inputs_embeds"] = torch.randn(5, 23, 20, dtype=torch.float64)
            del inputs["input_ids"], inputs["token_type_ids"]
        else:
            inputs["position_ids"] = torch.randint(0, 40, (5 if given == "position_ids" else 1, 23))
        packed, padded = (
            self.results(build(LambdaBertModel, config).double(), inputs, monkeypatch, packed=packed)
            for packed in (True, False)
        )
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-10)

    def test_more_tokens_than_positions(self, make_config, make_inputs, monkeypatch):
        """Many packed rows exceed the position table that each of them keeps to."""
        config = make_config()
        inputs = make_inputs(LambdaBertModel, config, batch=20, length=23)
        inputs["attention_mask"][:, 20:] = 0
        for name in ("token_type_ids", None):
            inputs.pop(name, None)
            packed, padded = (
                self.results(build(LambdaBertModel, config).double(), inputs, monkeypatch, packed=packed)
                for packed in (True, False)
            )
            torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("reason", ["hidden states", "hidden states by config", "chunks", "no padding", "no token"])
    def test_keeps_rows(self, make_config, make_inputs, reason):
        config = make_config(
            output_hidden_states=reason == "hidden states by config",
            chunk_size_feed_forward=3 if reason == "chunks" else 0,
        )
        model = build(LambdaBertModel, config)
        inputs = make_inputs(LambdaBertModel, config)
        if reason == "no token":
            inputs["attention_mask"].zero_()
        elif reason != "no padding":
            inputs["attention_mask"][1, 5:] = 0
        flags = {"output_hidden_states": True} if reason == "hidden states" else {}
        sizes = sizes_of_first_layer(model)
        output = model(**inputs, **flags)
        assert sizes == [(3, 9)]
        assert (output.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()

    def test_too_long_with_padding(self, make_config):
        """Padding that is not computed still counts in the length of a row."""
        mask = torch.ones(2, 41, dtype=torch.long)
        mask[:, 30:] = 0
        with pytest.raises(ValueError, match="max_position_embeddings"):
            build(LambdaBertModel, make_config())(torch.ones_like(mask), mask)


class TestSeveralDevices:
    """Spread over devices as by `device_map`; the second is the meta device, which refuses tensors of another."""

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("pooling", ["cls", "sep"])
    @pytest.mark.parametrize("holes", [False, True])
    def test_layers_on_two(self, make_config, make_inputs, scope, pooling, holes):
        config = make_config(local_context_size=scope, repetition_context_size=3, classifier_pooling=pooling)
        model, inputs = build(LambdaBertModel, config).eval(), make_inputs(LambdaBertModel, config)
        if holes:
            inputs["attention_mask"][1, 5:] = 0
        attach_execution_device_hook(model.encoder.layer[0], "cpu")
        for part in (*model.encoder.layer[1:], model.pooler):
            attach_execution_device_hook(part, "meta")
        output = model(**inputs)
        assert output.last_hidden_state.device.type == output.pooler_output.device.type == "meta"
        assert output.last_hidden_state.shape == (*inputs["input_ids"].shape, config.hidden_size)


class TestFunctionTransforms:
    """Torch's transforms of functions, whose tensors hold no numbers or one example of many."""

    @pytest.mark.parametrize("scope", SCOPES)
    def test_vmap_equals_each_example(self, make_config, scope):
        model = build(LambdaBertModel, make_config(local_context_size=scope, max_position_embeddings=100)).eval()
        ids = torch.randint(5, 20, (3, 100), generator=torch.Generator().manual_seed(0))
        together = torch.func.vmap(lambda row: model(row[None]).last_hidden_state[0])(ids)
        torch.testing.assert_close(together, model(ids).last_hidden_state)

    def test_vmap_of_a_long_global_scope(self, make_config):
        """Without gradients, lambdas of this length are made for a few value depths at a time."""
        config = make_config(local_context_size=None, max_position_embeddings=600, key_depth=64)
        model = build(LambdaBertModel, config).eval()
        ids = torch.randint(5, 20, (2, 600), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            together = torch.func.vmap(lambda row: model(row[None]).last_hidden_state[0])(ids)
            torch.testing.assert_close(together, model(ids).last_hidden_state)

    def test_vmap_over_masks_equals_each_mask(self, make_config):
        model = build(LambdaBertModel, make_config()).eval()
        ids = torch.randint(5, 20, (1, 9), generator=torch.Generator().manual_seed(0))
        masks = torch.ones(3, 1, 9, dtype=torch.long)
        masks[1, :, 6:] = masks[2, :, 3] = 0
        together = torch.func.vmap(lambda mask: model(ids, mask).last_hidden_state)(masks)
        torch.testing.assert_close(together, torch.stack([model(ids, mask).last_hidden_state for mask in masks]))

    def test_shapes_alone(self, make_config):
        with FakeTensorMode():
            model = build(LambdaBertModel, make_config())
            ids, mask = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
            found = model(ids, mask, position_ids=ids)
            assert found.last_hidden_state.shape == (2, 9, 20)


class TestHalfPrecision:
    """A model whose weights are all of half precision: finite, and near to float32, with padding of every kind."""

    @pytest.mark.parametrize("layout", ["packed", "padded"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("scope", SCOPES)
    def test_near_to_float32(self, make_config, make_inputs, make_labels, head_class, scope, dtype, layout):
        config = make_config(local_context_size=scope, lambda_norm="layer")
        inputs, labels = make_inputs(head_class, config, batch=4), make_labels(head_class, config, batch=4)
        inputs["attention_mask"][1, ..., 5:] = 0
        inputs["attention_mask"][2, ..., ::2] = 0
        inputs["attention_mask"][3] = 0
        results = []
        for precision in (dtype, torch.float32):
            model = build(head_class, config).to(dtype).to(precision).train()
            loss = model(**inputs, **labels, output_hidden_states=layout == "padded").loss
            loss.backward()
            flat = torch.cat(
                [gradient.float().flatten() for gradient in gradients(model).values() if gradient is not None]
            )
            results.append((loss.detach().float(), flat))
        (loss, gradient), (exact_loss, exact_gradient) = results
        assert torch.isfinite(gradient).all()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(loss, exact_loss, rtol=4 * eps, atol=0)
        assert (gradient - exact_gradient).norm() <= 16 * eps * exact_gradient.norm()


class TestEmptyBatch:
    """A batch of no rows gives empty results, in every mode; a sequence of no tokens is refused."""

    @staticmethod
    def empty(inputs):
        return {name: value[:0] for name, value in inputs.items()}

    @pytest.mark.parametrize("length", [9, 80])
    @pytest.mark.parametrize("norm", ["layer", "batch"])
    @pytest.mark.parametrize("scope", SCOPES)
    def test_training(self, make_config, make_inputs, make_labels, head_class, scope, norm, length):
        config = make_config(local_context_size=scope, lambda_norm=norm, max_position_embeddings=80)
        model = build(head_class, config).train()
        inputs, labels = (make(head_class, config, length=length) for make in (make_inputs, make_labels))
        loss = model(**self.empty(inputs), **self.empty(labels)).loss
        assert loss == 0
        loss.backward()
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients(model).values())
        assert all(torch.isfinite(buffer).all() for buffer in model.buffers())

    @pytest.mark.parametrize("mode", ["inference", "with gradients", "hidden states", "without a mask", "traced"])
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_outputs(self, make_config, make_inputs, model_class, scope, mode):
        config = make_config(local_context_size=scope, max_position_embeddings=80, return_dict=False)
        model = build(model_class, config).eval()
        inputs = make_inputs(model_class, config, length=80)
        expected = [output[:0].shape for output in model(**inputs)]
        call = torch.jit.trace(model, example_kwarg_inputs=inputs) if mode == "traced" else model
        inputs = self.empty(inputs)
        if mode == "without a mask":
            del inputs["attention_mask"]
        flags = {"output_hidden_states": True} if mode == "hidden states" else {}
        with torch.inference_mode(mode == "inference"):
            outputs = call(**inputs, **flags)
        assert [output.shape for output in outputs[: len(expected)]] == expected

    @pytest.mark.parametrize("inference", [True, False])
    @pytest.mark.parametrize("masked", [True, False])
    @pytest.mark.parametrize("scope", SCOPES)
    def test_no_token(self, make_config, make_inputs, model_class, scope, masked, inference):
        config = make_config(local_context_size=scope)
        inputs = make_inputs(model_class, config, length=0)
        if not masked:
            del inputs["attention_mask"]
        with pytest.raises(ValueError, match="0 tokens"), torch.inference_mode(inference):
            build(model_class, config)(**inputs)


class TestFeedForwardTiles:
    """Inference on a CPU feeds some tokens forward at a time, whatever rows they stand in."""

    @pytest.mark.parametrize("tile", [1, 5, 46, 1000])
    @pytest.mark.parametrize("padded", [False, True])
    def test_inference_equals_training(self, make_config, make_inputs, monkeypatch, tile, padded):
        config = make_config()
        model = build(LambdaBertModel, config).double().eval()
        inputs = make_inputs(LambdaBertModel, config, batch=2, length=23)
        if padded:
            inputs["attention_mask"][1, 9:] = 0
        expected = model(**inputs)
        monkeypatch.setattr(modeling, "FEED_FORWARD_TILE", tile)
        sizes = []
        feed_forward = modeling.LambdaBertLayer.feed_forward_chunk

        def measured(layer, hidden_states):
            sizes.append(len(hidden_states))
            return feed_forward(layer, hidden_states)

        monkeypatch.setattr(modeling.LambdaBertLayer, "feed_forward_chunk", measured)
        with torch.inference_mode():
            actual = model(**inputs)
        tokens = int(inputs["attention_mask"].sum())
        assert max(sizes) == min(tile, tokens) and sum(sizes) == config.num_hidden_layers * tokens
        torch.testing.assert_close(actual.to_tuple(), expected.to_tuple(), rtol=1e-10, atol=1e-10)

    def test_dropout_is_drawn_alike_with_and_without_gradients(self, make_config, make_inputs, monkeypatch):
        """As a reentrant checkpoint does, which needs the same draw twice."""
        monkeypatch.setattr(modeling, "FEED_FORWARD_TILE", 5)
        sizes = []
        feed_forward = modeling.LambdaBertLayer.feed_forward_chunk
        monkeypatch.setattr(
            modeling.LambdaBertLayer,
            "feed_forward_chunk",
            lambda layer, states: sizes.append(states.shape[:-1].numel()) or feed_forward(layer, states),
        )
        config = make_config(hidden_dropout_prob=0.5)
        model, inputs = build(LambdaBertModel, config), make_inputs(LambdaBertModel, config, batch=2, length=23)
        found = []
        for gradients in (True, False):
            torch.manual_seed(0)
            with torch.set_grad_enabled(gradients):
                found.append(model(**inputs).last_hidden_state)
        torch.testing.assert_close(*found)
        assert sizes == [46] * 4

    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    @pytest.mark.parametrize("part", ["intermediate", "intermediate.dense", "output.dense", "output"])
    def test_hooks_see_whole_sequences(self, make_config, make_inputs, monkeypatch, part, register):
        monkeypatch.setattr(modeling, "FEED_FORWARD_TILE", 5)
        config = make_config()
        model = build(LambdaBertModel, config).eval()
        sizes = []
        module = model.encoder.layer[1].get_submodule(part)
        getattr(module, register)(lambda module, args, *output: sizes.append(args[0].shape[:2]))
        with torch.inference_mode():
            model(**make_inputs(LambdaBertModel, config, batch=2, length=23))
        assert sizes == [(2, 23)]


class TestRefusals:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
    def test_too_long_a_sequence(self, make_config, scope, by):
        """Refused before any look-up: the tokens are out of the vocabulary too."""
        model = build(LambdaBertModel, make_config(local_context_size=scope))
        inputs = {"input_ids": torch.full((1, 41), 10**6)} if by == "input_ids" else {by: torch.randn(1, 41, 20)}
        with pytest.raises(ValueError, match="max_position_embeddings") as error:
            model(**inputs)
        assert "41" in str(error.value) and "40" in str(error.value)

    def test_the_longest_sequence_passes(self, make_config, make_inputs, model_class):
        config = make_config(local_context_size=None)
        build(model_class, config)(**make_inputs(model_class, config, length=40))

    @pytest.mark.parametrize("shape", [(3, 9, 9), (3, 1, 9, 9), (3, 1, 1, 9)], ids=str)
    def test_mask_with_a_query_axis(self, make_config, make_inputs, shape):
        config = make_config()
        inputs = make_inputs(LambdaBertModel, config) | {"attention_mask": torch.ones(shape)}
        with pytest.raises(ValueError, match="attention_mask"):
            build(LambdaBertModel, config)(**inputs)

    @pytest.mark.parametrize("shape", [(3, 8), (3, 10), (2, 9), (9,)], ids=str)
    def test_mask_of_another_size(self, make_config, make_inputs, shape):
        config = make_config()
        inputs = make_inputs(LambdaBertModel, config) | {"attention_mask": torch.ones(shape)}
        with pytest.raises(ValueError, match="attention_mask") as error:
            build(LambdaBertModel, config)(**inputs)
        assert all(str(size) in str(error.value) for size in shape)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("shape", [(3, 8), (3, 10), (1, 9)], ids=str)
    def test_segments_of_another_shape(self, make_config, make_inputs, shape, padded):
        config = make_config()
        inputs = make_inputs(LambdaBertModel, config) | {"token_type_ids": torch.zeros(shape, dtype=torch.long)}
        inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0 if padded else 1
        with pytest.raises(ValueError, match="token_type_ids") as error:
            build(LambdaBertModel, config)(**inputs)
        assert all(str(size) in str(error.value) for size in shape)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("shape", [(9,), (2, 9), (3, 1), (1, 1), (1, 3, 9)], ids=str)
    def test_positions_of_another_shape(self, make_config, make_inputs, shape, padded):
        """Two rows of them would make two rows of a single text."""
        config = make_config()
        inputs = make_inputs(LambdaBertModel, config) | {"position_ids": torch.zeros(shape, dtype=torch.long)}
        inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0 if padded else 1
        with pytest.raises(ValueError, match=re.escape(f"position_ids is {list(shape)}, but there are [3, 9] tokens")):
            build(LambdaBertModel, config)(**inputs)

    @pytest.mark.parametrize("token", [60, -1])
    def test_tokens_of_another_vocabulary(self, make_config, token):
        with pytest.raises(ValueError, match=r"input_ids range from .* but there are embeddings of 0 to 59"):
            build(LambdaBertModel, make_config(vocab_size=60))(torch.tensor([[3, token]]))

    def test_segments_beyond_the_last(self, make_config):
        model = build(LambdaBertModel, make_config(type_vocab_size=1))
        with pytest.raises(ValueError, match="token_type_ids range from 0 to 1, but there are embeddings of 0 to 0:"):
            model(torch.tensor([[3, 7]]), token_type_ids=torch.tensor([[0, 1]]))

    def test_positions_beyond_the_last(self, make_config):
        model, ids = build(LambdaBertModel, make_config()), torch.full((1, 3), 7)
        model(ids, position_ids=torch.tensor([[0, 1, 39]]))
        for beyond, (lowest, highest) in (([0, 1, 40], (0, 40)), ([-1, 0, 1], (-1, 1))):
            with pytest.raises(ValueError, match=f"position_ids range from {lowest} to {highest}, but"):
                model(ids, position_ids=torch.tensor([beyond]))

    @pytest.mark.parametrize(
        "fill, value", [(0.0, -1e9), (0.0, float("-inf")), (1.0, float("nan")), (1.0, 0.5), (1, 2)]
    )
    def test_mask_of_other_numbers(self, make_config, make_inputs, model_class, fill, value):
        """Above all one to be added to attention scores, 0 for tokens, which would be taken inverted."""
        config = make_config()
        inputs = make_inputs(model_class, config)
        mask = torch.full(inputs["attention_mask"].shape, fill)
        mask[-1, ..., 5:] = value
        with pytest.raises(ValueError, match=re.escape(f"attention_mask holds {value:g}:")):
            build(model_class, config)(**inputs | {"attention_mask": mask})

    @pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "flex_attention"])
    def test_attention_implementations(self, make_config, implementation):
        with pytest.raises(ValueError, match="does not support"):
            AutoModel.from_config(make_config(), attn_implementation=implementation)

    def test_output_attentions(self, make_config, make_inputs, model_class):
        config = make_config()
        with pytest.raises(ValueError, match="output_attentions"):
            build(model_class, config)(**make_inputs(model_class, config), output_attentions=True)

    def test_output_attentions_in_the_config(self, make_config, make_inputs):
        with pytest.raises(ValueError, match="output_attentions"):
            config = make_config(output_attentions=True)
            build(LambdaBertModel, config)(**make_inputs(LambdaBertModel, config))

    @pytest.mark.parametrize("given", [(), ("input_ids", "inputs_embeds")], ids=["none", "both"])
    def test_exactly_one_input(self, make_config, given):
        inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "inputs_embeds": torch.randn(1, 4, 20)}
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            build(LambdaBertModel, make_config())(**{name: inputs[name] for name in given})

    LABELS = ["labels", "label", "next_sentence_label", "sentence_order_label", "start_positions", "end_positions"]

    def test_labels_of_other_tasks(self, make_config, make_inputs, make_labels, model_class):
        """Rather than no loss; the text names what was given and the labels that the class takes."""
        config = make_config()
        own = set(make_labels(model_class, config))
        model, inputs = build(model_class, config), make_inputs(model_class, config)
        for label in {*self.LABELS} - own:
            with pytest.raises(ValueError, match=rf"{model_class.__name__} cannot use {label}:") as error:
                model(**inputs, **{label: torch.zeros(3, dtype=torch.long)})
            assert set(str(error.value).partition("takes: ")[2].rstrip(".").split(", ")) == (own or {"none"})

    @pytest.mark.parametrize("name", ["head_mask", "encoder_hidden_states", "past_key_values", "cu_seq_lens_q"])
    def test_other_keyword_arguments_that_have_no_effect(self, make_config, make_inputs, model_class, name):
        config = make_config()
        model = build(model_class, config)
        inputs = make_inputs(model_class, config)
        with pytest.raises(ValueError, match=f"cannot use {name}"):
            model(**inputs, **{name: torch.ones(2)})
        model(**inputs, **{name: None})

    def test_none_is_not_given(self, make_config, make_inputs, model_class):
        """PEFT passes None for what its caller leaves out."""
        config = make_config(output_hidden_states=True, output_lambda_params=True)
        model, inputs = build(model_class, config), make_inputs(model_class, config)
        output = model(**inputs, output_hidden_states=None, output_lambda_params=None)
        assert len(output.hidden_states) == config.num_hidden_layers + 1
        assert len(output.lambda_params) == config.num_hidden_layers

    def test_what_tools_pass_to_every_model(self, make_config, make_inputs, model_class):
        config = make_config()
        passed = {"num_items_in_batch": torch.tensor(3), "output_attentions": None, "output_hidden_states": None}
        build(model_class, config)(**make_inputs(model_class, config), **passed, return_dict=None, use_cache=False)


class TestTrainerEvaluation:
    @pytest.mark.parametrize("model_class", [LambdaBertForMaskedLM, LambdaBertForPreTrainingSOP])
    def test_gathers_no_lambda_params(self, make_config, tmp_path, model_class):
        config = make_config(output_lambda_params=True)
        model = build(model_class, config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True
        )
        examples = ragged_examples(model_class, EQUAL_COUNTS)
        gathered = []
        trainer = Trainer(
            model=model,
            args=arguments,
            eval_dataset=examples,
            data_collator=pad_to_longest,
            compute_metrics=lambda prediction: gathered.append(prediction.predictions) or {},
        )
        metrics = trainer.evaluate()
        arrays = gathered[0] if isinstance(gathered[0], tuple) else (gathered[0],)
        assert metrics["eval_loss"] > 0
        lambda_shape = (config.key_depth, config.hidden_size // config.num_lambda_queries)
        assert all(array.shape[-2:] != lambda_shape for array in arrays)
        assert arrays[0].shape[-1] == config.vocab_size


class TestBertCheckpoint:
    def test_everything_but_attention_loads(self, make_config, tmp_path):
        fields = {"vocab_size": 60, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(1)
        bert = BertForMaskedLM(BertConfig(**fields, intermediate_size=28, max_position_embeddings=40))
        with torch.no_grad():
            for parameter in bert.parameters():
                parameter.normal_()
        bert.save_pretrained(tmp_path)
        model, report = LambdaBertForMaskedLM.from_pretrained(tmp_path, config=make_config(), output_loading_info=True)
        source = bert.state_dict()
        target = model.state_dict()
        attention = {name for name in source if ".attention.self." in name}
        lambdas = {name for name in target if ".attention.self." in name}
        assert set(source) - attention == set(target) - lambdas
        for name in set(source) - attention:
            torch.testing.assert_close(target[name], source[name], rtol=0, atol=0)
        assert lambdas and set(report["missing_keys"]) == lambdas
        assert set(report["unexpected_keys"]) == attention
        assert not report["mismatched_keys"]


class TestShapes:
    def test_tokens_without_a_batch(self, make_config):
        model = build(LambdaBertModel, make_config())
        with pytest.raises(ValueError, match=r"input_ids is \[3\]: give \[batch, length\]"):
            model(torch.tensor([1, 2, 3]))
        with pytest.raises(ValueError, match=r"inputs_embeds is \[3, 20\]: give"):
            model(inputs_embeds=torch.zeros(3, 20))
        for width in (1, 9):
            with pytest.raises(ValueError, match=rf"inputs_embeds is \[3, 5, {width}\]: give .*hidden_size=20"):
                model(inputs_embeds=torch.zeros(3, 5, width))
        choices = build(modeling.LambdaBertForMultipleChoice, make_config())
        with pytest.raises(ValueError, match=r"input_ids is \[2, 5\]: give \[batch, choices, length\]"):
            choices(torch.ones(2, 5, dtype=torch.long))
        with pytest.raises(ValueError, match=r"inputs_embeds is \[2, 5, 20\]: give \[batch, choices, length, hidden\]"):
            choices(inputs_embeds=torch.zeros(2, 5, 20))

    def test_positions_of_one_row_serve_all_choices(self, make_config, make_inputs):
        model = build(modeling.LambdaBertForMultipleChoice, make_config()).eval()
        inputs = make_inputs(type(model), model.config)
        positions = torch.arange(inputs["input_ids"].shape[-1]).flip(0)[None]
        found = model(**inputs, position_ids=positions).logits
        everywhere = positions.expand_as(inputs["input_ids"])
        torch.testing.assert_close(found, model(**inputs, position_ids=everywhere).logits, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
    @pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 2)])
    def test_labels_of_another_shape_are_not_read_row_by_row(self, make_config, make_inputs, kind, shape):
        config = make_config(num_labels=3, problem_type=kind)
        model = build(modeling.LambdaBertForSequenceClassification, config)
        inputs = make_inputs(LambdaBertModel, config, batch=2)
        with pytest.raises(ValueError, match=r"labels is .*takes \[2, 3\]"):
            model(**inputs, labels=torch.zeros(shape))

    def test_a_row_without_a_first_segment_pools_its_first_token(self, make_config):
        model = build(LambdaBertModel, make_config(classifier_pooling="sep", position_embedding_type="none"))
        ids = torch.randint(5, 20, (1, 5), generator=torch.Generator().manual_seed(0))
        alone = model(ids, torch.ones_like(ids), torch.ones_like(ids)).pooler_output
        for front, behind in ((2, 0), (0, 2)):
            padded = [
                torch.nn.functional.pad(row, (front, behind))
                for row in (ids, torch.ones_like(ids), torch.ones_like(ids))
            ]
            torch.testing.assert_close(model(*padded).pooler_output, alone)

    def test_global_scope_runs_without_data(self, make_config):
        with torch.device("meta"):
            model = LambdaBertModel(make_config(local_context_size=None, max_position_embeddings=200))
            assert model(torch.zeros(2, 100, dtype=torch.long)).last_hidden_state.shape == (2, 100, 20)
