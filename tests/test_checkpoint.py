"""The trained models in `checkpoints/` load from the repository alone and have learned more than word frequencies."""

import json
from functools import partial
from pathlib import Path

import pytest
import sentence_transformers
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from configuration_lambdabert import LambdaBertConfig
from lambdabert.text.objectives import OBJECTIVES
from lambdabert.training.models import make_config
from lambdabert.training.report import CONFIG_FIELDS
from modeling_lambdabert import LambdaBertForMaskedLM

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
NAMES = ("wikipedia-small", "wikipedia-512", "wikipedia-repetitions", "wikipedia-512-repetitions")
TEXT = (
    "The village lies on the south bank of the river, a few miles north of the city. It was founded in the early 19th "
    "century, and the first school was opened in 1874. Most of the people who live there work in the city."
)


@pytest.fixture(params=NAMES)
def checkpoint(request):
    return CHECKPOINTS / request.param


def test_all_are_tested():
    assert {folder.name for folder in CHECKPOINTS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", ["wikipedia-small", "wikipedia-512"])
def test_a_recipe_makes_the_model_that_is_shipped(name):
    recipe = json.loads((CHECKPOINTS.parent / f"configs/{name.replace('-', '_')}.json").read_text(encoding="utf-8"))
    shipped = LambdaBertConfig.from_pretrained(CHECKPOINTS / name)
    overrides, objective = recipe["config_overrides"], OBJECTIVES[recipe["objective"]]
    config = make_config(None, "", overrides, objective=objective, tokens=shipped.vocab_size, padding=0, mask=4)
    for field in (*CONFIG_FIELDS, "pad_token_id"):
        assert getattr(config, field) == getattr(shipped, field), field


def test_size(checkpoint):
    files = list(checkpoint.iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".png"}  # its code is the repository's


@pytest.mark.parametrize(
    "load",
    [
        LambdaBertForMaskedLM.from_pretrained,
        AutoModel.from_pretrained,
        partial(AutoModelForSequenceClassification.from_pretrained, trust_remote_code=True),
        lambda folder: pipeline("fill-mask", model=str(folder)).model,
        lambda folder: sentence_transformers.SentenceTransformer(str(folder), device="cpu")[0].auto_model,
    ],
    ids=["class", "Auto class", "head, remote code allowed", "pipeline", "sentence-transformers"],
)
def test_loads_in_float32(load, checkpoint):
    """Though stored in bfloat16, in which training would lose small updates."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert {parameter.dtype for parameter in load(checkpoint).parameters()} == {torch.float32}


def test_predicts_words_from_their_context(checkpoint):
    """Each token masked in turn: nearer to it than without its context, and than the frequencies in the head's bias."""
    model = LambdaBertForMaskedLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    places = torch.arange(1, len(ids) - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = tokenizer.mask_token_id
    alone = torch.tensor([[tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id]])
    with torch.inference_mode():
        logits = model(masked).logits[torch.arange(len(places)), places]
        without_context = model(alone).logits[:, 1].expand_as(logits)
    frequencies = model.cls.predictions.bias.detach().expand_as(logits)
    losses = [torch.nn.functional.cross_entropy(x, ids[places]) for x in (logits, without_context, frequencies)]
    assert losses[0] < losses[1] - 1 and losses[0] < losses[2] - 1  # nats per token
