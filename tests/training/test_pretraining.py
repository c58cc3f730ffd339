"""The pretraining command: its results, and that they are exact."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import run_language_modeling
from lambdabert.text.masks import masking_collator
from lambdabert.training.models import peak_learning_rate
from modeling_lambdabert import LambdaBertForPreTrainingSOP, LambdaBertForQuestionAnswering, LambdaBertModel
from run_language_modeling import parse_arguments
from training_support import (
    RECIPE,
    complaint,
    contents,
    finish,
    run_card_snippet,
    sources,
    start_command,
    write_recipe,
)

ROOT = Path(run_language_modeling.__file__).parent
RECIPES = sorted(file for file in (ROOT / "configs").glob("*.json") if "teacher" not in json.loads(file.read_text()))


TRAINING_ALONE = ("per_device_train_batch_size", "learning_rate", "max_steps", "save_steps", "logging_steps")


def test_report_is_complete(pretrained):
    output_dir, printed = pretrained
    report = json.loads((output_dir / "metrics.json").read_text())
    metrics = report["eval"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_mlm_loss"]))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_mlm_loss"] + metrics["eval_sentence_loss"])
    assert 0 <= metrics["eval_mlm_accuracy"] <= 1 and 0 <= metrics["eval_sentence_accuracy"] <= 1
    assert metrics["eval_tokens_per_second"] > 0 and report["train"]["train_tokens_per_second"] > 0
    assert report["data"]["train"]["documents"] == 12
    assert report["train"]["step"] == RECIPE["max_steps"]
    for said in (f"{report['model']['parameters']:,} parameters", "12 documents", "12 steps", str(output_dir)):
        assert said in printed
    assert printed.rstrip().splitlines()[-6] == '"The fox" sees the [MASK].'
    card = (output_dir / "README.md").read_text()
    assert str(output_dir.parent.parent) not in card and "cache" not in card, "a published card tells no local path"
    for said in (
        "trust_remote_code=True",
        "| learning_rate | 0.005 |",
        "| mlm_probability | 0.3 |",
        "| eval_mlm_probability | 0.15 |",
        "eval_mlm_loss",
        "sentence order",
        "train.txt",
    ):
        assert said in card
    assert (output_dir / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_card_works_elsewhere_without_this_code(pretrained, tmp_path):
    then = """
from transformers import AutoModelForPreTraining
inputs = tokenizer("The fox sees the river.", "A sailor sells bread.", return_tensors="pt")
assert inputs["token_type_ids"].sum() > 0
assert model.config.vocab_size == len(tokenizer) == model(**inputs).logits.shape[-1]
assert hasattr(AutoModelForPreTraining.from_pretrained("run", trust_remote_code=True)(**inputs), "sop_loss")
"""
    done = run_card_snippet(pretrained[0], tmp_path, then)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'sequence'") == 5


def evaluation(text, source, output_dir, **values):
    """The recipe of an evaluation alone."""
    alone = {"do_train": None, "config_overrides": None, "eval_steps": None, "objective": None}
    alone |= dict.fromkeys(TRAINING_ALONE)
    return write_recipe(
        output_dir.with_suffix(".json"),
        model_name_or_path=str(source),
        output_dir=str(output_dir),
        **alone | sources(text, tokenizer_name=None, train_file=None) | values,
    )


def test_evaluation_is_exact_whatever_the_batch_size(pretrained, text):
    """Against a plain loop, one example at a time, over every masked token."""
    output_dir, _ = pretrained
    model = LambdaBertForPreTrainingSOP.from_pretrained(output_dir).eval()
    recipe = evaluation(text, output_dir, output_dir.parent / "evaluated", per_device_eval_batch_size=5)
    pretraining = run_language_modeling.Pretraining(*parse_arguments([recipe]))
    pretraining.prepare()
    examples = pretraining.examples["validation"]
    collate = masking_collator(pretraining.tokenizer, pretraining.data_args, seed=42, training=False)
    loss = correct = masked = tokens = pairs = 0
    for example in examples:
        batch = collate([example])
        with torch.no_grad():
            outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        targets = batch["labels"][0]
        for place in (targets != -100).nonzero().flatten():
            logits = outputs.prediction_logits[0, place].double()
            loss -= torch.log_softmax(logits, -1)[targets[place]].item()
            correct += int(logits.argmax() == targets[place])
            masked += 1
        tokens += len(example["input_ids"])
        pairs += int(outputs.seq_relationship_logits.argmax() == example["sentence_order_label"])

    metrics = pretraining.trainer().evaluate()
    reported = json.loads((output_dir / "metrics.json").read_text())["eval"]
    for measured in (metrics, reported):
        assert measured["eval_masked_tokens"] == masked and measured["eval_tokens"] == tokens
        assert measured["eval_mlm_loss"] == pytest.approx(loss / masked, rel=1e-5)
        assert measured["eval_mlm_accuracy"] == pytest.approx(correct / masked)
        assert measured["eval_sentence_accuracy"] == pytest.approx(pairs / len(examples))


def test_evaluation_is_of_what_the_model_was_trained_for(pretrained, text, tmp_path, capfd):
    """Another task's head would be random, or misread; the report names model, task and text."""
    output_dir, _ = pretrained
    out = tmp_path / "out"
    assert run_language_modeling.main([evaluation(text, output_dir, out)]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["evaluated"]["objective"] == "sop"
    assert report["evaluated"]["model_name_or_path"] == str(output_dir)
    trained = json.loads((output_dir / "metrics.json").read_text())["eval"]
    assert report["eval"]["eval_sentence_loss"] == pytest.approx(trained["eval_sentence_loss"], rel=1e-5)
    assert "train" not in report

    assert run_language_modeling.main([evaluation(text, output_dir, out)]) == 0, "the same again"
    before = contents(out)
    assert set(before) == {out / "evaluation.json"}
    capfd.readouterr()
    for values, said in (
        ({"objective": "nsp"}, "trained for 'sop' and has no head for another sentence task"),
        ({"objective": "mlm"}, "holds evaluation.json of objective=sop, and this is of mlm"),
        ({"max_eval_samples": 3}, "holds evaluation.json of max_eval_samples=None, and this is of 3"),
        ({"whole_word_mask": True}, "holds evaluation.json of whole_word_mask=False, and this is of True"),
        ({"seed": 7}, "holds evaluation.json of seed=42, and this is of 7"),
    ):
        recipe = evaluation(text, output_dir, out, **values)
        assert said in complaint(recipe, capfd)
    assert contents(out) == before


def test_evaluation_of_a_model_without_its_head_is_refused(pretrained, text, tmp_path, capfd):
    output_dir, _ = pretrained
    for head in (LambdaBertModel, LambdaBertForQuestionAnswering):
        source = tmp_path / head.__name__
        head.from_pretrained(output_dir).save_pretrained(source)
        AutoTokenizer.from_pretrained(output_dir).save_pretrained(source)
        recipe = evaluation(text, source, tmp_path / "out", objective="mlm")
        assert f"was saved as {head.__name__}, without the head" in complaint(recipe, capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_new_model_starts_at_the_frequencies_of_the_text(text, tmp_path, streaming):
    values = dict(output_dir=str(tmp_path / "run"), objective="mlm", streaming=streaming)
    recipe = write_recipe(tmp_path / "recipe.json", **sources(text, **values))
    run = run_language_modeling.Pretraining(*parse_arguments([recipe]))
    run.prepare()
    tokens = [token for example in run.examples["train"] for token in example["input_ids"]]
    words = [token for token in tokens if token not in run.tokenizer.all_special_ids]
    head = run.model.cls.predictions
    torch.nn.init.zeros_(head.transform.LayerNorm.weight)
    predicted = head(torch.randn(1, 1, run.model.config.hidden_size)).softmax(-1)[0, 0]
    expected = torch.ones_like(predicted) + torch.bincount(torch.tensor(words), minlength=len(predicted))
    torch.testing.assert_close(predicted, expected / expected.sum())


def test_the_seed_decides_weights_masks_and_held_out_documents(text, tmp_path):
    def prepared(seed):
        values = dict(validation_file=None, validation_split_percentage=25.0, objective="mlm", seed=seed)
        recipe = write_recipe(tmp_path / "recipe.json", **sources(text, output_dir=str(tmp_path / "run"), **values))
        run = run_language_modeling.Pretraining(*parse_arguments([recipe]))
        run.prepare()
        return run

    runs = [prepared(seed) for seed in (1, 1, 2)]
    rows = list(runs[0].examples["train"])[:8]
    found = {
        "weights": [run.model.bert.encoder.layer[0].attention.self.to_values.weight.tolist() for run in runs],
        "masks": [run.collator(training=True)(rows)["labels"].tolist() for run in runs],
        "held out": [list(run.examples["validation"]["input_ids"]) for run in runs],
    }
    for what, (first, again, other) in found.items():
        assert first == again != other, what


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipes_dry_run(recipe, text, tmp_path):
    """Every recipe with its own options, on small local text with a small model."""
    values = json.loads(recipe.read_text())
    parse_arguments([str(recipe), "--use_cpu"])
    source = ("dataset_name", "dataset_config_name", "corpus", "document_boundary", "train_tokenizer")
    for name in (*source, "vocab_size", "preprocessing_num_workers", "validation_split_percentage"):
        values.pop(name, None)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_lambda_queries": 4}
    values |= sources(text, output_dir=str(tmp_path / "run"), dry_run=True, use_cpu=True, disable_tqdm=True)
    values["config_overrides"] = {**values.get("config_overrides", {}), **small}
    changed = tmp_path / "recipe.json"
    changed.write_text(json.dumps(values))
    log = tmp_path / "log"
    assert finish(start_command([str(changed)], log)) == [0], log.read_text()
    printed = log.read_text()
    for said in ("12 documents", "parameters", "GiB", "nothing was written"):
        assert said in printed
    assert not (tmp_path / "run").exists()


def test_all_recipes_are_there():
    names = ["demo", "wikipedia", "wikipedia_512", "wikipedia_small", "wikitext103", "wikitext2"]
    assert [file.stem for file in RECIPES] == names


@pytest.mark.parametrize("further", [False, True])
def test_learning_rate_that_is_not_given(text, pretrained, tmp_path, further):
    trained = {"model_name_or_path": str(pretrained[0]), "config_overrides": None, "tokenizer_name": None}
    changes = trained if further else {}
    recipe = write_recipe(
        tmp_path / "r.json", output_dir=str(tmp_path / "run"), learning_rate=None, **sources(text, **changes)
    )
    pretraining = run_language_modeling.Pretraining(*parse_arguments([recipe]))
    pretraining.prepare()
    assert pretraining.training_args.learning_rate == (1e-4 if further else peak_learning_rate(2, 32, 4 * 32))
    assert pretraining.settings["training"]["learning_rate"] == pretraining.training_args.learning_rate


def test_evaluation_in_half_precision_is_reported_in_place_of_the_last_steps(text, tmp_path):
    """The Trainer rounds weights only where it evaluates after training."""
    recipe = write_recipe(
        tmp_path / "r.json",
        output_dir=str(tmp_path / "run"),
        bf16_full_eval=True,
        max_steps=2,
        eval_steps=2,
        save_steps=2,
        **sources(text),
    )
    assert finish(start_command([recipe], tmp_path / "log")) == [0], (tmp_path / "log").read_text()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    (while_training,) = [each["eval_mlm_loss"] for each in state["log_history"] if "eval_mlm_loss" in each]
    reported = json.loads((tmp_path / "run" / "metrics.json").read_text())["eval"]["eval_mlm_loss"]
    assert reported != while_training and reported == pytest.approx(while_training, rel=1e-2)


@pytest.mark.parametrize("warmup_steps, said", [(2, True), (1, False)])
def test_warm_up_that_lasts_the_whole_run_is_told(text, tmp_path, warmup_steps, said):
    recipe = write_recipe(
        tmp_path / "r.json",
        output_dir=str(tmp_path / "run"),
        warmup_steps=warmup_steps,
        max_steps=2,
        do_eval=False,
        eval_steps=None,
        **sources(text, validation_file=None),
    )
    log = tmp_path / "log"
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    assert "mlm_loss" in json.loads((tmp_path / "run" / "metrics.json").read_text())["train"], "logged at the end"
    assert ("warmup_steps=2: the learning rate rises over all 2 steps" in log.read_text()) == said


def test_interruption_before_training_is_one_line(text, tmp_path, monkeypatch, capfd):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_language_modeling.Pretraining, "prepare", interrupted)
    recipe = write_recipe(tmp_path / "r.json", output_dir=str(tmp_path / "run"), **sources(text))
    assert run_language_modeling.main([recipe]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "Interrupted."
    assert not (tmp_path / "run").exists()


def test_streaming_trains(text, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.json", output_dir=str(tmp_path / "run"), streaming=True, shuffle_buffer_size=8, **sources(text)
    )
    assert finish(start_command([recipe], tmp_path / "log")) == [0], (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["step"] == RECIPE["max_steps"]


def test_tensorboard_is_written_if_asked_for(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    recipe = write_recipe(
        tmp_path / "r.json",
        output_dir=str(tmp_path / "run"),
        report_to=["tensorboard"],
        max_steps=3,
        eval_steps=3,
        **sources(text),
    )
    process = start_command([recipe], tmp_path / "log", TENSORBOARD_LOGGING_DIR=str(logs))
    assert finish(process) == [0], (tmp_path / "log").read_text()
    events = EventAccumulator(str(next(logs.rglob("events*")).parent)).Reload()
    assert {"train/mlm_loss", "eval/mlm_loss", "eval/perplexity"} <= set(events.Tags()["scalars"])


def test_continues_from_a_model(pretrained, text, tmp_path):
    source, _ = pretrained
    recipe = write_recipe(
        tmp_path / "r.json",
        model_name_or_path=str(source),
        output_dir=str(tmp_path / "run"),
        config_overrides=None,
        learning_rate=0.0,
        weight_decay=0.0,
        max_steps=1,
        **sources(text, tokenizer_name=None),
    )
    assert finish(start_command([recipe], tmp_path / "log")) == [0], (tmp_path / "log").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run"))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_no_limit_of_length_without_position_embeddings(text, tmp_path):
    """With a local scope too, neither the examples nor the saved tokenizer keep to a table's length."""
    shape = {**RECIPE["config_overrides"], "position_embedding_type": "none", "max_position_embeddings": 16}
    output_dir = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.json", output_dir=str(output_dir), config_overrides=shape, max_steps=2, **sources(text)
    )
    assert finish(start_command([recipe], tmp_path / "log")) == [0], (tmp_path / "log").read_text()
    inputs = AutoTokenizer.from_pretrained(output_dir)(
        "The fox sees the river. " * 100, return_tensors="pt", truncation=True
    )
    assert inputs.input_ids.shape[1] > 500
    output = LambdaBertForPreTrainingSOP.from_pretrained(output_dir)(**inputs)
    assert torch.isfinite(output.prediction_logits).all()
    assert "position_embedding_type | none" in (output_dir / "README.md").read_text()
