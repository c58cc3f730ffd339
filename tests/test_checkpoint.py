"""The trained model in `checkpoints/` loads from the repository alone and has learned more than word frequencies."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_lambdabert import LambdaBertForMaskedLM

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "wikipedia-small"
TEXT = (
    "The village lies on the south bank of the river, a few miles north of the city. It was founded in the early 19th "
    "century, and the first school was opened in 1874. Most of the people who live there work in the city."
)


@pytest.fixture(scope="module")
def loaded():
    return LambdaBertForMaskedLM.from_pretrained(CHECKPOINT).eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


def test_size():
    files = list(CHECKPOINT.iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".png"}  # its code is the repository's


def test_predicts_words_from_their_context(loaded):
    """Each token masked in turn: nearer to it than without its context, and than the frequencies in the head's bias."""
    model, tokenizer = loaded
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    places = torch.arange(1, len(ids) - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = tokenizer.mask_token_id
    alone = torch.tensor([[tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id]])
    with torch.inference_mode():
        logits = model(masked).logits[torch.arange(len(places)), places].float()
        without_context = model(alone).logits[:, 1].float().expand_as(logits)
    frequencies = model.cls.predictions.bias.detach().float().expand_as(logits)
    losses = [torch.nn.functional.cross_entropy(x, ids[places]) for x in (logits, without_context, frequencies)]
    assert losses[0] < losses[1] - 1 and losses[0] < losses[2] - 1  # nats per token
