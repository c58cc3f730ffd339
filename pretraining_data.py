"""From documents to masked examples: sentences, segments, sentence pairs, features and masks.

Three objectives, each beside masked language modelling:

    nsp     next sentence prediction (Devlin et al., "BERT", NAACL 2019, section 3.1): B follows A (label 0), or comes
            from another document (label 1).
    sop     sentence order prediction (Lan et al., "ALBERT", ICLR 2020, section 3.1): A and B follow one another, in
            order (label 0) or swapped (label 1).
    mlm     no sentence task: a document is cut into stretches of full length.

Distillation takes stretches too, or the sentences of a document each by itself ("sentences").

A pair is [CLS] A [SEP] B [SEP], a stretch or a sentence [CLS] A [SEP]. What is drawn at random depends only on the
seed and on the document (pairs) or the example (masks) itself, never on processes, batches, order or resuming.
"""

import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import random
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sentencex
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import FixedLength, Sequence
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from corpora import CorpusArguments, DocumentTexts, no_effect, worker_processes, written_to_cache

logger = logging.getLogger(__name__)

OBJECTIVES = ("nsp", "sop", "mlm")
SENTENCE_LABELS = {"nsp": "next_sentence_label", "sop": "sentence_order_label"}
LABEL_NAMES = {
    "nsp": ["labels", "next_sentence_label"],
    "sop": ["labels", "sentence_order_label"],
    "mlm": ["labels"],
}
NAMED_SPECIAL_TOKENS = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
UNKNOWN_WORD = "<unk>"  # WikiText's mark for a rare word
UNKNOWN_TOKEN = "[UNK]"
IGNORED_LABEL = -100

DEFAULT_LANGUAGE = "en"
DEFAULT_SHUFFLE_BUFFER = 10_000
DEFAULT_SHORT_SEQ_PROBABILITY = 0.1
DOCUMENTS_AT_A_TIME = 64
STREAMED_DOCUMENTS_AT_A_TIME = 256
CHARACTERS_AT_A_TIME = 1 << 18
LONGEST_SPLIT = 1 << 16  # characters
RANDOM_SEGMENT_TRIES = 8
LARGEST_ALPHABET = 1000
LONGEST_WORD = 100  # characters
# Shares above which a warning is given.
MUCH_UNKNOWN = 0.05
MANY_SINGLE_SENTENCES = 0.2
PREPARATION_CODE = Path(__file__).read_bytes()


@dataclass
class TextArguments(CorpusArguments):
    """Which text to read, how long examples are, and what is masked in them.

    Raises:
        ValueError: If a field holds a value that it cannot have, or two fields contradict each other.
    """

    language: str | None = field(
        default=None,
        metadata={"help": "ISO 639 code of the text's language, for finding sentences; en if not given."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longest example in tokens, special ones included."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens that are to be predicted."})
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "Share of the tokens to be predicted that [MASK] replaces."}
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Share of the tokens to be predicted that random tokens replace."}
    )
    whole_word_mask: bool = field(
        default=False, metadata={"help": "Choose whole words to be predicted instead of tokens."}
    )
    shuffle_buffer_size: int | None = field(
        default=None,
        metadata={"help": "Examples among which a stream is shuffled (with --streaming); 10000 if not given."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad each batch to a multiple of so many tokens."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
            self.check_share(name)
        if self.mlm_probability == 0:
            raise ValueError("mlm_probability=0 leaves nothing to predict: use 0.15 for example.")
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob={self.mask_replace_prob} and random_replace_prob={self.random_replace_prob} "
                "exceed 1 together: lower one of them."
            )
        for name in ("shuffle_buffer_size", "max_train_samples", "max_eval_samples", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                self.check_count(name)
        if self.shuffle_buffer_size is not None and not self.streaming:
            raise no_effect(self, "shuffle_buffer_size", "only a stream is shuffled in a buffer (streaming)")

    def check_share(self, name: str):
        if not 0 <= getattr(self, name) <= 1:
            raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")

    def check_count(self, name: str):
        if getattr(self, name) < 1:
            raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")

    def check_objective(self, objective: str):
        """Refuses a `max_seq_length` without room for text beside the special tokens, and options without effect."""
        shortest = _special_tokens(objective) + (2 if objective in SENTENCE_LABELS else 1)
        if self.max_seq_length < shortest:
            raise ValueError(
                f"max_seq_length={self.max_seq_length} is too small for objective={objective!r}, which needs "
                f"{shortest} tokens for its special tokens and text: raise it, to 128 for example."
            )
        if objective == "mlm" and self.language is not None:
            raise no_effect(self, "language", "text is not cut into sentences where there are no pairs")


@dataclass
class DataArguments(TextArguments):
    """Which text to read, and how it becomes masked examples.

    Raises:
        ValueError: If a field holds a value that it cannot have, or two fields contradict each other.
    """

    objective: str | None = field(
        default=None,
        metadata={
            "help": "Task beside masked language modelling: next sentence prediction (nsp, if not given), sentence "
            "order prediction (sop), or none (mlm).",
            "choices": list(OBJECTIVES),
        },
    )
    sop: bool = field(default=False, metadata={"help": "The same as --objective sop."})
    short_seq_probability: float | None = field(
        default=None, metadata={"help": "Share of pairs that aim at a random shorter length; 0.1 if not given."}
    )
    dupe_factor: int = field(
        default=1, metadata={"help": "How many times each training document is paired, differently each time."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sop and self.objective not in (None, "sop"):
            raise ValueError(f"sop=True contradicts objective={self.objective!r}: leave one of them out.")
        if self.objective is None:
            self.objective = "sop" if self.sop else "nsp"
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is unknown: use one of {', '.join(OBJECTIVES)}.")
        self.check_objective(self.objective)
        if self.short_seq_probability is not None:
            self.check_share("short_seq_probability")
            if self.objective == "mlm":
                raise no_effect(self, "short_seq_probability", "only pairs are shortened, and mlm has none")
        self.check_count("dupe_factor")


@dataclass(frozen=True)
class PreparationSummary:
    """What preparation found and made.

    Attributes:
        unknown_share: Share of the text's tokens that are unknown, and so never predicted.
        single_sentence_share: Share of the documents whose A and B are two halves of their only sentence; None
            without pairs.
        documents: Documents with text; of a stream, those that the shares were taken from.
        skipped_rows: Rows without text, which were left out; None of a stream, as all below.
        short_documents: Documents of a single token, too short for a pair, which were left out.
        sentences: Sentences in all documents.
        examples: Examples made of them.
        tokens: Tokens in the examples, special ones included; none is padding.
        cache_directory: Where the examples are kept.
    """

    unknown_share: float
    single_sentence_share: float | None
    documents: int
    skipped_rows: int | None = None
    short_documents: int | None = None
    sentences: int | None = None
    examples: int | None = None
    tokens: int | None = None
    cache_directory: str | None = None

    def __str__(self) -> str:
        if self.examples is None:
            return f"streamed; in the first {self.documents:,} documents, {self._shares()}"
        text = (
            f"{self.documents:,} documents, {self.sentences:,} sentences, {self.examples:,} examples, "
            f"{self.tokens:,} tokens, {self._shares()}"
        )
        if self.skipped_rows:
            text += f", skipped {self.skipped_rows:,} rows without text"
        if self.short_documents:
            text += f", skipped {self.short_documents:,} documents of a single token"
        return text + (f", kept in {self.cache_directory}" if self.cache_directory else "")

    def _shares(self) -> str:
        text = f"{self.unknown_share:.2%} unknown tokens"
        if self.single_sentence_share:
            text += f", {self.single_sentence_share:.1%} of the documents a single sentence"
        return text

    def warnings(self) -> Iterator[str]:
        """What a user should know before training on this."""
        if self.unknown_share > MUCH_UNKNOWN:
            yield (
                f"{self.unknown_share:.1%} of the text's tokens are unknown to the tokenizer and are never predicted: "
                "use a tokenizer for this text (--tokenizer_name), or train one (--train_tokenizer)."
            )
        if self.single_sentence_share is not None and self.single_sentence_share > MANY_SINGLE_SENTENCES:
            yield (
                f"{self.single_sentence_share:.1%} of the documents are a single sentence, so that A and B are its "
                "halves: use --objective mlm, or set --document_boundary to what separates longer documents."
            )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, whole_word_mask: bool = False) -> None:
    """Refuses a tokenizer with which examples cannot be made or masked.

    Raises:
        ValueError: If a special token is missing, the tokenizer is not a fast one, or whole words are to be masked
            and it does not mark the parts of words, as WordPiece does.
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
    if whole_word_mask and not _word_part_prefix(tokenizer):
        raise ValueError(
            f"whole_word_mask=True needs a WordPiece tokenizer, whose word parts are marked; "
            f"{tokenizer.name_or_path!r} is not one: use another tokenizer, or leave whole_word_mask out."
        )


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = False, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Trains a BERT tokenizer (WordPiece) on text. The same text and settings always give the same tokenizer.

    It differs from BERT's in one thing: a word of more than 100 characters, as in text without spaces, is cut into
    words of 100, where BERT's would make it a single unknown token.

    Args:
        texts: Documents, which are gone through several times. `<unk>` in them is not learned.
        vocab_size: Largest number of tokens, special ones included.
        lowercase: Whether to drop case and accents.
        max_length: Stored as the tokenizer's `model_max_length`.

    Raises:
        ValueError: If `texts` can be gone through only once, there is no text, or `vocab_size` is smaller than the
            alphabet of the texts needs.
    """
    if isinstance(texts, Iterator):
        raise ValueError("texts is an iterator, which is empty after the first pass: give a list, or a DocumentTexts.")
    blank = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    alphabet, word_parts = _pieces_of_one_character(texts, blank)
    if not alphabet:
        raise ValueError("There is no text to train a tokenizer on: check the training files.")
    smallest = len(blank.get_vocab()) + len(alphabet) + len(word_parts)
    if smallest > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: special tokens and the characters of this text need {smallest}."
        )
    special_tokens = sorted(blank.get_vocab(), key=blank.token_to_id)
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


def _pieces_of_one_character(texts: Iterable[str], blank: Tokenizer) -> tuple[list[str], list[str]]:
    """The characters to learn, at most `LARGEST_ALPHABET`, and those of them that occur within words, as "##x"."""
    pieces = _trained_vocabulary(texts, blank, vocab_size=0)
    alphabet = {piece for piece in pieces if len(piece) == 1}
    if len(alphabet) > LARGEST_ALPHABET:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(blank.normalizer.normalize_str(text))
        alphabet = set(sorted(alphabet, key=lambda character: (-counts[character], character))[:LARGEST_ALPHABET])
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


def prepare_examples(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TextArguments,
    *,
    seed: int,
    training: bool,
) -> tuple[Dataset | IterableDataset, PreparationSummary]:
    """Turns documents into unpadded, unmasked examples.

    Args:
        documents: One document a row, paragraphs on lines, in the column "text".
        tokenizer: A fast tokenizer with the special tokens of BERT.
        arguments: The recipe.
        seed: Decides pairs, and the order of a stream.
        training: Whether `dupe_factor`, `max_train_samples` and a stream's shuffling apply; otherwise
            `max_eval_samples` does.

    Returns:
        A data set with `input_ids`, and for pairs `token_type_ids` and `next_sentence_label` or
        `sentence_order_label`; and what was found. A `Dataset` is kept in the cache and found there again as long as
        documents, tokenizer, recipe and code are the same. Of an `IterableDataset` nothing is kept.

    Raises:
        ValueError: If the tokenizer lacks a special token, no example can be made, there is a single document where
            NSP needs two, or every token of the text is unknown.
    """
    check_tokenizer(tokenizer, whole_word_mask=arguments.whole_word_mask)
    language = arguments.language or DEFAULT_LANGUAGE
    tokenize = DocumentTokenizer(tokenizer, language)
    copies = arguments.dupe_factor if training else 1
    limit = arguments.max_train_samples if training else arguments.max_eval_samples
    if isinstance(documents, IterableDataset):
        build = ExampleBuilder(tokenizer, arguments, seed, copies)
        summary = _look_into_stream(documents, tokenize, build)
        examples = documents.map(
            StreamedExamples(tokenize, build),
            batched=True,
            batch_size=STREAMED_DOCUMENTS_AT_A_TIME,
            remove_columns=["text"],
            features=build.features,
        )
        if limit is not None:
            examples = examples.take(limit)
        if training:
            examples = examples.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer_size or DEFAULT_SHUFFLE_BUFFER)
        return examples, _checked(summary, training)

    tokenized = _map(
        documents,
        tokenize,
        arguments,
        desc="Tokenizing documents",
        settings=(_tokenizer_state(tokenizer), language, importlib.metadata.version("sentencex")),
    )
    lengths = list_lengths(tokenized, "input_ids")
    usable = np.flatnonzero(lengths)
    if arguments.objective == "nsp" and len(usable) < 2:
        raise ValueError(_single_document_message(len(usable)))
    build = ExampleBuilder(tokenizer, arguments, seed, copies, DocumentPool(tokenized, usable))
    examples = _map(
        tokenized.with_format("arrow"),
        build,
        arguments,
        desc="Building examples",
        settings=(
            _tokenizer_state(tokenizer),
            arguments.objective,
            arguments.max_seq_length,
            build.short_seq_probability,
            copies,
            seed,
        ),
        with_indices=True,
    ).with_format(None)
    if len(examples) == 0:
        raise ValueError(
            f"{len(usable)} documents with {int(lengths.sum())} tokens make no example for "
            f"objective={arguments.objective!r}: give more text."
        )
    if limit is not None:
        examples = examples.select(range(min(limit, len(examples))))
    cache_files = examples.cache_files
    sentences = list_lengths(tokenized, "sentence_lengths")
    summary = PreparationSummary(
        unknown_share=_unknown_share(examples.data.column("input_ids"), build),
        single_sentence_share=_single_sentence_share(lengths, sentences, build),
        documents=len(usable),
        skipped_rows=len(lengths) - len(usable),
        short_documents=int((lengths == 1).sum()) if arguments.objective in SENTENCE_LABELS else 0,
        sentences=int(sentences.sum()),
        examples=len(examples),
        tokens=int(list_lengths(examples, "input_ids").sum()),
        cache_directory=str(Path(cache_files[0]["filename"]).parent) if cache_files else None,
    )
    return examples, _checked(summary, training)


def count_tokens(
    examples: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, limit: int = 200_000
) -> np.ndarray:
    """Occurrences of each token in (at most `limit`) examples, special tokens left out: [vocab_size]."""
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for batch in examples.take(limit).select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        ids = batch["input_ids"].combine_chunks().flatten().to_numpy()
        counts += np.bincount(ids, minlength=len(counts))
    counts[tokenizer.all_special_ids] = 0
    return counts


def split_sentences(text: str, language: str = "en") -> list[str]:
    """Splits a document into sentences. A line break ends a sentence."""
    return [
        sentence
        for paragraph in text.split("\n")
        for stretch in _stretches(paragraph)
        for sentence in map(str.strip, sentencex.segment(language, stretch))
        if sentence
    ]


def cut_sentences(sentence_lengths: Iterable[int], longest: int) -> list[int]:
    """Cuts sentences longer than `longest` into even parts.

    Args:
        sentence_lengths: Tokens in each sentence of a document.
        longest: Most tokens a part may have.

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
        start: First token of A.
        middle: First token of B.
        stop: End of B.
        room: Most tokens that another segment in B's place may have.
        positive: Whether A and B stay as they are.
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
        bounds: As `sentence_bounds` gives them, no sentence longer than half of `budget`.
        budget: Most tokens in A and B together.
        short_seq_probability: Share of pairs that aim at a random length of 2 to `budget` tokens.
        rng: Decides lengths, the place of the cut, and which half of the pairs is positive.
        replace_second: Whether the B of a negative pair is replaced (NSP), so that its text is left for the next
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
        sentence_lengths: Tokens in each sentence of a document [sentences].
        room: Most tokens to draw.
        rng: Decides the place.
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


class DocumentTokenizer:
    """Turns a batch of documents into token ids and sentence lengths.

    `<unk>` becomes the unknown token, and so does a special token spelt out in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, language: str):
        self.language = language
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.unknown_token = tokenizer.unk_token
        self.unknown_id = tokenizer.unk_token_id
        self.special_ids = np.array(tokenizer.all_special_ids)
        self.id_type = _id_type(tokenizer)
        self.features = Features(
            {"input_ids": List(Value(self.id_type.name)), "sentence_lengths": List(Value("int32"))}
        )

    def __call__(self, documents: dict[str, list[str | None]]) -> pa.Table:
        """Args: documents: {"text": [...]}. Returns: one row for each, empty where there is no text."""
        document_sentences = [split_sentences(text or "", self.language) for text in documents["text"]]
        ids, lengths = self.encode(itertools.chain.from_iterable(document_sentences))
        document_of_sentence = np.repeat(np.arange(len(document_sentences)), list(map(len, document_sentences)))
        counted = lengths > 0
        sentence_counts = np.bincount(document_of_sentence[counted], minlength=len(document_sentences))
        token_counts = np.bincount(document_of_sentence, weights=lengths, minlength=len(document_sentences))
        return pa.table(
            {
                "input_ids": _list_array(ids, token_counts.astype(np.int64)),
                "sentence_lengths": _list_array(lengths[counted], sentence_counts),
            }
        )

    def encode(self, sentences: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all sentences one after the other [tokens], and their lengths [sentences]."""
        ids, lengths = [np.zeros(0, self.id_type)], []
        for group in _grouped(sentences):
            group_ids = [
                encoding.ids
                for encoding in self.backend.encode_batch_fast(
                    [sentence.replace(UNKNOWN_WORD, self.unknown_token) for sentence in group],
                    add_special_tokens=False,
                )
            ]
            lengths += map(len, group_ids)
            ids.append(np.fromiter(itertools.chain.from_iterable(group_ids), self.id_type))
        flat = np.concatenate(ids)
        flat[np.isin(flat, self.special_ids)] = self.unknown_id
        return flat, np.array(lengths, dtype=np.int32)


class TokenizedDocument(NamedTuple):
    """A document's tokens [tokens] and the lengths of its sentences [sentences]."""

    ids: np.ndarray
    sentence_lengths: np.ndarray


class DocumentPool:
    """Tokenized documents, each of which may lend a random segment to another.

    Args:
        tokenized: A `Dataset` or table with the columns of `DocumentTokenizer`.
        usable: Indices of the documents that hold any token, ascending.
    """

    def __init__(self, tokenized: Dataset | pa.Table, usable: np.ndarray):
        self.tokenized = tokenized
        self.usable = usable

    @cached_property
    def columns(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        table = self.tokenized.data.table if isinstance(self.tokenized, Dataset) else self.tokenized
        return table.column("input_ids"), table.column("sentence_lengths")

    def __getitem__(self, index: int) -> TokenizedDocument:
        return TokenizedDocument(*(column[index].values.to_numpy() for column in self.columns))

    def draw_other(self, index: int, rng: random.Random) -> TokenizedDocument:
        """Returns a usable document other than the one at `index`, which is usable too."""
        drawn = rng.randrange(len(self.usable) - 1)
        return self[int(self.usable[drawn + (self.usable[drawn] >= index)])]


class ExampleBuilder:
    """Turns a batch of tokenized documents into examples.

    Args:
        tokenizer: Gives the special tokens.
        arguments: The recipe.
        seed: Decides pairs, together with each document's own tokens.
        copies: How many times each document is used.
        pool: Where NSP's random segments come from; the batch itself if not given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: TextArguments,
        seed: int,
        copies: int,
        pool: DocumentPool | None = None,
    ):
        self.objective = arguments.objective
        self.budget = arguments.max_seq_length - _special_tokens(arguments.objective)
        self.short_seq_probability = arguments.short_seq_probability
        if self.short_seq_probability is None:
            self.short_seq_probability = DEFAULT_SHORT_SEQ_PROBABILITY
        self.seed = seed
        self.copies = copies
        self.pool = pool
        id_type = _id_type(tokenizer)
        self.start_token = np.array([tokenizer.cls_token_id], dtype=id_type)
        self.end_token = np.array([tokenizer.sep_token_id], dtype=id_type)
        self.unknown_id = tokenizer.unk_token_id
        self.features = Features({"input_ids": List(Value(id_type.name))})
        if self.objective in SENTENCE_LABELS:
            self.features["token_type_ids"] = List(Value("int8"))
            self.features[SENTENCE_LABELS[self.objective]] = Value("int8")

    def __call__(self, documents: pa.Table, indices: list[int] | None = None) -> pa.Table:
        """Builds the examples of some documents.

        Args:
            documents: Columns of `DocumentTokenizer`.
            indices: Where each document stands in the pool.
        """
        batch = DocumentPool(documents, np.flatnonzero(pc.list_value_length(documents.column("input_ids"))))
        pool = self.pool if self.pool is not None else batch
        examples: list[tuple[np.ndarray, ...]] = []
        labels: list[int] = []
        for row in batch.usable.tolist():
            document = batch[row]
            fingerprint = zlib.crc32(document.ids)
            for copy in range(self.copies):
                rng = random.Random(f"{self.seed}-{copy}-{fingerprint}")
                if self.objective == "sentences":
                    bounds = cut_sentences(document.sentence_lengths.tolist(), self.budget)
                    examples += ((document.ids[start:stop],) for start, stop in itertools.pairwise(bounds))
                    continue
                if self.objective == "mlm":
                    first = self.budget if copy == 0 else rng.randint(1, self.budget)
                    examples += (
                        (document.ids[stretch],) for stretch in draw_stretches(len(document.ids), self.budget, first)
                    )
                    continue
                for first_segment, second_segment, label in self.pairs(
                    document, row if indices is None else indices[row], pool, rng
                ):
                    examples.append((first_segment, second_segment))
                    labels.append(label)
        return self.assemble(examples, labels)

    def pairs(
        self, document: TokenizedDocument, index: int, pool: DocumentPool, rng: random.Random
    ) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yields A, B and the label of each pair of a document that stands at `index` in the pool."""
        ids = document.ids
        bounds = sentence_bounds(document.sentence_lengths.tolist(), self.budget // 2)
        # The last batch of a stream may be a single document, which has no other to draw from.
        draw_second = self.objective == "nsp" and len(pool.usable) > 1
        for pair in draw_pairs(bounds, self.budget, self.short_seq_probability, rng, replace_second=draw_second):
            first, second = ids[pair.start : pair.middle], ids[pair.middle : pair.stop]
            if pair.positive or (self.objective == "nsp" and not draw_second):
                yield first, second, 0
            elif self.objective == "sop":
                yield second, first, 1
            else:
                other = pool.draw_other(index, rng)
                yield first, other.ids[draw_random_segment(other.sentence_lengths, pair.room, rng)], 1

    def assemble(self, examples: list[tuple[np.ndarray, ...]], labels: list[int]) -> pa.Table:
        """Adds special tokens, token types and labels to the segments of each example."""
        pieces = [self.start_token[:0]]
        for segments in examples:
            pieces.append(self.start_token)
            for segment in segments:
                pieces += (segment, self.end_token)
        # [examples, segments]; [CLS] belongs to the first segment.
        lengths = np.array([[len(segment) + 1 for segment in segments] for segments in examples], dtype=np.int64)
        lengths = lengths.reshape(len(examples), 2 if self.objective in SENTENCE_LABELS else 1)
        lengths[:, 0] += 1
        columns = {"input_ids": _list_array(np.concatenate(pieces), lengths.sum(1))}
        if self.objective in SENTENCE_LABELS:
            token_types = np.repeat(np.tile(np.array([0, 1], dtype=np.int8), len(examples)), lengths.ravel())
            columns["token_type_ids"] = _list_array(token_types, lengths.sum(1))
            columns[SENTENCE_LABELS[self.objective]] = pa.array(labels, type=pa.int8())
        return pa.table(columns)


class StreamedExamples:
    """Turns a batch of documents into examples in one step."""

    def __init__(self, tokenize: DocumentTokenizer, build: ExampleBuilder):
        self.tokenize = tokenize
        self.build = build

    def __call__(self, documents: dict[str, list[str | None]]) -> dict[str, list]:
        return self.build(self.tokenize(documents)).to_pydict()


@dataclass
class MaskingCollator(DataCollatorForLanguageModeling):
    """Pads examples to a batch and chooses what is to be predicted.

    Which tokens of an example are chosen, and what replaces them, depends only on the seed, the epoch and the tokens
    of that example. Unknown and special tokens are never chosen.

    Attributes:
        word_probability: Share of whole words to choose; None chooses tokens by `mlm_probability`, otherwise 1.
        word_continues: Whether a token continues the word before it [vocabulary]; given with `word_probability`.
        epoch: Masks differ between epochs.
    """

    word_probability: float | None = None
    word_continues: torch.Tensor | None = None
    epoch: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.never_chosen = torch.tensor(self.tokenizer.all_special_ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def torch_mask_tokens(
        self, inputs: torch.Tensor, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: inputs: Padded ids [B, N]. Returns: masked ids and labels, both [B, N]."""
        labels = torch.full_like(inputs, IGNORED_LABEL)
        for row, row_labels in zip(inputs, labels, strict=True):
            real = row != self.tokenizer.pad_token_id
            row[real], row_labels[real] = self._mask_example(row[real])
        return inputs, labels

    def _mask_example(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        content = f"{self.seed} {self.epoch} ".encode() + ids.numpy().tobytes()
        example_seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        self.generator = torch.Generator().manual_seed(example_seed)
        excluded = torch.isin(ids, self.never_chosen)
        if self.word_continues is not None:
            word = (~self.word_continues[ids]).cumsum(0)
            chosen = torch.rand(len(ids) + 1, generator=self.generator) < self.word_probability
            excluded |= ~chosen[word]
        masked, labels = super().torch_mask_tokens(ids[None], special_tokens_mask=excluded[None])
        return masked[0], labels[0]


def masking_collator(tokenizer: PreTrainedTokenizerBase, arguments: TextArguments, *, seed: int) -> MaskingCollator:
    """Returns a collator for training, or, as long as its epoch stays 0, for evaluation.

    Raises:
        ValueError: If the tokenizer lacks a special token, or whole words are wanted of one that is not WordPiece.
    """
    whole_words = arguments.whole_word_mask
    check_tokenizer(tokenizer, whole_word_mask=whole_words)
    return MaskingCollator(
        tokenizer,
        mlm_probability=1.0 if whole_words else arguments.mlm_probability,
        mask_replace_prob=arguments.mask_replace_prob,
        random_replace_prob=arguments.random_replace_prob,
        pad_to_multiple_of=arguments.pad_to_multiple_of,
        seed=seed,
        word_probability=arguments.mlm_probability if whole_words else None,
        word_continues=_word_continues(tokenizer) if whole_words else None,
    )


def _word_part_prefix(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)


def _word_continues(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    prefix = _word_part_prefix(tokenizer)
    return torch.tensor([token is not None and token.startswith(prefix) for token in tokens])


def _special_tokens(objective: str) -> int:
    return 3 if objective in SENTENCE_LABELS else 2


def _id_type(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides the ids; truncation and padding, which calls change, do not."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(state | {"truncation": None, "padding": None, "special_tokens": tokenizer.special_tokens_map})


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


def _grouped(sentences: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for sentence in sentences:
        group.append(sentence)
        characters += len(sentence)
        if characters >= CHARACTERS_AT_A_TIME:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _list_array(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values)


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """The length of each row's list in a column: [rows]."""
    return pc.list_value_length(dataset.data.column(column)).to_numpy()


def _map(
    documents: Dataset,
    function: DocumentTokenizer | ExampleBuilder,
    arguments: TextArguments,
    *,
    desc: str,
    settings: tuple,
    with_indices: bool = False,
) -> Dataset:
    """Maps and caches; the key is made of documents, settings and code, because a tokenizer changes as it is used."""
    workers = min(arguments.preprocessing_num_workers or 1, len(documents))
    with _tokenizer_threads(allowed=workers == 1), worker_processes(), written_to_cache(arguments):
        return documents.map(
            function,
            batched=True,
            batch_size=DOCUMENTS_AT_A_TIME,
            with_indices=with_indices,
            remove_columns=documents.column_names,
            features=function.features,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=Hasher.hash((documents._fingerprint, settings, PREPARATION_CODE)),
            desc=desc,
        )


@contextmanager
def _tokenizer_threads(*, allowed: bool) -> Iterator[None]:
    """Keeps tokenizers in worker processes from starting a thread for each core on top."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if not allowed:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


def _look_into_stream(
    documents: IterableDataset, tokenize: DocumentTokenizer, build: "ExampleBuilder"
) -> PreparationSummary:
    texts = list(DocumentTexts(documents, limit=STREAMED_DOCUMENTS_AT_A_TIME))
    tokenized = tokenize({"text": texts})
    lengths, sentences = (
        pc.list_value_length(tokenized.column(name)).to_numpy() for name in ("input_ids", "sentence_lengths")
    )
    usable = int(np.count_nonzero(lengths))
    if build.objective == "nsp" and usable < 2:
        raise ValueError(_single_document_message(usable))
    return PreparationSummary(
        unknown_share=_unknown_share(build(tokenized).column("input_ids"), build),
        single_sentence_share=_single_sentence_share(lengths, sentences, build),
        documents=usable,
    )


def _unknown_share(input_ids: pa.ChunkedArray, build: "ExampleBuilder") -> float:
    """Share of unknown tokens in examples, special tokens around the text left out."""
    unknown = text = 0
    for chunk in input_ids.chunks:
        ids = chunk.flatten().to_numpy()
        unknown += int(np.count_nonzero(ids == build.unknown_id))
        text += len(ids) - len(chunk) * _special_tokens(build.objective)
    return unknown / max(text, 1)


def _single_sentence_share(lengths: np.ndarray, sentences: np.ndarray, build: "ExampleBuilder") -> float | None:
    """Args: lengths, sentences: Tokens and sentences of each document [documents]."""
    if build.objective not in SENTENCE_LABELS:
        return None
    return float(np.mean(sentences[lengths > 1] == 1)) if (lengths > 1).any() else 0.0


def _checked(summary: PreparationSummary, training: bool) -> PreparationSummary:
    text = "training text" if training else "validation text"
    if summary.unknown_share == 1:
        raise ValueError(
            f"Every token of the {text} is unknown to the tokenizer, so there is nothing to predict: use a tokenizer "
            "for this text (--tokenizer_name), or train one (--train_tokenizer)."
        )
    for warning in summary.warnings():
        logger.warning("Warning, %s: %s", text, warning)
    return summary


def _single_document_message(found: int) -> str:
    return (
        f"objective='nsp' takes random sentences from another document, but the text holds {found}: give more text, "
        "set document_boundary to what separates its documents, or use --sop."
    )
