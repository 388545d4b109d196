"""Reduces what each query has for each block of keys to a row per block of queries, some queries at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_attn_jax.selection import num_blocks

REDUCTIONS = ("sum", "max")

# Elements that are held at once. On a GPU, where every step reads all keys, fewer of them would be bound by that.
MAX_VALUES = 2**25


def reduce_rows(
    values_of: Callable[[jax.Array], jax.Array],
    *,
    q_len: int,
    q_block_size: int,
    reduction: str,
    values_per_query: int,
    max_values: int = MAX_VALUES,
) -> jax.Array:
    """The sums or the maxima over blocks of queries.

    Args:
      values_of: for ids of successive queries, int32 [chunk], what they have: [batch, heads, chunk, columns], not negative.
        bool will do for "max". Ids from `q_len` on may be asked for, and do not count.
      q_len: number of queries, at least 1.
      q_block_size: queries per row of the result, counted from query 0.
      reduction: "sum" or "max".
      values_per_query: elements that `values_of` holds for each query.
      max_values: as many queries are asked for at a time as need at most so many elements, or one.

    Returns:
      [batch, heads, ceil(q_len / q_block_size), columns].
    """
    q_block_size = min(q_block_size, q_len)
    num_rows = num_blocks(q_len, q_block_size)
    rows_per_step, chunk = _step_size(max(max_values // max(values_per_query, 1), 1), q_block_size, num_rows)
    combine = jnp.add if reduction == "sum" else jnp.maximum

    def reduce_chunk(first):
        ids = first + jnp.arange(chunk, dtype=jnp.int32)
        values = values_of(ids)
        values = jnp.where((ids < q_len)[:, None], values, jnp.zeros_like(values))
        values = values.reshape(*values.shape[:2], rows_per_step, -1, values.shape[-1])
        return getattr(values, reduction)(axis=3)

    def reduce_step(step):
        first = step * max(chunk, q_block_size)
        add_chunk = lambda i, rows: combine(rows, reduce_chunk(first + i * chunk))
        return jax.lax.fori_loop(1, max(q_block_size // chunk, 1), add_chunk, reduce_chunk(first))

    num_steps = num_blocks(num_rows, rows_per_step)
    rows = jax.lax.map(reduce_step, jnp.arange(num_steps, dtype=jnp.int32))
    rows = jnp.moveaxis(rows, 0, 2)  # [batch, heads, num_steps, rows_per_step, columns]
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])[:, :, :num_rows]


def _step_size(max_queries: int, q_block_size: int, num_rows: int) -> tuple[int, int]:
    """Rows per step and queries at a time: whole blocks of queries, or an equal part of one."""
    if max_queries >= q_block_size:
        rows = min(max_queries // q_block_size, num_rows)
        return rows, rows * q_block_size
    return 1, next(size for size in range(max_queries, 0, -1) if q_block_size % size == 0)
