"""Both commands with options drawn at random: each ends in what was asked for, or in one line that says why not.

Options are drawn from the fields of the commands' dataclasses, so that a new one is drawn without a change here; its
values from its type, and from `VALUES` where a type alone would hardly give one that works. A thousand draws by chance:

    python -m pytest -n 0 tests/test_command_properties.py --hypothesis-profile hunt --hypothesis-seed 1
"""

import dataclasses
import gzip
import json
import math
import os
import resource
import signal
import tempfile
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import distill_from_bert
import run_language_modeling
from training_support import WORDS, finish, start_command

COMMANDS = {"pretraining": run_language_modeling, "distillation": distill_from_bert}
SECONDS = 120  # longest run of a command
MEMORY = 8 << 30  # address space of a command, bytes
LEARNING_RATE = 1e-3
SMALLEST_RATE = 1e-6  # that certainly moves a float32 weight in Adam's first step

# where and how a draw is run; or what takes minutes
NOT_DRAWN = {
    "output_dir",
    "data_cache_dir",
    "disable_tqdm",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
}
# no memory is pinned without an accelerator; "all" means those that are installed
UNRECORDED = {"dataloader_pin_memory", "report_to"}
# more of these is more work, and no mistake
COUNTS_OF_WORK = {"max_steps", "num_train_epochs", "dupe_factor", "dataloader_num_workers", "preprocessing_num_workers"}

SENSIBLE = {int: [1, 2, 3, 8], float: [0.25, 0.5, 1.0, 2.0], bool: [True, False], str: [], dict: [{}], list: []}
SENSELESS = {
    int: [0, -1, 10**9, 10**30],
    float: [0.0, -1.0, 1e-300, 1e30, math.nan, math.inf, -math.inf],
    bool: [],
    str: ["", " ", "nonsense", "né\n", "a,b=1", "{", "/dev/null", "missing/file.json"],
    dict: [{"nonsense": 1}, {"": None}, {"deep": {"deeper": [math.nan]}}],
    list: [[], [""], ["nonsense"], ["nonsense", "nonsense"]],
}
OF_A_WRONG_TYPE = [None, "3", 3.5, 3, True, [1], [None], {"a": 1}, [], "nonsense", math.nan]
VALUES = {
    "activation_checkpointing_kwargs": [{"use_reentrant": False}, {"use_reentrant": True}],
    "config_overrides": [
        {name: value}
        for name, value in {
            "hidden_size": 24,
            "num_hidden_layers": 0,
            "intermediate_size": 1,
            "num_lambda_queries": 3,
            "key_depth": 0,
            "intra_depth": 2,
            "local_context_size": 4,
            "lambda_norm": "rms",
            "hidden_act": "relu",
            "max_position_embeddings": 8,
            "position_embedding_type": None,
            "hidden_dropout_prob": 1.0,
            "initializer_range": 0.0,
            "layer_norm_eps": -1.0,
            "vocab_size": 7,
            "pad_token_id": 3,
            "type_vocab_size": 1,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "nonsense": 1,
        }.items()
    ],
    "corpus": ["python-docs"],
    "debug": ["underflow_overflow"],
    "encoding": ["latin-1", "utf-16", "rot13", "base64"],
    "language": ["en", "ja", "xx"],
    "masked_sentence": ["The fox [MASK].", "The fox.", "[MASK] [MASK]", "[MASK]" + " fox" * 50],
    "metric_for_best_model": ["loss", "mlm_loss", "eval_layers", "perplexity"],
    "model_name_or_path": ["@model", "@teacher/plain", "@texts"],
    "optim_args": ["weight_decay=1"],
    "optim_target_modules": ["all-linear", ["query"]],
    "pad_to_multiple_of": [1, 8, 64],
    "report_to": ["none", "all", "tensorboard", ["tensorboard"]],
    "lr_scheduler_kwargs": [{"num_cycles": 2}, {"lr_end": 1e-5}, '{"num_cycles": 2}'],
    "max_seq_length": [5, 16, 33],
    "run_name": ["mine"],
    "text_column": ["text", "label", "id", "text.body"],
    "tokenizer_name": ["@tokenizer", "@tokenizer/tokenizer.json", "@vocabulary", "@model", "@texts"],
    "teacher": ["@teacher/plain", "@teacher/mlm", "@model", "@tokenizer"],
    "vocab_size": [6, 60, 200],
    "validation_file": ["@texts/documents.txt", "@texts/one_sentence.txt", "@texts/empty.txt"],
}

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_lambda_queries": 4,
    "local_context_size": 5,
    "max_position_embeddings": 32,
}
BASE = {
    "max_steps": 2,
    "max_seq_length": 24,
    "per_device_train_batch_size": 2,
    "learning_rate": LEARNING_RATE,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}
STUDENT = {"config_overrides": {"local_context_size": 5, "num_lambda_queries": 4}}
MODES = [{"do_train": True}, {}, {"do_train": True, "do_eval": True}, {"dry_run": True}]
SOURCES = [
    {"tokenizer_name": "@tokenizer", "config_overrides": SHAPE},
    {"tokenizer_name": "@vocabulary", "config_overrides": SHAPE},
    {"train_tokenizer": True, "vocab_size": 120, "config_overrides": SHAPE},
    {"model_name_or_path": "@model"},
]
# a user's file in the output folder; a command that trains would overwrite all but the first
FILES_IN_OUTPUT_FOLDER = [
    "notes.txt",
    "README.md",
    "config.json",
    "lambda_layer.py",
    "model.safetensors",
    "metrics.json",
    "run_settings.json",
    "training_args.bin",
    "training_curves.png",
    "tokenizer.json",
    "checkpoint-2/x",
]


def table(rows: list[dict], delimiter: str) -> str:
    return "\n".join(delimiter.join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)])


def text_contents() -> dict[str, bytes]:
    """Small texts of many kinds, and what is none, by file name."""
    parts = list(WORDS.values())
    lines = [
        f"{' '.join(part[(i * (k + 1) + i // 6) % len(part)] for k, part in enumerate(parts))}." for i in range(24)
    ]
    groups = [lines[start : start + 4] for start in range(0, len(lines), 4)]
    documents = "\n\n".join(map("\n".join, groups))
    rows = [{"id": i, "text": line, "label": i % 2} for i, line in enumerate(lines)]
    contents = {
        "documents.txt": documents,
        "validation.txt": "\n\n".join(map("\n".join, groups[::2])),
        "lines.txt": "\n".join(lines),
        "one_sentence.txt": "\n\n".join(lines),
        "one_line.txt": lines[0],
        "windows.txt": documents.replace("\n", "\r\n"),
        "wrapped.txt": "\n\n".join(textwrap.fill(" ".join(group), 40) for group in groups),
        "characters.txt": "a\n\nb\n\nc\n\nd\n",
        "dna.txt": "\n\n".join(["\n".join(("ACGTTGCA" * 60)[i : i + 300] for i in range(6))] * 3),
        "chinese.txt": "\n\n".join(["\u72d0\u72f8\u770b\u89c1\u8239\u3002" * 5] * 4),
        "unknown.txt": "\n\n".join(["<unk> <unk>\n<unk>"] * 5),
        "controls.txt": documents.replace(" ", "\x00"),
        "table.csv": table(rows, ","),
        "table.tsv": table(rows, "\t"),
        "no_text.csv": "id,label\n1,2\n",
        "array.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2),
        "lines.jsonl": "\n".join(map(json.dumps, rows)),
        "numbers.jsonl": '{"text": 1}\n{"text": 2}\n',
        "broken.json": json.dumps(rows)[:-20],
        "blank.txt": "\n \n\n",
        "empty.txt": "",
        "empty.json": "[]",
        "empty.csv": "",
        "folder/a.txt": documents,
    }
    return {name: text.encode() for name, text in contents.items()} | {
        "latin.txt": "Caf\xe9 au lait.\n\n".encode("latin-1") * 9,
        "binary.txt": bytes(range(256)) * 9,
        "binary.parquet": bytes(range(256)) * 9,
        "lines.txt.gz": gzip.compress(documents.encode(), mtime=0),
        "cut.txt.gz": gzip.compress(documents.encode(), mtime=0)[:-20],
    }


TEXTS = text_contents()
SOURCES_OF_TEXT = [*TEXTS, "folder", "missing.txt", "*.text", "*.txt"]


class Field(NamedTuple):
    hint: Any
    choices: list


class Drawn(NamedTuple):
    """A command line.

    Attributes:
        command: one of `COMMANDS`.
        recipe, flags: its options.
        file: a user's file in the output folder, or None.
    """

    command: str
    recipe: dict
    flags: dict
    file: str | None


def fields_of(command: str) -> dict[str, Field]:
    """Every option of a command."""
    found = {}
    for group in COMMANDS[command].ARGUMENT_GROUPS:
        hints = get_type_hints(group)
        for option in filter(lambda option: option.init, dataclasses.fields(group)):
            found[option.name] = Field(hints[option.name], list(option.metadata.get("choices") or ()))
    return found


FIELDS = {command: fields_of(command) for command in COMMANDS}


def values_of(name: str, option: Field, sensible: bool) -> st.SearchStrategy:
    """Values of an option's types, such as might work or such as hardly can."""
    known = [*VALUES.get(name, ()), *option.choices] if sensible else []
    for hint in get_args(option.hint) or (option.hint,):
        kind = get_origin(hint) or hint
        if isinstance(kind, type) and issubclass(kind, Enum):
            known += [choice.value for choice in kind] if sensible else ["nonsense"]
        elif kind is Literal:
            known += get_args(hint)
        elif kind in SENSIBLE and not (sensible and (name in VALUES or option.choices)):
            known += (SENSIBLE if sensible else SENSELESS)[kind]
    if name in COUNTS_OF_WORK:
        known = [value for value in known if not math.isfinite(value) or value <= 3]
    return st.sampled_from(known) if known else st.nothing()


def one_in(count: int) -> st.SearchStrategy:
    """True about once in so many draws; not at a bound, which is drawn more often."""
    return st.integers(0, count - 1).map(lambda number: number == count // 2)


@st.composite
def texts(draw, evaluates: bool) -> dict:
    """Where the text comes from.

    Args:
        evaluates: whether there is to be one of evaluation.
    """
    kinds = st.sampled_from(SOURCES_OF_TEXT)
    # most draws read what can be read, so that their other options are reached
    name = draw(st.one_of(st.just("documents.txt"), st.just("documents.txt"), kinds))
    files = [f"@texts/{name}"]
    if draw(one_in(10)):
        files.append(f"@texts/{draw(kinds)}")
    held_out = {"validation_split_percentage": 40}
    validation = [{"validation_file": ["@texts/validation.txt"]}, held_out, held_out] if evaluates else [{}]
    return {"train_file": files, **draw(st.sampled_from(validation))}


@st.composite
def command_lines(draw, sensible: bool = False) -> Drawn:
    """A small run that works, with a few options more or less.

    Args:
        sensible: whether to draw only values that might work, and a mode that trains.
    """
    command = draw(st.sampled_from(sorted(COMMANDS)))
    known = FIELDS[command]
    options = {**BASE, "data_cache_dir": "@cache", "output_dir": "out"}
    mode = draw(st.sampled_from(MODES[:2] if sensible else MODES))
    options |= mode | ({"train_file": ["@texts/documents.txt"]} if sensible else draw(texts(mode != MODES[0])))
    if command == "pretraining":
        options |= draw(st.sampled_from(SOURCES))
        options |= draw(st.sampled_from([{}, {"objective": "mlm"}, {"sop": True}]))
        if draw(one_in(8)) and not sensible:
            options = {**options, **SOURCES[-1], "do_eval": True, "do_train": False}
    else:
        options |= STUDENT
        options["teacher"] = draw(st.sampled_from(["@teacher/plain", "@teacher/mlm", "@teacher/classifier"]))
    names = st.sampled_from(sorted(set(known) - NOT_DRAWN))
    mistyped = set()
    for name in draw(st.lists(names, max_size=3, unique=True)):
        kind = "sensible" if sensible else draw(st.sampled_from(["sensible"] * 5 + ["senseless", "of a wrong type"]))
        values = values_of(name, known[name], sensible=kind == "sensible")
        if kind == "of a wrong type":
            values, mistyped = st.sampled_from(OF_A_WRONG_TYPE), mistyped | {name}
        if not values.is_empty:
            value = draw(values)
            # of a small model, whatever else it is
            small = name == "config_overrides" and kind == "sensible"
            options[name] = {**options.get(name, {}), **value} if small else value
    if not sensible and draw(one_in(8)):
        options.pop(draw(st.sampled_from(sorted(options))))
    if not sensible and draw(one_in(30)):
        options["nonsense"] = 1
    in_recipe = draw(st.sampled_from([set(), set(options), set(list(options)[::2])])) | mistyped
    file = None if sensible or not draw(one_in(8)) else draw(st.sampled_from(FILES_IN_OUTPUT_FOLDER))
    recipe = {name: value for name, value in options.items() if name in in_recipe}
    return Drawn(command, recipe, {name: value for name, value in options.items() if name not in in_recipe}, file)


def as_flags(options: dict) -> list[str]:
    words = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, dict) and name == "config_overrides":
            value = ",".join(f"{field}={setting}" for field, setting in value.items())
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, items)]
    return words


def placed(value: Any, folder: Path) -> Any:
    """A value with paths in place of what begins with @."""
    if isinstance(value, str) and value.startswith("@"):
        return str(folder / value[1:])
    return [placed(item, folder) for item in value] if isinstance(value, list) else value


def equal(given: Any, found: Any) -> bool:
    """Whether an option's value is what the command took it for."""
    found = found.value if isinstance(found, Enum) else found
    found = vars(found) if dataclasses.is_dataclass(found) else found
    if isinstance(given, str) and isinstance(found, list):
        given = [given]
    if isinstance(given, str) and isinstance(found, dict):
        given = json.loads(given)
    if isinstance(given, dict) and isinstance(found, dict):
        return all(name in found and equal(value, found[name]) for name, value in given.items())
    return given == found


class Watched:
    """Runs a command in this process, and checks what it did where its status is 0.

    Attributes:
        trainer: the Trainer that trained for the output folder.
        rates: its learning rates.
        before: its model's weights before the first step.
    """

    def __init__(self, main, options: dict):
        self.main, self.options = main, {name: value for name, value in options.items() if value is not None}
        self.output = Path(self.options.get("output_dir", "models"))
        self.trainer, self.rates, self.before = None, [], {}
        told = "do_train" in self.options or "do_eval" in self.options
        self.dry = self.options.get("dry_run", False)
        self.trains = not self.dry and (self.options.get("do_train", False) or not told)
        self.evaluates = not self.dry and (self.options.get("do_eval", False) or not told)

    def __call__(self, argv: list[str]) -> int:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        train = transformers.Trainer.train

        def watched_train(trainer, *args, **kwargs):
            if Path(trainer.args.output_dir) == self.output:
                self.trainer = trainer
                self.before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
                trainer.add_callback(self.rates_seen())
            return train(trainer, *args, **kwargs)

        transformers.Trainer.train = watched_train
        status = self.main(argv)
        if status == 0:
            self.check()
        return status

    def rates_seen(self) -> transformers.TrainerCallback:
        class Rates(transformers.TrainerCallback):
            def on_pre_optimizer_step(callback, args, state, control, optimizer, **kwargs):
                self.rates.append(max(group["lr"] for group in optimizer.param_groups))

        return Rates()

    def check(self):
        unusable = [
            name for name, value in self.options.items() if isinstance(value, float) and not math.isfinite(value)
        ]
        assert not unusable, f"accepted: {unusable}"
        assert self.trains or self.evaluates or self.dry
        if self.trains:
            self.check_training()
        if self.evaluates:
            file = self.output / ("metrics.json" if self.trains else "evaluation.json")
            metrics = json.loads(file.read_text())["eval"]
            assert all(map(math.isfinite, metrics.values())), metrics
            assert metrics["eval_masked_tokens" if "eval_masked_tokens" in metrics else "eval_tokens"] > 0, metrics

    def check_training(self):
        trainer = self.trainer
        record = json.loads((self.output / "run_settings.json").read_text())
        arguments = {name.removeprefix("argument "): value for name, value in record["model"].items() if " " in name}
        for name, value in self.options.items():
            # of a trained tokenizer, vocab_size is a bound, which its model's need not reach
            for settings_of in (vars(trainer.args), record["data"], record["training"], arguments):
                if name in settings_of and name not in UNRECORDED:
                    assert equal(value, settings_of[name]), f"{name}={value!r} was taken as {settings_of[name]!r}"
        for name, value in dict(self.options.get("config_overrides") or {}).items():
            assert equal(value, record["model"][name]), f"{name}={value!r} was taken as {record['model'][name]!r}"
        assert trainer.state.global_step == len(self.rates) > 0
        if "max_steps" in self.options:
            assert trainer.state.global_step == self.options["max_steps"]
        after = type(trainer.model).from_pretrained(self.output).state_dict()
        assert all(weight.isfinite().all() for weight in after.values())
        assert after.keys() == self.before.keys()
        if max(self.rates) >= SMALLEST_RATE:
            assert any(not torch.equal(weight, after[name]) for name, weight in self.before.items()), "nothing moved"
        elif self.options["learning_rate"] >= SMALLEST_RATE:
            raise AssertionError(f"the learning rate never rose above {max(self.rates)}")


def run(drawn: Drawn, sources: Path, folder: Path) -> tuple[int, str]:
    """Runs a drawn command in an empty folder, in a process of its own; returns its status and what it printed."""
    module = COMMANDS[drawn.command]
    recipe, flags = ({name: placed(value, sources) for name, value in part.items()} for part in drawn[1:3])
    argv = as_flags(flags)
    if recipe:
        (folder / "recipe.json").write_text(json.dumps(recipe))
        argv = ["recipe.json", *argv]
    if drawn.file:
        (folder / "out" / drawn.file).parent.mkdir(parents=True)
        (folder / "out" / drawn.file).write_text("{}")
    log = folder.with_suffix(".log")

    def command(argv):
        os.chdir(folder)
        return Watched(module.main, {**recipe, **flags})(argv)

    status = finish(start_command(argv, log, command))[0]
    return status, log.read_text(errors="replace")


def check_outcome(drawn: Drawn, folder: Path, status: int, printed: str):
    """What holds after every command, however it ended."""
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    said = f"{drawn}\n{printed[-6000:]}"
    assert status in (0, 1), said
    assert "Traceback" not in printed, said
    assert len(errors) == status, said
    assert not any("--log_level debug shows where" in line for line in errors), said
    output = folder / "out"
    if drawn.file:
        assert (output / drawn.file).read_text() == "{}", said
    written = {file.name for file in folder.rglob("*") if file.is_file()} - {"recipe.json", Path(drawn.file or "").name}
    if status == 0 and {**drawn.recipe, **drawn.flags}.get("dry_run"):
        assert not written, said


@pytest.fixture(scope="module")
def sources(text, teachers, tmp_path_factory):
    """A folder of texts, tokenizers, teachers, a model and a cache."""
    folder = tmp_path_factory.mktemp("sources")
    for name, content in TEXTS.items():
        (folder / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / name).write_bytes(content)
    (folder / "tokenizer").symlink_to(text / "tokenizer")
    (folder / "teacher").symlink_to(teachers)
    words = json.loads((text / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocabulary").write_text("\n".join(sorted(words, key=words.get)))
    options = {**BASE, **SOURCES[0], "do_train": True, "objective": "sop", "train_file": ["@texts/documents.txt"]}
    (folder / "run").mkdir()
    drawn = Drawn("pretraining", {**options, "data_cache_dir": "@cache", "output_dir": "out"}, {}, None)
    status, printed = run(drawn, folder, folder / "run")
    assert status == 0, printed
    (folder / "model").symlink_to(folder / "run" / "out")
    return folder


@given(drawn=command_lines())
def test_a_command_does_what_it_is_told_or_says_why_not(sources, drawn):
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        check_outcome(drawn, work, *run(drawn, sources, work))


@settings(max_examples=5)
@given(drawn=command_lines(sensible=True))
def test_equal_commands_give_equal_weights(sources, drawn):
    with tempfile.TemporaryDirectory() as folder:
        weights = []
        for name in ("first", "second"):
            work = Path(folder) / name
            work.mkdir()
            status, printed = run(drawn, sources, work)
            check_outcome(drawn, work, status, printed)
            weights.append(load_file(work / "out" / "model.safetensors") if status == 0 else {})
        first, second = weights
        assert first.keys() == second.keys()
        assert all(torch.equal(weight, second[name]) for name, weight in first.items())
