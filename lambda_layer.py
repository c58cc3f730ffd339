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
from einops import einsum, rearrange
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

LOCAL_BLOCK = 16  # query positions per dense product; fastest of 8 to 64 on CPU for R = 25 and 63
DIRECT_LENGTH = 64  # tokens up to which the direct global product is faster than the FFT on CPU


def content_lambda(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Content lambda (section 3.1): what the sequence holds, whatever the position.

    Args:
        keys: [B, M, K, U], each channel a distribution over M.
        values: [B, M, V, U], zero at padding.

    Returns:
        [B, K, V]
    """
    return einsum(keys, values, "b m k u, b m v u -> b k v")


def local_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a local scope (the paper's lambda convolution), in O(N).

    The positions are cut into blocks of T. The T lambdas of a block are one dense product of a Toeplitz matrix, which
    repeats E along its diagonals, with the S = T + R - 1 values in sight of the block.

    Args:
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [R, K, U]; index r is the offset m - n = r - R // 2.

    Returns:
        [B, N, K, V]
    """
    length, scope = values.shape[1], relative_embeddings.shape[0]
    in_sight = LOCAL_BLOCK + scope - 1
    padded = F.pad(values, (0, 0, 0, 0, scope // 2, scope // 2 + -length % LOCAL_BLOCK))
    windows = padded.unfold(1, in_sight, LOCAL_BLOCK)
    # row t holds E from column t on, and zeros elsewhere
    toeplitz = F.pad(relative_embeddings, (0, 0, 0, 0, LOCAL_BLOCK - 1, LOCAL_BLOCK - 1)).unfold(0, in_sight, 1).flip(0)
    lambdas = rearrange(toeplitz, "t k u s -> (t k) (s u)") @ rearrange(windows, "b g v u s -> b g (s u) v")
    return rearrange(lambdas, "b g (t k) v -> b (g t) k v", t=LOCAL_BLOCK)[:, :length]


def convolved_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a local scope as the paper writes it, a convolution over N with U input and K output channels.

    Slower than `local_position_lambda`, with the same arguments and result.
    """
    folded = rearrange(values, "b n v u -> (b v) u n")
    kernel = rearrange(relative_embeddings, "r k u -> k u r")
    lambdas = F.conv1d(folded, kernel, padding=relative_embeddings.shape[0] // 2)
    return rearrange(lambdas, "(b v) k n -> b n k v", b=values.shape[0])


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
    length, dtype = values.shape[1], values.dtype
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    centre = relative_embeddings.shape[0] // 2
    reversed_offsets = relative_embeddings[centre - length + 1 : centre + length].flip(0)
    # a multiple of 128 has small prime factors; export cannot reason about the remainder
    period = 2 * length if torch.compiler.is_exporting() else 2 * (length + -length % 64)
    with torch.autocast(values.device.type, enabled=False):
        kernel = torch.fft.rfft(reversed_offsets.to(at_least_float32), n=period, dim=0)
        signal = torch.fft.rfft(values.to(at_least_float32), n=period, dim=1)
        product = kernel @ rearrange(signal, "b f v u -> b f u v")
        lambdas = torch.fft.irfft(product, n=period, dim=1)[:, length - 1 : 2 * length - 1]
    return lambdas.to(dtype)


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


def _token_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """The mask as bool [B, N], True = token."""
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

    def position_lambda(self, values: torch.Tensor) -> torch.Tensor:
        """Position lambda [B, N, K, V] of values [B, N, V, U] that are zero at padding."""
        # an exported program serves every length, so it holds no path that suits only some
        exporting = torch.compiler.is_exporting()
        if not self.is_global:
            local = convolved_position_lambda if exporting else local_position_lambda
            return local(values, self.relative_embeddings)
        if not exporting and not torch.compiler.is_compiling() and values.shape[1] <= DIRECT_LENGTH:
            return direct_position_lambda(values, self.relative_embeddings)
        return fft_position_lambda(values, self.relative_embeddings)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies the layer.

        Args:
            hidden_states: [B, N, D]
            attention_mask: [B, N], 1 = token, 0 = padding; None = all are tokens.

        Returns:
            The output [B, N, D] and the content lambda [B, K, V].

        Raises:
            ValueError: the mask is not [B, N], or N exceeds the offset table of a global scope.
        """
        batch, length, _ = hidden_states.shape
        if self.is_global and length > self.max_length:
            raise ValueError(
                f"The sequence has {length} tokens, but max_position_embeddings={self.max_length} bounds the global "
                "scope: shorten the input, raise max_position_embeddings or set local_context_size."
            )
        token_mask = _token_mask(attention_mask, batch, length)

        queries = _normalise(self.query_norm, self.to_queries(hidden_states), token_mask)
        keys = self.to_keys(hidden_states)
        values = _normalise(self.value_norm, self.to_values(hidden_states), token_mask)
        softmax_dtype = torch.promote_types(keys.dtype, torch.float32)
        if token_mask is not None:
            padding = ~token_mask[..., None]
            # the lowest number rather than -inf: a row without a real token stays finite
            keys = keys.to(softmax_dtype).masked_fill(padding, torch.finfo(softmax_dtype).min)
            values = values.masked_fill(padding, 0)
        keys = keys.softmax(dim=1, dtype=softmax_dtype).to(values.dtype)

        queries = rearrange(queries, "b n (h k) -> b n h k", h=self.num_queries)
        keys = rearrange(keys, "b m (k u) -> b m k u", u=self.intra_depth)
        values = rearrange(values, "b m (v u) -> b m v u", u=self.intra_depth)
        content = content_lambda(keys, values)
        lambdas = rearrange(content, "b k v -> b 1 k v") + self.position_lambda(values)
        output = einsum(queries, lambdas, "b n h k, b n k v -> b n h v")
        return rearrange(output, "b n h v -> b n (h v)"), content
