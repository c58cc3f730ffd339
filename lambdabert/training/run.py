"""A run of a command that trains, step by step."""

import copy
import hashlib
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import datasets
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from transformers import BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer_pt_utils import AcceleratorConfig

from lambdabert.text.arguments import TextArguments
from lambdabert.text.examples import ExampleRecipe
from lambdabert.text.masks import MaskingCollator
from lambdabert.text.preparation import PreparationSummary, prepare_examples
from lambdabert.text.sources import load_corpus
from lambdabert.training.arguments import RunArguments
from lambdabert.training.callbacks import RecordRun, StartAnew, use_batch_of
from lambdabert.training.checkpoints import (
    CheckpointError,
    last_complete_checkpoint,
    read_state,
    step_of,
    writing,
)
from lambdabert.training.hub import push_folder, use_cache_if_hub_is_unreachable
from lambdabert.training.memory import GIB, keep_freed_memory, peak_memory
from lambdabert.training.output_folder import (
    CARD_NAME,
    EVALUATION_NAME,
    check_output_folder,
    check_same_evaluation,
    check_same_run,
    differing,
    first_of,
    read_record,
    record_run,
    result_files,
)
from lambdabert.training.rehearsal import rehearse
from lambdabert.training.report import describe_metrics, describe_run, metrics_report, write_json
from lambdabert.training.settings import (
    LENGTH_FIELDS,
    RATE_FIELDS,
    changeable_fields,
    changed_now,
    earlier_values,
    examples_hash,
    run_settings,
)
from lambdabert.training.trainer import InterruptibleTrainer

logger = logging.getLogger(__name__)

DRY_RUN_DOCUMENTS = 500
# of weights in float32, their gradients and Adam's two moments
BYTES_PER_PARAMETER = 16
# what a rehearsal's short text needs
TINY_TEXT_SETTINGS = {"pad_to_multiple_of": None, "mlm_probability": 0.5, "eval_mlm_probability": 0.5}

Documents = dict[str, Dataset | IterableDataset]


def first_documents(documents: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Enough documents for a dry run."""
    if isinstance(documents, datasets.IterableDataset):
        return documents.take(DRY_RUN_DOCUMENTS)
    return documents.select(range(min(DRY_RUN_DOCUMENTS, len(documents))))


class TrainingRun(ABC):
    """A run of a command: `prepare` checks and reads everything, `run` trains, evaluates and reports.

    A command implements the abstract methods, and may override those that do nothing here.

    Attributes:
        model_args, data_args, training_args: the command's options.
        trainer_class: the class of its Trainer.
        checkpoint: the last complete checkpoint of the output folder, or None.
        tokenizer, model: what is trained.
        examples, summaries: the prepared text and what was found in it, for each of "train" and "validation".
        settings: those that define the run.
        record: what `run_settings.json` is to hold: the settings, and which others held for earlier steps.
        steps: of the whole run.
        saved: whether the folder holds the model of a finished run as it was reported.
    """

    trainer_class: type[InterruptibleTrainer]
    checkpoint: Path | None
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    examples: Mapping[str, Any]
    summaries: dict[str, PreparationSummary]
    settings: dict[str, dict[str, Any]]
    record: dict[str, Any]
    steps: int
    saved = False

    def __init__(self, model_args: Any, data_args: TextArguments, training_args: RunArguments):
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args

    def prepare(self) -> None:
        """Does all that comes before the first step. Writes nothing into the output folder.

        Raises:
            ValueError: an option, the folder, the model or the text does not work.
            CheckpointError: the checkpoint to resume from cannot be read.
        """
        self.check_options()
        self.check_folder()
        self.rehearse()
        use_cache_if_hub_is_unreachable(self.data_args.dataset_name, *self.hub_names())
        self.open_model()
        documents = self.read_text()
        self.make_model(documents)
        self.make_examples(documents)
        self.check_examples()
        self.start_from_text()
        if self.checkpoint and self.training_args.auto_find_batch_size:
            use_batch_of(read_state(self.checkpoint), self.training_args)
            self.training_args.auto_find_batch_size = False  # the rest of a run has steps of as many examples
        self.settings = self.describe()
        self.check_record()

    def run(self) -> int:
        """Trains, evaluates and reports. If the run was finished and reported before, no file is written again.

        Returns:
            The exit status: 0, or that of the signal which stopped the training.

        Raises:
            CheckpointError: a checkpoint cannot be resumed from, the loss is not finite, or the disk is full.
            UnreadableTextError: a file of a stream cannot be read.
        """
        if self.training_args.device.type == "cpu":
            keep_freed_memory()
        if self.training_args.dry_run:
            self.dry_run()
            return 0
        trainer = self.trainer()
        if self.training_args.do_train:
            self.plan(trainer)
            if self.is_finished(trainer):
                folder = self.training_args.output_dir
                logger.info(f"{folder} holds the result of this run: nothing is left to train, and it stays as it is.")
                self.show(trainer)
                return 0
            state = self.checkpoint_state()
            if state is not None and self.at_end:
                self.restore(trainer, state)
            elif not self.train(trainer, state):
                return trainer.stop.exit_status
            if not self.saved:
                self.save(trainer)
        metrics = self.evaluate(trainer)
        self.report(trainer, metrics)
        if self.training_args.push_to_hub and trainer.is_world_process_zero():
            push_folder(trainer)
        self.show(trainer)
        return 0

    @property
    @abstractmethod
    def example_recipe(self) -> ExampleRecipe:
        """How examples are made of the documents."""

    @property
    @abstractmethod
    def label_names(self) -> list[str]:
        """Columns of a batch that hold labels."""

    @abstractmethod
    def check_own_options(self) -> None:
        """Refuses options of the command that contradict each other. Raises ValueError."""

    @abstractmethod
    def hub_names(self) -> tuple[str | None, ...]:
        """What the command will load besides text: local or hub names."""

    @abstractmethod
    def become_tiny(self) -> None:
        """Replaces the model, for a rehearsal, by one of a few hundred parameters."""

    @abstractmethod
    def open_model(self) -> None:
        """Reads and checks all that can be known of tokenizer and model before the text. Raises ValueError."""

    @abstractmethod
    def make_model(self, documents: Documents) -> None:
        """Sets `tokenizer` and `model`."""

    @abstractmethod
    def describe(self) -> dict[str, dict[str, Any]]:
        """The settings that define the run; see `run_settings`."""

    @abstractmethod
    def collator(self, *, training: bool) -> MaskingCollator:
        """A collator of the command's batches, for training or for evaluation."""

    @abstractmethod
    def model_card(self, state: TrainerState, metrics: str) -> str:
        """The model card, with its table of `metrics`."""

    @abstractmethod
    def draw_curves(self, state: TrainerState, file: Path) -> None:
        """Draws the losses of the whole run."""

    def check_examples(self) -> None:
        """Refuses a text that makes too few examples. Raises ValueError."""

    def start_from_text(self) -> None:
        """Initialises a new model's weights from statistics of the prepared text."""

    def show(self, trainer: InterruptibleTrainer) -> None:
        """Logs what the finished model does."""

    @property
    def evaluated(self) -> dict[str, Any]:
        """Which model is evaluated on which text, where nothing is trained."""
        return {}

    def check_options(self) -> None:
        """Refuses options that contradict each other. Raises ValueError."""
        args = self.training_args
        if not (args.do_train or args.do_eval or args.dry_run):
            raise ValueError("Nothing to do: give --do_train, --do_eval or --dry_run.")
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != args.world_size:
            raise ValueError(
                f"{started} processes were started, but each would train by itself: without an accelerator they work "
                "together with --use_cpu; give it."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs for one process would be used by DataParallel, which cannot train these models: "
                f"start one for each by `torchrun --nproc_per_node {args.n_gpu}`, or show it one by "
                "CUDA_VISIBLE_DEVICES=0."
            )
        self.check_own_options()
        if self.data_args.streaming and self.trains and args.max_steps <= 0:
            raise ValueError("streaming=True: the length of a stream is not known; give --max_steps.")
        if args.fsdp and args.device.type == "cpu":
            raise ValueError("fsdp shards over accelerators, and there is none here; drop --fsdp.")
        if self.data_args.streaming:
            # every process reads the stream and keeps its share: batches padded to different lengths cannot be split
            cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
        args.label_names = self.label_names

    @property
    def trains(self) -> bool:
        return self.training_args.do_train or self.training_args.dry_run

    def check_folder(self) -> None:
        """Refuses an output folder that is not a run's, and finds its checkpoint. Raises ValueError."""
        check_output_folder(str(self.training_args.output_dir), self.trains)
        self.checkpoint = last_complete_checkpoint(str(self.training_args.output_dir))

    def rehearse(self) -> None:
        """Tries the options on a tiny model. Raises ValueError."""

        def tiny_trainer(
            args: RunArguments, tokenizer: BertTokenizer, examples: dict[str, Dataset]
        ) -> InterruptibleTrainer:
            tiny = copy.copy(self)
            tiny.training_args, tiny.data_args = args, copy.copy(self.data_args)
            tiny.tokenizer, tiny.examples = tokenizer, examples
            vars(tiny.data_args).update(TINY_TEXT_SETTINGS)
            tiny.become_tiny()
            return tiny.trainer()

        rehearse(self.training_args, self.example_recipe.objective, tiny_trainer)

    def read_text(self) -> Documents:
        """Finds the documents of "train" and "validation". Raises ValueError."""
        args = self.training_args
        with args.main_process_first(desc="reading the text"):
            documents = load_corpus(self.data_args, train=self.trains, evaluate=args.do_eval, seed=args.seed)
        if args.dry_run:
            return {split: first_documents(rows) for split, rows in documents.items()}
        return documents

    def make_examples(self, documents: Documents) -> None:
        """Sets `examples` and `summaries`. Raises ValueError if the text does not make any."""
        examples = {}
        self.summaries = {}
        with self.training_args.main_process_first(desc="preparing examples"):
            for split, rows in documents.items():
                examples[split], self.summaries[split] = prepare_examples(
                    rows,
                    self.tokenizer,
                    self.example_recipe,
                    seed=self.training_args.seed,
                    training=split == "train",
                )
        self.examples = examples

    def run_settings(self, **model_settings: Any) -> dict[str, dict[str, Any]]:
        """The settings that define the run, with those of the command's model among them."""
        return run_settings(
            self.data_args,
            self.training_args,
            self.tokenizer,
            self.model,
            self.examples,
            command=type(self).__name__,
            **model_settings,
        )

    def check_record(self) -> None:
        """Compares the settings with those recorded in the output folder. Raises ValueError if it is another run's."""
        args = self.training_args
        if not self.trains:
            check_same_evaluation(str(args.output_dir), self.evaluated)
        trained = self.checkpoint is not None or any(Path(str(args.output_dir)).glob("model*.safetensors"))
        record = read_record(str(args.output_dir)) if trained and args.do_train and not args.dry_run else None
        self.record = dict(self.settings)
        if record is None:
            return
        may_change = changeable_fields(record["training"], self.settings["training"]) if self.checkpoint else ()
        check_same_run(str(args.output_dir), self.settings, may_change)
        if "card" in record:
            self.record["card"] = record["card"]
        if self.checkpoint is not None:
            self.record["earlier"] = earlier_values(record, self.settings["training"], step_of(self.checkpoint))

    @property
    def earlier(self) -> dict[str, list[dict]]:
        """Settings that had other values in the first steps; see `earlier_values`."""
        return self.record.get("earlier", {})

    def trainer(self, **settings: Any) -> Any:
        """Makes the command's Trainer; `settings` go to its class."""
        return self.trainer_class(
            model=self.model,
            args=self.training_args,
            train_dataset=self.examples.get("train"),
            eval_dataset=self.examples.get("validation"),
            processing_class=self.tokenizer,
            data_collator=self.collator(training=True),
            eval_collator=self.collator(training=False),
            **settings,
        )

    def dry_run(self) -> None:
        """Takes two steps and one evaluation batch in a temporary folder, and logs what the run needs."""
        args = self.training_args
        planned_steps = args.max_steps
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir, args.max_steps, args.report_to, args.push_to_hub = folder, 2, [], False
            args.save_strategy = args.eval_strategy = "no"
            trainer = self.trainer()
            trainer.train()
            if "validation" in self.examples:
                rows = self.examples["validation"]
                trainer.evaluate(rows.select(range(min(len(rows), args.eval_batch_size))))
        parameters = self.model.num_parameters()
        logger.info(
            f"Dry run of the first {DRY_RUN_DOCUMENTS} documents: {self.summaries['train']}; "
            f"{parameters:,} parameters; steps planned: "
            f"{planned_steps if planned_steps > 0 else f'{args.num_train_epochs:g} epochs'}."
        )
        logger.info(
            f"Memory: {BYTES_PER_PARAMETER * parameters / GIB:.2f} GiB for weights, gradients and optimizer; a step of "
            f"{args.train_batch_size} examples peaked at {peak_memory(args.device) / GIB:.2f} GiB per process."
        )
        logger.info("The dry run succeeded; nothing was written to output_dir.")

    @property
    def courses(self) -> tuple[int, ...]:
        """Steps of each course of the learning rate, from warm-up to decay."""
        return (self.steps,)

    def plan(self, trainer: InterruptibleTrainer) -> None:
        """Sets `steps`, and describes the run in the log."""
        args = self.training_args
        self.steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        logger.info(describe_run(self.model, self.summaries, self.steps, args))
        for steps in self.courses:
            if 1 < steps <= args.get_warmup_steps(steps):
                logger.warning(
                    f"warmup_steps={args.warmup_steps:g}: the learning rate rises over all {steps} steps and does not "
                    "reach its peak; give fewer, or a share of all, such as 0.06."
                )

    def checkpoint_state(self) -> TrainerState | None:
        """The state of the checkpoint, if there is one; the log says what changes there.

        Raises:
            CheckpointError: the checkpoint is beyond the end of the run, or a change could have no effect.
        """
        if self.checkpoint is None:
            return None
        state = read_state(self.checkpoint)
        self.check_steps(state)
        self.check_rates(state)
        return state

    def check_steps(self, state: TrainerState) -> None:
        """Refuses fewer steps than are done, and logs it if a run is longer or shorter than planned.

        Args:
            state: the checkpoint's.

        Raises:
            CheckpointError: the checkpoint, or the result in the folder, is beyond the end of the run.
        """
        if self.steps < state.global_step:
            raise CheckpointError(
                f"{self.checkpoint} is beyond the {self.steps} steps of this run: give --max_steps {state.global_step} "
                "or more, or another --output_dir."
            )
        record = read_record(str(self.training_args.output_dir)) or {}
        reported = (record.get("reported") or {}).get("steps", 0)
        if self.steps < reported:
            raise CheckpointError(
                f"output_dir={self.training_args.output_dir} holds the result of {reported} steps, and this run has "
                f"{self.steps}: give --max_steps {reported} or more, or another --output_dir."
            )
        if self.steps != state.max_steps:
            logger.info(
                f"The run was planned for {state.max_steps} steps and now has {self.steps}: from step "
                f"{state.global_step} on, the learning rate follows the schedule of {self.steps} steps."
            )

    def changed_rates(self, step: int) -> dict[str, Any]:
        """Settings of learning rate and weight decay that change at the checkpoint, with their values until then."""
        return {field: value for field, value in changed_now(self.earlier, step).items() if field in RATE_FIELDS}

    def check_rates(self, state: TrainerState) -> None:
        """Refuses other rates if nothing is left to train with them, and logs them otherwise.

        Args:
            state: the checkpoint's.

        Raises:
            CheckpointError: they could have no effect.
        """
        step = state.global_step
        changes = [
            f"{field} is {self.settings['training'][field]} ({before} until then)"
            for field, before in self.changed_rates(step).items()
        ]
        if changes and step == self.steps:
            raise CheckpointError(
                f"From step {step} on, {', '.join(changes)}, but {self.checkpoint} is the end of this run, so this "
                f"would change nothing: give --max_steps above {step}, or the same settings."
            )
        if changes:
            logger.info(f"From step {step} on, {', '.join(changes)}.")

    def train(self, trainer: InterruptibleTrainer, state: TrainerState | None) -> bool:
        """Trains from the start, or from the checkpoint of `state`; returns whether it came to its end.

        Raises:
            CheckpointError: the checkpoint does not fit the run, the loss is not finite, or the disk is full.
        """
        trainer.add_callback(RecordRun(self.record))
        if self.training_args.auto_find_batch_size and not trainer.is_fsdp_enabled:
            trainer.add_callback(StartAnew())
        if state is None:
            trainer.train()
        else:
            self.resume(trainer, state)
        self.steps = trainer.state.max_steps  # more epochs' worth where a smaller batch was found to fit
        step = trainer.state.global_step
        if trainer.stop.stopping:
            where = ", with a checkpoint; the same command resumes from it"
            if trainer.saved_step != step:
                where = "; the same command resumes from the checkpoint before it"
            logger.info(f"Stopped by {trainer.stop.received} after step {step}{where}.")
        return not trainer.stop.stopping

    def resume(self, trainer: InterruptibleTrainer, state: TrainerState) -> None:
        """Trains from the checkpoint of `state`.

        Raises:
            CheckpointError: as of `train`; or the batch that was found to fit into memory does not fit now.
        """
        logger.info(f"Resuming from {self.checkpoint}, step {state.global_step} of {self.steps}.")
        try:
            trainer.train(str(self.checkpoint), earlier=self.changed_rates(state.global_step))
        except RuntimeError as error:
            if "auto_find_batch_size" not in self.training_args.given or not should_reduce_batch_size(error):
                raise
            raise CheckpointError(
                f"per_device_train_batch_size={self.training_args.per_device_train_batch_size}, which "
                f"auto_find_batch_size found for {self.checkpoint}, does not fit into memory now: free some, or drop "
                "--auto_find_batch_size and give a smaller one, and more --gradient_accumulation_steps in return."
            ) from error

    @property
    def at_end(self) -> bool:
        """Whether the checkpoint is that of the last step."""
        return self.checkpoint is not None and step_of(self.checkpoint) >= self.steps

    def is_finished(self, trainer: InterruptibleTrainer) -> bool:
        """Whether the folder holds the whole result of this run, whichever checkpoints are left in it.

        Raises:
            CheckpointError: it does, but a file was changed since; or it is incomplete, or not evaluated on this text,
                and the checkpoint of the last step is gone.
        """
        folder = str(self.training_args.output_dir)
        record = read_record(folder) or {}
        files = result_files(folder)
        trainer.accelerator.wait_for_everyone()  # no process has written anything yet
        reported = record.get("reported") or {}
        may_change = LENGTH_FIELDS if self.at_end else ()
        if reported.get("steps") != self.steps or differing(record, self.settings, may_change):
            return False
        # the card may be edited
        changed = {name for name, size in files.items() if reported["files"].get(name) != size} - {CARD_NAME}
        missing = set(reported["files"]) - set(files) - {CARD_NAME}
        evaluated = self.evaluation_text is not None and reported["evaluation"] == self.evaluation_text
        if not changed and not missing and (evaluated or not self.training_args.do_eval):
            return True
        if changed and self.at_end:
            raise CheckpointError(
                f"output_dir={folder} holds the result of this run, but {first_of(sorted(changed), ', ')} changed "
                "since: remove what is to be written again, or give another --output_dir. Nothing was overwritten."
            )
        if self.at_end or not any(name.endswith(".safetensors") for name in files):
            self.saved = self.at_end and not missing
            return False
        if changed := changed | missing:
            reason = f"{first_of(sorted(changed), ', ')} changed since: give another --output_dir to train again"
        else:
            reason = (
                "it is not known to be evaluated on this text: give the text that it was evaluated on, or another "
                "--output_dir; run_language_modeling.py --do_eval --model_name_or_path evaluates a model on any text"
            )
        raise CheckpointError(
            f"output_dir={folder} holds the result of this run, and its last checkpoint is gone, but {reason}. Nothing "
            "was overwritten."
        )

    def restore(self, trainer: InterruptibleTrainer, state: TrainerState) -> None:
        """Loads the result of a finished run from its checkpoints. Its record is that of the folder from then on.

        Raises:
            CheckpointError: the checkpoint that is the result is gone, or cannot be read.
        """
        checkpoint = Path(str(self.checkpoint))
        logger.info(f"{checkpoint} is the end of this run: nothing is left to train.")
        self.record = read_record(str(self.training_args.output_dir)) or self.record
        self.record.pop("reported", None)  # until it is again
        trainer.state = state
        trainer.start_clock(state.log_history)
        trainer.load_weights(trainer.best_checkpoint(checkpoint) or checkpoint)

    def save(self, trainer: InterruptibleTrainer) -> None:
        """Writes what was trained into the output folder.

        Raises:
            CheckpointError: the disk is full.
        """
        with writing(str(self.training_args.output_dir)):
            if trainer.is_world_process_zero():
                record_run(str(self.training_args.output_dir), self.record)
            self.save_model(trainer)

    def save_model(self, trainer: InterruptibleTrainer) -> None:
        """Writes the model and its tokenizer."""
        trainer.save_model(_internal_call=True)  # which does not push it yet

    @cached_property
    def evaluation_text(self) -> str | None:
        """Distinguishes masked texts of evaluation; None without one, or if it cannot be told."""
        text = examples_hash(self.examples.get("validation"))
        return None if text is None else f"{text}, {self.data_args.eval_mlm_probability:g} masked"

    def evaluate(self, trainer: InterruptibleTrainer) -> dict[str, float]:
        """Metrics of the trained model: those of the last step's evaluation, if that was a part of this training."""
        if not self.training_args.do_eval:
            return {}
        state = trainer.state
        last = [each for each in state.log_history if "eval_loss" in each and each["step"] == state.global_step]
        args = self.training_args
        in_other_precision = args.bf16_full_eval or args.fp16_full_eval  # than evaluations while training
        if self.at_end:  # a checkpoint does not say on which text it was evaluated
            state.log_history = [each for each in state.log_history if each not in last]
        if not last or self.at_end or args.load_best_model_at_end or in_other_precision:
            last = [trainer.evaluate()]
        return {name: value for name, value in last[-1].items() if name.startswith("eval_")}

    def report(self, trainer: InterruptibleTrainer, metrics: dict[str, float]) -> None:
        """Writes metrics.json, the model card and the curves; without training, evaluation.json alone.

        Raises:
            CheckpointError: the disk is full.
        """
        if not trainer.is_world_process_zero():
            return
        args = self.training_args
        folder = Path(str(args.output_dir))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if args.do_train:
                record_run(folder, self.record)
            history, of_evaluation = trainer.state.log_history, None if args.do_train else self.evaluated
            numbers = metrics_report(self.model, self.summaries, history, metrics, of_evaluation)
            write_json(folder / ("metrics.json" if args.do_train else EVALUATION_NAME), numbers)
            if args.do_train:
                self.write_card(folder / CARD_NAME, self.model_card(trainer.state, describe_metrics(numbers)))
                self.draw_curves(trainer.state, folder / "training_curves.png")
                evaluated = self.evaluation_text if args.do_eval else None
                reported = {"steps": self.steps, "evaluation": evaluated, "files": result_files(folder)}
                record_run(folder, self.record | {"reported": reported})

    def write_card(self, file: Path, card: str) -> None:
        """Writes the model card, unless the one there was edited since."""
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() != self.record.get("card"):
            logger.warning(f"{file} was edited and stays as it is; metrics.json has the new numbers.")
            return
        file.write_text(card, encoding="utf-8")
        self.record["card"] = hashlib.sha256(file.read_bytes()).hexdigest()
