"""What selectors whose lists follow from positions alone share."""

import numbers

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import num_blocks


def check_call(query: jax.Array, key: jax.Array, is_causal: bool, q_offset: int | jax.Array | None) -> None:
    """Raises `ValueError` for arguments that no selector takes."""
    checks.check_key(key)
    checks.check_query(query, key, "key")
    checks.check_bool("is_causal", is_causal)
    checks.check_q_offset(q_offset, query.shape[0], query.shape[1], key.shape[1])


def check_is_causal(pattern: str, is_causal: bool) -> None:
    """Raises `ValueError` if a pattern that knows no future is asked for attention that is not causal."""
    if not is_causal:
        raise ValueError(f"`is_causal` is False; the pattern of {pattern} looks back only, so it must be True.")


def first_positions(q_offset: int | jax.Array | None, q_len: int, kv_len: int, block_size: int) -> tuple[int, jax.Array]:
    """The rows of a selection whose blocks are counted from absolute position 0.

    Returns:
      queries per row: `block_size` if blocks of queries start where blocks of keys do, which only a Python int tells, else 1;
      and the position of each row's first query, int32 [batch or 1, rows].
    """
    offset = kv_len - q_len if q_offset is None else q_offset
    is_aligned = isinstance(offset, numbers.Integral) and offset % block_size == 0
    q_block_size = block_size if is_aligned else 1
    num_queries = num_blocks(q_len, q_block_size) * q_block_size
    return q_block_size, absolute_positions(offset, num_queries, kv_len)[:, ::q_block_size]


def block_positions(
    q_offset: int | jax.Array | None, q_len: int, kv_len: int, q_block_size: int
) -> tuple[jax.Array, jax.Array]:
    """The positions of the first and the last query of each block of queries, which are counted from query 0.

    Returns:
      two of int32 [batch or 1, num_q_blocks]. The last block ends with the last query.
    """
    positions = absolute_positions(q_offset, q_len, kv_len)
    first = positions[:, ::q_block_size]
    return first, jnp.minimum(first + q_block_size - 1, positions[:, -1:])
