"""Models whose every weight is random, in float64, and batches whose masks have holes."""

import pytest
import torch

import modeling_lambdabert

NORMS = ["none", "layer", "rms", "batch"]
SCOPES = [5, None]
DEPTHS = [1, 4]


@pytest.fixture(
    params=[
        *((norm, depth, scope, False) for norm in NORMS for depth in DEPTHS for scope in SCOPES),
        *(("layer", depth, scope, True) for depth in DEPTHS for scope in SCOPES),
    ],
    ids=str,
)
def settings(request):
    """Every norm, intra-depth and scope; and, with either of the last two, a gain of the content lambda."""
    norm, depth, scope, gain = request.param
    return {"lambda_norm": norm, "intra_depth": depth, "local_context_size": scope, "content_gain": gain}


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
    """Builds a batch for a model: one whole row, one with a hole, one with a tail of padding."""

    def build(model, **sizes):
        inputs = make_inputs(type(model), model.config, **sizes)
        inputs["attention_mask"][1, ..., 3:5] = 0
        inputs["attention_mask"][2, ..., 6:] = 0
        return inputs

    return build
