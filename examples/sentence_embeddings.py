"""Fine-tunes a LambdaBERT to give similar vectors to sentences that mean the same.

    python -m examples.sentence_embeddings --train_file pairs.csv --validation_file sts_dev.csv \
        --num_train_epochs 1 --learning_rate 2e-4 --output_dir models/sentences

The training data has two columns of texts that belong together. In each batch, every other pair's second text counts as
wrong (MultipleNegativesRankingLoss), so a larger batch teaches more. What it is evaluated on has two columns of texts
and a score of their similarity. The result is a folder for `SentenceTransformer`.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from datasets import Dataset, DatasetDict
from scipy.stats import spearmanr
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from examples.common import (
    Metrics,
    Options,
    Training,
    check_columns,
    check_smoothing,
    check_texts,
    evaluated,
    parse,
    read_splits,
    run,
    train_and_evaluate,
)


@dataclass
class PairOptions(Options):
    first_column: str = field(default="sentence1", metadata={"help": "Column of the first texts."})
    second_column: str = field(default="sentence2", metadata={"help": "Column of the second texts."})
    score_column: str = field(default="score", metadata={"help": "Column of the similarities to evaluate on."})
    least_score: float | None = field(
        default=None, metadata={"help": "Train on the pairs with at least this similarity, of data that has one."}
    )


@dataclass
class SentenceTraining(Training, SentenceTransformerTrainingArguments):
    """The arguments of sentence-transformers' Trainer."""

    batch_sampler: str = field(
        default="no_duplicates", metadata={"help": "A text twice in a batch would count as wrong."}
    )


def scores(rows: Dataset, split: str, column: str) -> list[float]:
    """The scores of pairs. Raises ValueError if one is not a finite number."""
    found = []
    for row, score in enumerate(rows[column], 1):
        try:
            found.append(float(score))
        except (TypeError, ValueError):
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ValueError(f"score_column={column}: {score!r} in row {row} of the {split} data is not a number.")
    return found


def spearman(model: SentenceTransformer, rows: Dataset, wanted: list[float], options: PairOptions) -> float:
    """Spearman correlation of the cosines of pairs with the wanted scores."""
    first, second = (
        model.encode(list(rows[column]), normalize_embeddings=True)
        for column in (options.first_column, options.second_column)
    )
    return float(spearmanr((first * second).sum(1), wanted).statistic)


def training_pairs(splits: DatasetDict, options: PairOptions) -> Dataset:
    """The pairs to train on. Raises ValueError if none has the least similarity."""
    rows, least = splits["train"], options.least_score
    if least is not None:
        check_columns(splits, "train", {"score_column": options.score_column})
        similarities = scores(rows, "train", options.score_column)
        rows = rows.select([i for i, similarity in enumerate(similarities) if similarity >= least])
        if not len(rows):
            raise ValueError(f"least_score={least}: no pair of the training data has a {options.score_column} as high.")
    return rows.select_columns([options.first_column, options.second_column])


def main(argv: list[str] | None = None) -> Metrics:
    options, training = parse(argv, PairOptions, SentenceTraining)
    check_smoothing(training)
    columns = {"first_column": options.first_column, "second_column": options.second_column}
    splits = read_splits(options, columns)
    check_texts(splits, columns)
    wanted = {}
    for split in evaluated(splits):
        check_columns(splits, split, {"score_column": options.score_column})
        wanted[split] = scores(splits[split], split, options.score_column)
        if len(set(wanted[split])) < 2:
            raise ValueError(
                f"score_column={options.score_column}: all pairs of the {split} data have the same score, which "
                "correlates with nothing; give pairs of different ones."
            )
    model = SentenceTransformer(options.model, device=str(training.device), model_kwargs={"dtype": torch.float32})
    model.max_seq_length = options.max_seq_length
    trainer = SentenceTransformerTrainer(
        model=model,
        args=training,
        train_dataset=training_pairs(splits, options),
        loss=MultipleNegativesRankingLoss(model),
    )

    def evaluate(split: str) -> float:
        return spearman(model, splits[split], wanted[split], options)

    before = {split: evaluate(split) for split in wanted}
    return train_and_evaluate(
        trainer, splits, lambda split: {"spearman_before": before[split], "spearman": evaluate(split)}
    )


if __name__ == "__main__":
    sys.exit(run(main))
