"""Tokenizers: what pretraining needs of one, and WordPiece trained on a text."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import FixedLength, Sequence
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

NAMED_SPECIAL_TOKENS = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
UNKNOWN_WORD = "<unk>"  # WikiText's mark for a rare word
UNKNOWN_TOKEN = "[UNK]"
LARGEST_ALPHABET = 1000  # characters, and half of a larger vocabulary: Chinese has thousands
LONGEST_WORD = 100  # characters


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, pairs: bool = False, whole_word_mask: bool = False) -> None:
    """Refuses a tokenizer with which examples cannot be made or masked.

    Raises:
        ValueError: a special token is missing or not put around a text, the tokenizer is not a fast one, `pairs` are
            to be made and it joins two texts in another way than BERT's, or whole words are to be masked and it does
            not mark the parts of words, as WordPiece does.
    """
    missing = [name for name in NAMED_SPECIAL_TOKENS if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}: use a BERT-like tokenizer "
            "(--tokenizer_name google-bert/bert-base-cased), train one (--train_tokenizer), or add them with "
            "tokenizer.add_special_tokens."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} is not backed by the `tokenizers` library: use a fast one."
        )
    ids = tokenizer("a")["input_ids"]
    if not (ids and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} does not put {tokenizer.cls_token} before a text and "
            f"{tokenizer.sep_token} behind it, as training does, so that the model would be used on other inputs: give "
            "it a post-processor that does (tokenizers.processors.TemplateProcessing), and save it again."
        )
    if pairs and not joins_as_bert(tokenizer):
        cls, sep = tokenizer.cls_token, tokenizer.sep_token
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} does not join two texts as {cls} A {sep} B {sep} with token "
            "types 0 and 1, as training on pairs does, so that the model would be used on other inputs: use "
            "--objective mlm or another tokenizer (a vocab.txt alone is read as BERT's), or give it a post-processor "
            "that does (tokenizers.processors.TemplateProcessing) and token_type_ids among its model_input_names, and "
            "save it again."
        )
    if whole_word_mask and not word_part_prefix(tokenizer):
        raise ValueError(
            f"whole_word_mask=True needs a WordPiece tokenizer, whose word parts are marked; "
            f"{tokenizer.name_or_path!r} is not one: use another tokenizer, or leave whole_word_mask out."
        )


def joins_as_bert(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether two texts A and B become [CLS] A [SEP] B [SEP], with token type 1 from B on."""
    joined = tokenizer("a", "b")
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    end = [tokenizer.sep_token_id]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    return (
        joined["input_ids"] == [tokenizer.cls_token_id, *first, *end, *second, *end]
        and joined.get("token_type_ids") == types
    )


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = False, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Trains a BERT tokenizer (WordPiece) on text. The same text and settings always give the same tokenizer.

    It differs from BERT's in one thing: a word of more than 100 characters, as in text without spaces, is cut into
    words of 100, where BERT's would make it a single unknown token.

    Args:
        texts: documents, which are iterated over several times. `<unk>` in them is not learned.
        vocab_size: largest number of tokens, special ones included.
        lowercase: whether to drop case and accents.
        max_length: stored as the tokenizer's `model_max_length`.

    Raises:
        ValueError: `texts` is an iterator, which has only one pass; there is no text; or `vocab_size` is
            smaller than the alphabet of the texts needs.
    """
    if isinstance(texts, Iterator):
        raise ValueError("texts is an iterator, which is empty after the first pass: give a list, or a DocumentTexts.")
    blank = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    alphabet, word_parts = _pieces_of_one_character(texts, blank, max(LARGEST_ALPHABET, vocab_size // 2))
    if not alphabet:
        raise ValueError("There is no text to train a tokenizer on: check the training files.")
    smallest = len(blank.get_vocab()) + len(alphabet) + len(word_parts)
    if smallest > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: special tokens and the characters of this text need {smallest}."
        )
    special_tokens = [token for token, _ in sorted(blank.get_vocab().items(), key=lambda item: item[1])]
    # The trainer prefers smaller ids among equally frequent pairs, and would number word parts in the random order of
    # a hash map; what it takes for special tokens is numbered as given.
    vocabulary = _trained_vocabulary(
        texts,
        blank,
        vocab_size=vocab_size,
        special_tokens=special_tokens + word_parts,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    trained = _blank_wordpiece(blank)
    trained.model = WordPiece(vocabulary, unk_token=UNKNOWN_TOKEN, max_input_chars_per_word=LONGEST_WORD)
    trained.post_processor = blank.post_processor
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        model_max_length=max_length,
        model_input_names=BertTokenizer.model_input_names,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )


def _pieces_of_one_character(texts: Iterable[str], blank: Tokenizer, largest: int) -> tuple[list[str], list[str]]:
    """The characters to learn, at most `largest`, and those of them that occur within words, as "##x"."""
    pieces = _trained_vocabulary(texts, blank, vocab_size=0)
    alphabet = {piece for piece in pieces if len(piece) == 1}
    if len(alphabet) > largest:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(blank.normalizer.normalize_str(text))
        alphabet = set(sorted(alphabet, key=lambda character: (-counts[character], character))[:largest])
    return sorted(alphabet), sorted(piece for piece in pieces if len(piece) > 1 and piece[-1] in alphabet)


def _trained_vocabulary(texts: Iterable[str], blank: Tokenizer, **settings: Any) -> dict[str, int]:
    tokenizer = _blank_wordpiece(blank)
    known = (text.replace(UNKNOWN_WORD, " ") for text in texts)
    tokenizer.train_from_iterator(known, WordPieceTrainer(min_frequency=0, show_progress=False, **settings))
    return tokenizer.get_vocab()


def _blank_wordpiece(blank: Tokenizer) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({}, unk_token=UNKNOWN_TOKEN))
    tokenizer.normalizer = blank.normalizer
    tokenizer.decoder = blank.decoder
    tokenizer.pre_tokenizer = Sequence([blank.pre_tokenizer, FixedLength(LONGEST_WORD)])
    return tokenizer


def word_part_prefix(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What marks the tokens that continue a word, "##" in BERT's; None or "" where nothing does."""
    return getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)


def word_continues(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Whether each token of a WordPiece vocabulary continues the word before it: [vocab_size]."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    prefix = word_part_prefix(tokenizer) or ""
    return torch.tensor([token is not None and token.startswith(prefix) for token in tokens])


def id_type(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """The smallest type that is used for its token ids."""
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The rules of a tokenizer, without padding and truncation, which calls change."""
    return {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides the ids."""
    return json.dumps(tokenizer_rules(tokenizer) | {"special_tokens": tokenizer.special_tokens_map})
