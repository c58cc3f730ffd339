"""The benchmark of paths for far content: where they start, what they compute, and what it records."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from benchmarks import far_content
from benchmarks.far_content import DEPTH, PATHS, Attention, Lambda, LambdaOfOthers, add_paths
from modeling_lambdabert import LambdaBertForMaskedLM

WIDTH = 2 * DEPTH


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    config = make_config(hidden_size=WIDTH, num_lambda_queries=2, content_gain=True)
    return LambdaBertForMaskedLM(config).double().eval()


@pytest.mark.parametrize("name", PATHS)
def test_a_path_starts_at_nothing_and_is_trained(model, name):
    ids = torch.randint(5, 60, (2, 9))
    before = model(ids).logits
    add_paths(model, PATHS[name])
    model.double()
    after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    after.square().sum().backward()
    for layer in model.bert.encoder.layer:
        path = getattr(layer.attention.self, "far_content", None)
        assert (path is None) == (PATHS[name] is None)
        assert path is None or path.to_values.weight.grad.any()


def test_a_repetition_lambda_starts_at_nothing_and_is_trained(model, text, tmp_path):
    model.float().resize_token_embeddings(200)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    opened = far_content.open_model(tmp_path, "repetition lambda")
    assert opened.config.mask_token_id == tokenizer.mask_token_id
    ids = torch.randint(5, 20, (2, 30))
    logits = opened(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=0)
    logits.square().sum().backward()
    rates = {name: far_content.rate_of(name) for name, _ in opened.named_parameters()}
    tables = [name for name, rate in rates.items() if rate == far_content.TABLE_RATE]
    assert len(tables) == 2 and all(opened.get_parameter(name).grad.any() for name in tables)


def with_values(kind):
    torch.manual_seed(0)
    path = kind(WIDTH).double()
    torch.nn.init.normal_(path.to_values.weight)
    return path


def by_head(path, inputs):
    """Queries, keys and values of each of the two heads, [N, DEPTH]."""
    for head in range(2):
        own = slice(head * DEPTH, (head + 1) * DEPTH)
        yield [inputs @ p.weight[own].T for p in (path.to_queries, path.to_keys, path.to_values)]


@pytest.mark.parametrize(("kind", "others"), [(Lambda, False), (LambdaOfOthers, True)])
def test_lambda(kind, others):
    """Against the sum over positions, written out."""
    path, inputs = with_values(kind), torch.randn(7, WIDTH, dtype=torch.double)
    heads = []
    for queries, keys, values in by_head(path, inputs):
        weights = keys.float().softmax(0).double()
        rows = []
        for n in range(7):
            seen = [m for m in range(7) if not (others and m == n)]
            content = sum(torch.outer(weights[m], values[m]) for m in seen)
            rows.append(queries[n] @ content / DEPTH**0.5)
        heads.append(torch.stack(rows))
    torch.testing.assert_close(path(inputs[None])[0], torch.cat(heads, dim=1), rtol=1e-5, atol=1e-6)


def test_attention():
    """Against a masked product, which PyTorch has; its own token is left out."""
    path, inputs = with_values(Attention), torch.randn(7, WIDTH, dtype=torch.double)
    others = ~torch.eye(7, dtype=torch.bool)
    heads = [F.scaled_dot_product_attention(*head, attn_mask=others) for head in by_head(path, inputs)]
    torch.testing.assert_close(path(inputs[None])[0], torch.cat(heads, dim=1), rtol=1e-5, atol=1e-5)


def test_command(model, text, tmp_path, monkeypatch):
    """Rows of one seed differ and come back the same; what is recorded is not run again."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, value in {"SHORT": 16, "LENGTH": 32, "STEP_TOKENS": 64}.items():
        monkeypatch.setattr(far_content, name, value)
    model.float().resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(text / "tokenizer").save_pretrained(tmp_path / "model")

    def rows(file, *options):
        files = [tmp_path / "model", text / "train.txt", text / "valid.txt"]
        far_content.main([*map(str, files), "--tokens", "256", "--output", str(tmp_path / file), *options])
        return json.loads((tmp_path / file).read_text())["rows"]

    found = rows("one.json", "--steps", "3")
    assert list(found) == [f"{name}, seed 1" for name in PATHS]
    assert len({row["32 tokens"]["loss"] for row in found.values()}) == len(PATHS)
    without = found["position only, seed 1"]["16 tokens"]
    assert [without[name] for name in ("mean", "another text's", "zero")] == [0, 0, 0]
    assert all(found["lambda, seed 1"]["32 tokens"].values())
    monkeypatch.setattr(far_content, "go_on", pytest.fail)
    assert rows("one.json", "--steps", "3") == found
    monkeypatch.undo()
    for name, value in {"SHORT": 16, "LENGTH": 32, "STEP_TOKENS": 64}.items():
        monkeypatch.setattr(far_content, name, value)
    assert rows("two.json", "--steps", "3", "--paths", "lambda") == {"lambda, seed 1": found["lambda, seed 1"]}
    with pytest.raises(SystemExit, match="output=.*one.json holds rows of another steps; name another file"):
        rows("one.json", "--steps", "2")
