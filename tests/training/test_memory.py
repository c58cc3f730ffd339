"""What a training command keeps of freed memory: pages are cleared once, not in every step."""

import platform
import subprocess
import sys

import run_language_modeling
from lambdabert.training import run
from training_support import recipe_for

# pages cleared for ten arrays of 40 MB, each freed before the next: before the call, and after it (one array is 20
# pages if they are huge)
COUNT = """
import resource
import torch
from lambdabert.training.memory import keep_freed_memory

def cleared():
    for i in range(12):
        if i == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        array = torch.ones(10**7)
        del array
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
print(cleared(), keep_freed_memory(), cleared())
"""


def test_kept_pages_are_not_cleared_again():
    ended = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, told, after = ended.stdout.split()
    is_glibc = platform.libc_ver()[0] == "glibc"
    assert told == str(is_glibc)
    assert not is_glibc or int(after) < int(before) / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert run.keep_freed_memory() is False


def test_a_run_keeps_it_from_its_first_step_on(text, tmp_path, monkeypatch):
    done = []
    plain = run.TrainingRun.trainer
    monkeypatch.setattr(run, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(
        run.TrainingRun, "trainer", lambda *args, **kwargs: done.append("made") or plain(*args, **kwargs)
    )
    assert run_language_modeling.main([recipe_for(text, tmp_path / "run", max_steps=1), "--use_cpu"]) == 0
    assert done[-2:] == ["kept", "made"]
