"""The maps, contributions and probes as figures, with vectors where the format has them.

matplotlib is asked for when a figure is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from .explanations import Attribution
from .maps import attention
from .traces import LambdaTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

PALETTE = ("#14589c", "#f3f3f1", "#b34a00")  # negative, 0, positive: told apart without seeing red or green
CELL = 0.13  # inches a token
LABELS = 40  # tokens; more are not named beside a map
BAR = 33  # colours in a colour bar; matplotlib makes pixels of more than 50
FAINT = 1 / 256  # of a map's scale; fainter cells are not drawn, which keeps a vector file small


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("matplotlib is not installed, and figures need it: pip install matplotlib") from error


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches.

    Raises:
        ValueError: matplotlib is missing.
    """
    _require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _as_it_stands(draw: Callable[P, R]) -> Callable[P, R]:
    """Makes a function that draws take a $ in a token or a name for a character, and not for the start of a formula."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        _require_matplotlib()
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


@_as_it_stands
def save_figure(figure: "Figure", file: str | Path) -> Path:
    """Writes a figure; the name's end is the format.

    Raises:
        ValueError: the file exists.
    """
    file = Path(file)
    if file.exists():
        raise ValueError(f"file={file} exists and is not overwritten; name another or remove it.")
    figure.savefig(file, dpi=150)
    return file


@_as_it_stands
def draw_maps(trace: LambdaTrace, tokens: Sequence[str], layers: Sequence[int] | None = None, row: int = 0) -> "Figure":
    """The maps of every query, summed over the intra-depth, a line for each layer and part.

    Args:
        trace: of `trace_lambdas`.
        tokens: [N], the words of the row, padding included.
        layers: which; None = all.
        row: of the trace.

    Raises:
        ValueError: matplotlib is missing; no layer, or an unknown one; an unknown row; other than N tokens.
    """
    _check_row(row, len(trace.token_mask))
    if layers is not None and not len(layers):
        raise ValueError("layers=[]: there is no map to draw; give one layer or more, or None for all.")
    kept = trace.token_mask[row].nonzero()[:, 0]
    _check_tokens(tokens, trace.token_mask.shape[1])
    words = [tokens[place] for place in kept.tolist()]
    layers = range(len(trace.layers)) if layers is None else layers
    parts = ("content", "position", "repetition") if trace.has_repetition else ("content", "position")
    lines = [(layer, part, attention(trace, layer, part)[row].sum(-1)) for layer in layers for part in parts]
    queries = lines[0][2].shape[0]
    side = max(1.2, CELL * len(words))
    figure = new_figure(1 + queries * side, 1.3 + len(lines) * (side + 0.2))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.subplots(len(lines), queries, squeeze=False)
    for number, (layer, part, maps) in enumerate(lines):
        for query in range(queries):
            cells = maps[query][kept][:, kept].float().cpu()
            panel = axes[number][query]
            _draw_map(panel, cells)
            panel.set_title(f"query {query}, ±{cells.abs().max():.2g}", fontsize=6)
            if query == 0:
                panel.set_ylabel(f"layer {layer}, {part}", fontsize=7)
            labelled = query == 0 and len(words) <= LABELS
            panel.set_yticks(range(len(words)) if labelled else [], words if labelled else [], fontsize=5)
            labelled = number == len(lines) - 1 and len(words) <= LABELS
            panel.set_xticks(range(len(words)) if labelled else [], words if labelled else [], fontsize=5, rotation=90)
    scale = ScalarMappable(Normalize(-1, 1), colour_map().resampled(BAR))
    figure.colorbar(
        scale, ax=axes, location="bottom", aspect=40, shrink=0.5, pad=0.01, label="fraction of the map's scale"
    )
    return figure


def _check_row(row: int, count: int) -> None:
    if not isinstance(row, int) or not 0 <= row < count:
        raise ValueError(f"row={row!r}: the batch has {count} rows; give one of 0 ... {count - 1}.")


def _check_tokens(tokens: Sequence[str], length: int) -> None:
    if len(tokens) != length:
        raise ValueError(f"tokens has {len(tokens)} entries for {length} places; give one for each.")


def colour_map() -> Any:
    """The diverging colours of all figures."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", PALETTE)


def _draw_map(panel: Any, cells: torch.Tensor) -> None:
    """A signed map [N, M] as rectangles on its own scale, row 0 on top."""
    from matplotlib.collections import PolyCollection

    rows, columns = cells.shape
    most = cells.abs().max().clamp(min=1e-30)
    seen = (cells.abs() > FAINT * most).nonzero()
    corners = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    panel.set_facecolor(PALETTE[1])
    panel.add_collection(
        PolyCollection(
            list((seen.flip(1)[:, None] + corners).numpy()),
            array=(cells[tuple(seen.T)] / most).numpy(),
            cmap=colour_map(),
            clim=(-1, 1),
            edgecolors="face",
            linewidths=0.1,
        )
    )
    panel.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")


@_as_it_stands
def draw_contributions(tokens: Sequence[str], ways: Mapping[str, Attribution], title: str, row: int = 0) -> "Figure":
    """Contributions of each token, a panel for each way of attribution.

    Args:
        tokens: [N]
        ways: attributions of one logit, by name.
        title: of the figure.
        row: of the attributions.

    Raises:
        ValueError: matplotlib is missing; no attribution; an unknown row; other than N tokens.
    """
    if not ways:
        raise ValueError("ways={}: there is nothing to draw; give one attribution or more, by name.")
    for way in ways.values():
        _check_row(row, len(way.tokens))
        _check_tokens(tokens, way.tokens.shape[1])
    figure = new_figure(2 + 3 * len(ways), 1 + 0.22 * len(tokens))
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for panel, (name, way) in zip(panels, ways.items()):
        values = way.tokens[row].float().cpu()
        colours = [PALETTE[2] if value > 0 else PALETTE[0] for value in values]
        panel.barh(range(len(tokens)), values.numpy(), color=colours)
        panel.axvline(0, color="black", linewidth=0.6)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("contribution to the logit")
    panels[0].set_yticks(range(len(tokens)), tokens)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    return figure


@_as_it_stands
def draw_probes(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Accuracy of each row of probing tasks with its interval, in full and at equal dimension.

    Args:
        tasks: rows of `probe_task`, by task; the same rows in each.

    Raises:
        ValueError: matplotlib is missing; no task; tasks of other rows.
    """
    if not tasks:
        raise ValueError("tasks={}: there is nothing to draw; give the rows of one task or more, by its name.")
    first, names = next((task, [row["row"] for row in rows]) for task, rows in tasks.items())
    for task, rows in tasks.items():
        if [row["row"] for row in rows] != names:
            raise ValueError(f"tasks[{task!r}] has other rows than tasks[{first!r}]; draw them apart.")
    figure = new_figure(3 + 3 * len(tasks), 1 + 0.2 * len(names))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, (task, rows) in zip(panels, tasks.items()):
        for shift, which, colour in ((0, "full", PALETTE[0]), (0.3, "equal dimension", PALETTE[2])):
            places = [place + shift for place in range(len(rows))]
            lows, highs = zip(*(row[which]["interval"] for row in rows))
            panel.hlines(places, lows, highs, color=colour, linewidth=1)
            panel.plot([row[which]["accuracy"] for row in rows], places, "o", color=colour, markersize=3, label=which)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("accuracy on test, 95 % interval")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize=7)
    return figure
