"""The outputs of a lambda layer by faster ways than its formulas, and equal to theirs up to rounding.

`prefers_blocks` and `fastest_outputs` choose the way:

- a local scope, by dense products with blocks of a Toeplitz matrix, in O(N);
- a global scope, by an FFT, in O(N log N); up to `DIRECT_LENGTH` tokens the formula itself is faster, if not compiled;
- in inference on a CPU, either of them tile by tile: the lambdas [B, N, K, V] are the largest tensor of a layer, and
  those of a tile never leave the processor's cache. (Those of a global scope are made for whole rows, and applied tile
  by tile.)
- on a GPU a local scope is computed without lambdas, by `block_outputs`, while L H K is at most `BLOCK_CHANNELS`;
- in a program that is exported, by forms that serve every batch size and length and are made of real-valued operators
  that every runtime has: the same Toeplitz blocks, and for a global scope a Fourier transform within blocks;
- in a program that is traced, by the formulas.

The constants were measured on CPUs, in float32, at the sizes of BERT-base; `EXPORTED_BLOCK` in onnxruntime, those of
GPUs on an NVIDIA H200 in bfloat16. Axes are those of `lambda_layer.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from einops import rearrange
from torch.nn import functional as F

LOCAL_BLOCK = 8  # L, query positions of one dense product; of 2 to 32 none is faster for R = 25
DIRECT_LENGTH = 64  # tokens up to which the product with the whole Toeplitz matrix is faster than the FFT
DIRECT_LENGTH_ON_GPU = 512
BLOCK_CHANNELS = 2048  # L H K up to which `block_outputs` is used: its matrix of weights grows with the square of H
TILE = 256  # query positions whose lambdas, 0.8 MB at K = 8 and V = 96, fit into a core's second-level cache
FFT_TILE = 2**18  # numbers in the lambdas of one FFT, 1 MB: more of them do not stay in the cache
FFT_DEPTHS = 8  # value depths of one FFT at least; the lambdas are written 8 numbers, half a cache line, at a time
EXPORTED_BLOCK = 64  # L, positions of one transform in an exported global scope: the balance of its two products
OFF_STRIDE = 16  # padding of rows that are transposed: rows 2^i numbers apart compete for a few sets of the cache

PositionLambda = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def is_exporting() -> bool:
    """Whether a program is being exported. In torch 2.11 `torch.compiler.is_exporting()` is also True under
    `torch.compile`; this flag is not."""
    return torch.compiler._is_exporting_flag


def as_a_whole(values: torch.Tensor) -> bool:
    """Whether a batch is computed at once, and not tile by tile, as inference on a CPU is."""
    is_one_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or is_one_graph or values.device.type != "cpu":
        return True
    return torch._C._functorch.is_batchedtensor(values)  # torch.func.vmap cannot write into a buffer


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
        apply_lambdas: the formula of the output, from queries, content and position lambdas. (Both formulas are
            arguments because `lambda_layer`, where they are, imports this module.)
    """
    if is_exporting():
        position_lambda = spectral_position_lambda if is_global else exported_local_lambda
    elif not torch.jit.is_tracing():
        direct_length = DIRECT_LENGTH_ON_GPU if values.device.type == "cuda" else DIRECT_LENGTH
        # a compiled graph serves every length, and a branch by length would bound it
        formula_is_faster = is_global and not torch.compiler.is_compiling() and values.shape[1] <= direct_length
        if not formula_is_faster:
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


def prefers_blocks(queries: torch.Tensor, is_global: bool) -> bool:
    """Whether the outputs of queries [B, N, H, K] are computed by `block_outputs`: of a local scope on a GPU.

    A tensor core multiplies zeros faster than memory moves the lambdas [B, N, K, V].
    """
    is_written_out = is_exporting() or torch.jit.is_tracing()
    fits = LOCAL_BLOCK * queries.shape[2] * queries.shape[3] <= BLOCK_CHANNELS
    return queries.device.type == "cuda" and not is_global and not is_written_out and fits


def block_outputs(
    queries: torch.Tensor,
    content: torch.Tensor,
    values: torch.Tensor,
    relative_embeddings: torch.Tensor,
    elsewhere: torch.Tensor | None = None,
    repetition_embeddings: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs [B, N, H, V] of a local scope as weighted sums, in two dense products for blocks of L positions.

    All that a block reads stands in C rows of depth V: the S U values in its sight, S = L + R - 1; the K channels of
    the content lambda; and for a repetition lambda the R' U mean values around the other occurrences of each of its L
    tokens. The weights that its L H queries give to these rows are products with embeddings, for the content with 1:

        weights [L H, C]     [L H K] @ [L H K, L H C], a matrix of blocks on its diagonal
        outputs [L H, V]     [L H, C] @ [C, V]

    Args:
        queries: [B, N, H, K]
        content: the content lambda, [B, K, V].
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [R, K, U].
        elsewhere: as `values_elsewhere` gives it, [B, N, R' U, V]; None without a repetition lambda.
        repetition_embeddings: its embeddings T, [R', K, U].
    """
    batch, length, num_queries, key_depth = queries.shape
    size, reach = LOCAL_BLOCK, relative_embeddings.shape[0] // 2
    blocks = (length + size - 1) // size
    missing = blocks * size - length
    is_whole = not torch.compiler.is_compiling() and missing == 0  # a compiled graph serves both
    queries = queries if is_whole else F.pad(queries, (0, 0, 0, 0, 0, missing))
    context = F.pad(rearrange(values, "b m v u -> b m u v"), (0, 0, 0, 0, reach, reach + missing))
    windows = rearrange(context.unfold(1, size + 2 * reach, size), "b g u v s -> b g (s u) v")
    rows = [windows.contiguous(), content[:, None].expand(-1, blocks, -1, -1).contiguous()]  # joined faster than views
    embeddings = rearrange(toeplitz_matrix(relative_embeddings.to(queries.dtype)), "(t k) s -> t k s", t=size)
    one = torch.eye(key_depth, dtype=queries.dtype, device=queries.device).expand(size, -1, -1)
    factors = [embeddings, one]
    if elsewhere is not None and repetition_embeddings is not None:
        elsewhere = elsewhere if is_whole else F.pad(elsewhere, (0, 0, 0, 0, 0, missing))
        rows.append(rearrange(elsewhere, "b (g t) r v -> b g (t r) v", t=size))
        own = rearrange(repetition_embeddings.to(queries.dtype), "r k u -> 1 k (r u)").expand(size, -1, -1)
        factors.append(block_diagonal(own, 1).unflatten(0, (size, key_depth)))
    queries = rearrange(queries, "b (g t) h k -> (b g) (t h k)", t=size)
    weights = queries @ block_diagonal(torch.cat(factors, dim=2), num_queries)
    weights = rearrange(weights, "g (t h c) -> g (t h) c", t=size, h=num_queries)
    outputs = torch.bmm(weights, rearrange(torch.cat(rows, dim=2), "b g c v -> (b g) c v"))
    return rearrange(outputs, "(b g) (t h) v -> b (g t) h v", b=batch, t=size)[:, :length]


def block_diagonal(matrices: torch.Tensor, copies: int) -> torch.Tensor:
    """[L, K, C] as a matrix [(L H K), (L H C)] that holds each of them H = `copies` times on its diagonal."""
    times, depth, columns = matrices.shape
    ones = torch.eye(times * copies, dtype=matrices.dtype, device=matrices.device)
    ones = ones.view(times, copies, 1, times, copies, 1)
    return (ones * matrices[:, None, :, None, None]).reshape(times * copies * depth, times * copies * columns)


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

    The positions are cut into blocks of L. The L lambdas of a block are one dense product of a Toeplitz matrix, which
    repeats E along its diagonals, with the S = L + R - 1 values in sight of the block.

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
    lambdas = torch.bmm(toeplitz_matrix(relative_embeddings).expand(len(windows), -1, -1), windows)
    return rearrange(lambdas, "(b g) (t k) v -> b (g t) k v", g=blocks, t=LOCAL_BLOCK)[:, :length]


def toeplitz_matrix(relative_embeddings: torch.Tensor) -> torch.Tensor:
    """The matrix [L K, S U] of a block: the rows of position l hold E [R, K, U] from column l U on, zeros elsewhere."""
    in_sight = LOCAL_BLOCK + relative_embeddings.shape[0] - 1
    padded = F.pad(relative_embeddings, (0, 0, 0, 0, LOCAL_BLOCK - 1, LOCAL_BLOCK - 1))
    diagonals = padded.unfold(0, in_sight, 1).flip(0)
    return rearrange(diagonals, "t k u s -> (t k) (s u)")


def count_blocks(length: int, block: int) -> int:
    """Blocks that hold `length` positions; two at least, because an axis of one is another program to the exporter."""
    return torch.sym_max(2, (length + block - 1) // block)


def exported_local_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """`toeplitz_position_lambda` in a form whose sizes may be symbols: sizes that are padded to, windows by look-up."""
    length, scope = values.shape[1], relative_embeddings.shape[0]
    blocks, reach, in_sight = count_blocks(length, LOCAL_BLOCK), scope // 2, LOCAL_BLOCK + scope - 1
    rest = blocks * LOCAL_BLOCK - length
    context = F.pad(rearrange(values, "b m v u -> b m u v"), (0, 0, 0, 0, reach, reach + rest))
    starts = LOCAL_BLOCK * torch.arange(blocks, device=values.device)
    places = (starts[:, None] + torch.arange(in_sight, device=values.device)).flatten()
    windows = context.index_select(1, places).unflatten(1, (blocks, in_sight)).flatten(2, 3)
    lambdas = toeplitz_matrix(relative_embeddings) @ windows
    lambdas = rearrange(lambdas, "b g (t k) v -> b (g t) k v", t=LOCAL_BLOCK)
    return F.pad(lambdas, (0, 0, 0, 0, 0, -rest))


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
    with nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False):
        kernel = torch.fft.rfft(reversed_offsets.to(at_least_float32), n=period, dim=0)
        kernel = rearrange(kernel, "f k u -> u k 1 f").contiguous()

        def convolved(chosen: slice) -> torch.Tensor:
            """The lambdas of some value depths, [B, N, K, depths]."""
            signal = rearrange(values[:, :, chosen].to(at_least_float32), "b m v u -> b u v m")
            signal = F.pad(signal, (0, period - length + OFF_STRIDE))[..., :period]
            signal = torch.fft.rfft(rearrange(signal, "b u v m -> b m v u"), dim=1)
            signal = rearrange(signal, "b f v u -> u b 1 v f")
            # added to zero, because torch 2.13 compiles a plain complex product with a wrong gradient
            product = torch.addcmul(signal.new_zeros(()), kernel[0], signal[0])
            for u in range(1, intra_depth):
                product.addcmul_(kernel[u], signal[u])
            convolution = torch.fft.irfft(product, n=period)[..., length - 1 : 2 * length - 1]
            convolution = F.pad(convolution, (0, OFF_STRIDE))[..., :length]
            return rearrange(convolution, "b k v n -> b n k v")

        if depths >= value_depth:  # at once, without a buffer
            return convolved(slice(None)).contiguous().to(values.dtype)
        lambdas = reversed_offsets.new_empty(batch, length, key_depth, value_depth, dtype=at_least_float32)
        for chosen in slices(value_depth, depths):
            lambdas[..., chosen] = convolved(chosen)
    return lambdas.to(values.dtype)


def spectral_position_lambda(values: torch.Tensor, relative_embeddings: torch.Tensor) -> torch.Tensor:
    """Position lambda of a global scope by real matrix products of any size, for exported programs.

    The N positions are cut into G blocks of L. What a block of values adds to a block of lambdas depends on how far the
    two are apart, and is a convolution of L places: a product of spectra of period 2L. So

        spectra of the blocks of values      [2 (L + 1), L] @ [L, V]            for each block
        spectra of the blocks of lambdas     [2 G K, 2 G U] @ [2 G U, B V]      for each of L + 1 frequencies
        the lambdas                          [L, 2 (L + 1)] @ [2 (L + 1), G K B V]

    where 2 stands for real and imaginary parts. That is 4 G K V + 2 L K V multiplications a position, against N K V of
    the formula. Each product has one symbol at most in an axis that is merged, and that first, or the exporter would
    ask which sizes divide which.

    Args:
        values: [B, N, V, U], zero at padding.
        relative_embeddings: E, [2P - 1, K, U] with P >= N; index P - 1 is the offset m - n = 0.

    Returns:
        [B, N, K, V]
    """
    length, value_depth, intra_depth = values.shape[1:]
    key_depth = relative_embeddings.shape[1]
    at_least_float32 = torch.promote_types(values.dtype, torch.float32)
    blocks = count_blocks(length, EXPORTED_BLOCK)
    rest = blocks * EXPORTED_BLOCK - length
    to_spectrum, from_spectrum = block_transforms(at_least_float32, values.device)

    padded = F.pad(rearrange(values.to(at_least_float32), "b m v u -> b u m v"), (0, 0, 0, rest))
    spectra = [
        (part @ padded[:, u].unflatten(1, (blocks, EXPORTED_BLOCK))).permute(2, 1, 0, 3).flatten(2)
        for part in to_spectrum[..., :EXPORTED_BLOCK]
        for u in range(intra_depth)
    ]
    transfer = transfer_matrices(relative_embeddings.to(at_least_float32), to_spectrum, blocks)
    lambdas = torch.bmm(transfer, torch.cat(spectra, dim=1))  # [L + 1, (2 G K), (B V)]
    lambdas = lambdas.unflatten(1, (2, blocks * key_depth)).flatten(0, 1).flatten(1, 2)
    lambdas = (from_spectrum @ lambdas).view(EXPORTED_BLOCK, blocks, key_depth, values.shape[0], value_depth)
    lambdas = lambdas.permute(3, 1, 0, 2, 4).flatten(1, 2)
    return F.pad(lambdas, (0, 0, 0, 0, 0, -rest)).to(values.dtype)


def block_transforms(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The discrete Fourier transform of period 2L and its inverse on the first L places, as real matrices.

    Returns:
        Real and imaginary parts [2, L + 1, 2L], and [L, (L + 1) 2].
    """
    period = 2 * EXPORTED_BLOCK
    places = torch.arange(period, device=device)
    turns = places[: EXPORTED_BLOCK + 1, None] * places % period
    angles = turns.to(dtype) * (2 * math.pi / period)
    to_spectrum = torch.stack([angles.cos(), -angles.sin()])
    # all but the first and the last frequency stand for their conjugates too
    weights = 2 - (places[: EXPORTED_BLOCK + 1] % EXPORTED_BLOCK == 0).to(dtype)
    from_spectrum = to_spectrum[..., :EXPORTED_BLOCK] * (weights / period)[:, None]
    return to_spectrum, rearrange(from_spectrum, "c f t -> t (f c)")


def transfer_matrices(relative_embeddings: torch.Tensor, to_spectrum: torch.Tensor, blocks: int) -> torch.Tensor:
    """What the spectra of G blocks of values add to those of G blocks of lambdas.

    Args:
        relative_embeddings: E, [2P - 1, K, U].
        to_spectrum: the transform, [2, L + 1, 2L].
        blocks: G.

    Returns:
        [L + 1, (2 G K), (2 U G)]
    """
    offsets, key_depth, intra_depth = relative_embeddings.shape
    furthest = count_blocks(offsets // 2 + 1, EXPORTED_BLOCK)
    device = relative_embeddings.device
    # lambdas of block i see values of block j at offsets (j - i) L - t, for t from -(L - 1) to L - 1, in a circle
    within = torch.arange(2 * EXPORTED_BLOCK, device=device)
    within = torch.where(within < EXPORTED_BLOCK, within, within - 2 * EXPORTED_BLOCK)
    apart = EXPORTED_BLOCK * torch.arange(1 - furthest, furthest, device=device)
    index = apart[:, None] - within + offsets // 2
    is_offset = (index >= 0) & (index < offsets) & (within > -EXPORTED_BLOCK)
    kernels = relative_embeddings[index.clamp(0, offsets - 1)] * is_offset[..., None, None]
    real, imaginary = torch.einsum("cft,dtku->cdkuf", to_spectrum, kernels)
    to_real, to_imaginary = torch.stack([real, -imaginary], 2), torch.stack([imaginary, real], 2)
    table = rearrange(torch.stack([to_real, to_imaginary], 1), "d o k i u f -> (d o k i u) f")

    # rows of the table: an axis that counts blocks comes first, so that no merged axis starts with the number 2
    inputs = 2 * intra_depth
    block = 2 * key_depth * inputs * torch.arange(blocks, device=device)
    channels = inputs * torch.arange(key_depth, device=device)
    rows = (channels - block[:, None]).flatten()
    columns = block + 2 * key_depth * inputs * (furthest - 1)
    rows = torch.cat([rows, rows + key_depth * inputs])
    columns = torch.cat([columns + i for i in range(inputs)])
    return F.embedding(rows[:, None] + columns, table).permute(2, 0, 1)
