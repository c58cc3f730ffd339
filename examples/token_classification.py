"""Fine-tunes a LambdaBERT to find entities.

    python -m examples.token_classification --train_file wnut17/train.conll --validation_file wnut17/dev.conll \
        --test_file wnut17/test.conll --num_train_epochs 10 --learning_rate 1e-3 --output_dir models/wnut17

A CoNLL file has a line for each word, which starts with the word and ends with its BIO tag, and a blank line after each
sentence. JSON files and data sets of the hub have a list of words and one of tags a row. The result is a folder for
`pipeline("token-classification", aggregation_strategy="first")`: only the first piece of a word is trained to have its
label, and without that the pipeline prints those of the other pieces too.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, Trainer

from examples.common import (
    READERS,
    Metrics,
    Options,
    Training,
    parse,
    read_splits,
    read_table,
    run,
    train_and_evaluate,
)

IGNORED_LABEL = -100
CONLL = (".conll", ".txt")


@dataclass
class TagOptions(Options):
    words_column: str = field(default="tokens", metadata={"help": "Column of the words, without CoNLL files."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column of the tags, without CoNLL files."})


def read_tagged(file: str, options: TagOptions) -> Dataset:
    """Reads the sentences of a CoNLL file, or a table. Raises ValueError."""
    if not file.lower().endswith(CONLL):
        if not file.lower().endswith(tuple(READERS)):
            raise ValueError(f"{file}: the name should end in {', '.join((*CONLL, *READERS))}, as its format does.")
        return read_table(file)
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read as UTF-8 ({error}).") from error
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(text.split("\n"), start=1):
        columns = line.split()
        if not columns:
            sentences.append([])
        elif len(columns) == 1:
            raise ValueError(f"{file}, line {number}: {columns[0]!r} has no tag behind it.")
        elif columns[0] != "-DOCSTART-":
            sentences[-1].append(columns)
    words = [[columns[0] for columns in sentence] for sentence in sentences if sentence]
    tags = [[columns[-1] for columns in sentence] for sentence in sentences if sentence]
    return Dataset.from_dict({options.words_column: words, options.tags_column: tags})


def with_tag_names(splits: DatasetDict, words_column: str, column: str) -> tuple[DatasetDict, list[str]]:
    """Tags as names, and all of them: those that the data set declares, or those of the training data, sorted.

    Raises:
        ValueError: words without tags or tags without words, another split has a tag that the training data lacks, or
            a tag is not BIO.
    """
    for split, rows in splits.items():
        for number, (words, tags) in enumerate(zip(rows[words_column], rows[column]), 1):
            if (
                isinstance(words, str)
                or isinstance(tags, str)
                or any(not isinstance(word, str) for word in words or ())
            ):
                raise ValueError(
                    f"row {number} of the {split} data: {words_column} and {column} take lists of words and tags, "
                    "which a CSV file cannot hold; use a CoNLL file, or JSON."
                )
            if words is None or tags is None or None in tags or len(words) != len(tags):
                raise ValueError(
                    f"{column}: row {number} of the {split} data has {len(tags or ())} tags for {len(words or ())} "
                    "words, or an empty one; give one for each word."
                )
    feature = getattr(splits["train"].features[column], "feature", None)
    if isinstance(feature, ClassLabel):
        known = feature.names
        splits = DatasetDict({split: with_names(rows, column, feature) for split, rows in splits.items()})
    else:
        known = sorted({tag for tags in splits["train"][column] for tag in tags})
    for split, rows in splits.items():
        for tag in sorted({str(tag) for tags in rows[column] for tag in tags}):
            if tag != "O" and tag[:2] not in ("B-", "I-"):
                raise ValueError(f"{column}={tag!r} of the {split} data is not a BIO tag: O, B-kind or I-kind.")
            if tag not in known:
                raise ValueError(f"{column}={tag!r} of the {split} data does not occur in the training data.")
    return splits, known


def with_names(rows: Dataset, column: str, feature: ClassLabel) -> Dataset:
    """Numbered tags as names."""
    names = [feature.int2str(tags) for tags in rows[column]]
    return rows.remove_columns(column).add_column(column, names)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence: kind, first word, and the word after the last.

    One starts at B, and at an I of another kind than the word before it. That is how CoNLL's own script counts.
    """
    found, start = set(), 0
    kinds = [tag[2:] for tag in tags]
    for i in range(1, len(tags) + 1):
        if i == len(tags) or tags[i].startswith("B-") or kinds[i] != kinds[i - 1]:
            if kinds[i - 1]:
                found.add((kinds[i - 1], start, i))
            start = i
    return found


def span_scores(predicted: Sequence[Sequence[str]], correct: Sequence[Sequence[str]]) -> Metrics:
    """Precision, recall and F1 of whole entities: kind, start and end have to be right."""
    found = {(i, *span) for i, tags in enumerate(predicted) for span in spans(tags)}
    wanted = {(i, *span) for i, tags in enumerate(correct) for span in spans(tags)}
    hits = len(found & wanted)
    return {
        "precision": hits / max(len(found), 1),
        "recall": hits / max(len(wanted), 1),
        "f1": 2 * hits / max(len(found) + len(wanted), 1),
    }


def main(argv: list[str] | None = None) -> Metrics:
    options, training = parse(argv, TagOptions, Training)
    columns = {"words_column": options.words_column, "tags_column": options.tags_column}
    splits = read_splits(options, columns, lambda file: read_tagged(file, options))
    splits, names = with_tag_names(splits, options.words_column, options.tags_column)
    numbers = {name: number for number, name in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForTokenClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id=numbers,
        ignore_mismatched_sizes=True,  # a head for other tags is replaced
        dtype=torch.float32,
    )

    def encode(rows: dict) -> dict:
        """Labels the first token of each word, and no other. `tagged` are the words that have tokens."""
        encoded = tokenizer(
            rows[options.words_column], is_split_into_words=True, truncation=True, max_length=options.max_seq_length
        )
        labels, tagged = [], []
        for i, tags in enumerate(rows[options.tags_column]):
            words = encoded.word_ids(i)
            first = [word is not None and word != before for word, before in zip(words, [None, *words])]
            labels.append([numbers[tags[word]] if new else IGNORED_LABEL for word, new in zip(words, first)])
            tagged.append([word for word, new in zip(words, first) if new])
        return encoded | {"labels": labels, "tagged": tagged}

    encoded = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    trainer = Trainer(
        model,
        training,
        train_dataset=encoded["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )

    def evaluate(split: str) -> Metrics:
        output: Any = trainer.predict(encoded[split])
        correct = splits[split][options.tags_column]
        predicted = [["O"] * len(tags) for tags in correct]  # of words without tokens, as when cut off, too
        for tags, words, row, labels in zip(
            predicted, encoded[split]["tagged"], output.predictions.argmax(-1), output.label_ids, strict=True
        ):
            for word, number in zip(words, row[labels != IGNORED_LABEL], strict=True):
                tags[word] = names[number]
        return span_scores(predicted, correct)

    return train_and_evaluate(trainer, splits, evaluate)


if __name__ == "__main__":
    sys.exit(run(main))
