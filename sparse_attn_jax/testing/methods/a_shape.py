"""MInference: which key each query sees in an A-shape and in a tri-shape."""

import numpy as np


def mask(offsets, q_len: int, kv_len: int, num_initial: int, num_local: int, num_last: int = 0) -> np.ndarray:
    """bool [batch, q_len, kv_len]; `offsets` are by batch row. The last `num_last` queries are dense: 0 is an A-shape."""
    found = np.zeros((len(offsets), q_len, kv_len), bool)
    for b, query, key in np.ndindex(found.shape):
        distance = query + offsets[b] - key
        is_kept = key < num_initial or distance < num_local or query >= q_len - num_last
        found[b, query, key] = distance >= 0 and is_kept
    return found
