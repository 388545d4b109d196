"""MoBA: the gate of each earlier chunk, and the chunks that a query of a head keeps."""

import numpy as np


def gates(query, key, positions, block_size: int) -> np.ndarray:
    """query . mean of the chunk's keys, -inf but for chunks before the query's own: [batch, num_q_heads, q_len, num_chunks].

    `positions` are absolute, [batch, q_len].
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, q_len, num_q_heads, _ = query.shape
    group = num_q_heads // key.shape[2]
    found = np.full((batch, num_q_heads, q_len, -(-key.shape[1] // block_size)), -np.inf)
    for b, h, i, chunk in np.ndindex(found.shape):
        tokens = key[b, chunk * block_size : (chunk + 1) * block_size, h // group]
        if chunk < positions[b, i] // block_size and len(tokens) == block_size:
            found[b, h, i, chunk] = query[b, i, h] @ tokens.mean(axis=0)
    return found


def chunk_mask(scores: np.ndarray, positions, block_size: int, top_k: int) -> np.ndarray:
    """Which chunks are kept, own included: bool of the shape of `scores`, which are `gates`. Ties go to the lower id."""
    mask = np.zeros(scores.shape, bool)
    for b, h, i in np.ndindex(*scores.shape[:3]):
        own = positions[b, i] // block_size
        ranked = sorted(np.flatnonzero(scores[b, h, i] > -np.inf), key=lambda chunk: (-scores[b, h, i, chunk], chunk))
        kept = [*ranked[: top_k - 1], own]
        mask[b, h, i, [chunk for chunk in kept if 0 <= chunk < scores.shape[3]]] = True
    return mask


def token_mask(chunks: np.ndarray, positions, block_size: int, kv_len: int) -> np.ndarray:
    """Which keys each query sees: bool [batch, num_q_heads, q_len, kv_len]."""
    is_past = np.arange(kv_len) <= np.asarray(positions)[:, None, :, None]
    return chunks.repeat(block_size, axis=-1)[..., :kv_len] & is_past
