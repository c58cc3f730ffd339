"""Sentences are found, and pairs of them cover their document."""

import itertools
import random

import numpy as np
import pytest
from datasets import Dataset

from lambdabert.text.examples import DocumentPool
from lambdabert.text.sentence_pairs import draw_pairs, draw_random_segment, sentence_bounds, split_sentences


def test_every_other_document_lends_its_segments_alike():
    documents = Dataset.from_dict({"input_ids": [[i] for i in range(20)], "sentence_lengths": [[1]] * 20})
    usable = np.array([i for i in range(20) if i not in (0, 7, 19)])
    pool, rng = DocumentPool(documents, usable), random.Random(0)
    drawn = np.bincount([int(pool.draw_other(5, rng).ids[0]) for _ in range(4000)], minlength=20)
    others = [i for i in usable if i != 5]
    assert drawn[[0, 5, 7, 19]].sum() == 0
    assert 180 < drawn[others].min() and drawn[others].max() < 330, "4000 / 16, and five standard deviations"


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


class TestDrawnLengths:
    """Of segments that aim at 20 tokens, or at a random number up to 20 if they are short."""

    def pairs(self, sentence_lengths, *, short, replace_second):
        bounds = sentence_bounds(sentence_lengths, 10)
        return [
            pair
            for seed in range(50)
            for pair in draw_pairs(bounds, 20, float(short), random.Random(seed), replace_second=replace_second)
        ]

    def test_a_short_pair_has_any_length(self):
        pairs = self.pairs([1] * 60, short=True, replace_second=False)
        assert {pair.stop - pair.start for pair in pairs if pair.stop < 60} == set(range(2, 21))

    def test_the_first_segment_has_any_number_of_sentences(self):
        pairs = self.pairs([1] * 20, short=False, replace_second=False)
        assert len({pair.middle - pair.start for pair in pairs}) > 10

    def test_a_random_second_segment_has_the_room_of_a_true_one(self):
        pairs = self.pairs([3] * 50, short=False, replace_second=True)
        assert all(pair.room == 20 - (pair.middle - pair.start) for pair in pairs)
        pairs = self.pairs([1] * 60, short=True, replace_second=True)
        assert np.mean([pair.middle - pair.start + pair.room for pair in pairs]) < 0.75 * 20


@pytest.mark.parametrize(
    "sentence_lengths, room, segments",
    [
        ([2] * 9, 2, {(start, start + 2) for start in range(0, 18, 2)}),
        ([2, 2, 2, 4], 4, {(0, 4), (2, 6), (4, 6), (6, 10)}),
        ([9], 4, {(0, 4)}),
    ],
    ids=["one sentence", "as many as fit", "none fits"],
)
def test_a_random_segment_starts_at_any_sentence_and_takes_all_that_fit(sentence_lengths, room, segments):
    drawn = [draw_random_segment(np.array(sentence_lengths), room, random.Random(seed)) for seed in range(99)]
    assert {(segment.start, segment.stop) for segment in drawn} == segments


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
