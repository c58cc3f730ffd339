"""The pretraining command: its options, its metrics, what it saves, and what it says to a mistake."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import run_language_modeling
from lambdabert.text.masks import masking_collator
from modeling_lambdabert import LambdaBertForPreTrainingSOP
from pretraining_trainer import example_sums, pretraining_metrics
from run_language_modeling import parse_arguments, parse_overrides
from text_support import SPECIAL_TOKENS
from training_report import plot_curves, unigram_baseline
from training_support import RECIPE, finish, start_command, write_recipe

ROOT = Path(run_language_modeling.__file__).parent
RECIPES = sorted(file for file in (ROOT / "configs").glob("*.json") if "teacher" not in json.loads(file.read_text()))


def sources(text, **values):
    return {
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "tokenizer_name": str(text / "tokenizer"),
        "data_cache_dir": str(text / "cache"),
        **values,
    }


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The output folder of a small run, and what the run printed."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    recipe = write_recipe(
        output_dir.with_suffix(".json"),
        output_dir=str(output_dir),
        masked_sentence="The fox sees the [MASK].",
        **sources(text, tokenizer_name=None, train_tokenizer=True, vocab_size=120),
    )
    log = output_dir.with_suffix(".log")
    assert finish(start_command([recipe], log)) == [0], log.read_text()
    return output_dir, log.read_text()


def test_main_command_means_what_it_documents():
    flags = "--output_dir=models --do_train --do_eval --eval_steps=100 --sop".split()
    model_args, data_args, training_args = parse_arguments(flags)
    assert (training_args.eval_strategy, training_args.eval_steps) == ("steps", 100)
    assert (data_args.dataset_name, data_args.dataset_config_name) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert data_args.objective == "sop"
    assert run_language_modeling.DEFAULT_TOKENIZER.endswith("bert-base-cased")
    assert training_args.report_to == []


def test_flags_after_a_recipe_win(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", corpus="python-docs", max_steps=7)
    _, data_args, training_args = parse_arguments([recipe, "--max_steps", "9", "--objective", "mlm"])
    assert (training_args.max_steps, training_args.learning_rate) == (9, RECIPE["learning_rate"])
    assert (data_args.objective, data_args.corpus) == ("mlm", "python-docs")


def test_overrides_are_read_as_text_and_as_an_object():
    assert parse_overrides("hidden_size=256, local_context_size=None,lambda_norm=rms,tie_word_embeddings=False") == {
        "hidden_size": 256,
        "local_context_size": None,
        "lambda_norm": "rms",
        "tie_word_embeddings": False,
    }
    assert parse_overrides({"hidden_size": 256}) == {"hidden_size": 256}
    assert parse_overrides(None) == {}


def test_report_is_complete(finished):
    output_dir, printed = finished
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
    assert printed.rstrip().splitlines()[-6] == "The fox sees the [MASK]."
    card = (output_dir / "README.md").read_text()
    assert str(output_dir.parent.parent) not in card and "cache" not in card, "a published card tells no local path"
    for said in (
        "trust_remote_code=True",
        "| learning_rate | 0.005 |",
        "eval_mlm_loss",
        "sentence order",
        "train.txt",
    ):
        assert said in card
    assert (output_dir / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_saved_folder_works_elsewhere_without_this_code(finished, tmp_path):
    snippet = """
import sys
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The fox sees the river.", "A sailor sells bread.", return_tensors="pt")
assert inputs["token_type_ids"].sum() > 0
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert model.config.vocab_size == len(tokenizer) == model(**inputs).logits.shape[-1]
assert len(pipeline("fill-mask", model=model, tokenizer=tokenizer)("The fox sees the [MASK].")) == 5
assert hasattr(AutoModelForPreTraining.from_pretrained(sys.argv[1], trust_remote_code=True)(**inputs), "sop_loss")
"""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", snippet, str(finished[0])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evaluation_is_exact_whatever_the_batch_size(finished, text):
    """Against a plain loop, one example at a time, over every masked token."""
    output_dir, _ = finished
    model = LambdaBertForPreTrainingSOP.from_pretrained(output_dir).eval()
    recipe = write_recipe(
        output_dir.parent / "evaluate.json",
        model_name_or_path=str(output_dir),
        output_dir=str(output_dir.parent / "evaluated"),
        do_train=None,
        config_overrides=None,
        eval_steps=None,
        per_device_eval_batch_size=5,
        **sources(text, tokenizer_name=None),
    )
    pretraining = run_language_modeling.Pretraining(*parse_arguments([recipe]))
    examples = pretraining.examples["validation"]
    collate = masking_collator(pretraining.tokenizer, pretraining.data_args, seed=42)
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


def test_evaluation_keeps_sums_instead_of_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    inputs = {
        "labels": torch.tensor([[0, 0], [-100, -100]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]]),
    }
    sums = example_sums(logits, None, inputs)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))
    torch.testing.assert_close(sums[0, :4], torch.tensor([2.0, right + wrong, 1.0, 2.0]))
    torch.testing.assert_close(sums[1, :4], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    metrics = pretraining_metrics(type("Prediction", (), {"predictions": sums.numpy()}))
    assert metrics["mlm_loss"] == metrics["loss"] == pytest.approx((right + wrong) / 2, rel=1e-6)
    assert "sentence_loss" not in metrics


@pytest.mark.parametrize("streaming", [False, True])
def test_new_model_starts_at_the_frequencies_of_the_text(text, tmp_path, streaming):
    values = dict(output_dir=str(tmp_path / "run"), objective="mlm", streaming=streaming)
    recipe = write_recipe(tmp_path / "recipe.json", **sources(text, **values))
    run = run_language_modeling.Pretraining(*parse_arguments([recipe]))
    tokens = [token for example in run.examples["train"] for token in example["input_ids"]]
    words = [token for token in tokens if token not in run.tokenizer.all_special_ids]
    head = run.model.cls.predictions
    torch.nn.init.zeros_(head.transform.LayerNorm.weight)
    predicted = head(torch.randn(1, 1, run.model.config.hidden_size)).softmax(-1)[0, 0]
    expected = torch.ones_like(predicted) + torch.bincount(torch.tensor(words), minlength=len(predicted))
    torch.testing.assert_close(predicted, expected / expected.sum())


def test_unigram_baseline(text):
    tokenizer = run_language_modeling.load_tokenizer(text / "tokenizer")
    cls, sep, a, b = tokenizer.cls_token_id, tokenizer.sep_token_id, 50, 60
    train = Dataset.from_dict({"input_ids": [[cls, a, a, sep], [cls, a, sep]]})
    evaluation = Dataset.from_dict({"input_ids": [[cls, a, b, sep]]})
    baseline = unigram_baseline(train, evaluation, tokenizer)
    assert baseline["unigram_entropy"] == pytest.approx(math.log(2))
    size = len(tokenizer) + 3
    assert baseline["unigram_cross_entropy"] == pytest.approx(-(math.log(4 / size) + math.log(1 / size)) / 2)
    assert set(unigram_baseline(None, evaluation, tokenizer)) == {"unigram_entropy"}


def test_curves_are_drawn_from_the_log(tmp_path):
    history = [
        {"step": 1, "seconds": 10.0, "mlm_loss": 5.0},
        {"step": 2, "seconds": 20.0, "eval_mlm_loss": 4.0},
    ]
    assert plot_curves(history, tmp_path / "curves.png")
    assert not plot_curves([{"step": 1, "seconds": 1.0}], tmp_path / "nothing.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipes_dry_run(recipe, text, tmp_path):
    """Every recipe with its own options, on small local text with a small model."""
    values = json.loads(recipe.read_text())
    parse_arguments([str(recipe), "--use_cpu"])
    source = ("dataset_name", "dataset_config_name", "corpus", "document_boundary", "validation_split_percentage")
    for name in (*source, "train_tokenizer", "preprocessing_num_workers"):
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
    assert [file.stem for file in RECIPES] == ["demo", "wikipedia", "wikipedia_small", "wikitext103", "wikitext2"]


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


def test_continues_from_a_model(finished, text, tmp_path):
    source, _ = finished
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


class TestMistakes:
    """Each ends in one line that names what to change, before anything is written."""

    def complaint(self, capfd, tmp_path, arguments):
        output_dir = tmp_path / "run"
        assert run_language_modeling.main([*arguments, "--output_dir", str(output_dir)]) == 1
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        assert not output_dir.exists()
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed
        return lines[0]

    def test_hub_out_of_reach(self, capfd, tmp_path):
        flags = "--do_train --do_eval --eval_steps=100 --sop".split()
        line = self.complaint(capfd, tmp_path, flags)
        assert all(way_out in line for way_out in ("hub", "--train_file", "--tokenizer_name", "configs/demo.json"))

    @pytest.mark.parametrize(
        "flags, named",
        [
            (["--do_trian"], "--do_trian"),
            (["--do_train", "--max_steps", "many"], "many"),
            (["--objective", "clm"], "clm"),
            ([], "--do_train"),
            (["--do_eval"], "--model_name_or_path"),
            (["--do_train", "--streaming"], "--max_steps"),
            (["--do_train", "--config_overrides", "hidden_size"], "field=value"),
            (["--do_train", "--config_overrides", "hidden_sizes=3"], "hidden_sizes"),
            (["--do_train", "--config_overrides", "hidden_size=30"], "num_lambda_queries"),
            (["--do_train", "--config_overrides", "hidden_size=big"], "hidden_size"),
            (["--do_train", "--config_overrides", "vocab_size=100"], "vocab_size=100"),
            (["--do_train", "--max_seq_length", "600"], "max_position_embeddings"),
            (["--do_train", "--max_seq_length", "4"], "max_seq_length"),
            (["--do_train", "--config_name", "nowhere"], "nowhere"),
            (["--do_train", "--model_name_or_path", "nowhere"], "nowhere"),
            (["--do_train", "--train_tokenizer"], "tokenizer_name"),
            (["--do_train", "--tokenizer_name", "nowhere"], "nowhere"),
            (["--do_train", "--fsdp"], "fsdp"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(self, capfd, tmp_path, text, flags, named):
        recipe = write_recipe(
            tmp_path / "r.json",
            do_train=None,
            do_eval=None,
            eval_steps=None,
            max_steps=None,
            config_overrides=None,
            **sources(text),
        )
        assert named in self.complaint(capfd, tmp_path, [recipe, *flags])

    @pytest.mark.parametrize(
        "content, named",
        [
            ('{"do_train": true, "lerning_rate": 1}', "lerning_rate"),
            ("{", "JSON"),
            ("[1]", "object"),
            (None, "r.json"),
        ],
    )
    def test_recipe(self, capfd, tmp_path, content, named):
        recipe = tmp_path / "r.json"
        if content is not None:
            recipe.write_text(content)
        assert named in self.complaint(capfd, tmp_path, [str(recipe)])

    @pytest.mark.parametrize(
        "content, named",
        [
            (b"", "train.txt"),
            (b"\n\n \n", "train.txt"),
            (b"One document. Of two sentences.\n", "another document"),
            ("Caf\xe9 au lait.\n".encode("latin-1") * 9, "UTF-8"),
            (bytes(range(256)) * 20, "train.txt"),
            (None, "train.txt"),
        ],
        ids=["empty", "blank", "one document", "latin-1", "binary", "missing"],
    )
    def test_text(self, capfd, tmp_path, text, content, named):
        file = tmp_path / "train.txt"
        if content is not None:
            file.write_bytes(content)
        recipe = write_recipe(tmp_path / "r.json", **sources(text, train_file=[str(file)], objective="nsp"))
        assert named in self.complaint(capfd, tmp_path, [recipe])

    def test_tokenizer_without_mask(self, capfd, tmp_path, text):
        tokenizer = run_language_modeling.load_tokenizer(text / "tokenizer")
        tokenizer.mask_token = None
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        recipe = write_recipe(tmp_path / "r.json", **sources(text, tokenizer_name=str(tmp_path / "tokenizer")))
        assert "mask_token" in self.complaint(capfd, tmp_path, [recipe])

    def test_whole_words_of_a_tokenizer_that_does_not_mark_them(self, capfd, tmp_path, text):
        backend = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=SPECIAL_TOKENS, show_progress=False)
        backend.train([str(text / "train.txt")], trainer)
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS))
        PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "bpe")
        cache = tmp_path / "cache"
        values = sources(text, tokenizer_name=str(tmp_path / "bpe"), data_cache_dir=str(cache), whole_word_mask=True)
        recipe = write_recipe(tmp_path / "r.json", **values)
        assert "whole_word_mask" in self.complaint(capfd, tmp_path, [recipe])
        assert not cache.exists(), "nothing was prepared"

    def test_checkpoint_of_another_shape(self, capfd, tmp_path, text, finished):
        recipe = write_recipe(tmp_path / "r.json", **sources(text, tokenizer_name=None))
        source = ["--model_name_or_path", str(finished[0])]
        line = self.complaint(capfd, tmp_path, [recipe, *source, "--config_overrides", "intermediate_size=80"])
        assert "config_overrides" in line

    def test_tokenizer_of_another_model(self, capfd, tmp_path, text, finished):
        recipe = write_recipe(tmp_path / "r.json", config_overrides=None, **sources(text))
        line = self.complaint(capfd, tmp_path, [recipe, "--model_name_or_path", str(finished[0])])
        assert "vocabulary" in line

    def test_broken_weights(self, capfd, tmp_path, text, finished):
        source = tmp_path / "source"
        source.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((finished[0] / name).read_bytes())
        (source / "model.safetensors").write_bytes((finished[0] / "model.safetensors").read_bytes()[:5000])
        recipe = write_recipe(tmp_path / "r.json", config_overrides=None, **sources(text, tokenizer_name=None))
        line = self.complaint(capfd, tmp_path, [recipe, "--model_name_or_path", str(source)])
        assert str(source) in line
