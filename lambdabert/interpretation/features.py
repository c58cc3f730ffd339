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
    """Features [S, F] of the S texts of all batches, by the row's name: those of `model_rows` and of `random_rows`.

    Args:
        model: a LambdaBERT of any class, in evaluation mode.
        batches: what its tokenizer returns with `return_tensors="pt"`, [B, N] each.
        seed: of the random keys and models.

    Raises:
        ValueError: no batch; as in `trace_lambdas`.
    """
    batches = list(batches)
    return model_rows(model, batches, seed) | random_rows(model, batches, seed)


def model_rows(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of the texts and of a model.

    Of the text alone: "majority" (nothing), "length", "bag of words". Of the model: "mean embedding" (of words and
    segments, without positions), and for each layer i "mean hidden state i" (its output), "mean value i", "content
    lambda i" and "random-key content lambda i", in which only the keys are random; "content lambda, all layers". Means
    are over real tokens; layers count from 0.

    Args, raises: as in `feature_rows`.
    """
    learned = lambda_layers(model)
    encoder: Any = model.base_model  # heads have no part in it
    add = _Rows()
    key_weights = _random_keys(learned, seed)
    for inputs in tqdm(_in_rows(encoder, batches), unit="batch", desc="features"):
        trace = trace_lambdas(encoder, inputs)
        mask = trace.token_mask
        add("majority", torch.zeros(len(mask), 1))
        add("length", mask.sum(1, keepdim=True).float())
        words = torch.zeros(len(mask), encoder.config.vocab_size, device=mask.device, dtype=torch.int)
        add("bag of words", words.scatter_add_(1, inputs["input_ids"], mask.int()))
        add("mean embedding", mean_of_tokens(word_embeddings(encoder, inputs), mask))
        for i, layer in enumerate(trace.layers):
            add(f"mean value {i}", mean_of_tokens(layer.values.flatten(2), mask))
            keys = project_keys(learned[i], layer.hidden_states @ key_weights[i].T, mask)
            content = einsum(keys, layer.values, layer.content_gain, "b m k u, b m v u, k -> b k v")
            add(f"random-key content lambda {i}", content.flatten(1))
        add.by_layer("", [layer.content for layer in trace.layers], trace.outputs.hidden_states, mask)
    return add.found()


@torch.no_grad()
def random_rows(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of three models with random weights and the same config.

    "random model j, mean hidden state i", "random model j, content lambda i" and "random model j, content lambda, all
    layers"; layers and models count from 0. A gain and repetition lambdas are 0 in a model that is not trained; content
    lambdas, which would be 0 with the gain, are those of the same weights without one.

    Args, raises: as in `feature_rows`.
    """
    encoder: Any = model.base_model
    add = _Rows()
    rows = _in_rows(encoder, batches)
    without_gain = deepcopy(encoder.config)
    without_gain.content_gain = False
    for number in range(RANDOM_MODELS):
        other = of_content = _random_model(encoder, encoder.config, seed + number)
        if getattr(encoder.config, "content_gain", False):  # the code of an older saved folder has none
            of_content = _random_model(encoder, without_gain, seed + number)
        for inputs in tqdm(rows, unit="batch", desc=f"random model {number}"):
            outputs: Any = other(**inputs, output_lambda_params=True, output_hidden_states=True)
            contents = outputs.lambda_params
            if of_content is not other:
                contents = of_content(**inputs, output_lambda_params=True).lambda_params
            mask = inputs["attention_mask"].bool()
            add.by_layer(f"random model {number}, ", contents, outputs.hidden_states, mask)
    return add.found()


class _Rows:
    """Gathers the features of batches, by the row's name."""

    def __init__(self) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}

    def __call__(self, name: str, features: torch.Tensor) -> None:
        features = features.float() if features.is_floating_point() else features  # counts stay whole numbers
        self.rows.setdefault(name, []).append(features.cpu())

    def by_layer(
        self, prefix: str, contents: Sequence[torch.Tensor], states: Sequence[torch.Tensor], mask: torch.Tensor
    ) -> None:
        """Content lambdas [B, K, V] of each layer and hidden states [B, N, D], the first of them the input."""
        for i, (content, of_layer) in enumerate(zip(contents, states[1:])):
            self(f"{prefix}mean hidden state {i}", mean_of_tokens(of_layer, mask))
            self(f"{prefix}content lambda {i}", content.flatten(1))
        self(f"{prefix}content lambda, all layers", torch.cat([content.flatten(1) for content in contents], 1))

    def found(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(features) for name, features in self.rows.items()}


def _in_rows(encoder: Any, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Inputs [..., N], with the choices of a question, as [B, N]."""
    if not batches:
        raise ValueError("batches=[]: there is no text to take features of; give one or more.")
    named = [model_inputs(encoder, inputs) for inputs in batches]
    return [{name: value.flatten(0, -2) for name, value in inputs.items()} for inputs in named]


@torch.no_grad()
def word_embeddings(encoder: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, N, D], the encoder's input without position embeddings, which would tell a text's length."""
    embeddings, ids = encoder.embeddings, inputs["input_ids"]
    segments = inputs.get("token_type_ids", torch.zeros_like(ids))
    return embeddings.LayerNorm(embeddings.word_embeddings(ids) + embeddings.token_type_embeddings(segments))


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


def _random_model(encoder: Any, config: Any, seed: int) -> PreTrainedModel:
    """An encoder of the same class with that config; one seed gives the same weights with and without a gain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(encoder)(config).to(device=encoder.device, dtype=encoder.dtype).eval()
