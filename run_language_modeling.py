"""Pretrains LambdaBERT on text: masked language modelling, alone or with a sentence task.

    python run_language_modeling.py --output_dir=models --do_train --do_eval --eval_steps=100 --sop
    python run_language_modeling.py configs/demo.json --output_dir=models/demo

Options come from `ModelArguments`, `DataArguments` and the Trainer's arguments; a JSON file of them may come first, and
flags after it win. The same command started again goes on from the last whole checkpoint of `output_dir`.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import set_seed
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import training_run
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.arguments import DataArguments
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.examples import count_tokens
from lambdabert.text.masks import masking_collator
from lambdabert.text.objectives import MLM, NSP, OBJECTIVES, SOP
from lambdabert.text.tokenizers import check_tokenizer, train_wordpiece
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingNSP, LambdaBertForPreTrainingSOP
from pretraining_trainer import PretrainingTrainer
from training_report import plot_curves, top_predictions, unigram_baseline, write_report
from training_run import RunArguments, TrainingRun, load_tokenizer, parse_overrides, run_command, run_settings

logger = logging.getLogger("run_language_modeling")

MODEL_CLASSES = {
    NSP.name: LambdaBertForPreTrainingNSP,
    SOP.name: LambdaBertForPreTrainingSOP,
    MLM.name: LambdaBertForMaskedLM,
}
DEFAULT_TOKENIZER = "google-bert/bert-base-cased"
TOKENIZER_AND_START_FIELDS = ("model_name_or_path", "train_tokenizer", "vocab_size", "lowercase")
STREAMED_TOKENIZER_DOCUMENTS = 200_000
COUNTED_EXAMPLES = 20_000


@dataclass
class ModelArguments:
    """The model and its tokenizer."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A LambdaBERT checkpoint to go on from; without it the model starts at random."},
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
            "help": "A folder, vocab.txt or hub name; default: that of model_name_or_path, else "
            + DEFAULT_TOKENIZER
            + "."
        },
    )
    train_tokenizer: bool = field(default=False, metadata={"help": "Train a WordPiece tokenizer on the training text."})
    vocab_size: int = field(default=16_000, metadata={"help": "Number of tokens of a trained tokenizer."})
    lowercase: bool = field(default=False, metadata={"help": "Whether a trained tokenizer ignores case."})
    masked_sentence: str | None = field(
        default=None, metadata={"help": "A sentence with one [MASK]; its likeliest fillings are shown at the end."}
    )

    def __post_init__(self):
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


ARGUMENT_GROUPS = (ModelArguments, DataArguments, RunArguments)


def parse_arguments(argv):
    """Reads flags, or a JSON file followed by flags that override it: one instance of each of `ARGUMENT_GROUPS`.

    Raises:
        ValueError: unknown or contradicting options, or a JSON file that cannot be read.
    """
    return training_run.parse_arguments(argv, ARGUMENT_GROUPS)


def make_tokenizer(model_args, documents, streaming, checkpoint):
    """Loads the tokenizer, or trains it on the training documents unless this run's checkpoint already has it."""
    name, model = model_args.tokenizer_name, model_args.model_name_or_path
    if not model_args.train_tokenizer:
        tokenizer = load_tokenizer(name or model or DEFAULT_TOKENIZER)
        if name and model and tokenizer.get_vocab() != load_tokenizer(model).get_vocab():
            raise ValueError(
                f"tokenizer_name={name} has another vocabulary than model_name_or_path={model}, so its tokens would "
                "get the embeddings of others; drop --tokenizer_name to use the model's own."
            )
        return tokenizer
    if checkpoint is not None:
        return load_tokenizer(checkpoint)
    texts = DocumentTexts(documents["train"], limit=STREAMED_TOKENIZER_DOCUMENTS if streaming else None)
    return train_wordpiece(texts, model_args.vocab_size, lowercase=model_args.lowercase)


def make_config(model_args, tokenizer, max_seq_length):
    """Builds the config of a new or a continued model.

    Raises:
        ValueError: the config, the tokenizer and the length of the examples do not fit together.
    """
    overrides = parse_overrides(model_args.config_overrides)
    name = model_args.model_name_or_path or model_args.config_name
    if name is None:
        values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    else:
        try:
            values, _ = LambdaBertConfig.get_config_dict(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} holds no config that can be read ({error}); name a LambdaBERT folder.") from error
        if values.get("model_type", LambdaBertConfig.model_type) != LambdaBertConfig.model_type:
            raise ValueError(f"{name} is a {values['model_type']!r} model; name a LambdaBERT folder.")
    unknown = sorted(set(overrides) - set(LambdaBertConfig().to_dict()))
    if unknown:
        raise ValueError(f"config_overrides: LambdaBertConfig has no field {', '.join(unknown)}.")
    config = LambdaBertConfig(**{**values, **overrides})
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} of the model is too small for the tokenizer's {len(tokenizer)} tokens; "
            "use the model's own tokenizer, or set vocab_size in --config_overrides for a new model."
        )
    if config.longest_sequence is not None and max_seq_length > config.longest_sequence:
        raise ValueError(
            f"max_seq_length={max_seq_length} exceeds max_position_embeddings={config.max_position_embeddings}; lower "
            "the one or raise the other in --config_overrides."
        )
    return config


def make_model(model_class, config, source):
    """Builds a new model, or loads one from `source`.

    Raises:
        ValueError: the weights are unreadable or of another shape.
    """
    if source is None:
        return model_class(config)
    try:
        return model_class.from_pretrained(source, config=config)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{source} holds no weights that can be read ({error}).") from error
    except RuntimeError as error:
        raise ValueError(
            f"The weights of {source} have another shape than the config ({error}); drop the --config_overrides that "
            "change shapes."
        ) from error


def start_at_frequencies(model, counts):
    """Lets a new model predict every masked token by how often it stands in the text: the bias of its MLM head.

    Without this, a new model first has to learn the frequencies, and learns context later (docs/results.md).

    Args:
        counts: occurrences of each token, [up to vocab_size]; each is counted once more.
    """
    bias = model.cls.predictions.bias
    smoothed = torch.ones_like(bias)
    smoothed[: len(counts)] += torch.from_numpy(counts).to(bias)
    with torch.no_grad():
        bias.copy_((smoothed / smoothed.sum()).log())


class Pretraining(TrainingRun):
    """A run of the command."""

    trainer_class = PretrainingTrainer

    @property
    def label_names(self):
        return OBJECTIVES[self.data_args.objective].label_names

    def check_options(self):
        args = self.training_args
        if not (args.do_train or args.dry_run or self.model_args.model_name_or_path):
            raise ValueError("do_eval without do_train evaluates a trained model: name it by --model_name_or_path.")

    def hub_names(self):
        args = self.model_args
        tokenizer = None if args.train_tokenizer else args.tokenizer_name or DEFAULT_TOKENIZER
        return args.model_name_or_path, args.config_name, tokenizer

    def open_model(self):
        if not self.model_args.train_tokenizer:
            self.tokenizer = make_tokenizer(self.model_args, None, False, None)
            check_tokenizer(self.tokenizer, whole_word_mask=self.data_args.whole_word_mask)

    def make_model(self, documents):
        model_args, data_args = self.model_args, self.data_args
        if model_args.train_tokenizer:
            tokenizers = [None]
            if self.training_args.process_index == 0:
                tokenizers = [make_tokenizer(model_args, documents, data_args.streaming, self.checkpoint)]
            self.tokenizer = broadcast_object_list(tokenizers)[0]
        config = make_config(model_args, self.tokenizer, data_args.max_seq_length)
        self.tokenizer.model_max_length = config.longest_sequence or VERY_LARGE_INTEGER
        set_seed(self.training_args.seed)
        self.model = make_model(MODEL_CLASSES[data_args.objective], config, model_args.model_name_or_path)

    def start_from_text(self):
        if "train" in self.examples and self.model_args.model_name_or_path is None:
            start_at_frequencies(self.model, count_tokens(self.examples["train"], self.tokenizer, COUNTED_EXAMPLES))

    def describe(self):
        start = {f"argument {name}": getattr(self.model_args, name) for name in TOKENIZER_AND_START_FIELDS}
        return run_settings(self, **start)

    def collator(self):
        return masking_collator(self.tokenizer, self.data_args, seed=self.training_args.seed)

    def evaluate(self, trainer):
        """The final evaluation and, for comparison, what word frequencies alone reach on the same masked tokens."""
        metrics = super().evaluate(trainer)
        metrics |= unigram_baseline(self.examples.get("train"), self.examples["validation"], self.tokenizer)
        logger.info(
            f"MLM loss of the evaluation text {metrics['eval_mlm_loss']:.3f} nats per masked token; "
            f"its unigram entropy {metrics['unigram_entropy']:.3f}."
        )
        if "unigram_cross_entropy" in metrics:
            logger.info(f"Token frequencies of the training text predict it at {metrics['unigram_cross_entropy']:.3f}.")
        return metrics

    def report(self, state, metrics):
        folder = Path(self.training_args.output_dir)
        write_report(
            folder,
            self,
            state,
            metrics,
            objective=OBJECTIVES[self.data_args.objective].description,
            sentence=self.model_args.masked_sentence or "Paris is the [MASK] of France.",
        )
        if not self.training_args.do_train:
            return
        plot_curves(state.log_history, folder / "training_curves.png")
        if self.model_args.masked_sentence:
            logger.info(top_predictions(folder, self.model_args.masked_sentence))


def main(argv=None):
    """Runs the command; returns its exit status."""
    return run_command(sys.argv[1:] if argv is None else argv, ARGUMENT_GROUPS, Pretraining)


if __name__ == "__main__":
    sys.exit(main())
