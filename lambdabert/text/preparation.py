"""Examples of a whole text: made once and kept in the cache, or made of a stream while it is read."""

import importlib.metadata
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from lambdabert.text.cache import cache_key, worker_processes, written_to_cache
from lambdabert.text.documents import DOCUMENTS_AT_A_TIME, DocumentTexts
from lambdabert.text.examples import (
    DocumentPool,
    DocumentTokenizer,
    ExampleBuilder,
    ExampleRecipe,
    StreamedExamples,
    list_lengths,
)
from lambdabert.text.objectives import NSP, SENTENCES, Objective
from lambdabert.text.tokenizers import check_tokenizer, tokenizer_state

logger = logging.getLogger(__name__)

STREAMED_DOCUMENTS_AT_A_TIME = 256
# Shares above which a warning is given.
MUCH_UNKNOWN = 0.05
MANY_SINGLE_SENTENCES = 0.2
TOKENIZER_ADVICE = "use a tokenizer made for such text (pretraining makes one with --train_tokenizer)"


@dataclass(frozen=True)
class PreparationSummary:
    """What preparation found and made.

    Attributes:
        unknown_share: share of the examples' tokens, special ones left out, that are unknown and so never predicted.
        single_sentence_share: share of the documents that hold a single sentence, whose halves become A and B; None
            without pairs.
        documents: documents with text; of a stream, those that the shares were taken from.
        skipped_rows: rows without text, which were left out; None of a stream, as all below.
        short_documents: documents of a single token, too short for a pair, which were left out.
        sentences: sentences in all documents.
        examples: examples made of them.
        tokens: tokens in the examples, special ones included; none is padding.
        cache_directory: where the examples are kept.
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
                f"{TOKENIZER_ADVICE}."
            )
        if self.single_sentence_share is not None and self.single_sentence_share > MANY_SINGLE_SENTENCES:
            yield (
                f"{self.single_sentence_share:.1%} of the documents are a single sentence, of which A and B are the "
                "halves: use --objective mlm, or set --document_boundary to what separates longer documents."
            )


def prepare_examples(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    recipe: ExampleRecipe,
    *,
    seed: int,
    training: bool,
) -> tuple[Dataset | IterableDataset, PreparationSummary]:
    """Turns documents into unpadded, unmasked examples.

    Args:
        documents: one document a row, paragraphs on lines, in the column "text".
        tokenizer: a fast tokenizer with the special tokens of BERT.
        recipe: what the examples are like.
        seed: decides pairs, and the order of a stream.
        training: whether `dupe_factor`, `max_train_samples` and a stream's shuffling apply; otherwise
            `max_eval_samples` does.

    Returns:
        A data set with `input_ids`, and for pairs `token_type_ids` and `next_sentence_label` or
        `sentence_order_label`; and what was found. A `Dataset` is kept in the cache and found there again as long as
        documents, tokenizer, recipe and code are the same. Of an `IterableDataset` nothing is kept.

    Raises:
        ValueError: the tokenizer does not fit (`check_tokenizer`), no example can be made, there is a single
            document where NSP needs two, or every token of the text is unknown.
    """
    check_tokenizer(tokenizer, pairs=recipe.objective.has_pairs)
    examples: Dataset | IterableDataset
    if isinstance(documents, IterableDataset):
        examples, summary = _stream_examples(documents, tokenizer, recipe, seed, training)
    else:
        examples, summary = _keep_examples(documents, tokenizer, recipe, seed, training)
    return examples, _checked(summary, training)


def _stream_examples(
    documents: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    recipe: ExampleRecipe,
    seed: int,
    training: bool,
) -> tuple[IterableDataset, PreparationSummary]:
    tokenize = DocumentTokenizer(tokenizer, recipe)
    build = ExampleBuilder(tokenizer, recipe, seed, recipe.copies(training))
    summary = _look_into_stream(documents, tokenize, build, training)
    stream = documents.map(
        StreamedExamples(tokenize, build),
        batched=True,
        batch_size=STREAMED_DOCUMENTS_AT_A_TIME,
        remove_columns=["text"],
        features=build.features,
    )
    limit = recipe.most_examples(training)
    if limit is not None:
        stream = stream.take(limit)
    if training:
        stream = stream.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer_size)
    return stream, summary


def _keep_examples(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    recipe: ExampleRecipe,
    seed: int,
    training: bool,
) -> tuple[Dataset, PreparationSummary]:
    tokenize = DocumentTokenizer(tokenizer, recipe)
    tokenized = _map(
        documents,
        tokenize,
        recipe,
        desc="Tokenizing documents",
        settings=(
            tokenizer_state(tokenizer),
            recipe.language,
            recipe.objective == SENTENCES,
            tokenize.blank_first,
            importlib.metadata.version("sentencex"),
        ),
    )
    lengths = list_lengths(tokenized, "input_ids")
    usable = np.flatnonzero(lengths)
    if recipe.objective == NSP and len(usable) < 2:
        raise ValueError(_single_document_message(len(usable), training))
    copies = recipe.copies(training)
    build = ExampleBuilder(tokenizer, recipe, seed, copies, DocumentPool(tokenized, usable))
    examples = _map(
        tokenized.with_format("arrow"),
        build,
        recipe,
        desc="Building examples",
        settings=(
            tokenizer_state(tokenizer),
            recipe.objective,
            recipe.max_seq_length,
            recipe.short_seq_probability,
            copies,
            seed,
        ),
        with_indices=True,
    ).with_format(None)
    if len(examples) == 0:
        raise _no_example(lengths, recipe.objective)
    limit = recipe.most_examples(training)
    if limit is not None:
        examples = examples.select(range(min(limit, len(examples))))
    return examples, _summarize(tokenized, examples, build, recipe)


def _summarize(
    tokenized: Dataset, examples: Dataset, build: ExampleBuilder, recipe: ExampleRecipe
) -> PreparationSummary:
    lengths, sentences = (list_lengths(tokenized, name) for name in ("input_ids", "sentence_lengths"))
    usable = np.count_nonzero(lengths)
    cache_files = examples.cache_files
    return PreparationSummary(
        unknown_share=_unknown_share(examples.data.column("input_ids"), build),
        single_sentence_share=_single_sentence_share(lengths, sentences, build),
        documents=int(usable),
        skipped_rows=int(len(lengths) - usable),
        short_documents=int((lengths == 1).sum()) if recipe.objective.has_pairs else 0,
        sentences=int(sentences.sum()),
        examples=len(examples),
        tokens=int(list_lengths(examples, "input_ids").sum()),
        cache_directory=str(Path(cache_files[0]["filename"]).parent) if cache_files else None,
    )


def _map(
    documents: Dataset,
    function: DocumentTokenizer | ExampleBuilder,
    recipe: ExampleRecipe,
    *,
    desc: str,
    settings: tuple,
    with_indices: bool = False,
) -> Dataset:
    """Maps and caches; the key is made of documents, settings and code, because a tokenizer changes as it is used."""
    workers = min(recipe.num_workers, len(documents))
    with _tokenizer_threads(allowed=workers == 1), worker_processes(), written_to_cache(recipe.cache_dir):
        return documents.map(
            function,
            batched=True,
            batch_size=DOCUMENTS_AT_A_TIME,
            with_indices=with_indices,
            remove_columns=documents.column_names,
            features=function.features,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=cache_key(documents._fingerprint, settings),
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
    documents: IterableDataset, tokenize: DocumentTokenizer, build: ExampleBuilder, training: bool
) -> PreparationSummary:
    texts: list[str | None] = list(DocumentTexts(documents, limit=STREAMED_DOCUMENTS_AT_A_TIME))
    tokenized = tokenize({"text": texts})
    lengths, sentences = (
        pc.list_value_length(tokenized.column(name)).to_numpy() for name in ("input_ids", "sentence_lengths")
    )
    usable = int(np.count_nonzero(lengths))
    if build.objective == NSP and usable < 2:
        raise ValueError(_single_document_message(usable, training))
    examples = build(tokenized)
    if len(examples) == 0:
        raise _no_example(lengths, build.objective)
    return PreparationSummary(
        unknown_share=_unknown_share(examples.column("input_ids"), build),
        single_sentence_share=_single_sentence_share(lengths, sentences, build),
        documents=usable,
    )


def _unknown_share(input_ids: pa.ChunkedArray, build: ExampleBuilder) -> float:
    """Share of unknown tokens in examples, special tokens around the text left out."""
    unknown = text = 0
    for chunk in input_ids.chunks:
        ids = chunk.flatten().to_numpy()
        unknown += int(np.count_nonzero(ids == build.unknown_id))
        text += len(ids) - len(chunk) * build.objective.special_tokens
    return unknown / max(text, 1)


def _single_sentence_share(lengths: np.ndarray, sentences: np.ndarray, build: ExampleBuilder) -> float | None:
    """The share of documents with one sentence, from the tokens and the sentences of each, [documents]; None without
    pairs."""
    if not build.objective.has_pairs:
        return None
    return float(np.mean(sentences[lengths > 1] == 1)) if (lengths > 1).any() else 0.0


def _checked(summary: PreparationSummary, training: bool) -> PreparationSummary:
    text = _name_of_text(training)
    if summary.unknown_share == 1:
        raise ValueError(
            f"Every token of the {text} is unknown to the tokenizer, so there is nothing to predict: "
            f"{TOKENIZER_ADVICE}."
        )
    for warning in summary.warnings():
        logger.warning("Warning, %s: %s", text, warning)
    return summary


def _no_example(lengths: np.ndarray, objective: Objective) -> ValueError:
    return ValueError(
        f"{np.count_nonzero(lengths)} documents with {int(lengths.sum())} tokens make no example for "
        f"objective={objective.name!r}: give more text."
    )


def _single_document_message(found: int, training: bool) -> str:
    return (
        f"objective='nsp' takes random sentences from another document, but the {_name_of_text(training)} holds "
        f"{found}: give more text, set document_boundary to what separates its documents, or use --sop."
    )


def _name_of_text(training: bool) -> str:
    return "training text" if training else "validation text"
