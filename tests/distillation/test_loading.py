"""Loading a teacher."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, RobertaConfig, RobertaModel

import modeling_lambdabert
from distillation_support import move_encoder_to_subfolder
from lambdabert.distillation.loading import (
    STUDENTS,
    load_bert_and_tokenizer,
    load_sentence_transformer,
    load_teacher,
    weights_hash,
)
from lambdabert.distillation.teacher import Teacher
from lambdabert.saved_models import check_case
from modeling_lambdabert import LambdaBertModel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_teachers_compute_in_float32_whatever_they_are_stored_in(teachers, sentence_teacher, tmp_path, caplog, dtype):
    for folder in (teachers / "classifier", sentence_teacher):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        weights = load_file(copy / "model.safetensors")
        save_file({name: weight.to(dtype) for name, weight in weights.items()}, copy / "model.safetensors")
        fields = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(fields | {"dtype": str(dtype).removeprefix("torch.")}))
    bert, _ = load_bert_and_tokenizer(str(tmp_path / "classifier"))
    sentences = load_sentence_transformer(str(tmp_path / "sentences"))
    for model in (bert, sentences):
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_precision_of_an_encoder_in_a_subfolder_is_reported(sentence_teacher, tmp_path, caplog):
    folder = tmp_path / "sentences"
    shutil.copytree(sentence_teacher, folder)
    encoder = move_encoder_to_subfolder(folder)
    fields = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(fields | {"dtype": "float16"}))
    with caplog.at_level("INFO", "lambdabert"):
        load_sentence_transformer(str(folder))
    assert f"teacher={folder} is stored in float16" in caplog.text


def test_the_precision_of_a_bert_is_reported(teachers, tmp_path, caplog):
    shutil.copytree(teachers / "plain", tmp_path / "bert")
    fields = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(fields | {"dtype": "float16"}))
    with caplog.at_level("INFO", "lambdabert"):
        load_bert_and_tokenizer(str(tmp_path / "bert"))
    assert f"teacher={tmp_path / 'bert'} is stored in float16" in caplog.text


def test_one_number_makes_another_teacher(teachers):
    bert, again = (BertModel.from_pretrained(teachers / "plain") for _ in range(2))
    assert weights_hash(bert) == weights_hash(again)
    with torch.no_grad():
        again.encoder.layer[1].output.dense.bias[3] += 1e-3
    assert weights_hash(bert) != weights_hash(again)


def test_a_model_of_choices_is_refused(teachers, tmp_path):
    shutil.copytree(teachers / "plain", tmp_path / "choices")
    fields = json.loads((tmp_path / "choices" / "config.json").read_text())
    (tmp_path / "choices" / "config.json").write_text(json.dumps(fields | {"architectures": ["BertForMultipleChoice"]}))
    with pytest.raises(ValueError, match="is a BertForMultipleChoice, which this command does not train"):
        load_teacher(str(tmp_path / "choices"))


def test_lower_casing_that_no_tokenizer_keeps_is_refused(sentence_teacher):
    sentences = load_sentence_transformer(str(sentence_teacher))
    sentences[0].do_lower_case, sentences.tokenizer.do_lower_case = True, False
    with pytest.raises(ValueError, match="^teacher=x puts do_lower_case=true before a cased tokenizer"):
        check_case(sentences, "teacher=x")
    sentences.tokenizer.do_lower_case = True
    check_case(sentences, "teacher=x")


def test_a_teacher_with_lower_casing_that_no_tokenizer_keeps_is_refused(sentence_teacher, tmp_path):
    shutil.copytree(sentence_teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": True}))
    with pytest.raises(ValueError, match="puts do_lower_case=true before a cased tokenizer"):
        load_teacher(str(tmp_path / "teacher"))


def sentence_model(encoder, folder, *following):
    """The folder of a sentence-transformers model with mean pooling."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(
        modules=[modules.Transformer(str(encoder)), modules.Pooling(24), *following], device="cpu"
    )
    model.save(str(folder))
    return str(folder)


def test_a_sentence_encoder_of_another_architecture_is_refused(teachers, tmp_path):
    fields = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=1, intermediate_size=28, vocab_size=200)
    RobertaModel(RobertaConfig(**fields)).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(teachers / "plain").save_pretrained(tmp_path / "encoder")
    teacher = sentence_model(tmp_path / "encoder", tmp_path / "teacher")
    with pytest.raises(ValueError, match="model_type='roberta'"):
        load_teacher(teacher)


def test_a_sentence_model_without_an_encoder_is_refused(teachers, tmp_path):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    words = modules.StaticEmbedding(AutoTokenizer.from_pretrained(teachers / "plain"), embedding_dim=8)
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(modules=[words], device="cpu")
    model.save(str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="starts with a StaticEmbedding, not with a BERT"):
        load_teacher(str(tmp_path / "teacher"))


def test_weights_after_the_encoder_that_are_not_finite_are_refused(teachers, tmp_path):
    dense = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Dense(24, 8)
    dense.linear.weight.data[0] = torch.nan
    teacher = sentence_model(teachers / "plain", tmp_path / "teacher", dense)
    with pytest.raises(ValueError, match="has weights that are not finite .*linear.weight"):
        load_teacher(teacher)


def test_every_student_is_one_of_its_teachers_kind():
    for teacher, student in STUDENTS.items():
        assert issubclass(getattr(modeling_lambdabert, student), getattr(transformers, teacher))
    others = {"LambdaBertPreTrainedModel", "LambdaBertForMultipleChoice", "LambdaBertForPreTrainingSOP"}
    assert {*STUDENTS.values(), *others} == set(modeling_lambdabert.__all__)


def test_chunks_of_a_teacher_are_none_of_the_students(teachers):
    bert = BertModel.from_pretrained(teachers / "plain", chunk_size_feed_forward=4)
    assert Teacher(bert).model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state.shape[1] == 5
    assert LambdaBertModel.from_bert(bert).config.chunk_size_feed_forward == 0


def without(folder, copy, prefix):
    """A copy of a folder whose file has no weights of that prefix."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


@pytest.mark.parametrize("prefix", ["classifier.", "bert.pooler.", "bert.encoder.layer.0.output."])
def test_a_teacher_that_lacks_weights_is_refused(teachers, tmp_path, prefix):
    with pytest.raises(ValueError, match=f"has no weights for {prefix}.*BertForSequenceClassification"):
        load_teacher(without(teachers / "classifier", tmp_path / "teacher", prefix))


def test_a_sentence_encoder_that_lacks_weights_is_refused(sentence_teacher, tmp_path):
    with pytest.raises(ValueError, match="has no weights for encoder.layer.1.output.dense.bias"):
        load_teacher(without(sentence_teacher, tmp_path / "teacher", "encoder.layer.1.output.dense.bias"))


def test_a_pooler_that_was_not_saved_is_none_of_the_teachers(teachers, sentence_teacher, tmp_path):
    for folder in (teachers / "plain", sentence_teacher):
        teacher, _, sentences = load_teacher(without(folder, tmp_path / folder.name, "pooler."))
        student = LambdaBertModel.from_bert(teacher.model)
        assert {name for name in student.conversion_report.fresh if "attention" not in name} == {
            "pooler.dense.weight",
            "pooler.dense.bias",
        }
        assert sentences is None or sentences.encode("the fox").shape == (24,)
