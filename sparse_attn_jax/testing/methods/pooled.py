"""Selection by products of block means: a fixed number of blocks, and SpargeAttention's share of their softmax."""

import numpy as np


def blocks_of(length: int, block_size: int) -> list[slice]:
    return [slice(i, min(i + block_size, length)) for i in range(0, length, block_size)]


def block_means(x, block_size: int) -> np.ndarray:
    """[batch, num_blocks, heads, head_dim], the last over the tokens it has."""
    x = np.asarray(x, np.float64)
    return np.stack([x[:, block].mean(axis=1) for block in blocks_of(x.shape[1], block_size)], axis=1)


def pooled_scores(query, key, q_block_size: int, kv_block_size: int, scale: float = 1.0) -> np.ndarray:
    """[batch, num_q_heads, num_q_blocks, num_kv_blocks]."""
    query_means, key_means = block_means(query, q_block_size), block_means(key, kv_block_size)
    key_means = key_means.repeat(query_means.shape[2] // key_means.shape[2], axis=2)
    return scale * np.einsum("bihd,bjhd->bhij", query_means, key_means)


def visible_and_diagonal(positions, kv_len: int, q_block_size: int, kv_block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of keys that some query of a block sees, and those that hold the position of one: bool [batch, 1, rows, blocks].

    `positions`, int [batch, q_len], are absolute; `None` is attention that is not causal.
    """
    kv_blocks = blocks_of(kv_len, kv_block_size)
    q_blocks = blocks_of(positions.shape[1], q_block_size)
    visible = np.zeros((len(positions), 1, len(q_blocks), len(kv_blocks)), bool)
    diagonal = np.zeros_like(visible)
    for b, _, r, c in np.ndindex(visible.shape):
        row = positions[b, q_blocks[r]]
        visible[b, 0, r, c] = row.max() >= kv_blocks[c].start
        diagonal[b, 0, r, c] = (row // kv_block_size == c).any()
    return visible, diagonal


def top_k_blocks(scores, visible, diagonal, *, top_k=None, ratio=None, visible_ratio=False) -> np.ndarray:
    """bool as `scores`: the diagonal, then the highest; ties go to the lower id."""
    visible, diagonal = (np.broadcast_to(x, scores.shape) for x in (visible, diagonal))
    mask = diagonal & visible
    for row in np.ndindex(scores.shape[:-1]):
        count = top_k
        if ratio is not None:
            count = max(1, int(ratio * (visible[row].sum() if visible_ratio else scores.shape[-1])))
        free = [c for c in range(scores.shape[-1]) if visible[row][c] and not mask[row][c]]
        best = sorted(free, key=lambda c: (-scores[row][c], c))
        mask[row][best[: max(count - mask[row].sum(), 0)]] = True
    return mask


def mean_cosine(x, block_size: int) -> np.ndarray:
    """Of all pairs of tokens of a block: [batch, heads, num_blocks]."""
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    x = x / np.where(norm > 0, norm, 1)
    pairs = [np.einsum("bihd,bjhd->bhij", x[:, s], x[:, s]).mean(axis=(2, 3)) for s in blocks_of(x.shape[1], block_size)]
    return np.stack(pairs, axis=-1)


def cdf_blocks(query, key, visible, *, cdf, similarity, q_block_size, kv_block_size, smooth_key=True) -> np.ndarray:
    """SpargeAttention's blocks, without forced ones: bool [batch, num_q_heads, rows, blocks]. `cdf`, `similarity`: by head."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    group = query.shape[2] // key.shape[2]
    scores = pooled_scores(query, key, q_block_size, kv_block_size, query.shape[-1] ** -0.5)
    q_cosine = mean_cosine(query, q_block_size)
    kv_cosine = mean_cosine(key - key.mean(axis=1, keepdims=True) * smooth_key, kv_block_size).repeat(group, axis=1)
    visible = np.broadcast_to(visible, scores.shape)
    mask = np.zeros(scores.shape, bool)
    for b, h, r in np.ndindex(scores.shape[:3]):
        differs = ~(kv_cosine[b, h] > similarity[h])
        mask[b, h, r] = differs | ~(q_cosine[b, h, r] > similarity[h])
        ranked = np.flatnonzero(visible[b, h, r] & ~differs)
        if len(ranked):
            weights = np.exp(scores[b, h, r, ranked] - scores[b, h, r, ranked].max())
            order = np.argsort(-weights, kind="stable")
            count = np.searchsorted(np.cumsum(weights[order]) / weights.sum(), cdf[h], side="right")
            mask[b, h, r, ranked[order[: max(count, 1)]]] = True
    return mask & visible


def to_tokens(mask, q_len: int, kv_len: int, q_block_size: int, kv_block_size: int) -> np.ndarray:
    """bool [batch, heads, q_len, kv_len]."""
    return mask.repeat(q_block_size, axis=2)[:, :, :q_len].repeat(kv_block_size, axis=3)[..., :kv_len]
