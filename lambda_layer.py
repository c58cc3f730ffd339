"""The lambda layer on a 1-D sequence, in place of BERT's self-attention.

Source: I. Bello, "LambdaNetworks: Modeling Long-Range Interactions without Attention", ICLR 2021, arXiv 2102.08602,
section 3 (the layer), table 2 (normalisation) and the appendix on intra-depth. The paper's context is an image; here
it is the sequence itself, seen in both directions.

Axes, in shapes (capitals) and einops patterns (lower case):

    B batch    N query positions    M context positions (= N)    D hidden_size    P max_position_embeddings
    H num_lambda_queries    K key_depth    V value depth, D / H    U intra_depth
    R relative offsets: local_context_size, or 2P - 1 for a global scope    R' repetition_context_size

The layer turns its context into one small linear map per position, the lambda, and applies it to H queries:

    content lambda     lc     = sum_m sum_u softmax_m(K)[m,:,u] (x) V[m,:,u]     [B, K, V]     one per sequence
    position lambda    lp[n]  = sum_m sum_u E[m - n,:,u] (x) V[m,:,u]            [B, N, K, V]
    output             y[n,h] = (lc + lp[n])^T Q[n,h]                            [B, N, H, V] -> [B, N, D]

Beyond the paper, the content lambda may have a learned gain g, which starts at 0:

    content lambda     lc     = g (.) sum_m sum_u softmax_m(K)[m,:,u] (x) V[m,:,u]       g: [K]

In a new layer the keys are nearly uniform, so that every row of the content lambda is the same mean value, whatever the
text. What it adds grows about as sqrt(K), drowns out the position lambda and says nothing about the text
(docs/ablations.md). With a gain that starts at 0, it contributes only as far as it helps.

There may also be a third lambda, again beyond the paper, of what surrounds the other occurrences of a token,
O(n) = {m != n: token m is the same as token n}; o is an offset from such an occurrence:

    repetition lambda  lr[n]  = mean over m in O(n) of sum_o sum_u T[o,:,u] (x) V[m + o,:,u]       T: [R', K, U]
    output             y[n,h] = (lc + lp[n] + lr[n])^T Q[n,h]

This is a content lambda whose values include their surroundings and whose key channels are the vocabulary: the channel
of a token is uniform over its occurrences, and a query reads the channel of its own token. T starts at 0.
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.import_utils import is_tracing

try:  # the flat form serves this repository, the relative one a saved model's folder
    from .configuration_lambdabert import LambdaBertConfig
    from .lambda_kernels import block_outputs, fastest_outputs, prefers_blocks
    from .packing_lambdabert import Packing, Padded
    from .repetitions_lambdabert import Repetitions
except ImportError:
    if __package__:
        raise
    from configuration_lambdabert import LambdaBertConfig
    from lambda_kernels import block_outputs, fastest_outputs, prefers_blocks
    from packing_lambdabert import Packing, Padded
    from repetitions_lambdabert import Repetitions


def content_lambda(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Content lambda (section 3.1): what the sequence holds, whatever the position.

    Args:
        keys: [B, M, K, U], each channel a distribution over M.
        values: [B, M, V, U], zero at padding.

    Returns:
        [B, K, V]
    """
    return rearrange(keys, "b m k u -> b k (m u)") @ rearrange(values, "b m v u -> b (m u) v")


def local_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a local scope (section 3.4): the lambda convolution, over N and the same for every v.

    It has U input and K output channels, and E is its kernel.

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


def global_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a global scope (section 3.3): a product with the Toeplitz matrix E[m - n], in O(N^2).

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
    return rearrange(lambdas, "b (n k) v -> b n k v", k=relative_embeddings.shape[1])


def values_elsewhere(values: torch.Tensor, width: int, repetitions: Repetitions) -> torch.Tensor:
    """The mean values around the other occurrences of each place's token.

    Args:
        values: [B, N, V, U], zero at padding.
        width: R'; index r is the offset r - R' // 2 from an occurrence.
        repetitions: which of the B N tokens are the same.

    Returns:
        [B, N, R' U, V], zero where a token occurs once.
    """
    length = values.shape[1]
    padded = F.pad(values, (0, 0, 0, 0, width // 2, width // 2))
    around = torch.stack([padded[:, r : r + length] for r in range(width)], dim=2)
    return repetitions.mean_of_others(rearrange(around, "b m r v u -> b m (r u) v"))


def repetition_outputs(
    queries: torch.Tensor, elsewhere: torch.Tensor, repetition_embeddings: torch.Tensor
) -> torch.Tensor:
    """What the repetition lambda adds to the outputs, lr^T Q: T^T Q times the mean values at each offset.

    In this order the lambda [B, N, K, V] itself is never made.

    Args:
        queries: [B, N, H, K]
        elsewhere: `values_elsewhere`, [B, N, R' U, V].
        repetition_embeddings: T, [R', K, U].

    Returns:
        [B, N, H, V]
    """
    return queries @ rearrange(repetition_embeddings, "r k u -> k (r u)") @ elsewhere


def apply_lambdas(queries: torch.Tensor, content: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Outputs [B, N, H, V] of queries [B, N, H, K] under the lambdas [B, K, V] and [B, N, K, V] (section 3.1)."""
    return queries @ (rearrange(content, "b k v -> b 1 k v") + position)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of [B, N, C] over B and N whose statistics see real tokens only.

    A batch without a real token leaves the running statistics as they are, and so does the second forward pass that
    activation checkpointing makes within a backward pass.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float | None

    def forward(  # type: ignore[override]
        self, inputs: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
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
                # None is torch's way of asking for the mean over all batches
                momentum = 1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
                momentum = momentum * (count > 0).to(mean.dtype)
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
        return MaskedBatchNorm(channels)  # with torch's eps: BERT's, 1e-12, is meant for layer norm
    if lambda_norm == "layer":
        return nn.LayerNorm(channels, eps=eps)
    if lambda_norm == "rms":
        return nn.RMSNorm(channels, eps=eps)
    return nn.Identity()


def _normalise(norm: nn.Module, inputs: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    normalised = norm(inputs, token_mask) if isinstance(norm, MaskedBatchNorm) else norm(inputs)
    return normalised.to(inputs.dtype)  # autocast and MaskedBatchNorm normalise in float32


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether Python may branch on a tensor's values: not in a program that is compiled, exported, traced or captured,
    which must work for others too, not on the meta device, where there are none, and not within `torch.func.vmap`."""
    return not is_tracing(tensor) and not tensor.is_meta and not torch._C._functorch.is_batchedtensor(tensor)


def as_token_mask(attention_mask: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor | None:
    """The mask of inputs [B, N, ...] as bool [B, N], True = token, on their device.

    Raises:
        ValueError: the mask is not [B, N], or holds something other than 0 and 1. Its values are checked in eager mode
            only.
    """
    if attention_mask is None:
        return None
    batch, length = inputs.shape[:2]
    if attention_mask.dim() > 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: a lambda layer has no weights between pairs of "
            "positions and cannot honour a query axis; give [batch, length] with 1 = token and 0 = padding."
        )
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the inputs are [{batch}, {length}]: "
            "give one entry per token."
        )
    if attention_mask.dtype != torch.bool and can_read_values(attention_mask):
        others = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(others):
            raise ValueError(
                f"attention_mask holds {others[0].item():g}: give 1 or True for tokens, 0 or False for padding. (In a "
                "mask that is added to attention scores, 0 is a token: give `mask == 0` in its place.)"
            )
    return attention_mask.bool().to(inputs.device)


class LambdaLayer(nn.Module):
    """Lambda layer with content and position lambdas (section 3; section 3.2: multi-query; appendix: intra-depth).

    Parameters: D (H K + K U + V U) for the three projections, which have no bias (a key's would vanish in the
    softmax), R K U for E, those of `query_norm` over H K and `value_norm` over V U channels, and where the config
    asks for them K for `content_gain` and R' K U for T.

    Args:
        config: a `LambdaBertConfig`.
    """

    def __init__(self, config: LambdaBertConfig):
        super().__init__()
        self.num_queries = config.num_lambda_queries
        self.key_depth = config.key_depth
        self.intra_depth = config.intra_depth
        self.is_global = config.local_context_size is None
        self.max_length = config.max_position_embeddings  # of a global scope; a local one has no limit
        offsets = 2 * config.max_position_embeddings - 1 if self.is_global else config.local_context_size

        query_channels = config.num_lambda_queries * config.key_depth
        value_channels = config.hidden_size // config.num_lambda_queries * config.intra_depth
        self.to_queries = _make_projection(config.hidden_size, query_channels)
        self.to_keys = _make_projection(config.hidden_size, config.key_depth * config.intra_depth)
        self.to_values = _make_projection(config.hidden_size, value_channels)
        self.query_norm = _make_norm(config.lambda_norm, query_channels, config.layer_norm_eps)
        self.value_norm = _make_norm(config.lambda_norm, value_channels, config.layer_norm_eps)
        self.relative_embeddings = nn.Parameter(torch.empty(offsets, config.key_depth, config.intra_depth))
        self.content_gain = nn.Parameter(torch.empty(config.key_depth)) if config.content_gain else None
        self.repetition_embeddings = None
        if config.repetition_context_size is not None:
            self.repetition_embeddings = nn.Parameter(
                torch.empty(config.repetition_context_size, config.key_depth, config.intra_depth)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights such that inputs of unit variance give queries, values and outputs of about unit variance.

        E decays with distance, std[o] = c / (1 + |o|), with c such that the sum over offsets of K U std^2 is 1: a
        table that starts flat drowns each token in the average of its context. The gain of the content lambda is 0, and
        so is T.
        """
        for projection in (self.to_queries, self.to_keys, self.to_values):
            init.normal_(projection.weight, std=projection.init_std)  # type: ignore[arg-type]
        offsets, depth, intra = self.relative_embeddings.shape
        distances = torch.arange(offsets, device=self.relative_embeddings.device) - offsets // 2
        std = 1 / (1 + distances.abs()).to(self.relative_embeddings.dtype)
        std = std / (depth * intra * std.square().sum()).sqrt()
        init.copy_(self.relative_embeddings, torch.randn_like(self.relative_embeddings) * std[:, None, None])
        if self.content_gain is not None:
            init.zeros_(self.content_gain)
        if self.repetition_embeddings is not None:
            init.zeros_(self.repetition_embeddings)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Packing | Padded | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies the layer.

        Args:
            hidden_states: [B, N, D]; or the real tokens only, [1, T, D], with a layout that packs them.
            attention_mask: [B, N], 1 = token, 0 = padding; None = all are tokens. Not read if `layout` is given, which
                carries the mask.
            layout: the layout of the tokens, with their mask; None = [B, N] as given. A repetition lambda needs one
                that was given the token ids, -1 at each [MASK].

        Returns:
            The output, shaped as `hidden_states`, and the content lambda [B, K, V], gain included.

        Raises:
            ValueError: without `layout`, a mask that is not [B, N] or holds something other than 0 and 1; N is 0 or
                exceeds the offset table of a global scope; a layout without the token ids that a repetition lambda
                needs, without the mask, or of other tokens than `hidden_states`.
        """
        if layout is None:
            layout = Padded(as_token_mask(attention_mask, hidden_states))
        if attention_mask is not None and layout.token_mask is None:
            raise ValueError("attention_mask: layout has none; give it to the layout, Padded(mask.bool(), token_ids).")
        if layout.computed_shape not in (None, hidden_states.shape[:2]):
            raise ValueError(
                f"hidden_states is {list(hidden_states.shape)}, but layout is of {list(layout.computed_shape)}: "
                "give layout.pack(hidden_states), and a mask of all rows."
            )
        token_mask = layout.attention_mask
        queries = _normalise(self.query_norm, self.to_queries(hidden_states), token_mask)
        keys = self.to_keys(hidden_states)
        values = _normalise(self.value_norm, self.to_values(hidden_states), token_mask)
        outputs, contents = zip(
            *(
                self.mix(group.pad(queries), group.pad(keys), group.pad(values), group.mask, group.repetitions)
                for group in layout.groups
            )
        )
        return layout.join(outputs), layout.join_rows(contents)

    def mix(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        token_mask: torch.Tensor | None,
        repetitions: Repetitions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, D] and content lambda [B, K, V] of what was projected.

        Args:
            queries: [B, N, H K]
            keys: [B, N, K U]
            values: [B, N, V U]
            token_mask: bool [B, N], True = token; None = all are.
            repetitions: which of the tokens are the same; needed for a repetition lambda.

        Raises:
            ValueError: no tokens; more than a global scope takes; `repetitions` missing.
        """
        batch, length, _ = queries.shape
        if length == 0:
            raise ValueError("The sequence has 0 tokens: give one or more.")
        if self.is_global and length > self.max_length:
            raise ValueError(
                f"The sequence has {length} tokens, but max_position_embeddings={self.max_length} bounds the global "
                "scope: shorten the input, raise max_position_embeddings or set local_context_size."
            )
        if self.repetition_embeddings is not None and repetitions is None:
            raise ValueError(
                f"repetition_context_size={len(self.repetition_embeddings)} needs to know which tokens are the same: "
                "give the layer layout=Padded(attention_mask.bool(), token_ids), with -1 at each [MASK]."
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
        values = rearrange(values, "b m (v u) -> b m v u", u=self.intra_depth)
        content = content_lambda(keys, values)
        if self.content_gain is not None:
            content = rearrange(self.content_gain, "k -> k 1").to(content.dtype) * content
        table, elsewhere = self.repetition_embeddings, None
        if table is not None and repetitions is not None:
            elsewhere = values_elsewhere(values, len(table), repetitions)
        if prefers_blocks(queries, self.is_global):
            if token_mask is not None:  # a NaN at padding would spread through the zeros of its block
                queries = queries.masked_fill(~token_mask[..., None, None], 0)
            outputs = block_outputs(queries, content, values, self.relative_embeddings, elsewhere, table)
        else:
            # the formula; but for traces and short texts of a global scope, a faster form of it is taken
            position_lambda = global_position_lambda if self.is_global else local_position_lambda
            outputs = fastest_outputs(
                queries, content, values, self.relative_embeddings, self.is_global, position_lambda, apply_lambdas
            )
            if table is not None and elsewhere is not None:
                outputs = outputs + repetition_outputs(queries, elsewhere, table)
        return rearrange(outputs, "b n h v -> b n (h v)"), content
