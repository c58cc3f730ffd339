"""Tab-separated files."""

from pathlib import Path

Columns = dict[str, list[str]]


def read_columns(file: Path, name: str) -> tuple[Columns, list[int]]:
    """The columns of a tab-separated file, by the names that its first line gives them.

    Blank lines are left out, and quotes are characters like any other.

    Args:
        file: to be read, in UTF-8.
        name: how messages call it.

    Returns:
        The columns, without any where the file is empty; and the line of the file that each of their rows stands on.

    Raises:
        ValueError: it cannot be read, a column is named twice, or a row has more or fewer columns than the
            first.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read as text ({error}); name a tab-separated file.") from None
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        return {}, []
    (_, header), *rows = rows
    if repeated := [column for column in header if header.count(column) > 1]:
        raise ValueError(f"{name} names the column {repeated[0]} twice in its first line; rename one.")
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{name}, line {number} has {len(row)} columns, the header {len(header)}; fix it.")
    return {column: [row[i] for _, row in rows] for i, column in enumerate(header)}, [number for number, _ in rows]
