"""The data cache: its keys, full disks, and workers that do not outlive the process they work for."""

import importlib.util
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from datasets import Dataset, load_from_disk

from lambdabert.text import cache, examples
from lambdabert.text.cache import UnwritableCacheError
from lambdabert.text.preparation import prepare_examples
from text_support import data_arguments, prepare, random_documents, training_texts, write


def test_a_cache_too_full_for_documents_is_named(tmp_path):
    """In a process of its own, which may not write files of more than 64 KB."""
    path = write(tmp_path / "corpus.txt", "A line of text.\n" * 20_000)
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            training_texts(tmp_path, train_file=path)
        except UnwritableCacheError as error:
            os._exit(0 if "data_cache_dir" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cache_too_full_for_examples_is_named(tmp_path, tokenizer, workers):
    """In a process of its own, which may not write files of more than 64 KB."""
    documents = Dataset.from_dict({"text": ["t7 t8 t9 " * 300] * 500})
    arguments = data_arguments(tmp_path, corpus="python-docs", preprocessing_num_workers=workers)
    documents.save_to_disk(tmp_path / "documents")
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            prepare_examples(
                load_from_disk(tmp_path / "documents"), tokenizer, arguments.example_recipe(), seed=1, training=True
            )
        except UnwritableCacheError as error:
            os._exit(0 if "data_cache_dir" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_prepares(tmp_path, tokenizer, monkeypatch, number):
    def work_forever(self, documents):
        (tmp_path / f"worker-{os.getpid()}").touch()
        time.sleep(600)

    monkeypatch.setattr(examples.DocumentTokenizer, "__call__", work_forever)
    process = os.fork()
    if process == 0:
        try:
            prepare(tmp_path, random_documents(), tokenizer, preprocessing_num_workers=2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("worker-*"))) < 2 and time.monotonic() < deadline:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "it ended before its workers began"
        time.sleep(0.05)
    workers = psutil.Process(process).children(recursive=True)
    os.kill(process, number)
    os.waitpid(process, 0)
    assert len(list(tmp_path.glob("worker-*"))) == 2, "its workers did not begin in time"
    assert len(workers) >= 2
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        worker.kill()
    assert not left


def test_every_module_of_text_is_in_the_key(tmp_path):
    package = tmp_path / "text"
    shutil.copytree(Path(cache.__file__).parent, package)

    def code():
        spec = importlib.util.spec_from_file_location("copied_cache", package / "cache.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.CODE

    assert code() == cache.CODE
    for module in sorted(package.glob("*.py")):
        content = module.read_bytes()
        module.write_bytes(content + b"\n")
        assert code() != cache.CODE, module
        module.write_bytes(content)
    (package / "sources.py").rename(package / "other_sources.py")
    assert code() != cache.CODE
