"""Block lists of all queries, from those of some at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_attn_jax.selection import num_blocks


def map_chunks(select: Callable[[jax.Array], jax.Array], q_len: int, chunk: int) -> jax.Array:
    """The lists of all queries, int32 [batch, heads, q_len, slots].

    Args:
      select: for the number of a first query, the lists of `chunk` queries from it on, int32 [batch, heads, slots, chunk].
      q_len: of all queries.
      chunk: at most `q_len`.
    """
    num_chunks = num_blocks(q_len, chunk)
    # The last chunk ends with the last query and repeats some of the chunk before it: a padded query would be a copy of it.
    starts = jnp.minimum(jnp.arange(num_chunks, dtype=jnp.int32) * chunk, q_len - chunk)
    ids = jax.lax.map(select, starts).swapaxes(3, 4)  # [num_chunks, batch, heads, chunk, slots]
    whole = jnp.moveaxis(ids[:-1], 0, 2).reshape(*ids.shape[1:3], (num_chunks - 1) * chunk, ids.shape[4])
    return jnp.concatenate([whole, ids[-1][:, :, num_chunks * chunk - q_len :]], axis=2)
