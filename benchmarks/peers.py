"""New encoders of the same width, depth and feed-forward parameters as a LambdaBERT, to be trained beside it.

Each keeps the initialization, norms and activation of its own library class, and ModernBERT its local attention: of
every three layers, two see 64 tokens to either side. All have the LambdaBERT's vocabulary, dropout and
`initializer_range`, and heads of 64 numbers, as the published base models have; but for ConvBERT, whose attending heads
have 32 here.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
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
from transformers.modeling_outputs import MaskedLMOutput

from lambdabert.text.masks import IGNORED_LABEL


class FrugalMaskedLM(PreTrainedModel):
    """A masked language model whose training step computes the logits of masked tokens alone: the same loss, sooner.

    So does LambdaBERT; a comparison of seconds a step would otherwise charge its peers for logits that no loss needs.
    """

    encoder_inputs: ClassVar[tuple[str, ...]] = ("attention_mask", "token_type_ids")

    def mlm_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden states [..., D]."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """Inputs and labels [B, N]; logits [B, N, vocabulary], or [masked tokens, vocabulary] while it trains."""
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = {name: given[name] for name in self.encoder_inputs}
        hidden_states = self.base_model(input_ids, **inputs).last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.mlm_logits(hidden_states))
        if self.training:
            masked = labels != IGNORED_LABEL
            hidden_states, labels = hidden_states[masked], labels[masked]
        logits = self.mlm_logits(hidden_states)
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        count = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return MaskedLMOutput(loss=losses / count, logits=logits)


class FrugalBert(FrugalMaskedLM, BertForMaskedLM):
    def mlm_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.cls(hidden_states)


class FrugalModernBert(FrugalMaskedLM, ModernBertForMaskedLM):
    encoder_inputs = ("attention_mask",)

    def mlm_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.head(hidden_states))


class FrugalConvBert(FrugalMaskedLM, ConvBertForMaskedLM):
    def mlm_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.generator_lm_head(self.generator_predictions(hidden_states))


class FrugalFNet(FrugalMaskedLM, FNetForMaskedLM):
    """FNet has no mask, and mixes padding in."""

    encoder_inputs = ("token_type_ids",)

    def mlm_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.cls(hidden_states)


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


# the fields of a config that all encoders share
SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id"),
    "initializer_range",
)
# those of a BERT that follow from others of a LambdaBERT's, or say nothing of the model
NOT_TAKEN = {"num_attention_heads", "attention_probs_dropout_prob", "model_type", "architectures", "auto_map"}


def used_fields(architecture: str) -> set[str]:
    """The fields of a LambdaBERT's config that decide a peer's."""
    if architecture == "bert":
        return set(BertConfig().to_dict()) - NOT_TAKEN
    return {*SHARED, "hidden_dropout_prob", "intermediate_size"}


def shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that all encoders share."""
    return {name: getattr(config, name) for name in SHARED}


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    rate = config.hidden_dropout_prob
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def heads(config: PreTrainedConfig) -> int:
    return max(1, config.hidden_size // 64)


def bert_config(config: PreTrainedConfig) -> BertConfig:
    """The config of a BERT: all fields that it shares with a LambdaBERT's."""
    own = used_fields("bert")
    fields = {name: value for name, value in config.to_dict().items() if name in own}
    return BertConfig(**fields | dropouts(config) | {"num_attention_heads": heads(config)})


def bert(config: PreTrainedConfig, objective: str) -> PreTrainedModel:
    """BERT; with pairs of sentences, `BertForPreTraining`."""
    return (FrugalBert if objective == "mlm" else NextSentenceBert)(bert_config(config))


def modernbert(config: PreTrainedConfig, objective: str) -> PreTrainedModel:
    """ModernBERT: rotary positions, pre-norm, GeGLU, whose three matrices share the parameters of BERT's two."""
    special: dict[str, Any] = {"cls_token_id": None, "sep_token_id": None, "bos_token_id": None, "eos_token_id": None}
    dropout = {f"{part}_dropout": config.hidden_dropout_prob for part in ("embedding", "mlp", "attention")}
    return FrugalModernBert(
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
    return FrugalConvBert(
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
    return FrugalFNet(FNetConfig(**fields, intermediate_size=config.intermediate_size))


# from a LambdaBERT's config and an objective to the peer
PEERS: dict[str, Callable[[PreTrainedConfig, str], PreTrainedModel]] = {
    "bert": bert,
    "convbert": convbert,
    "fnet": fnet,
    "modernbert": modernbert,
}
OF_PAIRS = {"bert"}  # those that have a head for pairs of sentences
