"""The definition of Quest in float64 NumPy, token by token, from the paper's formula; it shares no code with the library."""

import numpy as np


def extrema(key: np.ndarray, length: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Maxima and minima per channel of the blocks of key [kv_len, heads, dim]'s first `length` tokens: [blocks, heads, dim]."""
    key = np.asarray(key, np.float64)[:length]
    blocks = [key[start : start + block_size] for start in range(0, length, block_size)]
    empty = np.zeros((0, *key.shape[1:]))
    return np.array([b.max(axis=0) for b in blocks] or empty), np.array([b.min(axis=0) for b in blocks] or empty)


def bound(query: np.ndarray, maximum: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """sum_d max(q[d] M[b, d], q[d] m[b, d]) of one query [dim] for blocks [blocks, dim]."""
    return np.maximum(query * maximum, query * minimum).sum(axis=-1)


def score(query: np.ndarray, maximum: np.ndarray, minimum: np.ndarray, group: str | None) -> np.ndarray:
    """Scores [heads, blocks] of one query [num_q_heads, dim]: heads are those of KV, or of the query without a group."""
    query = np.asarray(query, np.float64)
    num_kv_heads = maximum.shape[1]
    per_group = query.shape[0] // num_kv_heads
    scores = []
    for n in range(num_kv_heads):
        queries, of_head = query[n * per_group : (n + 1) * per_group], (maximum[:, n], minimum[:, n])
        bounds = np.array([bound(q, *of_head) for q in queries])
        if group == "mean_q":
            scores.append(bound(queries.mean(axis=0), *of_head))
        elif group is None:
            scores.extend(bounds)
        else:
            scores.append(bounds.max(axis=0) if group == "max" else bounds.mean(axis=0))
    return np.array(scores)


def forced_blocks(position: int, covered: int, block_size: int, num_sinks: int = 1, num_window: int = 0) -> set[int]:
    """Blocks that a query keeps whatever their scores: those with a token up to its own that metadata of the first `covered`
    tokens does not speak of as a whole, its own, the sinks, and the `num_window` newest."""
    own = position // block_size
    kept = {own} if position >= 0 else set()
    for block in range(own + 1):
        tokens = range(block * block_size, (block + 1) * block_size)
        if any(token >= covered for token in tokens) or block < num_sinks or block > own - num_window:
            kept.add(block)
    return kept


def original_forced_blocks(seq: int, since: int, block_size: int) -> set[int]:
    """The sink and window of Ascend's `quest_block_select_paged_w`, by its formula."""
    updated = seq - since
    width = int(updated % block_size != 0) + seq // block_size - updated // block_size
    return {0} | {-(-seq // block_size) - u for u in range(1, width + 1)}


def select(scores: np.ndarray, forced: set[int], candidates: set[int], top_k: int) -> list[int]:
    """The forced blocks, then the best of the candidates: ascending, -1 last. A NaN is never among the best."""
    ranked = sorted((b for b in candidates - forced if scores[b] > -np.inf), key=lambda b: (-scores[b], b))
    chosen = sorted([*forced, *ranked[: top_k - len(forced)]])
    return chosen + [-1] * (top_k - len(chosen))


def select_all(
    query, key, positions, *, top_k, block_size, group="max", num_sinks=1, num_window=0, causal=True
) -> tuple[np.ndarray, np.ndarray]:
    """Lists [batch, heads, q_len, top_k] and scores [batch, heads, q_len, blocks], for queries at `positions` [q_len]."""
    query, key = np.asarray(query), np.asarray(key)
    lists, scores = [], []
    for b in range(query.shape[0]):
        maximum, minimum = extrema(key[b], key.shape[1], block_size)
        by_query = [score(q, maximum, minimum, group) for q in query[b]]
        blocks = set(range(len(maximum)))
        for h in range(by_query[0].shape[0]):
            for i, position in enumerate(positions):
                own = position // block_size
                if causal:
                    forced, candidates = forced_blocks(position, position, block_size, num_sinks, num_window), set(range(own))
                else:
                    forced = set(range(num_sinks)) | set(range(own - num_window + 1, own + 1))
                    candidates = blocks
                lists.append(select(by_query[i][h], forced & blocks, candidates & blocks, top_k))
        scores.append(np.array(by_query).swapaxes(0, 1))
    scores = np.array(scores)
    return np.array(lists).reshape(*scores.shape[:3], top_k), scores


def visible_mask(lists: np.ndarray, positions, block_size: int, num_q_heads: int, kv_len: int) -> np.ndarray:
    """bool [batch, num_q_heads, q_len, kv_len]: what causal attention over the listed blocks sees."""
    blocks = np.arange(kv_len) // block_size
    listed = (lists[..., None] == blocks).any(axis=-2) & (np.arange(kv_len) <= np.asarray(positions)[:, None])
    return listed.repeat(num_q_heads // lists.shape[1], axis=1)
