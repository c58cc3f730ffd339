"""What makes a run this run: the settings that decide the weights of its result.

They are recorded in the output folder, and a run that differs in one of them is another run.
"""

import hashlib
import json
from dataclasses import asdict, fields

from transformers import SchedulerType, TrainingArguments

# these change where and how fast data are prepared, not what they are
PLACE_AND_SPEED_FIELDS = ("data_cache_dir", "preprocessing_num_workers", "validation_file", "max_eval_samples")
# arguments of the Trainer that decide neither weights nor which of them are the result
WATCHING_FIELDS = (
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug", "skip_memory_metrics"),
    *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
    *("hub_always_push", "hub_revision", "do_train", "do_eval", "do_predict", "dry_run", "output_dir"),
    *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "label_names", "remove_unused_columns"),
    *("eval_on_start", "eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"),
)
# where and how fast the same steps are computed
COMPUTING_FIELDS = (
    *("use_cpu", "local_rank", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "auto_find_batch_size", "use_cache"),
    *("full_determinism", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "parallelism_config"),
)
# their product counts, and they themselves only where the order of examples depends on them
BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")
EXAMPLES_OF_A_STEP = "per_device_train_batch_size x gradient_accumulation_steps x processes"
ORDERS_BY_BATCH = ("group_by_length", "batch_rebalance")
# what decides a learning rate, or a result, that depends on the course of evaluation
EVALUATION_FIELDS = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")
SCHEDULES_BY_EVALUATION = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def depends_on_evaluation(args: TrainingArguments) -> bool:
    """Whether evaluation decides the learning rate, or which weights are the result."""
    return args.load_best_model_at_end or args.lr_scheduler_type in SCHEDULES_BY_EVALUATION


def training_settings(args: TrainingArguments) -> dict:
    """Those arguments of the Trainer that decide the weights of the result, and the number of examples in a step."""
    ignored = {*WATCHING_FIELDS, *COMPUTING_FIELDS, *BATCH_FIELDS}
    if depends_on_evaluation(args):
        ignored -= {*EVALUATION_FIELDS}
    if args.load_best_model_at_end:
        ignored -= {"save_strategy", "save_steps"}
    if args.train_sampling_strategy in ORDERS_BY_BATCH:
        ignored -= {*BATCH_FIELDS}
    settings = {option.name: getattr(args, option.name) for option in fields(args) if option.init}
    settings = {name: value for name, value in settings.items() if name not in ignored}
    return settings | {EXAMPLES_OF_A_STEP: args.train_batch_size * args.gradient_accumulation_steps * args.world_size}


def run_settings(run, **model) -> dict[str, dict]:
    """What makes a run this run, as JSON values: {group: {field: value}}.

    Args:
        run: a `TrainingRun`.
        model: fields of the group "model" beside the config's.
    """
    data = {name: value for name, value in asdict(run.data_args).items() if name not in PLACE_AND_SPEED_FIELDS}
    data["prepared examples"] = getattr(run.examples.get("train"), "_fingerprint", None)
    rules = {**json.loads(run.tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
    data["tokenizer"] = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
    config = {name: value for name, value in run.model.config.to_dict().items() if name != "transformers_version"}
    training = training_settings(run.training_args)
    if run.data_args.streaming:
        # each process of the loader reads a part of the stream
        training["dataloader_num_workers"] = run.training_args.dataloader_num_workers
    if depends_on_evaluation(run.training_args):
        data["evaluation examples"] = run.evaluation_text
    model = {"command": type(run).__name__, **config, **model}
    settings = {"data": data, "model": model, "training": training}
    return json.loads(json.dumps(settings, default=str))
