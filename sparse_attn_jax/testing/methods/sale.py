"""SALE: blocks with a key whose rounded score stands out against the sinks and the local window."""

import numpy as np


def round_to_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """To the nearest of the 2**bits - 1 multiples of one step that are not larger than the largest of the last axis."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    step = np.where(largest > 0, largest, 1) / (2 ** (bits - 1) - 1)
    return np.round(x / step) * step


def always_kept(row: np.ndarray, num_blocks: int, *, kv_block_size: int, num_local: int, num_sink_blocks: int) -> set[int]:
    """Blocks of a row of queries at these positions."""
    first = min(row[0], row[-1] - num_local + 1)
    near = {j // kv_block_size for j in range(max(first, 0), row[-1] + 1)}
    return {c for c in near | set(range(num_sink_blocks)) if c < num_blocks and c * kv_block_size <= row[-1]}


def margins(
    query, key, positions, *, threshold, bits=4, q_block_size=64, kv_block_size=32, num_local=128, num_sink_blocks=1,
    scale=None,
) -> np.ndarray:  # fmt: skip
    """By how much the best key of a block passes the test: [batch, num_q_heads, rows, num_kv_blocks].

    A block is kept where this is positive; inf where it always is, -inf where nothing of it is visible. `threshold`: by head.
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group, kv_len = query.shape[2] // key.shape[2], key.shape[1]
    key = key - key.mean(axis=1, keepdims=True)
    mean = query.mean(axis=1, keepdims=True)
    rounded_query, rounded_key = round_to_bits(query - mean, bits), round_to_bits(key, bits)
    num_rows, num_blocks = -(-query.shape[1] // q_block_size), -(-kv_len // kv_block_size)
    found = np.full((len(query), query.shape[2], num_rows, num_blocks), -np.inf)
    for b, h, r in np.ndindex(found.shape[:3]):
        ids = range(r * q_block_size, min((r + 1) * q_block_size, query.shape[1]))
        sizes = dict(kv_block_size=kv_block_size, num_local=num_local, num_sink_blocks=num_sink_blocks)
        kept = always_kept(positions[b, ids], num_blocks, **sizes)
        found[b, h, r, sorted(kept)] = np.inf
        for i in ids:
            seen = np.arange(max(min(positions[b, i] + 1, kv_len), 0))
            near = [j for j in seen if j // kv_block_size in kept]
            reference = np.logaddexp.reduce([scale * query[b, i, h] @ key[b, j, h // group] for j in near])
            score = rounded_key[b, seen, h // group] @ rounded_query[b, i, h] + key[b, seen, h // group] @ mean[b, 0, h]
            with np.errstate(divide="ignore"):
                margin = scale * score - reference - np.log(threshold[h])
            for j in seen:
                found[b, h, r, j // kv_block_size] = max(found[b, h, r, j // kv_block_size], margin[j])
    return found
