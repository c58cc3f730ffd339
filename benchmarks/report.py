"""What the benchmarks write: Markdown tables, JSON records, and curves with the range of their seeds."""

import json
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several values."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, one line for each row, which ends in a newline."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines) + "\n"


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, and makes the folder for it. An earlier one is replaced when the new one is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, file)


class Curve(NamedTuple):
    """What several seeds reached at the same points.

    Attributes:
        places: for each panel the place of each point.
        values: for each point the values of the seeds.
    """

    places: Sequence[Sequence[float]]
    values: Sequence[Sequence[float]]


# of the encoders, the same in all figures
COLOURS = {
    "LambdaBERT with repetitions": "C1",
    "LambdaBERT": "C0",
    "BERT": "C2",
    "ModernBERT": "C3",
    "ConvBERT": "C4",
    "FNet": "C5",
}
OTHER_COLOURS = ("C6", "C8", "C9", "C7", *COLOURS.values())


def colour(name: str, taken: Collection[str]) -> str:
    """The colour of the encoder that a curve's name begins with; another if it is `taken`."""
    own = [COLOURS[encoder] for encoder in COLOURS if name.startswith(encoder)][:1]
    return next((each for each in (*own, *OTHER_COLOURS) if each not in taken), OTHER_COLOURS[-1])


def draw_curves(panels: Sequence[Axes], curves: Mapping[str, Curve], labels: Sequence[str]) -> None:
    """Draws named curves into each panel: a line at the mean of the seeds, a band over their range.

    Args:
        panels: one for each kind of place.
        curves: by the name that the legend shows.
        labels: of the panels' horizontal axes.
    """
    for name, curve in curves.items():
        lows = [min(values) for values in curve.values]
        means = [statistics.mean(values) for values in curve.values]
        highs = [max(values) for values in curve.values]
        own = colour(name, [str(line.get_color()) for line in panels[0].get_lines()])
        for panel, places in zip(panels, curve.places, strict=True):
            panel.plot(places, means, label=name, marker=".", color=own)
            panel.fill_between(places, lows, highs, alpha=0.2, color=own)
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
