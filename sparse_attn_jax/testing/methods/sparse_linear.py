"""Sparse-linear attention: softmax attention to critical blocks, linear attention to others."""

import numpy as np

FEATURE_MAPS = {
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
}


def classify(query, key, *, top_ratio: float, bottom_ratio: float, block_size: int) -> np.ndarray:
    """1 critical, 0 marginal, -1 negligible: int [batch, num_q_heads, num_q_blocks, num_kv_blocks]."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))

    def means(x):
        return np.stack([x[:, i : i + block_size].mean(axis=1) for i in range(0, x.shape[1], block_size)], axis=1)

    scores = np.einsum("bihd,bjhd->bhij", means(query), means(key).repeat(query.shape[2] // key.shape[2], axis=2))
    num_blocks = scores.shape[-1]
    num_critical = max(1, int(top_ratio * num_blocks))
    kinds = np.zeros(scores.shape, int)
    for row in np.ndindex(scores.shape[:-1]):
        order = np.argsort(-scores[row], kind="stable")
        kinds[row][order[max(num_blocks - int(bottom_ratio * num_blocks), num_critical) :]] = -1
        kinds[row][order[:num_critical]] = 1
    return kinds


def attention(
    query, key, value, *, mode="marginal", feature_map="softmax", projection=None, block_size=64, scale=None, **ratios
):
    """float64 [batch, q_len, num_q_heads, value_head_dim], token by token. `ratios`: those of `classify`."""
    kinds = classify(query, key, block_size=block_size, **ratios)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    feature = FEATURE_MAPS[feature_map]
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, i, h in np.ndindex(out.shape[:3]):
        kind = kinds[b, h, i // block_size].repeat(block_size)[: key.shape[1]]
        k, v = key[b, :, h // group], value[b, :, h // group]
        weights = np.exp(scale * k @ query[b, i, h]) * (kind == 1)
        out[b, i, h] = weights @ v / weights.sum()
        seen = {"marginal": kind == 0, "complement": kind != 1, "all": kind < 2}[mode]
        weights = feature(k) @ feature(query[b, i, h]) * seen
        linear = weights @ v / weights.sum() if weights.sum() > 0 else np.zeros_like(v[0])
        if projection is not None:
            matrix = np.asarray(projection, np.float64)
            linear = linear @ (matrix if matrix.ndim == 2 else matrix[h])
        out[b, i, h] += linear
    return out
