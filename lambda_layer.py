"""The lambda layer on a 1-D sequence, in place of BERT's self-attention.

Source: I. Bello, "LambdaNetworks: Modeling Long-Range Interactions without Attention", ICLR 2021, arXiv 2102.08602,
section 3 (the layer), table 2 (normalisation) and the appendix on intra-depth. The paper's context is an image; here
it is the sequence itself, seen in both directions.

Axes, in shapes (capitals) and einops patterns (lower case):

    B batch             N queries' positions     M context positions (= N)    D hidden_size
    H num_lambda_queries    K key_depth          V value depth, D / H         U intra_depth
    R relative offsets: local_context_size, or 2 max_position_embeddings - 1 for a global scope

The layer turns its context into one small linear map per position, the lambda, and applies it to H queries:

    content lambda     lc     = sum_m sum_u softmax_m(K)[m,:,u] (x) V[m,:,u]     [B, K, V]     one per sequence
    position lambda    lp[n]  = sum_m sum_u E[m - n,:,u] (x) V[m,:,u]            [B, N, K, V]
    output             y[n,h] = (lc + lp[n])^T Q[n,h]                            [B, N, H, V] -> [B, N, D]
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

LOCAL_BLOCK = 8  # query positions per dense product; fastest of 2 to 32 on CPU for R = 25
DIRECT_LENGTH = 64  # tokens up to which the direct global product is faster than the FFT on CPU
TILE = 256  # query positions whose lambdas fill a processor core's cache
OFF_STRIDE = 16  # numbers between rows to be transposed: strides of 2^i compete for few places in a cache
FFT_TILE = 2**18  # numbers in the lambdas of one FFT; more of them leave the cache
FFT_DEPTHS = 8  # value depths in one FFT at least: fewer fill no line of a cache where the lambdas are written


def serves_every_size() -> bool:
    """Whether a program is being made, by export or tracing, that has to serve batches and lengths not seen yet.

    Such a program holds one path, made of real-valued operators that every runtime has.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def as_a_whole(values: torch.Tensor) -> bool:
    """Whether a sequence is computed at once; inference on a CPU computes tile by tile what then stays in its cache."""
    is_one_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() or is_one_graph or values.device.type != "cpu"


def content_lambda(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Content lambda (section 3.1): what the sequence holds, whatever the position.

    Args:
        keys: [B, M, K, U], each channel a distribution over M.
        values: [B, M, V, U], zero at padding.

    Returns:
        [B, K, V]
    """
    return rearrange(keys, "b m k u -> b k (m u)") @ rearrange(values, "b m v u -> b (m u) v")


def local_position_lambda(context: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a local scope (the paper's lambda convolution), in O(N).

    The positions are cut into blocks of T. The T lambdas of a block are one dense product of a Toeplitz matrix, which
    repeats E along its diagonals, with the S = T + R - 1 values in sight of the block.

    Args:
        context: values [B, N + R - 1, V, U] of the N positions and of R // 2 more on either side; zero at padding and
            beyond the sequence. Fastest where V is the last axis in memory.
        relative_embeddings: E, [R, K, U]; index r is the offset m - n = r - R // 2.

    Returns:
        [B, N, K, V]
    """
    scope, _, intra_depth = relative_embeddings.shape
    length, value_depth = context.shape[1] - scope + 1, context.shape[2]
    in_sight = LOCAL_BLOCK + scope - 1
    rows = rearrange(context, "b m v u -> b (m u) v")
    rows = F.pad(rows, (0, 0, 0, -length % LOCAL_BLOCK * intra_depth)) if length % LOCAL_BLOCK else rows
    # of a single sequence, the overlapping windows are a view
    windows = rows.flatten(1).unfold(1, in_sight * intra_depth * value_depth, LOCAL_BLOCK * intra_depth * value_depth)
    blocks = windows.shape[1]
    windows = rearrange(windows, "b g (s v) -> (b g) s v", v=value_depth)
    # row t holds E from column t on, and zeros elsewhere
    toeplitz = F.pad(relative_embeddings, (0, 0, 0, 0, LOCAL_BLOCK - 1, LOCAL_BLOCK - 1)).unfold(0, in_sight, 1).flip(0)
    toeplitz = rearrange(toeplitz, "t k u s -> (t k) (s u)")
    lambdas = torch.bmm(toeplitz.expand(len(windows), -1, -1), windows)
    return rearrange(lambdas, "(b g) (t k) v -> b (g t) k v", g=blocks, t=LOCAL_BLOCK)[:, :length]


def convolved_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a local scope as the paper writes it, a convolution over N with U input and K output channels.

    Slower than `local_position_lambda`.

    Args:
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [R, K, U]; index r is the offset m - n = r - R // 2.

    Returns:
        [B, N, K, V]
    """
    folded = rearrange(values, "b n v u -> (b v) u n")
    kernel = rearrange(relative_embeddings, "r k u -> k u r")
    lambdas = F.conv1d(folded, kernel, padding=relative_embeddings.shape[0] // 2)
    return rearrange(lambdas, "(b v) k n -> b n k v", v=values.shape[2])


def direct_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a global scope as one product with the whole Toeplitz matrix, in O(N^2).

    Args:
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [2P - 1, K, U] with P >= N; index P - 1 is the offset m - n = 0.

    Returns:
        [B, N, K, V]
    """
    positions = torch.arange(values.shape[1], device=values.device)
    offsets = rearrange(positions, "m -> 1 m") - rearrange(positions, "n -> n 1")
    toeplitz = relative_embeddings[offsets + relative_embeddings.shape[0] // 2]
    lambdas = rearrange(toeplitz, "n m k u -> (n k) (m u)") @ rearrange(values, "b m v u -> b (m u) v")
    return rearrange(lambdas, "b (n k) v -> b n k v", n=values.shape[1])


def fft_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a global scope as a convolution by FFT, in O(N log N).

    With offsets counted as n - m instead of m - n, the sum over m is a convolution. Only its middle N places are
    wanted, so a period of 2N - 1 or more keeps what wraps around off them. Half precision is computed in float32.

    Args:
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [2P - 1, K, U] with P >= N; index P - 1 is the offset m - n = 0.

    Returns:
        [B, N, K, V]
    """
    batch, length, value_depth, intra_depth = values.shape
    key_depth = relative_embeddings.shape[1]
    if batch == 0:  # an FFT of nothing fails; any product has the shape and the graph that are wanted
        return torch.einsum("bnvu,rku->bnkv", values, relative_embeddings[:1])
    at_least_float32 = torch.promote_types(values.dtype, torch.float32)
    centre = relative_embeddings.shape[0] // 2
    reversed_offsets = relative_embeddings[centre - length + 1 : centre + length].flip(0)
    period = 2 * (length + -length % 64)  # a multiple of 128 has small prime factors
    depths = value_depth if as_a_whole(values) else max(FFT_DEPTHS, FFT_TILE // (batch * length * key_depth))
    lambdas = reversed_offsets.new_empty(batch, length, key_depth, value_depth, dtype=at_least_float32)
    with torch.autocast(values.device.type, enabled=False):
        kernel = torch.fft.rfft(reversed_offsets.to(at_least_float32), n=period, dim=0)
        kernel = rearrange(kernel, "f k u -> u k 1 f").contiguous()
        for depth in range(0, value_depth, depths):
            some = slice(depth, depth + depths)
            signal = rearrange(values[:, :, some].to(at_least_float32), "b m v u -> b u v m")
            signal = F.pad(signal, (0, period - length + OFF_STRIDE))[..., :period]
            signal = torch.fft.rfft(rearrange(signal, "b u v m -> b m v u"), dim=1)
            signal = rearrange(signal, "b f v u -> u b 1 v f")
            # added to zero, because torch 2.13 compiles a plain complex product with a wrong gradient
            product = torch.addcmul(signal.new_zeros(()), kernel[0], signal[0])
            for u in range(1, intra_depth):
                product.addcmul_(kernel[u], signal[u])
            convolution = torch.fft.irfft(product, n=period)[..., length - 1 : 2 * length - 1]
            convolution = F.pad(convolution, (0, OFF_STRIDE))[..., :length]
            lambdas[..., some] = rearrange(convolution, "b k v n -> b n k v")
    return lambdas.to(values.dtype)


def apply_lambdas(queries: torch.Tensor, content: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Outputs [B, N, H, V] of queries [B, N, H, K] for lambdas [B, K, V] and [B, N, K, V]."""
    return queries @ (rearrange(content, "b k v -> b 1 k v") + position)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of [B, N, C] over B and N whose statistics see real tokens only.

    A batch without a real token leaves the running statistics as they are, and so does the second forward pass that
    activation checkpointing makes within a backward pass.
    """

    def forward(self, inputs: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Normalises `inputs` [B, N, C]; `token_mask` is bool [B, N], True = token, or None where all are."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return inputs * scale + (self.bias - self.running_mean * scale)

        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if token_mask is None:
            token_mask = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
        padding = ~token_mask[..., None]
        count = token_mask.sum()
        mean = inputs.masked_fill(padding, 0).sum((0, 1)) / count.clamp(min=1)
        deviations = (inputs - mean).masked_fill(padding, 0)
        squares = deviations.square().sum((0, 1))
        variance = squares / count.clamp(min=1)

        # the id of the running backward pass is -1 outside of one
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            with torch.no_grad():
                momentum = self.momentum * (count > 0).to(mean.dtype)
                unbiased_variance = squares / (count - 1).clamp(min=1)
                self.running_mean += (momentum * (mean - self.running_mean)).to(self.running_mean.dtype)
                self.running_var += (momentum * (unbiased_variance - self.running_var)).to(self.running_var.dtype)
                self.num_batches_tracked += count > 0
        return deviations * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def _make_projection(in_features: int, out_features: int) -> nn.Linear:
    projection = nn.Linear(in_features, out_features, bias=False)
    projection.init_std = in_features**-0.5  # inputs of unit variance give outputs of unit variance
    return projection


def _make_norm(lambda_norm: str, channels: int, eps: float) -> nn.Module:
    if lambda_norm == "batch":
        return MaskedBatchNorm(channels)
    if lambda_norm == "layer":
        return nn.LayerNorm(channels, eps=eps)
    if lambda_norm == "rms":
        return nn.RMSNorm(channels, eps=eps)
    return nn.Identity()


def _normalise(norm: nn.Module, inputs: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    normalised = norm(inputs, token_mask) if isinstance(norm, MaskedBatchNorm) else norm(inputs)
    return normalised.to(inputs.dtype)  # autocast normalises in float32


def as_token_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """The mask as bool [B, N], True = token.

    Raises:
        ValueError: the mask is not [B, N], or holds something other than 0 and 1. Its entries are not looked at in a
            compiled, exported or traced program, which would wait for them on an accelerator.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: a lambda layer has no weights between pairs of "
            "positions and cannot honour a query axis; give [batch, length] with 1 = token and 0 = padding."
        )
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the inputs are [{batch}, {length}]: "
            "give one entry per token."
        )
    has_entries = not (torch.compiler.is_compiling() or torch.jit.is_tracing() or attention_mask.is_meta)
    if has_entries and attention_mask.dtype != torch.bool:
        others = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(others):
            raise ValueError(
                f"attention_mask holds {others[0].item():g}: give 1 or True for tokens, 0 or False for padding. (In a "
                "mask that is added to attention scores, 0 is a token: give `mask == 0` in its place.)"
            )
    return attention_mask.bool()


class LambdaLayer(nn.Module):
    """Lambda layer with content and position lambdas (section 3; multi-query, appendix: intra-depth).

    Parameters: D (H K + K U + V U) for the three projections, which have no bias (a key's would vanish in the
    softmax), R K U for E, and those of `query_norm` over H K and `value_norm` over V U channels.

    Args:
        config: a `LambdaBertConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.num_queries = config.num_lambda_queries
        self.key_depth = config.key_depth
        self.intra_depth = config.intra_depth
        self.is_global = config.local_context_size is None
        self.max_length = config.max_position_embeddings if self.is_global else None
        offsets = 2 * config.max_position_embeddings - 1 if self.is_global else config.local_context_size

        query_channels = config.num_lambda_queries * config.key_depth
        value_channels = config.hidden_size // config.num_lambda_queries * config.intra_depth
        self.to_queries = _make_projection(config.hidden_size, query_channels)
        self.to_keys = _make_projection(config.hidden_size, config.key_depth * config.intra_depth)
        self.to_values = _make_projection(config.hidden_size, value_channels)
        self.query_norm = _make_norm(config.lambda_norm, query_channels, config.layer_norm_eps)
        self.value_norm = _make_norm(config.lambda_norm, value_channels, config.layer_norm_eps)
        self.relative_embeddings = nn.Parameter(torch.empty(offsets, config.key_depth, config.intra_depth))
        self.reset_parameters()

    def reset_parameters(self):
        """Draws weights such that inputs of unit variance give queries, values and outputs of about unit variance.

        E decays with distance, std[o] = c / (1 + |o|), with c such that the sum over offsets of K U std^2 is 1: a
        table that starts flat drowns each token in the average of its context.
        """
        for projection in (self.to_queries, self.to_keys, self.to_values):
            init.normal_(projection.weight, std=projection.init_std)
        offsets, depth, intra = self.relative_embeddings.shape
        distances = torch.arange(offsets, device=self.relative_embeddings.device) - offsets // 2
        std = 1 / (1 + distances.abs()).to(self.relative_embeddings.dtype)
        std = std / (depth * intra * std.square().sum()).sqrt()
        init.copy_(self.relative_embeddings, torch.randn_like(self.relative_embeddings) * std[:, None, None])

    @property
    def reach(self) -> int:
        """Places on either side of the sequence that `position_lambda` takes with it: R // 2, or none."""
        return 0 if self.is_global or serves_every_size() else self.relative_embeddings.shape[0] // 2

    def position_lambda(self, context: torch.Tensor) -> torch.Tensor:
        """Position lambda [B, N, K, V] of values [B, N + 2 reach, V, U]."""
        if not self.is_global:
            local = convolved_position_lambda if serves_every_size() else local_position_lambda
            return local(context, self.relative_embeddings)
        if serves_every_size() or (not torch.compiler.is_compiling() and context.shape[1] <= DIRECT_LENGTH):
            return direct_position_lambda(context, self.relative_embeddings)
        return fft_position_lambda(context, self.relative_embeddings)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, packing=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies the layer.

        Args:
            hidden_states: [B, N, D]; or the real tokens alone, [1, T, D], with `packing`.
            attention_mask: [B, N], 1 = token, 0 = padding; None = all are tokens.
            packing: the `unpadding.Packing` of packed tokens, in place of the mask.

        Returns:
            The output, shaped as `hidden_states`, and the content lambda [B, K, V].

        Raises:
            ValueError: the mask is not [B, N] or holds something other than 0 and 1; N is 0 or exceeds the offset table
                of a global scope.
        """
        token_mask = as_token_mask(attention_mask, *hidden_states.shape[:2])
        projected = (
            _normalise(self.query_norm, self.to_queries(hidden_states), token_mask),
            self.to_keys(hidden_states),
            _normalise(self.value_norm, self.to_values(hidden_states), token_mask),
        )
        if packing is None:
            return self.mix(*projected, token_mask)
        outputs, contents = [], []
        for group in packing.groups:
            output, content = self.mix(*map(group.pad, projected), group.mask)
            outputs.append(group.unpad(output))
            contents.append(content)
        return torch.cat(outputs)[None], packing.unpack_rows(torch.cat(contents))

    def mix(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, token_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, D] and content lambda [B, K, V] of what was projected.

        Args:
            queries: [B, N, H K]
            keys: [B, N, K U]
            values: [B, N, V U]
            token_mask: bool [B, N], True = token; None = all are.
        """
        batch, length, _ = queries.shape
        if length == 0:
            raise ValueError("The sequence has 0 tokens: give one or more.")
        if self.is_global and length > self.max_length:
            raise ValueError(
                f"The sequence has {length} tokens, but max_position_embeddings={self.max_length} bounds the global "
                "scope: shorten the input, raise max_position_embeddings or set local_context_size."
            )
        softmax_dtype = torch.promote_types(keys.dtype, torch.float32)
        if token_mask is not None:
            padding = ~token_mask[..., None]
            # the lowest number rather than -inf: a row without a real token stays finite
            keys = keys.to(softmax_dtype).masked_fill(padding, torch.finfo(softmax_dtype).min)
            values = values.masked_fill(padding, 0)
        keys = keys.softmax(dim=1, dtype=softmax_dtype).to(values.dtype)

        queries = rearrange(queries, "b n (h k) -> b n h k", h=self.num_queries)
        keys = rearrange(keys, "b m (k u) -> b m k u", u=self.intra_depth)
        # in memory, V comes last: what is summed over, m and u, then has one stride
        context = F.pad(
            rearrange(values, "b m (v u) -> b m u v", u=self.intra_depth), (0, 0, 0, 0, self.reach, self.reach)
        )
        context = rearrange(context.contiguous(), "b m u v -> b m v u")
        content = content_lambda(keys, context[:, self.reach : self.reach + length])
        if as_a_whole(values):
            outputs = apply_lambdas(queries, content, self.position_lambda(context))
        else:
            outputs = self._tiled_outputs(queries, content, context)
        return rearrange(outputs, "b n h v -> b n (h v)"), content

    def _tiled_outputs(self, queries: torch.Tensor, content: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        batch, length = queries.shape[:2]
        outputs = queries.new_empty(*queries.shape[:3], content.shape[-1])
        rows = max(1, (FFT_TILE // content.shape[1:].numel() if self.is_global else TILE) // length)
        for row in range(0, batch, rows):
            some = slice(row, row + rows)
            position = self.position_lambda(context[some]) if self.is_global else None
            for place in range(0, length, TILE):
                here = slice(place, place + TILE)
                if self.is_global:
                    tile = position[:, here]
                else:
                    tile = self.position_lambda(context[some, place : place + TILE + 2 * self.reach])
                outputs[some, here] = apply_lambdas(queries[some, here], content[some], tile)
        return outputs
