"""Documents: boundaries that are found or set, and lines that are joined."""

import random
import textwrap

import pytest

from lambdabert.text.documents import detect_boundary, group_rows, wrapped_share
from text_support import BLANK_LINE_TEXT, WIKITEXT, training_texts, warnings_in, write


@pytest.mark.parametrize(
    ("text", "boundary"),
    [
        (WIKITEXT, "heading"),
        (BLANK_LINE_TEXT, "blank_line"),
        ("\n\nOne line.\nAnother line.\n\n", "row"),
        (" = = Section = = \n\nText.\n", "blank_line"),
        ("", "row"),
    ],
)
def test_boundary_of_a_text_file_is_detected(text, boundary):
    assert detect_boundary(text.splitlines(), rows_are_lines=True) == boundary


def test_boundary_of_a_table_is_a_row_unless_its_rows_are_wikitext_lines():
    assert detect_boundary(["One text.", "", None, "Another."], rows_are_lines=False) == "row"
    assert detect_boundary(["A text\n = of lines = \nin a row."], rows_are_lines=False) == "row"
    assert detect_boundary(WIKITEXT.splitlines(), rows_are_lines=False) == "heading"


def test_only_titles_open_a_wikitext_document_and_joiners_go():
    first, second = group_rows(WIKITEXT.splitlines(), "heading")
    assert first.splitlines() == [
        "= First title =",
        "A 17-year-old sold 1,000 kites .",
        "= = Section = =",
        "It cost 3.5 pounds , where x",
        "= 5 and y =",
        "2 .",
    ]
    assert second.splitlines() == ["= Second title =", "Another article ."]


def test_joiners_of_other_texts_stay():
    assert list(group_rows(["A 17 @-@ year"], "blank_line")) == ["A 17 @-@ year"]


def test_text_before_the_first_title_is_kept():
    assert list(group_rows(["tail of an article", "", "= Title =", "text"], "heading")) == [
        "tail of an article",
        "= Title =\ntext",
    ]


def wrapped_book(paragraphs=12, gap="\n\n", width=70):
    rng = random.Random(0)
    words = "the old river ran far away from our house and nobody in town remembered why it had".split()
    texts = [
        " ".join(" ".join(rng.choices(words, k=rng.randint(6, 20))).capitalize() + "." for _ in range(8))
        for _ in range(paragraphs)
    ]
    return texts, gap.join(textwrap.fill(text, width) for text in texts)


def test_hard_wrapped_lines_are_found_and_joined(tmp_path, caplog):
    texts, book = wrapped_book()
    path = write(tmp_path / "book.txt", book.replace("\n", "\r\n"))
    assert len(training_texts(tmp_path, train_file=path)[0].splitlines()) > 5
    assert "hard-wrapped" in caplog.text and "--line_breaks join" in caplog.text
    caplog.clear()
    assert training_texts(tmp_path, train_file=path, line_breaks="join") == texts
    training_texts(tmp_path, train_file=path, line_breaks="keep")
    assert not warnings_in(caplog)


def test_chapters_are_the_documents_of_a_wrapped_book(tmp_path):
    texts, _ = wrapped_book()
    chapters = [
        f"CHAPTER {number}\n\n\n" + "\n\n".join(textwrap.fill(text, 70) for text in texts[number::3])
        for number in range(3)
    ]
    path = write(tmp_path / "book.txt", "\n\n\n\n".join(chapters))
    documents = training_texts(tmp_path, train_file=path, line_breaks="join")
    assert documents == ["\n".join([f"CHAPTER {number}", *texts[number::3]]) for number in range(3)]
    assert len(training_texts(tmp_path, train_file=path, document_boundary="blank_line")) == 15


@pytest.mark.parametrize(
    "text",
    [
        WIKITEXT,
        "\n".join(f"Sentence number {number} is about as long as all others are." for number in range(50)),
        "\n".join(f"{'a word ' * (number % 17)}of a message" for number in range(100)),
        "\n".join("ACGT" * 15 for _ in range(50)),
        wrapped_book(1)[0][0],
        wrapped_book(width=150)[1],
    ],
    ids=["wikitext", "sentences", "messages", "letters", "one line", "wide lines"],
)
def test_other_lines_do_not_count_as_wrapped(text):
    assert wrapped_share(text.splitlines()) < 0.3


def test_no_document_goes_on_into_the_next_file(tmp_path):
    paths = [write(tmp_path / f"{name}.txt", f"Text of {name}.") for name in "ab"]
    assert training_texts(tmp_path, train_file=paths, document_boundary="blank_line") == ["Text of a.", "Text of b."]


def test_boundary_can_be_set_and_is_logged(tmp_path, caplog):
    path = write(tmp_path / "corpus.txt", BLANK_LINE_TEXT)
    with caplog.at_level("INFO"):
        assert len(training_texts(tmp_path, train_file=path)) == 3
        assert len(training_texts(tmp_path, train_file=path, document_boundary="row")) == 6
    assert "blank_line, detected" in caplog.messages[0]
    assert "row, as set" in caplog.messages[1]
