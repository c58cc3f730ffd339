"""The benchmark of sentence order: which pairs are of which kind, and that it judges as the model does."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import sentence_order
from benchmarks.sentence_order import errors, joint, measure, points_back, reach, segments, swapped_probabilities
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForPreTrainingSOP


@pytest.fixture
def tokenizer(text):
    return AutoTokenizer.from_pretrained(text / "tokenizer")


@pytest.fixture
def model(make_config, tokenizer):
    torch.manual_seed(0)
    config = make_config(vocab_size=len(tokenizer), local_context_size=11, initializer_range=0.5)
    return LambdaBertForPreTrainingSOP(config).eval()


def pair_of(tokenizer, first, second, label):
    return {**tokenizer(first, second), "sentence_order_label": label}


@pytest.fixture
def pairs(tokenizer):
    texts = ["the fox sees the river.", "it sleeps.", "a sailor sings.", "this old king paints the sea."]
    return [pair_of(tokenizer, a, b, (i + j) % 2) for i, a in enumerate(texts) for j, b in enumerate(texts)]


def test_parts_of_a_pair(tokenizer):
    pair = pair_of(tokenizer, "the fox sees the river.", "it sleeps.", 0)
    assert pair["input_ids"][joint(pair)] == tokenizer.sep_token_id
    first, second = segments(pair, tokenizer)
    assert tokenizer.encode(first, second) == pair["input_ids"] and second.startswith("it sleeps")
    assert not points_back(first) and points_back("However, it") and points_back("it") and not points_back("")


def test_the_reach_of_a_model(model):
    """A change of a token at the reach changes [CLS], one beyond it only through the content lambda."""
    assert reach(model) == model.config.num_hidden_layers * 5
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.to_keys.weight.zero_()
            layer.attention.self.content_gain = torch.nn.Parameter(torch.zeros(model.config.key_depth))
    ids = torch.arange(5, 17)[None]
    before = model.bert(ids).pooler_output
    for place in range(1, 12):
        changed = ids.clone()
        changed[0, place] = 20
        assert torch.equal(model.bert(changed).pooler_output, before) == (place > reach(model))
    model.config.local_context_size = None
    assert reach(model) is None


def test_probabilities_are_the_models(model, tokenizer, pairs):
    """Padding in a batch does not change them."""
    found = swapped_probabilities(model, tokenizer, pairs, batch_size=5)
    for pair, p in zip(pairs, found, strict=True):
        ids, types = (torch.tensor([pair[name]]) for name in ("input_ids", "token_type_ids"))
        logits = model(ids, token_type_ids=types).seq_relationship_logits
        assert p == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)


def test_kinds_add_up(model, tokenizer, pairs):
    probabilities = [i / 16 + 0.01 for i in range(16)]
    found = measure(model, tokenizer, pairs, probabilities)
    right = [(p > 0.5) == (pair["sentence_order_label"] == 1) for p, pair in zip(probabilities, pairs, strict=True)]
    assert found["all"]["pairs"] == 16 and found["all"]["accuracy"] == sum(right) / 16
    for one, other in (("joint within reach", "joint out of reach"), ("a segment points back", "neither does")):
        assert found[one]["pairs"] + found[other]["pairs"] == 16 and found[one]["pairs"] % 16
        assert sum(found[kind]["pairs"] * found[kind]["accuracy"] for kind in (one, other)) == pytest.approx(sum(right))
    assert found["neither does"]["pairs"] == 4  # two of the four texts do not
    wrong = [pair for ok, pair in zip(right, pairs, strict=True) if not ok]
    shown = errors(tokenizer, pairs, probabilities)
    assert shown.count("- A: ") == len(wrong)
    first, second = segments(
        max(zip(probabilities, pairs, strict=True), key=lambda item: wrong_by(*item))[1], tokenizer
    )
    assert shown.index(f"- A: {first}\n- B: {second}") < 200  # the surest comes first


def wrong_by(probability, pair):
    return 1 - probability if pair["sentence_order_label"] else probability


def test_command(model, text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "order.json"
    arguments = [str(text / "valid.txt"), "--max_seq_length", "32", "--pairs", "16", "--output", str(output)]
    assert sentence_order.main([str(tmp_path / "model"), *arguments]) == 0
    found = json.loads(output.read_text())
    assert found["all"]["pairs"] == 16 and output.with_suffix(".md").read_text().startswith("# Pairs")
    LambdaBertForMaskedLM(model.config).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="model=.*other lacks .*; name a LambdaBERT that was trained with --sop"):
        sentence_order.main([str(tmp_path / "other"), *arguments])
