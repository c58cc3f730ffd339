"""Sentences are found, and pairs of them cover their document."""

import itertools
import random

import numpy as np
import pytest

from lambdabert.text.sentence_pairs import draw_pairs, sentence_bounds, split_sentences


@pytest.mark.parametrize("sentence_lengths", [[1, 2], [5, 5, 5], [100], [9, 1, 9, 1, 9], [3] * 50])
def test_drawn_pairs_end_and_cover_the_document(sentence_lengths):
    budget = 20
    bounds = sentence_bounds(sentence_lengths, budget // 2)
    assert max(np.diff(bounds)) <= budget // 2
    for seed, replace_second in itertools.product(range(50), (False, True)):
        pairs = list(draw_pairs(bounds, budget, 0.3, random.Random(seed), replace_second=replace_second))
        covered = set()
        for pair in pairs:
            assert pair.start < pair.middle
            assert pair.stop - pair.start <= budget
            assert 1 <= pair.room <= budget - (pair.middle - pair.start)
            replaced = replace_second and not pair.positive
            covered |= set(range(pair.start, pair.middle if replaced else pair.stop))
        assert covered == set(range(sum(sentence_lengths)))


def stripped(text):
    return [sentence.strip() for sentence in split_sentences(text)]


SENTENCES = [
    "Dr. Smith moved to Washington, D.C. in 1990.",
    "It cost $3.5 million, i.e. a lot!",
    "Was it J. R. R. Tolkien's idea?",
    "St. Louis won 3 – 2.",
]


def test_sentences_survive_abbreviations_and_spaced_full_stops():
    assert stripped(" ".join(SENTENCES) + "\n\n Next line \n") == [*SENTENCES, "Next line"]
    spaced = ["The U.S. Army left Dr. Brown 's house in 1990 .", "It rained , and nobody came ."]
    assert stripped(" ".join(spaced)) == spaced


def test_a_blank_before_a_sentence_is_kept():
    assert split_sentences("  One.  Two. Three.\n\n Four.\nFive. ") == ["One.", " Two.", " Three.", " Four.", " Five."]
    assert split_sentences("一句。二句。\n三句。", "zh") == ["一句。", "二句。", " 三句。"]


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u3000"])
def test_wide_white_space_before_a_full_stop(space):
    """sentencex 1.0.32 panics at it."""
    text = f"Oranges hold much vitamin C{space}. They are good. Apples are too."
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split()) and len(sentences) >= 2
