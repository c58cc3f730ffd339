"""Exported programs: they compute what the model does, whatever the batch, and what cannot be exported is refused."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import export_model as command
import modeling_lambdabert
from distillation_support import move_encoder_to_subfolder
from lambdabert.deployment import checks, export, export_model
from lambdabert.deployment.loading import load_program
from lambdabert.deployment.programs import make_inputs, silence

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 140
CLASS_NAMES = [name for name in modeling_lambdabert.__all__ if name != "LambdaBertPreTrainedModel"]
SHAPES = [(2, 5), (1, 1), (4, 33), (3, LONGEST)]  # B, N
# each class, each scope, with and without position embeddings, both poolings, from float32 and bfloat16
CASES = [
    (
        name,
        (5, None)[i % 2],
        ("absolute", "none")[i // 2 % 2],
        ("cls", "sep")[i % 2],
        ("float32", "bfloat16")[i // 3 % 2],
        (3, None)[i // 2 % 2],
    )
    for i, name in enumerate(CLASS_NAMES)
]
CASES.append(("LambdaBertForMaskedLM", 5, "none", "cls", "float32", 3))  # what the pretraining command makes


def save_model(folder, make_config, name, scope, positions, dtype="float32", **fields):
    """A tiny model with weights that matter, saved with a tokenizer; returns it as it is loaded again, in float32."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    config = make_config(
        local_context_size=scope,
        position_embedding_type=positions,
        max_position_embeddings=LONGEST,
        num_hidden_layers=1,
        content_gain=True,
        **fields,
    )
    model_class = getattr(modeling_lambdabert, name)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def padded_inputs(make_inputs, model, batch, length):
    """A batch with a tail of padding, a hole, padding in front and a row of padding, as far as it has rows."""
    inputs = make_inputs(type(model), model.config, batch, length)
    mask = inputs["attention_mask"]
    mask[0, ..., (length + 1) // 2 :] = 0
    mask[0, ..., length // 4 : length // 3] = 0
    if batch > 1:
        mask[1, ..., : length // 3] = 0
    if batch > 2:
        mask[2] = 0
    return inputs


def run_session(session, inputs):
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: value.numpy() for name, value in inputs.items()})))


def assert_same(actual, expected, **tolerance):
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(torch.as_tensor(actual[name]), wanted, **tolerance)


@pytest.mark.parametrize("name,scope,positions,pooling,dtype,around", CASES)
def test_onnx_computes_what_the_model_does(
    name, scope, positions, pooling, dtype, around, make_config, make_inputs, tmp_path
):
    fields = dict(classifier_pooling=pooling, repetition_context_size=around, mask_token_id=4)
    model = save_model(tmp_path / "model", make_config, name, scope, positions, dtype, **fields)
    done = export_model(tmp_path / "model", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    axes = ["batch", "choices", "sequence"] if name.endswith("MultipleChoice") else ["batch", "sequence"]
    assert [(given.name, given.shape) for given in session.get_inputs()] == [
        (given, axes) for given in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert {axis for output in session.get_outputs() for axis in output.shape if isinstance(axis, str)} <= {*axes}
    for shape in SHAPES:
        inputs = padded_inputs(make_inputs, model, *shape)
        with torch.no_grad():
            expected = model(**inputs)
        assert_same(run_session(session, inputs), expected, rtol=1e-4, atol=1e-5)

    is_limited = scope is None or positions == "absolute"
    assert done.limit == (LONGEST if is_limited else None)
    longer = make_inputs(type(model), model.config, 1, LONGEST + 1)
    if is_limited:
        with pytest.raises(Exception, match=rf"a sequence is longer than max_position_embeddings={LONGEST} .* shorten"):
            run_session(session, longer)
    else:
        with torch.no_grad():
            assert_same(run_session(session, longer), model(**longer), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["model_type"] == "lambdabert" and config["architectures"] == [name]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx", trust_remote_code=False)
    assert set(tokenizer("a b")) == {given.name for given in session.get_inputs()}
    assert tokenizer.model_max_length == (LONGEST if is_limited else VERY_LARGE_INTEGER)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("scope", [5, None])
def test_torch_program_computes_what_the_model_does(scope, make_config, make_inputs, tmp_path):
    model = save_model(tmp_path / "model", make_config, "LambdaBertForTokenClassification", scope, "absolute")
    done = export_model(tmp_path / "model", tmp_path / "program", format="torch")
    program = torch.export.load(done.file).module()
    for shape in SHAPES:
        inputs = padded_inputs(make_inputs, model, *shape)
        with torch.no_grad():
            assert_same(program(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=rf"{LONGEST}"):
        program(**make_inputs(type(model), model.config, 1, LONGEST + 1))


@pytest.mark.parametrize("around", [None, 3])
def test_int8_computes_nearly_what_the_model_does(make_config, make_inputs, tmp_path, around):
    """Linear layers have 8-bit weights, the shared matrix of the MLM head among them, and no other product has."""
    sizes = dict(hidden_size=64, intermediate_size=256, num_lambda_queries=4, vocab_size=300)
    sizes |= dict(repetition_context_size=around, mask_token_id=4)
    model = save_model(tmp_path / "model", make_config, "LambdaBertForMaskedLM", None, "absolute", **sizes)
    done = export_model(tmp_path / "model", tmp_path / "int8", quantize="int8")
    inputs = padded_inputs(make_inputs, model, 4, 70)
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(**inputs).logits
    actual = torch.as_tensor(run_session(session, inputs)["logits"])
    assert 1e-5 < (actual - expected).norm() / expected.norm() < 0.1
    graph = onnx.load(done.file).graph
    eight_bits = {tuple(weight.dims) for weight in graph.initializer if weight.data_type == onnx.TensorProto.INT8}
    weights = {tuple(layer.weight.T.shape) for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    assert {shape for shape in eight_bits if len(shape) == 2} == weights
    scales = {tuple(scale.dims) for scale in graph.initializer if scale.name.endswith("_scale")}
    assert scales == {shape[1:] for shape in weights}, "one for each output channel"
    products = sum(node.op_type == "MatMulInteger" for node in graph.node)
    assert products == sum(isinstance(layer, torch.nn.Linear) for layer in model.modules())
    assert [file.name for file in (tmp_path / "int8").glob("*.onnx*")] == ["model.onnx"]


def test_int8_depends_slightly_on_the_batch(make_config, make_inputs, tmp_path):
    """Its scales are those of whole batches, padding included."""
    sizes = dict(hidden_size=64, intermediate_size=256, num_lambda_queries=4, vocab_size=300)
    model = save_model(tmp_path / "model", make_config, "LambdaBertModel", 5, "none", **sizes)
    done = export_model(tmp_path / "model", tmp_path / "int8", quantize="int8")
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    inputs = make_inputs(type(model), model.config, 4, 40)
    inputs["attention_mask"][0, 12:] = 0
    together = run_session(session, inputs)["last_hidden_state"][0, :12]
    alone = run_session(session, {name: value[:1, :12] for name, value in inputs.items()})["last_hidden_state"][0]
    assert 1e-5 < np.linalg.norm(together - alone) / np.linalg.norm(alone) < 0.05


def test_a_repetition_lambda_moves_whole_rows(make_config, tmp_path):
    """Only the token ids go number by number: of values, that takes onnxruntime 25 times as long."""
    fields = dict(repetition_context_size=3, mask_token_id=4)
    save_model(tmp_path / "model", make_config, "LambdaBertModel", 5, "none", **fields)
    done = export_model(tmp_path / "model", tmp_path / "onnx")
    operators = [node.op_type for node in onnx.load(done.file).graph.node]
    assert operators.count("ScatterElements") == operators.count("GatherElements") == 1
    assert operators.count("ScatterND") == 2  # how often tokens occur, and the values of one layer


def test_a_model_without_pooling_layer_has_no_pooler_output(make_config, tmp_path):
    """Its random one would be exported otherwise."""
    config = make_config(num_hidden_layers=1)
    modeling_lambdabert.LambdaBertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    done = export_model(tmp_path / "model", tmp_path / "program", format="torch")
    assert done.outputs == ("last_hidden_state",)


@pytest.mark.parametrize(
    "fields",
    [
        dict(return_dict=False),
        dict(output_hidden_states=True),
        dict(output_lambda_params=True),
        dict(chunk_size_feed_forward=4),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_a_config_says_of_running_changes_no_program(make_config, tmp_path, fields):
    config = make_config(num_hidden_layers=1, **fields)
    modeling_lambdabert.LambdaBertModel(config).save_pretrained(tmp_path / "model")
    done = export_model(tmp_path / "model", tmp_path / "program", format="torch")
    assert done.outputs == ("last_hidden_state", "pooler_output")


def test_an_encoder_may_name_no_class(make_config, tmp_path):
    save_model(tmp_path, make_config, "LambdaBertModel", 5, "none")
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert type(load_program(tmp_path).program.model) is modeling_lambdabert.LambdaBertModel


@pytest.mark.parametrize("choices", [False, True])
def test_the_check_runs_on_all_kinds_of_padding_and_on_tokens_that_come_again(choices):
    config = SimpleNamespace(vocab_size=10**9, mask_token_id=4, type_vocab_size=2)
    inputs = make_inputs(SimpleNamespace(config=config, takes_choices=choices), 3, 90)
    mask, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
    assert mask[0, ..., 0].all() and not mask[0, ..., -1].any()
    assert mask[1, ..., -1].all() and not mask[1, ..., 0].any()
    assert not mask[2].any()
    assert (ids == config.mask_token_id).sum() > 1
    assert len(ids.unique()) < 0.7 * ids.numel()


def test_logging_is_as_before_when_exporters_are_done():
    loggers = logging.getLogger(), logging.getLogger("torch.onnx")
    before = [logger.level for logger in loggers]
    with pytest.raises(ArithmeticError), silence():
        assert [logger.level for logger in loggers] == [logging.ERROR] * 2
        raise ArithmeticError
    assert [logger.level for logger in loggers] == before


class TestMistakes:
    @pytest.fixture
    def model(self, make_config, tmp_path):
        save_model(tmp_path / "model", make_config, "LambdaBertModel", 5, "none")
        return tmp_path / "model"

    def refuses(self, capsys, tmp_path, *arguments):
        """The one line of a command that fails and leaves nothing behind."""
        before = sorted(tmp_path.rglob("*"))
        assert command.main([str(argument) for argument in arguments]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    def test_format_and_quantisation(self, model, tmp_path, capsys):
        said = self.refuses(capsys, tmp_path, model, "--format", "onx", "--output", tmp_path / "out")
        assert "format=onx is unknown; use one of onnx, torch" in said
        said = self.refuses(
            capsys, tmp_path, model, "--format", "torch", "--quantize", "int8", "--output", tmp_path / "out"
        )
        assert "quantize=int8 is not possible with format=torch; use format=onnx" in said
        said = self.refuses(capsys, tmp_path, model, "--quantize", "int4", "--output", tmp_path / "out")
        assert "quantize=int4 is not possible" in said and "quantize=int8" in said
        assert "--output" in self.refuses(capsys, tmp_path, model)

    def test_folders_that_are_no_lambdabert(self, model, teachers, tmp_path, capsys):
        out = tmp_path / "out"
        assert "is not a folder" in self.refuses(capsys, tmp_path, tmp_path / "nothing", "--output", out)
        (tmp_path / "empty").mkdir()
        assert "holds no config.json" in self.refuses(capsys, tmp_path, tmp_path / "empty", "--output", out)
        said = self.refuses(capsys, tmp_path, teachers / "plain", "--output", out)
        assert "is of type bert" in said and "distill_from_bert.py" in said
        (model / "model.safetensors").write_bytes(b"nonsense")
        assert "its weights are damaged" in self.refuses(capsys, tmp_path, model, "--output", out)

    @pytest.mark.parametrize("content", ["", "[1]", '{"model_type": "lambdabert"'])
    def test_broken_config(self, model, tmp_path, capsys, content):
        (model / "config.json").write_text(content)
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert f"{model / 'config.json'} cannot be read" in said and "save the model again" in said

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", ["", "{", "[1]"])
    def test_broken_tokenizer(self, model, tmp_path, capsys, file, content):
        (model / file).write_text(content)
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert f"model={model} has no tokenizer that can be read" in said and "save it there" in said

    def test_a_vocabulary_alone(self, model, tmp_path, capsys):
        for file in model.glob("tokenizer*"):
            file.unlink()
        (model / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert f"model={model} has no tokenizer that can be read" in said

    def test_broken_pooling_of_sentences(self, sentences, tmp_path, capsys):
        (file,) = sentences.glob("*Pooling/config.json")
        file.write_text("{")
        said = self.refuses(capsys, tmp_path, sentences, "--output", tmp_path / "out")
        assert f"model={sentences} cannot be read" in said and "save the model again" in said

    @pytest.mark.parametrize("content", ["", "[1]", "[{}]", "5"])
    def test_broken_list_of_modules(self, model, tmp_path, capsys, content):
        (model / "modules.json").write_text(content)
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert "modules.json cannot be read" in said and "save the model again" in said

    def test_weights_that_would_be_random(self, model, tmp_path, capsys):
        config = json.loads((model / "config.json").read_text()) | {"architectures": ["LambdaBertForMaskedLM"]}
        (model / "config.json").write_text(json.dumps(config))
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert "has no weights for cls.predictions" in said and "architectures" in said

    def test_weights_of_another_size(self, model, tmp_path, capsys):
        config = json.loads((model / "config.json").read_text()) | {"intermediate_size": 30}
        (model / "config.json").write_text(json.dumps(config))
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert f"{model}: its weights are damaged or do not fit its config" in said

    def test_an_adapter_alone(self, model, tmp_path, capsys):
        (model / "adapter_config.json").write_text("{}")
        (model / "model.safetensors").unlink()
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert "holds an adapter and not its model" in said and "merge_and_unload" in said

    def test_a_class_of_somebody_else(self, model, tmp_path, capsys):
        """Whose head would be lost."""
        config = json.loads((model / "config.json").read_text()) | {"architectures": ["MyClassifier"]}
        (model / "config.json").write_text(json.dumps(config))
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert "was saved as a MyClassifier, which is not of this library" in said

    @pytest.fixture
    def sentences(self, sentence_student, tmp_path):
        return Path(shutil.copytree(sentence_student[0], tmp_path / "sentences"))

    def test_a_sentence_encoder_that_lacks_weights(self, sentences, tmp_path, capsys):
        file = sentences / "model.safetensors"
        lost = "encoder.layer.0.attention.self.to_values.weight"
        save_file({name: weight for name, weight in load_file(file).items() if name != lost}, file)
        said = self.refuses(capsys, tmp_path, sentences, "--output", tmp_path / "out")
        assert f"has no weights for {lost}, which would be random" in said

    @pytest.mark.parametrize(
        "changes, named",
        [
            ({"config_sentence_transformers.json": {"truncate_dim": 8}}, "cuts its vectors to truncate_dim=8"),
            (
                {
                    "config_sentence_transformers.json": {"prompts": {"query": "the fox: "}},
                    "*Pooling/config.json": {"include_prompt": False},
                },
                "leaves the tokens of its prompts out",
            ),
            ({"sentence_bert_config.json": {"do_lower_case": True}}, "puts do_lower_case=true before a cased"),
        ],
        ids=["vectors are cut", "prompts are left out", "letters are lowered"],
    )
    def test_what_one_program_cannot_follow(self, sentences, tmp_path, capsys, changes, named):
        for name, fields in changes.items():
            (file,) = sentences.glob(name)
            file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        assert named in self.refuses(capsys, tmp_path, sentences, "--output", tmp_path / "out")

    def test_prompts_without_words_may_be_left_out(self, sentences):
        """There are no tokens of theirs."""
        (file,) = sentences.glob("*Pooling/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"include_prompt": False}))
        file = sentences / "config_sentence_transformers.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": {"query": "", "document": ""}}))
        assert len(load_program(sentences).program.sentence_modules) == 2

    def test_a_sentence_encoder_in_a_subfolder(self, sentences, teachers):
        encoder = move_encoder_to_subfolder(sentences)
        assert load_program(sentences).tokenizer.model_max_length == 24
        shutil.copy(teachers / "plain" / "config.json", encoder)
        with pytest.raises(ValueError, match="0_Transformer is of type bert"):
            load_program(sentences)

    def test_an_output_that_holds_something(self, model, tmp_path, capsys):
        for output in (model, model / "config.json"):
            said = self.refuses(capsys, tmp_path, model, "--output", output)
            assert f"output={output} exists and is not overwritten" in said
        said = self.refuses(capsys, tmp_path, model, "--output", model / "config.json" / "out")
        assert "you may not write" in said

    def test_missing_packages(self, model, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(export, "find_spec", lambda package: None if package == "onnxruntime" else package)
        said = self.refuses(capsys, tmp_path, model, "--output", tmp_path / "out")
        assert "onnxruntime is not installed: pip install onnx onnxscript onnxruntime" in said

    def test_a_program_that_computes_something_else(self, model, tmp_path, capsys, monkeypatch):
        wrong = torch_call_with_error(checks.torch_call)
        monkeypatch.setitem(export.FORMATS, "torch", export.Format("model.pt2", export.write_torch, wrong))
        said = self.refuses(capsys, tmp_path, model, "--format", "torch", "--output", tmp_path / "out")
        assert "deviates by" in said and "nothing was written" in said


def test_the_check_sees_what_stands_beside_the_least_number():
    """A model of questions has the least number of its type where no answer can be; no error would show beside it."""
    logits = torch.tensor([[1.0, 2.0, torch.finfo(torch.float32).min]])
    loaded = SimpleNamespace(program=lambda **inputs: {"start_logits": logits.clone()}, limit=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checks, "make_inputs", lambda *args: {})
        same = checks.largest_deviation(loaded, lambda inputs: {"start_logits": logits.clone()})
        assert same == (("start_logits",), 0.0)
        swapped = logits[:, [1, 0, 2]]
        assert checks.largest_deviation(loaded, lambda inputs: {"start_logits": swapped})[1] > 0.5
        with pytest.raises(ValueError, match="not finite"):
            checks.largest_deviation(loaded, lambda inputs: {"start_logits": logits.clamp(min=-1e9)})


@pytest.fixture
def loaded_ones(monkeypatch):
    """A program whose one output is [1, 1] in every batch."""
    monkeypatch.setattr(checks, "make_inputs", lambda *args: {})
    return SimpleNamespace(program=lambda **inputs: {"logits": torch.ones(2)}, limit=None)


def test_the_largest_deviation_of_a_batch_counts(loaded_ones):
    factors = iter([1, 1, 1, 2, 1])
    found = checks.largest_deviation(loaded_ones, lambda inputs: {"logits": next(factors) * torch.ones(2)})
    assert found == (("logits",), pytest.approx(1))


@pytest.mark.parametrize(
    "outputs, said",
    [
        ({"logits": torch.tensor([1.0, torch.nan])}, "not finite"),
        ({"scores": torch.ones(2)}, "gives scores in place of logits"),
        ({"logits": torch.ones(3)}, r"logits of the exported program is \[3\] and of the model \[2\] at batch 1"),
    ],
    ids=["nan", "another name", "another shape"],
)
def test_outputs_that_no_number_compares_are_refused(loaded_ones, outputs, said):
    with pytest.raises(ValueError, match=said):
        checks.largest_deviation(loaded_ones, lambda inputs: outputs)


def test_a_program_that_fails_is_refused(loaded_ones):
    def fail(inputs):
        raise RuntimeError("no such operator")

    with pytest.raises(ValueError, match="fails at batch 1 and length 1: no such operator"):
        checks.largest_deviation(loaded_ones, fail)


def test_outputs_of_zeros_are_compared(loaded_ones):
    loaded_ones.program = lambda **inputs: {"logits": torch.zeros(2)}
    assert checks.largest_deviation(loaded_ones, lambda inputs: {"logits": torch.zeros(2)})[1] == 0
    assert checks.largest_deviation(loaded_ones, lambda inputs: {"logits": torch.full((2,), 1e-9)})[1] > 1


def torch_call_with_error(read):
    """Reads a program whose outputs are off by a thousandth."""

    def call_of(file):
        call = read(file)
        return lambda inputs: {name: 1.001 * output for name, output in call(inputs).items()}

    return call_of


@pytest.fixture(scope="module")
def sentence_student(sentence_teacher, tmp_path_factory):
    """A sentence-transformers model of a LambdaBERT."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = sentence_transformers.sentence_transformer.modules
    folder = tmp_path_factory.mktemp("student")
    modeling_lambdabert.LambdaBertModel.from_bert(sentence_teacher).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(sentence_teacher).save_pretrained(folder / "encoder")
    transformer = modules.Transformer(str(folder / "encoder"), max_seq_length=24)
    student = sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(24, "mean"), modules.Normalize()], device="cpu"
    )
    student.save(str(folder / "sentences"))
    return folder / "sentences", student


def test_sentence_vectors_are_the_same_in_onnxruntime(sentence_student, text, tmp_path, monkeypatch):
    """By the lines of docs/deploying.md."""
    folder, student = sentence_student
    assert command.main([str(folder), "--output", str(tmp_path / "models" / "sentences_onnx")]) == 0
    lines = [line for line in (text / "train.txt").read_text().splitlines() if line.strip()][:9]
    texts = [*lines, " ".join(lines), "fox"]  # one above the limit
    page = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
    snippet = next(part for part in page.split("```python\n")[1:] if "sentence_embedding" in part).partition("```")[0]
    monkeypatch.chdir(tmp_path)
    of_page = '["One sentence.", "Another."]'
    assert of_page in snippet
    names = {}
    exec(snippet.replace(of_page, repr(texts)), names)
    np.testing.assert_allclose(names["vectors"], student.encode(texts), atol=1e-5)


def test_max_pooling_of_a_text_without_tokens_is_minus_infinity_in_both(sentence_student, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = sentence_transformers.sentence_transformer.modules
    _, student = sentence_student
    student = sentence_transformers.SentenceTransformer(modules=[student[0], modules.Pooling(24, "max")], device="cpu")
    student.save(str(tmp_path / "sentences"))
    assert command.main([str(tmp_path / "sentences"), "--output", str(tmp_path / "onnx")]) == 0
    call = checks.onnx_call(tmp_path / "onnx" / "model.onnx")
    inputs = student.preprocess(["the fox sees a red boat", "night"])
    mask = inputs["attention_mask"]
    ids = {"token_type_ids": torch.zeros_like(mask), "input_ids": inputs["input_ids"], "attention_mask": mask}
    found = call(ids)["sentence_embedding"]
    np.testing.assert_allclose(found, student.encode(["the fox sees a red boat", "night"]), atol=1e-5)
    assert (call(ids | {"attention_mask": torch.zeros_like(mask)})["sentence_embedding"] == -torch.inf).all()


@pytest.mark.parametrize("name", ["LambdaBertForMaskedLM", "LambdaBertForPreTrainingSOP"])
def test_example_runs_a_pipeline(make_config, tmp_path, name):
    model = save_model(tmp_path / "model", make_config, name, 5, "none")
    export_model(tmp_path / "model", tmp_path / "onnx")
    done = subprocess.run(
        [sys.executable, "-m", "examples.onnx_pipeline", "fill-mask", tmp_path / "onnx", "a [MASK] c"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    with torch.no_grad():
        logits = model(**tokenizer("a [MASK] c", return_tensors="pt"))[0][0, 2]
    found = [eval(line) for line in done.stdout.splitlines()]
    assert [answer["token"] for answer in found] == logits.topk(5).indices.tolist()
    assert found[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-3)


def test_example_labels_words_by_their_first_pieces(make_config, tmp_path):
    model = save_model(tmp_path / "model", make_config, "LambdaBertForTokenClassification", 5, "none")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "onnx")
    text = "abc hd fge"
    done = subprocess.run(
        [sys.executable, "-m", "examples.onnx_pipeline", "token-classification", tmp_path / "onnx", text],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = [eval(line, {"np": np}) for line in done.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    with torch.no_grad():
        labels = model(**tokenizer(text, return_tensors="pt")).logits[0].argmax(-1).tolist()
    of_words = {word: model.config.id2label[labels[place]] for word, place in (("abc", 1), ("hd", 4), ("fge", 6))}
    found = {word: entity["entity_group"] for entity in words for word in entity["word"].split()}
    assert len(set(labels[1:-1])) > 1 and found == of_words


def test_a_link_to_an_empty_folder_is_written_and_the_current_folder_is_not(make_config, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model", make_config, "LambdaBertForMaskedLM", 5, "none")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export_model(tmp_path / "model", tmp_path / "link")
    assert (tmp_path / "there" / "model.onnx").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert command.main([str(tmp_path / "model"), "--output", "."]) == 1
    assert "output=. is the current folder" in capsys.readouterr().err
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "there")
    (tmp_path / "other" / "there").mkdir(parents=True)
    assert command.main([str(tmp_path / "model"), "--output", str(tmp_path / "other" / "there")]) == 1
    assert "is a mounted folder, which cannot be replaced" in capsys.readouterr().err
