"""The command that turns a BERT into a LambdaBERT: its teachers, results, resuming, and what it says to a mistake."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_modeling_common import run_elsewhere
from test_training_resume import assert_same_weights, wait_for
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

import distill_from_bert
from conversion_lambdabert import POSITION_TABLE
from distill_from_bert import ARGUMENT_GROUPS, EXAMPLES
from modeling_lambdabert import LambdaBertForSequenceClassification, LambdaBertModel
from training_run import parse_arguments
from training_support import BERTS, SCHEDULE, finish, start_command, start_distributed, tiny_bert

ROOT = Path(distill_from_bert.__file__).parent
RECIPE = {
    "do_train": True,
    "do_eval": True,
    "config_overrides": {"key_depth": 8, "intra_depth": 2, "local_context_size": 5},
    "max_seq_length": 32,
    "gradient_accumulation_steps": 2,
    **SCHEDULE,
}


def write_recipe(file, text, teacher, **values):
    recipe = {
        **RECIPE,
        "teacher": None if teacher is None else str(teacher),
        "output_dir": str(file.with_suffix("")),
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "data_cache_dir": str(text / "cache"),
        **values,
    }
    file.write_text(json.dumps({name: value for name, value in recipe.items() if value is not None}))
    return str(file)


def distil(recipe, log):
    return start_command([recipe], log, command=distill_from_bert.main)


def distilled(tmp_path, text, teacher, **values):
    """The output folder of a run, and what it printed."""
    log = tmp_path / "log"
    assert finish(distil(write_recipe(tmp_path / "run.json", text, teacher, **values), log)) == [0], log.read_text()
    return tmp_path / "run", log.read_text()


@pytest.fixture(scope="module")
def finished(text, teachers, tmp_path_factory):
    """A classifier's run that nothing interrupted; it passes through several epochs."""
    return distilled(tmp_path_factory.mktemp("finished"), text, teachers / "classifier")


class TestResults:
    def test_report_is_complete(self, finished):
        output_dir, printed = finished
        report = json.loads((output_dir / "metrics.json").read_text())
        assert report["train"]["step"] == RECIPE["max_steps"]
        losses = {name: report["eval"][f"eval_{name}"] for name in ("layers", "classes")}
        assert report["eval"]["eval_loss"] == pytest.approx(sum(losses.values()))
        for said in (f"{report['model']['parameters']:,} parameters", "12 documents", "12 steps", str(output_dir)):
            assert said in printed
        card = (output_dir / "README.md").read_text()
        assert str(output_dir.parent.parent) not in card and "cache" not in card, "a published card tells no local path"
        for said in (
            "trust_remote_code=True",
            "text-classification",
            "attention for 6 steps, then layers x 1, classes x 1",
            "| key_depth | 8 |",
        ):
            assert said in card
        assert (output_dir / "training_curves.png").read_bytes().startswith(b"\x89PNG")

    def test_classifier_works_elsewhere_in_a_pipeline(self, finished, tmp_path):
        code = """
import sys
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1], trust_remote_code=True)
answer = classify("The fox sees the river.", top_k=None)
assert {label["label"] for label in answer} == {"red", "green", "blue"}, answer
assert type(classify.model).__name__ == "LambdaBertForSequenceClassification"
"""
        done = run_elsewhere(code, finished[0], folder=tmp_path / "elsewhere")
        assert done.returncode == 0, done.stderr[-3000:]

    def test_dropout_is_kept_for_fine_tuning(self, finished):
        model = LambdaBertForSequenceClassification.from_pretrained(finished[0])
        assert model.config.hidden_dropout_prob == 0.2
        assert model.bert.embeddings.dropout.p == 0.2

    def test_head_and_tokenizer_are_the_teachers(self, finished, teachers):
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (finished[0], teachers / "classifier")]
        assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
        sentence = "The fox sees the river."
        assert tokenizers[0](sentence) == tokenizers[1](sentence)

    @pytest.mark.parametrize("kind", ["mlm", "tagger", "plain"])
    def test_other_teachers(self, kind, text, teachers, tmp_path):
        output_dir, _ = distilled(tmp_path, text, teachers / kind, max_steps=2, eval_steps=2, save_steps=2)
        metrics = json.loads((output_dir / "metrics.json").read_text())["eval"]
        special = {"mlm": {"eval_masked_tokens"}, "tagger": {"eval_classes"}, "plain": set()}[kind]
        losses = {"eval_loss", "eval_layers", "eval_masked_tokens", "eval_classes", "eval_sentences"}
        assert losses & set(metrics) == {"eval_loss", "eval_layers"} | special
        architecture = json.loads((output_dir / "config.json").read_text())["architectures"]
        assert architecture == ["Lambda" + BERTS[kind].__name__]

    def test_sentence_vectors(self, text, sentence_teacher, tmp_path):
        """The folder works elsewhere and keeps pooling, normalisation, prompts and longest length."""
        from sentence_transformers import SentenceTransformer

        output_dir, _ = distilled(tmp_path, text, sentence_teacher, max_position_embeddings=100)
        code = """
import sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
assert type(model[0].auto_model).__name__ == "LambdaBertModel"
assert model.max_seq_length == 24, model.max_seq_length
assert model.prompts["query"] == "the fox: " and model.default_prompt_name == "query", model.prompts
assert model.similarity_fn_name == "dot"
assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
assert model[1].pooling_mode == "cls"
texts = ["The fox sees the river.", "A sailor sells bread at night near the sea."]
vectors = model.encode(texts)
assert vectors.shape == (2, 24)
assert abs((vectors**2).sum(1) - 1).max() < 1e-5
assert abs(model.encode(texts[0]) - vectors[0]).max() < 1e-5
model.max_seq_length = 100
model.encode(" ".join(texts * 8))
"""
        done = run_elsewhere(code, output_dir, folder=tmp_path / "elsewhere")
        assert done.returncode == 0, done.stderr[-3000:]
        model = LambdaBertModel.from_pretrained(output_dir)
        teacher = SentenceTransformer(str(sentence_teacher), device="cpu")[0].auto_model
        assert model.config.max_position_embeddings == 100
        assert model.embeddings.position_embeddings.weight.shape == (100, 24)
        assert teacher.config.max_position_embeddings == 40
        history = json.loads((output_dir / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        vectors = [record["eval_sentences"] for record in history if "eval_sentences" in record]
        assert vectors[-1] < vectors[0]

    def test_student_without_position_embeddings(self, text, teachers, tmp_path):
        overrides = {**RECIPE["config_overrides"], "position_embedding_type": "none"}
        output_dir, printed = distilled(
            tmp_path, text, teachers / "plain", config_overrides=overrides, max_position_embeddings=16, max_steps=3
        )
        assert POSITION_TABLE in printed, "what is left out is said"
        assert AutoTokenizer.from_pretrained(output_dir).model_max_length > 1e6
        assert LambdaBertModel.from_pretrained(output_dir)(torch.ones(1, 200, dtype=torch.long))[0].shape[1] == 200

    def test_streams_and_stretches(self, text, teachers, tmp_path):
        output_dir, _ = distilled(
            tmp_path, text, teachers / "plain", streaming=True, shuffle_buffer_size=8, examples="stretches", max_steps=3
        )
        assert json.loads((output_dir / "metrics.json").read_text())["train"]["step"] == 3

    def test_weights_of_losses(self, text, teachers, tmp_path):
        values = dict(layers_weight=0, last_layer_weight=2, classes_weight=0, max_steps=2, eval_steps=2)
        output_dir, _ = distilled(tmp_path, text, teachers / "classifier", **values)
        metrics = json.loads((output_dir / "metrics.json").read_text())["eval"]
        assert metrics["eval_loss"] == pytest.approx(2 * metrics["eval_last_layer"])
        assert "eval_layers" not in metrics and "eval_classes" not in metrics


def test_two_processes_equal_one_that_accumulates(text, teachers, tmp_path):
    """In both stages."""
    weights = {}
    for name, batch, accumulated in (("one", 2, 4), ("two", 2, 2)):
        recipe = write_recipe(
            tmp_path / f"{name}.json",
            text,
            teachers / "mlm",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            examples="sentences",
            max_steps=6,
        )
        log = tmp_path / f"{name}.log"
        start = start_distributed if name == "two" else lambda *args, **kwargs: [start_command(*args, **kwargs)]
        assert set(finish(*start([recipe], log, command=distill_from_bert.main))) == {0}, log.read_text()
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    for name, weight in weights["one"].items():
        # three steps of Adam at 1e-3 and three at 5e-3 move each weight by up to 2e-2
        torch.testing.assert_close(weights["two"][name], weight, rtol=0, atol=5e-5, msg=name)


class TestInterruption:
    def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(self, text, teachers, finished, tmp_path):
        recipe, log = write_recipe(tmp_path / "run.json", text, teachers / "classifier"), tmp_path / "log"
        process = distil(recipe, log)
        wait_for(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", process)
        os.kill(process, signal.SIGKILL)
        assert finish(process) == [-signal.SIGKILL]
        assert finish(distil(recipe, log)) == [0], log.read_text()
        assert re.search(r"Going on from .*checkpoint-[48], step [48] of 12", log.read_text())
        assert_same_weights(finished[0], tmp_path / "run")

    def test_sigterm_saves_and_goes_on(self, text, teachers, finished, tmp_path):
        recipe, log = write_recipe(tmp_path / "run.json", text, teachers / "classifier"), tmp_path / "log"
        process = distil(recipe, log)
        wait_for(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", process)
        os.kill(process, signal.SIGTERM)
        assert finish(process) == [0]
        assert "Stopped by SIGTERM" in log.read_text() and not (tmp_path / "run" / "metrics.json").exists()
        assert finish(distil(recipe, log)) == [0], log.read_text()
        assert_same_weights(finished[0], tmp_path / "run")

    def test_finished_sentence_teacher_started_again_trains_nothing(self, text, sentence_teacher, tmp_path):
        output_dir, _ = distilled(tmp_path, text, sentence_teacher, max_steps=4, eval_steps=2)
        before = load_file(output_dir / "model.safetensors")
        again, printed = distilled(tmp_path, text, sentence_teacher, max_steps=4, eval_steps=2)
        assert "nothing is left to train" in printed
        after = load_file(again / "model.safetensors")
        assert all(torch.equal(after[name], weight) for name, weight in before.items())

    @pytest.mark.parametrize(
        "change", [{"classes_weight": 0.5}, {"examples": "stretches"}, {"max_position_embeddings": 50}, {"seed": 7}]
    )
    def test_another_run_is_refused(self, text, teachers, finished, capfd, tmp_path, change):
        output_dir = finished[0]
        before = {file: file.read_bytes() for file in output_dir.rglob("*") if file.is_file()}
        recipe = write_recipe(
            tmp_path / "again.json", text, teachers / "classifier", output_dir=str(output_dir), **change
        )
        assert distill_from_bert.main([recipe]) == 1
        message = capfd.readouterr().err.splitlines()[-1]
        assert "belongs to another run" in message and next(iter(change)) in message
        assert {file: file.read_bytes() for file in output_dir.rglob("*") if file.is_file()} == before

    def test_another_teacher_is_another_run(self, text, teachers, finished, capfd, tmp_path):
        other = tmp_path / "other"
        labels = {0: "red", 1: "green", 2: "blue"}
        bert = tiny_bert(BertForSequenceClassification, seed=5, vocab_size=200, id2label=labels)
        bert.save_pretrained(other)
        AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(other)
        recipe = write_recipe(tmp_path / "again.json", text, other, output_dir=str(finished[0]))
        assert distill_from_bert.main([recipe]) == 1
        assert "belongs to another run" in capfd.readouterr().err


def test_dry_run_writes_nothing(text, teachers, tmp_path):
    output_dir, printed = distilled(tmp_path, text, teachers / "mlm", dry_run=True)
    assert not output_dir.exists()
    for said in ("12 documents", "parameters", "GiB", "nothing was written"):
        assert said in printed


def test_recipe_is_complete(text, sentence_teacher, tmp_path):
    """configs/minilm.json with its own options, on small local text with a small teacher."""
    values = json.loads((ROOT / "configs" / "minilm.json").read_text())
    teacher_args, data_args, training_args = parse_arguments(
        [str(ROOT / "configs" / "minilm.json"), "--use_cpu"], ARGUMENT_GROUPS
    )
    assert teacher_args.teacher.endswith("all-MiniLM-L6-v2") and training_args.do_train
    assert data_args.examples in (None, *EXAMPLES)
    del values["teacher"], values["output_dir"]
    values["config_overrides"]["num_lambda_queries"] = 4
    small = dict(per_device_train_batch_size=4, max_seq_length=32, dry_run=True, gradient_accumulation_steps=1)
    _, printed = distilled(tmp_path, text, sentence_teacher, **values | small)
    assert "nothing was written" in printed


class TestMistakes:
    """Each ends in one line that names what to change, before anything is written."""

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
            ({"teacher": None}, "--teacher"),
            ({"teacher": "nowhere"}, "nowhere"),
            ({"teacher": "nobody/nothing"}, "nobody/nothing"),
            ({"config_overrides": {"key_dept": 3}}, "key_dept"),
            ({"config_overrides": {"num_lambda_queries": 5}}, "num_lambda_queries=5"),
            ({"config_overrides": {"hidden_size": 48}}, "hidden_size=48"),
            ({"config_overrides": "key_depth"}, "field=value"),
            ({"max_seq_length": 41}, "teacher's max_position_embeddings=40"),
            ({"max_position_embeddings": 20}, "student's max_position_embeddings=20"),
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
    def test_options(self, capfd, tmp_path, text, teachers, values, named):
        teacher = values.get("teacher", teachers / "classifier")
        options = {name: value for name, value in values.items() if name != "teacher"}
        assert named in self.complaint(capfd, tmp_path, text, teacher, **options)

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

    def test_folder_of_something_else(self, capfd, tmp_path, text, teachers):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "modules.json").write_text("mine")
        recipe = write_recipe(tmp_path / "run.json", text, teachers / "plain")
        assert distill_from_bert.main([recipe]) == 1
        assert "modules.json" in capfd.readouterr().err
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["modules.json"]
