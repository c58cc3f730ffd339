"""Fine-tunes a LambdaBERT to find answers to questions in a text.

    python -m examples.question_answering --dataset_name rajpurkar/squad --learning_rate 5e-4 --output_dir models/squad

Each row has a question, a context and, as in SQuAD, answers: lists of `text` and `answer_start`, the character at which
it stands in the context. A long context is read in overlapping stretches. Every question has an answer here: data like
SQuAD 2.0 is refused. SQuAD's own JSON files are nested and have no such rows; the data set of the hub has.
"""

import collections
import re
import string
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy.special import log_softmax
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase, Trainer

from examples.common import (
    Metrics,
    Options,
    Training,
    check_smoothing,
    parse,
    read_splits,
    read_table,
    run,
    train_and_evaluate,
)

COLUMNS = {name: name for name in ("question", "context", "answers")}
LONGEST_ANSWER = 30  # tokens


@dataclass
class AnswerOptions(Options):
    max_seq_length: int = field(default=256, metadata={"help": "Tokens of a question and a stretch of its context."})
    stride: int = field(default=64, metadata={"help": "Tokens that two stretches of a context share."})


SPECIAL_TOKENS = 3  # [CLS] and [SEP] twice


def read_flat(file: str) -> Dataset:
    """Reads a table. Raises ValueError, also if it is nested as SQuAD's own files are."""
    rows = read_table(file)
    if "data" in rows.column_names and "question" not in rows.column_names:
        raise ValueError(
            f"{file} has no column question, but data, as SQuAD's own nested files have: write one row a question, or "
            "give --dataset_name rajpurkar/squad in place of files."
        )
    return rows


def read_questions(options: AnswerOptions) -> DatasetDict:
    """The splits. Raises ValueError if a question has no answer, or an answer is not where it should be."""
    if options.stride < 0:
        raise ValueError(f"stride={options.stride}: give 0 or more tokens.")
    splits = read_splits(options, COLUMNS, read_flat)
    for split, rows in splits.items():
        for question, context, answers in zip(rows["question"], rows["context"], rows["answers"]):
            if not all(isinstance(text, str) and text.strip() for text in (question, context)):
                raise ValueError(
                    f"The {split} data has a row without a question or a context: question={question!r}, "
                    f"context={str(context)[:50]!r}."
                )
            if not (isinstance(answers, dict) and {"text", "answer_start"} <= answers.keys()):
                raise ValueError(
                    f"answers={answers!r} of the {split} data: it takes {{'text': [...], 'answer_start': [...]}}, as "
                    "SQuAD has."
                )
            if not answers["text"] or not str(answers["text"][0]).strip():
                raise ValueError(f"The {split} data has a question without an answer, about {context[:50]!r}.")
            texts, starts = answers["text"], answers["answer_start"]
            are_lists = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
            if not are_lists or not all(isinstance(start, int) for start in starts):
                raise ValueError(
                    f"answers={answers!r} of the {split} data: text and answer_start are lists, a number for each text."
                )
            answer, start = texts[0], starts[0]
            if context[start : start + len(answer)] != answer:
                raise ValueError(f"answer_start={start} is not where {answer!r} stands in {context[:50]!r}.")
    return splits


def encode(rows: dict, tokenizer: PreTrainedTokenizerBase, options: AnswerOptions) -> dict:
    """Question and stretch of the context as one input; several for a long context.

    Adds `row`, the number of the question in `rows`; `offsets`, the characters [start, end) of each token of the
    context, -1 of others; and the answer's first and last token, 0 where the stretch does not hold all of it.
    """
    for question, ids in zip(rows["question"], tokenizer(rows["question"], add_special_tokens=False)["input_ids"]):
        if len(ids) + SPECIAL_TOKENS + options.stride >= options.max_seq_length:
            raise ValueError(
                f"max_seq_length={options.max_seq_length}: a question has {len(ids)} tokens, which leaves no room for "
                f"a context with stride={options.stride}; give more, or shorten {question[:50]!r}."
            )
    encoded = tokenizer(
        rows["question"],
        rows["context"],
        truncation="only_second",
        max_length=options.max_seq_length,
        stride=options.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    encoded["row"] = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    encoded["offsets"] = [
        [span if part == 1 else (-1, -1) for span, part in zip(spans, encoded.sequence_ids(i))]
        for i, spans in enumerate(offsets)
    ]
    places = [answer_tokens(spans, rows["answers"][row]) for spans, row in zip(encoded["offsets"], encoded["row"])]
    encoded["start_positions"], encoded["end_positions"] = map(list, zip(*places))
    return encoded


def answer_tokens(offsets: list[tuple[int, int]], answers: dict) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), which is [CLS], if it does not lie within these tokens."""
    text = answers["text"][0]
    start = answers["answer_start"][0] + len(text) - len(text.lstrip())  # no token holds the blanks around an answer
    end = start + len(text.strip())
    first = [i for i, (begin, stop) in enumerate(offsets) if begin <= start < stop]
    last = [i for i, (begin, stop) in enumerate(offsets) if begin < end <= stop]
    return (first[0], last[0]) if first and last else (0, 0)


def best_span(starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray) -> tuple[float, int, int]:
    """The likeliest answer in a stretch: its log probability, its first character, and the one after the last.

    Args:
        starts, ends: logits [N]
        offsets: characters of each token [N, 2], -1 outside the context.
    """
    # probabilities, unlike logits, compare between stretches: one without the answer gives them to [CLS]
    scores = log_softmax(starts)[:, None] + log_softmax(ends)[None]
    allowed = np.tril(np.triu(np.ones_like(scores, dtype=bool)), k=LONGEST_ANSWER - 1)
    inside = offsets[:, 0] >= 0
    scores = np.where(allowed & inside[:, None] & inside[None], scores, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(offsets[first, 0]), int(offsets[last, 1])


def find_answers(rows: Dataset, stretches: Dataset, starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The best answer to each question, over the stretches of its context; logits are [stretches, N]."""
    best = [(-np.inf, 0, 0)] * len(rows)
    for row, offsets, start, end in zip(stretches["row"], stretches["offsets"], starts, ends, strict=True):
        tokens = len(offsets)
        best[row] = max(best[row], best_span(start[:tokens], end[:tokens], np.array(offsets)))
    return [context[start:end] for context, (_, start, end) in zip(rows["context"], best)]


def normalized(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles, as SQuAD compares them."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(answer: str, correct: str) -> float:
    """F1 of the words of an answer; 1 if neither has any."""
    found, wanted = collections.Counter(normalized(answer)), collections.Counter(normalized(correct))
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def answer_scores(answers: list[str], references: list[list[str]]) -> Metrics:
    """Exact match and F1 of words, each with the nearest of a question's references."""
    exact = [
        max(normalized(answer) == normalized(text) for text in texts) for answer, texts in zip(answers, references)
    ]
    f1 = [max(word_f1(answer, text) for text in texts) for answer, texts in zip(answers, references)]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def main(argv: list[str] | None = None) -> Metrics:
    options, training = parse(argv, AnswerOptions, Training)
    check_smoothing(training)
    splits = read_questions(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForQuestionAnswering.from_pretrained(options.model, dtype=torch.float32)
    stretches = DatasetDict(
        {
            # in one batch, so that a stretch knows the row of its question
            split: rows.map(
                lambda batch: encode(batch, tokenizer, options),
                batched=True,
                batch_size=None,
                remove_columns=rows.column_names,
            )
            for split, rows in splits.items()
        }
    )
    trainer = Trainer(model, training, train_dataset=stretches["train"], processing_class=tokenizer)

    def evaluate(split: str) -> Metrics:
        logits: Any = trainer.predict(stretches[split]).predictions
        answers = find_answers(splits[split], stretches[split], *logits)
        return answer_scores(answers, [answers["text"] for answers in splits[split]["answers"]])

    return train_and_evaluate(trainer, splits, evaluate)


if __name__ == "__main__":
    sys.exit(run(main))
