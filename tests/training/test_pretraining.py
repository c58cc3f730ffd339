"""The pretraining command: its options, its metrics, what it saves, and what it says to a mistake."""

import errno
import json
import logging
import math
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import distill_from_bert
import lambdabert.training.run
import run_language_modeling
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.masks import masking_collator
from lambdabert.training import option_rules
from lambdabert.training.metrics import example_sums, pretraining_metrics
from lambdabert.training.models import make_model
from lambdabert.training.recipes import parse_overrides
from lambdabert.training.report import plot_curves, unigram_baseline
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingSOP
from run_language_modeling import parse_arguments
from text_support import SPECIAL_TOKENS
from training_support import RECIPE, finish, run_card_snippet, start_command, write_recipe

ROOT = Path(run_language_modeling.__file__).parent
RECIPES = sorted(file for file in (ROOT / "configs").glob("*.json") if "teacher" not in json.loads(file.read_text()))


TRAINING_ALONE = ("per_device_train_batch_size", "learning_rate", "max_steps", "save_steps", "logging_steps")


def sources(text, **values):
    return {
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "tokenizer_name": str(text / "tokenizer"),
        "data_cache_dir": str(text / "cache"),
        **values,
    }


@contextmanager
def caplog_at_debug():
    """The records that the commands log, of any level; their `log_level` ends with it."""
    records, verbosity = [], transformers.logging.get_verbosity()
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("lambdabert").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("lambdabert").removeHandler(handler)
        logging.getLogger("lambdabert").setLevel(logging.INFO)
        transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The output folder of a small run, and what the run printed."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    recipe = write_recipe(
        output_dir.with_suffix(".json"),
        output_dir=str(output_dir),
        masked_sentence='"The fox" sees the [MASK].',
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


@pytest.mark.parametrize("command", ["--sop", "--sop --dry_run"])
def test_command_that_is_not_told_what_to_do_trains_and_evaluates(command):
    _, data_args, training_args = parse_arguments(command.split())
    assert training_args.output_dir == "models" and training_args.do_train and training_args.do_eval
    assert (training_args.eval_strategy, training_args.eval_steps) == ("steps", 100)
    assert data_args.objective == "sop"
    said = " ".join(training_args.notes)
    for taken in ("output_dir=models", "do_train=True", "do_eval=True", "eval_steps=100"):
        assert taken in said


def test_what_is_given_is_not_taken_as_given(tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text('{"eval_strategy": "epoch"}')
    *_, training_args = parse_arguments([str(recipe), "--output_dir", "here"])
    assert training_args.do_train and training_args.do_eval and training_args.eval_strategy == "epoch"
    assert training_args.output_dir == "here" and "output_dir" not in " ".join(training_args.notes)
    *_, training_args = parse_arguments(["--do_train"])
    assert not training_args.do_eval and training_args.eval_strategy == "no"


def test_flags_after_a_recipe_win(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", corpus="python-docs", max_steps=7)
    _, data_args, training_args = parse_arguments([recipe, "--max_steps", "9", "--objective", "mlm"])
    assert (training_args.max_steps, training_args.learning_rate) == (9, RECIPE["learning_rate"])
    assert (data_args.objective, data_args.corpus) == ("mlm", "python-docs")


def test_what_flags_leave_without_effect_in_a_recipe_is_told(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", corpus="python-docs")
    *_, training_args = parse_arguments([recipe, "--do_eval", "false"])
    assert any("eval_steps=6 has no effect: it needs --do_eval" in note for note in training_args.notes)
    with pytest.raises(ValueError, match="eval_steps=7.0 has no effect"):
        parse_arguments([recipe, "--do_eval", "false", "--eval_steps", "7"])


def test_every_option_of_the_trainer_has_a_rule_or_works():
    """The tables name no option that there is not: a new release of the Trainer may drop some."""
    options = {
        option.name
        for group in (*run_language_modeling.ARGUMENT_GROUPS, *distill_from_bert.ARGUMENT_GROUPS)
        for option in fields(group)
    }
    needy = {name for _, names in option_rules.NEEDS for name in names}
    tables = (option_rules.REFUSED, option_rules.AT_LEAST, option_rules.ABOVE, option_rules.BELOW)
    assert needy.union(*tables) <= options
    assert not needy & set(option_rules.REFUSED)


def test_help_tells_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: models)" in said and "(default: 16000)" in said and "(default: 0.06)" in said


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
    assert printed.rstrip().splitlines()[-6] == '"The fox" sees the [MASK].'
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


def test_card_works_elsewhere_without_this_code(finished, tmp_path):
    then = """
from transformers import AutoModelForPreTraining
inputs = tokenizer("The fox sees the river.", "A sailor sells bread.", return_tensors="pt")
assert inputs["token_type_ids"].sum() > 0
assert model.config.vocab_size == len(tokenizer) == model(**inputs).logits.shape[-1]
assert hasattr(AutoModelForPreTraining.from_pretrained("run", trust_remote_code=True)(**inputs), "sop_loss")
"""
    done = run_card_snippet(finished[0], tmp_path, then)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'sequence'") == 5


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
        **dict.fromkeys(TRAINING_ALONE),
        **sources(text, tokenizer_name=None),
    )
    pretraining = run_language_modeling.Pretraining(*parse_arguments([recipe]))
    pretraining.prepare()
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
    run.prepare()
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


class TestStoredModel:
    """What a run starts from."""

    @pytest.fixture
    def stored(self, tmp_path):
        """A small model and its folder."""
        torch.manual_seed(0)
        model = LambdaBertForMaskedLM(LambdaBertConfig(vocab_size=60, **RECIPE["config_overrides"]))
        model.save_pretrained(tmp_path)
        return model, tmp_path

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_computes_in_float32_whatever_it_is_stored_in(self, stored, caplog, dtype):
        model, folder = stored
        model.to(dtype).save_pretrained(folder)
        with caplog.at_level("INFO"):
            loaded = make_model(
                LambdaBertForMaskedLM, LambdaBertConfig.from_pretrained(folder), str(folder), overridden=False
            )
        assert f"stored in {str(dtype).removeprefix('torch.')} and computed in float32" in caplog.text
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight.float()), name
        loaded.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"

    def test_new_and_left_out_heads_are_named(self, stored, caplog):
        model, folder = stored
        with caplog.at_level("INFO"):
            grown = make_model(LambdaBertForPreTrainingSOP, model.config, str(folder), overridden=False)
        assert "New weights" in caplog.text and "bert.pooler.dense.weight" in caplog.text
        grown.save_pretrained(folder)
        with caplog.at_level("INFO"):
            make_model(LambdaBertForMaskedLM, model.config, str(folder), overridden=False)
        assert "Left out weights" in caplog.text and "cls.seq_relationship.weight" in caplog.text

    @pytest.mark.parametrize(
        "change, named",
        [
            (lambda weights: weights.pop("bert.encoder.layer.1.attention.self.to_keys.weight"), "lacks bert.encoder"),
            (lambda weights: weights.update({"bert.encoder.layer.2.more": torch.ones(2)}), "no place for bert.encoder"),
            (lambda weights: weights.update({"cls.predictions.bias": torch.ones(7)}), "another shape"),
            (lambda weights: weights["cls.predictions.bias"].fill_(math.inf), r"not finite \(cls.predictions.bias"),
        ],
        ids=["missing", "unknown", "shape", "not finite"],
    )
    def test_damaged_weights_are_refused(self, stored, change, named):
        model, folder = stored
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=named) as error:
            make_model(LambdaBertForMaskedLM, model.config, str(folder), overridden=False)
        assert "config_overrides" not in str(error.value), "none were given"


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

    @pytest.fixture
    def prepared(self, monkeypatch):
        """The texts that were read: reading one ends the command."""
        read = []

        def load(*args, **kwargs):
            read.append(args)
            raise AssertionError("text was read")

        monkeypatch.setattr(lambdabert.training.run, "load_corpus", load)
        return read

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
            ("--do_trian", "--do_trian"),
            ("--do_train false --do_eval false", "--do_train"),
            ("--do_eval", "--model_name_or_path"),
            ("--max_steps many", "many"),
            ("--learning_rate fast", "learning_rate"),
            ("--objective clm", "clm"),
            ("--eval_strategy often", "often"),
            # values that cannot work
            ("--learning_rate inf", "learning_rate=inf"),
            ("--learning_rate nan", "learning_rate=nan"),
            ("--learning_rate -1", "learning_rate=-1.0"),
            ("--weight_decay nan", "weight_decay=nan"),
            ("--max_grad_norm nan", "max_grad_norm=nan"),
            ("--mlm_probability nan", "mlm_probability=nan"),
            ("--adam_beta1 1", "adam_beta1=1.0"),
            ("--adam_beta2 -0.1", "adam_beta2=-0.1"),
            ("--adam_epsilon 0", "adam_epsilon=0"),
            ("--warmup_steps -1", "warmup_steps=-1"),
            ("--gradient_accumulation_steps -2", "gradient_accumulation_steps=-2"),
            ("--per_device_train_batch_size 0", "per_device_train_batch_size=0"),
            ("--per_device_eval_batch_size 0", "per_device_eval_batch_size=0"),
            ("--num_train_epochs -1 --max_steps -1", "num_train_epochs=-1"),
            ("--max_steps 0", "max_steps=0"),
            ("--max_steps -5", "max_steps=-5"),
            ("--eval_steps 0", "eval_steps=0"),
            ("--save_steps 0", "save_steps=0"),
            ("--logging_steps 0", "logging_steps=0"),
            ("--logging_steps 2.5", "logging_steps"),
            ("--save_total_limit 0", "save_total_limit=0"),
            ("--seed -1", "seed=-1"),
            ("--dataloader_num_workers -1", "dataloader_num_workers=-1"),
            ("--train_tokenizer --vocab_size 3", "vocab_size=3"),
            ("--lr_scheduler_kwargs nonsense", "lr_scheduler_kwargs"),
            ("--accelerator_config nowhere.json", "accelerator_config"),
            # what the Trainer and its parts refuse
            ("--report_to nobody", "report_to=nobody"),
            ("--report_to flyte", "report_to=flyte"),
            ("--bf16_full_eval --fp16_full_eval", "fp16"),
            ("--optim galore_adamw --optim_target_modules all-linear", "galore_torch"),
            ("--optim lomo", "lomo"),
            ("--optim sgd --optim_args momentum", "Trainer"),
            ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":1}', "cycles"),
            ("--torch_compile_backend turbo", "torch_compile_backend=turbo"),
            ("--torch_compile_mode fastest", "torch_compile_mode=fastest"),
            ('--activation_checkpointing --activation_checkpointing_kwargs {"deep":1}', "deep"),
            ('--accelerator_config {"quick":1}', "quick"),
            ("--dataloader_num_workers 1 --dataloader_multiprocessing_context teleport", "teleport"),
            ('--deepspeed {"train_batch_size":1}', "deepspeed"),
            ("--fsdp full_shard", "fsdp"),
            ("--push_to_hub", "push_to_hub"),
            ("--load_best_model_at_end --save_steps 6 --eval_steps 6 --metric_for_best_model beauty", "beauty"),
            # what has no effect
            ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1"),
            ("--do_predict", "do_predict"),
            ("--resume_from_checkpoint here", "resume_from_checkpoint"),
            ("--use_liger_kernel", "use_liger_kernel"),
            ("--save_only_model", "save_only_model"),
            ("--vocab_size 100", "vocab_size=100"),
            ("--lowercase", "lowercase"),
            ("--do_train --do_eval false --eval_steps 7", "eval_steps=7"),
            ("--do_train --max_eval_samples 7", "max_eval_samples=7"),
            ("--eval_strategy epoch --eval_steps 7", "eval_steps=7"),
            ("--max_steps 3 --num_train_epochs 2", "num_train_epochs=2"),
            ("--lr_scheduler_type constant --warmup_steps 3", "warmup_steps=3"),
            ("--optim sgd --adam_beta1 0.8", "adam_beta1=0.8"),
            ("--run_name mine", "run_name=mine"),
            ("--hub_model_id mine", "hub_model_id=mine"),
            ("--dataloader_prefetch_factor 2", "dataloader_prefetch_factor=2"),
            # sentence, config, tokenizer
            ("--masked_sentence nothing", "masked_sentence='nothing'"),
            ("--masked_sentence [MASK][MASK]", "2 times"),
            ("--masked_sentence " + "fox." * 200 + "[MASK]", "shorten it"),
            ("--masked_sentence=", "masked_sentence is empty"),
            ("--config_overrides hidden_size", "field=value"),
            ("--config_overrides hidden_size=8,hidden_size=16", "hidden_size"),
            ("--config_overrides hidden_sizes=3", "hidden_sizes"),
            ("--config_overrides hidden_size=30", "num_lambda_queries"),
            ("--config_overrides hidden_size=big", "hidden_size"),
            ("--config_overrides layer_norm_eps=NaN", "nan"),
            ("--config_overrides vocab_size=100", "vocab_size=100"),
            ("--config_overrides type_vocab_size=1", "type_vocab_size=1"),
            ("--config_overrides pad_token_id=7", "pad_token_id=7"),
            ("--config_overrides num_hidden_layers=1000000000", "GiB"),
            ("--config_overrides intermediate_size=1000000000", "intermediate_size=1000000000"),
            ("--config_overrides hidden_size=8000000000000000000", "tensor"),
            ("--per_device_train_batch_size 1000000000", "per_device_train_batch_size"),
            ("--max_seq_length 600", "max_position_embeddings"),
            ("--max_seq_length 4", "max_seq_length"),
            ("--config_name nowhere", "nowhere"),
            ("--model_name_or_path nowhere", "nowhere"),
            ("--train_tokenizer", "tokenizer_name"),
            ("--tokenizer_name nowhere", "nowhere"),
            ("--streaming --max_steps -1", "--max_steps"),
        ],
    )
    def test_options(self, capfd, tmp_path, text, prepared, flags, named):
        values = {**sources(text), "use_cpu": True, "disable_tqdm": True}
        if "masked_sentence" in flags and "fox" in flags:
            values["config_overrides"] = {"max_position_embeddings": 128}
        if "train_tokenizer" in flags and "vocab_size" in flags:
            del values["tokenizer_name"]
        if "--do_train" in flags.split():
            del values["validation_file"]
        recipe = tmp_path / "r.json"
        recipe.write_text(json.dumps(values))
        assert named in self.complaint(capfd, tmp_path, [str(recipe), *flags.split()])
        assert not prepared

    @pytest.mark.parametrize(
        "content, named",
        [
            ('{"do_train": true, "lerning_rate": 1}', "lerning_rate"),
            ("{", "JSON"),
            ("[1]", "object"),
            (None, "r.json"),
            ('{"max_steps": 3, "max_steps": 4}', "max_steps"),
            ('{"max_steps": "3"}', 'max_steps is "3", but it takes a whole number'),
            ('{"max_steps": 3.5}', "whole number"),
            ('{"max_steps": null}', "max_steps is null"),
            ('{"learning_rate": true}', "learning_rate is true, but it takes a number"),
            ('{"learning_rate": NaN}', "learning_rate=nan"),
            ('{"do_train": 1}', "do_train is 1, but it takes true or false"),
            ('{"train_file": [["a"]]}', "a list of strings"),
            ('{"train_file": {"a": 1}}', "a list of strings"),
            ('{"output_dir": 5}', "output_dir is 5, but it takes a string"),
            ('{"config_overrides": [1]}', "an object"),
            ('{"config_overrides": {"layer_norm_eps": Infinity}}', "inf"),
            ('{"config_overrides": {"hidden_size": {"a": 1}}}', "hidden_size"),
            ('{"lr_scheduler_type": "steep"}', "steep"),
            ('{"eval_strategy": "often"}', "often"),
            ('{"objective": "clm"}', "clm"),
            ('{"debug": ["everything"]}', "everything"),
            ("[" * 100_000, "JSON"),
        ],
    )
    def test_recipe(self, capfd, tmp_path, text, prepared, content, named):
        recipe = tmp_path / "r.json"
        if content is not None:
            recipe.write_text(content)
        flags = ["--tokenizer_name", str(text / "tokenizer"), "--validation_file", str(text / "valid.txt")]
        assert named in self.complaint(capfd, tmp_path, [str(recipe), *flags])
        assert not prepared

    @pytest.mark.parametrize(
        "name, content, named",
        [
            ("vocab.txt", bytes(range(256)), "not a text file"),
            ("vocab.txt", b"", "[PAD]"),
            ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nfox\n", "[MASK]"),
            ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfox\nfox\n", "'fox' twice"),
            ("tokenizer.json", b"{}", "tokenizer.json"),
            ("folder/tokenizer.json", b'{"model": ', "no tokenizer that can be read"),
            ("folder/tokenizer.json", b'{"model": 5}', "no tokenizer that can be read"),
            ("folder/tokenizer_config.json", b"[]", "no tokenizer that can be read"),
        ],
    )
    def test_broken_tokenizer(self, capfd, tmp_path, text, prepared, name, content, named):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        source = file if file.parent == tmp_path else file.parent
        line = self.complaint(
            capfd, tmp_path, ["--train_file", str(text / "train.txt"), "--tokenizer_name", str(source)]
        )
        assert named in line and f"tokenizer_name={source}" in line
        assert not prepared

    @pytest.mark.parametrize(
        "content", ['{"hidden_size": ', "[1]", '{"hidden_size": "wide"}', '{"model_type": "bert"}']
    )
    def test_broken_config(self, capfd, tmp_path, text, prepared, content):
        (tmp_path / "config.json").write_text(content)
        sources = ["--train_file", str(text / "train.txt"), "--tokenizer_name", str(text / "tokenizer")]
        line = self.complaint(capfd, tmp_path, [*sources, "--config_name", str(tmp_path / "config.json")])
        assert str(tmp_path) in line or "hidden_size" in line
        assert "drop" not in line, "what was not given cannot be dropped"
        assert not prepared

    def test_mistake_of_the_program_names_its_type(self, capfd, tmp_path, text, monkeypatch):
        def broken(*args, **kwargs):
            raise KeyError("words")

        monkeypatch.setattr(lambdabert.training.run, "load_corpus", broken)
        recipe = write_recipe(tmp_path / "r.json", **sources(text))
        assert "KeyError: 'words'" in self.complaint(capfd, tmp_path, [recipe])
        recipe = write_recipe(tmp_path / "r.json", log_level="debug", **sources(text))
        with caplog_at_debug() as said:
            assert run_language_modeling.main([recipe, "--output_dir", str(tmp_path / "run")]) == 1
        assert any(record.exc_info and record.exc_info[0] is KeyError for record in said)

    def test_full_disk_at_the_end(self, capfd, tmp_path, text, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")

        monkeypatch.setattr(lambdabert.training.run, "write_json", full)
        recipe = write_recipe(tmp_path / "r.json", output_dir=str(tmp_path / "run"), max_steps=1, **sources(text))
        assert run_language_modeling.main([recipe]) == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "No space left" in lines[0]

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
