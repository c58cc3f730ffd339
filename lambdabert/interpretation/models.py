"""What interpretation asks of a model and its inputs: lambda layers in evaluation mode, known names, tokens as ids.

Nothing here imports the model's files: a model that came from a saved folder has classes of its own.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, Iterator
from weakref import WeakSet

import torch
from einops import rearrange
from torch import nn
from transformers import PreTrainedModel


def lambda_layers(model: PreTrainedModel) -> list[Any]:
    """The lambda layers of a LambdaBERT of any class, first layer first.

    Raises:
        ValueError: a model without lambda layers, one wrapped by PEFT, compiled, or in training mode.
    """
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        raise ValueError(f"model={type(model).__name__} wraps a LambdaBERT: give model.get_base_model().")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"model={type(model).__name__} is compiled, and runs without what is hooked into it: load the model anew, "
            "or give what torch.compile was given."
        )
    blocks = getattr(getattr(getattr(model, "base_model", None), "encoder", None), "layer", ())
    layers = [getattr(getattr(block, "attention", None), "self", None) for block in blocks]
    if not layers or not all(hasattr(layer, "relative_embeddings") for layer in layers):
        raise ValueError(
            f"model={type(model).__name__} has no lambda layers to look into: give a LambdaBERT; from_bert turns a "
            "BERT into one."
        )
    if any(module.training for module in model.modules()):
        raise ValueError(
            "model.training=True, of a part of it at least: dropout and batch statistics would make what is found "
            "depend on chance; call model.eval() first."
        )
    return layers


REPLACED: WeakSet[Any] = WeakSet()  # layers whose content lambda is currently replaced


def check_layer(layer: int, count: int) -> None:
    """Refuses a layer other than 0 ... count - 1."""
    if not isinstance(layer, int) or not 0 <= layer < count:
        raise ValueError(f"layer={layer!r}: the model has {count} lambda layers; give one of 0 ... {count - 1}.")


def model_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A tokenizer's output as the model's arguments, on its device, with a mask; labels are left out.

    Raises:
        ValueError: no `input_ids`, or ids that are not a tensor.
    """
    input_ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(
            f"inputs={type(inputs).__name__} holds no tensor of input_ids: give what the tokenizer returns with "
            'return_tensors="pt".'
        )
    named = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    arguments = {name: inputs[name].to(model.device) for name in named if inputs.get(name) is not None}
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return arguments


def layer_mask(arguments: tuple, keywords: dict[str, Any]) -> torch.Tensor | None:
    """The mask [B, N] among the arguments of a lambda layer's forward."""
    return arguments[1] if len(arguments) > 1 else keywords.get("attention_mask")


def layer_repetitions(arguments: tuple, keywords: dict[str, Any]) -> Any:
    """Which of the [B, N] tokens are the same, a `Repetitions` of the model's code, among the arguments of a lambda
    layer's forward on a batch that is not packed; None where no layer asks."""
    layout = arguments[2] if len(arguments) > 2 else keywords.get("packing")
    return getattr(layout, "repetitions", None)  # the code of an older saved folder has none


def normalise(norm: Any, channels: torch.Tensor) -> torch.Tensor:
    """A lambda layer's norm of queries or values [..., C] in evaluation mode, in which it sees one token at a time."""
    # the paper's batch norm takes a mask for its statistics
    return norm(channels, None) if isinstance(norm, nn.BatchNorm1d) else norm(channels)


def project_queries(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Queries [..., H, K] of hidden states [..., D]."""
    queries = normalise(layer.query_norm, layer.to_queries(hidden_states)).to(hidden_states.dtype)
    return rearrange(queries, "... (h k) -> ... h k", h=layer.num_queries)


def project_keys(layer: Any, logits: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Keys [B, M, K, U], each channel a distribution over the places, of the softmax's logits [B, M, K U]."""
    softmax_dtype = torch.promote_types(logits.dtype, torch.float32)
    if token_mask is not None:
        padding = ~token_mask.bool()[..., None]
        logits = logits.to(softmax_dtype).masked_fill(padding, torch.finfo(softmax_dtype).min)
    keys = logits.softmax(dim=1, dtype=softmax_dtype).to(layer.relative_embeddings.dtype)
    return rearrange(keys, "b m (k u) -> b m k u", u=layer.intra_depth)


def project_values(layer: Any, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Values [B, M, V, U] of hidden states [B, M, D], zero at padding."""
    values = normalise(layer.value_norm, layer.to_values(hidden_states)).to(hidden_states.dtype)
    if token_mask is not None:
        values = values.masked_fill(~token_mask.bool()[..., None], 0)
    return rearrange(values, "b m (v u) -> b m v u", u=layer.intra_depth)


def content_gain(layer: Any) -> torch.Tensor:
    """What the layer multiplies the key channels of its content lambda by, [K]: ones where it learns no gain."""
    gain = getattr(layer, "content_gain", None)  # the code of an older saved folder has none
    return layer.relative_embeddings.new_ones(layer.key_depth) if gain is None else gain


def repetition_embeddings(layer: Any) -> torch.Tensor | None:
    """The table T of the layer's repetition lambda, [R', K, U]; None where it has none."""
    return getattr(layer, "repetition_embeddings", None)  # the code of an older saved folder has none


def toeplitz(relative_embeddings: torch.Tensor, length: int) -> torch.Tensor:
    """E[m - n], or T's, as [N, M, K, U], zero out of scope; the middle of [R, K, U] is the offset 0."""
    centre = relative_embeddings.shape[0] // 2
    places = torch.arange(length, device=relative_embeddings.device)
    offsets = rearrange(places, "m -> 1 m") - rearrange(places, "n -> n 1")
    in_scope = rearrange(offsets.abs() <= centre, "n m -> n m 1 1")
    return relative_embeddings[(offsets + centre).clamp(0, 2 * centre)].masked_fill(~in_scope, 0)


@contextmanager
def hooks(handles: list) -> Iterator[None]:
    """Removes hooks, registered before, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
