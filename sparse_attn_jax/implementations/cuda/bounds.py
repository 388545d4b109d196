"""Extrema of blocks, and block selection by bounds, as custom calls of the hand-written CUDA kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.bound_problem import BoundOperands, BoundProblem, ExtremaProblem
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.pools import join_mapped_pools

# Of shared memory, for the queries of a KV head as two float32 each.
MOST_QUERY_BYTES = 163 * 1024


@functools.cache
def _extrema_entry_point(is_paged: bool, dtype: str) -> EntryPoint:
    return EntryPoint(
        library.custom_call(library.BLOCK_EXTREMA),
        ("bm", "gukd" if is_paged else "Ktkd", "Tz", "L"),  # blocks, keys, block_tables, lengths
        (Result("maximum", "bmkd", dtype), Result("minimum", "bmkd", dtype)),
    )


def find_extrema(
    problem: ExtremaProblem, key: jax.Array, block_tables: jax.Array | None, blocks: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `implementations.xla.bounds.find_extrema`."""
    library.load(problem.platform)
    call = _extrema_entry_point(block_tables is not None, problem.dtype)
    attributes = dict(block_size=np.int32(problem.block_size), seed=library.seed())

    def find(blocks, key, block_tables, lengths):
        return call(blocks, key, block_tables, lengths, **attributes)

    if block_tables is None:
        return find(blocks, key, None, lengths)
    return join_mapped_pools(find, blocks, (key,), block_tables, lengths)


@functools.cache
def _entry_point(is_paged: bool, list_heads: str) -> EntryPoint:
    extrema = "gukd" if is_paged else "Utkd"
    return EntryPoint(
        library.custom_call(library.SELECT_BY_BOUNDS),
        ("bshd", extrema, extrema, "Tm", "Lsf"),
        (Result("indices", f"b{list_heads}sn", "int32"), Result("scores", f"b{list_heads}sv", "float32")),
    )


def select_by_bounds(problem: BoundProblem, operands: BoundOperands) -> jax.Array:
    """As `implementations.xla.bounds.select_by_bounds`."""
    heads = problem.num_q_heads if problem.group is None else problem.num_kv_heads
    if problem.num_blocks == 0:
        return jnp.full((problem.batch, heads, problem.q_len, problem.top_k), -1, jnp.int32)
    library.load(problem.platform)
    call = _entry_point(problem.page_rows is not None, "h" if problem.group is None else "k")
    sizes = dict(n=problem.top_k, v=problem.num_blocks)
    attributes = dict(top_k=np.int32(problem.top_k), reduction=problem.group or "none", seed=library.seed())

    def select(*arrays):
        return call(*arrays, sizes=sizes, **attributes)[:1]

    extrema = operands.maximum, operands.minimum
    arrays = operands.query, *extrema, operands.block_tables, operands.limits
    if problem.page_rows is None:
        return select(*arrays)[0]
    return join_mapped_pools(select, operands.query, extrema, operands.block_tables, operands.limits)[0]


def reasons_of_bounds(problem: BoundProblem) -> list[str]:
    """Reasons against a problem, whatever was compiled."""
    reasons = []
    if problem.extrema_dtype != problem.dtype:
        reasons.append(f"the metadata is {problem.extrema_dtype}; supported: the dtype of query, which is {problem.dtype}")
    most = MOST_QUERY_BYTES // (8 * problem.head_dim)
    if problem.group != "mean_q" and problem.group_size > most:
        reasons.append(f"the group size is {problem.group_size}; supported with this head_dim: at most {most}")
    return reasons
