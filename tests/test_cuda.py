"""Models on a GPU against the same models in float64 on the CPU, where `reference.py` decides what is right."""

import copy
import math

import pytest
import torch

import modeling_lambdabert as modeling
import run_language_modeling
from lambdabert.interpretation.faithfulness import Example, faithfulness
from packing_lambdabert import Packing
from training_support import recipe_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

MASK = 4
# fields of a config; the global scope of 200 tokens is computed by FFT
LAYERS = {
    "local": dict(local_context_size=5),
    "global": dict(local_context_size=None),
    "repetitions": dict(local_context_size=5, repetition_context_size=3, mask_token_id=MASK, content_gain=True),
    "batch norm": dict(local_context_size=5, lambda_norm="batch"),
}
# largest error in units of the largest output
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@pytest.fixture(params=LAYERS, ids=str)
def exact(request, make_config):
    """A pretraining model in float64 on the CPU whose every weight is random."""
    torch.manual_seed(0)
    config = make_config(max_position_embeddings=200, **LAYERS[request.param])
    model = modeling.LambdaBertForPreTrainingSOP(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(lengths=(200, 40, 1, 130), longest=200):
    """Input ids, mask and labels of rows of these lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 15, mask.shape, generator=generator)
    ids[:, ::5] = MASK
    labels = torch.where((ids == MASK) & mask.bool(), torch.randint(5, 60, ids.shape, generator=generator), -100)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": labels,
        "sentence_order_label": torch.tensor([0, 1, 1, 0]),
    }


def on_gpu(given, dtype=None):
    """A copy of a model, or of a batch, on the GPU."""
    if isinstance(given, dict):
        return {name: tensor.cuda() for name, tensor in given.items()}
    return copy.deepcopy(given).to("cuda", dtype)


def assert_near(found, expected, tolerance):
    found = found.detach().cpu().double()
    assert torch.isfinite(found).all()
    assert (found - expected.detach()).abs().max() <= tolerance * expected.detach().abs().max()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_outputs(exact, dtype, packed):
    inputs = batch()
    asked = dict(output_lambda_params=True, output_hidden_states=not packed)
    expected = exact.bert(inputs["input_ids"], inputs["attention_mask"], **asked)
    cuda = on_gpu(inputs)
    found = on_gpu(exact, dtype).bert(cuda["input_ids"], cuda["attention_mask"], **asked)
    assert_near(found.last_hidden_state, expected.last_hidden_state, TOLERANCES[dtype])
    assert (found.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()
    for content, expected_content in zip(found.lambda_params, expected.lambda_params, strict=True):
        assert_near(content, expected_content, TOLERANCES[dtype])


def test_gradients(exact):
    inputs = batch()
    found = on_gpu(exact, torch.float32).train()
    exact.train()
    count = (inputs["labels"] != -100).sum()
    exact(**inputs, num_items_in_batch=count).loss.backward()
    found(**on_gpu(inputs), num_items_in_batch=count.cuda()).loss.backward()
    for (name, expected), parameter in zip(exact.named_parameters(), found.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert_near(parameter.grad, expected.grad, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_loss(exact, dtype):
    inputs = batch()
    model = on_gpu(exact, torch.float32).train()
    exact.train()
    expected = exact(**inputs).loss
    with torch.autocast("cuda", dtype=dtype):
        loss = model(**on_gpu(inputs)).loss
    loss.backward()
    assert_near(loss, expected, 0.03)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_compiled(exact):
    inputs = batch()
    expected = exact.bert(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    cuda = on_gpu(inputs)
    compiled = torch.compile(on_gpu(exact, torch.float32).bert)
    found = compiled(cuda["input_ids"], cuda["attention_mask"]).last_hidden_state
    assert_near(found, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_pretraining_resumes(text, tmp_path, precision):
    """A run that is stopped after a checkpoint and one that is not have the same evaluations, up to rounding."""
    half = {} if precision == "no" else {precision: True}
    settings = dict(use_cpu=None, **half)
    losses = []
    for name, stops in {"whole": [12], "stopped": [8, 12]}.items():
        for steps in stops:
            recipe = recipe_for(text, tmp_path / name, **settings, lr_scheduler_type="constant", max_steps=steps)
            assert run_language_modeling.main([recipe]) == 0
        model = modeling.LambdaBertForPreTrainingSOP.from_pretrained(tmp_path / name, device_map="cuda")
        ids = torch.arange(10, 40, device="cuda")[None]
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if precision == "no" else 0.02)


def test_faithfulness(exact):
    model = modeling.LambdaBertForMaskedLM(exact.config).eval().cuda()
    ids = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    example = Example({"input_ids": ids.cuda()}, 3, 7, torch.tensor([1, 2, 5, 8]))
    found = faithfulness(model, [example, example], mask_token_id=4)
    assert all(math.isfinite(row["removal"]["0.5"]["fall"]) for row in found.values())


def test_rows_of_all_lengths_are_one_group():
    """Each group of rows starts kernels of its own, which cost a GPU more than padding does."""
    lengths = torch.tensor([200, 40, 1, 130])
    packing = Packing((torch.arange(200) < lengths[:, None]).cuda())
    assert [group.shape for group in packing.groups] == [(4, 200)]
