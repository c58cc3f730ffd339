"""The benchmark of content lambdas: what it replaces, and that nothing else changes."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import content_lambda
from benchmarks.content_lambda import RepetitionLambdas, losses
from modeling_lambdabert import LambdaBertForMaskedLM
from repetitions_lambdabert import Repetitions


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    model = LambdaBertForMaskedLM(make_config(content_gain=True)).double().eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.content_gain.fill_(20.0)
            layer.attention.output.dense.weight.mul_(20.0)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(0)
    batches = []
    for _ in range(3):
        ids = torch.randint(5, 60, (4, 9))
        batches.append({"input_ids": ids, "labels": ids.masked_fill(torch.rand(4, 9) < 0.6, -100)})
    return batches


def test_without_a_gain_nothing_is_lost(model, batches):
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.content_gain.zero_()
    assert len(set(losses(model, batches).values())) == 1


def test_texts_that_are_alike_share_their_lambdas(model, batches):
    """Mean and another text's are then one's own; leaving them out is not."""
    ids = batches[0]["input_ids"][:1].expand(4, -1)
    found = losses(model, [{"input_ids": ids, "labels": batches[0]["labels"]}])
    assert found["mean"] == pytest.approx(found["as they are"], abs=1e-9)
    assert found["another text's"] == pytest.approx(found["as they are"], abs=1e-9)
    assert abs(found["zero"] - found["as they are"]) > 1e-5


def test_losses(model, batches):
    """As they are: over all masked tokens. Zero: of a model whose gains are 0. Each replacement differs."""
    found = losses(model, batches)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    with torch.no_grad():
        assert found["as they are"] == pytest.approx(model(**whole).loss.item(), rel=1e-9)
        for layer in model.bert.encoder.layer:
            layer.attention.self.content_gain.zero_()
        assert found["zero"] == pytest.approx(model(**whole).loss.item(), rel=1e-9)
    assert len({round(value, 6) for value in found.values()}) == 4


@pytest.fixture
def repetitive(make_config):
    """A model of one layer with a repetition lambda, whose content lambdas are 0."""
    torch.manual_seed(0)
    config = make_config(num_hidden_layers=1, content_gain=True, repetition_context_size=3, mask_token_id=4)
    model = LambdaBertForMaskedLM(config).double().eval()
    torch.nn.init.normal_(model.bert.encoder.layer[0].attention.self.repetition_embeddings)
    model.bert.encoder.layer[0].attention.output.dense.weight.data.mul_(20.0)
    return model


class TestRepetitionLambdas:
    def test_texts_that_are_alike(self, repetitive):
        """Of one layer, [MASK] has no repetition lambda, and the content lambda of another text is the same."""
        ids = torch.tensor([[5, 6, 7, 8, 4, 9, 5, 6, 7, 8, 4, 9]]).expand(3, -1)
        labels = ids.masked_fill(ids != 4, -100).masked_fill(ids == 4, 11)
        found = losses(repetitive, [{"input_ids": ids, "labels": labels}])
        for kind in ("mean", "another text's", "zero"):
            assert found[kind] == pytest.approx(found["as they are"], abs=1e-9)
            assert found[f"both: {kind}"] == pytest.approx(found[f"repetition: {kind}"], abs=1e-9)
        assert found["repetition: zero"] == pytest.approx(found["as they are"], abs=1e-9), "[MASK] is never repeated"

    def test_zero_is_a_model_without(self, repetitive, batches):
        found = losses(repetitive, batches)
        assert len({round(found[name], 6) for name in ("as they are", *list(found)[4:7])}) == 4
        torch.nn.init.zeros_(repetitive.bert.encoder.layer[0].attention.self.repetition_embeddings)
        without = losses(repetitive, batches)
        assert found["repetition: zero"] == pytest.approx(without["as they are"], rel=1e-9)
        assert len({round(value, 9) for value in without.values()}) == 1

    @pytest.mark.parametrize("kind", ["mean", "another text's"])
    def test_replacements(self, kind):
        """Against loops over places."""
        torch.manual_seed(0)
        ids = torch.randint(-1, 4, (3, 9))
        given = torch.randn(3, 9, 2, dtype=torch.float64)
        repetitions = Repetitions(ids, None)
        own = repetitions.mean_of_others(given)
        seen = RepetitionLambdas(1, 4)
        seen.ids = ids
        with seen.in_place():
            torch.testing.assert_close(repetitions.mean_of_others(given), own, rtol=0, atol=0)
        replaced = RepetitionLambdas(1, 4, kind, seen.means)
        replaced.ids = ids
        with replaced.in_place():
            found = repetitions.mean_of_others(given)
        for b in range(3):
            for n in range(9):
                source, rows = (own, range(3)) if kind == "mean" else (given, [b - 1])
                places = [source[row, m] for row in rows for m in range(9) if ids[row % 3, m] == ids[b, n] >= 0]
                expected = sum(places) / len(places) if places else torch.zeros(2, dtype=torch.float64)
                torch.testing.assert_close(found[b, n], expected, rtol=1e-12, atol=1e-12)


def test_command(model, text, tmp_path, monkeypatch):
    """Examples of one length, masked the same way each time."""
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = []
    for name in ("one.json", "two.json"):
        options = ["--lengths", "16", "32", "--tokens", "256", "--batch_tokens", "64", "--output", str(tmp_path / name)]
        content_lambda.main([str(tmp_path / "model"), str(text / "valid.txt"), *options])
        found.append(json.loads((tmp_path / name).read_text()))
    assert found[0]["root mean square of each layer's gain"] == pytest.approx([20.0, 20.0])
    for length in ("16 tokens", "32 tokens"):
        assert found[0][length] == found[1][length] and 0 < found[0][length]["masked tokens"] < 256
