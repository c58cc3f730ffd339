"""Speed and memory of preparing text, beside tokenizing the same text alone, in one run.

    python benchmarks/bench_data.py --tokenizer_name google-bert/bert-base-cased --preprocessing_num_workers 2 FILE ...

Takes any files that `--train_file` of the pretraining command takes. Each repetition starts with an empty cache and
measures preparation end to end (reading, documents, sentences, tokens, pairs, writing) and then plain tokenization of
the same documents by `Dataset.map` with the same tokenizer and processes. The ratio of their processor times stays
meaningful on a machine that does other work as well. Memory is that of this process and its workers together while
they prepare; pages that they share count once for each in `rss`, and once in all in `pss`.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from environment import environment
from lambdabert.text.arguments import DataArguments
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.objectives import OBJECTIVES
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus

SAMPLING_INTERVAL = 0.2  # seconds
TOKENIZING_BATCH = 64  # documents


class Stopwatch:
    """Measures wall-clock seconds, and processor seconds of this process and its finished children."""

    def __enter__(self):
        self._wall, self._cpu = time.perf_counter(), self._processor_seconds()
        return self

    def __exit__(self, *exception):
        self.wall = time.perf_counter() - self._wall
        self.cpu = self._processor_seconds() - self._cpu

    @staticmethod
    def _processor_seconds() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system


class PeakMemory:
    """Records the largest memory of this process and its children while the context lasts, in bytes."""

    def __enter__(self):
        self.rss = self.pss = 0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._finished.set()
        self._thread.join()

    def _watch(self):
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


def measure(arguments: DataArguments, tokenizer, seed: int) -> dict[str, float]:
    """Returns seconds, text and sizes of one repetition in a cache of its own."""
    workers = arguments.preprocessing_num_workers or 1
    with tempfile.TemporaryDirectory() as arguments.data_cache_dir:
        with PeakMemory() as memory, Stopwatch() as reading:
            documents = load_corpus(arguments, evaluate=False)["train"]
        with PeakMemory() as memory_preparing, Stopwatch() as preparing:
            _, summary = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=seed, training=True)
        with Stopwatch() as tokenizing:
            documents.map(
                lambda batch: tokenizer(
                    batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
                ),
                batched=True,
                batch_size=TOKENIZING_BATCH,
                remove_columns=documents.column_names,
                num_proc=workers if workers > 1 else None,
                cache_file_name=str(Path(arguments.data_cache_dir, "tokenized_alone.cache")),
                desc="Tokenizing alone",
            )
        with Stopwatch() as reopening:
            reopened = load_corpus(arguments, evaluate=False)["train"]
            prepare_examples(reopened, tokenizer, arguments.example_recipe(), seed=seed, training=True)
        text_bytes = sum(len(text.encode()) for text in DocumentTexts(documents))
        stored_bytes = sum(file.stat().st_size for file in Path(arguments.data_cache_dir).rglob("*.arrow"))
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
        "peak_rss_mb": max(memory.rss, memory_preparing.rss) / 1e6,
        "peak_pss_mb": max(memory.pss, memory_preparing.pss) / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer_name", required=True, help="folder or hub name")
    parser.add_argument("--objective", choices=OBJECTIVES, default="nsp")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens")
    parser.add_argument("--text_column")
    parser.add_argument("--preprocessing_num_workers", type=int, default=None)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_name)
    tokenizer.model_max_length = sys.maxsize  # documents are longer; no warning
    runs = []
    for seed in range(options.repetitions):
        arguments = DataArguments(
            train_file=options.files,
            objective=options.objective,
            max_seq_length=options.max_seq_length,
            text_column=options.text_column,
            preprocessing_num_workers=options.preprocessing_num_workers,
        )
        runs.append(measure(arguments, tokenizer, seed))

    names = list(runs[0])
    print("run".ljust(24) + "".join(f"{run:>14}" for run in range(len(runs))))
    for name in names:
        print(name.ljust(24) + "".join(f"{run[name]:>14,.2f}" for run in runs))
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "repetitions")}
        record = {
            "environment": environment("datasets", "tokenizers", "pyarrow", "sentencex"),
            "settings": settings,
            "runs": runs,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
