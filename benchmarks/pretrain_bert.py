"""Pretrains BERT as the pretraining command trains LambdaBERT: what a comparison after fine-tuning starts from.

    python -m benchmarks.pretrain_bert configs/wikipedia_small.json --tokenizer_name checkpoints/wikipedia-small \
        --train_tokenizer=false --output_dir models/wikipedia_small_bert --max_steps 1600 --learning_rate 1e-3

Options, text, examples, order of the data, masks, start at token frequencies, checkpoints and report are those of
`run_language_modeling.py`; the model is the `BertForMaskedLM` of `transformers` of the same width, depth, feed-forward
size, vocabulary and dropout, with position embeddings. Like LambdaBERT it applies its MLM head to the masked tokens
alone while it trains, so that a step of neither is charged for logits that the loss does not need.
"""

import sys
from typing import Any

import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM, set_seed
from transformers.modeling_outputs import MaskedLMOutput

from benchmarks.peers import bert_config
from lambdabert.text.masks import IGNORED_LABEL
from lambdabert.training.command import run_command
from lambdabert.training.run import Documents
from run_language_modeling import ARGUMENT_GROUPS, Pretraining


class FrugalBert(BertForMaskedLM):
    """`BertForMaskedLM` whose training step computes the logits of masked tokens alone: the same loss, sooner."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """Inputs and labels [B, N]; logits [B, N, vocabulary], or [masked tokens, vocabulary] while it trains."""
        hidden_states = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.cls(hidden_states))
        if self.training:
            masked = labels != IGNORED_LABEL
            hidden_states, labels = hidden_states[masked], labels[masked]
        logits = self.cls(hidden_states)
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        count = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return MaskedLMOutput(loss=losses / count, logits=logits)


class BertPretraining(Pretraining):
    """A run of the pretraining command with BERT in LambdaBERT's place."""

    def make_model(self, documents: Documents) -> None:
        super().make_model(documents)
        set_seed(self.training_args.seed)
        self.model = FrugalBert(bert_config(self.model.config))

    def model_card(self, *_: Any) -> str:
        return "BERT, pretrained by `benchmarks.pretrain_bert` for comparison with a LambdaBERT.\n"

    def show(self, *_: Any) -> None:
        """Nothing: the command's own words are LambdaBERT's."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(sys.argv[1:] if argv is None else argv, ARGUMENT_GROUPS, BertPretraining)


if __name__ == "__main__":
    sys.exit(main())
