"""The attention of the last queries, which several methods take for that of all."""

import numpy as np


def absolute_positions(q_offset, batch: int, q_len: int, kv_len: int) -> np.ndarray:
    """int [batch, q_len]; `None` aligns the last query with the last key."""
    offset = kv_len - q_len if q_offset is None else np.asarray(q_offset)
    return np.broadcast_to(offset, (batch,))[:, None] + np.arange(q_len)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; a row of -inf has no mass."""
    weights = np.exp(logits - np.maximum(logits.max(axis=-1, keepdims=True), -1e300))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


def probe_attention(query, key, positions: np.ndarray, num_probe: int, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of the last queries, [batch, heads, rows, kv_len], and their positions, [batch, rows]."""
    query, key = np.asarray(query, np.float64)[:, -num_probe:], np.asarray(key, np.float64)
    positions = positions[:, -num_probe:]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("bihd,bjhd->bhij", query, key.repeat(query.shape[2] // key.shape[2], axis=2))
    return softmax(np.where(np.arange(key.shape[1]) <= positions[:, None, :, None], logits, -np.inf)), positions


def sum_diagonals(weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Sums of [batch, heads, rows, kv_len] by distance from the query back to the key: [batch, heads, kv_len]."""
    sums = np.zeros((*weights.shape[:2], weights.shape[3]))
    for b, r, j in np.ndindex(weights.shape[0], *weights.shape[2:]):
        if 0 <= positions[b, r] - j < weights.shape[3]:
            sums[b, :, positions[b, r] - j] += weights[b, :, r, j]
    return sums


def keep_highest(scores: np.ndarray, count: int, num_forced: int) -> np.ndarray:
    """Marks the first `num_forced` entries of the last axis and the highest of the rest, `count` in all; low ids first."""
    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        order = sorted(range(scores.shape[-1]), key=lambda i: (i >= num_forced, -scores[row][i], i))
        mask[row][order[:count]] = True
    return mask
