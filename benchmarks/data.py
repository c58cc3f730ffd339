"""Speed and memory of preparing text, beside tokenizing the same text alone, in one run.

    python -m benchmarks.data --tokenizer_name google-bert/bert-base-cased --preprocessing_num_workers 2 FILE ...

Takes any files that `--train_file` of the pretraining command takes. Each repetition starts with an empty cache and
measures preparation end to end (reading, documents, sentences, tokens, pairs, writing) and then plain tokenization of
the same documents by `Dataset.map` with the same tokenizer and processes. The ratio of their processor times stays
meaningful on a machine that does other work as well. Memory is that of this process and its workers together while
they prepare; pages that they share count once for each in `rss`, and once in all in `pss`.

Nothing is measured unless the tests of reading and preparing text pass.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from benchmarks.correctness import TEXT_TESTS, require_passing_tests
from benchmarks.environment import environment
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.text.arguments import DataArguments
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.objectives import OBJECTIVES
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from lambdabert.training.tokenizers import load_tokenizer

SAMPLING_INTERVAL = 0.2  # seconds
TOKENIZING_BATCH = 64  # documents


class Stopwatch:
    """Measures wall-clock seconds (`wall`), and processor seconds of this process and its finished children (`cpu`)."""

    def __enter__(self) -> "Stopwatch":
        self._wall, self._cpu = time.perf_counter(), self._processor_seconds()
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = self._processor_seconds() - self._cpu

    @staticmethod
    def _processor_seconds() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system


class PeakMemory:
    """Records the largest memory of this process and its children while the context lasts (`rss`, `pss`), in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.rss = self.pss = 0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._finished.wait(SAMPLING_INTERVAL):
            used = []
            for process in (this, *this.children(recursive=True)):
                try:
                    used.append(process.memory_full_info())
                except psutil.Error:
                    continue
            self.rss = max(self.rss, sum(memory.rss for memory in used))
            self.pss = max(self.pss, sum(getattr(memory, "pss", 0) for memory in used))


def tokenize_alone(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, workers: int | None, cache_file: Path
) -> None:
    """Tokenizes whole documents and does nothing else with them."""

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(
            batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )

    documents.map(
        tokenize,
        batched=True,
        batch_size=TOKENIZING_BATCH,
        remove_columns=documents.column_names,
        num_proc=workers if workers and workers > 1 else None,
        cache_file_name=str(cache_file),
        desc="Tokenizing alone",
    )


def measure(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int, cache_dir: Path) -> dict[str, Any]:
    """Seconds, text and sizes of one repetition.

    Args:
        arguments: the text, and how it is prepared.
        tokenizer: of both preparations.
        seed: of the pairs.
        cache_dir: an empty folder for what is prepared.
    """
    arguments = replace(arguments, data_cache_dir=str(cache_dir))
    with PeakMemory() as memory_reading, Stopwatch() as reading:
        documents = load_corpus(arguments, evaluate=False)["train"]
    with PeakMemory() as memory_preparing, Stopwatch() as preparing:
        _, summary = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=seed, training=True)
    with Stopwatch() as tokenizing:
        tokenize_alone(documents, tokenizer, arguments.preprocessing_num_workers, cache_dir / "tokenized_alone.cache")
    with Stopwatch() as reopening:
        reopened = load_corpus(arguments, evaluate=False)["train"]
        prepare_examples(reopened, tokenizer, arguments.example_recipe(), seed=seed, training=True)
    text_bytes = sum(len(text.encode()) for text in DocumentTexts(documents))
    stored_bytes = sum(file.stat().st_size for file in cache_dir.rglob("*.arrow"))
    return {
        "text_mb": text_bytes / 1e6,
        "stored_mb": stored_bytes / 1e6,
        "documents": summary.documents,
        "sentences": summary.sentences,
        "examples": summary.examples,
        "tokens": summary.tokens,
        "read_seconds": reading.wall,
        "prepare_seconds": preparing.wall,
        "tokenize_alone_seconds": tokenizing.wall,
        "reopen_seconds": reopening.wall,
        "relative_rate": tokenizing.wall / (reading.wall + preparing.wall),
        "relative_rate_cpu": tokenizing.cpu / (reading.cpu + preparing.cpu),
        "mb_per_second": text_bytes / 1e6 / (reading.wall + preparing.wall),
        "peak_rss_mb": max(memory_reading.rss, memory_preparing.rss) / 1e6,
        "peak_pss_mb": max(memory_reading.pss, memory_preparing.pss) / 1e6,
    }


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer_name", required=True, help="folder, vocabulary file or hub name")
    parser.add_argument("--objective", choices=OBJECTIVES, default="nsp")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens")
    parser.add_argument("--text_column")
    parser.add_argument("--preprocessing_num_workers", type=int, default=None)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        tokenizer = load_tokenizer(options.tokenizer_name)
        arguments = DataArguments(
            train_file=options.files,
            objective=options.objective,
            max_seq_length=options.max_seq_length,
            text_column=options.text_column,
            preprocessing_num_workers=options.preprocessing_num_workers,
        )
    tokenizer.model_max_length = sys.maxsize  # documents are longer; no warning
    require_passing_tests(*TEXT_TESTS)
    runs = []
    for seed in range(options.repetitions):
        with one_line_errors(), tempfile.TemporaryDirectory() as folder:
            runs.append(measure(arguments, tokenizer, seed, Path(folder)))

    print("run".ljust(24) + "".join(f"{run:>14}" for run in range(len(runs))))
    for name in runs[0]:
        print(name.ljust(24) + "".join(f"{run[name]:>14,.2f}" for run in runs))
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "repetitions")}
        versions = environment("datasets", "tokenizers", "pyarrow", "sentencex")
        write_json(options.output, {"environment": versions, "settings": settings, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
