"""XAttention: antidiagonal scores, and the blocks that hold a share of them."""

import numpy as np

from sparse_attn_jax.testing.methods import probe


def scores(query, key, positions, *, stride, block_size, is_causal, scale=None) -> np.ndarray:
    """[batch, num_q_heads, num_q_blocks, num_kv_blocks]."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, q_len, num_q_heads, head_dim = query.shape
    kv_len, group = key.shape[1], num_q_heads // key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    num_rows, num_columns = -(-q_len // stride), -(-kv_len // stride)
    logits = np.full((batch, num_q_heads, num_rows, num_columns), -np.inf)
    for b, h, r, c in np.ndindex(logits.shape):
        last_query = positions[b, min((r + 1) * stride, q_len) - 1]
        if is_causal and c * stride > last_query:
            continue
        pairs = [(r * stride + stride - 1 - t, c * stride + t) for t in range(stride)]
        dots = [query[b, i, h] @ key[b, j, h // group] for i, j in pairs if i < q_len and j < kv_len]
        logits[b, h, r, c] = scale / stride * sum(dots)
    weights = probe.softmax(logits)
    total = np.zeros((batch, num_q_heads, -(-q_len // block_size), -(-kv_len // block_size)))
    for r, c in np.ndindex(num_rows, num_columns):
        total[:, :, r * stride // block_size, c * stride // block_size] += weights[:, :, r, c]
    return total


def block_mask(scores, positions, *, thresholds, block_size, kv_len, is_causal) -> np.ndarray:
    """bool, as the scores: what is kept of each row of blocks. `thresholds`: by head."""
    mask = np.zeros(scores.shape, bool)
    for b, h, a in np.ndindex(scores.shape[:3]):
        rows = positions[b, a * block_size : (a + 1) * block_size]
        visible = [j for j in range(scores.shape[3]) if not is_causal or j * block_size <= rows[-1]]
        own = {position // block_size for position in rows}
        kept = [j for j in visible if is_causal and (j == 0 or j in own)]
        total = sum(scores[b, h, a, j] for j in visible)
        for j in sorted(set(visible) - set(kept), key=lambda j: (-scores[b, h, a, j], j)):
            if sum(scores[b, h, a, kept]) < thresholds[h] * total or thresholds[h] == 1:
                kept.append(j)
        mask[b, h, a, kept] = True
    return mask
