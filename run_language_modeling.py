"""Pretrains LambdaBERT on text: masked language modelling, alone or with a sentence task.

    python run_language_modeling.py --output_dir=models --do_train --do_eval --eval_steps=100 --sop
    python run_language_modeling.py configs/demo.json --output_dir=models/demo

Options come from `ModelArguments`, `DataArguments` and the Trainer's arguments; a JSON file of them may come first, and
flags after it win. The same command started again goes on from the last whole checkpoint of `output_dir`.
"""

import hashlib
import json
import logging
import os
import resource
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub
import torch
import transformers
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, BertTokenizer, HfArgumentParser, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from configuration_lambdabert import LambdaBertConfig
from corpora import UnreadableTextError, document_texts, load_corpus
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingNSP, LambdaBertForPreTrainingSOP
from pretraining_data import (
    LABEL_NAMES,
    DataArguments,
    check_tokenizer,
    count_tokens,
    masking_collator,
    prepare_examples,
    train_wordpiece,
)
from pretraining_trainer import (
    CheckpointError,
    PretrainingTrainer,
    check_output_folder,
    check_same_run,
    last_whole_checkpoint,
    record_run,
)
from training_report import describe_run, top_predictions, unigram_baseline, write_report

logger = logging.getLogger("run_language_modeling")

MODEL_CLASSES = {
    "nsp": LambdaBertForPreTrainingNSP,
    "sop": LambdaBertForPreTrainingSOP,
    "mlm": LambdaBertForMaskedLM,
}
DEFAULT_TOKENIZER = "google-bert/bert-base-cased"
# these change where and how fast data are prepared, not what they are
PLACE_AND_SPEED_FIELDS = ("data_cache_dir", "preprocessing_num_workers", "validation_file", "max_eval_samples")
TOKENIZER_AND_START_FIELDS = ("model_name_or_path", "train_tokenizer", "vocab_size", "lowercase")
DRY_RUN_DOCUMENTS = 500
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


@dataclass
class PretrainingArguments(TrainingArguments):
    """The Trainer's arguments, with BERT's optimisation as defaults."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of all weights but biases and norms."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Steps of rising learning rate; below 1: a share of all."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs; below 1: a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Which tokens the throughput counts: all, non_padding or no."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether a parameter may stay unused; every objective uses all of its model."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check data, tokenizer, model and memory with a single step; write nothing in output_dir."},
    )

    def __post_init__(self):
        if self.do_eval and self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()


class OneLineParser(HfArgumentParser):
    """Reports a mistake as a `ValueError` instead of printing all options."""

    def error(self, message):
        raise ValueError(f"{message} (--help lists all options)")


ARGUMENT_GROUPS = (ModelArguments, DataArguments, PretrainingArguments)


def parse_arguments(argv):
    """Reads flags, or a JSON file followed by flags that override it.

    Returns:
        `ModelArguments`, `DataArguments`, `PretrainingArguments`.

    Raises:
        ValueError: unknown or contradicting options, or a JSON file that cannot be read.
    """
    parser = OneLineParser(ARGUMENT_GROUPS, allow_abbrev=False)
    if argv and argv[0].endswith(".json"):
        recipe, argv = argv[0], argv[1:]
        try:
            values = json.loads(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{recipe} cannot be read as JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{recipe} holds no JSON object; it should map option names to values.")
        unknown = sorted(set(values) - {option.name for group in ARGUMENT_GROUPS for option in fields(group)})
        if unknown:
            raise ValueError(f"{recipe} has unknown options: {', '.join(unknown)} (--help lists all options).")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def is_local(name):
    return name is None or Path(name).exists()


def use_cache_if_hub_is_unreachable(*names):
    """Asks the hub once, instead of the libraries' minutes of retries, where one of the names is a hub name."""
    if all(is_local(name) for name in names) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the transport library, and so the class of its errors, differs between hub versions
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def load_tokenizer(name):
    """Loads a tokenizer from a folder, a vocabulary file (one token a line) or the hub.

    Raises:
        ValueError: nothing usable is there, or the hub cannot be reached.
    """
    path = Path(name)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if path.is_file() or (vocabulary.exists() and not (path / "tokenizer_config.json").exists()):
        try:
            tokens = vocabulary.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise ValueError(
                f"tokenizer_name={name}: {vocabulary} is no text; name a vocabulary, one token a line."
            ) from None
        words = {token: i for i, token in enumerate(tokens) if token}
        cased = any(token != token.lower() for token in words if not token.startswith("["))
        return BertTokenizer(vocab=words, do_lower_case=not cased)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if path.is_dir():
            raise ValueError(f"tokenizer_name={name} holds no tokenizer ({error}).") from error
        raise ValueError(
            f"tokenizer_name={name} is no folder and the hub cannot be reached or does not have it; name a local one "
            "by --tokenizer_name, train one on your --train_file with --train_tokenizer, or run the demo, which needs "
            "no network: configs/demo.json."
        ) from error


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
    texts = document_texts(documents["train"])
    if streaming:
        texts = islice(texts, STREAMED_TOKENIZER_DOCUMENTS)
    return train_wordpiece(texts, model_args.vocab_size, lowercase=model_args.lowercase)


def parse_overrides(overrides):
    """Turns "a=1,b=rms,c=None" into a dict; a value that is no JSON stays a string."""
    if not isinstance(overrides, str):
        return dict(overrides or {})
    values = {}
    for item in filter(None, overrides.split(",")):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f'config_overrides: {item!r} is no "field=value"; separate several by commas.')
        try:
            values[name] = json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
        except ValueError:
            values[name] = text
    return values


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
    if max_seq_length > config.max_position_embeddings:
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

    Without this, all hidden states drift in one common direction that encodes the frequencies, and context is learned
    late or, at a high learning rate, not at all.

    Args:
        counts: occurrences of each token, [up to vocab_size]; each is counted once more.
    """
    bias = model.cls.predictions.bias
    smoothed = torch.ones_like(bias)
    smoothed[: len(counts)] += torch.from_numpy(counts).to(bias)
    with torch.no_grad():
        bias.copy_((smoothed / smoothed.sum()).log())


def run_settings(model_args, data_args, training_args, config, tokenizer, train_examples):
    """What makes a run this run, as JSON values: {group: {field: value}}."""
    data = {name: value for name, value in asdict(data_args).items() if name not in PLACE_AND_SPEED_FIELDS}
    data["prepared examples"] = getattr(train_examples, "_fingerprint", None)
    rules = {**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
    data["tokenizer"] = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
    model = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    model |= {f"argument {name}": getattr(model_args, name) for name in TOKENIZER_AND_START_FIELDS}
    training = {name: getattr(training_args, name) for name in ("seed", "data_seed")}
    return json.loads(json.dumps({"data": data, "model": model, "training": training}, default=str))


def peak_memory(device):
    """Most memory held so far: the accelerator's, or the process's on the CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def first_documents(documents):
    """Enough documents for a dry run."""
    if isinstance(documents, datasets.IterableDataset):
        return documents.take(DRY_RUN_DOCUMENTS)
    return documents.select(range(min(DRY_RUN_DOCUMENTS, len(documents))))


class Pretraining:
    """A run of the command: everything is read and checked on construction, and nothing written before `train`.

    Raises:
        ValueError: something that the user gave does not work.
    """

    def __init__(self, model_args, data_args, training_args):
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        if not (training_args.do_train or training_args.do_eval or training_args.dry_run):
            raise ValueError("Nothing to do: give --do_train, --do_eval or --dry_run.")
        if not (training_args.do_train or training_args.dry_run or model_args.model_name_or_path):
            raise ValueError("do_eval without do_train evaluates a trained model: name it by --model_name_or_path.")
        if data_args.streaming and training_args.max_steps <= 0:
            raise ValueError("streaming has no known length: give --max_steps.")
        if training_args.fsdp and training_args.device.type == "cpu":
            raise ValueError("fsdp shards over accelerators, and there is none here; drop --fsdp.")
        if data_args.streaming:
            # every process reads the stream and keeps its share: batches padded to different lengths cannot be split
            training_args.accelerator_config.dispatch_batches = False
        output_dir = training_args.output_dir
        check_output_folder(output_dir)
        self.checkpoint = last_whole_checkpoint(output_dir)
        training_args.label_names = LABEL_NAMES[data_args.objective]
        train = training_args.do_train or training_args.dry_run
        evaluate = training_args.do_eval
        use_cache_if_hub_is_unreachable(
            data_args.dataset_name,
            model_args.model_name_or_path,
            model_args.config_name,
            None if model_args.train_tokenizer else model_args.tokenizer_name or DEFAULT_TOKENIZER,
        )
        if not model_args.train_tokenizer:
            self.tokenizer = make_tokenizer(model_args, None, False, None)
            check_tokenizer(self.tokenizer)

        with training_args.main_process_first(desc="reading the text"):
            documents = load_corpus(data_args, train=train, evaluate=evaluate, seed=training_args.seed)
        if training_args.dry_run:
            documents = {split: first_documents(rows) for split, rows in documents.items()}
        if model_args.train_tokenizer:
            tokenizers = [None]
            if training_args.process_index == 0:
                tokenizers = [make_tokenizer(model_args, documents, data_args.streaming, self.checkpoint)]
            self.tokenizer = broadcast_object_list(tokenizers)[0]

        config = make_config(model_args, self.tokenizer, data_args.max_seq_length)
        self.tokenizer.model_max_length = config.max_position_embeddings
        set_seed(training_args.seed)
        self.model = make_model(MODEL_CLASSES[data_args.objective], config, model_args.model_name_or_path)

        self.examples, self.summaries = {}, {}
        with training_args.main_process_first(desc="preparing examples"):
            for split, rows in documents.items():
                self.examples[split], self.summaries[split] = prepare_examples(
                    rows, self.tokenizer, data_args, seed=training_args.seed, training=split == "train"
                )
        if "train" in self.examples and model_args.model_name_or_path is None:
            start_at_frequencies(self.model, count_tokens(self.examples["train"], self.tokenizer, COUNTED_EXAMPLES))
        self.settings = run_settings(
            model_args, data_args, training_args, config, self.tokenizer, self.examples.get("train")
        )
        saved = self.checkpoint or any(Path(output_dir).glob("model*.safetensors"))
        if saved and training_args.do_train and not training_args.dry_run:
            check_same_run(output_dir, self.settings)

    def trainer(self):
        collators = [
            masking_collator(self.tokenizer, self.data_args, seed=self.training_args.seed) for _ in ("train", "eval")
        ]
        return PretrainingTrainer(
            model=self.model,
            args=self.training_args,
            train_dataset=self.examples.get("train"),
            eval_dataset=self.examples.get("validation"),
            processing_class=self.tokenizer,
            data_collator=collators[0],
            eval_collator=collators[1],
        )

    def dry_run(self):
        """Takes one step and one evaluation batch in a temporary folder, and tells what the run needs."""
        args = self.training_args
        planned_steps = args.max_steps
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir, args.max_steps, args.report_to = folder, 1, []
            args.save_strategy = args.eval_strategy = "no"
            trainer = self.trainer()
            trainer.train()
            if "validation" in self.examples:
                rows = self.examples["validation"]
                trainer.evaluate(rows.select(range(min(len(rows), args.eval_batch_size))))
        static = 16 * self.model.num_parameters()
        logger.info(
            f"Dry run of the first {DRY_RUN_DOCUMENTS} documents: {self.summaries['train']}; "
            f"{self.model.num_parameters():,} parameters; steps planned: "
            f"{planned_steps if planned_steps > 0 else f'{args.num_train_epochs:g} epochs'}."
        )
        logger.info(
            f"Memory: {static / 2**30:.2f} GiB for weights, gradients and optimizer; a step of "
            f"{args.train_batch_size} examples peaked at {peak_memory(args.device) / 2**30:.2f} GiB per process."
        )
        logger.info("The dry run went through; nothing was written to output_dir.")

    def run(self):
        """Trains, evaluates and reports.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        args = self.training_args
        if args.do_train and args.process_index == 0:
            record_run(args.output_dir, self.settings)
        trainer = self.trainer()
        if args.do_train:
            steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
            logger.info(describe_run(self.model, self.summaries, steps, args))
            if self.checkpoint is None:
                trainer.train()
            else:
                self.resume(trainer, steps)
            if trainer.stop.received:
                logger.info(
                    f"Stopped by {trainer.stop.received} after step {trainer.state.global_step}, with a checkpoint; "
                    "the same command goes on from there."
                )
                return
            trainer.save_model()
        metrics = self.evaluate(trainer) if args.do_eval else {}
        if trainer.is_world_process_zero():
            write_report(args.output_dir, self, trainer.state, metrics)
            if self.model_args.masked_sentence and args.do_train:
                logger.info(top_predictions(args.output_dir, self.model_args.masked_sentence))

    def resume(self, trainer, steps):
        """Goes on from the last whole checkpoint, unless it is the last step's."""
        state = TrainerState.load_from_json(self.checkpoint / TRAINER_STATE_NAME)
        if state.global_step < steps:
            logger.info(f"Going on from {self.checkpoint}, step {state.global_step} of {steps}.")
            trainer.train(resume_from_checkpoint=str(self.checkpoint))
            return
        logger.info(f"{self.checkpoint} is the end of this run: nothing is left to train.")
        trainer.state = state
        trainer.model.load_state_dict(type(trainer.model).from_pretrained(self.checkpoint).state_dict())

    def evaluate(self, trainer):
        """The final evaluation and, for comparison, what word frequencies alone reach on the same masked tokens."""
        history = trainer.state.log_history
        known = [
            record for record in history if "eval_mlm_loss" in record and record["step"] == trainer.state.global_step
        ]
        if known and not self.training_args.load_best_model_at_end:
            metrics = {name: value for name, value in known[-1].items() if name.startswith("eval_")}
        else:
            metrics = trainer.evaluate()
        metrics |= unigram_baseline(self.examples.get("train"), self.examples["validation"], self.tokenizer)
        logger.info(
            f"MLM loss of the evaluation text {metrics['eval_mlm_loss']:.3f} nats per masked token; "
            f"its unigram entropy {metrics['unigram_entropy']:.3f}."
        )
        if "unigram_cross_entropy" in metrics:
            logger.info(f"Token frequencies of the training text predict it at {metrics['unigram_cross_entropy']:.3f}.")
        return metrics


def set_up_logging(training_args):
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if training_args.process_index == 0:
        for name in ("run_language_modeling", "corpora", "pretraining_data", "pretraining_trainer", "training_report"):
            logging.getLogger(name).setLevel(min(training_args.get_process_log_level(), logging.INFO))
    else:
        datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())


def main(argv=None):
    """Runs the command; returns its exit status."""
    try:
        model_args, data_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
        set_up_logging(training_args)
        pretraining = Pretraining(model_args, data_args, training_args)
        if training_args.dry_run:
            pretraining.dry_run()
            return 0
    except (ValueError, StrictDataclassError) as error:
        return fail(error)
    try:
        pretraining.run()
    except (CheckpointError, UnreadableTextError, OSError) as error:
        return fail(error)
    return 0


def fail(error):
    """Prints one line on stderr, from one process only; returns the exit status."""
    logger.debug("", exc_info=error)
    if os.environ.get("RANK", "0") == "0":
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
