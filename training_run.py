"""What the commands that train have in common: options, text and tokenizer, and a run that survives interruption."""

import logging
import os
import resource
import sys
import tempfile
from pathlib import Path

import datasets
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lambdabert.text.files import UnreadableTextError
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from rehearsal import rehearse
from run_folder import (
    CheckpointError,
    check_output_folder,
    check_same_run,
    last_whole_checkpoint,
    read_record,
    read_state,
    record_run,
    result_files,
    writing,
)
from training_options import parse_arguments
from training_report import describe_run

logger = logging.getLogger(__name__)

DRY_RUN_DOCUMENTS = 500
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LOGGED_MODULES = (
    "distill_from_bert",
    "lambdabert",
    "pretraining_trainer",
    "rehearsal",
    "run_folder",
    "run_language_modeling",
    "training_options",
    "training_report",
    "training_run",
)


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


def load_tokenizer(name: str, option: str = "tokenizer_name") -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, a vocabulary file (one token a line) or the hub.

    Args:
        name: the folder, file or hub name.
        option: where the user named it.

    Raises:
        ValueError: nothing usable is there, or the hub cannot be reached.
    """
    path = Path(name)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if path.is_file() or (vocabulary.exists() and not (path / "tokenizer_config.json").exists()):
        words = read_vocabulary(vocabulary, f"{option}={name}")
        cased = any(token != token.lower() for token in words if not token.startswith("["))
        return BertTokenizer(vocab=words, do_lower_case=not cased)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # broken files raise whatever their readers stumble over
        if path.is_dir():
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{option}={name} holds no tokenizer that can be read ({said}).") from error
        advice = "name a local folder"
        if option == "tokenizer_name":
            advice = (
                "name a local one by --tokenizer_name, train one on your --train_file with --train_tokenizer, or run "
                "the demo, which needs no network: configs/demo.json"
            )
        raise ValueError(
            f"{option}={name} is no folder and the hub cannot be reached or does not have it; {advice}."
        ) from error


def read_vocabulary(file: Path, what: str) -> dict[str, int]:
    """The tokens of a WordPiece vocabulary, one a line, and their ids.

    Raises:
        ValueError: the file is no such vocabulary.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{what}: {file} is no text; name a vocabulary, one token a line.") from None
    tokens = [line.rstrip("\r") for line in lines]
    words = {token: i for i, token in enumerate(tokens) if token}
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise ValueError(
            f"{what}: {file} has no line {', '.join(missing)}, so it is no vocabulary of BERT, one token a line; "
            "name another (a tokenizer.json is named by its folder)."
        )
    if len(words) < sum(map(bool, tokens)):
        twice = next(token for i, token in enumerate(tokens) if token and words[token] != i)
        raise ValueError(f"{what}: {file} holds the token {twice!r} twice; each stands for one embedding.")
    return words


def note_precision(name: str, config: dict):
    """Says so where a model is stored in another precision than it is trained and evaluated in.

    Args:
        name: how the message calls it.
        config: the fields of its stored config.
    """
    stored = str(config.get("dtype") or config.get("torch_dtype") or torch.float32).removeprefix("torch.")
    if stored != "float32":
        logger.info(f"{name} is stored in {stored} and computed in float32 (--bf16 or --fp16: in mixed precision).")


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


class RecordRun(TrainerCallback):
    """Marks the output folder as a run's when its first step is near: what can be refused has been by then."""

    def __init__(self, record: dict):
        self.record = record

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            record_run(args.output_dir, self.record)


class TrainingRun:
    """A run of a command: everything is read and checked on construction, and nothing written before `run`.

    A command gives `trainer_class`, `label_names`, `hub_names`, `check_options`, `become_tiny`, `open_model`,
    `make_model`, `collator`, `describe`, `report` and, where there is something to see, `show`.

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
        train = training_args.do_train or training_args.dry_run
        check_output_folder(output_dir, train)
        self.checkpoint = last_whole_checkpoint(output_dir)
        training_args.label_names = self.label_names
        rehearse(self)
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
            check_same_run(output_dir, self.settings, resumed=self.checkpoint is not None)

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
            args.output_dir, args.max_steps, args.report_to, args.push_to_hub = folder, 1, [], False
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
        """Trains, evaluates and reports; of a run that is finished and reported, nothing is written again.

        Raises:
            CheckpointError: a checkpoint cannot be gone on from, the loss is not finite, or the disk is full.
        """
        args = self.training_args
        trainer = self.trainer()
        # the text of the evaluations that the checkpoints' history holds
        record = self.settings | {"evaluation": self.evaluation_text}
        if args.do_train:
            steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
            logger.info(describe_run(self.model, self.summaries, steps, args))
            state = None if self.checkpoint is None else read_state(self.checkpoint)
            if state is not None:
                self.check_length(state, steps)
            if state is not None and state.global_step == steps:
                logger.info(f"{self.checkpoint} is the end of this run: nothing is left to train.")
                record = read_record(args.output_dir) or record
                complete = self.is_reported(record, steps)
                trainer.accelerator.wait_for_everyone()
                if complete:
                    logger.info(f"{args.output_dir} is complete and stays as it is.")
                    self.show(trainer)
                    return
                self.restore(trainer, state)
            else:
                trainer.add_callback(RecordRun(record))
                if state is not None:
                    logger.info(f"Going on from {self.checkpoint}, step {state.global_step} of {steps}.")
                trainer.train(resume_from_checkpoint=None if state is None else str(self.checkpoint))
            if trainer.stop.received:
                logger.info(
                    f"Stopped by {trainer.stop.received} after step {trainer.state.global_step}, with a checkpoint; "
                    "the same command goes on from there."
                )
                return
            with writing(args.output_dir):
                self.save(trainer)
        same_text = self.evaluation_text is not None and record.get("evaluation") == self.evaluation_text
        metrics = self.evaluate(trainer, same_text) if args.do_eval else {}
        if trainer.is_world_process_zero():
            with writing(args.output_dir):
                self.report(trainer.state, metrics)
                if args.do_train:
                    evaluated = self.evaluation_text if args.do_eval else None
                    reported = {"steps": steps, "evaluation": evaluated, "files": result_files(args.output_dir)}
                    record_run(args.output_dir, record | {"reported": reported})
        self.show(trainer)

    @property
    def evaluation_text(self) -> str | None:
        """Tells prepared texts of evaluation apart; None without one, or where it cannot be told."""
        return getattr(self.examples.get("validation"), "_fingerprint", None)

    def is_reported(self, record: dict, steps: int) -> bool:
        """Whether the output folder holds the whole result of this run, as it was reported.

        Args:
            record: the folder's.
            steps: of this run.
        """
        reported = record.get("reported")
        if not isinstance(reported, dict) or reported.get("steps") != steps:
            return False
        text = self.evaluation_text
        evaluated = not self.training_args.do_eval or (text is not None and reported.get("evaluation") == text)
        return evaluated and reported.get("files") == result_files(self.training_args.output_dir)

    def evaluate(self, trainer, same_text: bool):
        """Metrics of the trained model: the last evaluation's, where that was at the last step.

        Args:
            same_text: whether the evaluations of the Trainer's history are of this run's text.
        """
        history = trainer.state.log_history
        last = [record for record in history if "eval_loss" in record and record["step"] == trainer.state.global_step]
        if not last or not same_text or self.training_args.load_best_model_at_end:
            return trainer.evaluate()
        return {name: value for name, value in last[-1].items() if name.startswith("eval_")}

    def save(self, trainer):
        """Writes what was trained into the output folder."""
        trainer.save_model()

    def show(self, trainer):
        """What the log shows of the finished model; nothing unless a command says so."""

    def check_length(self, state: TrainerState, steps: int):
        """Refuses fewer steps than are done, and says so where a run is longer or shorter than it was planned.

        Args:
            state: the checkpoint's.
            steps: of the whole run.

        Raises:
            CheckpointError: the checkpoint is beyond the end of the run.
        """
        if steps < state.global_step:
            raise CheckpointError(
                f"{self.checkpoint} is beyond the {steps} steps of this run: give --max_steps {state.global_step} or "
                "more, or another --output_dir."
            )
        if steps != state.max_steps:
            logger.info(
                f"The run was planned for {state.max_steps} steps and now has {steps}: from step {state.global_step} "
                f"on, the learning rate follows the schedule of {steps} steps."
            )

    def restore(self, trainer, state: TrainerState):
        """Takes up the result of a finished run from its checkpoints."""
        trainer.state = state
        best = self.checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        trainer.load_weights(best if self.training_args.load_best_model_at_end and best.exists() else self.checkpoint)


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
        for note in arguments[-1].notes:
            logger.info(note)
        run = run_class(*arguments)
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        return fail(error)
    except Exception as error:
        return fail(error, unexpected=True)
    try:
        if run.training_args.dry_run:
            run.dry_run()
        else:
            run.run()
    except (CheckpointError, UnreadableTextError, ImportError, OSError) as error:
        return fail(error)
    except Exception as error:
        return fail(error, unexpected=True)
    return 0


def fail(error: Exception, *, unexpected: bool = False) -> int:
    """Prints one line on stderr; returns the exit status.

    Args:
        error: what happened.
        unexpected: it may be a mistake of the program, and may have happened to one process alone: the line names its
            type, every process prints it, and `--log_level debug` shows where it came from.
    """
    logger.debug("", exc_info=error)
    text = " ".join(str(error).split())
    if unexpected:
        print(f"error: {type(error).__name__}: {text} (--log_level debug shows where)", file=sys.stderr)
    elif os.environ.get("RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr)
    return 1
