"""The options of the commands that train, read from flags and a recipe."""

import dataclasses
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments

from lambdabert.command_line import DataclassParser
from lambdabert.training.option_rules import (
    DEFAULT_OUTPUT_DIR,
    REFUSED,
    SCHEDULES_BY_EVALUATION,
    check_effects,
    check_refused,
    check_values,
    take_as_given,
)
from lambdabert.training.recipes import Option, read_recipe


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments, with BERT's optimisation as defaults.

    Attributes:
        given: names of all options that were given, by flag or recipe.
        notes: what the log is to say about the options.
    """

    _argument_group_name = "training, as the Trainer of transformers does it"
    output_dir: str | None = field(
        default=DEFAULT_OUTPUT_DIR, metadata={"help": "The folder that checkpoints, model and report are written to."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "The peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of all weights but biases and norms."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Steps of rising learning rate; below 1: a share of all."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs; below 1: a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={
            "help": "Which tokens the throughput counts: all, non_padding or no.",
            "choices": ["all", "non_padding", "no"],
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether a parameter may stay unused; every objective uses all of its model."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check data, tokenizer, model and memory with two steps; write nothing in output_dir."},
    )
    given: frozenset[str] = field(init=False, default=frozenset())
    notes: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # of the metrics here only accuracies are better high; the Trainer would take perplexity for one
            self.greater_is_better = self.metric_for_best_model.endswith("accuracy")
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()
        if self.lr_scheduler_type in SCHEDULES_BY_EVALUATION:
            mode = "max" if self.greater_is_better else "min"
            given: Any = self.lr_scheduler_kwargs or {}
            self.lr_scheduler_kwargs = {"mode": mode, **given}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of rising learning rate; none in a single step, whose rate would be 0."""
        return 0 if num_training_steps == 1 else super().get_warmup_steps(num_training_steps)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Names defaults, and keeps the lines of the description."""


def make_parser(groups: tuple[Any, ...], description: str | None) -> DataclassParser:
    """The parser of a command that trains, whose `--help` shows no option that is refused."""
    parser = DataclassParser(
        dataclass_types=groups,
        usage="%(prog)s [RECIPE.json] [options]",
        description=description,
        formatter_class=HelpFormatter,
    )
    for action in parser._actions:
        if action.dest in REFUSED:
            action.help = SUPPRESS
    return parser


def list_options(groups: tuple[Any, ...]) -> dict[str, Option]:
    """All options of the dataclasses `groups`, by name."""
    options = {}
    for group in groups:
        types = get_type_hints(group)
        for each in filter(lambda each: each.init, dataclasses.fields(group)):
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            options[each.name] = Option(types[each.name], default, tuple(each.metadata.get("choices", ())))
    return options


def parse_arguments(argv: list[str], groups: tuple[Any, ...], description: str | None = None) -> tuple[Any, ...]:
    """Reads flags, or a JSON file followed by flags that override it.

    Without `do_train` and `do_eval` among them, both are assumed.

    Args:
        argv: what the command was given.
        groups: the dataclasses of its options; if it trains, `RunArguments` among them.
        description: what it does, for `--help`.

    Returns:
        One instance of each group.

    Raises:
        ValueError: unknown, impossible or contradicting options, an option without effect, or a JSON file that cannot
            be read.
    """
    options = list_options(groups)
    recipe: dict[str, Any] = {}
    if argv and argv[0].endswith(".json"):
        recipe, argv = read_recipe(argv[0], options), argv[1:]
    read = make_parser(groups, description).parse_args(argv, Namespace(**dict.fromkeys(options)))
    flags = {name: value for name, value in vars(read).items() if value is not None}
    values = {**recipe, **flags}
    check_values(values)
    defaults = {name: option.default for name, option in options.items()}
    check_refused(values, defaults)
    taken = take_as_given(values)
    notes = [f"Assumed: {' '.join(f'--{name}={value}' for name, value in taken.items())}."] if taken else []
    notes += check_effects(flags, recipe, defaults)
    both = {**values, **taken}
    if both.get("do_eval") and both.get("eval_steps") is not None and "eval_strategy" not in both:
        taken["eval_strategy"] = "steps"
    instances = []
    for group in groups:
        names = [option.name for option in dataclasses.fields(group) if option.init]
        instances.append(group(**{name: value for name, value in {**values, **taken}.items() if name in names}))
        if isinstance(instances[-1], RunArguments):
            instances[-1].given, instances[-1].notes = frozenset(values), tuple(notes)
    return tuple(instances)
