"""Extrema of blocks, and block selection by bounds, in XLA."""

import jax
import jax.numpy as jnp

from sparse_attn_jax import jax_compat
from sparse_attn_jax.block_bounds import block_extrema, bound_scores, list_by_limits, read_blocks, stack_bounds
from sparse_attn_jax.bound_problem import BoundOperands, BoundProblem, ExtremaProblem
from sparse_attn_jax.page_tables import read_pages


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
    if operands.block_tables is not None:
        bits = (read_pages(jax_compat.to_bits(x), operands.block_tables) for x in extrema)
        (maximum, has_place), (minimum, _) = bits
        extrema = (jax_compat.from_bits(x, operands.maximum.dtype) for x in (maximum, minimum))
    scores = bound_scores(operands.query, stack_bounds(*extrema), problem.group)
    if has_place is not None:
        scores = jnp.where(has_place[:, None, :, None], scores, -jnp.inf)
    return list_by_limits(scores, operands.limits, problem.top_k).swapaxes(2, 3)
