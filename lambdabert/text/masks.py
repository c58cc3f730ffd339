"""Masks: which tokens of a batch are to be predicted, and what stands in their place."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from lambdabert.text.arguments import TextArguments
from lambdabert.text.tokenizers import check_tokenizer, word_continues

IGNORED_LABEL = -100


@dataclass
class MaskingCollator(DataCollatorForLanguageModeling):
    """Pads examples to a batch and chooses what is to be predicted.

    Which tokens of an example are chosen, and what replaces them, depends only on the seed, the epoch and the tokens
    of that example. Unknown and special tokens are never chosen.

    Attributes:
        word_continues: whether a token continues the word before it [vocab_size]; None chooses tokens, not words.
        word_probability: share of words to choose, of whose tokens `mlm_probability` are then to be predicted.
        epoch: masks differ between epochs.
    """

    word_probability: float = 1.0
    word_continues: torch.Tensor | None = None
    epoch: int | torch.Tensor = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.never_chosen = torch.tensor(self.tokenizer.all_special_ids)

    def set_epoch(self, epoch: int | torch.Tensor) -> None:
        self.epoch = epoch

    def torch_mask_tokens(
        self, inputs: torch.Tensor, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked ids and labels, both [B, N], of padded ids `inputs` [B, N]."""
        labels = torch.full_like(inputs, IGNORED_LABEL)
        for row, row_labels in zip(inputs, labels, strict=True):
            real = row != self.tokenizer.pad_token_id
            row[real], row_labels[real] = self._mask_example(row[real])
        return inputs, labels

    def _mask_example(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        content = f"{self.seed} {self.epoch} ".encode() + ids.numpy().tobytes()
        example_seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        self.generator = torch.Generator().manual_seed(example_seed)
        excluded = torch.isin(ids, self.never_chosen)
        if self.word_continues is not None:
            word = (~self.word_continues[ids]).cumsum(0)
            chosen = torch.rand(len(ids) + 1, generator=self.generator) < self.word_probability
            excluded |= ~chosen[word]
        masked, labels = super().torch_mask_tokens(ids[None], special_tokens_mask=excluded[None])
        return masked[0], labels[0]


def masking_collator(
    tokenizer: PreTrainedTokenizerBase, arguments: TextArguments, *, seed: int, training: bool
) -> MaskingCollator:
    """Returns a collator for training, or for evaluation, whose epoch stays 0.

    Raises:
        ValueError: the tokenizer lacks a special token, or whole words are wanted of one that is not WordPiece.
    """
    whole_words = arguments.whole_word_mask
    share = arguments.mlm_probability if training else arguments.eval_mlm_probability
    check_tokenizer(tokenizer, whole_word_mask=whole_words)
    return MaskingCollator(
        tokenizer,
        mlm_probability=1.0 if whole_words else share,
        mask_replace_prob=arguments.mask_replace_prob,
        random_replace_prob=arguments.random_replace_prob,
        pad_to_multiple_of=arguments.pad_to_multiple_of,
        seed=seed,
        word_probability=share if whole_words else 1.0,
        word_continues=word_continues(tokenizer) if whole_words else None,
    )
