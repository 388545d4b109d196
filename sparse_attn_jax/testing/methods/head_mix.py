"""MIT's Block-Sparse-Attention: which key each query sees, by the kinds of the heads."""

import math

import numpy as np


def mask(
    kinds, sinks, local, *, unit, block_size, offsets, q_len, kv_len, is_causal, block_mask=None
) -> np.ndarray:  # fmt: skip
    """bool [batch, num_q_heads, q_len, kv_len], causality included. `sinks` and `local` are by head, `offsets` by batch row."""
    found = np.zeros((len(offsets), len(kinds), q_len, kv_len), bool)
    for b, h in np.ndindex(found.shape[:2]):
        if kinds[h] == -1:
            arguments = (sinks[h], local[h], offsets[b], q_len, kv_len)
            found[b, h] = stream_tokens(*arguments) if unit == "token" else stream_blocks(*arguments, block_size, is_causal)
        elif kinds[h] == 1:
            rows = np.asarray(block_mask)[b % len(block_mask), kinds[:h].count(1)]
            found[b, h] = np.kron(rows, np.ones((block_size, block_size), bool))[:q_len, :kv_len]
        else:
            found[b, h] = True
        if is_causal:
            found[b, h] &= np.arange(kv_len) <= np.arange(q_len)[:, None] + offsets[b]
    return found


def stream_blocks(sinks, local, offset, q_len, kv_len, block_size, is_causal) -> np.ndarray:
    """bool [q_len, kv_len], by the formula of the kernel, with T_k - T_q = offset."""
    num_columns = math.ceil(kv_len / block_size)
    start = max(-offset // block_size, 0)
    seen = np.zeros((q_len, kv_len), bool)
    for i in range(start if is_causal else 0, math.ceil(q_len / block_size)):
        right = math.ceil(max(offset, 0) / block_size) + 1 + i - start if is_causal else num_columns
        for j in range(num_columns):
            is_seen = right - local <= j < right or j < min(sinks, right)
            seen[i * block_size : (i + 1) * block_size, j * block_size : (j + 1) * block_size] = is_seen
    return seen


def stream_tokens(sinks, local, offset, q_len, kv_len) -> np.ndarray:
    """bool [q_len, kv_len]."""
    i, j = np.arange(q_len)[:, None], np.arange(kv_len)
    return (j <= i + offset) & ((j < sinks) | (j >= i + offset - (local - 1)))
