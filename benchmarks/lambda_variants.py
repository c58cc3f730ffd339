"""Changes to models that are no settings of the library, for the ablations of `bench_quality.py`."""

from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import nn

import lambda_layer
from lambda_layer import LambdaLayer


def content_only(layer: LambdaLayer):
    """No position lambda: E stays zero."""
    nn.init.zeros_(layer.relative_embeddings)
    layer.relative_embeddings.requires_grad_(False)


def flat_embeddings(layer: LambdaLayer):
    """E starts with the same scale at every distance; outputs of unit variance as before."""
    nn.init.normal_(layer.relative_embeddings, std=layer.relative_embeddings.numel() ** -0.5)


def quarter_embeddings(layer: LambdaLayer):
    layer.relative_embeddings.data /= 4


def fourfold_embeddings(layer: LambdaLayer):
    layer.relative_embeddings.data *= 4


def normalised_output(layer: LambdaLayer):
    """RMSNorm over the value depth of each query, as in retentive networks."""
    depth = layer.to_values.out_features // layer.intra_depth
    layer.output_norm = nn.RMSNorm(depth)

    def normalise(layer, inputs, outputs):
        mixed, content = outputs
        return layer.output_norm(mixed.unflatten(-1, (-1, depth))).flatten(-2), content

    layer.register_forward_hook(normalise)


def gated_output(layer: LambdaLayer):
    """Output times the swish of a projection of the input, as in gated linear attention."""
    width = layer.to_queries.in_features
    layer.output_gate = nn.Linear(width, width)
    nn.init.normal_(layer.output_gate.weight, std=width**-0.5)
    nn.init.ones_(layer.output_gate.bias)

    def gate(layer, inputs, outputs):
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


def wide_output_projection(model: nn.Module):
    """The output projection starts as BERT's, not smaller by sqrt(2 layers)."""
    for layer in model.bert.encoder.layer:
        nn.init.normal_(layer.attention.output.dense.weight, std=model.config.initializer_range)


def zero_bias(model: nn.Module):
    """The MLM head does not start at the log frequencies of the training text."""
    nn.init.zeros_(model.cls.predictions.bias)


MODEL_VARIANTS = {"BERT's output projection": wide_output_projection, "MLM bias 0": zero_bias}


def no_content_lambda(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Zeros [B, K, V] for keys [B, M, K, U] and values [B, M, V, U]."""
    return values.new_zeros(len(keys), keys.shape[2], values.shape[2])


PATCHES = {"position only": {"content_lambda": no_content_lambda}}
VARIANTS = {*LAYER_VARIANTS, *MODEL_VARIANTS, *PATCHES}


def apply_variant(model: nn.Module, name: str | None):
    """Changes the layers, weights or both of a new model.

    Raises:
        ValueError: there is no such variant.
    """
    if name is not None and name not in VARIANTS:
        raise ValueError(f"variant={name!r} is unknown; use one of {sorted(VARIANTS)}.")
    if name in MODEL_VARIANTS:
        MODEL_VARIANTS[name](model)
    for layer in list(model.modules()) if name in LAYER_VARIANTS else ():
        if isinstance(layer, LambdaLayer):
            LAYER_VARIANTS[name](layer)


def running_variant(name: str | None):
    """A context in which the library's functions are changed where the variant asks for it."""
    return patch.multiple(lambda_layer, **PATCHES[name]) if name in PATCHES else nullcontext()


__all__ = ["VARIANTS", "apply_variant", "running_variant"]
