"""The outputs of a lambda layer by faster ways than its formulas, and equal to theirs up to rounding.

`fastest_outputs` is the one place where a way is chosen:

- a local scope, by dense products with blocks of a Toeplitz matrix, in O(N);
- a global scope, by an FFT, in O(N log N); up to `DIRECT_LENGTH` tokens the formula itself is faster;
- in inference on a CPU, either of them tile by tile: the lambdas [B, N, K, V] are the largest tensor of a layer, and
  those of a tile never leave the processor's cache;
- in a program that is exported or traced, by the formulas: they serve every batch size and length, and are made of
  real-valued operators that every runtime has.

The constants were measured on CPUs, in float32, at the sizes of BERT-base. Axes are those of `lambda_layer.py`.
"""

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch.nn import functional as F

LOCAL_BLOCK = 8  # T, query positions of one dense product; the fastest of 2 to 32 for R = 25
DIRECT_LENGTH = 64  # tokens up to which the product with the whole Toeplitz matrix is faster than the FFT
TILE = 256  # query positions whose lambdas, 0.8 MB at K = 8 and V = 96, fit into a core's second-level cache
FFT_TILE = 2**18  # numbers in the lambdas of one FFT, 1 MB: more of them do not stay in the cache
FFT_DEPTHS = 8  # value depths of one FFT at least; the lambdas are written 8 numbers, half a cache line, at a time
OFF_STRIDE = 16  # numbers added to rows that are transposed: rows 2^i apart share a few sets of the cache

PositionLambda = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def serves_every_size() -> bool:
    """Whether a program is being exported or traced, which is to serve other batch sizes and lengths than it sees."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def as_a_whole(values: torch.Tensor) -> bool:
    """Whether a batch is computed at once, and not tile by tile, as inference on a CPU is."""
    is_one_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() or is_one_graph or values.device.type != "cpu"


def fastest_outputs(
    queries: torch.Tensor,
    content: torch.Tensor,
    values: torch.Tensor,
    relative_embeddings: torch.Tensor,
    is_global: bool,
    position_lambda: PositionLambda,
    apply_lambdas: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Outputs [B, N, H, V] of a layer, computed in the fastest way.

    Args:
        queries: [B, N, H, K]
        content: the content lambda, [B, K, V].
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [R, K, U].
        is_global: whether E holds all offsets of a sequence, or those of a local scope.
        position_lambda: the formula of the scope, from values and E to [B, N, K, V].
        apply_lambdas: the formula of the output, from queries, content and position lambdas.
    """
    if not serves_every_size():
        is_short = is_global and not torch.compiler.is_compiling() and values.shape[1] <= DIRECT_LENGTH
        if not is_short:
            position_lambda = fft_position_lambda if is_global else toeplitz_position_lambda
    if as_a_whole(values):
        return apply_lambdas(queries, content, position_lambda(values, relative_embeddings))
    if is_global:
        tiles = global_tiles(values, relative_embeddings, position_lambda)
    else:
        tiles = local_tiles(values, relative_embeddings)
    outputs = queries.new_empty(*queries.shape[:3], content.shape[-1])
    for rows, places, position in tiles:
        outputs[rows, places] = apply_lambdas(queries[rows, places], content[rows], position)
    return outputs


def local_tiles(values: torch.Tensor, relative_embeddings: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, places and the position lambdas of a local scope there, tile by tile."""
    batch, length = values.shape[:2]
    reach = relative_embeddings.shape[0] // 2
    context = with_surroundings(values, reach)
    for rows in slices(batch, max(1, TILE // length)):
        for places in slices(length, TILE):
            in_sight = context[rows, places.start : places.stop + 2 * reach]
            yield rows, places, position_lambda_within(in_sight, relative_embeddings)


def global_tiles(
    values: torch.Tensor, relative_embeddings: torch.Tensor, position_lambda: PositionLambda
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, places and the position lambdas of a global scope there: whole rows at a time, handed out in tiles."""
    batch, length, value_depth, _ = values.shape
    numbers = length * relative_embeddings.shape[1] * value_depth
    for rows in slices(batch, max(1, FFT_TILE // numbers)):
        lambdas = position_lambda(values[rows], relative_embeddings)
        for places in slices(length, TILE):
            yield rows, places, lambdas[:, places]


def slices(stop: int, step: int) -> Iterator[slice]:
    """Slices of `step` that together cover 0 ... `stop`."""
    return (slice(start, start + step) for start in range(0, stop, step))


def with_surroundings(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Values [B, N, V, U] as [B, N + 2 reach, V, U], with zeros before and after.

    In memory V comes last, so that what is summed over, m and u, has one stride.
    """
    context = F.pad(rearrange(values, "b m v u -> b m u v"), (0, 0, 0, 0, reach, reach)).contiguous()
    return rearrange(context, "b m u v -> b m v u")


def toeplitz_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a local scope by dense products, in O(N).

    Args:
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [R, K, U]; index r is the offset m - n = r - R // 2.

    Returns:
        [B, N, K, V]
    """
    return position_lambda_within(with_surroundings(values, relative_embeddings.shape[0] // 2), relative_embeddings)


def position_lambda_within(context: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda [B, N, K, V] of the N positions that have all of their scope within `context`.

    The positions are cut into blocks of T. The T lambdas of a block are one dense product of a Toeplitz matrix, which
    repeats E along its diagonals, with the S = T + R - 1 values in sight of the block.

    Args:
        context: values [B, N + R - 1, V, U], V last in memory.
        relative_embeddings: E, [R, K, U].
    """
    scope, _, intra_depth = relative_embeddings.shape
    length, value_depth = context.shape[1] - scope + 1, context.shape[2]
    in_sight = LOCAL_BLOCK + scope - 1
    rows = rearrange(context, "b m v u -> b (m u) v")
    rows = F.pad(rows, (0, 0, 0, -length % LOCAL_BLOCK * intra_depth)) if length % LOCAL_BLOCK else rows
    # the overlapping windows of a single sequence are a view
    windows = rows.flatten(1).unfold(1, in_sight * intra_depth * value_depth, LOCAL_BLOCK * intra_depth * value_depth)
    blocks = windows.shape[1]
    windows = rearrange(windows, "b g (s v) -> (b g) s v", v=value_depth)
    # row t holds E from column t on, and zeros elsewhere
    toeplitz = F.pad(relative_embeddings, (0, 0, 0, 0, LOCAL_BLOCK - 1, LOCAL_BLOCK - 1)).unfold(0, in_sight, 1).flip(0)
    toeplitz = rearrange(toeplitz, "t k u s -> (t k) (s u)")
    lambdas = torch.bmm(toeplitz.expand(len(windows), -1, -1), windows)
    return rearrange(lambdas, "(b g) (t k) v -> b (g t) k v", g=blocks, t=LOCAL_BLOCK)[:, :length]


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
        for some in slices(value_depth, depths):
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
