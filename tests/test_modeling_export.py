"""Exported and traced models: one program serves batches, lengths and padding that it has not seen.

`tests/deployment` has the files that `export_model.py` writes.
"""

import warnings

import onnxruntime
import pytest
import torch

SHAPES = [(2, 5), (4, 33), (2, 200), (7, 1)]  # B, N
LONGEST = 200


@pytest.fixture(params=[(5, None), (None, 3)], ids=["local", "global with repetitions"])
def exportable(request, model_class, make_config, make_inputs):
    """A model, an example, and other padded batches with what the model makes of them."""
    scope, around = request.param
    config = make_config(
        local_context_size=scope,
        repetition_context_size=around,
        mask_token_id=4,
        max_position_embeddings=LONGEST,
        num_hidden_layers=1,
        return_dict=False,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def padded_inputs(batch, length):
        inputs = make_inputs(model_class, config, batch, length)
        inputs["attention_mask"][0, ..., (length + 1) // 2 :] = 0
        inputs["attention_mask"][-1, ..., : length // 3] = 0
        return inputs

    with torch.no_grad():
        batches = [(inputs, model(**inputs)) for inputs in (padded_inputs(*shape) for shape in SHAPES)]
    return model, padded_inputs(3, 9), batches


def assert_serves(call, batches):
    for inputs, expected in batches:
        actual = [torch.as_tensor(output) for output in call(inputs)]
        torch.testing.assert_close(actual, list(expected), rtol=1e-4, atol=1e-5)


def onnx_call(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})


def exported(model, example):
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=LONGEST)
    shapes = {name: {0: batch, value.dim() - 1: length} for name, value in example.items()}
    return torch.export.export(model, (), example, dynamic_shapes=shapes)


def test_torch_export(exportable):
    model, example, batches = exportable
    module = exported(model, example).module()
    assert_serves(lambda inputs: module(**inputs), batches)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(exportable):
    model, example, batches = exportable
    traced = torch.jit.trace(model, example_kwarg_inputs=example)
    assert_serves(lambda inputs: traced(**inputs), batches)


def test_onnx_by_tracing(exportable, tmp_path):
    model, example, batches = exportable
    axes = {name: {0: "batch", value.dim() - 1: "length"} for name, value in example.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            tmp_path / "model.onnx",
            input_names=list(example),
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    assert_serves(onnx_call(tmp_path / "model.onnx"), batches)
