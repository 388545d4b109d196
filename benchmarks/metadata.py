"""What the threads of a CTA load one by one: lists, positions, membership, lse.

Only to compare with the simulator, which counts every lane. On a GPU a warp's lanes share most of these loads, and L1 has them.
Cases with windows, segments or a bias per key load more.
"""

import numpy as np

from benchmarks.schedules import (
    ELEMENT_BYTES,
    SUM_BYTES,
    Schedule,
    Work,
    group_size,
    lists_per_tile,
    missing_keys,
    num_partials,
    parts_of_lists,
    row_pair_bytes,
    slices_of_tile,
)
from benchmarks.tile_lists import Lists, tiles_of
from sparse_attn_jax.testing.cases import Case

WORD_BYTES = 4


def metadata_bytes(schedule: Schedule, lists: Lists) -> int:
    """Of all threads. The lists must be complete: no sample."""
    words = query_major_words if schedule.owns == "queries" else key_major_words
    return int(words(schedule, lists)) * lists.repeats * WORD_BYTES


def counter_bytes(schedule: Schedule, work: Work) -> int:
    """Of the counter from which CTAs take their work: loaded, and stored again."""
    return WORD_BYTES * int(work.taken)


def delta_bytes(case: Case) -> tuple[int, int]:
    """Loaded and stored by the kernel that computes delta = sum(out * d_out) - d_lse of each row."""
    rows = case.batch * case.q_len * case.num_q_heads
    return rows * (row_pair_bytes(case) + SUM_BYTES), rows * SUM_BYTES


def query_major_words(schedule: Schedule, lists: Lists) -> int:
    """Four lanes hold a row: each loads its position, for the gradient lse and delta, and its membership in each chunk."""
    case, tiles = lists.case, tiles_of(lists, schedule.tokens)
    threads, slices = 32 * schedule.warps, slices_of_tile(schedule, case)
    rows = tiles.tokens * group_size(case)
    chunks = tiles.blocks * (case.kv_block_size // schedule.keys)
    # Of the last block there may be chunks without keys.
    empty = tiles.has_last * (missing_keys(lists) // schedule.keys)
    statistics = 0 if schedule.writes_lse else 2
    membership = (rows * (chunks - empty)).sum() * (lists_per_tile(case, schedule.tokens) > 1)
    # The length of the list, and each block once for its copy and once for its products.
    return threads * slices * (len(chunks) + 2 * chunks.sum()) + 4 * (rows.sum() * (1 + statistics) + membership)


def key_major_words(schedule: Schedule, lists: Lists) -> int:
    case, tiles = lists.case, tiles_of(lists, schedule.tokens)
    threads, slices = 32 * schedule.warps, slices_of_tile(schedule, case)
    chunks = case.kv_block_size // schedule.keys
    parts = parts_of_lists(lists, schedule.tokens, tiles.visits)
    find = sum(words_to_find_parts(row, num_partials(lists, schedule.tokens)) for row in parts)
    rows = tiles.visit_tokens.sum() * group_size(case)
    # A tile and its slot by each thread; position, lse, delta and membership of each row.
    walk = 2 * threads * slices * tiles.visits.sum() + rows * (3 + (lists_per_tile(case, schedule.tokens) > 1))
    return chunks * (threads * find + walk)


def words_to_find_parts(parts: np.ndarray, partials: int) -> int:
    """Words that a thread loads to find all parts, and those that are not there: `InverseList` in csrc/common/inverse.cuh."""
    first = np.concatenate([[0], np.cumsum(parts)])
    words = 0
    for part in range(len(parts) + partials):
        low, high = 0, len(parts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if first[middle] <= part else (low, middle)
            words += 1
        # Where the block's parts and those of the next start, twice the first, its sums; then where its list starts and ends.
        words += 4 + 2 * (part < first[-1])
    return words


def sum_partials_bytes(lists: Lists, tokens: int) -> tuple[int, int] | None:
    """Loaded and stored by the kernel that adds the sums of blocks with several parts; `None` if it is not launched."""
    if num_partials(lists, tokens) == 0:
        return None
    case, tiles = lists.case, tiles_of(lists, tokens)
    parts = parts_of_lists(lists, tokens, tiles.visits)
    keys = np.full(lists.num_kv_blocks, case.kv_block_size)
    keys[-1] -= missing_keys(lists)
    rows = (parts > 1) * keys
    loaded = 128 * 3 * WORD_BYTES * parts.size + 2 * case.head_dim * SUM_BYTES * (rows * parts).sum()
    stored = 2 * case.head_dim * ELEMENT_BYTES * rows.sum()
    return int(loaded) * lists.repeats, int(stored) * lists.repeats
