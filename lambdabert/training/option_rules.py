"""Which options are refused: values out of bounds, what the Trainer offers and these commands cannot use, and options
that would have no effect.

Everything here needs the options alone: no text, no model, no network. What the Trainer makes of them is tried in
`rehearsal`.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from transformers import SchedulerType

from lambdabert.training.recipes import OBJECTS_IN_FILES, OBJECTS_IN_TEXT, floats_in, parse_overrides, read_object

DEFAULT_OUTPUT_DIR = "models"
EVALUATE_EVERY = 100  # steps, where a command is given without saying what to do
LARGEST_SEED = 2**32 - 1
OPTIMIZERS_WITHOUT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor")
OPTIMIZERS_WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
SCHEDULES_BY_EVALUATION = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
SCHEDULES_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
SCHEDULES_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")

AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "torch_empty_cache_steps": 1,
    "dataloader_prefetch_factor": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
    "max_position_embeddings": 1,
    "vocab_size": 6,  # five special tokens and one other
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "eval_delay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "seed": 0,
    "data_seed": 0,
    "attention_steps": 0,
    "layers_weight": 0,
    "last_layer_weight": 0,
    "sentences_weight": 0,
    "masked_tokens_weight": 0,
    "classes_weight": 0,
}
ABOVE = dict.fromkeys(
    (
        "num_train_epochs",
        "adam_epsilon",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "neftune_noise_alpha",
        "attention_learning_rate",
    ),
    0,
)
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "seed": LARGEST_SEED + 1, "data_seed": LARGEST_SEED + 1}

REFUSED = {
    "do_predict": "there is nothing to predict; evaluate with --do_eval",
    "resume_from_checkpoint": "the same command resumes from the last complete checkpoint of its output_dir by itself",
    "restore_callback_states_from_checkpoint": "a run that is resumed restores what it needs by itself",
    "enable_jit_checkpoint": "SIGTERM makes a checkpoint without it",
    "save_only_model": "a run cannot be resumed from a checkpoint without its optimizer",
    "label_names": "the objective says which labels there are",
    "label_smoothing_factor": "the losses are the model's own and know no smoothing",
    "remove_unused_columns": "every column of the examples is used",
    "length_column_name": "the examples have no such column; their lengths are counted",
    "use_cache": "an encoder has no cache",
    "use_liger_kernel": "there are no Liger kernels for this model",
    "liger_kernel_config": "there are no Liger kernels for this model",
    "parallelism_config": "it cannot be given on a command line; use fsdp",
    "accelerator_config": "it would change the order of the examples, or their number in a step, unnoticed",
    "prediction_loss_only": "evaluation reports every metric, and gathers no logits for it",
    "include_for_metrics": "evaluation reports every metric, and gathers no logits for it",
    "batch_eval_metrics": "evaluation gathers a few sums per example, never logits",
    "eval_do_concat_batches": "metrics are taken over all examples at once",
    "eval_use_gather_object": "metrics are made of tensors",
}


class Need(NamedTuple):
    """What an option needs in order to have an effect.

    Attributes:
        met: whether all options together give it.
        text: what it is, as the object of "needs".
    """

    met: Callable[[Namespace], bool]
    text: str


def _value(option: Any) -> Any:
    return option.value if isinstance(option, Enum) else option


def _evaluates_while_training(options: Namespace) -> bool:
    strategy = _value(options.eval_strategy)
    return strategy != "no" or (options.eval_steps is not None and "eval_strategy" not in options.given)


def _evaluates(options: Namespace) -> bool:
    return options.do_eval or _value(options.eval_strategy) != "no"


def _compares_metrics(options: Namespace) -> bool:
    return (
        options.load_best_model_at_end
        or _value(options.save_strategy) == "best"
        or _value(options.lr_scheduler_type) in {kind.value for kind in SCHEDULES_BY_EVALUATION}
    )


def _tracked_by(options: Namespace, *trackers: str) -> bool:
    named = options.report_to if isinstance(options.report_to, list) else [options.report_to or "none"]
    return bool({*trackers, "all"} & set(named)) if trackers else named not in (["none"], [])


TRAINING = Need(lambda options: options.do_train or options.dry_run, "--do_train")
EVALUATION = Need(_evaluates, "--do_eval")
STEPWISE = Need(
    lambda options: _value(options.eval_strategy) == "steps" or "eval_strategy" not in options.given,
    "eval_strategy=steps",
)
WHILE_TRAINING = Need(_evaluates_while_training, "evaluations while training, by eval_steps or eval_strategy")
CHECKPOINTS = Need(lambda options: _value(options.save_strategy) != "no", "a save_strategy other than no")
HUB = Need(lambda options: options.push_to_hub, "push_to_hub")
TRACKIO = Need(lambda options: _tracked_by(options, "trackio"), "report_to=trackio")
WORKERS = Need(lambda options: options.dataloader_num_workers > 0, "dataloader_num_workers above 0")
TRAINED_TOKENIZER = Need(lambda options: options.train_tokenizer, "train_tokenizer")
ADAM = Need(
    lambda options: _value(options.optim) not in OPTIMIZERS_WITHOUT_ADAM,
    f"an Adam optimizer (optim other than {', '.join(OPTIMIZERS_WITHOUT_ADAM)})",
)
WARM_UP = Need(
    lambda options: _value(options.lr_scheduler_type) not in SCHEDULES_WITHOUT_WARMUP,
    f"a schedule that warms up (lr_scheduler_type other than {', '.join(SCHEDULES_WITHOUT_WARMUP)})",
)
SCHEDULE_ARGUMENTS = Need(
    lambda options: _value(options.lr_scheduler_type) not in SCHEDULES_WITHOUT_ARGUMENTS,
    f"a schedule with settings (lr_scheduler_type other than {', '.join(SCHEDULES_WITHOUT_ARGUMENTS)})",
)
OPTIMIZER_ARGUMENTS = Need(
    lambda options: _value(options.optim) not in OPTIMIZERS_WITHOUT_ARGUMENTS,
    f"an optimizer that reads it (optim other than {', '.join(OPTIMIZERS_WITHOUT_ARGUMENTS)})",
)
LOW_RANK = Need(
    lambda options: _value(options.optim).startswith(("galore", "apollo")), "an optim that begins with galore or apollo"
)

# each option needs all that it is listed under
NEEDS: tuple[tuple[Need, tuple[str, ...]], ...] = (
    (
        TRAINING,
        (
            "per_device_train_batch_size",
            "num_train_epochs",
            "max_steps",
            "learning_rate",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
            "optim",
            "optim_args",
            "optim_target_modules",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "gradient_accumulation_steps",
            "average_tokens_across_devices",
            "max_grad_norm",
            "activation_checkpointing",
            "gradient_checkpointing",
            "neftune_noise_alpha",
            "auto_find_batch_size",
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
            "eval_strategy",
            "eval_steps",
            "eval_on_start",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "load_best_model_at_end",
            "ignore_data_skip",
            "dataloader_drop_last",
            "train_sampling_strategy",
            "max_train_samples",
            "dupe_factor",
            "data_seed",
            "streaming",
            "push_to_hub",
            "mlm_probability",
            "attention_steps",
        ),
    ),
    (
        EVALUATION,
        (
            "per_device_eval_batch_size",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "eval_accumulation_steps",
            "bf16_full_eval",
            "fp16_full_eval",
            "load_best_model_at_end",
            "max_eval_samples",
            "eval_mlm_probability",
            "validation_file",
            "validation_split_percentage",
        ),
    ),
    (STEPWISE, ("eval_steps",)),
    (WHILE_TRAINING, ("eval_delay", "eval_on_start")),
    (
        Need(lambda options: options.max_steps <= 0, "max_steps left out, which decides how long to train"),
        ("num_train_epochs",),
    ),
    (Need(lambda options: _value(options.logging_strategy) == "steps", "logging_strategy=steps"), ("logging_steps",)),
    (
        Need(lambda options: _value(options.logging_strategy) != "no", "a logging_strategy other than no"),
        ("logging_first_step",),
    ),
    (Need(lambda options: _value(options.save_strategy) == "steps", "save_strategy=steps"), ("save_steps",)),
    (CHECKPOINTS, ("save_total_limit", "save_on_each_node")),
    (
        Need(
            lambda options: _value(options.save_strategy) != "best" or _evaluates_while_training(options),
            "evaluations while training, by eval_steps or eval_strategy",
        ),
        ("save_strategy",),
    ),
    (
        Need(_compares_metrics, "load_best_model_at_end, or another option that compares evaluations"),
        ("metric_for_best_model", "greater_is_better"),
    ),
    (ADAM, ("adam_beta1", "adam_beta2", "adam_epsilon")),
    (OPTIMIZER_ARGUMENTS, ("optim_args",)),
    (LOW_RANK, ("optim_target_modules",)),
    (WARM_UP, ("warmup_steps",)),
    (
        Need(lambda options: options.max_steps != 1 or options.warmup_steps < 1, "more steps than max_steps=1"),
        ("warmup_steps",),
    ),
    (SCHEDULE_ARGUMENTS, ("lr_scheduler_kwargs",)),
    (
        Need(
            lambda options: options.activation_checkpointing or options.gradient_checkpointing,
            "activation_checkpointing",
        ),
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    ),
    (Need(lambda options: _tracked_by(options), "a tracker, by report_to"), ("run_name",)),
    (TRACKIO, ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")),
    (
        HUB,
        (
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
    ),
    (
        WORKERS,
        (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
    ),
    (
        Need(lambda options: not options.streaming, "text that is prepared, not streamed"),
        ("train_sampling_strategy", "dataloader_drop_last", "data_seed"),
    ),
    (
        Need(
            lambda options: _value(options.train_sampling_strategy) in ("random", "group_by_length"),
            "an order that is drawn by a seed (train_sampling_strategy=random or group_by_length)",
        ),
        ("data_seed",),
    ),
    (
        Need(
            lambda options: TRAINING.met(options) or not options.validation_file,
            "--do_train, since validation_file is what is evaluated",
        ),
        ("train_file", "dataset_name", "dataset_config_name", "corpus"),
    ),
    (Need(lambda options: bool(options.fsdp), "fsdp"), ("fsdp_config",)),
    (
        Need(lambda options: int(os.environ.get("WORLD_SIZE", 1)) > 1, "several processes, by torchrun"),
        ("ddp_backend",),
    ),
    (TRAINED_TOKENIZER, ("vocab_size", "lowercase")),
    (Need(lambda options: options.attention_steps > 0, "attention_steps above 0"), ("attention_learning_rate",)),
)


def check_values(values: dict[str, Any]) -> None:
    """Checks each option by itself.

    Raises:
        ValueError: a value that is empty, not finite, or out of bounds; or no JSON object where there must be one.
    """
    for name, value in values.items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name} is empty: give it a value, or leave it out.")
        if name in OBJECTS_IN_FILES + OBJECTS_IN_TEXT and isinstance(value, str):
            value = read_object(name, value)
        if name == "deepspeed" and not value:
            raise ValueError("deepspeed is an empty object: give it settings, or leave it out.")
        if name == "config_overrides":
            value = parse_overrides(value)
        if not all(map(math.isfinite, floats_in(value))):
            raise ValueError(f"{name}={value} must be a finite number.")
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise ValueError(f"{name}={value} must be {AT_LEAST[name]} or more.")
        if name in ABOVE and value <= ABOVE[name]:
            raise ValueError(f"{name}={value} must be above {ABOVE[name]}.")
        if name in BELOW and value >= BELOW[name]:
            raise ValueError(f"{name}={value} must be below {BELOW[name]}.")
        if name == "max_steps" and value != -1 and value < 1:
            raise ValueError(f"max_steps={value} must be 1 or more, or -1 to count epochs instead.")


def check_refused(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuses what the Trainer offers and these commands cannot use.

    Raises:
        ValueError: such an option has another value than its default.
    """
    for name, reason in REFUSED.items():
        if name in values and values[name] != defaults[name]:
            raise ValueError(f"{name}={values[name]} cannot be used here: {reason}; leave it out.")


def take_as_given(values: dict[str, Any]) -> dict[str, Any]:
    """What a command does if it is not told what to do, and where it writes if it is not told where."""
    taken: dict[str, Any] = {} if "output_dir" in values else {"output_dir": DEFAULT_OUTPUT_DIR}
    if "do_train" not in values and "do_eval" not in values:
        taken |= {"do_train": True, "do_eval": True}
        if "eval_steps" not in values and "eval_strategy" not in values:
            taken["eval_steps"] = EVALUATE_EVERY
    return taken


def _asks_for_nothing(value: Any, default: Any) -> bool:
    """Whether a value is that of an option without effect, such as a warm-up of 0 steps."""
    return default is False if value is False else isinstance(value, int | float) and value == 0


def check_effects(flags: dict[str, Any], recipe: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Refuses options that cannot take effect.

    Options of a recipe that have no effect only because of the flags are noted instead.

    Returns:
        Notes for the log.

    Raises:
        ValueError: an option among the flags has no effect, or one of the recipe has none even without the flags.
    """

    def together(*sources: dict[str, Any]) -> Namespace:
        values = {name: value for source in sources for name, value in source.items()}
        return Namespace(**{**defaults, **values, **take_as_given(values)}, given=frozenset(values))

    both, alone = together(recipe, flags), together(recipe)
    notes = []
    for need, names in NEEDS:
        for name in names:
            source = flags if name in flags else recipe
            if name not in source or _asks_for_nothing(source[name], defaults[name]) or need.met(both):
                continue
            text = f"{name}={_value(source[name])} has no effect: it needs {need.text}"
            if name in flags or not need.met(alone):
                raise ValueError(f"{text}; give that, or leave {name} out.")
            notes.append(f"The recipe's {text}.")
    return notes
