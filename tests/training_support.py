"""What the tests of training share: a small text, a small recipe, a tiny BERT, and runs in processes of their own."""

import json
import logging
import os
import random
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import run_language_modeling

WORDS = {
    "subject": ["the fox", "a sailor", "her brother", "the old king", "my neighbour", "the cat"],
    "verb": ["sees", "follows", "paints", "forgets", "carries", "sells"],
    "object": ["a red boat", "the tall tower", "some bread", "the river", "an open door", "two stones"],
    "place": ["near the sea", "in the garden", "at night", "behind the house", "on Sunday", "for a friend"],
}
BERTS = {
    "plain": BertModel,
    "mlm": BertForMaskedLM,
    "classifier": BertForSequenceClassification,
    "tagger": BertForTokenClassification,
}
SCHEDULE = {
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "max_steps": 12,
    "save_steps": 4,
    "logging_steps": 3,
    "eval_steps": 6,
    "disable_tqdm": True,
    "use_cpu": True,
}
RECIPE = {
    "do_train": True,
    "do_eval": True,
    "objective": "sop",
    "max_seq_length": 32,
    "config_overrides": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_lambda_queries": 4,
        "local_context_size": 5,
        "max_position_embeddings": 32,
    },
    **SCHEDULE,
}


def write_text(file, documents=12, sentences=10, seed=0):
    """Writes documents of simple sentences, one sentence a line, blank lines between documents."""
    rng = random.Random(seed)
    lines = []
    for _ in range(documents):
        for _ in range(sentences):
            words = " ".join(rng.choice(WORDS[part]) for part in ("subject", "verb", "object", "place"))
            lines.append(words[0].upper() + words[1:] + ".")
        lines.append("")
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def write_recipe(file, **values):
    """Writes the small recipe with `values` in it; a value of None leaves an option out."""
    recipe = {name: value for name, value in {**RECIPE, **values}.items() if value is not None}
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return str(file)


def benchmark_options(text, folder, **values):
    """What the models of a quality benchmark share, on the small text of `text`; a value of None leaves one out."""
    own = dict.fromkeys(("save_steps", "max_steps", "do_train", "do_eval", "learning_rate"))
    shared = {
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "train_tokenizer": True,
        "vocab_size": 180,
        "data_cache_dir": str(folder / "cache"),
    }
    return json.loads(Path(write_recipe(folder / "options.json", **own, **shared, **values)).read_text())


def sources(text, **values):
    """Options that name the session's text and tokenizer."""
    return {
        "train_file": [str(text / "train.txt")],
        "validation_file": [str(text / "valid.txt")],
        "tokenizer_name": str(text / "tokenizer"),
        "data_cache_dir": str(text / "cache"),
        **values,
    }


def recipe_for(text, output_dir, **values):
    """Writes the small recipe for the session's text; returns its file, which lies beside `output_dir`."""
    return write_recipe(
        output_dir.with_suffix(".json"),
        output_dir=str(output_dir),
        train_file=[str(text / "train.txt")],
        tokenizer_name=str(text / "tokenizer"),
        data_cache_dir=str(text / "cache"),
        gradient_accumulation_steps=2,
        **{"validation_file": [str(text / "valid.txt")], **values},
    )


def contents(folder):
    """The bytes of each file in a folder, and when it was written."""
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def complaint(recipe, capfd, *flags):
    """The one line that the pretraining command ends with."""
    assert run_language_modeling.main([recipe, *flags]) == 1
    printed = capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    return lines[0]


def tiny_bert(bert_class=BertModel, seed=0, **fields):
    """A BERT whose every weight differs from any initialisation."""
    shape = dict(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28)
    torch.manual_seed(seed)
    bert = bert_class(BertConfig(**{**shape, "max_position_embeddings": 40, **fields})).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 + 0.1)
    return bert


def start_command(argv, log, command=run_language_modeling.main, **environment):
    """Starts the command in a forked process that appends what it prints to `log`; returns the process's id."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        stream = open(log, "a", encoding="utf-8")
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        os.environ.update(environment)
        logging.getLogger().handlers.clear()
        torch.set_num_threads(1)
        status = command(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        stream.flush()
        os._exit(status)


def start_distributed(argv, log, processes=2, command=run_language_modeling.main):
    """Starts the command as torchrun does, in `processes` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start_command(
            argv,
            log,
            command,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(processes)
    ]


def finish(*processes):
    """Waits for processes; returns their exit statuses, negative for the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def is_json(text):
    try:
        return bool(json.loads(text))
    except json.JSONDecodeError:
        return False


def wait_for(file, process):
    """Waits until a process has written a file, all of it if it is JSON."""
    while not (file.is_dir() or file.exists() and (file.suffix != ".json" or is_json(file.read_text()))):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), f"the run ended before it wrote {file}"
        time.sleep(0.005)


def assert_same_weights(one, other):
    """Asserts that the models in two folders have the same weights, bit for bit."""
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def run_card_snippet(output_dir, scratch, then=""):
    """Runs the Python of a folder's model card beside it, without this code and with nobody to answer a question.

    Args:
        output_dir: the folder.
        scratch: an empty folder.
        then: code that continues it.
    """
    snippet = (output_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
    }
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", snippet + then]
    return subprocess.run(
        command, cwd=output_dir.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
