"""Changes of a model that are not settings of the library, for ablations."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import lambda_layer
from lambda_layer import LambdaLayer


def content_only(layer: LambdaLayer) -> None:
    """No position lambda: E stays zero."""
    nn.init.zeros_(layer.relative_embeddings)
    layer.relative_embeddings.requires_grad_(False)


def flat_embeddings(layer: LambdaLayer) -> None:
    """E starts with the same scale at every distance; outputs of unit variance as before."""
    nn.init.normal_(layer.relative_embeddings, std=layer.relative_embeddings.numel() ** -0.5)


def quarter_embeddings(layer: LambdaLayer) -> None:
    """E starts at a quarter of its scale."""
    layer.relative_embeddings.data /= 4


def fourfold_embeddings(layer: LambdaLayer) -> None:
    """E starts at four times its scale."""
    layer.relative_embeddings.data *= 4


def normalised_output(layer: LambdaLayer) -> None:
    """RMSNorm over the value depth of each query, as in retentive networks."""
    depth = layer.to_values.out_features // layer.intra_depth
    layer.output_norm = nn.RMSNorm(depth)

    def normalise(layer: Any, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> Any:
        mixed, content = outputs
        return layer.output_norm(mixed.unflatten(-1, (-1, depth))).flatten(-2), content

    layer.register_forward_hook(normalise)


def gated_output(layer: LambdaLayer) -> None:
    """Output times the swish of a projection of the input, as in gated linear attention."""
    width = layer.to_queries.in_features
    layer.output_gate = nn.Linear(width, width)
    nn.init.normal_(layer.output_gate.weight, std=width**-0.5)
    nn.init.ones_(layer.output_gate.bias)

    def gate(layer: Any, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> Any:
        mixed, content = outputs
        return mixed * nn.functional.silu(layer.output_gate(inputs[0])), content

    layer.register_forward_hook(gate)


LAYER_VARIANTS = {
    "content only": content_only,
    "flat E": flat_embeddings,
    "E / 4": quarter_embeddings,
    "4 E": fourfold_embeddings,
    "normalised output": normalised_output,
    "gated output": gated_output,
}


def wide_output_projection(model: Any) -> None:
    """The output projection starts as BERT's, not smaller by sqrt(2 layers)."""
    for layer in model.bert.encoder.layer:
        nn.init.normal_(layer.attention.output.dense.weight, std=model.config.initializer_range)


def zero_bias(model: Any) -> None:
    """The MLM head does not start at the log frequencies of the training text."""
    nn.init.zeros_(model.cls.predictions.bias)


MODEL_VARIANTS = {"BERT's output projection": wide_output_projection, "MLM bias 0": zero_bias}


def no_content_lambda(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Zeros [B, K, V] for keys [B, M, K, U] and values [B, M, V, U]."""
    return values.new_zeros(len(keys), keys.shape[2], values.shape[2])


PATCHES: dict[str, dict[str, Any]] = {"position only": {"content_lambda": no_content_lambda}}
VARIANTS = {*LAYER_VARIANTS, *MODEL_VARIANTS, *PATCHES}
BERT_VARIANTS = {"MLM bias 0"}  # those that mean something without lambda layers


def check_variant(name: str | None) -> None:
    """Raises a `ValueError` where there is no such variant."""
    if name is not None and name not in VARIANTS:
        raise ValueError(f"variant={name!r} is unknown; use one of {sorted(VARIANTS)}.")


def apply_variant(model: nn.Module, name: str | None) -> None:
    """Changes the layers, weights or both of a new model.

    Raises:
        ValueError: there is no such variant.
    """
    check_variant(name)
    if name in MODEL_VARIANTS:
        MODEL_VARIANTS[name](model)
    if name in LAYER_VARIANTS:
        for layer in list(model.modules()):
            if isinstance(layer, LambdaLayer):
                LAYER_VARIANTS[name](layer)


def running_variant(name: str | None) -> AbstractContextManager[Any]:
    """A context in which the library's functions are changed where the variant asks for it."""
    return patch.multiple(lambda_layer, **PATCHES[name]) if name in PATCHES else nullcontext()
