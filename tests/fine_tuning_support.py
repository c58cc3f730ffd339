"""What the tests of fine-tuning share: a tiny model, and tiny data of texts and of tagged words."""

import csv
import random

from transformers import AutoTokenizer

from configuration_lambdabert import LambdaBertConfig
from modeling_lambdabert import LambdaBertForMaskedLM
from training_support import WORDS

CLASSES = {"the fox": "animal", "the cat": "animal", "a sailor": "person", "the old king": "person"}


def save_tiny_model(tokenizer_folder, folder):
    """Saves a tiny masked language model with position embeddings for 40 tokens; returns its folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    shape = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_lambda_queries=4, key_depth=4)
    config = LambdaBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=40, local_context_size=5, hidden_dropout_prob=0.0, **shape
    )
    LambdaBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentence(rng, subject):
    return " ".join([subject, *(rng.choice(WORDS[part]) for part in ("verb", "object", "place"))])


def labelled(count, seed):
    rng = random.Random(seed)
    subjects = [rng.choice(list(CLASSES)) for _ in range(count)]
    return [(sentence(rng, subject), CLASSES[subject]) for subject in subjects]


def tagged(count, seed):
    """Sentences whose subject is an entity of its class."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        subject = rng.choice(list(CLASSES))
        words = sentence(rng, subject).split()
        inside = len(subject.split()) - 1
        kind = CLASSES[subject]
        rows.append((words, [f"B-{kind}", *[f"I-{kind}"] * inside, *["O"] * (len(words) - inside - 1)]))
    return rows


def write_csv(file, head, rows):
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([head, *rows])
    return str(file)


def write_conll(file, rows):
    file.write_text("\n\n".join("\n".join(map("\t".join, zip(*row))) for row in rows) + "\n")
    return str(file)
