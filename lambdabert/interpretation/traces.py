"""What every lambda layer computed for a batch: queries, keys, values, content lambdas and outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from transformers import PreTrainedModel

from .models import (
    REPLACED,
    content_gain,
    hooks,
    lambda_layers,
    layer_mask,
    layer_repetitions,
    model_inputs,
    project_keys,
    project_queries,
    project_values,
    repetition_embeddings,
)


@dataclass
class LayerTrace:
    """One lambda layer's part of a trace.

    Attributes:
        hidden_states: [B, N, D], what the layer was given.
        queries: [B, N, H, K]
        keys: [B, M, K, U], each channel a distribution over M, zero at padding.
        values: [B, M, V, U], zero at padding.
        content_gain: [K], what the layer multiplies its content lambda by; ones where it learns no gain.
        content: the content lambda that was applied, [B, K, V].
        is_replaced: whether that is another than its own, put there by `replace_lambdas`.
        outputs: [B, N, H, V]
        relative_embeddings: the layer's E, [R, K, U]; its middle is the offset m - n = 0.
        repetition_embeddings: its T, [R', K, U]; its middle is an occurrence itself. None without a repetition lambda.
        repetitions: the `Repetitions` of the B rows, which say what tokens are the same; None likewise.
    """

    hidden_states: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    content_gain: torch.Tensor
    content: torch.Tensor
    is_replaced: bool
    outputs: torch.Tensor
    relative_embeddings: torch.Tensor
    repetition_embeddings: torch.Tensor | None
    repetitions: Any

    @property
    def content_keys(self) -> torch.Tensor:
        """Keys times the gain, [B, M, K, U]: their product with the values, summed over M and U, is `content`."""
        return self.keys * rearrange(self.content_gain, "k -> k 1")


@dataclass
class LambdaTrace:
    """What a model computed for a batch of B rows of N places.

    Attributes:
        layers: one `LayerTrace` for each lambda layer.
        token_mask: bool [B, N], True = token. The choices of a question are rows of their own, B = questions x choices.
        outputs: the model's output.
    """

    layers: list[LayerTrace]
    token_mask: torch.Tensor
    outputs: Any

    @property
    def has_repetition(self) -> bool:
        """Whether the layers have a repetition lambda."""
        return self.layers[0].repetition_embeddings is not None


@torch.no_grad()
def trace_lambdas(model: PreTrainedModel, inputs: Mapping[str, Any]) -> LambdaTrace:
    """Runs a model and records its lambda layers (section 3 of the paper).

    The padding of the batch is computed like tokens meanwhile, so every tensor has the layout of the inputs.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.
        inputs: what its tokenizer returns with `return_tensors="pt"`, [B, N] each ([B, C, N] with choices).

    Raises:
        ValueError: no lambda layers, training mode, no `input_ids`; and what the model refuses.
    """
    layers = lambda_layers(model)
    arguments = model_inputs(model, inputs)
    traces: dict[Any, LayerTrace] = {}

    def record(layer: Any, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        hidden_states = positional[0]
        token_mask = layer_mask(positional, keywords)
        queries = project_queries(layer, hidden_states)
        table = repetition_embeddings(layer)
        traces[layer] = LayerTrace(
            hidden_states=hidden_states,
            queries=queries,
            keys=project_keys(layer, layer.to_keys(hidden_states), token_mask),
            values=project_values(layer, hidden_states, token_mask),
            content_gain=content_gain(layer).detach(),
            content=output[1],
            is_replaced=layer in REPLACED,
            outputs=rearrange(output[0], "b n (h v) -> b n h v", h=queries.shape[2]),
            relative_embeddings=layer.relative_embeddings.detach(),
            repetition_embeddings=None if table is None else table.detach(),
            repetitions=layer_repetitions(positional, keywords),
        )

    with hooks([layer.register_forward_hook(record, with_kwargs=True) for layer in layers]):
        outputs = model(**arguments, output_hidden_states=True, return_dict=True)
    token_mask = arguments["attention_mask"].bool().flatten(0, -2)
    return LambdaTrace([traces[layer] for layer in layers], token_mask, outputs)
