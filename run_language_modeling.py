"""Pretrains LambdaBERT on text: masked language modelling, alone or with a sentence task.

    python run_language_modeling.py --output_dir=models --do_train --do_eval --eval_steps=100 --sop
    python run_language_modeling.py --sop
    python run_language_modeling.py configs/demo.json --output_dir=models/demo

The second means the first: without `do_train` and `do_eval`, it trains and evaluates. A JSON file of options may come
first, and flags after it win. The same command started again resumes from the last complete checkpoint of `output_dir`.
"""

import logging
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import lambdabert.training.arguments
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.arguments import DataArguments
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.examples import ExampleRecipe, count_tokens
from lambdabert.text.masks import MaskingCollator, masking_collator
from lambdabert.text.objectives import MLM, NSP, SOP, Objective
from lambdabert.text.tokenizers import check_tokenizer, train_wordpiece
from lambdabert.training.arguments import RunArguments
from lambdabert.training.command import run_training_command
from lambdabert.training.memory import check_memory
from lambdabert.training.models import (
    check_examples_fit,
    check_masked_sentence,
    check_sentence_length,
    check_tokens,
    make_config,
    make_model,
    peak_learning_rate,
    start_at_frequencies,
)
from lambdabert.training.rehearsal import TINY_SHAPE
from lambdabert.training.report import (
    describe_data,
    describe_recipe,
    plot_curves,
    quoted,
    read_template,
    top_predictions,
    unigram_baseline,
)
from lambdabert.training.run import Documents, TrainingRun
from lambdabert.training.settings import examples_of_a_step
from lambdabert.training.tokenizers import SPECIAL_TOKENS, load_tokenizer
from lambdabert.training.trainer import InterruptibleTrainer, PretrainingTrainer
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingNSP, LambdaBertForPreTrainingSOP

logger = logging.getLogger("lambdabert.run_language_modeling")

MODEL_CLASSES = {
    NSP.name: LambdaBertForPreTrainingNSP,
    SOP.name: LambdaBertForPreTrainingSOP,
    MLM.name: LambdaBertForMaskedLM,
}
DEFAULT_TOKENIZER = "google-bert/bert-base-cased"
MASK_TOKEN = "[MASK]"  # of a tokenizer that is trained
TOKENIZER_AND_START_FIELDS = ("model_name_or_path", "train_tokenizer", "vocab_size", "lowercase")
EVALUATION_TEXT_FIELDS = (
    *("objective", "dataset_name", "dataset_config_name", "validation_file", "validation_split_percentage"),
    *("document_boundary", "max_seq_length", "eval_mlm_probability", "max_eval_samples"),
    *("mask_replace_prob", "random_replace_prob", "whole_word_mask"),
)
STREAMED_TOKENIZER_DOCUMENTS = 200_000
COUNTED_EXAMPLES = 20_000


@dataclass
class ModelArguments:
    """The model and its tokenizer."""

    _argument_group_name = "model"
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A LambdaBERT to train further; without it the model starts at random."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A folder, JSON file or hub name of a LambdaBertConfig; default: base size."}
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Config fields to change: "hidden_size=256,num_hidden_layers=4", or an object in a JSON file.'
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": f"A folder, vocab.txt or hub name; default: that of model_name_or_path, else {DEFAULT_TOKENIZER}."
        },
    )
    train_tokenizer: bool = field(default=False, metadata={"help": "Train a WordPiece tokenizer on the training text."})
    vocab_size: int = field(default=16_000, metadata={"help": "Number of tokens of a trained tokenizer."})
    lowercase: bool = field(default=False, metadata={"help": "Whether a trained tokenizer ignores case."})
    masked_sentence: str | None = field(
        default=None, metadata={"help": "A sentence with one [MASK]; the likeliest words for it are logged at the end."}
    )

    def __post_init__(self) -> None:
        if self.train_tokenizer and self.tokenizer_name:
            raise ValueError(
                f"train_tokenizer and tokenizer_name={self.tokenizer_name!r} name two tokenizers; give one of them."
            )
        if self.train_tokenizer and self.model_name_or_path:
            raise ValueError(
                f"train_tokenizer does not fit model_name_or_path={self.model_name_or_path!r}, whose embeddings belong "
                "to its own tokenizer; give one of them."
            )
        if self.model_name_or_path and self.config_name:
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path!r} brings its own config; drop "
                f"config_name={self.config_name!r}."
            )


@dataclass
class PretrainingArguments(RunArguments):
    """The Trainer's arguments, with defaults that bring a new model past word frequencies."""

    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "The peak learning rate. The default, 1e-4, is for training a model further; a new model's depends "
            "on its depth, its width and the tokens of a step (5.8e-4 at base size, 4e-3 for 4 layers of width 192)."
        },
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples of a step on each device."})


ARGUMENT_GROUPS = (ModelArguments, DataArguments, PretrainingArguments)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
    """Reads flags, or a JSON file followed by flags that override it: one instance of each of `ARGUMENT_GROUPS`.

    Raises:
        ValueError: unknown or contradicting options, or a JSON file that cannot be read.
    """
    model_args, data_args, training_args = lambdabert.training.arguments.parse_arguments(argv, ARGUMENT_GROUPS)
    return model_args, data_args, training_args


class Pretraining(TrainingRun):
    """A run of the command."""

    trainer_class = PretrainingTrainer
    model_args: ModelArguments
    data_args: DataArguments

    @property
    def example_recipe(self) -> ExampleRecipe:
        return self.data_args.example_recipe()

    @property
    def objective(self) -> Objective:
        return self.example_recipe.objective

    @property
    def label_names(self) -> list[str]:
        return self.objective.label_names

    def check_own_options(self) -> None:
        if self.trains:
            return
        source = self.model_args.model_name_or_path
        if source is None:
            raise ValueError("do_eval without do_train evaluates a trained model: name it by --model_name_or_path.")
        try:
            fields, _ = LambdaBertConfig.get_config_dict(source)
        except OSError:
            return  # told with the model
        saved_as = next(iter(fields.get("architectures") or ()), None)
        tasks = {model_class.__name__: name for name, model_class in MODEL_CLASSES.items()}
        if saved_as not in tasks:
            raise ValueError(
                f"model_name_or_path={source} was saved as {saved_as}, without the head that predicts masked tokens: "
                f"name a {', '.join(tasks)}, or train it with --do_train."
            )
        if not self.training_args.given & {"objective", "sop"}:
            self.data_args.objective = tasks[saved_as]
            self.data_args.__post_init__()
            logger.info(f"objective={tasks[saved_as]}, which {source} was trained for.")
        elif self.objective.name not in (MLM.name, tasks[saved_as]):
            raise ValueError(
                f"objective={self.objective.name!r}: {source} was trained for {tasks[saved_as]!r} and has no head for "
                "another sentence task; leave it out."
            )

    def hub_names(self) -> tuple[str | None, ...]:
        args = self.model_args
        tokenizer = (
            None if args.train_tokenizer else args.tokenizer_name or args.model_name_or_path or DEFAULT_TOKENIZER
        )
        return args.model_name_or_path, args.config_name, tokenizer

    def become_tiny(self) -> None:
        self.model = MODEL_CLASSES[self.objective.name](LambdaBertConfig(**TINY_SHAPE, num_lambda_queries=2))

    def open_model(self) -> None:
        args, data_args = self.model_args, self.data_args
        if args.train_tokenizer:
            check_masked_sentence(args.masked_sentence, MASK_TOKEN)
            padding, mask = (SPECIAL_TOKENS.index(token) for token in ("[PAD]", MASK_TOKEN))
            config = self.config(args.vocab_size, padding, mask)
        else:
            self.tokenizer = self.named_tokenizer()
            check_tokenizer(self.tokenizer, pairs=self.objective.has_pairs, whole_word_mask=data_args.whole_word_mask)
            check_masked_sentence(args.masked_sentence, self.tokenizer.mask_token)
            config = self.config_of_tokenizer()
        check_examples_fit(config, data_args, self.objective)
        self.set_learning_rate(config)
        check_memory(MODEL_CLASSES[self.objective.name], config, self.training_args, data_args)

    def set_learning_rate(self, config: LambdaBertConfig) -> None:
        """Sets the rate of a new model, unless one was given."""
        args = self.training_args
        if self.trains and self.model_args.model_name_or_path is None and "learning_rate" not in args.given:
            tokens = examples_of_a_step(args) * self.data_args.max_seq_length
            args.learning_rate = peak_learning_rate(config.num_hidden_layers, config.hidden_size, tokens)
            logger.info(f"The peak learning rate is {args.learning_rate:.2g}, for a new model of this size.")

    def named_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer that the options name. Raises ValueError if it is not the model's."""
        name, model = self.model_args.tokenizer_name, self.model_args.model_name_or_path
        if name is None and model is not None:
            return load_tokenizer(model, "model_name_or_path")
        tokenizer = load_tokenizer(name or DEFAULT_TOKENIZER)
        if model and tokenizer.get_vocab() != load_tokenizer(model, "model_name_or_path").get_vocab():
            raise ValueError(
                f"tokenizer_name={name} has another vocabulary than model_name_or_path={model}, so its tokens would "
                "get the embeddings of others; drop --tokenizer_name to use the model's own."
            )
        return tokenizer

    def trained_tokenizer(self, documents: Documents) -> PreTrainedTokenizerBase:
        """Trains a tokenizer on the training documents, or loads that of the run's checkpoint; the same everywhere."""
        tokenizers: list[PreTrainedTokenizerBase | None] = [None]
        if self.training_args.process_index == 0 and self.checkpoint is not None:
            tokenizers = [load_tokenizer(str(self.checkpoint), "output_dir")]
        elif self.training_args.process_index == 0:
            limit = STREAMED_TOKENIZER_DOCUMENTS if self.data_args.streaming else None
            texts = DocumentTexts(documents["train"], limit=limit)
            tokenizers = [train_wordpiece(texts, self.model_args.vocab_size, lowercase=self.model_args.lowercase)]
        return broadcast_object_list(tokenizers)[0]

    def config(self, tokens: int, padding: int, mask: int) -> LambdaBertConfig:
        """The model's config, for a vocabulary of `tokens`; `padding` and `mask` are the ids of two of them."""
        args = self.model_args
        option = "config_name" if args.model_name_or_path is None else "model_name_or_path"
        return make_config(
            getattr(args, option),
            option,
            args.config_overrides,
            objective=self.objective,
            tokens=tokens,
            padding=padding,
            mask=mask,
        )

    def config_of_tokenizer(self) -> LambdaBertConfig:
        """The model's config. Raises ValueError if it does not fit the tokenizer or the masked sentence."""
        config = self.config(len(self.tokenizer), self.tokenizer.pad_token_id, self.tokenizer.mask_token_id)
        check_tokens(config, self.tokenizer)
        check_sentence_length(self.model_args.masked_sentence, self.tokenizer, config)
        return config

    def make_model(self, documents: Documents) -> None:
        args = self.model_args
        if args.train_tokenizer:
            self.tokenizer = self.trained_tokenizer(documents)
        config = self.config_of_tokenizer()
        self.tokenizer.model_max_length = config.longest_sequence or VERY_LARGE_INTEGER
        set_seed(self.training_args.seed)
        overridden = args.config_overrides is not None
        self.model = make_model(
            MODEL_CLASSES[self.objective.name], config, args.model_name_or_path, overridden=overridden
        )

    def check_examples(self) -> None:
        """Refuses a text whose only batch would be dropped as incomplete. Raises ValueError."""
        args, examples = self.training_args, self.examples.get("train")
        batch = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and isinstance(examples, Dataset) and len(examples) < batch:
            raise ValueError(
                f"dataloader_drop_last drops the only batch: the text makes {len(examples)} examples, fewer than "
                f"{batch}. Leave it out, give more text, or lower per_device_train_batch_size."
            )

    def start_from_text(self) -> None:
        """Starts a new model at the text's token frequencies."""
        if "train" in self.examples and self.model_args.model_name_or_path is None:
            start_at_frequencies(self.model, count_tokens(self.examples["train"], self.tokenizer, COUNTED_EXAMPLES))

    def describe(self) -> dict[str, dict[str, Any]]:
        start = {f"argument {name}": getattr(self.model_args, name) for name in TOKENIZER_AND_START_FIELDS}
        return self.run_settings(**start)

    def collator(self, *, training: bool) -> MaskingCollator:
        return masking_collator(self.tokenizer, self.data_args, seed=self.training_args.seed, training=training)

    def evaluate(self, trainer: InterruptibleTrainer) -> dict[str, float]:
        """The final evaluation and, for comparison, how well token frequencies alone predict the evaluation text."""
        if not self.training_args.do_eval:
            return {}
        metrics = super().evaluate(trainer)
        metrics |= unigram_baseline(self.examples.get("train"), self.examples["validation"], self.tokenizer)
        logger.info(
            f"MLM loss of the evaluation text: {metrics['eval_mlm_loss']:.3f} nats per masked token. "
            f"Its unigram entropy: {metrics['unigram_entropy']:.3f}."
        )
        if "unigram_cross_entropy" in metrics:
            logger.info(
                f"Its cross entropy under the training text's frequencies: {metrics['unigram_cross_entropy']:.3f}."
            )
        return metrics

    @cached_property
    def evaluated(self) -> dict[str, Any]:
        model = {"model_name_or_path": self.model_args.model_name_or_path}
        text = {name: getattr(self.data_args, name) for name in EVALUATION_TEXT_FIELDS}
        if self.data_args.validation_file:
            text |= dict.fromkeys(("dataset_name", "dataset_config_name"))
        masks = {"seed": self.training_args.seed, "content of the examples": self.evaluation_text}
        return model | text | masks

    def model_card(self, state: TrainerState, metrics: str) -> str:
        name = Path(str(self.training_args.output_dir)).resolve().name
        fields = ("max_seq_length", "mlm_probability", "eval_mlm_probability")
        text = {name: getattr(self.data_args, name) for name in fields}
        sentence = self.model_args.masked_sentence or f"Paris is the {self.tokenizer.mask_token} of France."
        return read_template("lambdabert.training", "model_card.md").format(
            name=name,
            folder=quoted(name),
            objective=self.objective.description,
            sentence=quoted(sentence),
            data=describe_data(self.data_args, self.summaries),
            recipe=describe_recipe(text, self.training_args, self.model, state, self.earlier),
            metrics=metrics,
        )

    def draw_curves(self, state: TrainerState, file: Path) -> None:
        plot_curves(state.log_history, file)

    def show(self, trainer: InterruptibleTrainer) -> None:
        """Logs the most likely words for the mask of `masked_sentence`."""
        args, sentence = self.training_args, self.model_args.masked_sentence
        if sentence and trainer.is_world_process_zero():
            source = args.output_dir if args.do_train else self.model_args.model_name_or_path
            logger.info(top_predictions(str(source), sentence))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_training_command(sys.argv[1:] if argv is None else argv, ARGUMENT_GROUPS, Pretraining, __doc__)


if __name__ == "__main__":
    sys.exit(main())
