"""The gates of SeerAttention and SeerAttention-R, and what they learn to predict."""

import numpy as np


def blocks_of(length: int, block_size: int) -> list[slice]:
    return [slice(i, min(i + block_size, length)) for i in range(0, length, block_size)]


def rotate(x: np.ndarray, position: int, base: float | None) -> np.ndarray:
    """One vector; channels i and i + half turn by position * base ** (-i / half)."""
    if base is None:
        return x
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def gate_keys(key, weights, num_heads: int, block_size: int, base: float | None) -> np.ndarray:
    """[batch, num_heads, num_kv_blocks, gate_dim]."""
    key, weights = np.asarray(key, np.float64), np.asarray(weights, np.float64)
    blocks = blocks_of(key.shape[1], block_size)
    found = np.zeros((len(key), num_heads, len(blocks), weights.shape[2]))
    for b, h, c in np.ndindex(found.shape[:3]):
        tokens = key[b, blocks[c], h * key.shape[2] // num_heads]
        pooled = np.concatenate([tokens.max(axis=0), tokens.min(axis=0), tokens.mean(axis=0)])
        found[b, h, c] = rotate(pooled @ weights[h * len(weights) // num_heads], blocks[c].start, base)
    return found


def prefill_logits(query, key, query_weights, key_weights, positions, *, block_size: int, base: float | None, causal: bool):
    """[batch, num_q_heads, num_q_blocks, num_kv_blocks], -inf where invisible; `positions`: int [batch, q_len]."""
    query = np.asarray(query, np.float64)
    keys = gate_keys(key, key_weights, query.shape[2], block_size, base)
    rows = blocks_of(query.shape[1], block_size)
    logits = np.full((*keys.shape[:2], len(rows), keys.shape[2]), -np.inf)
    for b, h, r, c in np.ndindex(logits.shape):
        position = positions[b, rows[r]]
        if causal and c * block_size > position[-1]:
            continue
        pooled = query[b, rows[r], h].mean(axis=0)
        if query_weights is not None:
            pooled = pooled @ np.asarray(query_weights, np.float64)[h]
        logits[b, h, r, c] = rotate(pooled, position[0], base) @ keys[b, h, c] / np.sqrt(keys.shape[3])
    return logits


def decode_logits(query, key, query_weights, key_weights, positions, *, block_size: int, base: float | None) -> np.ndarray:
    """[batch, num_kv_heads, q_len, num_kv_blocks], -inf where a block is not complete."""
    query, weights = np.asarray(query, np.float64), np.asarray(query_weights, np.float64)
    num_kv_heads, group = weights.shape[:2]
    keys = gate_keys(key, key_weights, num_kv_heads, block_size, base)
    logits = np.full((len(query), num_kv_heads, query.shape[1], keys.shape[2]), -np.inf)
    for b, n, i, c in np.ndindex(logits.shape):
        end = (c + 1) * block_size
        if end <= key.shape[1] and end - 1 <= positions[b, i]:
            projected = sum(query[b, i, n * group + g] @ weights[n, g] for g in range(group))
            logits[b, n, i, c] = rotate(projected, positions[b, i], base) @ keys[b, n, c] / np.sqrt(keys.shape[3])
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - np.maximum(logits.max(axis=-1, keepdims=True), -1e300))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


def choose(logits, forced, *, threshold: float, top_k: int | None) -> np.ndarray:
    """bool as `logits`: the forced blocks, and those above the threshold or the best, `top_k` with the forced ones."""
    probability, mask = softmax(logits), np.array(np.broadcast_to(forced, logits.shape))
    for row in np.ndindex(logits.shape[:-1]):
        visible = [c for c in range(logits.shape[-1]) if logits[row][c] > -np.inf and not mask[row][c]]
        if top_k is None:
            mask[row][[c for c in visible if probability[row][c] > threshold]] = True
        else:
            best = sorted(visible, key=lambda c: (-probability[row][c], c))
            mask[row][best[: max(top_k - mask[row].sum(), 0)]] = True
    return mask
