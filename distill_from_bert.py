"""Turns a trained BERT into a LambdaBERT and teaches it, on any text, to compute what the BERT computes.

    python distill_from_bert.py --teacher google-bert/bert-base-uncased --output_dir=models --do_train --do_eval
    python distill_from_bert.py configs/minilm.json --train_file my_text.txt

Without `do_train` and `do_eval`, it trains and evaluates. A JSON file of options may come first, and flags after it
win. The same command started again resumes from the last complete checkpoint of `output_dir`.
"""

import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertModel, SchedulerType, TrainerState, set_seed
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import modeling_lambdabert
from configuration_lambdabert import LambdaBertConfig
from conversion_lambdabert import converted_config
from lambdabert.distillation.loading import STUDENTS, load_teacher, weights_hash
from lambdabert.distillation.stages import steps_of_first_stage
from lambdabert.distillation.teacher import LossWeights, Teacher
from lambdabert.distillation.trainer import DistillationTrainer
from lambdabert.text.arguments import TextArguments
from lambdabert.text.examples import ExampleRecipe
from lambdabert.text.masks import MaskingCollator, masking_collator
from lambdabert.text.objectives import MLM, SENTENCES, Objective
from lambdabert.text.tokenizers import check_tokenizer
from lambdabert.training.arguments import RunArguments
from lambdabert.training.checkpoints import CheckpointError
from lambdabert.training.command import run_training_command
from lambdabert.training.memory import check_memory
from lambdabert.training.models import check_mask
from lambdabert.training.option_rules import SCHEDULES_BY_EVALUATION
from lambdabert.training.output_folder import read_record
from lambdabert.training.recipes import parse_overrides
from lambdabert.training.rehearsal import TINY_SHAPE
from lambdabert.training.report import describe_data, describe_recipe, plot_curves, quoted, read_template
from lambdabert.training.run import Documents, TrainingRun
from lambdabert.training.settings import examples_of_a_step
from lambdabert.training.trainer import InterruptibleTrainer

TEMPLATES = "lambdabert.distillation"
TASKS = {
    "LambdaBertForSequenceClassification": "text-classification",
    "LambdaBertForTokenClassification": "token-classification",
}
EXAMPLES = ("sentences", "stretches")
MASKING_OPTIONS = (
    *("mlm_probability", "eval_mlm_probability", "mask_replace_prob", "random_replace_prob"),
    "whole_word_mask",
)


@dataclass
class TeacherArguments:
    """The BERT to convert, what its lambda layers are like, and what is learned from it."""

    _argument_group_name = "teacher and model"
    teacher: str | None = field(
        default=None, metadata={"help": "A folder or hub name of a BERT, or of a sentence-transformers model of one."}
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Fields of LambdaBertConfig: "key_depth=32,local_context_size=63", or an object in a JSON file.'
        },
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Longest sequence of the new model; its position table is continued."}
    )
    layers_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on every layer's hidden states; 1 if not given."}
    )
    last_layer_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on the last hidden states; 0 if not given."}
    )
    sentences_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on sentence vectors; 1 where the teacher makes them."}
    )
    masked_tokens_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on masked tokens; 1 where the teacher predicts them."}
    )
    classes_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on class logits; 1 where the teacher classifies."}
    )

    def __post_init__(self) -> None:
        if self.teacher is None:
            raise ValueError("There is no teacher: name a BERT with --teacher.")

    def given_weights(self) -> dict[str, float]:
        given = {loss.name: getattr(self, f"{loss.name}_weight") for loss in fields(LossWeights)}
        return {name: weight for name, weight in given.items() if weight is not None}


@dataclass
class DistillationDataArguments(TextArguments):
    """Which text to read, and what an example is.

    Raises:
        ValueError: a field holds a value that it cannot have, or two fields contradict each other.
    """

    examples: str | None = field(
        default=None,
        metadata={
            "help": "What an example is: a sentence (sentences), or as much of a document as fits (stretches; the "
            "default where masked tokens are learned).",
            "choices": list(EXAMPLES),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples not in (None, *EXAMPLES):
            raise ValueError(f"examples={self.examples!r} is unknown: use one of {', '.join(EXAMPLES)}.")
        self.check_objective(self.objective)

    @property
    def objective(self) -> Objective:
        """What the examples are like."""
        return MLM if self.examples == "stretches" else SENTENCES

    def example_recipe(self) -> ExampleRecipe:
        """What these options make of documents."""
        return self.recipe(self.objective)


@dataclass
class DistillationArguments(RunArguments):
    """The Trainer's arguments, with defaults for a model that starts as another's copy."""

    learning_rate: float = field(default=1.5e-4, metadata={"help": "The peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decay of all weights but biases and norms."})
    attention_steps: float = field(
        default=0.5,
        metadata={
            "help": "Steps of a first stage in which every lambda layer learns by itself what attention gives for the "
            "teacher's hidden states; below 1: a share of all; 0: no such stage."
        },
    )
    attention_learning_rate: float = field(default=1e-3, metadata={"help": "The peak learning rate of that stage."})
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Whether a parameter may stay unused; no loss reaches every head."}
    )


ARGUMENT_GROUPS = (TeacherArguments, DistillationDataArguments, DistillationArguments)


class Distillation(TrainingRun):
    """A run of the command.

    Attributes:
        teacher: what is learned from.
        weights: the losses.
        sentence_transformer: the sentence-transformers model that the teacher is part of, or None.
    """

    trainer_class = DistillationTrainer
    model_args: TeacherArguments
    data_args: DistillationDataArguments
    training_args: DistillationArguments
    teacher: Teacher
    weights: LossWeights
    sentence_transformer: Any

    @property
    def example_recipe(self) -> ExampleRecipe:
        return self.data_args.example_recipe()

    @property
    def label_names(self) -> list[str]:
        return ["labels"]

    def check_own_options(self) -> None:
        args = self.training_args
        if not self.trains:
            raise ValueError("do_eval evaluates what was trained: give --do_train with it.")
        if "train_sampling_strategy" in args.given:
            raise ValueError(
                "train_sampling_strategy has no effect: a batch always holds examples of similar length; leave it out."
            )
        if 0 < args.max_steps < args.attention_steps:
            raise ValueError(
                f"attention_steps={args.attention_steps:g} exceeds max_steps={args.max_steps}, which counts both "
                "stages: lower the former or raise the latter."
            )
        if args.attention_steps and args.lr_scheduler_type in SCHEDULES_BY_EVALUATION:
            raise ValueError(
                f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value} depends on the course of training "
                "and cannot be planned for two stages: use another, such as linear, or --attention_steps 0."
            )
        if args.attention_steps and args.learning_rate <= 0:
            raise ValueError(
                f"learning_rate={args.learning_rate:g} must be above 0: the first stage's rate is set relative to it."
            )

    def become_tiny(self) -> None:
        bert = BertModel(BertConfig(**TINY_SHAPE, num_attention_heads=2))
        self.teacher, self.weights = Teacher(bert), LossWeights(layers=1.0)
        self.model = modeling_lambdabert.LambdaBertModel(LambdaBertConfig(**TINY_SHAPE, num_lambda_queries=2))
        # which losses there are to choose the best by depends on the teacher
        self.training_args.metric_for_best_model = self.training_args.metric_for_best_model and "loss"

    def hub_names(self) -> tuple[str | None, ...]:
        return (self.model_args.teacher,)

    def open_model(self) -> None:
        data_args = self.data_args
        self.teacher, self.tokenizer, self.sentence_transformer = load_teacher(str(self.model_args.teacher))
        check_tokenizer(self.tokenizer, whole_word_mask=data_args.whole_word_mask)
        self.weights = self.loss_weights()
        if data_args.examples is None:
            data_args.examples = "stretches" if "masked_tokens" in self.weights.used else "sentences"
            data_args.check_objective(data_args.objective)
        self.check_masking()
        self.check_best_metric()
        self.check_student()

    def check_student(self) -> None:
        """Refuses settings that make no student, or one too small for the examples. Raises ValueError."""
        bert, data_args, limit = self.teacher.model, self.data_args, "max_position_embeddings"
        data_args.check_length(
            bert.config.max_position_embeddings, f"the teacher's {limit}", "lower it; the student may be longer"
        )
        config: Any = converted_config(bert.config, LambdaBertConfig, self.student_settings())
        check_mask(config, self.tokenizer)
        advice = "lower the former or raise the latter"
        data_args.check_length(config.longest_sequence, f"the student's {limit}", advice)
        check_memory(self.student_class, config, self.training_args, data_args, bert.num_parameters())

    def check_masking(self) -> None:
        """Refuses options of masking if nothing is masked. Raises ValueError."""
        given = [name for name in MASKING_OPTIONS if name in self.training_args.given]
        if given and "masked_tokens" not in self.weights.used:
            raise ValueError(
                f"{', '.join(given)}: nothing is masked, because the loss of masked tokens is not used; leave it out, "
                "or convert a BERT that predicts masked tokens."
            )

    def check_best_metric(self) -> None:
        """Refuses to choose the best weights by a metric that is not evaluated. Raises ValueError."""
        metric = self.training_args.metric_for_best_model
        losses = ("loss", *self.weights.used)
        if metric is not None and metric.removeprefix("eval_") not in losses:
            raise ValueError(f"metric_for_best_model={metric} is not evaluated: use one of {', '.join(losses)}.")

    def loss_weights(self) -> LossWeights:
        """The teacher's default weights, with those given. Raises ValueError if none is left, or one is not offered."""
        given = self.model_args.given_weights()
        for name, weight in given.items():
            if weight and name not in self.teacher.offers:
                raise ValueError(
                    f"{name}_weight={weight}: teacher={self.model_args.teacher} is a "
                    f"{type(self.teacher.model).__name__}, which offers {', '.join(self.teacher.offers)}; leave it out."
                )
        weights = LossWeights(**{**asdict(self.teacher.default_weights), **given})
        if not weights.used:
            raise ValueError("Every weight is 0, so there is nothing to learn: raise one of them.")
        return weights

    @property
    def student_class(self) -> type[modeling_lambdabert.LambdaBertPreTrainedModel]:
        return getattr(modeling_lambdabert, STUDENTS.get(type(self.teacher.model).__name__, "LambdaBertModel"))

    def student_settings(self) -> dict[str, Any]:
        """Fields of the student's config that the options set, and the [MASK] that a repetition lambda needs.

        Raises:
            ValueError: the options set a field twice.
        """
        settings = parse_overrides(self.model_args.config_overrides)
        if settings.get("repetition_context_size") is not None:
            settings.setdefault("mask_token_id", self.tokenizer.mask_token_id)
        if self.model_args.max_position_embeddings is None:
            return settings
        if "max_position_embeddings" in settings:
            raise ValueError("max_position_embeddings is set in config_overrides, too: keep one of them.")
        return {**settings, "max_position_embeddings": self.model_args.max_position_embeddings}

    def make_model(self, documents: Documents) -> None:
        set_seed(self.training_args.seed)
        self.model = self.student_class.from_bert(self.teacher.model, **self.student_settings())
        # the config keeps the dropout for fine-tuning; here the targets are exact
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if self.sentence_transformer is None:
            self.tokenizer.model_max_length = self.model.config.longest_sequence or VERY_LARGE_INTEGER

    def check_examples(self) -> None:
        """Refuses a text of fewer examples than a step takes. Raises ValueError."""
        args, examples = self.training_args, self.examples.get("train")
        step = examples_of_a_step(args)
        if isinstance(examples, Dataset) and len(examples) < step and not args.dry_run:
            raise ValueError(
                f"The text makes {len(examples)} examples, fewer than the {step} of one step: give more text, or lower "
                "per_device_train_batch_size."
            )

    def describe(self) -> dict[str, dict[str, Any]]:
        losses = {f"{name}_weight": weight for name, weight in asdict(self.weights).items()}
        settings = self.run_settings(**losses, **{"the teacher's weights": weights_hash(self.teacher.model)})
        # examples of similar length come together, a batch at a time
        settings["training"]["per_device_train_batch_size"] = self.training_args.per_device_train_batch_size
        return settings

    def plan(self, trainer: InterruptibleTrainer) -> None:
        super().plan(trainer)
        args = self.training_args
        if args.attention_steps > self.steps:
            raise CheckpointError(
                f"attention_steps={args.attention_steps:g} exceeds the {self.steps} steps of "
                f"num_train_epochs={args.num_train_epochs:g}, which count both stages: lower the former, below 1 for a "
                "share of them, or raise the latter."
            )

    def check_steps(self, state: TrainerState) -> None:
        super().check_steps(state)
        now, recorded = self.training_args.attention_steps, read_record(str(self.training_args.output_dir)) or {}
        before = recorded.get("training", {}).get("attention_steps", now)
        planned, first = steps_of_first_stage(before, state.max_steps), self.first_stage
        if planned != first and state.global_step > min(planned, first):
            raise CheckpointError(
                f"attention_steps={now:g} of {self.steps} steps makes a first stage of {first}, but that of this run "
                f"has {planned} and {self.checkpoint} is beyond one of them: give --attention_steps {planned}."
            )

    def check_rates(self, state: TrainerState) -> None:
        before = self.changed_rates(state.global_step).get("attention_learning_rate")
        if before is not None and state.global_step >= self.first_stage:
            raise CheckpointError(
                f"attention_learning_rate={self.training_args.attention_learning_rate:g} has no effect: the first "
                f"stage ended at step {self.first_stage}, and {self.checkpoint} is at or beyond it; give {before:g}."
            )
        super().check_rates(state)

    @property
    def first_stage(self) -> int:
        """Steps of the first stage."""
        return steps_of_first_stage(self.training_args.attention_steps, self.steps)

    @property
    def courses(self) -> tuple[int, ...]:
        return self.first_stage, self.steps - self.first_stage

    def collator(self, *, training: bool) -> MaskingCollator:
        collator = masking_collator(self.tokenizer, self.data_args, seed=self.training_args.seed, training=training)
        collator.mlm = "masked_tokens" in self.weights.used
        return collator

    def trainer(self, **settings: Any) -> DistillationTrainer:
        args = self.training_args
        return super().trainer(
            teacher=self.teacher,
            weights=self.weights,
            attention_steps=args.attention_steps,
            attention_learning_rate=args.attention_learning_rate,
            **settings,
        )

    def dry_run(self) -> None:
        args = self.training_args
        args.attention_steps = min(args.attention_steps, 0.5)  # of the two steps one belongs to each stage
        super().dry_run()

    def save_model(self, trainer: InterruptibleTrainer) -> None:
        super().save_model(trainer)
        if self.sentence_transformer is not None and trainer.is_world_process_zero():
            self.sentence_transformer[0].model = trainer.accelerator.unwrap_model(trainer.model)
            self.sentence_transformer.save(self.training_args.output_dir, create_model_card=False)

    def model_card(self, state: TrainerState, metrics: str) -> str:
        name = Path(str(self.training_args.output_dir)).resolve().name
        teacher = Path(str(self.model_args.teacher))
        text = {"max_seq_length": self.data_args.max_seq_length}
        return read_template(TEMPLATES, "model_card.md").format(
            name=name,
            library="transformers" if self.sentence_transformer is None else "sentence-transformers",
            teacher=teacher.resolve().name if teacher.exists() else self.model_args.teacher,
            use=self.example_of_use(quoted(name)),
            data=describe_data(self.data_args, self.summaries),
            recipe=describe_recipe(text, self.training_args, self.model, state, self.earlier),
            losses=self.describe_losses(),
            metrics=metrics,
        )

    def draw_curves(self, state: TrainerState, file: Path) -> None:
        first = f"\n(training, first {self.first_stage} steps: attention)" if self.first_stage else ""
        plot_curves(state.log_history, file, "loss", f"weighted sum of the losses{first}")

    def describe_losses(self) -> str:
        losses = ", ".join(f"{name} x {weight:g}" for name, weight in self.weights.used.items())
        return f"attention for {self.first_stage} steps, then {losses}" if self.first_stage else losses

    def example_of_use(self, folder: str) -> str:
        """Python that uses the model saved in `folder`, a string in Python code."""
        student = type(self.model).__name__
        if self.sentence_transformer is not None:
            template, texts = "use_sentences.md", {}
        elif student in TASKS:
            template, texts = "use_classifier.md", {"task": TASKS[student]}
        else:
            auto_map = self.model.config.auto_map
            auto_class = next(name for name, target in auto_map.items() if target.endswith(f".{student}"))
            template, texts = "use_model.md", {"auto_class": auto_class}
        return read_template(TEMPLATES, template).rstrip().format(folder=folder, **texts)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_training_command(sys.argv[1:] if argv is None else argv, ARGUMENT_GROUPS, Distillation, __doc__)


if __name__ == "__main__":
    sys.exit(main())
