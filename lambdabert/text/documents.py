"""Documents: where one ends and the next begins, and what their paragraphs are."""

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from lambdabert.text.cache import cache_key, written_to_cache

logger = logging.getLogger(__name__)

DOCUMENT_BOUNDARIES = ("auto", "row", "blank_line", "section", "heading")
LINE_BREAKS = ("keep", "join")
DOCUMENT_FEATURES = Features({"text": Value("large_string")})
DOCUMENTS_AT_A_TIME = 64
DOCUMENTS_WRITTEN_AT_A_TIME = 256
LINES_INSPECTED = 10_000

# WikiText writes " = Title = " above an article and " = = Section = = " within it.
ARTICLE_HEADING = re.compile(r"= (?!=).*(?<!=) =")
# WikiText writes "17 @-@ year", "1 @,@ 000" and "3 @.@ 5" for 17-year, 1,000 and 3.5.
WIKITEXT_JOINER = re.compile(r" @([-,.])@ ")
# Lines are hard-wrapped if a share of `MOSTLY_WRAPPED` of `FEWEST_BREAKS` or more breaks within paragraphs are wraps.
WIDEST_WRAP = 120  # characters
FEWEST_BREAKS = 10
MOSTLY_WRAPPED = 0.5
SENTENCE_END = re.compile(r"[.!?…。！？:;][\"'”’»)\]]*$")


@dataclass(frozen=True)
class DocumentTexts:
    """The text of each document that has any, read anew by every iteration.

    Attributes:
        documents: one document a row, in the column "text".
        limit: how many texts to give at most; all if None.
    """

    documents: Dataset | IterableDataset
    limit: int | None = None

    def __iter__(self) -> Iterator[str]:
        batches = self.documents.iter(batch_size=DOCUMENTS_AT_A_TIME)
        texts = itertools.chain.from_iterable(batch["text"] for batch in batches)
        return itertools.islice(filter(None, texts), self.limit)


def detect_boundary(rows: Iterable[str | None], *, rows_are_lines: bool, lines_wrapped: bool = False) -> str:
    """Tells what a document is from the first rows.

    Args:
        rows: lines of a text file, or the values of a text column.
        rows_are_lines: whether a blank row may separate documents, as in a text file. In a table it is a row without
            text.
        lines_wrapped: whether a paragraph goes over several lines, so that a blank line need not end a document.

    Returns:
        "heading" if the first text is a WikiText title, "section" if lines are wrapped and there are gaps of one and
        gaps of several blank lines, "blank_line" if a blank line stands between two others, else "row".
    """
    gaps = set()
    text_seen, gap = False, 0
    for row in itertools.islice(rows, LINES_INSPECTED):
        line = (row or "").strip()
        if not line:
            gap += 1
            continue
        if not text_seen and ARTICLE_HEADING.fullmatch(line):
            return "heading"
        if not rows_are_lines:
            return "row"
        if text_seen and gap:
            if not lines_wrapped:
                return "blank_line"
            gaps.add(min(gap, 2))
        text_seen, gap = True, 0
    return "section" if len(gaps) == 2 else "blank_line" if gaps else "row"


def wrapped_share(lines: Iterable[str]) -> float:
    """Share of the line breaks within paragraphs that are wraps; 0 where the lines are not wrapped to a width.

    A break is a wrap if the line does not end a sentence and the next line's first word would not have fitted into the
    width of the text, less a tenth. The width is the length that 98 of 100 lines before a break keep.
    """
    stripped = [line.strip() for line in lines]
    breaks = [(line, following) for line, following in itertools.pairwise(stripped) if line and following]
    if len(breaks) < FEWEST_BREAKS:
        return 0.0
    width = sorted(len(line) for line, _ in breaks)[int(0.98 * (len(breaks) - 1))]
    if width > WIDEST_WRAP:
        return 0.0
    wraps = sum(
        " " in line
        and not SENTENCE_END.search(line)
        and len(line) + 1 + len(following.split(maxsplit=1)[0]) > 0.9 * width
        for line, following in breaks
    )
    return wraps / len(breaks)


def group_rows(rows: Iterable[str | None], boundary: str, line_breaks: str = "keep") -> Iterator[str]:
    """Joins rows into documents, one paragraph a line.

    Args:
        rows: lines of a text file, or the values of a text column.
        boundary: "row", "blank_line", "section" or "heading". A title counts as one only after a blank line or at the
            start; a line that stands alone between two gaps belongs to the section after it.
        line_breaks: "keep" if a row is a paragraph, "join" if a paragraph goes on to the next blank row.

    Yields:
        Documents. With "row" there is one for each row, empty where the row has no text.
    """
    if boundary == "row":
        yield from ((row or "").strip() for row in rows)
        return
    paragraphs: list[list[str]] = []
    blank_rows = 1
    for row in rows:
        line = (row or "").strip()
        if not line:
            blank_rows += 1
            continue
        starts_document = {
            "heading": bool(blank_rows and ARTICLE_HEADING.fullmatch(line)),
            "blank_line": blank_rows > 0,
            "section": blank_rows > 1 and sum(map(len, paragraphs)) > 1,
        }[boundary]
        if paragraphs and starts_document:
            yield _document(paragraphs)
            paragraphs = []
        if boundary == "heading":
            line = WIKITEXT_JOINER.sub(r"\1", line)
        if line_breaks == "join" and paragraphs and not blank_rows:
            paragraphs[-1].append(line)
        else:
            paragraphs.append([line])
        blank_rows = 0
    if paragraphs:
        yield _document(paragraphs)


def _document(paragraphs: list[list[str]]) -> str:
    return "\n".join(map(" ".join, paragraphs))


def write_documents(
    generator: Callable[..., Iterator[dict[str, str]]],
    generator_arguments: dict[str, Any],
    *,
    content: object,
    cache_dir: str | None,
) -> Dataset:
    """Writes documents into the cache, or finds them there if `content` and the code are as they were.

    Args:
        generator: yields rows with a "text".
        generator_arguments: what it is called with.
        content: what decides the documents.
        cache_dir: the cache; that of `datasets` if None.

    Raises:
        UnwritableCacheError: the cache is full, or closed to writing.
    """
    with written_to_cache(cache_dir):
        return Dataset.from_generator(
            generator,
            features=DOCUMENT_FEATURES,
            gen_kwargs=generator_arguments,
            cache_dir=cache_dir,
            fingerprint=cache_key(content),
            writer_batch_size=DOCUMENTS_WRITTEN_AT_A_TIME,
        )


def are_lines_wrapped(source: str, share: float, line_breaks: str | None) -> bool:
    """Whether the lines of a text file are hard-wrapped; if so, logs what becomes of them."""
    if share < MOSTLY_WRAPPED:
        return False
    found = f"{share:.0%} of the line breaks within paragraphs are wraps"
    if line_breaks == "join":
        logger.info("%s: %s; lines are joined into paragraphs.", source, found)
    elif line_breaks == "keep":
        logger.info("%s: %s; each line stays a paragraph, as set.", source, found)
    else:
        logger.warning(
            "Warning, %s: its lines are hard-wrapped (%s), and each is taken as a paragraph, which cuts sentences: "
            "join them with --line_breaks join, or silence this warning with --line_breaks keep.",
            source,
            found,
        )
    return True


def log_boundary(source: str, boundary: str, *, detected: bool) -> None:
    """Says what a document of a source is."""
    meaning = {
        "row": "each row or line",
        "blank_line": "the lines between blank lines",
        "section": "the lines between gaps of several blank lines",
        "heading": "the lines from one ' = Title = ' to the next",
    }
    how = "detected; document_boundary sets it" if detected else "as set"
    logger.info("%s: a document is %s (%s, %s).", source, meaning[boundary], boundary, how)
