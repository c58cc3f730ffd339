"""Turns a sentence encoder into a LambdaBERT, on one text, and compares the two on it.

python -m examples.convert_and_compare sentence-transformers/all-MiniLM-L6-v2 my_text.txt models/mine --max_steps=500
"""

import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from distill_from_bert import main

if len(sys.argv) < 4:
    sys.exit("error: give the teacher, a file of text and a new folder; options of distill_from_bert.py may follow")
teacher, text, folder, *options = sys.argv[1:]
if main(["--teacher", teacher, "--train_file", text, "--output_dir", folder, "--do_train", *options]):
    sys.exit(1)

lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()][:500]
before = SentenceTransformer(teacher).encode(lines, normalize_embeddings=True)  # [lines, D]
after = SentenceTransformer(folder, trust_remote_code=True).encode(lines, normalize_embeddings=True)
of_pairs = [(vectors @ vectors.T)[np.triu_indices(len(lines), k=1)] for vectors in (before, after)]
print(f"cosine of the teacher's and the student's vector of a line: {(before * after).sum(1).mean():.3f}")
print(f"correlation of their cosines of pairs of lines: {np.corrcoef(of_pairs)[0, 1]:.3f}")
