"""MInference's vertical-slash: the definition, and what its kernel attends to instead."""

import numpy as np

from sparse_attn_jax.testing.methods import probe


def keep(query, key, positions, *, num_vertical, num_slash, num_forced_columns, num_forced_diagonals, num_probe, scale=None):
    """The kept columns and distances: bool [batch, num_q_heads, kv_len] each."""
    weights, probed = probe.probe_attention(query, key, positions, num_probe, scale)
    columns = probe.keep_highest(weights.sum(axis=2), num_vertical, num_forced_columns)
    return columns, probe.keep_highest(probe.sum_diagonals(weights, probed), num_slash, num_forced_diagonals)


def token_mask(columns: np.ndarray, diagonals: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The pairs that are asked for: bool [batch, num_q_heads, q_len, kv_len]."""
    mask = np.zeros((*columns.shape[:2], positions.shape[1], columns.shape[2]), bool)
    for b, h, i, j in np.ndindex(mask.shape):
        distance = positions[b, i] - j
        mask[b, h, i, j] = distance >= 0 and (columns[b, h, j] or (distance < columns.shape[2] and diagonals[b, h, distance]))
    return mask


def tiles(mask: np.ndarray, block_size: int) -> np.ndarray:
    """Tiles that hold a pair of the mask: bool [batch, heads, num_q_blocks, num_kv_blocks]."""
    q_starts, kv_starts = (range(0, length, block_size) for length in mask.shape[2:])
    found = [
        [mask[:, :, i : i + block_size, j : j + block_size].any(axis=(2, 3)) for j in kv_starts] for i in q_starts
    ]  # fmt: skip
    return np.moveaxis(np.array(found), (0, 1), (2, 3))


def kernel_mask(columns: np.ndarray, diagonals: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """What the ranges and columns of the original cover, without lengthening: bool [batch, num_q_heads, q_len, kv_len].

    For the queries of a tile that ends before position `end`, distance o is the range [end - o - block_size, end - o), from 0.
    """
    mask = np.zeros((*columns.shape[:2], positions.shape[1], columns.shape[2]), bool)
    j = np.arange(columns.shape[2])
    for b, h, first in np.ndindex(*columns.shape[:2], -(-positions.shape[1] // block_size)):
        rows = slice(first * block_size, (first + 1) * block_size)
        end = positions[b, rows][0] + block_size
        attended = columns[b, h].copy()
        for distance in np.flatnonzero(diagonals[b, h][: end if end > 0 else 0]):
            range_end = max(end - distance, block_size)
            attended |= (j >= range_end - block_size) & (j < range_end)
        mask[b, h, rows] = attended & (j <= positions[b, rows, None])
    return mask
