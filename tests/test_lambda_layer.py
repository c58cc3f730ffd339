"""LambdaLayer against the definition in reference.py, and what it promises about padding, precision and statistics."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lambda_kernels
import lambda_layer
import reference
import repetitions_lambdabert
from lambda_layer import LambdaLayer
from modeling_lambdabert import LambdaBertModel
from packing_lambdabert import Packing, Padded
from repetitions_lambdabert import Repetitions

NORMS = ["none", "layer", "rms", "batch"]
SCOPES = [1, 3, 25, None]
LENGTHS = [1, 2, 7, 63]

# D, H, K, U
SHAPES = [(5, 1, 1, 1), (6, 3, 4, 2), (8, 2, 3, 1), (8, 4, 1, 3)]


def layer_config(make_config, shape=(6, 3, 4, 2), **overrides):
    width, heads, key_depth, intra_depth = shape
    return make_config(
        hidden_size=width, num_lambda_queries=heads, key_depth=key_depth, intra_depth=intra_depth, **overrides
    )


def random_layer(config, seed=0, dtype=torch.float64):
    """A layer whose every parameter and statistic is random, whatever the initialisation does."""
    torch.manual_seed(seed)
    layer = LambdaLayer(config).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_()
            if name.endswith("norm.weight"):
                parameter.mul_(0.3).add_(1)
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return layer.eval()


def random_mask(kind, batch, length, seed=0):
    """[B, N]; the first row is always whole."""
    mask = torch.ones(batch, length, dtype=torch.long)
    kept = math.ceil(length / 2)
    if kind == "tail":
        mask[1:, kept:] = 0
    elif kind == "left":
        mask[1:, : length - kept] = 0
    elif kind == "holes":
        mask[1:] = torch.randint(0, 2, (batch - 1, length), generator=torch.Generator().manual_seed(seed))
        mask[1:, -1] = 1
    elif kind == "empty row":
        mask[1:2] = 0
    return mask


def reference_norm(module, kind):
    if kind == "none":
        return None
    return reference.ReferenceNorm(
        kind=kind,
        weight=module.weight.tolist(),
        bias=module.bias.tolist() if getattr(module, "bias", None) is not None else None,
        eps=torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps,
        running_mean=module.running_mean.tolist() if kind == "batch" else None,
        running_var=module.running_var.tolist() if kind == "batch" else None,
        training=module.training,
    )


def reference_output(layer, config, hidden_states, mask, tokens=None):
    """Output and content lambda of the definition, with the parameters of `layer`."""
    output, content = reference.lambda_layer(
        hidden_states.tolist(),
        None if mask is None else mask.tolist(),
        layer.to_queries.weight.tolist(),
        layer.to_keys.weight.tolist(),
        layer.to_values.weight.tolist(),
        layer.relative_embeddings.tolist(),
        reference_norm(getattr(layer, "query_norm", None), config.lambda_norm),
        reference_norm(getattr(layer, "value_norm", None), config.lambda_norm),
        config.num_lambda_queries,
        config.local_context_size,
        None if layer.content_gain is None else layer.content_gain.tolist(),
        None if layer.repetition_embeddings is None else layer.repetition_embeddings.tolist(),
        None if tokens is None else tokens.tolist(),
    )
    return torch.tensor(output, dtype=torch.float64), torch.tensor(content, dtype=torch.float64)


def assert_agrees_with_reference(layer, config, hidden_states, mask, tokens=None):
    expected, expected_content = reference_output(layer, config, hidden_states, mask, tokens)
    packing = None if tokens is None else Padded(None if mask is None else mask.bool(), tokens)
    output, content = layer(hidden_states, mask, packing)
    assert output.shape == hidden_states.shape
    assert content.shape == expected_content.shape
    assert torch.isfinite(output).all() and torch.isfinite(content).all()
    real = torch.ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(output[real], expected[real], rtol=1e-10, atol=1e-10)
    occupied = real.any(dim=1)
    torch.testing.assert_close(content[occupied], expected_content[occupied], rtol=1e-10, atol=1e-10)


class TestDefinition:
    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_shape_scope_and_length(self, make_config, shape, scope, length):
        config = layer_config(
            make_config, shape, local_context_size=scope, lambda_norm="none", max_position_embeddings=64
        )
        layer = random_layer(config)
        hidden_states = torch.randn(2, length, config.hidden_size, dtype=torch.float64)
        assert_agrees_with_reference(layer, config, hidden_states, None)
        assert_agrees_with_reference(layer, config, hidden_states, random_mask("holes", 2, length))

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("kind", ["none", "tail", "left", "holes", "empty row"])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [3, 25, None])
    def test_every_norm_and_mask(self, make_config, scope, norm, kind, training):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        layer = random_layer(config).train(training)
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        assert_agrees_with_reference(layer, config, hidden_states, random_mask(kind, 3, 7))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float64])
    def test_mask_dtypes(self, make_config, dtype):
        config = layer_config(make_config)
        layer = random_layer(config)
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        mask = random_mask("holes", 3, 7)
        torch.testing.assert_close(layer(hidden_states, mask.to(dtype)), layer(hidden_states, mask), rtol=0, atol=0)

    @pytest.mark.parametrize("scope", [1, 9, None])
    @pytest.mark.parametrize("norm", NORMS)
    def test_parameter_count(self, make_config, norm, scope):
        config = layer_config(make_config, (6, 3, 4, 2), local_context_size=scope, lambda_norm=norm)
        width, heads, key_depth, value_depth, intra_depth = 6, 3, 4, 2, 2
        offsets = 2 * config.max_position_embeddings - 1 if scope is None else scope
        expected = width * (heads * key_depth + key_depth * intra_depth + value_depth * intra_depth)
        expected += offsets * key_depth * intra_depth
        norm_tensors = {"none": 0, "rms": 1, "layer": 2, "batch": 2}[norm]
        expected += norm_tensors * (heads * key_depth + value_depth * intra_depth)
        assert sum(parameter.numel() for parameter in LambdaLayer(config).parameters()) == expected

    @pytest.mark.parametrize("kind", ["holes", "empty row"])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [3, None])
    def test_gradcheck(self, make_config, scope, norm, kind):
        config = layer_config(make_config, (4, 2, 2, 2), local_context_size=scope, lambda_norm=norm)
        layer = random_layer(config).train()
        mask = random_mask(kind, 2, 4)
        real = mask.bool()
        names, parameters = zip(*layer.named_parameters())

        def function(hidden_states, *values):
            output, content = torch.func.functional_call(layer, dict(zip(names, values)), (hidden_states, mask))
            return output[real], content

        hidden_states = torch.randn(2, 4, config.hidden_size, dtype=torch.float64, requires_grad=True)
        leaves = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        assert torch.autograd.gradcheck(function, (hidden_states, *leaves))


class TestContentGain:
    """A learned gain on the content lambda, in every way that the layer computes; without it, the paper's layer."""

    @staticmethod
    def config(make_config, scope, **fields):
        return layer_config(make_config, local_context_size=scope, content_gain=True, **fields)

    @pytest.mark.parametrize("kind", ["none", "tail", "left", "holes", "empty row"])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [3, 25, None])
    def test_definition(self, make_config, scope, norm, kind):
        config = self.config(make_config, scope, lambda_norm=norm)
        layer = random_layer(config).train()
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        assert_agrees_with_reference(layer, config, hidden_states, random_mask(kind, 3, 7))

    @pytest.mark.parametrize("scope", [3, None])
    def test_tiles(self, make_config, monkeypatch, scope):
        monkeypatch.setattr(lambda_kernels, "TILE", 3)
        monkeypatch.setattr(lambda_kernels, "FFT_TILE", 40)
        monkeypatch.setattr(lambda_kernels, "DIRECT_LENGTH", 0)
        config = self.config(make_config, scope)
        layer = random_layer(config)
        hidden_states = torch.randn(3, 17, config.hidden_size, dtype=torch.float64)
        with torch.inference_mode():
            assert_agrees_with_reference(layer, config, hidden_states, random_mask("holes", 3, 17))

    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize("scope", [3, None])
    def test_packed(self, make_config, scope, inference):
        config = self.config(make_config, scope)
        layer = random_layer(config)
        hidden_states = torch.randn(4, 11, config.hidden_size, dtype=torch.float64)
        mask = random_mask("holes", 4, 11)
        mask[3, 4:] = 0
        packing = Packing(mask.bool())
        expected, expected_content = reference_output(layer, config, hidden_states, mask)
        with torch.inference_mode(inference):
            output, content = layer(packing.pack(hidden_states), layout=packing)
        torch.testing.assert_close(output, packing.pack(expected), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(content, expected_content, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("mode", ["compiled", "exported"])
    @pytest.mark.parametrize("scope", [3, None])
    def test_graphs(self, make_config, scope, mode):
        config = self.config(make_config, scope)
        layer = random_layer(config)
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        mask = random_mask("tail", 3, 7)
        expected, expected_content = reference_output(layer, config, hidden_states, mask)
        if mode == "compiled":
            graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
        else:
            graph = torch.export.export(layer, (hidden_states, mask)).module()
        output, content = graph(hidden_states, mask)
        torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(content, expected_content, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("scope", [3, None])
    def test_gradcheck(self, make_config, scope):
        config = layer_config(make_config, (4, 2, 2, 2), local_context_size=scope, content_gain=True)
        layer = random_layer(config)
        names, parameters = zip(*layer.named_parameters())
        assert "content_gain" in names

        def function(hidden_states, *values):
            return torch.func.functional_call(layer, dict(zip(names, values)), (hidden_states,))

        hidden_states = torch.randn(2, 4, config.hidden_size, dtype=torch.float64, requires_grad=True)
        leaves = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        assert torch.autograd.gradcheck(function, (hidden_states, *leaves))

    @pytest.mark.parametrize("scope", [3, None])
    def test_a_gain_of_1_is_the_layer_without(self, make_config, scope):
        """To the bit, gradients included; the gain is all that it adds to the state dict."""
        plain = random_layer(layer_config(make_config, local_context_size=scope))
        layer = random_layer(self.config(make_config, scope))
        ones = {"content_gain": torch.ones(layer.key_depth, dtype=torch.float64)}
        layer.load_state_dict(plain.state_dict() | ones)
        hidden_states, mask = torch.randn(2, 7, 6, dtype=torch.float64), random_mask("holes", 2, 7)
        weights = torch.randn(int(mask.sum()), 6, dtype=torch.float64)
        *results, gradients = gradients_of(layer, hidden_states, mask, weights)
        *expected_results, expected_gradients = gradients_of(plain, hidden_states, mask, weights)
        del gradients["content_gain"]
        torch.testing.assert_close((results, gradients), (expected_results, expected_gradients), rtol=0, atol=0)

    @pytest.mark.parametrize("scope", [3, None])
    def test_a_new_layer_has_position_lambdas_alone(self, make_config, scope):
        """What a text holds elsewhere tells nothing yet, and the gain is the first to learn of it."""
        layer = LambdaLayer(self.config(make_config, scope)).double()
        hidden_states = torch.randn(2, 7, 6, dtype=torch.float64)
        output, content = layer(hidden_states)
        assert not content.any()
        values = layer.value_norm(layer.to_values(hidden_states)).unflatten(-1, (-1, layer.intra_depth))
        position = reference_position_lambda(values, layer.relative_embeddings, scope)
        queries = layer.query_norm(layer.to_queries(hidden_states)).unflatten(-1, (layer.num_queries, -1))
        torch.testing.assert_close(output, (queries @ position).flatten(-2), rtol=1e-10, atol=1e-10)
        output.square().sum().backward()
        assert layer.content_gain.grad.all() and not layer.to_keys.weight.grad.any()


def test_statistics_of_all_batches(make_config):
    """As `torch.optim.swa_utils.update_bn` asks for them, by a momentum of None."""
    layer = random_layer(layer_config(make_config, lambda_norm="batch")).train()
    states = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    for norm in (layer.query_norm, layer.value_norm):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in states:
            layer(batch)
    values = layer.to_values(states)
    torch.testing.assert_close(layer.value_norm.running_mean, values.mean((0, 1, 2)))


class TestRepetitionLambda:
    """What stood around the other occurrences of a token, in every way that the layer computes."""

    @staticmethod
    def layer(make_config, scope=3, width=3, shape=(6, 3, 4, 2), **fields):
        config = layer_config(make_config, shape, local_context_size=scope, repetition_context_size=width, **fields)
        return config, random_layer(config)

    @staticmethod
    def tokens(batch, length, kinds=4):
        """[B, N] of so many kinds, -1 among them: one that is like no other."""
        return torch.randint(-1, kinds - 1, (batch, length), generator=torch.Generator().manual_seed(length))

    @pytest.mark.parametrize("kind", ["none", "tail", "left", "holes", "empty row"])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [3, None])
    def test_definition(self, make_config, scope, norm, kind):
        config, layer = self.layer(make_config, scope, lambda_norm=norm)
        hidden_states = torch.randn(3, 9, 6, dtype=torch.float64)
        mask, tokens = random_mask(kind, 3, 9), self.tokens(3, 9)
        assert_agrees_with_reference(layer.train(), config, hidden_states, mask, tokens)
        with torch.inference_mode():
            assert_agrees_with_reference(layer.eval(), config, hidden_states, mask, tokens)

    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("width", [1, 5, 9])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_shape_width_and_length(self, make_config, shape, width, length):
        config, layer = self.layer(make_config, 3, width, shape, content_gain=True)
        hidden_states = torch.randn(2, length, config.hidden_size, dtype=torch.float64)
        for kinds in (2, length + 2):
            assert_agrees_with_reference(layer, config, hidden_states, None, self.tokens(2, length, kinds))

    @pytest.mark.parametrize("kind", ["tail", "left", "holes", "empty row"])
    def test_packed(self, make_config, kind):
        config, layer = self.layer(make_config)
        hidden_states, tokens = torch.randn(4, 11, 6, dtype=torch.float64), self.tokens(4, 11)
        mask = random_mask(kind, 4, 11)
        mask[3, 4:] = 0
        packing = Packing(mask.bool(), tokens)
        expected, _ = reference_output(layer, config, hidden_states, mask, tokens)
        output, _ = layer(packing.pack(hidden_states), layout=packing)
        torch.testing.assert_close(output, packing.pack(expected), rtol=1e-10, atol=1e-10)

    def test_gradcheck(self, make_config):
        config, layer = self.layer(make_config, shape=(4, 2, 2, 2))
        names, parameters = zip(*layer.named_parameters())
        assert "repetition_embeddings" in names
        packing = Padded(random_mask("tail", 2, 6).bool(), self.tokens(2, 6, 3))

        def function(hidden_states, *values):
            arguments = hidden_states, packing.mask, packing
            return torch.func.functional_call(layer, dict(zip(names, values)), arguments)[0][packing.mask]

        hidden_states = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
        leaves = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        assert torch.autograd.gradcheck(function, (hidden_states, *leaves))

    def test_a_new_layer_is_the_layer_without(self, make_config):
        """And the table learns from the first step on."""
        config = layer_config(make_config, local_context_size=3, repetition_context_size=3)
        layer = LambdaLayer(config).double()
        plain = LambdaLayer(layer_config(make_config, local_context_size=3)).double()
        plain.load_state_dict({n: w for n, w in layer.state_dict().items() if n != "repetition_embeddings"})
        hidden_states, tokens = torch.randn(2, 7, 6, dtype=torch.float64), self.tokens(2, 7)
        output, _ = layer(hidden_states, layout=Padded(None, tokens))
        torch.testing.assert_close(output, plain(hidden_states)[0], rtol=0, atol=0)
        output.square().sum().backward()
        assert layer.repetition_embeddings.grad.all()

    def test_tokens_that_occur_once_have_none(self, make_config):
        _, layer = self.layer(make_config)
        hidden_states = torch.randn(1, 6, 6, dtype=torch.float64)
        alone, _ = layer(hidden_states, layout=Padded(None, torch.arange(6)[None]))
        hidden, _ = layer(hidden_states, layout=Padded(None, torch.full((1, 6), -1)))
        torch.testing.assert_close(alone, hidden, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_many_occurrences_in_low_precision(self, make_config, dtype):
        """A sum of 2000 values is not kept in the precision of the values, in which it would stop growing."""
        ones = torch.ones(1, 2000, 1, dtype=dtype)
        repetitions = Repetitions(torch.zeros(1, 2000, dtype=torch.long), None)
        torch.testing.assert_close(repetitions.mean_of_others(ones), ones, rtol=0, atol=0)

    def test_a_layout_without_tokens(self, make_config):
        _, layer = self.layer(make_config)
        with pytest.raises(
            ValueError, match=r"repetition_context_size=3 needs .* layout=Padded\(attention_mask.bool\(\), token_ids"
        ):
            layer(torch.randn(1, 4, 6, dtype=torch.float64))


class TestTiles:
    """Inference forms the lambdas tile by tile; tiles far smaller than a cache leave no border untried."""

    @pytest.mark.parametrize("kind", ["none", "tail", "holes", "empty row"])
    @pytest.mark.parametrize("fft_tile, tile", [(1, 1), (40, 3), (200, 8), (2**20, 256)])
    @pytest.mark.parametrize("scope", [1, 3, 25, None])
    def test_definition(self, make_config, monkeypatch, scope, fft_tile, tile, kind):
        monkeypatch.setattr(lambda_kernels, "TILE", tile)
        monkeypatch.setattr(lambda_kernels, "FFT_TILE", fft_tile)
        monkeypatch.setattr(lambda_kernels, "FFT_DEPTHS", 1)
        monkeypatch.setattr(lambda_kernels, "DIRECT_LENGTH", 0)
        config = layer_config(make_config, local_context_size=scope)
        layer = random_layer(config)
        hidden_states = torch.randn(3, 17, config.hidden_size, dtype=torch.float64)
        with torch.inference_mode():
            assert_agrees_with_reference(layer, config, hidden_states, random_mask(kind, 3, 17))

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("length", [*LENGTHS, 300, 1000])
    @pytest.mark.parametrize("scope", [25, None])
    def test_inference_equals_training(self, make_config, scope, length, norm):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm, max_position_embeddings=1000)
        layer = random_layer(config)
        hidden_states = torch.randn(2, length, config.hidden_size, dtype=torch.float64)
        expected = layer(hidden_states, None)
        with torch.no_grad():
            torch.testing.assert_close(layer(hidden_states, None), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [25, None])
    def test_autocast(self, make_config, scope, norm, dtype):
        layer = random_layer(layer_config(make_config, local_context_size=scope, lambda_norm=norm), dtype=torch.float32)
        hidden_states = torch.randn(2, 30, 6)
        with torch.autocast("cpu", dtype=dtype):
            expected, _ = layer(hidden_states, None)
            with torch.no_grad():
                actual, _ = layer(hidden_states, None)
        assert actual.dtype == expected.dtype == dtype
        error = (actual - expected).norm() / expected.norm()
        assert error <= 2 * torch.finfo(dtype).eps


class TestPacking:
    """Of packed tokens the layer makes what it makes of them in their rows."""

    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("kind", ["none", "tail", "left", "holes", "empty row"])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [3, 25, None])
    def test_definition(self, make_config, scope, norm, kind, training, inference):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        layer = random_layer(config).train(training)
        hidden_states = torch.randn(4, 11, config.hidden_size, dtype=torch.float64)
        mask = random_mask(kind, 4, 11)
        mask[3, 4:] = 0
        packing = Packing(mask.bool())
        expected, expected_content = reference_output(layer, config, hidden_states, mask)
        with torch.inference_mode(inference):
            output, content = layer(packing.pack(hidden_states), layout=packing)
        torch.testing.assert_close(output, packing.pack(expected), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(content, expected_content, rtol=1e-10, atol=1e-10)


def reference_position_lambda(values, relative_embeddings, scope):
    batch, length, value_depth, intra_depth = values.shape
    key_depth = relative_embeddings.shape[1]
    flat = values.reshape(batch, length, value_depth * intra_depth).tolist()
    mask = [[1] * length] * batch
    result = reference.position_lambda(
        flat, mask, relative_embeddings.tolist(), scope, key_depth, value_depth, intra_depth
    )
    return torch.tensor(result, dtype=torch.float64)


POSITION_LAMBDAS = {
    "local": lambda_layer.local_position_lambda,
    "toeplitz": lambda_kernels.toeplitz_position_lambda,
    "global": lambda_layer.global_position_lambda,
    "fft": lambda_kernels.fft_position_lambda,
    "exported local": lambda_kernels.exported_local_lambda,
    "spectral": lambda_kernels.spectral_position_lambda,
}


class TestPositionLambda:
    """By two formulas, two faster ways and two of exports; values [B, M, V, U], table [R', K, U] -> [B, N, K, V]."""

    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("size", [1, 3, 25])
    @pytest.mark.parametrize("name", ["local", "toeplitz", "exported local"])
    def test_local(self, name, size, length):
        torch.manual_seed(0)
        values = torch.randn(2, length, 3, 2, dtype=torch.float64)
        table = torch.randn(size, 4, 2, dtype=torch.float64)
        expected = reference_position_lambda(values, table, size)
        torch.testing.assert_close(POSITION_LAMBDAS[name](values, table), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", ["global", "fft", "spectral"])
    @pytest.mark.parametrize(
        "limit, length", [*itertools.product([63, 100], LENGTHS), (130, 65), (130, 130), (129, 129)]
    )
    def test_global(self, name, limit, length):
        """A spectrum takes 64 places at a time, and a limit one above their multiple needs one block more."""
        torch.manual_seed(0)
        values = torch.randn(2, length, 3, 2, dtype=torch.float64)
        table = torch.randn(2 * limit - 1, 4, 2, dtype=torch.float64)
        expected = reference_position_lambda(values, table, None)
        torch.testing.assert_close(POSITION_LAMBDAS[name](values, table), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("length", [1, 5, 64])
    def test_global_and_fft_have_the_same_gradients(self, length):
        torch.manual_seed(0)
        values = torch.randn(2, length, 3, 2, dtype=torch.float64, requires_grad=True)
        table = torch.randn(2 * 64 - 1, 4, 2, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(2, length, 4, 3, dtype=torch.float64)
        gradients = [
            torch.autograd.grad((function(values, table) * weights).sum(), (values, table))
            for function in (lambda_layer.global_position_lambda, lambda_kernels.fft_position_lambda)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", POSITION_LAMBDAS)
    def test_gradcheck(self, name):
        torch.manual_seed(0)
        values = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        table = torch.randn(9, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(POSITION_LAMBDAS[name], (values, table))

    @pytest.mark.parametrize("shift", [1, 4, 11])
    @pytest.mark.parametrize("name", POSITION_LAMBDAS)
    def test_translation_equivariance(self, name, shift):
        """Moving all values by `shift` places moves the position lambdas with them."""
        torch.manual_seed(0)
        function = POSITION_LAMBDAS[name]
        table = torch.randn(9 if name in ("local", "toeplitz") else 2 * 32 - 1, 4, 2, dtype=torch.float64)
        values = F.pad(torch.randn(1, 10, 3, 2, dtype=torch.float64), (0, 0, 0, 0, 0, 14))
        moved = torch.roll(values, shift, dims=1)
        torch.testing.assert_close(
            function(moved, table)[:, shift:], function(values, table)[:, :-shift], rtol=1e-10, atol=1e-10
        )


def gradients_of(layer, hidden_states, mask, weights):
    """Output and content lambda, and the gradients of a weighted sum over real tokens, by name."""
    hidden_states = hidden_states.clone().requires_grad_()
    layer.zero_grad()
    output, content = layer(hidden_states, mask)
    real = mask.bool()
    ((output[real] * weights).sum() + content.sin().sum()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return output[real].detach(), content.detach(), hidden_states.grad[real], gradients


def statistics_of(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


class TestPadding:
    @pytest.mark.parametrize("scope", [3, 25, None])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("before, after", [(0, 5), (4, 0), (3, 2), (20, 13)])
    def test_amount_and_place_do_not_matter(self, make_config, scope, norm, before, after):
        """Outputs, gradients and statistics of two ragged rows are those without the extra padding."""
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        torch.manual_seed(1)
        hidden_states = torch.randn(2, 6, config.hidden_size, dtype=torch.float64)
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        weights = torch.randn(10, config.hidden_size, dtype=torch.float64)
        plain, padded = random_layer(config).train(), random_layer(config).train()
        expected = gradients_of(plain, hidden_states, mask, weights)
        padding = F.pad(hidden_states, (0, 0, before, after), value=3.0)
        actual = gradients_of(padded, padding, F.pad(mask, (before, after)), weights)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(statistics_of(padded), statistics_of(plain), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("content", [1e6, float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", ["tail", "left", "holes", "empty row"])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [3, None])
    def test_content_does_not_matter(self, make_config, scope, norm, kind, content):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        torch.manual_seed(1)
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        mask = random_mask(kind, 3, 7)
        weights = torch.randn(int(mask.sum()), config.hidden_size, dtype=torch.float64)
        clean, soiled = random_layer(config).train(), random_layer(config).train()
        expected = gradients_of(clean, hidden_states, mask, weights)
        filled = hidden_states.masked_fill(mask[:, :, None] == 0, content)
        if math.isfinite(content):
            torch.testing.assert_close(gradients_of(soiled, filled, mask, weights), expected, rtol=1e-10, atol=1e-10)
        else:  # 0 * NaN is NaN in the gradient of a projection, as in that of any dense layer
            output, content_lambda = soiled(filled, mask)
            torch.testing.assert_close((output[mask.bool()], content_lambda), expected[:2], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(statistics_of(soiled), statistics_of(clean), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("scope", [3, None])
    @pytest.mark.parametrize("norm", ["none", "layer", "rms"])
    def test_other_rows_do_not_matter(self, make_config, scope, norm):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        layer = random_layer(config).train()
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        mask = random_mask("tail", 3, 7)
        output, content = layer(hidden_states, mask)
        alone, content_alone = layer(hidden_states[1:2], mask[1:2])
        real = mask[1].bool()
        torch.testing.assert_close(alone[0, real], output[1, real], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(content_alone[0], content[1], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("scope", [3, None])
    @pytest.mark.parametrize("norm", NORMS)
    def test_all_ones_mask_equals_no_mask(self, make_config, scope, norm):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        hidden_states = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
        with_mask = random_layer(config).train()(hidden_states, torch.ones(3, 7, dtype=torch.long))
        torch.testing.assert_close(random_layer(config).train()(hidden_states, None), with_mask, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("scope", [3, None])
    @pytest.mark.parametrize("norm", NORMS)
    def test_nothing_left_stays_finite(self, make_config, scope, norm):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        layer = random_layer(config).train()
        hidden_states = torch.randn(2, 7, config.hidden_size, dtype=torch.float64, requires_grad=True)
        output, content = layer(hidden_states, torch.zeros(2, 7, dtype=torch.long))
        (output.sum() + content.sum()).backward()
        assert torch.isfinite(output).all() and torch.isfinite(content).all()
        assert torch.isfinite(hidden_states.grad).all()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
        for name, buffer in layer.named_buffers():
            assert torch.isfinite(buffer).all(), name


class TestBatchNorm:
    """The masked statistics are those that a stock BatchNorm takes of the real tokens alone."""

    @pytest.mark.parametrize("kind", ["none", "tail", "left", "holes", "empty row"])
    def test_running_statistics(self, make_config, kind):
        layer = random_layer(layer_config(make_config, lambda_norm="batch")).train()
        hidden_states = torch.randn(3, 7, 6, dtype=torch.float64)
        mask = random_mask(kind, 3, 7)
        expected = {}
        for name, projection in (("query_norm", layer.to_queries), ("value_norm", layer.to_values)):
            norm = getattr(layer, name)
            stock = nn.BatchNorm1d(norm.num_features, eps=norm.eps, momentum=norm.momentum).double()
            stock.load_state_dict(norm.state_dict())
            stock.train()(projection(hidden_states[mask.bool()]))
            expected |= {f"{name}.{buffer}": value for buffer, value in statistics_of(stock).items()}
        layer(hidden_states, mask)
        torch.testing.assert_close(statistics_of(layer), expected, rtol=1e-10, atol=1e-10)

    def test_all_padding_leaves_them(self, make_config):
        layer = random_layer(layer_config(make_config, lambda_norm="batch")).train()
        before = statistics_of(layer)
        layer(torch.randn(2, 5, 6, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.long))
        torch.testing.assert_close(statistics_of(layer), before, rtol=0, atol=0)

    def test_a_single_token_keeps_them_finite(self, make_config):
        layer = random_layer(layer_config(make_config, lambda_norm="batch")).train()
        output, _ = layer(torch.randn(2, 3, 6, dtype=torch.float64), torch.tensor([[0, 0, 0], [0, 1, 0]]))
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())

    def test_evaluation_leaves_them(self, make_config):
        layer = random_layer(layer_config(make_config, lambda_norm="batch")).eval()
        before = statistics_of(layer)
        layer(torch.randn(2, 5, 6, dtype=torch.float64), None)
        torch.testing.assert_close(statistics_of(layer), before, rtol=0, atol=0)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_updated_once_under_activation_checkpointing(self, make_config, use_reentrant):
        config = layer_config(make_config, lambda_norm="batch")
        plain, checkpointed = random_layer(config).train(), random_layer(config).train()
        hidden_states = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
        plain(hidden_states, None)[0].sum().backward()
        checkpoint(checkpointed, hidden_states, None, use_reentrant=use_reentrant)[0].sum().backward()
        torch.testing.assert_close(statistics_of(checkpointed), statistics_of(plain), rtol=1e-10, atol=1e-10)
        for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters()):
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


class TestInitialisation:
    @staticmethod
    def layers(make_config, count=64, **overrides):
        """As many freshly initialised lambda layers, through the model's own initialisation."""
        torch.manual_seed(0)
        config = make_config(
            hidden_size=256,
            intermediate_size=8,
            num_lambda_queries=4,
            num_hidden_layers=count,
            vocab_size=8,
            **overrides,
        )
        model = LambdaBertModel(config)
        return [block.attention.self for block in model.encoder.layer]

    @pytest.mark.parametrize("scope", [1, 5, 25, None])
    @pytest.mark.parametrize(
        "norm, key_depth, intra_depth",
        [
            *(("none", *depths) for depths in [(1, 1), (4, 1), (8, 4), (16, 4)]),
            *((norm, 8, 4) for norm in NORMS if norm != "none"),
        ],
    )
    def test_output_variance_is_about_one(self, make_config, norm, scope, key_depth, intra_depth):
        """Mean square of the output over many layers, for inputs of unit variance.

        The content lambda adds about K U / D + K U e / N to it, so the row is long and the model wide.
        """
        length = 512
        layers = self.layers(
            make_config,
            lambda_norm=norm,
            local_context_size=scope,
            key_depth=key_depth,
            intra_depth=intra_depth,
            max_position_embeddings=length,
        )
        with torch.no_grad():
            squares = [layer.train()(torch.randn(1, length, 256), None)[0].square().mean().item() for layer in layers]
            tables = [layer.relative_embeddings.square().sum().item() for layer in layers]
        assert 0.5 < sum(squares) / len(squares) < 2
        assert sum(tables) / len(tables) == pytest.approx(1, rel=0.15)

    @pytest.mark.parametrize("scope", [25, None])
    def test_table_decays_with_distance(self, make_config, scope):
        layers = self.layers(make_config, local_context_size=scope, key_depth=8, intra_depth=4)
        tables = torch.stack([layer.relative_embeddings.detach() for layer in layers])
        spread = tables.square().mean(dim=(0, 2, 3)).sqrt()
        middle = len(spread) // 2
        by_distance = [spread[middle].item()] + [
            (spread[middle - distance].item() + spread[middle + distance].item()) / 2 for distance in (2, 5, 12)
        ]
        assert all(near > far for near, far in zip(by_distance, by_distance[1:]))
        distances = (torch.arange(len(spread)) - middle).abs()
        torch.testing.assert_close(spread / spread[middle], 1 / (1 + distances), rtol=0.2, atol=0)
        torch.testing.assert_close(spread, spread.flip(0), rtol=0.15, atol=0)


def plain_normalise(norm, kind, channels, real):
    if kind == "none":
        return channels
    if kind == "layer":
        return F.layer_norm(channels, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if kind == "rms":
        return F.rms_norm(channels, norm.normalized_shape, norm.weight, norm.eps)
    if not norm.training:
        return (channels - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    tokens = channels[real].float()
    variance, mean = torch.var_mean(tokens, dim=0, correction=0)
    return (channels - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def plain_forward(layer, hidden_states, attention_mask=None):
    """The layer as anybody would write it first: one dense table [N, M, K, U] and einsums, in whatever precision."""
    config = layer.plain_config
    batch, length, _ = hidden_states.shape
    real = hidden_states.new_ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    gap = ~real[:, :, None]

    queries = plain_normalise(
        getattr(layer, "query_norm", None), config.lambda_norm, layer.to_queries(hidden_states), real
    )
    values = plain_normalise(
        getattr(layer, "value_norm", None), config.lambda_norm, layer.to_values(hidden_states), real
    )
    keys = layer.to_keys(hidden_states).masked_fill(gap, -1e4).softmax(dim=1).masked_fill(gap, 0)
    values = values.masked_fill(gap, 0)

    queries = queries.unflatten(-1, (config.num_lambda_queries, config.key_depth))
    keys = keys.unflatten(-1, (config.key_depth, config.intra_depth))
    values = values.unflatten(-1, (-1, config.intra_depth))

    places = torch.arange(length)
    offset = places[None, :] - places[:, None]
    table = layer.relative_embeddings
    reach = len(table) // 2
    dense = table[(offset + reach).clamp(0, len(table) - 1)].masked_fill((offset.abs() > reach)[:, :, None, None], 0)

    content = torch.einsum("bmku,bmvu->bkv", keys, values)
    position = torch.einsum("nmku,bmvu->bnkv", dense, values)
    output = torch.einsum("bnhk,bnkv->bnhv", queries, content[:, None] + position)
    return output.flatten(-2), content


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


class TestPrecision:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [5, None])
    def test_the_plain_path_is_the_definition(self, make_config, scope, norm):
        config = layer_config(make_config, local_context_size=scope, lambda_norm=norm)
        layer = random_layer(config).double()
        layer.plain_config = config
        hidden_states = torch.randn(3, 7, 6, dtype=torch.float64)
        mask = random_mask("holes", 3, 7)
        expected, expected_content = reference_output(layer, config, hidden_states, mask)
        output, content = plain_forward(layer, hidden_states, mask)
        torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(content, expected_content, rtol=1e-10, atol=1e-10)

    @staticmethod
    def wide_layer(make_config, scope, norm, dtype=torch.float32):
        config = make_config(
            hidden_size=48,
            num_lambda_queries=4,
            key_depth=8,
            intra_depth=2,
            local_context_size=scope,
            lambda_norm=norm,
            max_position_embeddings=1024,
        )
        torch.manual_seed(0)
        layer = LambdaBertModel(config).encoder.layer[0].attention.self.to(dtype)
        layer.plain_config = config
        return layer

    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("length", [63, 600])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [25, None])
    def test_error_at_most_twice_that_of_the_plain_path(self, make_config, scope, norm, length, precision):
        """float32 as it is, and autocast to the half precisions, of output, content lambda and gradients."""
        layer = self.wide_layer(make_config, scope, norm).train()
        hidden_states = torch.randn(2, length, 48)
        weights = torch.randn(2, length, 48)
        mask = random_mask("tail", 2, length)

        def measure(forward, module, inputs):
            inputs = inputs.clone().requires_grad_()
            module.zero_grad()
            autocast = inputs.dtype == torch.float32 and precision != "float32"
            with torch.autocast("cpu", dtype=getattr(torch, precision), enabled=autocast):
                output, content = forward(inputs, mask)
            (
                (output * weights).masked_fill(mask[:, :, None] == 0, 0).double().sum() + content.double().sum()
            ).backward()
            real = mask.bool()
            measured = {"output": output[real], "content": content, "inputs": inputs.grad[real]}
            return measured | {name: parameter.grad for name, parameter in module.named_parameters()}

        actual = measure(layer, layer, hidden_states)
        plain = measure(lambda *inputs: plain_forward(layer, *inputs), layer, hidden_states)
        exact_layer = self.wide_layer(make_config, scope, norm, torch.float64).train()
        exact_layer.load_state_dict(layer.state_dict())
        exact = measure(lambda *inputs: plain_forward(exact_layer, *inputs), exact_layer, hidden_states.double())
        for name, expected in exact.items():
            allowed = 2 * relative_error(plain[name], expected) + 1e-7
            assert relative_error(actual[name], expected) <= allowed, name

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scope", [25, None])
    def test_whole_model_in_bfloat16(self, make_config, monkeypatch, make_inputs, scope, norm):
        config = make_config(local_context_size=scope, lambda_norm=norm)
        torch.manual_seed(0)
        model = LambdaBertModel(config).eval()
        inputs = make_inputs(LambdaBertModel, config, batch=4, length=33)
        inputs["attention_mask"][1, 20:] = 0
        real = inputs["attention_mask"].bool()
        for block in model.encoder.layer:
            block.attention.self.plain_config = config
        with torch.no_grad():
            exact = model.double()(**inputs).last_hidden_state[real]
            actual = model.bfloat16()(**inputs).last_hidden_state
            monkeypatch.setattr(LambdaBertModel, "_may_pack", lambda *args, **kwargs: False)
            monkeypatch.setattr(LambdaLayer, "forward", lambda self, states, mask, _: plain_forward(self, states, mask))
            plain = model(**inputs).last_hidden_state
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual[real], exact) <= 2 * relative_error(plain[real], exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
    @pytest.mark.parametrize("scope", [25, None])
    def test_large_values_stay_finite(self, make_config, scope, norm, training, dtype):
        """Squares, exponentials and sums of values far within the half precisions' range would overflow in them."""
        layer = self.wide_layer(make_config, scope, norm).train(training)
        scale = 3000.0
        if norm == "batch":
            with torch.no_grad():
                for module in (layer.query_norm, layer.value_norm):
                    module.running_var.fill_(scale**2)
        hidden_states = (scale * torch.randn(2, 600, 48)).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            output, content = layer(hidden_states, random_mask("tail", 2, 600))
        output.float().sum().backward()
        assert torch.isfinite(output).all() and torch.isfinite(content).all()
        assert torch.isfinite(hidden_states.grad).all()
        assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scope", [25, None])
    def test_large_values_without_a_norm_stay_finite(self, make_config, scope, dtype):
        layer = self.wide_layer(make_config, scope, "none")
        hidden_states = 30 * torch.randn(2, 600, 48)
        with torch.autocast("cpu", dtype=dtype):
            output, content = layer(hidden_states, random_mask("tail", 2, 600))
        assert torch.isfinite(output).all() and torch.isfinite(content).all()


class TestBadInput:
    @pytest.mark.parametrize(
        "shape",
        [(2,), (7,), (2, 6), (2, 8), (1, 7), (3, 7), (2, 1, 7), (2, 7, 7), (2, 1, 1, 7), (2, 1, 7, 7)],
        ids=str,
    )
    def test_mask_of_another_shape(self, make_config, shape):
        layer = random_layer(layer_config(make_config))
        with pytest.raises(ValueError, match="attention_mask") as error:
            layer(torch.randn(2, 7, 6, dtype=torch.float64), torch.ones(shape))
        assert all(str(size) in str(error.value) for size in shape)

    @pytest.mark.parametrize("value", [-1e9, float("nan"), 0.5, 2])
    def test_mask_of_other_numbers(self, make_config, value):
        layer = random_layer(layer_config(make_config))
        mask = torch.ones(2, 7)
        mask[1, 3:] = value
        with pytest.raises(ValueError, match=re.escape(f"attention_mask holds {value:g}:")):
            layer(torch.randn(2, 7, 6, dtype=torch.float64), mask)

    def test_longer_than_the_global_table(self, make_config):
        layer = random_layer(layer_config(make_config, local_context_size=None, max_position_embeddings=8))
        with pytest.raises(ValueError, match="max_position_embeddings") as error:
            layer(torch.randn(1, 9, 6, dtype=torch.float64), None)
        assert "9" in str(error.value) and "8" in str(error.value)

    def test_longer_than_any_local_scope(self, make_config):
        layer = random_layer(layer_config(make_config, local_context_size=3, max_position_embeddings=8))
        output, _ = layer(torch.randn(1, 30, 6, dtype=torch.float64), None)
        assert output.shape == (1, 30, 6)


class TestWaysOfGpus:
    """What a GPU takes, taken on a CPU in float64: products of blocks, and means by a matrix."""

    SHAPES = [(6, 3, 4, 2), (8, 2, 3, 1), (5, 1, 1, 1)]

    @pytest.fixture(autouse=True)
    def take_them(self, monkeypatch):
        monkeypatch.setattr(lambda_layer, "prefers_blocks", lambda queries, is_global: not is_global)
        monkeypatch.setattr(repetitions_lambdabert, "prefers_matrix", lambda token_ids: True)

    @pytest.mark.parametrize("kind", [None, "tail", "left", "holes", "empty row"])
    @pytest.mark.parametrize("length", [1, 7, 8, 63])
    @pytest.mark.parametrize("scope", [1, 3, 25])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_definition(self, make_config, shape, scope, length, kind):
        config = layer_config(make_config, shape, local_context_size=scope, content_gain=True)
        layer = random_layer(config)
        hidden_states = torch.randn(3, length, shape[0], dtype=torch.float64)
        mask = None if kind is None else random_mask(kind, 3, length)
        assert_agrees_with_reference(layer, config, hidden_states, mask)

    @pytest.mark.parametrize("kind", [None, "tail", "holes", "empty row"])
    @pytest.mark.parametrize("length", [1, 9, 40])
    @pytest.mark.parametrize("width", [1, 5])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("scope", [3, None])
    def test_repetitions(self, make_config, scope, shape, width, length, kind):
        fields = dict(local_context_size=scope, repetition_context_size=width, mask_token_id=4)
        config = layer_config(make_config, shape, **fields)
        layer = random_layer(config)
        hidden_states = torch.randn(3, length, shape[0], dtype=torch.float64)
        tokens = torch.randint(-1, 4, (3, length))
        mask = None if kind is None else random_mask(kind, 3, length)
        assert_agrees_with_reference(layer, config, hidden_states, mask, tokens)

    @pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
    def test_what_stands_at_padding_does_not_matter(self, make_config, garbage):
        config = layer_config(make_config, local_context_size=5)
        layer = random_layer(config)
        hidden_states, mask = torch.randn(3, 21, 6, dtype=torch.float64), random_mask("tail", 3, 21)
        expected, _ = layer(hidden_states, mask)
        output, _ = layer(hidden_states.masked_fill(mask[..., None] == 0, garbage), mask)
        torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=0, atol=0)

    def test_a_compiled_graph_serves_other_lengths(self, make_config):
        layer = random_layer(layer_config(make_config, local_context_size=5))
        compiled = torch.compile(layer, backend="eager", dynamic=True)
        for length in (9, 16, 23):
            hidden_states = torch.randn(3, length, 6, dtype=torch.float64)
            torch.testing.assert_close(compiled(hidden_states), layer(hidden_states), rtol=1e-10, atol=1e-10)

    def test_each_precision_has_a_matrix_of_its_own(self):
        repetitions = Repetitions(torch.tensor([[7, 8, 7]]), None)
        given = torch.randn(1, 3, 2, dtype=torch.float64)
        repetitions.mean_of_others(given.float())
        assert torch.equal(repetitions.mean_of_others(given)[:, [0, 2]], given[:, [2, 0]])

    def test_gradients_are_those_of_the_formulas(self, make_config, monkeypatch):
        fields = dict(local_context_size=5, repetition_context_size=3, mask_token_id=4, content_gain=True)
        layer = random_layer(layer_config(make_config, **fields))
        tokens, mask = torch.randint(-1, 4, (3, 21)), random_mask("holes", 3, 21)
        hidden_states = torch.randn(3, 21, 6, dtype=torch.float64, requires_grad=True)
        wanted = [hidden_states, *layer.parameters()]

        def gradients():
            output, _ = layer(hidden_states, layout=Padded(mask.bool(), tokens))
            return torch.autograd.grad(output[mask.bool()].square().sum(), wanted)

        found = gradients()
        monkeypatch.undo()
        for gradient, expected in zip(found, gradients(), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_a_cpu_takes_neither_way_of_gpus():
    assert not lambda_kernels.prefers_blocks(torch.zeros(1, 8, 4, 8), is_global=False)
    assert not repetitions_lambdabert.prefers_matrix(torch.zeros(1, 8, dtype=torch.long))


def test_a_gpu_takes_them_as_long_as_they_are_small():
    """Matrices that grow with the square of a size would fill its memory."""

    def on_gpu(*shape):
        return SimpleNamespace(device=torch.device("cuda"), shape=torch.Size(shape))

    assert lambda_kernels.prefers_blocks(on_gpu(8, 512, 12, 16), is_global=False)
    assert not lambda_kernels.prefers_blocks(on_gpu(8, 512, 12, 16), is_global=True)
    assert not lambda_kernels.prefers_blocks(on_gpu(8, 512, 12, 64), is_global=False)
    assert repetitions_lambdabert.prefers_matrix(on_gpu(64, 512))
    assert not repetitions_lambdabert.prefers_matrix(on_gpu(1, 2**17))
    assert not repetitions_lambdabert.prefers_matrix(on_gpu(2**12, 2048))


@pytest.mark.parametrize("module", [lambda_kernels, repetitions_lambdabert])
@pytest.mark.parametrize("how", ["exported", "traced"])
def test_a_program_that_is_written_on_a_gpu_takes_neither(module, how, monkeypatch):
    """It serves other lengths, and other devices."""
    given = SimpleNamespace(device=torch.device("cuda"), shape=torch.Size((8, 512, 12, 16)))
    ids = SimpleNamespace(device=torch.device("cuda"), shape=torch.Size((64, 512)))
    monkeypatch.setattr(module, "is_exporting", lambda: how == "exported")
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: how == "traced")
    if module is lambda_kernels:
        assert not lambda_kernels.prefers_blocks(given, is_global=False)
    else:
        assert not repetitions_lambdabert.prefers_matrix(ids)
