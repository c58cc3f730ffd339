"""The options of the pretraining command: how flags and recipes are read, and what follows from them."""

import re
from dataclasses import fields

import pytest

import distill_from_bert
import run_language_modeling
from lambdabert.training import option_rules
from lambdabert.training.recipes import parse_overrides, read_object
from run_language_modeling import parse_arguments
from training_support import RECIPE, write_recipe


def test_main_command_means_what_it_documents():
    flags = "--output_dir=models --do_train --do_eval --eval_steps=100 --sop".split()
    model_args, data_args, training_args = parse_arguments(flags)
    assert (training_args.eval_strategy, training_args.eval_steps) == ("steps", 100)
    assert (data_args.dataset_name, data_args.dataset_config_name) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert data_args.objective == "sop"
    assert run_language_modeling.DEFAULT_TOKENIZER.endswith("bert-base-cased")
    assert training_args.report_to == []


@pytest.mark.parametrize(
    "options, names",
    [
        ([], (None, run_language_modeling.DEFAULT_TOKENIZER)),
        (["--model_name_or_path", "mine"], ("mine", "mine")),
        (["--model_name_or_path", "mine", "--tokenizer_name", "other"], ("mine", "other")),
        (["--train_tokenizer"], (None, None)),
    ],
)
def test_the_hub_is_asked_for_what_is_loaded_alone(options, names):
    run = run_language_modeling.Pretraining(*parse_arguments(["--do_train", *options]))
    model, _, tokenizer = run.hub_names()
    assert (model, tokenizer) == names


def test_a_file_of_an_option_that_is_no_json_is_named(tmp_path):
    (tmp_path / "fsdp.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"^fsdp_config='.*fsdp\.json' must be a JSON object or a file of one"):
        read_object("fsdp_config", str(tmp_path / "fsdp.json"))


@pytest.mark.parametrize("command", ["--sop", "--sop --dry_run"])
def test_command_that_is_not_told_what_to_do_trains_and_evaluates(command):
    _, data_args, training_args = parse_arguments(command.split())
    assert training_args.output_dir == "models" and training_args.do_train and training_args.do_eval
    assert (training_args.eval_strategy, training_args.eval_steps) == ("steps", 100)
    assert data_args.objective == "sop"
    said = " ".join(training_args.notes)
    for taken in ("output_dir=models", "do_train=True", "do_eval=True", "eval_steps=100"):
        assert taken in said


@pytest.mark.parametrize("name, rises", [("perplexity", False), ("mlm_loss", False), ("mlm_accuracy", True)])
def test_the_best_model_is_the_one_that_is_better(name, rises):
    best = f"--do_train --do_eval --save_steps 2 --eval_steps 2 --load_best_model_at_end --metric_for_best_model {name}"
    *_, training_args = parse_arguments(best.split())
    assert training_args.greater_is_better is rises
    *_, training_args = parse_arguments([*best.split(), "--greater_is_better", str(not rises)])
    assert training_args.greater_is_better is not rises


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_by_a_metric_knows_which_way_is_better(schedule):
    command = f"--do_train --do_eval --eval_steps 2 --lr_scheduler_type {schedule} --metric_for_best_model".split()
    for metric, mode in (("mlm_loss", "min"), ("mlm_accuracy", "max")):
        *_, training_args = parse_arguments([*command, metric])
        assert training_args.lr_scheduler_kwargs == {"mode": mode}
    *_, training_args = parse_arguments([*command, "loss", "--lr_scheduler_kwargs", '{"patience": 3, "mode": "max"}'])
    assert training_args.lr_scheduler_kwargs == {"mode": "max", "patience": 3}


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


@pytest.mark.parametrize("command", [run_language_modeling, distill_from_bert])
def test_help_begins_with_what_the_command_does_and_shows_nothing_that_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = capsys.readouterr().out
    assert command.__doc__.strip() in said and said.index("\ntext:") < said.index("\ntraining, as the Trainer")
    shown = {name for name in re.findall(r"^  --(\w+)", said, re.MULTILINE) if not name.startswith("no_")}
    offered = {option.name for group in command.ARGUMENT_GROUPS for option in fields(group) if option.init}
    assert shown == offered - set(option_rules.REFUSED)


def test_overrides_are_read_as_text_and_as_an_object():
    assert parse_overrides("hidden_size=256, local_context_size=None,lambda_norm=rms,tie_word_embeddings=False") == {
        "hidden_size": 256,
        "local_context_size": None,
        "lambda_norm": "rms",
        "tie_word_embeddings": False,
    }
    assert parse_overrides({"hidden_size": 256}) == {"hidden_size": 256}
    assert parse_overrides(None) == {}


def test_a_flag_takes_evaluations_out_of_a_recipe(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json")
    *_, training_args = parse_arguments([recipe])
    assert training_args.eval_strategy == "steps"
    *_, training_args = parse_arguments([recipe, "--eval_strategy", "no"])
    assert training_args.eval_strategy == "no" and "eval_steps=6 has no effect" in training_args.notes[-1]
