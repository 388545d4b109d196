"""FlexPrefill: which heads are query-aware, and the blocks that each head keeps."""

import numpy as np

from sparse_attn_jax.testing.methods import probe


def means(x: np.ndarray, block_size: int) -> np.ndarray:
    """[batch, num_blocks, heads, head_dim], the last over the tokens it has."""
    x = np.asarray(x, np.float64)
    return np.stack([x[:, i : i + block_size].mean(axis=1) for i in range(0, x.shape[1], block_size)], axis=1)


def sums(x: np.ndarray, block_size: int) -> np.ndarray:
    """Over blocks of the last axis."""
    return np.stack([x[..., i : i + block_size].sum(axis=-1) for i in range(0, x.shape[-1], block_size)], axis=-1)


def estimate(query_means: np.ndarray, key_means: np.ndarray, last_positions: np.ndarray, block_size: int) -> np.ndarray:
    """softmax of pooled queries and keys, [batch, num_q_heads, rows, num_kv_blocks]; `last_positions`: [batch, rows]."""
    group = query_means.shape[2] // key_means.shape[2]
    logits = np.einsum("bihd,bjhd->bhij", query_means, key_means.repeat(group, axis=2)) * query_means.shape[-1] ** -0.5
    starts = np.arange(key_means.shape[1]) * block_size
    return probe.softmax(np.where(starts <= last_positions[:, None, :, None], logits, -np.inf))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The square root of the Jensen-Shannon divergence of two distributions, entry by entry."""
    total = 0.0
    for x, y in zip(p, q, strict=True):
        total += sum(0.5 * z * np.log(2 * z / (x + y)) for z in (x, y) if z > 0)
    return np.sqrt(max(total, 0.0))


def cover(mass: np.ndarray, gamma: float) -> int:
    """The fewest entries that hold more than gamma of the mass."""
    held, count = 0.0, 0
    for x in sorted(mass, reverse=True):
        held, count = held + x, count + 1
        if held > gamma * mass.sum():
            return count
    return count + 1


def block_mask(query, key, positions, *, gamma, tau, min_budget, max_budget, block_size):
    """bool [batch, num_q_heads, num_q_blocks, num_kv_blocks], and which heads are query-aware, bool [batch, num_q_heads]."""
    weights, probed = probe.probe_attention(query, key, positions, block_size)
    columns, distances = weights.sum(axis=2), probe.sum_diagonals(weights, probed)
    key_means = means(key, block_size)
    probe_mean = np.asarray(query, np.float64)[:, -block_size:].mean(axis=1, keepdims=True)
    guess = estimate(probe_mean, key_means, probed[:, -1:], block_size)[:, :, 0]
    ends = np.minimum(np.arange(0, query.shape[1], block_size) + block_size, query.shape[1]) - 1
    rows = estimate(means(query, block_size), key_means, positions[:, ends], block_size)
    num_blocks = key_means.shape[1]
    least, most = -(-min_budget // block_size), min(-(-(max_budget or 10**9) // block_size), num_blocks)
    mask = np.zeros(rows.shape, bool)
    is_query_aware = np.zeros(rows.shape[:2], bool)
    for b, h in np.ndindex(rows.shape[:2]):
        attention = sums(columns[b, h], block_size)
        is_query_aware[b, h] = divergence(guess[b, h], attention / attention.sum()) < tau
        kept = []
        for mass in (columns[b, h], distances[b, h]):
            count = min(max(cover(mass, gamma) // block_size + 1, least), most)
            kept.append(probe.keep_highest(sums(mass, block_size), least if is_query_aware[b, h] else count, 1))
        for a, j in np.ndindex(rows.shape[2:]):
            back = {position // block_size - j for position in positions[b, a * block_size : ends[a] + 1]}
            mask[b, h, a, j] = kept[0][j] or any(0 <= d < num_blocks and kept[1][d] for d in back)
        if is_query_aware[b, h]:
            held = 0.0
            for a, j in sorted(np.ndindex(rows.shape[2:]), key=lambda tile: -rows[b, h][tile]):
                held += rows[b, h, a, j]
                mask[b, h, a, j] |= held <= gamma * rows[b, h].sum()
    starts = np.arange(num_blocks) * block_size
    return mask & (starts <= positions[:, None, ends, None]), is_query_aware
