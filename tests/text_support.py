"""What the tests of text share: small sources, and documents of numbered tokens."""

import itertools
import json
import logging
import random

import pyarrow as pa
import pyarrow.parquet as pq

from lambdabert.text.arguments import CorpusArguments, DataArguments
from lambdabert.text.documents import DocumentTexts
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus

DOCUMENTS = [
    "Rivers carry water to the sea.\nSome of them are long.",
    "Bread is baked from flour.",
    "Café owners rise early.\nThey open at six.\nThey close at nine.",
]


BLANK_LINE_TEXT = "\n\n".join(DOCUMENTS) + "\n"


WIKITEXT = """ 
 = First title = 
 
 A 17 @-@ year @-@ old sold 1 @,@ 000 kites . 
 
 = = Section = = 
 
 It cost 3 @.@ 5 pounds , where x 
 = 5 and y = 
 2 . 
 
 = Second title = 
 
 Another article . 
"""


def arguments(tmp_path, **fields):
    return CorpusArguments(data_cache_dir=str(tmp_path / "cache"), **fields)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def training_texts(tmp_path, **fields):
    documents = load_corpus(arguments(tmp_path, **fields), evaluate=False)["train"]
    return list(DocumentTexts(documents))


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


PAD, UNKNOWN, START, END, MASK = range(5)


MAX_LENGTH = 24


NUMBER_OF_TOKENS = 9_000


class NumberedDocuments:
    """Documents whose tokens are all different, so that each segment shows where it comes from."""

    def __init__(self, sentence_lengths):
        numbers = itertools.count(len(SPECIAL_TOKENS))
        self.documents = [
            [list(itertools.islice(numbers, length)) for length in document] for document in sentence_lengths
        ]
        self.position = {}
        self.sentence_starts, self.sentence_ends = set(), set()
        for index, document in enumerate(self.documents):
            for sentence in document:
                self.sentence_starts.add(sentence[0])
                self.sentence_ends.add(sentence[-1])
                self.position.update(dict.fromkeys(sentence, index))

    def texts(self):
        return ["\n".join(" ".join(f"t{number}" for number in s) for s in document) for document in self.documents]

    def write(self, folder):
        path = folder / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts()))
        return str(path)

    def tokens(self):
        return set(self.position)


def random_documents(count=60, longest=MAX_LENGTH - 3, seed=0):
    rng = random.Random(seed)
    lengths = [[rng.randint(1, longest // 2) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    lengths += [[2], [7], [1, 1], [longest * 3], [1, longest * 2, 3]]
    return NumberedDocuments(lengths)


def prepare(folder, documents, tokenizer, training=True, seed=1, **fields):
    arguments = data_arguments(folder, train_file=documents.write(folder), **fields)
    loaded = load_corpus(arguments, evaluate=False)["train"]
    return prepare_examples(loaded, tokenizer, arguments.example_recipe(), seed=seed, training=training)


def data_arguments(folder, **fields):
    fields = {"max_seq_length": MAX_LENGTH, "data_cache_dir": str(folder / "cache")} | fields
    return DataArguments(**fields)


def segments(example):
    """Takes an example apart and checks its special tokens, types and length."""
    ids = example["input_ids"]
    assert len(ids) <= MAX_LENGTH
    assert ids[0] == START
    assert ids[-1] == END
    middle = ids.index(END)
    first, second = ids[1:middle], ids[middle + 1 : -1]
    assert first
    assert second
    assert not set(first + second) & set(range(5))
    assert example["token_type_ids"] == [0] * (middle + 1) + [1] * (len(second) + 1)
    return first, second


def warnings_in(caplog) -> list[str]:
    """What was logged as a warning or worse."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
