"""A distillation that is interrupted is resumed as if nothing had happened, or says why it cannot be."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
)

import distill_from_bert
from distillation_support import distil, distilled, write_recipe
from training_support import (
    assert_same_weights,
    finish,
    start_distributed,
    tiny_bert,
    wait_for,
)


class TestInterruption:
    def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(self, text, teachers, finished, tmp_path):
        recipe, log = write_recipe(tmp_path / "run.json", text, teachers / "classifier"), tmp_path / "log"
        process = distil(recipe, log)
        wait_for(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", process)
        os.kill(process, signal.SIGKILL)
        assert finish(process) == [-signal.SIGKILL]
        assert finish(distil(recipe, log)) == [0], log.read_text()
        assert re.search(r"Resuming from .*checkpoint-[48], step [48] of 12", log.read_text())
        assert_same_weights(finished[0], tmp_path / "run")

    def test_sigterm_saves_and_goes_on(self, text, teachers, finished, tmp_path):
        recipe, log = write_recipe(tmp_path / "run.json", text, teachers / "classifier"), tmp_path / "log"
        process = distil(recipe, log)
        wait_for(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", process)
        os.kill(process, signal.SIGTERM)
        assert finish(process) == [128 + signal.SIGTERM]
        assert "Stopped by SIGTERM" in log.read_text() and not (tmp_path / "run" / "metrics.json").exists()
        assert finish(distil(recipe, log)) == [0], log.read_text()
        assert_same_weights(finished[0], tmp_path / "run")

    def test_two_processes_go_on_in_the_order_of_a_later_epoch(self, text, teachers, tmp_path):
        for name in ("whole", "resumed"):
            recipe = write_recipe(tmp_path / f"{name}.json", text, teachers / "classifier", max_train_samples=88)
            if name == "resumed":
                (tmp_path / name).mkdir()
                shutil.copy(tmp_path / "whole" / "run_settings.json", tmp_path / name)
                shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / name / "checkpoint-8")
            log = tmp_path / f"{name}.log"
            assert finish(*start_distributed([recipe], log, command=distill_from_bert.main)) == [0, 0], log.read_text()
        epoch = json.loads((tmp_path / "whole" / "checkpoint-8" / "trainer_state.json").read_text())["epoch"]
        assert 1 < epoch < 2, "the checkpoint is within the second epoch"
        assert "Resuming from" in log.read_text()
        assert_same_weights(tmp_path / "whole", tmp_path / "resumed")

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
        output_dir = shutil.copytree(finished[0], tmp_path / "run")
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
        output_dir = shutil.copytree(finished[0], tmp_path / "run")
        recipe = write_recipe(tmp_path / "again.json", text, other, output_dir=str(output_dir))
        assert distill_from_bert.main([recipe]) == 1
        assert "belongs to another run" in capfd.readouterr().err

    def test_other_rates_hold_from_the_checkpoint_on(self, text, teachers, finished, capfd, tmp_path):
        shutil.copytree(finished[0], tmp_path / "run")
        recipe = write_recipe(tmp_path / "run.json", text, teachers / "classifier", max_steps=16, logging_steps=1)
        flags = ["--attention_steps", "6", "--learning_rate", "1e-4", "--lr_scheduler_type", "constant"]
        assert distill_from_bert.main([recipe, *flags, "--attention_learning_rate", "1e-4"]) == 1
        assert "the first stage ended at step 6" in capfd.readouterr().err
        assert distill_from_bert.main([recipe, *flags, "--warmup_steps", "0"]) == 0
        history = json.loads((tmp_path / "run" / "checkpoint-16" / "trainer_state.json").read_text())["log_history"]
        rates = [record["learning_rate"] for record in history if record["step"] > 12 and "learning_rate" in record]
        assert rates == [1e-4] * 4
        assert "| learning_rate | 0.0001 (0.005 until step 12) |" in (tmp_path / "run" / "README.md").read_text()

    def test_longer_run_does_not_go_back_to_the_first_stage(self, text, teachers, finished, capfd, tmp_path):
        shutil.copytree(finished[0], tmp_path / "run")
        recipe = write_recipe(tmp_path / "run.json", text, teachers / "classifier", max_steps=16)
        assert distill_from_bert.main([recipe]) == 1
        assert "give --attention_steps 6" in capfd.readouterr().err
        assert distill_from_bert.main([recipe, "--attention_steps", "6"]) == 0
        history = json.loads((tmp_path / "run" / "checkpoint-16" / "trainer_state.json").read_text())["log_history"]
        assert [record["step"] for record in history if "attention" in record] == [3, 6]
