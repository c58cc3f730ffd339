"""The teacher: a trained BERT, and what it offers to learn from."""

from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)

from lambdabert.saved_models import compute_whole


@dataclass(frozen=True)
class LossWeights:
    """The weight of each loss in the sum; 0 leaves it out."""

    layers: float = 0.0
    last_layer: float = 0.0
    sentences: float = 0.0
    masked_tokens: float = 0.0
    classes: float = 0.0

    @property
    def used(self) -> dict[str, float]:
        return {name: weight for name, weight in asdict(self).items() if weight}


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a BERT, or of a LambdaBERT, with whatever head."""
    return cast(nn.ModuleList, model.base_model.get_submodule("encoder.layer"))


class Teacher:
    """A trained BERT, and what it offers to learn from.

    Args:
        model: a BERT of `transformers`.
        sentence_modules: what follows it in `sentence-transformers`: pooling, and all else that makes its vectors.
    """

    def __init__(self, model: PreTrainedModel, sentence_modules: tuple[nn.Module, ...] = ()):
        self.model = model.eval().requires_grad_(False)
        compute_whole(model)
        model.config.chunk_size_feed_forward = 0  # the student's, too
        self.sentence_modules = [module.eval().requires_grad_(False) for module in sentence_modules]

    @property
    def default_weights(self) -> LossWeights:
        """Every layer, and what the teacher was trained to output."""
        return LossWeights(layers=1.0, **{name: 1.0 for name in self.offers if name not in ("layers", "last_layer")})

    @property
    def offers(self) -> tuple[str, ...]:
        """The losses that can be computed."""
        offered = ["layers", "last_layer"]
        if self.sentence_modules:
            offered.append("sentences")
        if isinstance(self.model, BertForMaskedLM | BertForPreTraining):
            offered.append("masked_tokens")
        if isinstance(self.model, BertForSequenceClassification | BertForTokenClassification):
            offered.append("classes")
        return tuple(offered)

    @property
    def layers(self) -> nn.ModuleList:
        return encoder_layers(self.model)

    def norm(self, layer: int) -> nn.LayerNorm:
        """The norm at the end of a layer."""
        return cast(nn.LayerNorm, self.layers[layer].get_submodule("output.LayerNorm"))

    def attention_norm(self, layer: int) -> nn.LayerNorm:
        """The norm at the end of a layer's attention block."""
        return cast(nn.LayerNorm, self.layers[layer].get_submodule("attention.output.LayerNorm"))

    def sentence_vectors(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sentence vectors of last hidden states [B, N, D], the teacher's own or others."""
        features = {"token_embeddings": hidden_states, "attention_mask": attention_mask}
        for module in self.sentence_modules:
            features = module(features)
        return features["sentence_embedding"]

    def to(self, device: torch.device) -> "Teacher":
        for module in (self.model, *self.sentence_modules):
            module.to(device)
        return self
