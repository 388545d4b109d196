"""Extrema of blocks, and block selection by bounds, in XLA."""

import jax
import jax.numpy as jnp

from sparse_attn_jax import jax_compat
from sparse_attn_jax.block_bounds import block_extrema, bound_scores, list_by_limits, read_blocks, stack_bounds
from sparse_attn_jax.bound_problem import BoundOperands, BoundProblem, ExtremaProblem
from sparse_attn_jax.page_tables import look_up


def find_extrema(
    problem: ExtremaProblem, key: jax.Array, block_tables: jax.Array | None, blocks: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Maximum and minimum of the channels of blocks of keys, over the tokens before a length.

    Args:
      problem: static description.
      key: [batch, kv_len, num_kv_heads, head_dim], or with tables [num_pages, page_size, num_kv_heads, head_dim].
      block_tables: int32 [batch, max_pages], or `None`.
      blocks: int32 [batch, n], at least 0.
      lengths: int32 [batch].

    Returns:
      [batch, n, num_kv_heads, head_dim] each, dtype of key; -inf and inf for a block without a token.
    """
    tokens, positions, exists = read_blocks(key, block_tables, blocks, problem.block_size)
    return block_extrema(tokens, exists & (positions < lengths[:, None, None]))


def select_by_bounds(problem: BoundProblem, operands: BoundOperands) -> jax.Array:
    """The blocks that are kept and those with the highest bounds, see `BoundOperands`.

    Returns:
      int32 [batch, num_kv_heads (num_q_heads if `group` is `None`), q_len, top_k], ascending, -1 last.
    """
    extrema, has_place = (operands.maximum, operands.minimum), None
    if problem.page_rows is not None:
        extrema, has_place = _read_pages(problem, operands)
    scores = bound_scores(operands.query, stack_bounds(*extrema), problem.group)
    if has_place is not None:
        scores = jnp.where(has_place[:, None, :, None], scores, -jnp.inf)
    return list_by_limits(scores, operands.limits, problem.top_k).swapaxes(2, 3)


def _read_pages(problem: BoundProblem, operands: BoundOperands) -> tuple[list[jax.Array], jax.Array]:
    """The extrema of every block there is room for, [batch, num_blocks, ...], and which lie in a page, [batch, num_blocks]."""
    tables = operands.block_tables
    num_pages = operands.maximum.shape[0]
    pages = look_up(tables, jnp.broadcast_to(jnp.arange(tables.shape[1], dtype=jnp.int32), tables.shape), num_pages)
    extrema = []
    for x in (operands.maximum, operands.minimum):
        found = jax_compat.to_bits(x).at[pages].get(mode="fill", fill_value=0)
        extrema.append(jax_compat.from_bits(found, x.dtype).reshape(problem.batch, problem.num_blocks, *x.shape[2:]))
    return extrema, jnp.repeat(pages < num_pages, problem.page_rows, axis=1)
