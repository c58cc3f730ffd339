"""What the commands that train have in common: options, text and tokenizer, and a run that survives interruption."""

import hashlib
import json
import logging
import os
import resource
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import datasets
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, BertTokenizer, HfArgumentParser, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lambdabert.text.files import UnreadableTextError
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from pretraining_trainer import (
    CheckpointError,
    check_output_folder,
    check_same_run,
    last_whole_checkpoint,
    record_run,
)
from training_report import describe_run

logger = logging.getLogger(__name__)

# these change where and how fast data are prepared, not what they are
PLACE_AND_SPEED_FIELDS = ("data_cache_dir", "preprocessing_num_workers", "validation_file", "max_eval_samples")
DRY_RUN_DOCUMENTS = 500
LOGGED_MODULES = (
    "distill_from_bert",
    "lambdabert",
    "pretraining_trainer",
    "run_language_modeling",
    "training_report",
    "training_run",
)


@dataclass
class RunArguments(TrainingArguments):
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


def parse_arguments(argv, groups):
    """Reads flags, or a JSON file followed by flags that override it.

    Args:
        argv: what the command was given.
        groups: the dataclasses of its options.

    Returns:
        One instance of each group.

    Raises:
        ValueError: unknown or contradicting options, or a JSON file that cannot be read.
    """
    parser = OneLineParser(groups, allow_abbrev=False)
    if argv and argv[0].endswith(".json"):
        recipe, argv = argv[0], argv[1:]
        try:
            values = json.loads(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{recipe} cannot be read as JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{recipe} holds no JSON object; it should map option names to values.")
        unknown = sorted(set(values) - {option.name for group in groups for option in fields(group)})
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


def run_settings(run, **model):
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
    training = {name: getattr(run.training_args, name) for name in ("seed", "data_seed")}
    return json.loads(json.dumps({"data": data, "model": config | model, "training": training}, default=str))


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


class TrainingRun:
    """A run of a command: everything is read and checked on construction, and nothing written before `run`.

    A command gives `trainer_class`, `label_names`, `hub_names`, `check_options`, `open_model`, `make_model`,
    `collator`, `describe` and `report`.

    Attributes:
        tokenizer, model: what is trained.
        examples, summaries: the prepared text and what was found in it, for each of "train" and "validation".
        checkpoint: the last whole checkpoint of the output folder, or None.
        settings: what makes this run this run.

    Raises:
        ValueError: something that the user gave does not work.
    """

    def __init__(self, model_args, data_args, training_args):
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        if not (training_args.do_train or training_args.do_eval or training_args.dry_run):
            raise ValueError("Nothing to do: give --do_train, --do_eval or --dry_run.")
        self.check_options()
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
        training_args.label_names = self.label_names
        train = training_args.do_train or training_args.dry_run
        evaluate = training_args.do_eval
        use_cache_if_hub_is_unreachable(data_args.dataset_name, *self.hub_names())
        self.open_model()

        with training_args.main_process_first(desc="reading the text"):
            documents = load_corpus(data_args, train=train, evaluate=evaluate, seed=training_args.seed)
        if training_args.dry_run:
            documents = {split: first_documents(rows) for split, rows in documents.items()}
        self.make_model(documents)

        self.examples, self.summaries = {}, {}
        with training_args.main_process_first(desc="preparing examples"):
            for split, rows in documents.items():
                self.examples[split], self.summaries[split] = prepare_examples(
                    rows,
                    self.tokenizer,
                    data_args.example_recipe(),
                    seed=training_args.seed,
                    training=split == "train",
                )
        self.start_from_text()
        self.settings = self.describe()
        saved = self.checkpoint or any(Path(output_dir).glob("model*.safetensors"))
        if saved and training_args.do_train and not training_args.dry_run:
            check_same_run(output_dir, self.settings)

    def start_from_text(self):
        """What a new model's weights owe to the prepared text; nothing unless a command says so."""

    def trainer(self, **settings):
        """The command's Trainer; `settings` go to its class."""
        return self.trainer_class(
            model=self.model,
            args=self.training_args,
            train_dataset=self.examples.get("train"),
            eval_dataset=self.examples.get("validation"),
            processing_class=self.tokenizer,
            data_collator=self.collator(),
            eval_collator=self.collator(),
            **settings,
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
            self.save(trainer)
        metrics = self.evaluate(trainer) if args.do_eval else {}
        if trainer.is_world_process_zero():
            self.report(trainer.state, metrics)

    def evaluate(self, trainer):
        """Metrics of the trained model: the last evaluation's, where that was at the last step."""
        history = trainer.state.log_history
        last = [record for record in history if "eval_loss" in record and record["step"] == trainer.state.global_step]
        if not last or self.training_args.load_best_model_at_end:
            return trainer.evaluate()
        return {name: value for name, value in last[-1].items() if name.startswith("eval_")}

    def save(self, trainer):
        """Writes what was trained into the output folder."""
        trainer.save_model()

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


def set_up_logging(training_args):
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if training_args.process_index == 0:
        for name in LOGGED_MODULES:
            logging.getLogger(name).setLevel(min(training_args.get_process_log_level(), logging.INFO))
    else:
        datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())


def run_command(argv, groups, run_class):
    """Runs a command; returns its exit status.

    Args:
        argv: what it was given.
        groups: the dataclasses of its options: model, data, training.
        run_class: its `TrainingRun`.
    """
    try:
        arguments = parse_arguments(argv, groups)
        set_up_logging(arguments[-1])
        run = run_class(*arguments)
        if run.training_args.dry_run:
            run.dry_run()
            return 0
    except (ValueError, StrictDataclassError) as error:
        return fail(error)
    try:
        run.run()
    except (CheckpointError, UnreadableTextError, OSError) as error:
        return fail(error)
    return 0


def fail(error):
    """Prints one line on stderr, from one process only; returns the exit status."""
    logger.debug("", exc_info=error)
    if os.environ.get("RANK", "0") == "0":
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 1
