"""Attention over pages as a custom call of the hand-written CUDA kernels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.pools import join_mapped_pools
from sparse_attn_jax.paged_problem import PagedOperands, PagedProblem
from sparse_attn_jax.selection import num_blocks

# The sizes of pages and of blocks are multiples of it.
RUN_TOKENS = 16

# Thread blocks that fill a GPU, and tokens for which it is worth while to start one.
ENOUGH_THREAD_BLOCKS = 512
MIN_SPLIT_TOKENS = 256
# Rows of a thread block: query heads times queries that share a list.
FEW_ROWS, MANY_ROWS = 16, 64

NO_BLOCK = jnp.iinfo(jnp.int32).max


def _entry_point(list_heads: str) -> EntryPoint:
    return EntryPoint(
        library.custom_call(library.PAGED_ATTENTION),
        (
            *("bshd", "gukd", "gukd", "Tm", "S"),  # query, key_pages, value_pages, block_tables, seq_lens
            *(f"L{list_heads}rc", f"C{list_heads}r"),  # blocks, counts
            *("Wh", "Nh"),  # window_left, num_sinks
        ),
        (
            Result("out", "bshd"),
            Result("lse", "bsh", "float32"),
            Result("partial_out", "bnshd", "float32"),
            Result("partial_lse", "bnsh", "float32"),
        ),
    )


ATTEND, ATTEND_PER_QUERY_HEAD = _entry_point("p"), _entry_point("h")


def attend_pages(problem: PagedProblem, operands: PagedOperands) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the keys that count for it, see `paged_block_sparse_attention`.

    Returns:
      out [batch, q_len, num_q_heads, head_dim] in the query's dtype, and the natural-log lse [batch, q_len, num_q_heads],
      float32.
    """
    blocks, counts = make_lists(problem, operands)
    splits = choose_num_splits(problem)
    call = ATTEND_PER_QUERY_HEAD if problem.selection_heads not in (1, problem.num_kv_heads) else ATTEND
    attributes = library.call_attributes(problem) | dict(
        scale=np.float32(problem.scale),
        logits_soft_cap=np.float32(problem.logits_soft_cap or 0),
        block_size=np.int32(problem.selection_block_size),
        num_splits=np.int32(splits),
    )
    without = ("partial_out", "partial_lse") if splits == 1 else ()

    def attend(query, key_pages, value_pages, *arrays):
        return call(query, key_pages, value_pages, *arrays, sizes=dict(n=splits), without=without, **attributes)[:2]

    options = (None if x is None else x[None] for x in (operands.window_left, operands.num_sinks))
    pools = operands.key_pages, operands.value_pages
    return join_mapped_pools(attend, operands.query, pools, operands.block_tables, operands.seq_lens, blocks, counts, *options)


def choose_num_splits(problem: PagedProblem) -> int:
    """Enough thread blocks to fill a GPU, as far as the lists are long enough."""
    if problem.num_splits is not None:
        return problem.num_splits
    heads = max(problem.selection_heads, problem.num_kv_heads)
    rows = problem.q_len // problem.selection_rows * (problem.num_q_heads // heads)
    tiles = num_blocks(rows, FEW_ROWS if rows <= FEW_ROWS else MANY_ROWS)
    thread_blocks = problem.batch * heads * problem.selection_rows * tiles
    tokens = min(problem.list_len * problem.selection_block_size, problem.kv_len)
    return max(1, min(num_blocks(ENOUGH_THREAD_BLOCKS, thread_blocks), tokens // MIN_SPLIT_TOKENS))


def make_lists(problem: PagedProblem, operands: PagedOperands) -> tuple[jax.Array, jax.Array]:
    """The blocks that some query of a list may see, once each and before all else, ascending; and how many they are.

    Returns:
      int32 [batch or 1, selection_heads, selection_rows, list_len] and int32 [batch, selection_heads, selection_rows].
    """
    heads, rows, block_size = problem.selection_heads, problem.selection_rows, problem.selection_block_size
    if operands.page_selection is None:
        ids = jnp.arange(problem.num_blocks, dtype=jnp.int32).reshape(1, 1, 1, -1)
        is_listed = jnp.ones_like(ids, bool)
    else:
        ids = jnp.sort(operands.page_selection, axis=-1)
        is_new = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1)
        is_listed = is_new & (ids >= 0) & (ids < problem.num_blocks)
    start = jnp.clip(ids, 0, problem.num_blocks - 1) * block_size
    queries = problem.q_len // rows  # of a list
    first = operands.seq_lens[:, None] - problem.q_len + queries * jnp.arange(rows, dtype=jnp.int32)
    first = first[:, None, :, None]
    is_listed &= start < first + queries
    if problem.has_window:
        widest = lambda x: x.reshape(heads, -1).max(axis=1)[:, None, None]
        is_near = start + block_size > first - widest(operands.window_left)
        is_listed &= is_near | (start < widest(operands.num_sinks)) if problem.has_sinks else is_near
    counts = is_listed.sum(axis=-1, dtype=jnp.int32)
    if operands.page_selection is not None or problem.has_window:
        ids = jnp.sort(jnp.where(is_listed, ids, NO_BLOCK), axis=-1)
    return ids, jnp.broadcast_to(counts, (problem.batch, heads, rows))


def reasons_of_sizes(problem: PagedProblem) -> Sequence[str]:
    """Reasons against the sizes of a problem, whatever was compiled."""
    reasons = []
    if problem.value_head_dim != problem.head_dim:
        reasons.append(f"value_head_dim is {problem.value_head_dim}; supported: head_dim, which is {problem.head_dim}")
    for name in ("page_size", "selection_block_size"):
        if getattr(problem, name) % RUN_TOKENS:
            reasons.append(f"{name} is {getattr(problem, name)}; supported: multiples of {RUN_TOKENS}")
    return reasons
