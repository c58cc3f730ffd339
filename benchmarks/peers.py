"""New encoders of the same width, depth and feed-forward parameters as a LambdaBERT, to be trained beside it.

Each keeps the start, norms and activation of its own library class. All have the LambdaBERT's vocabulary and dropout,
and heads of 64 numbers, as the published base models have.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    ConvBertConfig,
    ConvBertForMaskedLM,
    FNetConfig,
    FNetForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)


class NextSentenceBert(BertForPreTraining):
    """`BertForPreTraining` under the label name of either sentence task."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
    ) -> Any:
        """Inputs [B, N], sentence labels [B]; 1 = not the next sentence, or swapped."""
        return super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            labels=labels,
            next_sentence_label=sentence_order_label if next_sentence_label is None else next_sentence_label,
        )


class PaddedFNet(FNetForMaskedLM):
    """FNet, which has no mask and mixes padding in, under the arguments of the others."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Any:
        """Inputs and labels [B, N]; the mask has no effect."""
        return super().forward(input_ids, token_type_ids, labels=labels)


def shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that all encoders share."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id")
    return {name: getattr(config, name) for name in names}


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    rate = config.hidden_dropout_prob
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def heads(config: PreTrainedConfig) -> int:
    return max(1, config.hidden_size // 64)


def bert_config(config: PreTrainedConfig) -> BertConfig:
    """The config of a BERT: all fields that it shares with a LambdaBERT's."""
    own = set(BertConfig().to_dict()) - {"model_type", "architectures", "auto_map"}
    fields = {name: value for name, value in config.to_dict().items() if name in own}
    return BertConfig(**fields | dropouts(config) | {"num_attention_heads": heads(config)})


def bert(config: PreTrainedConfig, objective: str) -> PreTrainedModel:
    """BERT; with pairs of sentences, `BertForPreTraining`."""
    return (BertForMaskedLM if objective == "mlm" else NextSentenceBert)(bert_config(config))


def modernbert(config: PreTrainedConfig, objective: str) -> PreTrainedModel:
    """ModernBERT: rotary positions, pre-norm, GeGLU, whose three matrices share the parameters of BERT's two."""
    special = {"cls_token_id": None, "sep_token_id": None, "bos_token_id": None, "eos_token_id": None}
    dropout = {f"{part}_dropout": config.hidden_dropout_prob for part in ("embedding", "mlp", "attention")}
    return ModernBertForMaskedLM(
        ModernBertConfig(
            **shape(config),
            **special,
            **dropout,
            num_attention_heads=heads(config),
            intermediate_size=config.intermediate_size * 2 // 3,
        )
    )


def convbert(config: PreTrainedConfig, objective: str) -> PreTrainedModel:
    """ConvBERT: half of the heads (`head_ratio` 2) attend, in place of the others stands a dynamic convolution."""
    fields = shape(config) | dropouts(config)
    return ConvBertForMaskedLM(
        ConvBertConfig(
            **fields,
            num_attention_heads=2 * heads(config),
            embedding_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )
    )


def fnet(config: PreTrainedConfig, objective: str) -> PreTrainedModel:
    """FNet: a Fourier transform over tokens and depth in place of attention."""
    fields = shape(config) | {"hidden_dropout_prob": config.hidden_dropout_prob}
    return PaddedFNet(FNetConfig(**fields, intermediate_size=config.intermediate_size))


# from a LambdaBERT's config and an objective to the peer
PEERS: dict[str, Callable[[PreTrainedConfig, str], PreTrainedModel]] = {
    "bert": bert,
    "convbert": convbert,
    "fnet": fnet,
    "modernbert": modernbert,
}
OF_PAIRS = {"bert"}  # those that have a head for pairs of sentences
