"""DeepSeek sparse attention: the indexer's scores, the tokens that it selects, and the divergence that it learns from."""

import numpy as np


def scores(index_query, index_key, weights) -> np.ndarray:
    """sum over heads j of weights[t, j] * max(index_query[t, j] . index_key[s], 0): [batch, q_len, kv_len]."""
    index_query, index_key, weights = (np.asarray(x, np.float64) for x in (index_query, index_key, weights))
    found = np.zeros((*index_query.shape[:2], index_key.shape[1]))
    for b, t, s in np.ndindex(found.shape):
        found[b, t, s] = weights[b, t] @ np.maximum(index_query[b, t] @ index_key[b, s], 0.0)
    return found


def token_mask(scores: np.ndarray, positions, top_k: int, causal: bool = True) -> np.ndarray:
    """The `top_k` visible tokens of the highest score, the lower id first among equals: bool [batch, q_len, kv_len]."""
    mask = np.zeros(scores.shape, bool)
    for b, t in np.ndindex(scores.shape[:2]):
        visible = [s for s in range(scores.shape[2]) if not causal or s <= positions[b, t]]
        visible.sort(key=lambda s: (-scores[b, t, s], s))  # noqa: B023
        mask[b, t, visible[:top_k]] = True
    return mask


def target(query, key, lse, mask: np.ndarray, scale: float | None = None) -> np.ndarray:
    """The attention's probabilities summed over heads and normalised, over the keys of `mask` [batch, q_len, kv_len]."""
    query, key, lse = (np.asarray(x, np.float64) for x in (query, key, lse))
    key = key.repeat(query.shape[2] // key.shape[2], axis=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = np.zeros(mask.shape)
    for b, t, s in np.argwhere(mask):
        found[b, t, s] = np.exp(scale * (query[b, t] * key[b, s]).sum(axis=-1) - lse[b, t]).sum()
    total = found.sum(axis=-1, keepdims=True)
    return found / np.where(total > 0, total, 1.0)


def divergence(target: np.ndarray, scores: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(target || softmax of the scores over `mask`), [batch, q_len], and its gradient with respect to the scores."""
    index = np.exp(np.where(mask, scores, -np.inf) - np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True, initial=-1e30))
    index = index / np.maximum(index.sum(axis=-1, keepdims=True), 1e-300)
    ratio = np.where(target > 0, target, 1.0) / np.where(target > 0, index, 1.0)
    has_keys = mask.any(axis=-1)
    return np.where(has_keys, (target * np.log(ratio)).sum(axis=-1), 0.0), np.where(has_keys[..., None], index - target, 0.0)
