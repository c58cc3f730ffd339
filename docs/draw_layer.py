"""Draws docs/layer.png: how a lambda layer computes the output of one position, with the numbers of a real layer.

PYTHONPATH=. python docs/draw_layer.py
"""

from pathlib import Path

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from configuration_lambdabert import LambdaBertConfig
from lambda_layer import LambdaLayer

POSITIONS, HERE = 13, 5  # N = M, and the position whose output is drawn
GAP = 3.2  # between matrices, in cells
CONFIG = LambdaBertConfig(hidden_size=24, num_lambda_queries=4, key_depth=4, local_context_size=7)


def draw_matrix(axes: Axes, matrix: torch.Tensor, x: float, y: float, name: str, rows: str, columns: str) -> float:
    """Shows a matrix in red (positive) and blue (negative), a cell a unit, and returns where it ends.

    Args:
        x: its left edge.
        y: its centre.
        name, rows, columns: what stands above, left and below.
    """
    height, width = matrix.shape
    highest = matrix.abs().max().item()
    box = (x, x + width, y - height / 2, y + height / 2)
    axes.imshow(matrix, cmap="RdBu_r", vmin=-highest, vmax=highest, extent=box, interpolation="nearest")
    axes.add_patch(Rectangle((x, y - height / 2), width, height, fill=False, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2 + 0.3, name, ha="center", va="bottom", fontsize=9)
    axes.text(x - 0.3, y, rows, ha="right", va="center", fontsize=8, color="gray")
    axes.text(x + width / 2, y - height / 2 - 0.3, columns, ha="center", va="top", fontsize=8, color="gray")
    return x + width


def draw_product(axes: Axes, y: float, factors: list[tuple], remark: str) -> None:
    """Shows a line `factor · factor = product`, each as the arguments of `draw_matrix` without its place."""
    x = 0.0
    for sign, factor in zip(("·", "=", ""), factors, strict=True):
        x = draw_matrix(axes, factor[0], x, y, *factor[1:])
        axes.text(x + GAP / 2 - 0.2, y, sign, ha="center", va="center", fontsize=15)
        x += GAP
    axes.text(x - 1, y, remark, ha="left", va="center", fontsize=9)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(4)
    layer = LambdaLayer(CONFIG).eval()
    hidden_states = torch.randn(1, POSITIONS, CONFIG.hidden_size)
    output, content = layer(hidden_states)
    queries = rearrange(layer.query_norm(layer.to_queries(hidden_states)), "1 n (h k) -> n h k", h=layer.num_queries)
    keys = rearrange(layer.to_keys(hidden_states).softmax(dim=1), "1 m k -> k m")
    values = rearrange(layer.value_norm(layer.to_values(hidden_states)), "1 m v -> m v")
    scope = layer.relative_embeddings.shape[0]
    first = HERE - scope // 2
    embeddings = torch.zeros(CONFIG.key_depth, POSITIONS)
    embeddings[:, first : first + scope] = rearrange(layer.relative_embeddings, "r k 1 -> k r")
    position = embeddings @ values
    applied = queries[HERE] @ (keys @ values + position)
    torch.testing.assert_close(keys @ values, content[0])
    torch.testing.assert_close(applied.flatten(), output[0, HERE])

    figure = Figure(figsize=(9.2, 7.6), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    draw_product(
        axes,
        0,
        [
            (keys, r"keys $\bar{K}$: each row a distribution over M", "K", "M"),
            (values, "values V", "M", "V"),
            (keys @ values, r"content lambda $\lambda_c$", "K", "V"),
        ],
        "one per sequence,\nthe same for any order\nof its tokens",
    )
    draw_product(
        axes,
        -18,
        [
            (embeddings, f"E around position n, R = {scope} offsets", "K", "M"),
            (values, "values V", "M", "V"),
            (position, r"position lambda $\lambda_p[n]$", "K", "V"),
        ],
        "one per position;\nE is learned, and knows\ndistances alone",
    )
    axes.add_patch(Rectangle((first, -18 - CONFIG.key_depth / 2), scope, CONFIG.key_depth, fill=False, linewidth=1.6))
    draw_product(
        axes,
        -31,
        [
            (queries[HERE], "queries Q[n]", "H", "K"),
            (content[0] + position, r"$\lambda_c + \lambda_p[n]$", "K", "V"),
            (applied, "output y[n]", "H", "V"),
        ],
        "H rows of V numbers are\nthe D channels of position n",
    )
    axes.set(xlim=(-1.5, 43), ylim=(-35, 9), aspect="equal")
    figure.savefig(Path(__file__).with_name("layer.png"), dpi=120)


if __name__ == "__main__":
    main()
