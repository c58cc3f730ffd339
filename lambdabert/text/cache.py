"""The data cache: keys that follow the code, disks that are full, and worker processes that end with their parent."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

SECONDS_BETWEEN_LOOKS = 1.0


def _code() -> str:
    """A hash of every module beside this one: text that other code prepared is never taken for this code's."""
    content = hashlib.blake2b()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        content.update(module.name.encode())
        content.update(module.read_bytes())
    return content.hexdigest()


CODE = _code()


class UnwritableCacheError(ValueError):
    """Prepared text cannot be written into the data cache."""


def cache_key(*content: object) -> str:
    """Names what is made of `content` by this code."""
    return Hasher.hash((content, CODE))


@contextmanager
def written_to_cache(cache_dir: str | None) -> Iterator[None]:
    """Says in one line why text could not be prepared.

    Args:
        cache_dir: where it is written; the cache of `datasets` if None.

    Raises:
        UnwritableCacheError: the cache is full, or closed to writing.
        ValueError: as raised while the text was read.
    """
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, ValueError):
            raise cause from None
        if not isinstance(cause, OSError) or cause.errno is None:  # those of `datasets` about its sources have none
            raise
        place = str(cache_dir or datasets.config.HF_DATASETS_CACHE)
        raise UnwritableCacheError(
            f"data_cache_dir={place!r}: prepared text cannot be written there ({cause.strerror}): free space, or name "
            "another folder."
        ) from error


# The process whose forks are workers, while it has any.
_employer: int | None = None


@contextmanager
def worker_processes() -> Iterator[None]:
    """Processes that are forked within end with this one, even if it is killed."""
    global _employer
    _employer = os.getpid()
    try:
        yield
    finally:
        _employer = None


def _end_with_employer() -> None:
    global _employer
    employer, _employer = _employer, None
    if employer is not None:
        threading.Thread(target=_watch, args=(employer,), daemon=True).start()


def _watch(employer: int) -> None:
    while os.getppid() == employer:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


os.register_at_fork(after_in_child=_end_with_employer)
