"""Training in two processes is training in one with the same global batch."""

import json
import math
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lambdabert.training.run
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.masks import MaskingCollator
from lambdabert.training.checkpoints import is_complete
from lambdabert.training.trainer import PretrainingTrainer
from modeling_lambdabert import LambdaBertForMaskedLM
from training_support import RECIPE, finish, sources, start_command, start_distributed, write_recipe

SHARDED_CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_lambda_queries": 2,
    "max_position_embeddings": 32,
}
WITHOUT_DROPOUT = {**RECIPE["config_overrides"], "hidden_dropout_prob": 0.0}


def run(text, output_dir, processes=1, **values):
    """Runs the command; returns its output folder's weights and what it printed."""
    recipe = write_recipe(
        output_dir.with_suffix(".json"),
        **{
            "output_dir": str(output_dir),
            "train_file": [str(text / "train.txt")],
            "validation_file": [str(text / "valid.txt")],
            "tokenizer_name": str(text / "tokenizer"),
            "data_cache_dir": str(output_dir.parent / "cache"),
            "config_overrides": WITHOUT_DROPOUT,
            "max_train_samples": 24,
            **values,
        },
    )
    log = output_dir.with_suffix(".log")
    if processes == 1:
        statuses = finish(start_command([recipe], log))
    else:
        statuses = finish(*start_distributed([recipe], log, processes))
    assert statuses == [0] * processes, log.read_text()
    return load_file(output_dir / "model.safetensors"), log.read_text()


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory):
    """Weights and output folder of a run in one process: two epochs, four examples a step."""
    output_dir = tmp_path_factory.mktemp("one") / "run"
    return run(text, output_dir)[0], output_dir


def assert_equal_to_rounding(one, other):
    # twelve steps of Adam at 5e-3 move each weight by up to 6e-2
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-5, msg=name)


def test_two_processes_equal_one_with_the_same_global_batch(text, one_process, tmp_path):
    weights, printed = run(text, tmp_path / "run", processes=2, per_device_train_batch_size=2)
    assert_equal_to_rounding(one_process[0], weights)
    assert "12 steps of 4 examples on 2 process(es)" in printed
    assert printed.count("Building examples: 100%") == 2, "train and validation are prepared by one process only"
    one, two = (
        json.loads((folder / "metrics.json").read_text())["eval"] for folder in (one_process[1], tmp_path / "run")
    )
    for name in ("eval_mlm_loss", "eval_mlm_accuracy", "eval_sentence_loss", "eval_masked_tokens", "eval_tokens"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("over_all", [True, False], ids=["mean over all", "mean over each"])
def test_logged_loss_is_of_one_token_in_any_number_of_processes(text, over_all, tmp_path):
    """Before anything is learned, two processes log the loss that one does."""
    first_step = {"objective": "mlm", "max_steps": 1, "logging_steps": 1, "do_eval": False, "eval_steps": None}
    first_step |= {"average_tokens_across_devices": over_all, "validation_file": None}
    run(text, tmp_path / "one", **first_step)
    run(text, tmp_path / "two", processes=2, per_device_train_batch_size=2, **first_step)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["train"] for name in ("one", "two"))
    assert two["mlm_loss"] == pytest.approx(one["mlm_loss"], rel=1e-5)


def test_goes_on_with_another_number_of_processes(text, one_process, tmp_path):
    """Each step sees the examples that it would have seen."""
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    shutil.copy(one_process[1] / "run_settings.json", output_dir)
    shutil.copytree(one_process[1] / "checkpoint-8", output_dir / "checkpoint-8")
    weights, printed = run(text, output_dir, processes=2, per_device_train_batch_size=2)
    assert "another number of processes" in printed
    assert_equal_to_rounding(one_process[0], weights)


@pytest.mark.parametrize("strategy, processes", [("group_by_length", 1), ("batch_rebalance", 2)])
def test_processes_go_on_in_the_order_of_a_later_epoch(text, tmp_path, strategy, processes):
    values = {"train_sampling_strategy": strategy, "data_seed": 3 if strategy == "group_by_length" else None}
    whole, _ = run(text, tmp_path / "whole", processes, per_device_train_batch_size=4 // processes, **values)
    epoch = json.loads((tmp_path / "whole" / "checkpoint-8" / "trainer_state.json").read_text())["epoch"]
    assert 1 < epoch < 2, "the checkpoint is within the second epoch"
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "whole" / "run_settings.json", tmp_path / "run")
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    resumed, printed = run(text, tmp_path / "run", processes=2, per_device_train_batch_size=2, **values)
    assert "checkpoint-8, step 8 of 12" in printed
    assert_equal_to_rounding(whole, resumed)


def test_loss_that_is_not_finite_in_one_process_stops_all(text, tmp_path, monkeypatch):
    """With one line; the checkpoint before it stays."""
    compute_loss = PretrainingTrainer.compute_loss

    def spoiled(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 7 and os.environ["RANK"] == "1" else loss

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", spoiled)
    output_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = write_recipe(
        tmp_path / "run.json",
        output_dir=str(output_dir),
        train_file=[str(text / "train.txt")],
        tokenizer_name=str(text / "tokenizer"),
        data_cache_dir=str(tmp_path / "cache"),
        per_device_train_batch_size=2,
        do_eval=False,
        eval_steps=None,
    )
    assert finish(*start_distributed([recipe], log)) == [1, 1], log.read_text()
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "loss of step 8" in errors[0] and f"{output_dir / 'checkpoint-4'} is" in errors[0]
    assert "Traceback" not in log.read_text()
    assert [folder.name for folder in output_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert is_complete(output_dir / "checkpoint-4") and not (output_dir / "model.safetensors").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"auto_find_batch_size": True, "gradient_checkpointing": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"torch_compile": True, "torch_compile_backend": "eager", "pad_to_multiple_of": 32},
    ],
    ids=["accumulation", "activation checkpointing", "automatic batch size", "lasting loader process", "compiled"],
)
def test_the_way_a_batch_is_computed_changes_nothing(text, one_process, tmp_path, values):
    assert_equal_to_rounding(one_process[0], run(text, tmp_path / "run", **values)[0])


def test_streams_are_shared_out_among_processes(text, tmp_path):
    stream = {"streaming": True, "shuffle_buffer_size": 8, "max_train_samples": None}
    one, _ = run(text, tmp_path / "one", **stream)
    two, _ = run(text, tmp_path / "two", processes=2, per_device_train_batch_size=2, **stream)
    assert_equal_to_rounding(one, two)


def test_bf16_with_all_savings_of_memory_trains_as_float32_does(text, tmp_path):
    savings = {"bf16": True, "gradient_checkpointing": True, "auto_find_batch_size": True}
    losses = []
    for name, values in (("plain", {}), ("savings", savings)):
        run(text, tmp_path / name, gradient_accumulation_steps=2, learning_rate=1e-3, **values)
        history = json.loads((tmp_path / name / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        losses.append([record["mlm_loss"] for record in history if "mlm_loss" in record])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0.01)  # two significant digits of bfloat16


def test_every_example_is_seen_once_an_epoch(text, tmp_path, monkeypatch):
    collate = MaskingCollator.__call__
    seen = tmp_path / "seen"

    def record(self, features, *args, **kwargs):
        with open(seen, "a") as file:
            file.writelines(f"{feature['input_ids']}\n" for feature in features)
        return collate(self, features, *args, **kwargs)

    monkeypatch.setattr(MaskingCollator, "__call__", record)
    monkeypatch.setattr(lambdabert.training.run, "rehearse", lambda *args: None)  # it has examples of its own
    run(
        text,
        tmp_path / "run",
        processes=2,
        per_device_train_batch_size=2,
        max_train_samples=40,
        max_steps=None,
        num_train_epochs=1,
        do_eval=False,
        eval_steps=None,
        validation_file=None,
    )
    examples = seen.read_text().splitlines()
    assert len(examples) == 40
    assert len(set(examples)) == 40


def sharded_gradients(rank, folder):
    """Gradients of a model whose every layer is sharded over two processes, gathered by rank 0 into `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = LambdaBertForMaskedLM(LambdaBertConfig(vocab_size=40, hidden_dropout_prob=0.0, **SHARDED_CONFIG))
    torch.save(model.state_dict(), folder / f"initial-{rank}.pt")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = torch.load(folder / "inputs.pt")
    model(input_ids=inputs[rank : rank + 1], labels=inputs[rank : rank + 1]).loss.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    dist.destroy_process_group()


def test_model_sharded_by_fsdp_has_the_same_gradients(tmp_path):
    torch.manual_seed(1)
    inputs = torch.randint(5, 40, (2, 9))
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.multiprocessing.start_processes(sharded_gradients, (tmp_path,), nprocs=2, start_method="fork")
    model = LambdaBertForMaskedLM(LambdaBertConfig(vocab_size=40, hidden_dropout_prob=0.0, **SHARDED_CONFIG))
    model.load_state_dict(torch.load(tmp_path / "initial-0.pt"))
    model(input_ids=inputs, labels=inputs).loss.backward()
    sharded = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_processes_that_would_train_by_themselves_are_refused(text, tmp_path):
    log = tmp_path / "log"
    recipe = write_recipe(tmp_path / "run.json", output_dir=str(tmp_path / "run"), use_cpu=None, **sources(text))
    assert finish(*start_distributed([recipe], log)) == [1, 1], log.read_text()
    assert "2 processes were started, but each would train by itself" in log.read_text()
    assert not (tmp_path / "run").exists()
