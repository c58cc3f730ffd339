"""The command that turns a BERT into a LambdaBERT: its results."""

import fnmatch
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
)

import distill_from_bert
from conversion_lambdabert import POSITION_TABLE
from distill_from_bert import ARGUMENT_GROUPS, EXAMPLES
from distillation_support import RECIPE, distilled, write_recipe
from lambdabert.distillation.trainer import DistillationTrainer
from lambdabert.training.arguments import parse_arguments
from lambdabert.training.output_folder import RUN_FILES
from modeling_lambdabert import LambdaBertForSequenceClassification, LambdaBertModel
from training_support import (
    BERTS,
    finish,
    run_card_snippet,
    start_command,
    start_distributed,
)

ROOT = Path(distill_from_bert.__file__).parent


class TestResults:
    def test_report_is_complete(self, finished):
        output_dir, printed = finished
        report = json.loads((output_dir / "metrics.json").read_text())
        assert report["train"]["step"] == RECIPE["max_steps"]
        losses = {name: report["eval"][f"eval_{name}"] for name in ("layers", "classes")}
        assert report["eval"]["eval_loss"] == pytest.approx(sum(losses.values()))
        for said in (f"{report['model']['parameters']:,} parameters", "12 documents", "12 steps", str(output_dir)):
            assert said in printed
        assert printed.count("computed 6 from attention's values and output") == 1, "of the teacher, not of a rehearsal"
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

    def test_card_of_a_classifier_works_elsewhere(self, finished, tmp_path):
        then = """
answer = classify("The fox sees the river.", top_k=None)
assert {label["label"] for label in answer} == {"red", "green", "blue"}, answer
assert type(classify.model).__name__ == "LambdaBertForSequenceClassification"
"""
        done = run_card_snippet(finished[0], tmp_path, then)
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
        if kind == "plain":
            then = "assert outputs.last_hidden_state.shape[-1] == 24"
            done = run_card_snippet(output_dir, tmp_path, then)
            assert done.returncode == 0, done.stderr
        architecture = json.loads((output_dir / "config.json").read_text())["architectures"]
        assert architecture == ["Lambda" + BERTS[kind].__name__]

    def test_sentence_vectors(self, text, sentence_teacher, tmp_path):
        """The folder works elsewhere and keeps pooling, normalisation, prompts and longest length."""
        from sentence_transformers import SentenceTransformer

        output_dir, _ = distilled(tmp_path, text, sentence_teacher, max_position_embeddings=100)
        then = """
assert vectors.shape == (2, 24)
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
        done = run_card_snippet(output_dir, tmp_path, then)
        assert done.returncode == 0, done.stderr[-3000:]
        model = LambdaBertModel.from_pretrained(output_dir)
        teacher = SentenceTransformer(str(sentence_teacher), device="cpu")[0].auto_model
        assert model.config.max_position_embeddings == 100
        assert model.embeddings.position_embeddings.weight.shape == (100, 24)
        assert teacher.config.max_position_embeddings == 40
        history = json.loads((output_dir / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        vectors = [record["eval_sentences"] for record in history if "eval_sentences" in record]
        assert vectors[-1] < vectors[0]
        known = (*RUN_FILES, "run_settings.json", "checkpoint-*")
        files = [file.name for file in output_dir.iterdir()]
        assert [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in known)] == []

    def test_student_without_position_embeddings(self, text, teachers, tmp_path):
        overrides = {**RECIPE["config_overrides"], "position_embedding_type": "none"}
        output_dir, printed = distilled(
            tmp_path, text, teachers / "plain", config_overrides=overrides, max_position_embeddings=16, max_steps=3
        )
        assert POSITION_TABLE in printed, "what is left out is said"
        assert AutoTokenizer.from_pretrained(output_dir).model_max_length > 1e6
        assert LambdaBertModel.from_pretrained(output_dir)(torch.ones(1, 200, dtype=torch.long))[0].shape[1] == 200

    def test_student_with_repetitions_knows_the_mask(self, text, teachers, tmp_path):
        overrides = {**RECIPE["config_overrides"], "repetition_context_size": 3}
        output_dir, _ = distilled(tmp_path, text, teachers / "plain", config_overrides=overrides, max_steps=1)
        tokenizer = AutoTokenizer.from_pretrained(output_dir)
        assert LambdaBertModel.from_pretrained(output_dir).config.mask_token_id == tokenizer.mask_token_id is not None

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


def test_warm_up_that_lasts_a_whole_stage_is_told(text, teachers, tmp_path):
    values = {"max_steps": 7, "attention_steps": 3, "warmup_steps": 3, "do_eval": None, "eval_steps": None}
    _, printed = distilled(tmp_path, text, teachers / "plain", validation_file=None, **values)
    assert printed.count("the learning rate rises over all 3 steps") == 1 and "over all 4" not in printed


@pytest.mark.parametrize("values", [{}, {"attention_steps": 9, "lr_scheduler_type": "polynomial"}], ids=str)
def test_dry_run_takes_a_step_of_each_stage_and_writes_nothing(text, teachers, tmp_path, monkeypatch, values):
    training_step = DistillationTrainer.training_step

    def told(trainer, model, *args):
        if model.num_parameters() > 5_000:  # not that of a rehearsal
            print("in stage", 1 if trainer.steps_left_alone() > 0 else 2, flush=True)
        return training_step(trainer, model, *args)

    monkeypatch.setattr(DistillationTrainer, "training_step", told)  # in the fork as well
    output_dir, printed = distilled(tmp_path, text, teachers / "mlm", dry_run=True, **values)
    assert printed.count("in stage 1") == printed.count("in stage 2") == 2, "two micro-batches each"
    assert not output_dir.exists()
    for said in ("12 documents", "parameters", "GiB", "nothing was written"):
        assert said in printed


def test_the_seed_decides_the_fresh_weights(text, teachers, tmp_path):
    weights = []
    for seed in (1, 1, 2):
        recipe = write_recipe(tmp_path / "run.json", text, teachers / "plain", seed=seed)
        run = distill_from_bert.Distillation(*parse_arguments([recipe], ARGUMENT_GROUPS))
        run.prepare()
        weights.append(run.model.encoder.layer[0].attention.self.to_keys.weight)
    first, again, other = weights
    assert torch.equal(first, again) and not torch.equal(first, other)


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
