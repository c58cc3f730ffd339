"""What a probe is given of each text: content lambdas, and the simpler rows that they must beat."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from einops import einsum
from tqdm import tqdm
from transformers import PreTrainedModel

from .models import lambda_layers, model_inputs, project_keys
from .traces import trace_lambdas

RANDOM_MODELS = 3


def feature_rows(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Features [S, F] of the S texts of all batches, by the row's name.

    Of the text alone: "majority" (nothing), "length", "bag of words". Of the model: "mean embedding", and for each
    layer i "mean hidden state i" (its output), "mean value i", "content lambda i" and "random-key content lambda i", in
    which only the keys are random; "content lambda, all layers". Of three models with random weights and
    the same config, but without a gain: "random model j, mean hidden state i", "random model j, content lambda i" and
    "random model j, content lambda, all layers". Means are over real tokens; layers and models count from 0.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.
        batches: what its tokenizer returns with `return_tensors="pt"`, [B, N] each.
        seed: of the random keys and models.

    Raises:
        ValueError: no batch; as in `trace_lambdas`.
    """
    learned = lambda_layers(model)
    encoder: Any = model.base_model  # heads have no part in it
    batches = [_in_rows(model_inputs(encoder, inputs)) for inputs in batches]
    if not batches:
        raise ValueError("batches=[]: there is no text to take features of; give one or more.")
    rows: dict[str, list[torch.Tensor]] = {}

    def add(name: str, features: torch.Tensor) -> None:
        rows.setdefault(name, []).append(features.float().cpu())

    key_weights = _random_keys(learned, seed)
    for inputs in tqdm(batches, unit="batch", desc="features"):
        trace = trace_lambdas(encoder, inputs)
        mask = trace.token_mask
        add("majority", torch.zeros(len(mask), 1))
        add("length", mask.sum(1, keepdim=True))
        words = torch.zeros(len(mask), encoder.config.vocab_size, device=mask.device)
        add("bag of words", words.scatter_add_(1, inputs["input_ids"], mask.float()))
        add("mean embedding", mean_of_tokens(trace.outputs.hidden_states[0], mask))
        for i, layer in enumerate(trace.layers):
            add(f"mean value {i}", mean_of_tokens(layer.values.flatten(2), mask))
            keys = project_keys(learned[i], layer.hidden_states @ key_weights[i].T, mask)
            content = einsum(keys, layer.values, layer.content_gain, "b m k u, b m v u, k -> b k v")
            add(f"random-key content lambda {i}", content.flatten(1))
        _add_by_layer(add, "", [layer.content for layer in trace.layers], trace.outputs.hidden_states, mask)
    for number, other in enumerate(_random_models(encoder, seed)):
        for inputs in tqdm(batches, unit="batch", desc=f"random model {number}"):
            with torch.no_grad():
                outputs = other(**inputs, output_lambda_params=True, output_hidden_states=True)
            prefix, mask = f"random model {number}, ", inputs["attention_mask"].bool()
            _add_by_layer(add, prefix, outputs.lambda_params, outputs.hidden_states, mask)
    return {name: torch.cat(found) for name, found in rows.items()}


def _in_rows(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs [..., N], with the choices of a question, as [B, N]."""
    return {name: value.flatten(0, -2) for name, value in inputs.items()}


def _add_by_layer(
    add: Any, prefix: str, contents: Sequence[torch.Tensor], states: Sequence[torch.Tensor], mask: torch.Tensor
) -> None:
    """The rows of content lambdas [B, K, V] by layer, and of hidden states [B, N, D], the first of them the input."""
    for i, (content, of_layer) in enumerate(zip(contents, states[1:])):
        add(f"{prefix}mean hidden state {i}", mean_of_tokens(of_layer, mask))
        add(f"{prefix}content lambda {i}", content.flatten(1))
    add(f"{prefix}content lambda, all layers", torch.cat([content.flatten(1) for content in contents], 1))


def mean_of_tokens(of_tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, C], the mean of [B, N, C] over real tokens."""
    return (of_tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _random_keys(layers: list[Any], seed: int) -> list[torch.Tensor]:
    """For each layer a key projection [K U, D] of the learned one's size and standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.to_keys.weight.detach() for layer in layers]
    return [
        (torch.randn(weight.shape, generator=generator) * weight.float().std().cpu()).to(weight) for weight in weights
    ]


def _random_models(encoder: Any, seed: int) -> Iterable[PreTrainedModel]:
    config = deepcopy(encoder.config)
    config.content_gain = False  # one that is not trained is 0, and so would be the content lambdas
    for number in range(RANDOM_MODELS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            yield type(encoder)(config).to(device=encoder.device, dtype=encoder.dtype).eval()
