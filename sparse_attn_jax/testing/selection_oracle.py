"""The definition of scoring and selection in float64 NumPy, token by token; it shares no code with the library."""

import numpy as np


def compress(key: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Means of complete windows: [batch, kv_len, heads, dim] to [batch, num_units, heads, dim]."""
    key = np.asarray(key, np.float64)
    starts = [start for start in range(0, key.shape[1], stride) if start + size <= key.shape[1]]
    units = [key[:, start : start + size].mean(axis=1) for start in starts]
    return np.stack(units, axis=1) if units else np.zeros((key.shape[0], 0, *key.shape[2:]))


def score(
    query, compressed, positions, *, kv_len, block_size, kernel=(32, 16), pooling="max", reduction="sum", causal=True,
    coarse=None, coarse_kernel=(128, 64), scale=None, visibility_shift=0,
) -> np.ndarray:  # fmt: skip
    """Block scores [batch, heads, q_len, num_kv_blocks] at absolute `positions` [batch, q_len].

    `visibility_shift` is a deliberate error, for tests of the tests: units that end that many tokens later are visible.
    """
    query, compressed = np.asarray(query, np.float64), np.asarray(compressed, np.float64)
    batch, q_len, num_q_heads, head_dim = query.shape
    group = num_q_heads // compressed.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    num_blocks = -(-kv_len // block_size)
    shared = shared_tokens(compressed.shape[1], kernel, block_size, num_blocks)
    scores = np.full((batch, num_q_heads // (group if reduction else 1), q_len, num_blocks), -np.inf)
    for b, h, i in np.ndindex(batch, compressed.shape[2], q_len):
        last_visible = positions[b, i] + visibility_shift if causal else kv_len
        heads = query[b, i, h * group : (h + 1) * group] * scale
        seen = visible_units(compressed.shape[1], kernel, last_visible)
        if not len(seen):
            continue
        logits = heads @ compressed[b, seen, h].T  # [group, len(seen)]
        denominator = logits
        if coarse is not None:
            seen_coarse = visible_units(coarse.shape[1], coarse_kernel, last_visible)
            if len(seen_coarse):
                denominator = heads @ np.asarray(coarse, np.float64)[b, seen_coarse, h].T
        probability = np.exp(logits - np.logaddexp.reduce(denominator, axis=1, keepdims=True))
        if reduction is not None:
            probability = getattr(np, reduction)(probability, axis=0, keepdims=True)
        rows = slice(h * len(probability), (h + 1) * len(probability))
        scores[b, rows, i] = pool(probability, shared[:, seen], kernel[1], pooling)
    return scores


def visible_units(count: int, kernel: tuple[int, int], last_visible: int) -> np.ndarray:
    size, stride = kernel
    return np.array([unit for unit in range(count) if unit * stride + size - 1 <= last_visible], int)


def shared_tokens(count: int, kernel: tuple[int, int], block_size: int, num_blocks: int) -> np.ndarray:
    """int [num_blocks, count]: how many tokens a block and a unit have in common."""
    size, stride = kernel
    units = [set(range(unit * stride, unit * stride + size)) for unit in range(count)]
    blocks = [set(range(block * block_size, (block + 1) * block_size)) for block in range(num_blocks)]
    return np.array([[len(block & unit) for unit in units] for block in blocks], int).reshape(num_blocks, count)


def pool(probability: np.ndarray, shared: np.ndarray, stride: int, pooling: str) -> np.ndarray:
    """[heads, units seen] to [heads, num_blocks], by the tokens that each block shares with each unit seen."""
    pooled = np.full((probability.shape[0], shared.shape[0]), -np.inf)
    for block in np.flatnonzero(shared.any(axis=1)):
        overlaps = shared[block] > 0
        if pooling == "max":
            pooled[:, block] = probability[:, overlaps].max(axis=1)
        else:
            pooled[:, block] = probability[:, overlaps] @ (shared[block, overlaps] / stride)
    return pooled


def select(scores, positions, *, top_k, block_size, num_sink_blocks, num_local_blocks, causal) -> np.ndarray:
    """int [batch, heads, q_len, top_k], ascending, -1 last; ties go to the lower id."""
    lists = np.full((*scores.shape[:3], top_k), -1)
    for b, h, i in np.ndindex(*scores.shape[:3]):
        own = positions[b, i] // block_size
        blocks = [block for block in range(scores.shape[3]) if not causal or block <= own]
        kept = [block for block in blocks if block < num_sink_blocks or own - num_local_blocks < block <= own]
        row = {block: float(scores[b, h, i, block]) for block in blocks if block not in kept}
        # `>` is False for NaN.
        ranked = sorted((block for block in row if row[block] > -np.inf), key=lambda block: (-row[block], block))
        chosen = sorted(kept + ranked[: top_k - len(kept)])
        lists[b, h, i, : len(chosen)] = chosen
    return lists


def window_mask(positions, kv_len: int, window: int, num_sinks: int, causal: bool) -> np.ndarray:
    """bool [batch, q_len, kv_len]: keys nearer than `window` tokens, and sinks."""
    mask = np.zeros((*positions.shape, kv_len), bool)
    for b, i, j in np.ndindex(*mask.shape):
        distance = positions[b, i] - j
        mask[b, i, j] = (abs(distance) < window or j < num_sinks) and not (causal and distance < 0)
    return mask


def assert_same_up_to_rounding(found: np.ndarray, wanted: np.ndarray, scores: np.ndarray, tolerance: float = 1e-5) -> None:
    """Lists ascend, -1 last; where two differ, the blocks they do not share must have the same scores, up to the tolerance."""
    before, after = found[..., :-1], found[..., 1:]
    assert np.all((after == -1) | ((before >= 0) & (before < after))), "a list does not ascend"
    for row in map(tuple, np.argwhere((found != wanted).any(axis=-1))):
        only_found, only_wanted = set(found[row]) - set(wanted[row]), set(wanted[row]) - set(found[row])
        assert -1 not in only_found | only_wanted and len(only_found) == len(only_wanted), (row, found[row], wanted[row])
        differing = [np.sort(scores[row][sorted(ids)]) for ids in (only_found, only_wanted)]
        np.testing.assert_allclose(*differing, rtol=tolerance, err_msg=f"row {row}: {found[row]} and {wanted[row]}")
