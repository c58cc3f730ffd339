"""The settings that define a run: those that decide the weights of its result.

They are recorded in the output folder. A run that differs in one of them is another run, except for the length and the
schedule of the learning rate, which may change when a run is resumed from a checkpoint.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lambdabert.text.arguments import TextArguments
from lambdabert.text.tokenizers import tokenizer_rules
from lambdabert.training.option_rules import REFUSED, SCHEDULES_BY_EVALUATION

EXAMPLES_HASHED_AT_A_TIME = 10_000
# where and how fast data are prepared, not what they are
PLACE_AND_SPEED_FIELDS = ("data_cache_dir", "preprocessing_num_workers")
# what is evaluated
EVALUATION_DATA_FIELDS = ("validation_file", "max_eval_samples", "eval_mlm_probability")
# arguments of the Trainer that affect neither the weights nor which checkpoint is the result
WATCHING_FIELDS = (
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug", "skip_memory_metrics"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval"),
    *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "do_train", "do_eval", "dry_run", "output_dir"),
    *("eval_on_start", "eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"),
)
# where and how fast the same steps are computed
COMPUTING_FIELDS = (
    *("use_cpu", "local_rank", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "auto_find_batch_size"),
    *("full_determinism", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config"),
)
# their product counts; they count themselves only where they decide which examples a step has
BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")
EXAMPLES_OF_A_STEP = "per_device_train_batch_size x gradient_accumulation_steps x processes"
ORDERS_BY_BATCH = ("batch_rebalance",)
# what decides a learning rate, or a result, that depends on the course of evaluation
EVALUATION_SCHEDULE_FIELDS = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")
# how long a run is
LENGTH_FIELDS = ("max_steps", "num_train_epochs", "attention_steps")
# by what rates its weights move
RATE_FIELDS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    "attention_learning_rate",
)


def examples_of_a_step(args: TrainingArguments) -> int:
    """How many examples all devices and processes together learn from in one step."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def depends_on_evaluation(args: TrainingArguments) -> bool:
    """Whether evaluations decide the learning rate, or which weights are the result."""
    return args.load_best_model_at_end or args.lr_scheduler_type in SCHEDULES_BY_EVALUATION


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """The Trainer's arguments that decide the weights of the result, and the number of examples in a step."""
    ignored = {*WATCHING_FIELDS, *COMPUTING_FIELDS, *BATCH_FIELDS, *REFUSED}
    if depends_on_evaluation(args):
        ignored -= {*EVALUATION_SCHEDULE_FIELDS}
    if args.load_best_model_at_end:
        ignored -= {"save_strategy", "save_steps"}
    if args.train_sampling_strategy in ORDERS_BY_BATCH or args.dataloader_drop_last:
        ignored -= {*BATCH_FIELDS}
    settings = {option.name: getattr(args, option.name) for option in fields(args) if option.init}
    settings = {name: value for name, value in settings.items() if name not in ignored}
    if args.dataloader_drop_last:  # what is dropped at the end of an epoch shifts all that follows
        settings["processes"] = args.world_size
    return settings | {EXAMPLES_OF_A_STEP: examples_of_a_step(args)}


def examples_hash(examples: Dataset | IterableDataset | None) -> str | None:
    """Distinguishes prepared texts by the examples themselves, whatever version of this code prepared them.

    None for a stream's, which are not known yet, and where there are no examples.
    """
    if not isinstance(examples, Dataset):
        return None
    content = hashlib.blake2b(digest_size=8)
    for batch in examples.with_format("arrow").iter(batch_size=EXAMPLES_HASHED_AT_A_TIME):
        for name in sorted(batch.column_names):
            column = batch[name].combine_chunks()
            content.update(f"{name} {column.type} ".encode())
            if pa.types.is_list(column.type):
                content.update(pc.list_value_length(column).to_numpy(zero_copy_only=False))
                column = column.flatten()
            content.update(column.to_numpy(zero_copy_only=False))
    return content.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Distinguishes tokenizers by their rules."""
    return hashlib.sha256(json.dumps(tokenizer_rules(tokenizer), sort_keys=True).encode()).hexdigest()[:16]


def run_settings(
    data_args: TextArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    examples: Mapping[str, Any],
    **model_settings: Any,
) -> dict[str, dict[str, Any]]:
    """The settings that define a run, as JSON values: {group: {field: value}}.

    Args:
        data_args: what is read and how it is prepared.
        training_args: the Trainer's arguments.
        tokenizer: its tokenizer.
        model: the model before training.
        examples: the prepared text of "train" and "validation".
        model_settings: fields of the group "model" beside the config's.
    """
    ignored = {*PLACE_AND_SPEED_FIELDS, *EVALUATION_DATA_FIELDS}
    data = {name: value for name, value in asdict(data_args).items() if name not in ignored}
    data["content of the examples"] = examples_hash(examples.get("train"))
    data["tokenizer"] = tokenizer_hash(tokenizer)
    training = training_settings(training_args)
    if data_args.streaming:
        # each process of the loader reads a part of the stream
        training["dataloader_num_workers"] = training_args.dataloader_num_workers
    if depends_on_evaluation(training_args):
        data["content of the evaluation examples"] = examples_hash(examples.get("validation"))
        data["eval_mlm_probability"] = data_args.eval_mlm_probability
    config = {name: value for name, value in model.config.to_dict().items() if name != "transformers_version"}
    settings = {"data": data, "model": {**config, **model_settings}, "training": training}
    return json.loads(json.dumps(settings, default=str))


def changeable_fields(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> Collection[str]:
    """The fields in which a run that is resumed from a checkpoint may differ from its record.

    Args:
        recorded: the recorded group "training".
        settings: the same group of this run.
    """
    by_evaluation = {kind.value for kind in SCHEDULES_BY_EVALUATION}
    if settings.get("deepspeed") or by_evaluation & {
        str(each.get("lr_scheduler_type")) for each in (recorded, settings)
    }:
        return LENGTH_FIELDS  # such schedules have a state of their own
    return LENGTH_FIELDS + RATE_FIELDS


def earlier_values(record: Mapping[str, Any], settings: Mapping[str, Any], step: int) -> dict[str, list[dict]]:
    """The values that length and rates had in the first steps of a run, where they differ from now.

    Args:
        record: the run's so far.
        settings: the group "training" from now on.
        step: that of the checkpoint which the run is resumed from.

    Returns:
        {field: [{"value": before, "until_step": the last step that it held for}, ...]}, in order.
    """
    earlier = {}
    for field in LENGTH_FIELDS + RATE_FIELDS:
        if field not in record["training"] or field not in settings:
            continue
        # {"value", "until_step"} of each stretch of steps
        stretches = [
            *record.get("earlier", {}).get(field, ()),
            {"value": record["training"][field], "until_step": step},
        ]
        started, kept = 0, []
        for stretch in stretches:
            if started < step:
                kept.append({**stretch, "until_step": min(stretch["until_step"], step)})
            started = stretch["until_step"]
        if kept and kept[-1]["value"] == settings[field]:
            kept.pop()
        if kept:
            earlier[field] = kept
    return earlier


def changed_now(earlier: Mapping[str, list[dict]], step: int) -> dict[str, Any]:
    """The fields of `earlier_values` that change at `step`, with their values until then."""
    return {field: values[-1]["value"] for field, values in earlier.items() if values[-1]["until_step"] == step}


def with_earlier_values(value: Any, earlier: list[dict] | None) -> str:
    """A setting as documents show it: "1e-05 (0.001 until step 4)"."""
    until = ", ".join(f"{stretch['value']} until step {stretch['until_step']}" for stretch in earlier or ())
    return f"{value} ({until})" if until else str(value)
