"""The lambda layer's definition as slow, obvious loops over Python floats (float64).

It shares no code and no tensor operation with the layer: every axis is a loop, every channel is found by its index.

    B batch, N queries, M context (= N), D width, H queries per position, K key depth, V value depth, U intra-depth

Channel layouts: queries h * K + k, keys k * U + u, values v * U + u, output h * V + v.
"""

import math
from dataclasses import dataclass


@dataclass
class ReferenceNorm:
    """A normalisation of C channels, as the layer applies it to its queries and values.

    Attributes:
        kind: "batch", "layer" or "rms".
        weight: C scales.
        bias: C shifts, or None.
        eps: Added to the variance (or mean square).
        running_mean: C means ("batch" only).
        running_var: C variances ("batch" only).
        training: Whether "batch" uses the statistics of the batch's real tokens or the running ones.
    """

    kind: str
    weight: list[float]
    bias: list[float] | None
    eps: float
    running_mean: list[float] | None = None
    running_var: list[float] | None = None
    training: bool = False


def project(hidden_states, weight):
    """[B][N][D] and [C][D] to [B][N][C]."""
    return [
        [[sum(w * x for w, x in zip(row, token)) for row in weight] for token in sequence] for sequence in hidden_states
    ]


def masked_statistics(channels, mask):
    """Mean and biased variance of every channel over the real tokens of [B][N][C], and how many those are."""
    tokens = [token for b, row in enumerate(channels) for n, token in enumerate(row) if mask[b][n]]
    count = len(tokens)
    if count == 0:
        return None, None, 0
    width = len(tokens[0])
    mean = [sum(token[c] for token in tokens) / count for c in range(width)]
    variance = [sum((token[c] - mean[c]) ** 2 for token in tokens) / count for c in range(width)]
    return mean, variance, count


def normalise(channels, mask, norm):
    """[B][N][C] to [B][N][C]; what stands at padding is of no consequence and stays as it is."""
    if norm is None:
        return channels
    if norm.kind == "batch" and norm.training:
        batch_mean, batch_variance, _ = masked_statistics(channels, mask)
    normalised = []
    for b, row in enumerate(channels):
        new_row = []
        for n, token in enumerate(row):
            if not mask[b][n]:
                new_row.append(token)
                continue
            width = len(token)
            if norm.kind == "rms":
                mean, variance = [0.0] * width, [sum(x * x for x in token) / width] * width
            elif norm.kind == "layer":
                centre = sum(token) / width
                mean, variance = [centre] * width, [sum((x - centre) ** 2 for x in token) / width] * width
            elif norm.training:
                mean, variance = batch_mean, batch_variance
            else:
                mean, variance = norm.running_mean, norm.running_var
            new_row.append(
                [
                    (token[c] - mean[c]) / math.sqrt(variance[c] + norm.eps) * norm.weight[c]
                    + (norm.bias[c] if norm.bias is not None else 0.0)
                    for c in range(width)
                ]
            )
        normalised.append(new_row)
    return normalised


def softmax_over_context(keys, mask):
    """[B][M][C] to [B][M][C]: every channel a distribution over the real places of its row, 0 at padding."""
    weights = []
    for row, row_mask in zip(keys, mask):
        new_row = [[0.0] * len(token) for token in row]
        real = [m for m in range(len(row)) if row_mask[m]]
        for c in range(len(row[0])):
            if not real:
                continue
            largest = max(row[m][c] for m in real)
            total = sum(math.exp(row[m][c] - largest) for m in real)
            for m in real:
                new_row[m][c] = math.exp(row[m][c] - largest) / total
        weights.append(new_row)
    return weights


def content_lambda(key_weights, values, mask, key_depth, value_depth, intra_depth):
    """lambda_c[b][k][v], the sum over m and u of key_weights[b][m][k, u] * values[b][m][v, u]."""
    result = []
    for b in range(len(values)):
        row = [[0.0] * value_depth for _ in range(key_depth)]
        for m in range(len(values[b])):
            if not mask[b][m]:
                continue
            for k in range(key_depth):
                for v in range(value_depth):
                    for u in range(intra_depth):
                        row[k][v] += key_weights[b][m][k * intra_depth + u] * values[b][m][v * intra_depth + u]
        result.append(row)
    return result


def position_lambda(values, mask, relative_embeddings, local_context_size, key_depth, value_depth, intra_depth):
    """lambda_p[b][n][k][v], the sum over m and u of E[m - n][k][u] * values[b][m][v, u].

    Args:
        values: [B][M][V * U].
        mask: [B][M].
        relative_embeddings: [R'][K][U]; R' is the local scope R, or 2P - 1 for the global one. Offset 0 is its middle.
        local_context_size: R, or None for the global scope.
    """
    middle = len(relative_embeddings) // 2
    result = []
    for b in range(len(values)):
        length = len(values[b])
        row = []
        for n in range(length):
            at_n = [[0.0] * value_depth for _ in range(key_depth)]
            for m in range(length):
                offset = m - n
                outside = local_context_size is not None and abs(offset) > local_context_size // 2
                if outside or not mask[b][m]:
                    continue
                for k in range(key_depth):
                    for v in range(value_depth):
                        for u in range(intra_depth):
                            at_n[k][v] += relative_embeddings[middle + offset][k][u] * values[b][m][v * intra_depth + u]
            row.append(at_n)
        result.append(row)
    return result


def repetition_lambda(values, mask, tokens, repetition_embeddings, key_depth, value_depth, intra_depth):
    """lambda_r[b][n][k][v], the mean over other places m of n's token of the sum of T[o][k][u] * values[m + o].

    Args:
        values: [B][M][V * U].
        mask: [B][M].
        tokens: [B][M], ids; a negative one is like no other.
        repetition_embeddings: [R'][K][U]; offset 0 is its middle.
    """
    middle = len(repetition_embeddings) // 2
    result = []
    for b in range(len(values)):
        length = len(values[b])
        row = []
        for n in range(length):
            same = [m for m in range(length) if m != n and mask[b][m] and tokens[b][m] == tokens[b][n] >= 0]
            at_n = [[0.0] * value_depth for _ in range(key_depth)]
            for m in same:
                for r in range(len(repetition_embeddings)):
                    place = m + r - middle
                    if not 0 <= place < length or not mask[b][place]:
                        continue
                    for k in range(key_depth):
                        for v in range(value_depth):
                            for u in range(intra_depth):
                                value = values[b][place][v * intra_depth + u]
                                at_n[k][v] += repetition_embeddings[r][k][u] * value / len(same)
            row.append(at_n)
        result.append(row)
    return result


def lambda_layer(
    hidden_states,
    mask,
    query_weight,
    key_weight,
    value_weight,
    relative_embeddings,
    query_norm,
    value_norm,
    num_lambda_queries,
    local_context_size,
    content_gain=None,
    repetition_embeddings=None,
    tokens=None,
):
    """The layer's output and content lambda.

    Args:
        hidden_states: [B][N][D].
        mask: [B][N], 1 = token, 0 = padding; or None, where every place is a token.
        query_weight: [H * K][D].
        key_weight: [K * U][D].
        value_weight: [V * U][D].
        relative_embeddings: [R'][K][U].
        query_norm: `ReferenceNorm` of H * K channels, or None.
        value_norm: `ReferenceNorm` of V * U channels, or None.
        num_lambda_queries: H.
        local_context_size: R, or None for the global scope.
        content_gain: K numbers, or None for the paper's layer, in which all are 1.
        repetition_embeddings: [R'][K][U], or None for the paper's layer, which has no repetition lambda.
        tokens: [B][N], ids, for a repetition lambda; a negative one is like no other.

    Returns:
        output [B][N][H * V] (what stands at padding is of no consequence) and content lambda [B][K][V].
    """
    if mask is None:
        mask = [[1] * len(row) for row in hidden_states]
    key_depth, intra_depth = len(relative_embeddings[0]), len(relative_embeddings[0][0])
    value_depth = len(value_weight) // intra_depth

    queries = normalise(project(hidden_states, query_weight), mask, query_norm)
    key_weights = softmax_over_context(project(hidden_states, key_weight), mask)
    values = normalise(project(hidden_states, value_weight), mask, value_norm)

    content = content_lambda(key_weights, values, mask, key_depth, value_depth, intra_depth)
    if content_gain is not None:
        content = [[[content_gain[k] * x for x in row[k]] for k in range(key_depth)] for row in content]
    position = position_lambda(
        values, mask, relative_embeddings, local_context_size, key_depth, value_depth, intra_depth
    )

    if repetition_embeddings is not None:
        repetition = repetition_lambda(values, mask, tokens, repetition_embeddings, key_depth, value_depth, intra_depth)
        for b, row in enumerate(position):
            for n, at_n in enumerate(row):
                for k in range(key_depth):
                    for v in range(value_depth):
                        at_n[k][v] += repetition[b][n][k][v]

    output = []
    for b in range(len(hidden_states)):
        row = []
        for n in range(len(hidden_states[b])):
            token = []
            for h in range(num_lambda_queries):
                for v in range(value_depth):
                    token.append(
                        sum(
                            (content[b][k][v] + position[b][n][k][v]) * queries[b][n][h * key_depth + k]
                            for k in range(key_depth)
                        )
                    )
            row.append(token)
        output.append(row)
    return output, content
