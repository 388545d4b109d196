"""InfLLM-v2's selection of a few queries from its definition, in float64 NumPy."""

import itertools

import jax
import numpy as np

from benchmarks.workloads import Workload
from sparse_attn_jax.testing.inputs import Inputs

# Blocks whose scores are nearer than this, relative to the larger, may take each other's place.
TIE_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


def assert_selection_is_right(indices: jax.Array, workload: Workload, made: Inputs, rows: np.ndarray) -> None:
    """Raises `AssertionError` unless the lists of the queries `rows` hold the forced blocks and the best of the others."""
    selector = workload.selector
    (batch, q_len), kv_len = made.operands["query"].shape[:2], made.operands["key"].shape[1]
    query, key = (np.asarray(x, np.float64) for x in (made.operands["query"][:, rows], made.operands["key"]))
    units, coarse = (mean_units(key, *sizes) for sizes in unit_sizes(selector))
    heads, top_k = indices.shape[1], indices.shape[3]
    lists = np.asarray(indices[:, :, rows])
    group = query.shape[2] // heads
    is_causal = made.options.get("is_causal", False)
    for b, h, (i, row) in itertools.product(range(batch), range(heads), enumerate(rows)):
        position = row + kv_len - q_len
        last = position if is_causal else kv_len
        scores = block_scores(query[b, i, h * group : (h + 1) * group], units[b, :, h], coarse[b, :, h], last, kv_len, selector)
        found = lists[b, h, i]
        assert_best(found[found >= 0], scores, position, is_causal, top_k, selector, made.dtype, f"row {row} of head {h}")


def unit_sizes(selector) -> tuple[tuple[int, int], tuple[int, int]]:
    fine = selector.kernel_size, selector.kernel_stride
    return fine, (selector.coarse_kernel_size, selector.coarse_kernel_stride) if selector.coarse_lse else fine


def mean_units(key: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[batch, kv_len, heads, dim] to [batch, units, heads, dim], complete units only."""
    windows = np.lib.stride_tricks.sliding_window_view(key, size, axis=1)[:, ::stride]
    return windows.mean(axis=-1)


def block_scores(query, units, coarse, last: int, kv_len: int, selector) -> np.ndarray:
    """Scores of all blocks for one query, its group's heads [group, dim]; -inf where no unit is visible."""
    (size, stride), (coarse_size, coarse_stride) = unit_sizes(selector)
    query = query * (query.shape[-1] ** -0.5 if selector.scale is None else selector.scale)
    logits = query @ units[np.arange(len(units)) * stride + size - 1 <= last].T
    normalizer = query @ coarse[np.arange(len(coarse)) * coarse_stride + coarse_size - 1 <= last].T
    normalizer = normalizer if normalizer.shape[1] else logits
    num_kv_blocks = -(-kv_len // selector.block_size)
    scores = np.full(num_kv_blocks, -np.inf)
    if logits.shape[1] == 0:
        return scores
    weight = np.exp(logits - np.logaddexp.reduce(normalizer, axis=1, keepdims=True)).sum(axis=0)
    for block in range(num_kv_blocks):
        start = block * selector.block_size
        first = max(0, (start - size) // stride + 1)
        overlapping = weight[first : -(-(start + selector.block_size) // stride)]
        scores[block] = overlapping.max(initial=-np.inf)
    return scores


def assert_best(found, scores, position: int, is_causal: bool, top_k: int, selector, dtype: str, where: str) -> None:
    """Raises `AssertionError` unless `found` are the forced blocks and the best others, up to rounding of the scores."""
    own = position // selector.block_size
    blocks = np.arange(own + 1 if is_causal else len(scores))
    is_forced = (blocks < selector.num_sink_blocks) | ((blocks <= own) & (blocks > own - selector.num_local_blocks))
    assert set(blocks[is_forced]) <= set(found), f"{where} lacks forced blocks {sorted(set(blocks[is_forced]) - set(found))}."
    assert len(set(found)) == len(found) and set(found) <= set(blocks), f"{where} has repeated or invisible blocks: {found}."
    others = blocks[~is_forced & (scores[blocks] > -np.inf)]
    count = min(top_k - int(is_forced.sum()), len(others))
    assert len(found) == is_forced.sum() + count, f"{where} has {len(found)} blocks, expected {is_forced.sum() + count}."
    chosen = np.isin(others, found)
    if 0 < count < len(others):
        worst, best = scores[others[chosen]].min(), scores[others[~chosen]].max()
        allowed = best - TIE_TOLERANCE[dtype] * abs(best)
        assert worst >= allowed, f"{where} keeps a block of score {worst:.6g} and leaves one of {best:.6g}."
