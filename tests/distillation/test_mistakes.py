"""What the command that turns a BERT into a LambdaBERT says to a mistake."""

import math
import shutil

import pytest
from transformers import (
    AutoTokenizer,
    RobertaConfig,
    RobertaModel,
)

import distill_from_bert
import lambdabert.training.run
from distillation_support import write_recipe
from training_support import (
    tiny_bert,
)

BEST = {"load_best_model_at_end": True, "save_steps": 6, "attention_steps": 0}


class TestMistakes:
    """Each ends in one line that names what to change, before anything is written."""

    AFTER_READING = {"per_device_train_batch_size"}  # it depends on how much text there is

    def complaint(self, capfd, tmp_path, text, teacher, **values):
        recipe = write_recipe(tmp_path / "run.json", text, teacher, **values)
        assert distill_from_bert.main([recipe]) == 1
        printed = capfd.readouterr().err
        assert "Traceback" not in printed and not (tmp_path / "run").exists()
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed
        return lines[0]

    @pytest.mark.parametrize(
        "values, named",
        [
            ({"do_train": False, "do_eval": False}, "--do_train"),
            ({"do_train": False}, "--do_train"),
            ({"do_train": None}, "--do_train"),
            ({"layers_weight": math.nan}, "layers_weight=nan"),
            ({"attention_learning_rate": math.inf}, "attention_learning_rate=inf"),
            ({"attention_steps": math.nan}, "attention_steps=nan"),
            ({"attention_steps": 0, "attention_learning_rate": 1e-3}, "attention_learning_rate=0.001 has no effect"),
            ({"mlm_probability": 0.3}, "mlm_probability: nothing is masked"),
            ({"whole_word_mask": True}, "whole_word_mask: nothing is masked"),
            ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
            ({"metric_for_best_model": "sentences", **BEST}, "metric_for_best_model=sentences"),
            ({"report_to": "flyte"}, "report_to=flyte"),
            ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 1}}, "cycles"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
            ({"max_steps": "12"}, "max_steps"),
            ({"layers_weight": "1"}, "layers_weight"),
            ({"max_position_embeddings": 10**12}, "GiB"),
            (
                {"config_overrides": {"max_position_embeddings": 60}, "max_position_embeddings": 50},
                "config_overrides, too",
            ),
            ({"teacher": None}, "--teacher"),
            ({"teacher": "nowhere"}, "nowhere"),
            ({"teacher": "nobody/nothing"}, "nobody/nothing"),
            ({"config_overrides": {"key_dept": 3}}, "key_dept"),
            ({"config_overrides": {"num_lambda_queries": 5}}, "num_lambda_queries=5"),
            ({"config_overrides": {"hidden_size": 48}}, "hidden_size=48"),
            ({"config_overrides": "key_depth"}, "field=value"),
            (
                {"config_overrides": {"repetition_context_size": 3, "mask_token_id": 3}},
                "mask_token_id=3 of the model contradicts the tokenizer",
            ),
            ({"max_seq_length": 41}, "teacher's max_position_embeddings=40"),
            ({"max_position_embeddings": 20}, "student's max_position_embeddings=20"),
            (
                {"pad_to_multiple_of": 27},
                "pads rows to 54 tokens, which exceeds the teacher's max_position_embeddings=40",
            ),
            ({"max_seq_length": 2}, "max_seq_length=2"),
            ({"examples": "words"}, "words"),
            ({"masked_tokens_weight": 1}, "masked_tokens_weight=1"),
            ({"sentences_weight": 1}, "sentences_weight=1"),
            ({"layers_weight": -1}, "layers_weight=-1"),
            ({"layers_weight": 0, "classes_weight": 0}, "Every weight is 0"),
            ({"per_device_train_batch_size": 400}, "800 of one step"),
            ({"attention_steps": -1}, "attention_steps=-1"),
            ({"attention_steps": 13}, "attention_steps=13 exceeds max_steps=12"),
            ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type=reduce_lr_on_plateau"),
            ({"learning_rate": 0}, "learning_rate=0"),
            ({"streaming": True, "max_steps": None}, "--max_steps"),
            ({"lerning_rate": 1}, "lerning_rate"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_options(self, capfd, tmp_path, text, teachers, monkeypatch, values, named):
        read, load = [], lambdabert.training.run.load_corpus

        def recorded(*args, **kwargs):
            read.append(args)
            return load(*args, **kwargs)

        monkeypatch.setattr(lambdabert.training.run, "load_corpus", recorded)
        teacher = values.get("teacher", teachers / "classifier")
        options = {name: value for name, value in values.items() if name != "teacher"}
        assert named in self.complaint(capfd, tmp_path, text, teacher, **options)
        assert not read or set(values) & self.AFTER_READING

    def test_a_first_stage_longer_than_the_epochs(self, capfd, tmp_path, text, teachers):
        epochs = {"max_steps": None, "num_train_epochs": 2}
        recipe = write_recipe(tmp_path / "run.json", text, teachers / "classifier", attention_steps=31, **epochs)
        assert distill_from_bert.main([recipe]) == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "attention_steps=31 exceeds the 30 steps of num_train_epochs=2" in lines[0]
        assert not list((tmp_path / "run").iterdir())

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
    @pytest.mark.parametrize("content", ["", "[1]", '{"model_type": "bert", "hidden_size": "wide", "model": 5}'])
    def test_broken_files(self, capfd, tmp_path, text, teachers, name, content):
        shutil.copytree(teachers / "classifier", tmp_path / "teacher")
        (tmp_path / "teacher" / name).write_text(content)
        assert str(tmp_path / "teacher") in self.complaint(capfd, tmp_path, text, tmp_path / "teacher")

    @pytest.mark.parametrize(
        "fields, named",
        [
            ({"is_decoder": True}, "is_decoder"),
            ({"is_decoder": True, "add_cross_attention": True}, "is_decoder"),
            ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
            ({"vocab_size": 150}, "vocab_size=150"),
            ({"vocab_size": 900}, "vocab_size=900"),
        ],
    )
    def test_teachers(self, capfd, tmp_path, text, fields, named):
        teacher = tmp_path / "teacher"
        tiny_bert(**{"vocab_size": 200, **fields}).save_pretrained(teacher)
        AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(teacher)
        assert named in self.complaint(capfd, tmp_path, text, teacher)

    def test_teacher_without_tokenizer(self, capfd, tmp_path, text):
        tiny_bert().save_pretrained(tmp_path / "teacher")
        assert "no tokenizer" in self.complaint(capfd, tmp_path, text, tmp_path / "teacher")

    def test_another_architecture(self, capfd, tmp_path, text):
        fields = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=1, intermediate_size=28, vocab_size=200)
        RobertaModel(RobertaConfig(**fields)).save_pretrained(tmp_path / "teacher")
        AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(tmp_path / "teacher")
        assert "model_type='roberta'" in self.complaint(capfd, tmp_path, text, tmp_path / "teacher")

    def test_broken_weights(self, capfd, tmp_path, text, teachers):
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        for file in (teachers / "classifier").iterdir():
            (teacher / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
        assert str(teacher) in self.complaint(capfd, tmp_path, text, teacher)

    def test_weights_that_are_not_finite(self, capfd, tmp_path, text):
        bert = tiny_bert(vocab_size=200)
        bert.encoder.layer[1].output.dense.bias.data[3] = math.nan
        bert.save_pretrained(tmp_path / "teacher")
        AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(tmp_path / "teacher")
        said = self.complaint(capfd, tmp_path, text, tmp_path / "teacher")
        assert "not finite (encoder.layer.1.output.dense.bias" in said

    def test_folder_of_something_else(self, capfd, tmp_path, text, teachers):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "modules.json").write_text("mine")
        recipe = write_recipe(tmp_path / "run.json", text, teachers / "plain")
        assert distill_from_bert.main([recipe]) == 1
        assert "modules.json" in capfd.readouterr().err
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["modules.json"]
