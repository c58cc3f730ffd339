"""From documents to examples: token ids, segments and labels, without padding and masks.

What is drawn at random depends only on the seed and on the document itself, never on processes, batches, order or
resuming.
"""

import itertools
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lambdabert.text.objectives import MLM, NSP, SENTENCES, SOP, Objective
from lambdabert.text.sentence_pairs import (
    cut_sentences,
    draw_pairs,
    draw_random_segment,
    draw_stretches,
    sentence_bounds,
    split_sentences,
)
from lambdabert.text.tokenizers import UNKNOWN_WORD, id_type

CHARACTERS_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class ExampleRecipe:
    """What examples are made of documents.

    Attributes:
        objective: what they are for.
        max_seq_length: longest example in tokens, special ones included.
        language: ISO 639 code of the text's language, for finding sentences.
        short_seq_probability: share of pairs that aim at a random shorter length.
        dupe_factor: how many times each training document is used, differently each time.
        max_train_samples: most training examples; all if None.
        max_eval_samples: most validation examples; all if None.
        shuffle_buffer_size: examples among which a stream is shuffled.
        num_workers: processes that prepare them.
        cache_dir: where they are kept; the cache of `datasets` if None.
    """

    objective: Objective
    max_seq_length: int = 128
    language: str = "en"
    short_seq_probability: float = 0.1
    dupe_factor: int = 1
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    shuffle_buffer_size: int = 10_000
    num_workers: int = 1
    cache_dir: str | None = None

    def copies(self, training: bool) -> int:
        """How many times each document is used."""
        return self.dupe_factor if training else 1

    def most_examples(self, training: bool) -> int | None:
        return self.max_train_samples if training else self.max_eval_samples


class DocumentTokenizer:
    """Turns a batch of documents into token ids and sentence lengths.

    `<unk>` becomes the unknown token, and so does a special token spelt out in the text. A sentence is tokenized as it
    stands in the text, or as a text of its own where each is an example or the tokenizer adds the blank before it. For
    pairs, the first sentence of a document gets a blank before it, too: without, it would be known for the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: ExampleRecipe) -> None:
        self.language = recipe.language
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.sentences_alone = recipe.objective == SENTENCES or self._adds_blanks()
        self.blank_first = recipe.objective.has_pairs and not self.sentences_alone and self._reads_blanks()
        self.unknown_token = tokenizer.unk_token
        self.unknown_id = tokenizer.unk_token_id
        self.special_ids = np.array(tokenizer.all_special_ids)
        self.id_type = id_type(tokenizer)
        self.features = Features(
            {"input_ids": List(Value(self.id_type.name)), "sentence_lengths": List(Value("int32"))}
        )

    def _adds_blanks(self) -> bool:
        """Whether the tokenizer puts a blank before every text, also before one that begins with a blank."""
        alone, behind_blank, twice = (
            self.backend.encode(text, add_special_tokens=False).ids for text in ("a", " a", "a a")
        )
        return twice == [*alone, *alone] and behind_blank != alone

    def _reads_blanks(self) -> bool:
        """Whether a blank before a text makes other tokens of it."""
        alone, behind_blank = (self.backend.encode(text, add_special_tokens=False).ids for text in ("a", " a"))
        return alone != behind_blank

    def __call__(self, documents: dict[str, list[str | None]]) -> pa.Table:
        """One row for each of documents {"text": [...]}, empty where there is no text."""
        document_sentences = [split_sentences(text or "", self.language) for text in documents["text"]]
        if self.blank_first:
            for sentences in filter(None, document_sentences):
                sentences[0] = f" {sentences[0]}"
        all_sentences = itertools.chain.from_iterable(document_sentences)
        ids, lengths = self.encode(map(str.strip, all_sentences) if self.sentences_alone else all_sentences)
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
        ids = [np.zeros(0, self.id_type)]
        lengths: list[int] = []
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
        tokenized: a `Dataset` or table with the columns of `DocumentTokenizer`.
        usable: indices of the documents that hold any token, ascending.
    """

    def __init__(self, tokenized: Dataset | pa.Table, usable: np.ndarray) -> None:
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
        tokenizer: gives the special tokens.
        recipe: what they are like.
        seed: decides pairs, together with each document's own tokens.
        copies: how many times each document is used.
        pool: where NSP's random segments come from; the batch itself if not given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        recipe: ExampleRecipe,
        seed: int,
        copies: int,
        pool: DocumentPool | None = None,
    ) -> None:
        self.objective = recipe.objective
        self.budget = recipe.max_seq_length - recipe.objective.special_tokens
        self.short_seq_probability = recipe.short_seq_probability
        self.seed = seed
        self.copies = copies
        self.pool = pool
        ids = id_type(tokenizer)
        self.start_token = np.array([tokenizer.cls_token_id], dtype=ids)
        self.end_token = np.array([tokenizer.sep_token_id], dtype=ids)
        self.unknown_id = tokenizer.unk_token_id
        self.features = Features({"input_ids": List(Value(ids.name))})
        if self.objective.sentence_label:
            self.features["token_type_ids"] = List(Value("int8"))
            self.features[self.objective.sentence_label] = Value("int8")

    def __call__(self, documents: pa.Table, indices: list[int] | None = None) -> pa.Table:
        """Builds the examples of some documents.

        Args:
            documents: columns of `DocumentTokenizer`.
            indices: where each document stands in the pool.
        """
        batch = DocumentPool(documents, np.flatnonzero(pc.list_value_length(documents.column("input_ids"))))
        pool = self.pool if self.pool is not None else batch
        examples: list[tuple[np.ndarray, ...]] = []
        labels: list[int] = []
        for row in batch.usable.tolist():
            document = batch[row]
            fingerprint = zlib.crc32(document.ids.tobytes())
            for copy in range(self.copies):
                rng = random.Random(f"{self.seed}-{copy}-{fingerprint}")
                if self.objective == SENTENCES:
                    bounds = cut_sentences(document.sentence_lengths.tolist(), self.budget)
                    examples += ((document.ids[start:stop],) for start, stop in itertools.pairwise(bounds))
                    continue
                if self.objective == MLM:
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
        draw_second = self.objective == NSP and len(pool.usable) > 1
        for pair in draw_pairs(bounds, self.budget, self.short_seq_probability, rng, replace_second=draw_second):
            first, second = ids[pair.start : pair.middle], ids[pair.middle : pair.stop]
            if pair.positive or (self.objective == NSP and not draw_second):
                yield first, second, 0
            elif self.objective == SOP:
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
        lengths = lengths.reshape(len(examples), 2 if self.objective.has_pairs else 1)
        lengths[:, 0] += 1
        columns = {"input_ids": _list_array(np.concatenate(pieces), lengths.sum(1))}
        if self.objective.sentence_label:
            token_types = np.repeat(np.tile(np.array([0, 1], dtype=np.int8), len(examples)), lengths.ravel())
            columns["token_type_ids"] = _list_array(token_types, lengths.sum(1))
            columns[self.objective.sentence_label] = pa.array(labels, type=pa.int8())
        return pa.table(columns)


class StreamedExamples:
    """Turns a batch of documents into examples in one step."""

    def __init__(self, tokenize: DocumentTokenizer, build: ExampleBuilder) -> None:
        self.tokenize = tokenize
        self.build = build

    def __call__(self, documents: dict[str, list[str | None]]) -> dict[str, list]:
        return self.build(self.tokenize(documents)).to_pydict()


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
