"""Metrics from sums, baselines and curves."""

import math

import pytest
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from torch.nn import functional as F
from transformers import Trainer, TrainerState

import run_language_modeling
from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.arguments import DataArguments
from lambdabert.text.masks import masking_collator
from lambdabert.training.arguments import RunArguments
from lambdabert.training.checkpoints import CheckpointError
from lambdabert.training.metrics import example_sums, pretraining_metrics
from lambdabert.training.report import describe_data, plot_curves, unigram_baseline
from lambdabert.training.trainer import InterruptibleTrainer, PretrainingTrainer
from modeling_lambdabert import LambdaBertForMaskedLM
from training_support import RECIPE


def test_evaluation_keeps_sums_instead_of_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    inputs = {
        "labels": torch.tensor([[0, 0], [-100, -100]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]]),
    }
    sums = example_sums(logits, None, inputs)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))
    torch.testing.assert_close(sums[0, :4], torch.tensor([2.0, right + wrong, 1.0, 2.0]))
    torch.testing.assert_close(sums[1, :4], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    metrics = pretraining_metrics(type("Prediction", (), {"predictions": sums.numpy()}))
    assert metrics["mlm_loss"] == metrics["loss"] == pytest.approx((right + wrong) / 2, rel=1e-6)
    assert "sentence_loss" not in metrics


def test_sentence_metrics_are_means_over_pairs():
    """However many tokens of each are masked."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((3, 4), -100)
    labels[0, :3], labels[1, 0] = torch.tensor([0, 1, 1]), 0
    logits, sentence_logits = torch.randn(4, 2, generator=generator), torch.randn(3, 2, generator=generator)
    order = torch.tensor([0, 1, 1])
    inputs = {"labels": labels, "attention_mask": torch.ones(3, 4), "sentence_order_label": order}
    sums = example_sums(logits, sentence_logits, inputs)
    metrics = pretraining_metrics(type("Prediction", (), {"predictions": sums.numpy()}))
    mlm, pairs = F.cross_entropy(logits, labels[labels != -100]), F.cross_entropy(sentence_logits, order)
    assert metrics["sentence_loss"] == pytest.approx(pairs.item(), rel=1e-6)
    assert metrics["sentence_accuracy"] == pytest.approx((sentence_logits.argmax(1) == order).float().mean().item())
    assert metrics["loss"] == pytest.approx((mlm + pairs).item(), rel=1e-6)


def test_the_mean_of_no_masked_token_is_none():
    inputs = {"labels": torch.full((2, 3), -100), "attention_mask": torch.ones(2, 3)}
    sums = example_sums(torch.zeros(0, 5), None, inputs)
    metrics = pretraining_metrics(type("Prediction", (), {"predictions": sums.numpy()}))
    assert all(math.isnan(metrics[name]) for name in ("loss", "mlm_loss", "perplexity", "mlm_accuracy"))
    assert (metrics["masked_tokens"], metrics["tokens"]) == (0, 6)


@pytest.fixture
def trainer(text, tmp_path):
    """With five examples to evaluate in batches of four, and training that drops what does not fill a batch."""
    tokenizer = run_language_modeling.load_tokenizer(text / "tokenizer")
    config = LambdaBertConfig(vocab_size=len(tokenizer), **RECIPE["config_overrides"])
    data_args = DataArguments(corpus="python-docs")
    train, evaluate = (masking_collator(tokenizer, data_args, seed=0, training=training) for training in (True, False))
    return PretrainingTrainer(
        model=LambdaBertForMaskedLM(config),
        args=RunArguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=4, dataloader_drop_last=True
        ),
        train_dataset=None,
        eval_dataset=Dataset.from_dict({"input_ids": [[tokenizer.cls_token_id, 50, 60, tokenizer.sep_token_id]] * 5}),
        processing_class=tokenizer,
        data_collator=train,
        eval_collator=evaluate,
    )


def test_each_logged_loss_is_of_the_steps_since_the_last(trainer):
    for sums in ([6.0, 2.0], [4.0, 4.0]):
        trainer.mlm_sums += torch.tensor(sums)
        trainer.log({"loss": 1.0})
    assert [record["mlm_loss"] for record in trainer.state.log_history] == [3, 1]


def test_evaluation_drops_no_example(trainer):
    assert [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()] == [4, 1]
    assert trainer.args.dataloader_drop_last, "training goes on to drop some"


def test_unigram_baseline(text):
    tokenizer = run_language_modeling.load_tokenizer(text / "tokenizer")
    cls, sep, a, b = tokenizer.cls_token_id, tokenizer.sep_token_id, 50, 60
    train = Dataset.from_dict({"input_ids": [[cls, a, a, sep], [cls, a, sep]]})
    evaluation = Dataset.from_dict({"input_ids": [[cls, a, b, sep]]})
    baseline = unigram_baseline(train, evaluation, tokenizer)
    assert baseline["unigram_entropy"] == pytest.approx(math.log(2))
    size = len(tokenizer) + 3
    assert baseline["unigram_cross_entropy"] == pytest.approx(-(math.log(4 / size) + math.log(1 / size)) / 2)
    assert set(unigram_baseline(None, evaluation, tokenizer)) == {"unigram_entropy"}


@pytest.mark.parametrize("masked, said", [(0, "No token of the evaluation text is masked"), (9, "a lower --learning_")])
def test_a_loss_that_is_not_known_is_told_from_weights_of_no_use(masked, said, monkeypatch):
    metrics = {"eval_mlm_loss": math.nan, "eval_masked_tokens": masked}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: metrics)
    trainer = object.__new__(InterruptibleTrainer)
    trainer.state = TrainerState(global_step=3)
    with pytest.raises(CheckpointError, match=said):
        trainer.evaluate()


def test_card_names_the_configuration_of_a_data_set():
    wikitext = DataArguments(dataset_name="Salesforce/wikitext", dataset_config_name="wikitext-103-raw-v1")
    assert "| source | Salesforce/wikitext, wikitext-103-raw-v1 |" in describe_data(wikitext, {})
    assert "| source | a.txt |" in describe_data(DataArguments(train_file=["folder/a.txt"]), {})


def test_curves_are_drawn_from_the_log(tmp_path, monkeypatch):
    history = [
        {"step": 1, "seconds": 60.0, "mlm_loss": 5.0},
        {"step": 2, "seconds": 120.0, "mlm_loss": 3.0},
        {"step": 2, "seconds": 180.0, "eval_mlm_loss": 4.0},
    ]
    figures, savefig = [], Figure.savefig

    def saved(figure, file, **settings):
        figures.append(figure)
        savefig(figure, file, **settings)

    monkeypatch.setattr(Figure, "savefig", saved)
    plot_curves(history, tmp_path / "curves.png")
    plot_curves([{"step": 1, "seconds": 1.0}], tmp_path / "nothing.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"] and len(figures) == 1
    drawn = {
        axes.get_xlabel(): {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for axes in figures[0].axes
    }
    assert drawn == {
        "steps": {"training": [[1, 5], [2, 3]], "validation": [[2, 4]]},
        "time (minutes)": {"training": [[1, 5], [2, 3]], "validation": [[3, 4]]},
    }
