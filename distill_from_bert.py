"""Turns a trained BERT into a LambdaBERT and teaches it, on any text, to compute what the BERT computes.

    python distill_from_bert.py --teacher google-bert/bert-base-uncased --output_dir=models --do_train --do_eval
    python distill_from_bert.py configs/minilm.json --train_file my_text.txt

Options come from `TeacherArguments`, `DistillationDataArguments` and the Trainer's arguments; a JSON file of them may
come first, and flags after it win. The same command started again goes on from the last whole checkpoint of
`output_dir`.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import BertConfig, BertModel, SchedulerType, set_seed
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import cached_file

import modeling_lambdabert
from conversion_lambdabert import check_bert
from distillation import DistillationTrainer, LossWeights, Teacher, steps_of_first_stage
from pretraining_data import TextArguments, check_tokenizer, masking_collator
from training_report import plot_curves, write_report
from training_run import RunArguments, TrainingRun, load_tokenizer, parse_overrides, run_command, run_settings

STUDENTS = {
    "BertModel": "LambdaBertModel",
    "BertForPreTraining": "LambdaBertForPreTrainingNSP",
    "BertForMaskedLM": "LambdaBertForMaskedLM",
    "BertForNextSentencePrediction": "LambdaBertForNextSentencePrediction",
    "BertForSequenceClassification": "LambdaBertForSequenceClassification",
    "BertForTokenClassification": "LambdaBertForTokenClassification",
    "BertForQuestionAnswering": "LambdaBertForQuestionAnswering",
}
TASKS = {
    "LambdaBertForSequenceClassification": "text-classification",
    "LambdaBertForTokenClassification": "token-classification",
}
EXAMPLES = ("sentences", "stretches")
UNPLANNED_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
LARGEST_VOCABULARY_PADDING = 128  # tables are rounded up, to a multiple of this at most

MODEL_CARD = """\
---
library_name: {library}
tags:
- lambdabert
- {library}
---

# {name}

{teacher} without self-attention: a [LambdaBERT](https://arxiv.org/abs/2102.08602), in which lambda layers take
attention's place, converted and taught to compute what that model computes.

## Use

The folder carries its own code:

```python
{use}
```

## Data

{data}

## Recipe

{recipe}

Losses: {losses}.

## Metrics

{metrics}

![Distillation loss over steps and time](training_curves.png)
"""
USE_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
vectors = model.encode(["Is attention really all you need?", "Do we need anything but attention?"])"""
USE_CLASSIFIER = """\
from transformers import pipeline

classify = pipeline("{task}", model="{name}", trust_remote_code=True)
classify("Is attention really all you need?")"""
USE_MODEL = """\
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
outputs = model(**tokenizer("Is attention really all you need?", return_tensors="pt"))"""


@dataclass
class TeacherArguments:
    """The BERT to convert, what its lambda layers are like, and what is learned from it."""

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
        default=None, metadata={"help": "Weight of the loss of every layer's hidden states; 1 if not given."}
    )
    last_layer_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of the last hidden states; 0 if not given."}
    )
    sentences_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of sentence vectors; 1 where the teacher makes them."}
    )
    masked_tokens_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of masked tokens; 1 where the teacher predicts them."}
    )
    classes_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of class logits; 1 where the teacher classifies."}
    )

    def __post_init__(self):
        if self.teacher is None:
            raise ValueError("There is no teacher: name a BERT by --teacher.")
        for name, weight in self.given_weights().items():
            if weight < 0:
                raise ValueError(f"{name}_weight={weight} must be 0 or more.")

    def given_weights(self):
        given = {loss.name: getattr(self, f"{loss.name}_weight") for loss in fields(LossWeights)}
        return {name: weight for name, weight in given.items() if weight is not None}


@dataclass
class DistillationDataArguments(TextArguments):
    """Which text to read, and what an example is.

    Raises:
        ValueError: a field holds a value that it cannot have, or two fields contradict each other.
    """

    dupe_factor = 1
    short_seq_probability = 0.0

    examples: str | None = field(
        default=None,
        metadata={
            "help": "What an example is: a sentence (sentences), or as much of a document as fits (stretches; the "
            "default where masked tokens are learned).",
            "choices": list(EXAMPLES),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.examples not in (None, *EXAMPLES):
            raise ValueError(f"examples={self.examples!r} is unknown: use one of {', '.join(EXAMPLES)}.")
        self.check_room(self.objective)

    @property
    def objective(self):
        """What `prepare_examples` calls them."""
        return "mlm" if self.examples == "stretches" else "sentences"


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


def has_sentence_modules(name):
    """Whether a folder or hub name is a sentence-transformers model."""
    quietly = ("missing_entries", "connection_errors", "gated_repo")
    return cached_file(name, "modules.json", **{f"_raise_exceptions_for_{what}": False for what in quietly}) is not None


def load_sentence_transformer(name):
    """Loads a sentence-transformers model whose transformer is a BERT.

    Raises:
        ValueError: the package is missing, or the model cannot be used.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"teacher={name} is a sentence-transformers model: install it with `pip install sentence-transformers`."
        ) from None
    model = SentenceTransformer(name, device="cpu")
    transformer = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise ValueError(f"teacher={name} starts with a {type(model[0]).__name__}, not with a BERT.")
    check_bert(transformer.config.to_dict(), name)
    return model


def load_bert_and_tokenizer(name):
    """Loads a BERT as the class that its config names, and its tokenizer.

    Raises:
        ValueError: not BERT's architecture, or no tokenizer.
    """
    fields, _ = BertConfig.get_config_dict(name)
    check_bert(fields, name)
    architecture = next(iter(fields.get("architectures") or ()), None)
    bert_class = getattr(transformers, architecture) if architecture in STUDENTS else BertModel
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise no_tokenizer(name) from error
    return bert_class.from_pretrained(name), tokenizer


def no_tokenizer(name):
    return ValueError(f"teacher={name} has no tokenizer that can be read: save the one that it was trained with there.")


def check_teachers_tokenizer(tokenizer, config, name):
    """Refuses a tokenizer that is missing or another model's.

    Raises:
        ValueError: it holds no words, or its size is not that of the embeddings.
    """
    size = len(tokenizer)
    if size == len(tokenizer.all_special_tokens):
        raise no_tokenizer(name)
    check_tokenizer(tokenizer)
    if not size <= config.vocab_size < size + LARGEST_VOCABULARY_PADDING:
        raise ValueError(
            f"teacher={name} has vocab_size={config.vocab_size}, but its tokenizer has {size} tokens, so it is another "
            "model's: save the one that it was trained with there."
        )


def weights_hash(model):
    """Tells models of different weights apart."""
    content = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    return content.hexdigest()[:16]


class Distillation(TrainingRun):
    """A run of the command."""

    trainer_class = DistillationTrainer
    label_names = ["labels"]

    def check_options(self):
        args = self.training_args
        if not (args.do_train or args.dry_run):
            raise ValueError("do_eval evaluates what was trained: give --do_train with it.")
        if args.attention_steps < 0:
            raise ValueError(f"attention_steps={args.attention_steps:g} must be 0 or more.")
        if 0 < args.max_steps < args.attention_steps:
            raise ValueError(
                f"attention_steps={args.attention_steps:g} exceeds max_steps={args.max_steps}, which counts both "
                "stages: lower the one or raise the other."
            )
        if args.attention_steps and args.lr_scheduler_type in UNPLANNED_SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type={args.lr_scheduler_type.value} depends on the course of training and cannot be "
                "planned for two stages: use another, such as linear, or --attention_steps 0."
            )
        if args.attention_steps and args.learning_rate <= 0:
            raise ValueError(f"learning_rate={args.learning_rate:g} must be above 0.")

    def hub_names(self):
        return (self.model_args.teacher,)

    def open_model(self):
        name, data_args = self.model_args.teacher, self.data_args
        self.sentence_transformer = None
        try:
            if has_sentence_modules(name):
                self.sentence_transformer = load_sentence_transformer(name)
                bert, self.tokenizer = self.sentence_transformer[0].auto_model, self.sentence_transformer.tokenizer
            else:
                bert, self.tokenizer = load_bert_and_tokenizer(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"teacher={name} cannot be read ({error}); name a folder or a hub model.") from error
        check_teachers_tokenizer(self.tokenizer, bert.config, name)
        self.teacher = Teacher(bert, tuple(self.sentence_transformer or ())[1:])
        self.weights = self.loss_weights()
        if data_args.examples is None:
            data_args.examples = "stretches" if "masked_tokens" in self.weights.used else "sentences"
        if data_args.max_seq_length > bert.config.max_position_embeddings:
            raise ValueError(
                f"max_seq_length={data_args.max_seq_length} exceeds the teacher's max_position_embeddings="
                f"{bert.config.max_position_embeddings}: lower it; the student may be longer."
            )

    def loss_weights(self):
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

    def make_model(self, documents):
        model_args, bert = self.model_args, self.teacher.model
        settings = parse_overrides(model_args.config_overrides)
        if model_args.max_position_embeddings is not None:
            settings["max_position_embeddings"] = model_args.max_position_embeddings
        set_seed(self.training_args.seed)
        student_class = getattr(modeling_lambdabert, STUDENTS.get(type(bert).__name__, "LambdaBertModel"))
        self.model = student_class.from_bert(bert, **settings)
        # the config keeps the dropout for fine-tuning; here the targets are exact
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        longest = self.model.config.longest_sequence or VERY_LARGE_INTEGER
        if self.data_args.max_seq_length > longest:
            raise ValueError(
                f"max_seq_length={self.data_args.max_seq_length} exceeds the student's max_position_embeddings="
                f"{longest}: lower the one or raise the other."
            )
        if self.sentence_transformer is None:
            self.tokenizer.model_max_length = longest

    def start_from_text(self):
        args, examples = self.training_args, self.examples.get("train")
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if hasattr(examples, "__len__") and len(examples) < step and not args.dry_run:
            raise ValueError(
                f"The text makes {len(examples)} examples, fewer than the {step} of one step: give more text, or lower "
                "per_device_train_batch_size."
            )

    def describe(self):
        losses = {f"{name}_weight": weight for name, weight in asdict(self.weights).items()}
        return run_settings(self, **losses, **{"the teacher's weights": weights_hash(self.teacher.model)})

    def collator(self):
        collator = masking_collator(self.tokenizer, self.data_args, seed=self.training_args.seed)
        collator.mlm = "masked_tokens" in self.weights.used
        return collator

    def trainer(self):
        args = self.training_args
        return super().trainer(
            teacher=self.teacher,
            weights=self.weights,
            attention_steps=args.attention_steps,
            attention_learning_rate=args.attention_learning_rate,
        )

    def save(self, trainer):
        trainer.save_model()
        if self.sentence_transformer is not None and trainer.is_world_process_zero():
            self.sentence_transformer[0].model = trainer.accelerator.unwrap_model(trainer.model)
            self.sentence_transformer.save(self.training_args.output_dir, create_model_card=False)

    def report(self, state, metrics):
        folder = Path(self.training_args.output_dir)
        teacher = Path(self.model_args.teacher)
        write_report(
            folder,
            self,
            state,
            metrics,
            card=MODEL_CARD,
            library="transformers" if self.sentence_transformer is None else "sentence-transformers",
            teacher=teacher.resolve().name if teacher.exists() else self.model_args.teacher,
            use=self.example_of_use(folder.resolve().name),
            losses=self.describe_losses(state.max_steps),
        )
        first = self.steps_alone(state.max_steps)
        label = "weighted sum of the losses" + (f"\n(training, first {first} steps: attention)" if first else "")
        plot_curves(state.log_history, folder / "training_curves.png", "loss", label)

    def steps_alone(self, steps):
        return steps_of_first_stage(self.training_args.attention_steps, steps)

    def describe_losses(self, steps):
        first = self.steps_alone(steps)
        losses = ", ".join(f"{name} x {weight:g}" for name, weight in self.weights.used.items())
        return f"attention for {first} steps, then {losses}" if first else losses

    def example_of_use(self, name):
        if self.sentence_transformer is not None:
            return USE_SENTENCES.format(name=name)
        if "classes" in self.teacher.offers:
            return USE_CLASSIFIER.format(name=name, task=TASKS[type(self.model).__name__])
        return USE_MODEL.format(name=name, auto_class=self.model._auto_class)


def main(argv=None):
    """Runs the command; returns its exit status."""
    return run_command(sys.argv[1:] if argv is None else argv, ARGUMENT_GROUPS, Distillation)


if __name__ == "__main__":
    sys.exit(main())
