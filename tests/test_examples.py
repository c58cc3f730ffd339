"""The examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_convert_and_compare(text, sentence_teacher, tmp_path):
    """What is printed is what the two models say; a longer training brings them nearer."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    cosines = {}
    for steps in (1, 40):
        options = [f"--max_steps={steps}", "--learning_rate=1e-2", "--per_device_train_batch_size=8", "--use_cpu"]
        options += ["--max_seq_length=24", "--config_overrides=local_context_size=5", "--data_cache_dir"]
        command = [sys.executable, "-m", "examples.convert_and_compare", sentence_teacher, text / "train.txt"]
        done = subprocess.run(
            [*command, tmp_path / str(steps), *options, tmp_path / "cache"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        cosines[steps], correlation = map(float, re.findall(r": (-?\d\.\d{3})$", done.stdout, flags=re.MULTILINE))
    assert cosines[1] < cosines[40] <= 1

    lines = [line for line in (text / "train.txt").read_text().splitlines() if line.strip()]
    models = [
        sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        for folder in (sentence_teacher, tmp_path / "40")
    ]
    before, after = (model.encode(lines, normalize_embeddings=True) for model in models)
    assert (before * after).sum(1).mean() == pytest.approx(cosines[40], abs=1e-3)
    of_pairs = [[one @ other for i, one in enumerate(vectors) for other in vectors[:i]] for vectors in (before, after)]
    assert np.corrcoef(of_pairs)[0, 1] == pytest.approx(correlation, abs=1e-3)
