"""The unigram cache: its formula, and what it finds in models that know or do not know the words of their text."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks import content_lambda, unigram_cache
from benchmarks.unigram_cache import Predictions, frequencies, loss, measure, predict
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertModel


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    return LambdaBertForMaskedLM(make_config()).eval()


def batches_of(texts, masked):
    labels = texts.masked_fill(~masked, -100)
    return [{"input_ids": ids, "labels": some} for ids, some in zip(texts.split(2), labels.split(2))]


def test_predictions_are_those_of_each_masked_token(model):
    torch.manual_seed(0)
    texts = torch.randint(5, 60, (4, 9))
    masked = torch.rand(4, 9) < 0.3
    found = predict(model, batches_of(texts, masked))
    logits = model(input_ids=texts).logits.log_softmax(-1)
    torch.testing.assert_close(found.log_probabilities, logits[masked])
    assert found.truths.tolist() == texts[masked].tolist() and found.texts.tolist() == masked.nonzero()[:, 0].tolist()
    for text, hidden, counts in zip(texts, masked, found.counts, strict=True):
        assert counts.tolist() == [(text[~hidden] == word).sum().item() for word in range(model.config.vocab_size)]


def test_formula():
    """p' word by word, against the docstring's; a = 0 leaves the model as it is."""
    torch.manual_seed(0)
    given = Predictions(
        torch.randn(5, 6).log_softmax(-1),
        torch.tensor([0, 3, 5, 1, 1]),
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([[2.0, 0, 1, 0, 3, 0], [0, 4, 0, 1, 0, 0]]),
    )
    q, a, b = frequencies(given), 0.7, 0.3
    assert q.tolist() == pytest.approx([count / 17 for count in (3, 5, 2, 2, 4, 1)])
    expected = 0.0
    for logs, truth, text in zip(given.log_probabilities, given.truths, given.texts, strict=True):
        counts = given.counts[text].tolist()
        boosted = [
            math.exp(log) * ((count + b) / (sum(counts) * frequency + b)) ** a
            for log, count, frequency in zip(logs.tolist(), counts, q.tolist(), strict=True)
        ]
        expected -= math.log(boosted[truth] / sum(boosted)) / 5
    assert loss(given, q, a, b) == pytest.approx(expected, rel=1e-5)
    stock = torch.nn.functional.nll_loss(given.log_probabilities, given.truths).item()
    assert loss(given, q, 0.0, b) == pytest.approx(stock, rel=1e-6)


def test_repeated_words_are_found_unused(model):
    """In texts of one word each, an untrained model leaves nearly all of its loss unused; in random ones nothing."""
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(40, 12, generator=generator) < 0.3
    one_word = torch.arange(5, 45)[torch.randperm(40, generator=generator), None].expand(40, 12)
    found = measure(model, batches_of(one_word, masked))
    assert found["masked tokens that occur elsewhere in their text"] == 1
    assert found["left unused"] > 1
    found = measure(model, batches_of(torch.randint(5, 45, (40, 12), generator=generator), masked))
    assert found["left unused"] < 0.1


def test_command(text, tmp_path, make_config):
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    LambdaBertForMaskedLM(make_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(text / "valid.txt"), "--output", str(tmp_path / "cache.json")]
    assert unigram_cache.main([*arguments, "--lengths", "16", "--batch_tokens", "32"]) == 0
    found = json.loads((tmp_path / "cache.json").read_text())
    assert found["16 tokens"]["loss"] > 0 and set(found) == {"model", "text", "environment", "16 tokens"}
    with pytest.raises(SystemExit, match="too few examples of 100 tokens"):
        unigram_cache.main([*arguments, "--lengths", "100"])
    with pytest.raises(SystemExit, match="too few examples of 100 tokens"):
        content_lambda.main([*arguments, "--lengths", "100"])


def test_a_model_that_would_be_completed_at_random_is_refused(text, tmp_path, make_config):
    config = make_config(vocab_size=200)
    LambdaBertModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(tmp_path / "model")
    for command in (unigram_cache, content_lambda):
        with pytest.raises(SystemExit, match="is no masked language model: it lacks cls.predictions"):
            command.main([str(tmp_path / "model"), str(text / "valid.txt"), "--output", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_content_lambdas_of_a_bert_are_refused(text, tmp_path):
    config = BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit, match="is of type bert, which has no content lambdas"):
        content_lambda.main([str(tmp_path / "bert"), str(text / "valid.txt"), "--output", str(tmp_path / "out.json")])
