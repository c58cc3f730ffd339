"""Content lambdas put in the place of a model's own while it runs."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .models import REPLACED, check_layer, hooks, lambda_layers, project_queries
from .traces import trace_lambdas

WORDS = ("zero", "mean")
Replacement = torch.Tensor | str | Mapping[str, Any]


@contextmanager
def replace_lambdas(model: PreTrainedModel, replacements: Mapping[int, Replacement]) -> Iterator[PreTrainedModel]:
    """Within this context, layers of the model apply other content lambdas than their own.

    A content lambda has no places, so that of a text of any length fits. The position and repetition lambdas stay as
    they are, and so do values and keys. The model's `lambda_params` show what was applied. A replacement equal to the
    layer's own content lambda leaves every bit of the output as it was. Explanations, and maps and shares of a trace
    from within, would be of keys that are not used, and are refused.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.
        replacements: for each layer (0 for the first) one of
            a tensor [K, V] for all rows, or [B, K, V];
            "zero";
            "mean", of the rows of the batch;
            the inputs of another text, or of one text for each row: its content lambda of that layer.

    Raises:
        ValueError: an unknown layer or word, a content lambda of another shape, the mean of a single row, a layer whose
            content lambda is replaced already.
    """
    layers = lambda_layers(model)
    contents: dict[int, torch.Tensor | str] = {}
    for index, replacement in replacements.items():
        check_layer(index, len(layers))
        if layers[index] in REPLACED:
            raise ValueError(
                f"replacements[{index}]: the content lambda of this layer is replaced already; leave that first."
            )
        if isinstance(replacement, Mapping):
            contents[index] = trace_lambdas(model, replacement).layers[index].content
        elif isinstance(replacement, torch.Tensor) or (isinstance(replacement, str) and replacement in WORDS):
            contents[index] = replacement
        else:
            raise ValueError(
                f"replacements[{index}]={replacement!r} is not a content lambda: give a tensor [K, V] or [B, K, V], "
                '"zero", "mean", or what the tokenizer returns for another text.'
            )

    def hook(index: int) -> Callable[..., Any]:
        def replace(layer: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            outputs, own = output
            content = _content_lambda(contents[index], own, index)
            hidden_states = positional[0]
            change = content - own
            if hidden_states.shape[0] == own.shape[0]:
                change = change[:, None]  # [B, 1, K, V]
            else:  # the real tokens of all rows, packed as one
                packing = keywords["packing"] if "packing" in keywords else positional[2]
                rows = torch.arange(own.shape[0], device=own.device)[:, None].expand(packing.shape)
                change = change[packing.pack(rows)]  # [1, T, K, V]
            changes = project_queries(layer, hidden_states) @ change
            return outputs + changes.flatten(-2), content

        return replace

    # ahead of those that record outputs
    options = {"with_kwargs": True, "prepend": True}
    with hooks([layers[index].register_forward_hook(hook(index), **options) for index in contents]):
        replaced = [layers[index] for index in contents]
        REPLACED.update(replaced)
        try:
            yield model
        finally:
            REPLACED.difference_update(replaced)


def _content_lambda(replacement: torch.Tensor | str, own: torch.Tensor, index: int) -> torch.Tensor:
    """The replacement [B, K, V] of a layer's own content lambda [B, K, V]."""
    if isinstance(replacement, torch.Tensor):
        content = replacement.to(own)
        if content.shape[-2:] != own.shape[-2:] or content.shape[:-2] not in ((), (1,), own.shape[:1]):
            raise ValueError(
                f"replacements[{index}] has shape {tuple(content.shape)}, but the content lambda of layer {index} is "
                f"{list(own.shape)}: give that shape, or {list(own.shape[1:])} for all rows."
            )
        return content.expand_as(own)
    if replacement == "zero":
        return torch.zeros_like(own)
    if len(own) == 1:
        raise ValueError(
            f'replacements[{index}]="mean": the batch has 1 row, whose mean is its own content lambda; give several '
            "rows, or a mean of other texts as a tensor [K, V]."
        )
    return own.mean(0, keepdim=True).expand_as(own)
