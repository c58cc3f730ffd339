"""Tokenizers: which are refused, and those that are trained."""

import random

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.tokenizers import check_tokenizer, train_wordpiece
from text_support import SPECIAL_TOKENS, NumberedDocuments, prepare


@pytest.mark.parametrize("missing", ["mask_token", "cls_token", "sep_token", "pad_token", "unk_token"])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, tokenizer, missing):
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    del names[missing]
    incomplete = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    with pytest.raises(ValueError, match=f"no {missing}.*--train_tokenizer"):
        check_tokenizer(incomplete)
    with pytest.raises(ValueError, match=f"no {missing}"):
        prepare(tmp_path, NumberedDocuments([[2, 2], [2, 2]]), incomplete)


def test_whole_words_need_a_tokenizer_that_marks_word_parts(tokenizer):
    backend = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(SPECIAL_TOKENS)}, unk_token="[UNK]")
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    with pytest.raises(ValueError, match=r"does not put \[CLS\] before a text and \[SEP\] behind it"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
    ends = [(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    check_tokenizer(other)
    with pytest.raises(ValueError, match="whole_word_mask=True needs a WordPiece tokenizer"):
        check_tokenizer(other, whole_word_mask=True)
    with pytest.raises(ValueError, match="whole_word_mask=True needs a WordPiece tokenizer"):
        masking_collator(other, DataArguments(corpus="python-docs", whole_word_mask=True), seed=1, training=True)


TRAINING_TEXTS = [
    "The river <unk> runs to the sea and the sea is wide .",
    "Running rivers run ; wide seas widen <unk> .",
] * 5


def test_trained_tokenizer_works_like_any_other(tmp_path):
    trained = train_wordpiece(TRAINING_TEXTS, 90, max_length=64)
    check_tokenizer(trained)
    assert len(trained) <= 90
    assert not {"<", "unk", ">", "##nk"} & set(trained.get_vocab())
    assert trained.unk_token_id not in trained("The sea runs wide .")["input_ids"]
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 64
    assert loaded("The sea", "runs") == trained("The sea", "runs")
    assert 1 in loaded("The sea", "runs")["token_type_ids"]
    assert trained.tokenize("THE SEA") != trained.tokenize("the sea")
    lower = train_wordpiece(TRAINING_TEXTS, 90, lowercase=True)
    assert lower.tokenize("THE SEA") == lower.tokenize("the sea")


def words_of_equal_frequency(syllables, count=2000, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)]
    return [" ".join(rng.choices(words, k=200)) for _ in range(10)]


@pytest.mark.parametrize("syllables", ["ka ti mo re su la ni po".split(), list(map(chr, range(0xAC00, 0xB200)))])
def test_the_same_text_gives_the_same_tokenizer(syllables):
    texts = words_of_equal_frequency(syllables)
    vocabularies = [train_wordpiece(texts, 2500).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    letters = set("".join(texts)) - {" "}
    assert sum(len(piece) == 1 for piece in vocabularies[0]) == min(len(letters), 1250)


def test_a_trained_tokenizer_covers_text_without_spaces(tmp_path):
    rng = random.Random(0)
    lines = ["".join(rng.choices("ACGT", k=600)) for _ in range(20)]
    train_wordpiece(lines, 60).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(lines[0])["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == lines[0]


def test_tokenizer_training_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="empty after the first pass"):
        train_wordpiece(iter(TRAINING_TEXTS), 90)
    with pytest.raises(ValueError, match="vocab_size=8 is too small"):
        train_wordpiece(TRAINING_TEXTS, 8)
    with pytest.raises(ValueError, match="no text to train a tokenizer"):
        train_wordpiece([], 100)


def test_a_large_vocabulary_has_room_for_a_large_alphabet():
    characters = [chr(0x4E00 + i) for i in range(1500)]
    vocabulary = train_wordpiece(["".join(characters)], 6000).get_vocab()
    assert set(characters) <= set(vocabulary)
    assert len(set(characters) & set(train_wordpiece(["".join(characters)], 2100).get_vocab())) <= 1050
