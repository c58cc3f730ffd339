"""Each private name of other libraries that the project relies on: a release without one fails here with the reason."""

import argparse
import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments, initialization
from transformers.utils import output_capturing

from training_support import tiny_bert

ROOT = Path(__file__).resolve().parent.parent
FILES = [*ROOT.glob("*.py"), *(file for name in ("lambdabert", "benchmarks") for file in (ROOT / name).rglob("*.py"))]
# with classes that subclass those of other libraries
MODULES = ["lambda_layer", "modeling_lambdabert", "lambdabert.training.trainer", "lambdabert.distillation.trainer"]


def source(function):
    return inspect.getsource(function)


def same_fingerprint():
    one, same, other = (Dataset.from_dict({"a": values}) for values in ([1], [1], [2]))
    return isinstance(one._fingerprint, str) and one._fingerprint == same._fingerprint != other._fingerprint


def saves_states_before_the_trainers():
    saving = source(Trainer._save_checkpoint)
    return 0 < saving.find("self._save_rng_state(") < saving.find("self.state.save_to_json(")


def flash_attention_is_refused():
    return all(
        name in source(PreTrainedModel)
        for name in ("self._supports_flash_attn", "self._supports_sdpa", "self._supports_flex_attn")
    )


# name: (an assertion, who relies on it and what would break)
PRIVATE = {
    "_current_graph_task_id": (
        lambda: torch._C._current_graph_task_id() == -1,
        "LambdaLayer asks whether a backward pass is running: else activation checkpointing, which computes the layer "
        "again in it, would update BatchNorm's running statistics twice.",
    ),
    "_functorch": (
        lambda: (
            not torch._C._functorch.is_batchedtensor(torch.zeros(2))
            and torch.func.vmap(lambda row: row + torch._C._functorch.is_batchedtensor(row))(torch.zeros(2)).all()
        ),
        "Masks, tokens and positions are not looked at within vmap: else a vmapped model would fail.",
    ),
    "_is_exporting_flag": (
        lambda: torch.compiler._is_exporting_flag is torch.compiler.is_exporting() is False,
        "The layer asks whether a program is exported: else exported programs would have operators that runtimes lack.",
    ),
    **{
        f"_global_{name}_hooks": (
            lambda name=name: vars(torch.nn.modules.module)[f"_global_{name}_hooks"] == {},
            "Padding is computed where a hook on all modules sees it: else it would be given packed rows.",
        )
        for name in ("forward", "forward_pre", "backward", "backward_pre")
    },
    "_forward_hooks": (
        lambda: nn.Identity()._forward_hooks == {},
        "LambdaBertModel leaves out padding, and a layer tiles its feed-forward part, only if no hook watches.",
    ),
    "_actions": (
        lambda: argparse.ArgumentParser()._actions[0].dest == "help",
        "--help of the commands that train leaves out the options that they refuse.",
    ),
    "_backward_hooks": (
        lambda: nn.Identity()._backward_hooks == {},
        "LambdaBertModel leaves out padding only if no hook watches.",
    ),
    "_backward_pre_hooks": (
        lambda: nn.Identity()._backward_pre_hooks == {},
        "LambdaBertModel leaves out padding only if no hook watches.",
    ),
    "_forward_pre_hooks": (
        lambda: nn.Identity()._forward_pre_hooks == {},
        "LambdaBertModel leaves out padding, and a layer tiles its feed-forward part, only if no hook watches.",
    ),
    "_fingerprint": (
        same_fingerprint,
        "Prepared text is found again in the cache by it.",
    ),
    "_model_mapping": (
        lambda: callable(AutoModel._model_mapping.register),
        "modeling_lambdabert registers several classes for AutoModelForPreTraining, of which the config names one; "
        "AutoModel.register takes a single class.",
    ),
    "_init_weights": (
        lambda: "_init_weights" in source(PreTrainedModel),
        "LambdaBertPreTrainedModel initialises lambda layers there; else they would keep the values of torch.empty.",
    ),
    "_is_hf_initialized": (
        lambda: '"_is_hf_initialized"' in source(initialization),
        "LambdaBertModel knows by it that weights are being loaded; a pooler that a checkpoint lacks would differ "
        "between processes, and with it the predictions of an adapter above it.",
    ),
    "_no_split_modules": (
        lambda: "_no_split_modules" in source(PreTrainedModel),
        "device_map='auto' and FSDP keep a layer on one device by it.",
    ),
    "_supports_flash_attn": (flash_attention_is_refused, "An attn_implementation that has no effect is refused by it."),
    "_supports_sdpa": (flash_attention_is_refused, "An attn_implementation that has no effect is refused by it."),
    "_supports_flex_attn": (flash_attention_is_refused, "An attn_implementation that has no effect is refused by it."),
    "_supports_attention_backend": (
        lambda: isinstance(PreTrainedModel._supports_attention_backend, bool),
        "BERT sets it; with it, libraries would give the model an attention of their own.",
    ),
    "_can_record_outputs": (
        lambda: "_can_record_outputs" in source(output_capturing),
        "output_hidden_states and output_lambda_params are collected by it; the outputs would be None.",
    ),
    "_load_best_model": (
        lambda: "self._load_best_model()" in source(Trainer._finalize_training),
        "InterruptibleTrainer checks the best checkpoint before loading it; the Trainer's own loads half of one.",
    ),
    "_save_checkpoint": (
        lambda: "self._save_checkpoint(" in source(Trainer._maybe_log_save_evaluate),
        "InterruptibleTrainer removes what is left of a checkpoint, and says it if the disk is full.",
    ),
    "_save_rng_state": (
        saves_states_before_the_trainers,
        "InterruptibleTrainer waits there for all processes, so that trainer_state.json marks a complete checkpoint.",
    ),
    "_orig_mod": (
        lambda: isinstance(torch.compile(nn.Identity(), backend="eager")._orig_mod, nn.Identity),
        "Interpretation refuses a compiled model, whose hooks do not run.",
    ),
    "_compiled_call_impl": (
        lambda: nn.Identity()._compiled_call_impl is None,
        "Interpretation refuses a model that was compiled in place, whose hooks do not run.",
    ),
    "_internal_call": (
        lambda: "_internal_call" in inspect.signature(Trainer.save_model).parameters,
        "A model is saved by it without a push, which comes after the report.",
    ),
    "_finish_current_push": (
        lambda: callable(Trainer._finish_current_push),
        "The push at the end waits for that of a checkpoint.",
    ),
    "_determine_best_metric": (
        lambda: "self._determine_best_metric(" in source(Trainer._maybe_log_save_evaluate),
        "A run that a signal ends is saved by it under save_strategy='best', which else saves the best alone.",
    ),
    "_get_train_sampler": (
        lambda: "self._get_train_sampler" in source(Trainer.get_train_dataloader),
        "Batches of similar length are made there; they would be random, and of a distillation mostly padding.",
    ),
    "_train_batch_size": (
        lambda: "self._train_batch_size" in source(Trainer.get_train_dataloader),
        "The order of batches of similar length follows the batch that auto_find_batch_size found.",
    ),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_name_is_there(name):
    assertion, reason = PRIVATE[name]
    try:
        there = assertion()
    except AttributeError:
        there = False
    assert there, f"{name} is not what it was. {reason}"


class NamesOfOthers(ast.NodeVisitor):
    """Collects private names that are used, and those that the project defines itself."""

    pattern = re.compile(r"_[a-z]\w*")

    def __init__(self):
        self.used, self.defined = set(), set()

    def note(self, name):
        if self.pattern.fullmatch(str(name)):
            self.used.add(name)

    def visit_FunctionDef(self, node):
        self.defined.add(node.name)
        self.generic_visit(node)

    def visit_Attribute(self, node):
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        of_python = isinstance(node.value, ast.Name) and node.value.id in sys.stdlib_module_names
        if of_self and isinstance(node.ctx, ast.Store):
            self.defined.add(node.attr)
        elif not of_python:
            self.note(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
            self.note(getattr(node.args[1], "value", None))
        self.generic_visit(node)

    def visit_keyword(self, node):
        self.note(node.arg)
        self.generic_visit(node)

    def visit_ImportFrom(self, node):
        for alias in node.names:
            self.note(alias.name)


def test_every_private_name_in_use_is_listed():
    names = NamesOfOthers()
    for file in FILES:
        names.visit(ast.parse(file.read_text(encoding="utf-8")))
    assert {"_fingerprint", "_model_mapping"} <= names.used, "the search finds what is known to be there"
    assert names.used - names.defined <= set(PRIVATE)


def test_every_private_name_that_is_overridden_is_listed():
    overridden = set()
    for module in map(importlib.import_module, MODULES):
        for each in vars(module).values():
            if not inspect.isclass(each) or each.__module__ != module.__name__:
                continue
            bases = [base for base in each.__mro__ if base.__module__.partition(".")[0] in ("transformers", "torch")]
            private = (name for name in vars(each) if re.fullmatch(r"_[a-z]\w*", name))
            overridden |= {name for name in private if any(name in vars(base) for base in bases)}
    assert {"_init_weights", "_save_checkpoint"} <= overridden, "the search finds what is known to be there"
    set_by_transformers = {"_auto_class", "_can_set_experts_implementation_cached_value"}
    assert overridden - set_by_transformers <= set(PRIVATE)


class TestOrderOfEvents:
    """What the Trainers rely on without a name for it."""

    def test_first_group_of_the_optimizer_is_the_one_that_decays(self, tmp_path):
        args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.3, use_cpu=True, report_to=[])
        groups = Trainer(model=tiny_bert(), args=args).create_optimizer().param_groups
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]

    def test_training_begins_after_a_checkpoint_is_loaded(self):
        loop = source(Trainer._inner_training_loop)
        order = [loop.find(f"{call}(") for call in ("_init_training_state", "_prepare_for_training", "on_train_begin")]
        assert order == sorted(order) and min(order) > 0, "OwnSchedule replaces the loaded schedule on_train_begin"
        assert "self._load_optimizer_and_scheduler(" in source(Trainer._prepare_for_training)
