"""What the lambdas of one text hold, as one HTML file that needs no network, no server and no package.

The file holds the factors of the maps, queries, keys and tables of offsets, rather than the maps, which its script
multiplies: it grows with N and not with N^2, so that a long text in a deep model stays small. Every tensor is stored in
16 bits with one scale.
"""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .explanations import Attribution, Explanation
from .maps import token_shares
from .traces import LambdaTrace

MINUS = str.maketrans("-", "−")
STEPS = 2**15 - 1  # of the scale, on either side of 0
PARTS_OF_LAYER = ("content", "position", "repetition", "queries", "residual")


@dataclass
class ExplainedPrediction:
    """A prediction and what it is due to.

    Attributes:
        of: in words, a sentence: what is predicted where.
        explanation: of `explain_prediction`, one row.
        integrated_gradients: of the same logit, to compare with; None = not shown.
        likeliest: the model's likeliest tokens or classes with their probabilities.
        place: of the token that is predicted; None where a class is.
    """

    of: str
    explanation: Explanation
    integrated_gradients: Attribution | None = None
    likeliest: Sequence[tuple[str, float]] = ()
    place: int | None = None

    def ways(self) -> dict[str, Attribution]:
        """The attributions by name."""
        ways: dict[str, Attribution | None] = {
            "explanation": self.explanation,
            "integrated gradients": self.integrated_gradients,
        }
        return {name: way for name, way in ways.items() if way is not None}


def save_html(
    trace: LambdaTrace,
    tokens: Sequence[str],
    file: str | Path,
    *,
    prediction: ExplainedPrediction | None = None,
    about: Mapping[str, str] | None = None,
    title: str = "What the lambdas hold",
    row: int = 0,
) -> Path:
    """Writes a page: tokens by contribution, a map for each layer and query, the content lambda by token and channel.

    Args:
        trace: of `trace_lambdas`.
        tokens: [N], the words of a row, padding included.
        file: where to; must not exist.
        prediction: a prediction about the row's text; None = the tokens are coloured by the maps alone.
        about: what the page says of the model and the versions, by name.
        title: of the page.
        row: of the trace.

    Returns:
        The file.

    Raises:
        ValueError: the file exists; a row or a number of tokens that the trace does not have; an explanation of several
            rows or of another length; numbers that are not finite.
    """
    file = Path(file)
    if file.exists():
        raise ValueError(f"file={file} exists and is not overwritten; name another or remove it.")
    data = page_data(trace, tokens, prediction=prediction, row=row)
    parts = {
        "title": html.escape(title),
        "about": "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in (about or {}).items()
        ),
        "prediction": _prediction_section(prediction, trace.has_repetition),
        "repetition": " through the repetition lambdas, by how far they stand from the token's other occurrences;"
        if trace.has_repetition
        else "",
        "table": _token_table(data),
        "plain": html.escape(_plain_text(data)),
        # no tag of the text ends the script that holds it
        "data": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    file.write_text(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template), encoding="utf-8")
    return file


def page_data(
    trace: LambdaTrace, tokens: Sequence[str], *, prediction: ExplainedPrediction | None = None, row: int = 0
) -> dict[str, Any]:
    """What the page's script draws: real tokens only, `places` being theirs in the row.

    Args:
        trace, tokens, prediction, row: as in `save_html`.

    Returns:
        For each layer, packed by `pack`: "queries" [N, H, K], "keys" [N, K, U], "embeddings" [R, K, U] with the offset
        0 in the middle, "shares" [N, K] of `token_shares`, and "left_out" [N, K], by how much of its length a key
        channel of the content lambda changes when the place is left out of the layer's keys. Where there is a
        repetition lambda, also its "repetition_embeddings" [R', K, U]; and, of the text, "same", numbers that are the
        same for the same token, -1 for one like no other.

    Raises:
        ValueError: as in `save_html`.
    """
    rows, length = trace.token_mask.shape
    if not 0 <= row < rows:
        raise ValueError(f"row={row}: the trace has {rows} rows; give one of 0 ... {rows - 1}.")
    if len(tokens) != length:
        raise ValueError(f"tokens has {len(tokens)} entries for {length} places; give one for each, padding included.")
    kept = trace.token_mask[row].nonzero()[:, 0]
    if not len(kept):
        raise ValueError(f"row={row} has no token to show; give a text.")
    layers = []
    for index, layer in enumerate(trace.layers):
        of_tokens = token_shares(trace, index)
        changes = (of_tokens.left_out - layer.content[:, None])[row, kept].norm(dim=-1)
        layers.append(
            {
                "queries": pack(layer.queries[row, kept]),
                "keys": pack(layer.content_keys[row, kept]),
                "embeddings": pack(_in_reach(layer.relative_embeddings, length)),
                "shares": pack(of_tokens.shares[row, kept]),
                "left_out": pack(changes / layer.content[row].norm(dim=-1).clamp(min=1e-30)),
            }
        )
        if layer.repetition_embeddings is not None:
            layers[-1]["repetition_embeddings"] = pack(_in_reach(layer.repetition_embeddings, length))
    data = {
        "tokens": [tokens[place] for place in kept.tolist()],
        "places": kept.tolist(),
        "layers": layers,
        "attributions": _attributions(prediction, kept),
        "chosen": 0 if prediction is None or prediction.place is None else kept.tolist().index(prediction.place),
    }
    if trace.has_repetition:
        repetitions = trace.layers[0].repetitions
        same = repetitions.slots.view(rows, length).masked_fill(~repetitions.occurs, -1)
        data["same"] = same[row, kept].tolist()
    return data


def _in_reach(embeddings: torch.Tensor, length: int) -> torch.Tensor:
    """The offsets of a table [R, K, U] that occur in a text of that length."""
    centre = embeddings.shape[0] // 2
    seen = min(centre, length - 1)
    return embeddings[centre - seen : centre + seen + 1]


def pack(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as little-endian 16-bit integers in base64, with the shape and the scale that each is multiplied by.

    Every number is within half a scale of its own, 1 / 65534 of the largest.

    Raises:
        ValueError: numbers that are not finite.
    """
    numbers = tensor.detach().cpu().double()
    if not numbers.isfinite().all():
        raise ValueError("trace holds numbers that are not finite, and nothing can be drawn of them; fix the model.")
    scale = max(numbers.abs().max().item() / STEPS, 1e-30)
    whole = (numbers / scale).round().numpy().astype("<i2")
    return {"shape": list(whole.shape), "scale": scale, "data": base64.b64encode(whole.tobytes()).decode()}


def _attributions(prediction: ExplainedPrediction | None, kept: torch.Tensor) -> dict[str, list[float]]:
    if prediction is None:
        return {}
    shape = tuple(prediction.explanation.tokens.shape)
    if len(shape) != 2 or shape[0] != 1 or shape[1] <= kept.max():
        raise ValueError(
            f"prediction: its explanation is of {list(shape)} tokens, and the row has them up to place {kept.max()}; "
            "explain that row alone."
        )
    return {name: way.tokens[0, kept].tolist() for name, way in prediction.ways().items()}


def _prediction_section(prediction: ExplainedPrediction | None, has_repetition: bool) -> str:
    """What is predicted, and by layer what the logit owes to each part; empty without a prediction."""
    if prediction is None:
        return ""
    explanation = prediction.explanation
    parts = [part for part in PARTS_OF_LAYER if part != "repetition" or has_repetition]
    sums = [[getattr(layer, part)[0].sum().item() for part in parts] for layer in explanation.layers]
    logit, bias = explanation.logit[0].item(), explanation.bias[0].item()
    lines = [
        '<section aria-labelledby="h-prediction"><h2 id="h-prediction">The prediction</h2>',
        f"<p>{html.escape(prediction.of)} The contributions of the tokens add up to <b>{_signed(logit - bias)}</b>; "
        f"with the bias <b>{_signed(bias)}</b>, which is the logit of a text half-way to [MASK], to the logit "
        f"<b>{_signed(logit)}</b>.</p>",
    ]
    if prediction.likeliest:
        shown = (f"{html.escape(name)} <b>{probability:.3f}</b>" for name, probability in prediction.likeliest)
        lines.append("<p>Likeliest: " + ", ".join(shown) + ".</p>")
    head = "".join(f'<th scope="col">{part}</th>' for part in ("layer", *parts))
    body = "".join(
        f'<tr><th scope="row">{number}</th>' + "".join(f"<td>{_signed(value)}</td>" for value in values) + "</tr>"
        for number, values in enumerate(sums)
    )
    lines.append(
        "<p>What passes each layer, by the part that it passes: the content lambda (its keys and values), the position "
        f"lambdas, {'the repetition lambdas, ' if has_repetition else ''}the queries, or the residual past the layer. "
        "Each row has the same sum.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )
    return "\n".join(lines)


def _signed(number: float) -> str:
    return f"{number:+.3f}".translate(MINUS)


def _columns(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Numbers of each token as text, by the column's name."""
    columns = {name: [_signed(value) for value in values] for name, values in data["attributions"].items()}
    for number, layer in enumerate(data["layers"]):
        shares = unpack(layer["shares"]).mean(1).tolist()
        columns[f"share of λc, layer {number}"] = [f"{100 * share:.1f} %".translate(MINUS) for share in shares]
    return columns


def unpack(packed: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that `pack` stored, in float64."""
    whole = torch.frombuffer(bytearray(base64.b64decode(packed["data"])), dtype=torch.int16)
    return whole.view(packed["shape"]).double() * packed["scale"]


def _token_table(data: Mapping[str, Any]) -> str:
    columns = _columns(data)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("place", "token", *columns))
    body = "".join(
        f'<tr><td>{place}</td><th scope="row">{html.escape(token)}</th>'
        + "".join(f"<td>{column[i]}</td>" for column in columns.values())
        + "</tr>"
        for i, (place, token) in enumerate(zip(data["places"], data["tokens"]))
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _plain_text(data: Mapping[str, Any]) -> str:
    columns = _columns(data)
    lines = [
        f"{place} {token}: " + ", ".join(f"{name} {column[i]}" for name, column in columns.items())
        for i, (place, token) in enumerate(zip(data["places"], data["tokens"]))
    ]
    return "\n".join(lines)
