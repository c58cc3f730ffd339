"""What a probe is given of a BERT's attention weights: statistics of every head, as the literature takes them.

Of each head, mean over the tokens of a text: the weight of the token itself, of the one before and the one after it,
of [CLS] and of [SEP], the entropy, and that of [CLS]'s own weights (Clark et al., "What Does BERT Look At?", arXiv
1906.04341, section 3); the distance attended to (Vig & Belinkov, "Analyzing the Structure of Attention in a
Transformer Language Model", arXiv 1906.04284, section 4). And of the graph whose edges are the pairs of tokens with a
weight, either way, of at least a threshold: the number of components and of independent cycles (Kushnareva et al.,
"Artificial Text Detection via Examining the Topology of Attention Maps", arXiv 2109.04825).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModel, BertModel

from lambdabert.interpretation.features import RANDOM_MODELS, mean_of_tokens

THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75)  # Kushnareva et al.
STATISTICS = 8 + 2 * len(THRESHOLDS)  # of a head


def attention_statistics(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The statistics of every head, [B, H, STATISTICS].

    Args:
        attention: [B, H, N, M], each row a distribution.
        mask: [B, N], 1 = token; padding stands on the right.
    """
    length = mask.shape[1]
    tokens = mask.sum(1)[:, None]
    weights = attention * mask[:, None, :, None]
    last = (tokens - 1).view(-1, 1, 1, 1).expand(*weights.shape[:3], 1)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    places = torch.arange(length, device=mask.device)
    distance = (places[:, None] - places).abs()
    means = [
        weights.diagonal(dim1=-2, dim2=-1).sum(-1) / tokens,
        weights.diagonal(-1, -2, -1).sum(-1) / (tokens - 1),
        weights.diagonal(1, -2, -1).sum(-1) / (tokens - 1),
        weights[..., 0].sum(-1) / tokens,
        weights.gather(-1, last)[..., 0].sum(-1) / tokens,
        entropy.sum(-1) / tokens,
        entropy[..., 0],
        (weights * distance).sum((-2, -1)) / tokens,
    ]
    return torch.stack([*means, *_graph_numbers(weights, mask)], -1)


def _graph_numbers(weights: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Components and independent cycles, [B, H] each, for every threshold."""
    pairs = torch.maximum(weights, weights.mT)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    numbers = []
    for threshold in THRESHOLDS:
        is_edge = (pairs >= threshold) & ~itself
        reach = (is_edge | itself).float()
        for _ in range(math.ceil(math.log2(mask.shape[1]))):
            reach = (reach @ reach).clamp(max=1)
        # each token is one part of as many as its component has
        components = (mask[:, None] / reach.sum(-1)).sum(-1)
        edges = is_edge.sum((-2, -1)) / 2
        numbers += [components, edges - mask.sum(1)[:, None] + components]
    return numbers


@torch.no_grad()
def bert_rows(bert: BertModel, batches: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Features [S, F] of the S texts of all batches, by the row's name.

    "attention i" of each layer i, "attention, all layers", "BERT's mean hidden state i"; and of three BERTs of the same
    config with random weights the same rows with "random BERT j, " before their names.

    Args:
        bert: in evaluation mode, with `attn_implementation="eager"`, which alone gives its weights.
        batches: what its tokenizer returns with `return_tensors="pt"`, padded on the right.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    for number in range(-1, RANDOM_MODELS):
        model, prefix = (bert, "") if number < 0 else (_random_bert(bert, number), f"random BERT {number}, ")
        for inputs in tqdm(batches, unit="batch", desc=prefix or "BERT"):
            mask = inputs["attention_mask"]
            outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
            by_layer = [attention_statistics(weights, mask).flatten(1) for weights in outputs.attentions]
            for i, statistics in enumerate(by_layer):
                rows.setdefault(f"{prefix}attention {i}", []).append(statistics)
                states = mean_of_tokens(outputs.hidden_states[i + 1], mask)
                rows.setdefault(f"{prefix}BERT's mean hidden state {i}", []).append(states)
            rows.setdefault(f"{prefix}attention, all layers", []).append(torch.cat(by_layer, 1))
    return {name: torch.cat(found) for name, found in rows.items()}


def _random_bert(bert: BertModel, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(bert.config, attn_implementation="eager").eval()
