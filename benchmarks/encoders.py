"""The models whose speed is compared: LambdaBERT, the encoders one would pick instead, and the floor.

All are of base shape (width 768) with random weights. The floor is LambdaBERT whose lambda layers compute their three
projections and nothing else: what its dense products cost, whatever is done about the lambdas. (In evaluation; in
training nothing would reach the projections' gradients.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    FNetConfig,
    FNetModel,
    ModernBertConfig,
    ModernBertModel,
)

from configuration_lambdabert import LambdaBertConfig
from lambda_layer import LambdaLayer
from modeling_lambdabert import LambdaBertForPreTrainingNSP, LambdaBertModel

PARTS = ("forward", "train", "mixed")
VARIATIONS = ("compiled", "int8", "full")
VOCABULARY = 30522
MASK = 103
LOCAL_SCOPE = 25
AROUND = 5  # of a repetition lambda


class ProjectionsOnly(LambdaLayer):
    """A lambda layer without lambdas: it projects, and hands its input on."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, packing: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns hidden_states [B, N, D] as they are, and an empty tensor for the content lambdas."""
        self.to_queries(hidden_states)
        self.to_keys(hidden_states)
        self.to_values(hidden_states)
        return hidden_states, hidden_states.new_empty(0)


def base_shape(layers: int, length: int, **fields: Any) -> dict[str, Any]:
    """Fields of every config, and more: `layers` deep, with room for `length` tokens."""
    return dict(vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=length, **fields)


def lambda_config(layers: int, length: int, scope: int | None, around: int | None = None) -> LambdaBertConfig:
    fields = dict(local_context_size=scope, repetition_context_size=around, mask_token_id=MASK)
    return LambdaBertConfig(**base_shape(layers, length, **fields))


def lambda_model(
    layers: int, length: int, scope: int | None, pretraining: bool, around: int | None = None
) -> nn.Module:
    """LambdaBERT with a local scope, or a global one where it is None, and with a repetition lambda unless that is."""
    config = lambda_config(layers, length, scope, around)
    return LambdaBertForPreTrainingNSP(config) if pretraining else LambdaBertModel(config)


def floor_model(layers: int, length: int, pretraining: bool) -> nn.Module:
    """LambdaBERT whose lambda layers only project."""
    model: Any = lambda_model(layers, length, LOCAL_SCOPE, pretraining)
    for block in getattr(model, "bert", model).encoder.layer:
        block.attention.self = ProjectionsOnly(model.config)
    return model


def bert_model(layers: int, length: int, pretraining: bool, attention: str = "sdpa") -> nn.Module:
    config = BertConfig(**base_shape(layers, length, attn_implementation=attention))
    return BertForPreTraining(config) if pretraining else BertModel(config)


def modernbert_model(layers: int, length: int) -> nn.Module:
    """ModernBERT of the shape of its own base model, but for the sizes of vocabulary and stack."""
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return ModernBertModel(ModernBertConfig(**base_shape(layers, length, attn_implementation="sdpa", **tokens)))


def fnet_model(layers: int, length: int) -> nn.Module:
    return FNetModel(FNetConfig(**base_shape(layers, length)))


@dataclass
class Row:
    """A model to time.

    Attributes:
        build: makes the model from layers, longest length and whether it pretrains.
        parts: the parts that it can run.
    """

    build: Callable[[int, int, bool], nn.Module]
    parts: tuple[str, ...] = PARTS


ROWS = {
    "lambda-local": Row(lambda layers, length, training: lambda_model(layers, length, LOCAL_SCOPE, training)),
    "lambda-global": Row(lambda layers, length, training: lambda_model(layers, length, None, training)),
    "lambda-repetitions": Row(
        lambda layers, length, training: lambda_model(layers, length, LOCAL_SCOPE, training, around=AROUND)
    ),
    "floor": Row(floor_model),
    "bert": Row(bert_model),
    "bert-flash": Row(partial(bert_model, attention="flash_attention_2")),
    "modernbert": Row(lambda layers, length, training: modernbert_model(layers, length), ("forward", "mixed")),
    "fnet": Row(lambda layers, length, training: fnet_model(layers, length), ("forward",)),
}


def split_name(name: str) -> tuple[str, set[str]]:
    """A row's model and the variations that its name ends in.

    Raises:
        ValueError: there is no such model.
    """
    model, variations = name, set()
    while model.rpartition("-")[2] in VARIATIONS:
        model, _, variation = model.rpartition("-")
        variations.add(variation)
    if model not in ROWS:
        endings = ", ".join(f"-{ending}" for ending in VARIATIONS)
        raise ValueError(f"rows: {name!r} is unknown; use one of {', '.join(ROWS)}, with any of {endings} behind it.")
    return model, variations


def runs(row: str, part: str) -> bool:
    """Whether a row belongs into a part: what is quantised does not train, and "-full" compares mixed lengths."""
    name, variations = split_name(row)
    if ("int8" in variations and part == "train") or ("full" in variations and part != "mixed"):
        return False
    return part in ROWS[name].parts
