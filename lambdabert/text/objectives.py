"""The objectives of pretraining, in one table.

    nsp     next sentence prediction (Devlin et al., "BERT", NAACL 2019, section 3.1): B follows A (label 0), or comes
            from another document (label 1).
    sop     sentence order prediction (Lan et al., "ALBERT", ICLR 2020, section 3.1): A and B follow one another, in
            order (label 0) or swapped (label 1).
    mlm     masked language modelling alone: a document is cut into stretches of full length.

A pair is [CLS] A [SEP] B [SEP], a stretch or a sentence [CLS] A [SEP].
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """A task, and what its examples are like.

    Attributes:
        name: as in `--objective`.
        description: for model cards.
        sentence_label: column of the sentence task's labels; None without one.
    """

    name: str
    description: str
    sentence_label: str | None = None

    @property
    def has_pairs(self) -> bool:
        return self.sentence_label is not None

    @property
    def special_tokens(self) -> int:
        """Special tokens around the text of an example."""
        return 3 if self.has_pairs else 2

    @property
    def shortest_example(self) -> int:
        """Tokens of an example with a single token in each segment."""
        return self.special_tokens + (2 if self.has_pairs else 1)

    @property
    def label_names(self) -> list[str]:
        """The columns of a batch that hold labels, as the Trainer's `label_names`."""
        return ["labels"] + ([self.sentence_label] if self.sentence_label else [])


NSP = Objective("nsp", "masked language modelling and next sentence prediction", "next_sentence_label")
SOP = Objective("sop", "masked language modelling and sentence order prediction", "sentence_order_label")
MLM = Objective("mlm", "masked language modelling")
OBJECTIVES = {objective.name: objective for objective in (NSP, SOP, MLM)}

# Not a task of pretraining: distillation may take each sentence by itself.
SENTENCES = Objective("sentences", "single sentences")
