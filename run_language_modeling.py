"""Pretrains LambdaBERT on text: masked language modelling, alone or with a sentence task.

    python run_language_modeling.py --output_dir=models --do_train --do_eval --eval_steps=100 --sop
    python run_language_modeling.py --sop
    python run_language_modeling.py configs/demo.json --output_dir=models/demo

The second means the first: without `do_train` and `do_eval`, it trains and evaluates. Options come from
`ModelArguments`, `DataArguments` and the Trainer's arguments; a JSON file of them may come first, and flags after it
win. The same command started again goes on from the last whole checkpoint of `output_dir`.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import training_options
from bert_conversion import bare
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.arguments import DataArguments
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.examples import count_tokens
from lambdabert.text.masks import masking_collator
from lambdabert.text.objectives import MLM, NSP, OBJECTIVES, SOP
from lambdabert.text.tokenizers import check_tokenizer, train_wordpiece
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingNSP, LambdaBertForPreTrainingSOP
from pretraining_trainer import PretrainingTrainer, non_finite_weights
from rehearsal import TINY_SHAPE, check_memory
from run_settings import run_settings
from training_options import RunArguments, parse_overrides
from training_report import plot_curves, quoted, top_predictions, unigram_baseline, write_report
from training_run import TrainingRun, load_tokenizer, note_precision, run_command

logger = logging.getLogger("run_language_modeling")

MODEL_CLASSES = {
    NSP.name: LambdaBertForPreTrainingNSP,
    SOP.name: LambdaBertForPreTrainingSOP,
    MLM.name: LambdaBertForMaskedLM,
}
DEFAULT_TOKENIZER = "google-bert/bert-base-cased"
MASK_TOKEN = "[MASK]"  # of a tokenizer that is trained
TOKENIZER_AND_START_FIELDS = ("model_name_or_path", "train_tokenizer", "vocab_size", "lowercase")
# names of an encoder's weights begin so
ENCODER = ("embeddings.", "encoder.")
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
    return training_options.parse_arguments(argv, ARGUMENT_GROUPS)


def make_tokenizer(
    model_args: ModelArguments,
    documents: dict[str, Dataset | IterableDataset] | None,
    streaming: bool,
    checkpoint: Path | None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, or trains it on the training documents unless this run's checkpoint already has it."""
    name, model = model_args.tokenizer_name, model_args.model_name_or_path
    if not model_args.train_tokenizer:
        if name is None and model is not None:
            return load_tokenizer(model, "model_name_or_path")
        tokenizer = load_tokenizer(name or DEFAULT_TOKENIZER)
        if model and tokenizer.get_vocab() != load_tokenizer(model, "model_name_or_path").get_vocab():
            raise ValueError(
                f"tokenizer_name={name} has another vocabulary than model_name_or_path={model}, so its tokens would "
                "get the embeddings of others; drop --tokenizer_name to use the model's own."
            )
        return tokenizer
    if checkpoint is not None:
        return load_tokenizer(str(checkpoint), "output_dir")
    texts = DocumentTexts(documents["train"], limit=STREAMED_TOKENIZER_DOCUMENTS if streaming else None)
    return train_wordpiece(texts, model_args.vocab_size, lowercase=model_args.lowercase)


def make_config(model_args: ModelArguments, tokens: int, padding: int) -> LambdaBertConfig:
    """Builds the config of a new or a continued model.

    Args:
        model_args: names it and what to change in it.
        tokens: the size of the tokenizer's vocabulary.
        padding: the id of its padding token.

    Raises:
        ValueError: there is no such config, or it cannot work.
    """
    overrides = parse_overrides(model_args.config_overrides)
    option = "config_name" if model_args.model_name_or_path is None else "model_name_or_path"
    name = getattr(model_args, option)
    if name is None:
        values = {"vocab_size": tokens, "pad_token_id": padding}
    else:
        try:
            values, _ = LambdaBertConfig.get_config_dict(name)
            kind = values.get("model_type", LambdaBertConfig.model_type)
        except Exception as error:  # a broken file raises whatever its reader stumbles over
            raise ValueError(
                f"{option}={name} holds no config that can be read ({type(error).__name__}: {error}); "
                "name a LambdaBERT folder."
            ) from error
        if kind != LambdaBertConfig.model_type:
            raise ValueError(f"{option}={name} is a {kind!r} model; name a LambdaBERT folder.")
    unknown = sorted(set(overrides) - set(LambdaBertConfig().to_dict()))
    if unknown:
        raise ValueError(f"config_overrides: LambdaBertConfig has no field {', '.join(unknown)}.")
    return LambdaBertConfig(**{**values, **overrides})


def check_config(config: LambdaBertConfig, data_args: DataArguments) -> None:
    """Refuses a config whose model cannot take the examples.

    Raises:
        ValueError: they are too long for it, or are pairs and it knows one kind of segment.
    """
    if config.longest_sequence is not None and data_args.max_seq_length > config.longest_sequence:
        raise ValueError(
            f"max_seq_length={data_args.max_seq_length} exceeds "
            f"max_position_embeddings={config.max_position_embeddings}; lower the one or raise the other in "
            "--config_overrides."
        )
    if OBJECTIVES[data_args.objective].has_pairs and config.type_vocab_size < 2:
        raise ValueError(
            f"type_vocab_size={config.type_vocab_size} cannot tell the two segments of a pair apart, which "
            f"objective={data_args.objective} makes; set it to 2, or use --objective mlm."
        )


def check_tokens(config: LambdaBertConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a config that belongs to another tokenizer.

    Raises:
        ValueError: it has too few embeddings, or its padding is another token.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} of the model is too small for the tokenizer's {len(tokenizer)} tokens; "
            "use the model's own tokenizer, or set vocab_size in --config_overrides for a new model."
        )
    if config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            f"pad_token_id={config.pad_token_id} of the model contradicts the tokenizer, whose {tokenizer.pad_token} "
            f"is {tokenizer.pad_token_id}: set pad_token_id={tokenizer.pad_token_id} in --config_overrides."
        )


def check_masked_sentence(sentence: str | None, mask_token: str) -> None:
    """Raises ValueError if a sentence does not hold exactly one mask."""
    if sentence is not None and sentence.count(mask_token) != 1:
        raise ValueError(
            f"masked_sentence={sentence!r} holds {mask_token} {sentence.count(mask_token)} times: it takes exactly one."
        )


def check_length(sentence: str | None, tokenizer: PreTrainedTokenizerBase, config: LambdaBertConfig) -> None:
    """Raises ValueError if a sentence is longer than what a model takes."""
    if sentence is None or config.longest_sequence is None:
        return
    length = len(tokenizer(sentence).input_ids)
    if length > config.longest_sequence:
        raise ValueError(
            f"masked_sentence has {length} tokens, and the model takes {config.longest_sequence}: shorten it."
        )


def make_model(
    model_class: type[PreTrainedModel], config: LambdaBertConfig, source: str | None, *, overridden: bool
) -> PreTrainedModel:
    """Builds a new model, or loads one from `source`, in float32 whatever it is stored in.

    Args:
        model_class: its class.
        config: its config.
        source: a folder or hub name, or None.
        overridden: whether the config is another than that of `source`.

    Raises:
        ValueError: the weights are unreadable or not finite, or the encoder's are others than the config says.
    """
    if source is None:
        return model_class(config)
    note_precision(source, config.to_dict())
    advice = "drop the --config_overrides that change them" if overridden else "its folder is damaged; name another"
    try:
        model, loaded = model_class.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{source} holds no weights that can be read ({error}).") from error
    except RuntimeError as error:
        raise ValueError(f"The weights of {source} have another shape than the config ({error}): {advice}.") from error
    missing, left_out = (sorted(loaded[kind]) for kind in ("missing_keys", "unexpected_keys"))
    wrong = [name for name in missing + left_out if bare(name).startswith(ENCODER)]
    if wrong:
        lacks, unknown = ([name for name in wrong if name in names] for names in (missing, left_out))
        parts = [f"lacks {', '.join(lacks[:3])}"] if lacks else []
        parts += [f"has no place for {', '.join(unknown[:3])}"] if unknown else []
        raise ValueError(f"The encoder of {source} does not fit the config: it {' and '.join(parts)}; {advice}.")
    if missing:
        logger.info(f"New weights, which {source} does not have: {', '.join(missing)}.")
    if left_out:
        logger.info(f"Left out weights of {source}: {', '.join(left_out)}.")
    if bad := non_finite_weights(model):
        raise ValueError(f"{source} has weights that are not finite ({', '.join(bad[:3])}); name another model.")
    return model


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

    def become_tiny(self):
        self.model = MODEL_CLASSES[self.data_args.objective](LambdaBertConfig(**TINY_SHAPE, num_lambda_queries=2))

    def open_model(self):
        model_args, data_args = self.model_args, self.data_args
        sentence = model_args.masked_sentence
        if model_args.train_tokenizer:
            check_masked_sentence(sentence, MASK_TOKEN)
            config = make_config(model_args, model_args.vocab_size, padding=0)
        else:
            self.tokenizer = make_tokenizer(model_args, None, False, None)
            check_tokenizer(self.tokenizer, whole_word_mask=data_args.whole_word_mask)
            check_masked_sentence(sentence, self.tokenizer.mask_token)
            config = make_config(model_args, len(self.tokenizer), self.tokenizer.pad_token_id)
            check_tokens(config, self.tokenizer)
            check_length(sentence, self.tokenizer, config)
        check_config(config, data_args)
        check_memory(MODEL_CLASSES[data_args.objective], config, self.training_args, data_args.max_seq_length)

    def make_model(self, documents):
        model_args, data_args = self.model_args, self.data_args
        if model_args.train_tokenizer:
            tokenizers = [None]
            if self.training_args.process_index == 0:
                tokenizers = [make_tokenizer(model_args, documents, data_args.streaming, self.checkpoint)]
            self.tokenizer = broadcast_object_list(tokenizers)[0]
        config = make_config(model_args, len(self.tokenizer), self.tokenizer.pad_token_id)
        if model_args.train_tokenizer:
            check_tokens(config, self.tokenizer)
            check_length(model_args.masked_sentence, self.tokenizer, config)
        self.tokenizer.model_max_length = config.longest_sequence or VERY_LARGE_INTEGER
        set_seed(self.training_args.seed)
        self.model = make_model(
            MODEL_CLASSES[data_args.objective],
            config,
            model_args.model_name_or_path,
            overridden=model_args.config_overrides is not None,
        )

    def start_from_text(self):
        if "train" in self.examples and self.model_args.model_name_or_path is None:
            start_at_frequencies(self.model, count_tokens(self.examples["train"], self.tokenizer, COUNTED_EXAMPLES))

    def describe(self):
        start = {f"argument {name}": getattr(self.model_args, name) for name in TOKENIZER_AND_START_FIELDS}
        return run_settings(self, **start)

    def collator(self):
        return masking_collator(self.tokenizer, self.data_args, seed=self.training_args.seed)

    def evaluate(self, trainer, same_text):
        """The final evaluation and, for comparison, what word frequencies alone reach on the same masked tokens."""
        metrics = super().evaluate(trainer, same_text)
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
            sentence=quoted(self.model_args.masked_sentence or f"Paris is the {self.tokenizer.mask_token} of France."),
        )
        if self.training_args.do_train:
            plot_curves(state.log_history, folder / "training_curves.png")

    def show(self, trainer):
        if self.model_args.masked_sentence and trainer.is_world_process_zero():
            args = self.training_args
            source = args.output_dir if args.do_train else self.model_args.model_name_or_path
            logger.info(top_predictions(source, self.model_args.masked_sentence))


def main(argv=None):
    """Runs the command; returns its exit status."""
    return run_command(sys.argv[1:] if argv is None else argv, ARGUMENT_GROUPS, Pretraining)


if __name__ == "__main__":
    sys.exit(main())
