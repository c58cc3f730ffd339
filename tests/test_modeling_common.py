"""What a transformers user expects of any encoder, for each of the nine classes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
)

import modeling_lambdabert as modeling
from configuration_lambdabert import LambdaBertConfig
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingSOP, LambdaBertModel

AUTO_CLASSES = {
    "LambdaBertModel": AutoModel,
    "LambdaBertForPreTrainingNSP": AutoModelForPreTraining,
    "LambdaBertForPreTrainingSOP": AutoModelForPreTraining,
    "LambdaBertForMaskedLM": AutoModelForMaskedLM,
    "LambdaBertForNextSentencePrediction": AutoModelForNextSentencePrediction,
    "LambdaBertForSequenceClassification": AutoModelForSequenceClassification,
    "LambdaBertForTokenClassification": AutoModelForTokenClassification,
    "LambdaBertForQuestionAnswering": AutoModelForQuestionAnswering,
    "LambdaBertForMultipleChoice": AutoModelForMultipleChoice,
}


def random_model(model_class, config, seed=0):
    """A model whose every parameter and running statistic differs from any initialisation."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2)
            if name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return model


def tensors(model):
    """All parameters and buffers, the non-persistent ones too."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same_model(model, expected):
    actual, wanted = tensors(model), tensors(expected)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].device == tensor.device, name
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=lambda m: f"{name}: {m}")


class TestSaveAndLoad:
    @pytest.mark.parametrize("scope", [5, None])
    def test_exact(self, make_config, make_inputs, model_class, scope, tmp_path):
        config = make_config(local_context_size=scope, lambda_norm="batch")
        model = random_model(model_class, config)
        model.save_pretrained(tmp_path)
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not loaded.training
        assert_same_model(loaded, model)
        inputs = make_inputs(model_class, config)
        torch.testing.assert_close(loaded(**inputs).to_tuple(), model(**inputs).to_tuple())

    @pytest.mark.parametrize("norm", ["none", "layer", "rms", "batch"])
    @pytest.mark.parametrize("scope", [1, 5, None])
    def test_every_norm_and_scope(self, make_config, norm, scope, tmp_path):
        model = random_model(LambdaBertForPreTrainingSOP, make_config(local_context_size=scope, lambda_norm=norm))
        model.save_pretrained(tmp_path)
        assert_same_model(LambdaBertForPreTrainingSOP.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("device_map", ["auto", "cpu"])
    def test_device_map(self, make_config, model_class, device_map, tmp_path):
        model = random_model(model_class, make_config(lambda_norm="batch"))
        model.save_pretrained(tmp_path)
        assert_same_model(model_class.from_pretrained(tmp_path, device_map=device_map), model)

    def test_dtype(self, make_config, make_inputs, model_class, tmp_path):
        config = make_config(local_context_size=None)
        model = random_model(model_class, config)
        model.save_pretrained(tmp_path)
        half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(half.get_parameter(name), parameter.bfloat16(), rtol=0, atol=0)
        output = half(**make_inputs(model_class, config))[0]
        assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()
        half.save_pretrained(tmp_path / "half")
        assert model_class.from_pretrained(tmp_path / "half").dtype == torch.bfloat16

    def test_shards(self, make_config, model_class, tmp_path):
        model = random_model(model_class, make_config())
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert_same_model(model_class.from_pretrained(tmp_path), model)

    def test_state_dict_round_trip(self, make_config, model_class):
        model = random_model(model_class, make_config(lambda_norm="batch"))
        other = model_class(make_config(lambda_norm="batch"))
        other.load_state_dict(model.state_dict())
        assert_same_model(other, model)

    def test_base_model_from_head_and_head_from_base(self, make_config, model_class, tmp_path):
        head = random_model(model_class, make_config())
        head.save_pretrained(tmp_path / "head")
        base = LambdaBertModel.from_pretrained(tmp_path / "head")
        source = head.base_model.state_dict()
        for name, tensor in source.items():
            torch.testing.assert_close(base.state_dict()[name], tensor, rtol=0, atol=0)
        base.save_pretrained(tmp_path / "base")
        again = model_class.from_pretrained(tmp_path / "base")
        for name, tensor in source.items():
            torch.testing.assert_close(again.base_model.state_dict()[name], tensor, rtol=0, atol=0)

    def test_resized_vocabulary(self, make_config, model_class, tmp_path):
        model = random_model(model_class, make_config())
        model.resize_token_embeddings(71)
        model.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path)
        assert loaded.config.vocab_size == 71
        assert_same_model(loaded, model)

    def test_a_checkpoint_without_gains_takes_them_on_at_0(self, make_config, model_class, tmp_path):
        """And one with them, loaded as it is, keeps them."""
        model = random_model(model_class, make_config())
        model.save_pretrained(tmp_path / "without")
        grown, report = model_class.from_pretrained(tmp_path / "without", content_gain=True, output_loading_info=True)
        gains = {name for name in grown.state_dict() if name.endswith("attention.self.content_gain")}
        assert len(gains) == 2 and report["missing_keys"] == gains
        assert not any(grown.state_dict()[name].any() for name in gains)
        assert all(torch.equal(grown.state_dict()[name], weight) for name, weight in model.state_dict().items())

        gained = random_model(model_class, make_config(content_gain=True))
        gained.save_pretrained(tmp_path / "with")
        assert_same_model(model_class.from_pretrained(tmp_path / "with"), gained)

    def test_a_checkpoint_takes_on_a_repetition_lambda_and_stays_as_it_is(self, make_config, make_inputs, tmp_path):
        model = random_model(LambdaBertModel, make_config())
        model.save_pretrained(tmp_path)
        grown = LambdaBertModel.from_pretrained(tmp_path, repetition_context_size=3).eval()
        assert not any(layer.attention.self.repetition_embeddings.any() for layer in grown.encoder.layer)
        inputs = make_inputs(LambdaBertModel, model.config)
        torch.testing.assert_close(grown(**inputs).to_tuple(), model.eval()(**inputs).to_tuple(), rtol=0, atol=0)

    @pytest.mark.parametrize("field, value", [("key_depth", 4), ("max_position_embeddings", 41)])
    def test_a_checkpoint_of_another_shape_is_refused(self, make_config, tmp_path, field, value):
        config = make_config(local_context_size=None)
        random_model(LambdaBertModel, config).save_pretrained(tmp_path)
        with pytest.raises((RuntimeError, ValueError), match="mismatched"):
            LambdaBertModel.from_pretrained(tmp_path, config=make_config(local_context_size=None, **{field: value}))

    def test_ignoring_a_mismatch_initialises_it(self, make_config, tmp_path):
        random_model(LambdaBertModel, make_config()).save_pretrained(tmp_path)
        model = LambdaBertModel.from_pretrained(
            tmp_path, config=make_config(local_context_size=9), ignore_mismatched_sizes=True
        )
        for block in model.encoder.layer:
            table = block.attention.self.relative_embeddings
            assert table.shape == (9, 3, 2) and torch.isfinite(table).all() and table.std() > 0


class TestInitialisation:
    def test_missing_weights_are_initialised_and_the_others_left_alone(self, make_config, model_class, tmp_path):
        """Of a checkpoint, half of each module's tensors are gone: those come fresh, the rest as saved."""
        config = make_config(lambda_norm="batch", tie_word_embeddings=False, hidden_size=40)
        model = random_model(model_class, config)
        names = list(model.state_dict())
        for kept in (names[::2], names[1::2]):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in kept}
            folder = tmp_path / kept[0]
            model.save_pretrained(folder, state_dict=dict(state))
            torch.manual_seed(5)
            loaded, report = model_class.from_pretrained(folder, output_loading_info=True)
            missing = set(report["missing_keys"])
            assert not any(tensor.is_meta for tensor in tensors(loaded).values())
            fresh = model_class(config)
            for name, tensor in loaded.state_dict().items():
                if name in state:
                    torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=lambda m: f"{name}: {m}")
                    continue
                wanted = fresh.state_dict()[name]
                assert name in missing or ".decoder.bias" in name or "predictions.bias" in name, name
                self.assert_same_distribution(name, tensor, wanted)

    def test_empty_checkpoint_equals_a_fresh_model(self, make_config, model_class):
        config = make_config(local_context_size=None, hidden_size=40, lambda_norm="batch")
        torch.manual_seed(5)
        loaded = model_class.from_pretrained(None, config=config, state_dict={})
        fresh = model_class(config)
        for name, tensor in tensors(fresh).items():
            self.assert_same_distribution(name, tensors(loaded)[name], tensor)

    @staticmethod
    def assert_same_distribution(name, tensor, wanted):
        assert tensor.shape == wanted.shape and tensor.dtype == wanted.dtype, name
        assert torch.isfinite(tensor).all(), name
        tensor, wanted = tensor.double(), wanted.double()
        if wanted.numel() == 1 or wanted.std() == 0 or not wanted.is_floating_point() or "_ids" in name:
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, msg=lambda m: f"{name}: {m}")
            return
        scale = wanted.std().item()
        # how many equally wide entries would spread as much; a table that decays with distance has few wide ones
        count = (3 * wanted.square().sum() ** 2 / wanted.pow(4).sum()).item()
        assert abs(tensor.mean().item() - wanted.mean().item()) < 6 * scale * (2 / count) ** 0.5, name
        assert 1 / (1 + 8 / count**0.5) < tensor.std().item() / scale < 1 + 8 / count**0.5, name

    def test_projections_and_tables_of_all_layers_differ(self, make_config):
        model = LambdaBertModel(make_config())
        first, second = (block.attention.self for block in model.encoder.layer)
        for name, parameter in first.named_parameters():
            if "norm" not in name:
                assert not torch.equal(parameter, second.get_parameter(name)), name

    def test_same_seed_same_model(self, make_config, model_class):
        models = []
        for _ in range(2):
            torch.manual_seed(3)
            models.append(model_class(make_config()))
        assert_same_model(*models)

    def test_pooler_depends_on_the_seed_unless_a_checkpoint_lacks_it(self, make_config, tmp_path):
        modeling.LambdaBertForMaskedLM(make_config()).save_pretrained(tmp_path)
        fresh, missing = [], []
        for seed in (1, 2):
            torch.manual_seed(seed)
            fresh.append(LambdaBertModel(make_config()).pooler.dense.weight)
            missing.append(LambdaBertModel.from_pretrained(tmp_path).pooler.dense.weight)
        assert not torch.equal(*fresh) and torch.equal(*missing)
        assert missing[0].std().item() == pytest.approx(make_config().initializer_range, rel=0.1)

    def test_built_on_meta(self, make_config, model_class):
        with torch.device("meta"):
            model = model_class(make_config(local_context_size=None, lambda_norm="batch"))
        assert all(parameter.is_meta for parameter in model.parameters())


class TestTiedWeights:
    HEADS = pytest.mark.parametrize(
        "head", ["LambdaBertForMaskedLM", "LambdaBertForPreTrainingSOP", "LambdaBertForPreTrainingNSP"]
    )

    @HEADS
    def test_tied_and_saved_once(self, make_config, head, tmp_path):
        model = random_model(getattr(modeling, head), make_config())
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert len([name for name in names if "word_embeddings" in name or "decoder.weight" in name]) == 1
        assert len([name for name in names if name.endswith(("predictions.bias", "decoder.bias"))]) == 1
        for twin in (model, type(model).from_pretrained(tmp_path)):
            decoder = twin.get_output_embeddings()
            assert decoder.weight is twin.get_input_embeddings().weight
            assert decoder.bias is twin.cls.predictions.bias
            parameters = list(twin.parameters())
            assert len(parameters) == len({id(parameter) for parameter in parameters})

    @HEADS
    def test_untied(self, make_config, head, tmp_path):
        model = random_model(getattr(modeling, head), make_config(tie_word_embeddings=False))
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
        assert_same_model(loaded, model)


class TestBehaviour:
    @pytest.mark.parametrize("scope", [5, None])
    @pytest.mark.parametrize("norm", ["layer", "batch"])
    def test_a_row_alone_equals_the_row_in_a_batch(self, make_config, make_inputs, model_class, scope, norm):
        config = make_config(local_context_size=scope, lambda_norm=norm)
        model = random_model(model_class, config).double()
        inputs = make_inputs(model_class, config)
        inputs["attention_mask"][1, ..., 6:] = 0
        batch = model(**inputs, output_hidden_states=True, output_lambda_params=True)
        for row in range(3):
            alone = model(
                **{name: value[row : row + 1] for name, value in inputs.items()},
                output_hidden_states=True,
                output_lambda_params=True,
            )
            for name, value in alone.items():
                for single, several in zip(*([v] if torch.is_tensor(v) else v for v in (value, batch[name]))):
                    width = len(single)
                    torch.testing.assert_close(single, several[row * width : (row + 1) * width], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("norm", ["none", "layer", "rms", "batch"])
    def test_training_reaches_every_parameter(self, make_config, make_inputs, make_labels, model_class, norm):
        config = make_config(lambda_norm=norm)
        model = random_model(model_class, config).train()
        output = model(**make_inputs(model_class, config), **make_labels(model_class, config))
        loss = output.loss if "loss" in output else output[0].square().mean() + output[1].square().mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            if name not in ("qa_outputs.bias", "classifier.bias"):  # a shift of all choices leaves their loss as it is
                assert parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_training_with_checkpointing(self, make_config, make_inputs, make_labels, head_class, use_reentrant):
        model_class = head_class
        config = make_config(lambda_norm="batch")
        plain, checkpointed = (random_model(model_class, config).train() for _ in range(2))
        checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert checkpointed.is_gradient_checkpointing
        inputs = make_inputs(model_class, config) | make_labels(model_class, config)
        for model in (plain, checkpointed):
            model(**inputs).loss.backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(checkpointed.get_parameter(name).grad, parameter.grad)
        torch.testing.assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))
        checkpointed.gradient_checkpointing_disable()
        assert not checkpointed.is_gradient_checkpointing

    def test_one_step_lowers_the_loss(self, make_config, make_inputs, make_labels, head_class):
        model_class = head_class
        config = make_config()
        torch.manual_seed(0)
        model = model_class(config).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        inputs = make_inputs(model_class, config) | make_labels(model_class, config)
        before = model(**inputs).loss
        before.backward()
        optimizer.step()
        assert model(**inputs).loss < before

    def test_evaluation_is_deterministic_and_dropout_is_not(self, make_config, make_inputs, model_class):
        config = make_config(hidden_dropout_prob=0.5, lambda_norm="batch")
        model = random_model(model_class, config)
        inputs = make_inputs(model_class, config)
        torch.testing.assert_close(model(**inputs)[0], model(**inputs)[0], rtol=0, atol=0)
        model.train()
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])

    def test_hidden_states_and_their_gradients(self, make_config, make_inputs, model_class):
        config = make_config()
        model = random_model(model_class, config)
        output = model(**make_inputs(model_class, config), output_hidden_states=True, output_lambda_params=True)
        rows = 6 if "MultipleChoice" in model_class.__name__ else 3
        assert [tuple(state.shape) for state in output.hidden_states] == [(rows, 9, 20)] * 3
        recorded = [*output.hidden_states, *output.lambda_params]
        for tensor in recorded:
            tensor.retain_grad()
        output[0].square().sum().backward()
        for tensor in recorded:
            assert tensor.grad is not None and tensor.grad.abs().max() > 0

    def test_hidden_states_by_config(self, make_config, make_inputs, model_class):
        config = make_config(output_hidden_states=True)
        assert len(model_class(config)(**make_inputs(model_class, config)).hidden_states) == 3

    @pytest.mark.parametrize("size", [1, 3, 5])
    def test_feed_forward_chunking(self, make_config, make_inputs, model_class, size):
        config = make_config()
        inputs = make_inputs(model_class, config, length=15)
        expected = random_model(model_class, config)(**inputs)[0]
        config.chunk_size_feed_forward = size
        torch.testing.assert_close(random_model(model_class, config)(**inputs)[0], expected)

    def test_config_round_trip(self, make_config, model_class, tmp_path):
        model = model_class(make_config(output_lambda_params=True))
        model.save_pretrained(tmp_path)
        loaded = type(model.config).from_pretrained(tmp_path)
        for field in ("local_context_size", "key_depth", "intra_depth", "num_lambda_queries", "lambda_norm"):
            assert getattr(loaded, field) == getattr(model.config, field)
        assert loaded.output_lambda_params and loaded.architectures == [model_class.__name__]

    def test_embeddings_can_be_set(self, make_config, make_inputs, model_class):
        config = make_config()
        model = random_model(model_class, config)
        embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        model.set_input_embeddings(embeddings)
        assert model.get_input_embeddings() is embeddings
        model(**make_inputs(model_class, config))

    def test_no_pooler(self, make_config, make_inputs):
        config = make_config()
        output = LambdaBertModel(config, add_pooling_layer=False)(**make_inputs(LambdaBertModel, config))
        assert output.pooler_output is None

    def test_deterministic_parameter_names(self, make_config, model_class):
        names = list(model_class(make_config()).state_dict())
        prefix = "" if model_class is LambdaBertModel else "bert."
        for part in ("to_queries.weight", "to_keys.weight", "to_values.weight", "relative_embeddings"):
            assert f"{prefix}encoder.layer.1.attention.self.{part}" in names


class TestAutoClasses:
    def test_from_config(self, make_config, model_class):
        config = make_config(architectures=[model_class.__name__])
        assert type(AUTO_CLASSES[model_class.__name__].from_config(config)) is model_class

    @pytest.mark.parametrize("name", [name for name in AUTO_CLASSES if name != "LambdaBertForPreTrainingSOP"])
    def test_from_a_new_config(self, make_config, name):
        assert type(AUTO_CLASSES[name].from_config(make_config())).__name__ == name

    def test_from_pretrained(self, make_config, model_class, tmp_path):
        model = random_model(model_class, make_config())
        model.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is LambdaBertConfig
        loaded = AUTO_CLASSES[model_class.__name__].from_pretrained(tmp_path)
        assert type(loaded) is model_class
        assert_same_model(loaded, model)

    @pytest.mark.parametrize("name", [name for name in AUTO_CLASSES if "PreTraining" not in name])
    def test_from_a_pretraining_checkpoint(self, make_config, name, tmp_path):
        pretrained = random_model(LambdaBertForPreTrainingSOP, make_config())
        pretrained.save_pretrained(tmp_path)
        model = AUTO_CLASSES[name].from_pretrained(tmp_path)
        assert type(model).__name__ == name
        for key, tensor in model.base_model.state_dict().items():
            torch.testing.assert_close(tensor, pretrained.bert.state_dict()[key], rtol=0, atol=0)


STRANGER = """
import os, sys
import torch
import transformers

folders, again = sys.argv[1:3]
assert not any(os.path.exists(os.path.join(path or ".", "modeling_lambdabert.py")) for path in sys.path)
for class_name, auto_class in zip(sys.argv[3::2], sys.argv[4::2]):
    folder, target = os.path.join(folders, class_name), os.path.join(again, class_name)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "LambdaBertConfig"
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == class_name, (class_name, type(model).__name__)
    inputs = torch.load(os.path.join(folder, "inputs.pt"))
    with torch.no_grad():
        output = model(**inputs)[0]
    model.save_pretrained(target)
    torch.save(inputs, os.path.join(target, "inputs.pt"))
    torch.save(output, os.path.join(target, "output.pt"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    encoded = tokenizer("a b", "c")
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1], encoded
    tokenizer.save_pretrained(target)
"""

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]


def tiny_tokenizer():
    return BertTokenizer(vocab={token: index for index, token in enumerate(TOKENS)}, model_max_length=40)


def run_elsewhere(code, *arguments, folder):
    """Runs Python code in a new process, in `folder`, that cannot import this repository."""
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


class TestRemoteCode:
    def test_a_folder_alone_serves_a_new_process(self, make_config, make_inputs, tmp_path):
        """Loaded, saved again, moved, and loaded once more by processes that have never seen these files."""
        config = make_config()
        saved = tmp_path / "saved"
        models, expected, pairs = {}, {}, []
        for name, auto_class in AUTO_CLASSES.items():
            models[name] = random_model(getattr(modeling, name), config)
            models[name].save_pretrained(saved / name)
            tiny_tokenizer().save_pretrained(saved / name)
            inputs = make_inputs(type(models[name]), config)
            torch.save(inputs, saved / name / "inputs.pt")
            expected[name] = models[name](**inputs)[0]
            pairs += [name, auto_class.__name__]
        for step in ("first", "second"):
            again = tmp_path / f"{step} saved"
            result = run_elsewhere(STRANGER, saved, again, *pairs, folder=tmp_path / step)
            assert result.returncode == 0, result.stderr[-3000:]
            for name, output in expected.items():
                torch.testing.assert_close(torch.load(again / name / "output.pt"), output)
            saved = tmp_path / f"{step} moved"
            shutil.move(again, saved)
        for name, model in models.items():
            assert_same_model(type(model).from_pretrained(saved / name), model)

    def test_every_auto_class_serves_one_folder(self, make_config, tmp_path):
        """A pretraining checkpoint opens as each of the other models too."""
        saved = tmp_path / "saved"
        random_model(LambdaBertForPreTrainingSOP, make_config()).save_pretrained(saved)
        code = (
            "import sys, transformers\n"
            "for name, wanted in zip(sys.argv[2::2], sys.argv[3::2]):\n"
            "    model = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            "    assert type(model).__name__ == wanted, (name, type(model).__name__)\n"
        )
        pairs = [
            text
            for name, auto_class in AUTO_CLASSES.items()
            if name != "LambdaBertForPreTrainingNSP"
            for text in (auto_class.__name__, name)
        ]
        result = run_elsewhere(code, saved, *pairs, folder=tmp_path / "elsewhere")
        assert result.returncode == 0, result.stderr[-3000:]

    def test_saved_files_are_flat_and_complete(self, make_config, tmp_path):
        random_model(LambdaBertForMaskedLM, make_config()).save_pretrained(tmp_path)
        files = {path.name for path in tmp_path.iterdir()}
        assert files == {
            "config.json",
            "configuration_lambdabert.py",
            "conversion_lambdabert.py",
            "lambda_kernels.py",
            "lambda_layer.py",
            "model.safetensors",
            "modeling_lambdabert.py",
            "packing_lambdabert.py",
            "repetitions_lambdabert.py",
        }
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", *(auto_class.__name__ for auto_class in AUTO_CLASSES.values())}
        assert all(target.count(".") == 1 and "--" not in target for target in auto_map.values())

    @pytest.mark.parametrize("saved", ["subclass", "subclass with its own config", "config"])
    def test_code_comes_along_whatever_is_saved(self, make_config, make_inputs, saved, tmp_path):
        """A class from a notebook has no file to be copied, and a config is often saved alone."""
        config = make_config()
        if saved == "subclass with its own config":
            config = type("NotebookConfig", (LambdaBertConfig,), {"__module__": "__main__"})(**config.to_dict())
        notebook_class = type("Notebook", (modeling.LambdaBertForTokenClassification,), {"__module__": "__main__"})
        model = random_model(notebook_class, config)
        (config if saved == "config" else model).save_pretrained(tmp_path / "saved")
        torch.save(make_inputs(notebook_class, config), tmp_path / "inputs.pt")
        code = (
            "import sys, torch, transformers\n"
            "auto = transformers.AutoModelForTokenClassification\n"
            "config = transformers.AutoConfig.from_pretrained('saved', trust_remote_code=True)\n"
            "model = auto.from_config(config, trust_remote_code=True)\n"
            "if sys.argv[1] != 'config':\n"
            "    model = auto.from_pretrained('saved', trust_remote_code=True)\n"
            "torch.save(model.eval()(**torch.load('inputs.pt')).logits, 'logits.pt')\n"
            "config.save_pretrained('again')\n"
            "again = transformers.AutoConfig.from_pretrained('again', trust_remote_code=True)\n"
            "auto.from_config(again, trust_remote_code=True)\n"
        )
        result = run_elsewhere(code, saved, folder=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        logits = torch.load(tmp_path / "logits.pt")
        if saved != "config":
            torch.testing.assert_close(logits, model(**make_inputs(notebook_class, config)).logits)

    def test_weights_alone_are_the_state_dict(self, make_config, tmp_path):
        model = random_model(LambdaBertModel, make_config(lambda_norm="batch"))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == model.state_dict().keys()


def test_auto_tokenizer_makes_token_types(make_config, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    LambdaBertForMaskedLM(make_config()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer("a b", "c")
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert encoded["input_ids"] == [2, 5, 6, 3, 7, 3]
    assert tokenizer.mask_token == "[MASK]" and tokenizer.model_max_length == 40
