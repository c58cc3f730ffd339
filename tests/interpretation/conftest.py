"""Models whose every weight is random, in float64, and batches whose masks have holes."""

import pytest
import torch

import modeling_lambdabert

NORMS = ["none", "layer", "rms", "batch"]
SCOPES = [5, None]
DEPTHS = [1, 4]
# a vocabulary so small that random texts, of the ids 5 ... 11, repeat some
REPETITION = {"repetition_context_size": 3, "mask_token_id": 6, "vocab_size": 12}


@pytest.fixture(
    params=[
        *((norm, depth, scope, False) for norm in NORMS for depth in DEPTHS for scope in SCOPES),
        *(("layer", depth, scope, True) for depth in DEPTHS for scope in SCOPES),
        *(("layer", depth, scope, True, "repetition") for depth in DEPTHS for scope in SCOPES),
    ],
    ids=str,
)
def settings(request):
    """Every norm, intra-depth and scope; and, with either of the last two, a gain, alone or beside repetitions."""
    norm, depth, scope, gain, *repetition = request.param
    fields = {"lambda_norm": norm, "intra_depth": depth, "local_context_size": scope, "content_gain": gain}
    return fields | (REPETITION if repetition else {})


@pytest.fixture
def repetition():
    """Fields of a model with a repetition lambda, whose texts of random tokens have repetitions."""
    return REPETITION


@pytest.fixture
def make_model(make_config):
    """Builds a float64 model of a class's name in evaluation mode; keyword arguments are fields of its config."""

    def build(name="LambdaBertForMaskedLM", seed=0, **fields):
        torch.manual_seed(seed)
        model = getattr(modeling_lambdabert, name)(make_config(**fields)).double().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("running_mean"):
                    buffer.normal_()
                if buffer_name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
        return model

    return build


@pytest.fixture
def holey(make_inputs):
    """Builds a batch for a model: one whole row, one with a hole, one with a tail of padding.

    For a repetition lambda, each has two hidden tokens."""

    def build(model, **sizes):
        inputs = make_inputs(type(model), model.config, **sizes)
        if model.config.repetition_context_size is not None:
            inputs["input_ids"][..., [0, 5]] = model.config.mask_token_id
        inputs["attention_mask"][1, ..., 3:5] = 0
        inputs["attention_mask"][2, ..., 6:] = 0
        return inputs

    return build
