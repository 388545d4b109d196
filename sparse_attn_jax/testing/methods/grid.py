"""MMInference's grid heads."""

import numpy as np

from sparse_attn_jax.testing.methods import probe


def choose(query, key, positions, *, strides, num_local, num_sinks, num_probe) -> np.ndarray:
    """(stride, phase) of each head: int [batch, num_q_heads, 2]."""
    weights, probed = probe.probe_attention(query, key, positions, num_probe)
    chosen = np.zeros((*weights.shape[:2], 2), int)
    for b, h in np.ndindex(weights.shape[:2]):
        free = np.array([j for j in range(weights.shape[3]) if num_sinks <= j <= probed[b, 0] - num_local], int)
        mass = weights[b, h].sum(axis=0)
        best = -np.inf
        for stride in strides:
            for phase in range(stride):
                on_grid = free[free % stride == phase]
                excess = mass[on_grid].sum() - mass[free].sum() * len(on_grid) / max(len(free), 1)
                if excess > best + 1e-12:
                    best, chosen[b, h] = excess, (stride, phase)
    return chosen


def token_mask(chosen: np.ndarray, positions: np.ndarray, kv_len: int, *, num_local: int, num_sinks: int) -> np.ndarray:
    """bool [batch, num_q_heads, q_len, kv_len]."""
    mask = np.zeros((*chosen.shape[:2], positions.shape[1], kv_len), bool)
    for b, h, i, j in np.ndindex(mask.shape):
        (stride, phase), distance = chosen[b, h], positions[b, i] - j
        mask[b, h, i, j] = distance >= 0 and (j % stride == phase or distance < num_local or j < num_sinks)
    return mask
