"""Tokenizers: which are refused, and those that are trained."""

import dataclasses
import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.text.objectives import MLM, SENTENCES
from lambdabert.text.preparation import prepare_examples
from lambdabert.text.sources import load_corpus
from lambdabert.text.tokenizers import check_tokenizer, train_wordpiece
from text_support import SPECIAL_TOKENS, NumberedDocuments, data_arguments, json_lines, prepare, write

NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))


def template(pair: str | None) -> processors.TemplateProcessing:
    ends = [(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")]
    return processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)


@pytest.mark.parametrize("missing", ["mask_token", "cls_token", "sep_token", "pad_token", "unk_token"])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, tokenizer, missing):
    names = {name: token for name, token in NAMES.items() if name != missing}
    incomplete = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    with pytest.raises(ValueError, match=f"no {missing}.*--train_tokenizer"):
        check_tokenizer(incomplete)
    with pytest.raises(ValueError, match=f"no {missing}"):
        prepare(tmp_path, NumberedDocuments([[2, 2], [2, 2]]), incomplete)


@pytest.mark.parametrize(
    ("pair", "model_input_names"),
    [
        ("[CLS] $A [SEP] [SEP] $B [SEP]", ["input_ids", "token_type_ids"]),  # as RoBERTa's
        ("[CLS] $A [SEP] $B [SEP]", ["input_ids", "token_type_ids"]),  # all of type 0
        ("[CLS] $A [SEP] $B:1 [SEP]:1", ["input_ids", "attention_mask"]),  # as DistilBERT's
    ],
)
def test_pairs_need_a_tokenizer_that_joins_them_as_training_does(tmp_path, tokenizer, pair, model_input_names):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = template(pair)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=model_input_names, **NAMES)
    prepare(tmp_path, NumberedDocuments([[2, 2], [2, 2]]), other, objective="mlm")
    for objective in ("nsp", "sop"):
        with pytest.raises(
            ValueError, match=r"does not join two texts as \[CLS\] A \[SEP\] B \[SEP\] with token types"
        ):
            prepare(tmp_path, NumberedDocuments([[2, 2], [2, 2]]), other, objective=objective)
    backend.post_processor = template("[CLS] $A [SEP] $B:1 [SEP]:1")
    fitting = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "token_type_ids"], **NAMES
    )
    prepare(tmp_path, NumberedDocuments([[2, 2], [2, 2]]), fitting, objective="sop")


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, own blank", "Metaspace", "prepended blank"])
def test_text_becomes_what_a_tokenizer_that_sees_blanks_makes_of_it(tmp_path, kind):
    """To which "The" and " The" are different tokens. A sentence by itself is a text of its own."""
    sentences = ["The river runs to the sea.", "The sea is wide.", "Who sails it?", "The wind does."]
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    if kind.startswith("byte-level"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="own" in kind)
    elif kind == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        sentences, trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = template(None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    file = write(tmp_path / "text.jsonl", json_lines([{"text": "\n".join((" ".join(sentences[:2]), *sentences[2:]))}]))
    arguments = data_arguments(tmp_path, train_file=file, objective="mlm", max_seq_length=64)
    recipe = arguments.example_recipe()
    documents = load_corpus(arguments, evaluate=False)["train"]

    def ids(objective):
        recipe_of_it = dataclasses.replace(recipe, objective=objective)
        return prepare_examples(documents, tokenizer, recipe_of_it, seed=1, training=True)[0]["input_ids"]

    assert ids(MLM) == [tokenizer(" ".join(sentences))["input_ids"]]
    assert ids(SENTENCES) == tokenizer(sentences)["input_ids"]


@pytest.mark.parametrize("own_blank", [False, True])
def test_the_first_sentence_of_a_document_is_not_known_by_its_missing_blank(tmp_path, own_blank):
    """It tells whether a pair is in order. Here all sentences are the same."""
    sentence = "The sea is wide."
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=own_blank)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [sentence], trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = template("[CLS] $A [SEP] $B:1 [SEP]:1")
    names = ["input_ids", "token_type_ids"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **NAMES)
    file = write(tmp_path / "text.jsonl", json_lines([{"text": "\n".join([sentence] * 6)}] * 2))
    arguments = data_arguments(tmp_path, train_file=file, objective="sop", max_seq_length=64)
    documents = load_corpus(arguments, evaluate=False)["train"]
    examples, _ = prepare_examples(documents, tokenizer, arguments.example_recipe(), seed=1, training=True)
    unit = tokenizer(f" {sentence}" if not own_blank else sentence, add_special_tokens=False)["input_ids"]
    for ids in examples["input_ids"]:
        tokens = [token for token in ids if token not in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
        assert tokens == unit * (len(tokens) // len(unit))


def test_whole_words_need_a_tokenizer_that_marks_word_parts(tokenizer):
    backend = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(SPECIAL_TOKENS)}, unk_token="[UNK]")
    )
    with pytest.raises(ValueError, match=r"does not put \[CLS\] before a text and \[SEP\] behind it"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES))
    backend.post_processor = template(None)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
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
