"""Sentences of a document, and the segments that are cut and paired of them, as token offsets."""

import itertools
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import sentencex

LONGEST_SPLIT = 1 << 16  # characters
RANDOM_SEGMENT_TRIES = 8
WIDE_SPACE = re.compile(r"[^\S\n\t ]")


def split_sentences(text: str, language: str = "en") -> list[str]:
    """Splits a document into sentences. A line break ends a sentence.

    A sentence keeps one blank in front where there is white space, for tokenizers to which "The" and " The" are
    different tokens.
    """
    sentences: list[str] = []
    blank = ""
    for paragraph in text.split("\n"):
        for part in (part for stretch in _stretches(paragraph) for part in _segment(language, stretch)):
            sentence = part.strip()
            if sentence:
                sentences.append((" " if part[0].isspace() else blank) + sentence if sentences else sentence)
                blank = ""
            if part and part[-1].isspace():
                blank = " "
        blank = " "
    return sentences


def _segment(language: str, stretch: str) -> list[str]:
    try:
        return sentencex.segment(language, stretch)
    except BaseException as error:  # a PanicException is no Exception
        if type(error).__name__ != "PanicException":
            raise
        # sentencex 1.0.32 counts a no-break space before a full stop as one byte
        return sentencex.segment(language, WIDE_SPACE.sub(" ", stretch))


def cut_sentences(sentence_lengths: Iterable[int], longest: int) -> list[int]:
    """Cuts sentences longer than `longest` into even parts.

    Args:
        sentence_lengths: tokens in each sentence of a document.
        longest: most tokens a part may have.

    Returns:
        The token at which each part starts, and the end of the last.
    """
    parts = (part for length in sentence_lengths for part in _even_parts(length, -(-length // longest)))
    return list(itertools.accumulate(parts, initial=0))


def sentence_bounds(sentence_lengths: Iterable[int], longest: int) -> list[int]:
    """As `cut_sentences`, but a lone part is cut in two."""
    bounds = cut_sentences(sentence_lengths, longest)
    if len(bounds) == 2 and bounds[1] > 1:
        return list(itertools.accumulate(_even_parts(bounds[1], 2), initial=0))
    return bounds


class Pair(NamedTuple):
    """Two neighbouring segments of a document, as token offsets: A is [start, middle), B is [middle, stop).

    Attributes:
        start: first token of A.
        middle: first token of B.
        stop: end of B.
        room: most tokens that another segment in B's place may have.
        positive: whether A and B stay as they are.
    """

    start: int
    middle: int
    stop: int
    room: int
    positive: bool


def draw_pairs(
    bounds: list[int], budget: int, short_seq_probability: float, rng: random.Random, *, replace_second: bool
) -> Iterator[Pair]:
    """Cuts a document into pairs of segments of whole sentences; each sentence is in at least one pair.

    A sentence that would be left alone at the end is paired with the one before it.

    Args:
        bounds: as `sentence_bounds` gives them, no sentence longer than half of `budget`.
        budget: most tokens in A and B together.
        short_seq_probability: share of pairs that aim at a random length of 2 to `budget` tokens.
        rng: decides lengths, the place of the cut, and which half of the pairs is positive.
        replace_second: whether the B of a negative pair is replaced (NSP), so that its text is left for the next
            pair.
    """
    last = len(bounds) - 1
    position = 0
    while position < last and last > 1:
        left_alone = position == last - 1
        first = position - left_alone
        target = rng.randint(2, budget) if rng.random() < short_seq_probability else budget
        stop = max(bisect_right(bounds, bounds[first] + target) - 1, first + 2)
        limit = max(bounds[stop] - bounds[first], target)
        middle = rng.randrange(first + 1, stop)
        positive = rng.random() < 0.5
        if positive or not replace_second:
            position = stop
        else:
            if left_alone:
                first, middle = position, last
            position = middle
        room = limit - (bounds[middle] - bounds[first])
        yield Pair(bounds[first], bounds[middle], bounds[stop], room, positive)


def draw_random_segment(sentence_lengths: np.ndarray, room: int, rng: random.Random) -> slice:
    """Draws whole sentences from a random place that fit into `room` tokens; only if few fit, the head of one.

    Args:
        sentence_lengths: tokens in each sentence of a document [sentences].
        room: most tokens to draw.
        rng: decides the place.
    """
    for _ in range(RANDOM_SEGMENT_TRIES):
        first = rng.randrange(len(sentence_lengths))
        if sentence_lengths[first] <= room:
            break
    start = int(sentence_lengths[:first].sum())
    ends = np.cumsum(sentence_lengths[first : first + room])
    fitting = ends[ends <= room]
    return slice(start, start + int(fitting[-1] if len(fitting) else room))


def draw_stretches(length: int, budget: int, first: int) -> Iterator[slice]:
    """Cuts `length` tokens into a stretch of `first` tokens and then stretches of `budget` tokens, the last as is."""
    starts = itertools.chain((0,), range(first, length, budget))
    for start, stop in itertools.pairwise(itertools.chain(starts, (length,))):
        yield slice(start, stop)


def _even_parts(length: int, count: int) -> list[int]:
    cuts = [length * part // count for part in range(count + 1)]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


def _stretches(paragraph: str) -> Iterator[str]:
    """Cuts an enormous line at spaces, so that the sentence splitter and the tokenizer hold bounded memory."""
    start = 0
    while len(paragraph) - start > LONGEST_SPLIT:
        stop = paragraph.rfind(" ", start, start + LONGEST_SPLIT)
        stop = stop if stop > start else start + LONGEST_SPLIT
        yield paragraph[start:stop]
        start = stop
    yield paragraph[start:]
