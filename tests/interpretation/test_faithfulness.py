"""Leave-one-out against the rerun text, ranks against scipy, and what is said of methods that must be best or worst."""

import math

import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer

from lambdabert.interpretation import Example, faithfulness, leave_one_out, masked_examples
from lambdabert.interpretation.faithfulness import METHODS, removal, spearman
from lambdabert.interpretation.intervals import bootstrap_interval

MASK = 4


@pytest.mark.parametrize(
    "name, place, token",
    [
        ("LambdaBertForMaskedLM", 2, 7),
        ("LambdaBertForSequenceClassification", None, 1),
        ("LambdaBertForMultipleChoice", None, 1),
    ],
)
@pytest.mark.parametrize("has_repetition", [False, True])
def test_leave_one_out_is_the_text_rerun(make_model, holey, repetition, name, place, token, has_repetition):
    model = make_model(name, **({**repetition, "mask_token_id": MASK} if has_repetition else {}))
    inputs = holey(model)

    def logits(ids):
        with torch.no_grad():
            found = model(**(inputs | {"input_ids": ids})).logits
        return found[:, token] if place is None else found[:, place, token]

    falls = leave_one_out(model, inputs, place, token, MASK)
    for index in inputs["attention_mask"].nonzero():
        ids = inputs["input_ids"].clone()
        ids[tuple(index)] = MASK
        expected = (logits(inputs["input_ids"]) - logits(ids))[index[0]]
        torch.testing.assert_close(falls[tuple(index)], expected, rtol=1e-9, atol=1e-11)
    assert not falls[inputs["attention_mask"] == 0].any()


def test_removal_is_the_text_rerun(make_model, make_inputs, repetition):
    model = make_model(**{**repetition, "mask_token_id": MASK})
    inputs = make_inputs(type(model), model.config, batch=1)
    candidates = torch.tensor([0, 1, 3, 4, 5])
    falls = removal(model, Example(inputs, 2, 7, candidates), torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3]), MASK)
    for fall, places in zip(falls, ([1], [1], [1, 4, 5])):
        ids = inputs["input_ids"].clone()
        ids[0, places] = MASK
        with torch.no_grad():
            whole, less = (model(**inputs | {"input_ids": some}).logits[0, 2, 7] for some in (inputs["input_ids"], ids))
        torch.testing.assert_close(fall, whole - less, rtol=1e-9, atol=1e-11)


def test_spearman():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 6, (20,), generator=generator).double()
    second = torch.randn(20, generator=generator, dtype=torch.double)
    assert math.isclose(spearman(first, second), stats.spearmanr(first, second).statistic, rel_tol=1e-12)
    assert math.isnan(spearman(torch.ones(4), second[:4]))


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    intervals = [bootstrap_interval(torch.randn(80, generator=generator), seed=seed) for seed in range(300)]
    covered = sum(low <= 0 <= high for low, high in intervals) / 300
    assert 0.90 < covered < 0.98


def test_interval_of_groups_is_that_of_their_means():
    means = torch.randn(30, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(30).repeat_interleave(5)
    torch.testing.assert_close(
        torch.tensor(bootstrap_interval(means.repeat_interleave(5), groups)), torch.tensor(bootstrap_interval(means))
    )


def test_the_truth_is_most_faithful(make_model, make_inputs):
    model = make_model()
    examples = []
    for seed in range(6):
        inputs = make_inputs(type(model), model.config, batch=1, length=12, seed=seed)
        inputs["input_ids"][0, 2] = MASK
        examples.append(Example(inputs, 2, 7, torch.tensor([i for i in range(12) if i != 2])))

    def truth(model, example, mask_token_id):
        return leave_one_out(model, example.inputs, example.place, example.target, mask_token_id)[0]

    def contrary(model, example, mask_token_id):
        return -truth(model, example, mask_token_id)

    found = faithfulness(model, examples, MASK, {"truth": truth, "contrary": contrary})
    assert math.isclose(found["truth"]["spearman"], 1) and math.isclose(found["contrary"]["spearman"], -1)
    assert math.isclose(found["contrary"]["below the first"], 2)
    assert found["contrary"]["below the first, interval"] == pytest.approx((2, 2))
    falls = [removal(model, each, truth(model, each, MASK)[each.candidates], MASK)[2] for each in examples]
    assert found["truth"]["removal"]["0.5"]["fall"] == pytest.approx(float(sum(falls)) / 6)
    assert METHODS["nearness"](model, examples[0], MASK).tolist() == [-abs(n - 2) for n in range(12)]
    for fraction in ("0.1", "0.2", "0.5"):
        assert found["truth"]["removal"][fraction]["fall"] > found["contrary"]["removal"][fraction]["fall"]
    assert list(faithfulness(model, examples, MASK)) == [
        "explanation",
        "integrated gradients",
        "gradient x input",
        "nearness",
    ]


def test_masked_examples(text):
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    assert [len(masked_examples(tokenizer, [words])) for words in ("a a a", "a a a a")] == [0, 1]
    sentences = (text / "valid.txt").read_text().split("\n")[:6]
    examples = masked_examples(tokenizer, [*sentences, "a"], max_length=16)
    assert 0 < len(examples) <= len([s for s in sentences if s])
    special = set(tokenizer.all_special_ids)
    for example in examples:
        ids = example.inputs["input_ids"][0]
        assert len(ids) <= 16 and ids[example.place] == tokenizer.mask_token_id
        assert example.target not in special and example.place not in example.candidates
        assert not special & set(ids[example.candidates].tolist())
        assert len(example.candidates) == sum(int(i) not in special for i in ids)


def test_masks_are_drawn_by_the_seed(text):
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    sentence = (text / "valid.txt").read_text().split("\n")[0]
    first, again, other = (
        [example.place for example in masked_examples(tokenizer, [sentence] * 20, seed=seed)] for seed in (0, 0, 1)
    )
    assert len(first) == 20 and len(set(first)) > 3
    assert first == again != other


def test_refusals(make_model, make_inputs, text):
    model = make_model()
    with pytest.raises(ValueError, match=r"examples=\[\]"):
        faithfulness(model, [], MASK)
    inputs = make_inputs(type(model), model.config, batch=1)
    two = make_inputs(type(model), model.config, batch=2)
    with pytest.raises(ValueError, match=r"examples\[0\] has 2 rows"):
        faithfulness(model, [Example(two, 2, 7, torch.tensor([0, 1, 3]))], MASK)
    with pytest.raises(ValueError, match="texts='a b c d' is a single text"):
        masked_examples(AutoTokenizer.from_pretrained(text / "tokenizer"), "a b c d")
    with pytest.raises(ValueError, match="methods={}"):
        faithfulness(model, [Example(inputs, 2, 7, torch.tensor([0, 1, 3]))], MASK, {})
    with pytest.raises(ValueError, match=r"examples\[0\] has 2 candidates"):
        faithfulness(model, [Example(inputs, 2, 7, torch.tensor([0, 1]))], MASK)
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match=r"has no \[MASK\]"):
        masked_examples(tokenizer, ["the fox"])
