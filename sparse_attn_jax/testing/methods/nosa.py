"""NOSA: the importance of each block, and the lists that it fills up."""

import numpy as np


def block_importance(importance, positions, *, block_size: int, kernel: tuple[int, int], causal: bool = True) -> np.ndarray:
    """The highest mean importance of a visible unit that has a token in the block: [batch, heads, q_len, num_kv_blocks].

    `importance` is [batch, heads, kv_len]; `positions` are absolute, [batch, q_len]. -inf for a block without such a unit.
    """
    importance, (size, stride) = np.asarray(importance, np.float64), kernel
    batch, heads, kv_len = importance.shape
    found = np.full((batch, heads, positions.shape[1], -(-kv_len // block_size)), -np.inf)
    for first in range(0, kv_len - size + 1, stride):
        blocks = sorted({token // block_size for token in range(first, first + size)})
        mean = importance[:, :, first : first + size].mean(axis=-1)
        for b, i in np.ndindex(positions.shape):
            if not causal or first + size - 1 <= positions[b, i]:
                found[b, :, i, blocks] = np.maximum(found[b, :, i, blocks], mean[b])
    return found


def fill(first: np.ndarray, scores: np.ndarray, positions, *, top_k: int, block_size: int, causal: bool = True) -> np.ndarray:
    """Lists with what `first` has and the blocks of the highest score besides: int [batch, heads, q_len, top_k]."""
    lists = np.full((*scores.shape[:3], top_k), -1)
    for b, h, i in np.ndindex(*scores.shape[:3]):
        kept = [block for block in first[b, h, i] if block >= 0]
        last = positions[b, i] // block_size if causal else scores.shape[3]
        row = scores[b, h, i]
        others = [block for block in np.flatnonzero(row > -np.inf) if block not in kept and block <= last]
        others.sort(key=lambda block: (-row[block], block))  # noqa: B023
        chosen = sorted(kept + others[: top_k - len(kept)])
        lists[b, h, i, : len(chosen)] = chosen
    return lists
