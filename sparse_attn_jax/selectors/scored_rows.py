"""What selectors share that compute the scores of every query themselves: lists of all queries, some of them at a time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sparse_attn_jax.block_top_k import pick_blocks
from sparse_attn_jax.query_chunks import map_chunks

# Elements held at once, and queries: a few hundred keep a matrix unit busy.
CHUNK_ELEMENTS = 2**24
MAX_CHUNK = 512


def pick_rows(
    score: Callable[..., jax.Array],
    per_query: Sequence[jax.Array],
    positions: jax.Array,
    *,
    num_heads: int,
    elements_per_query: int,
    top_k: int,
    block_size: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    is_causal: bool,
) -> jax.Array:
    """`pick_blocks` of scores that are never held for all queries at once.

    Args:
      score: for some successive queries, the scores: `score(*rows of per_query, rows of positions)` is float32
        [batch, num_heads, num_kv_blocks, rows].
      per_query: arrays [batch, q_len, ...] that `score` gets a piece of.
      positions: int32 [batch or 1, q_len], absolute.
      num_heads: lists per query.
      elements_per_query: what `score` holds for a query of all batch rows, which decides how many it gets at a time.
      top_k, block_size, num_sink_blocks, num_local_blocks, is_causal: as in `pick_blocks`.

    Returns:
      int32 [batch, num_heads, q_len, top_k], ascending, -1 last.
    """
    batch, q_len = per_query[0].shape[:2]
    if q_len == 0:
        return jnp.zeros((batch, num_heads, 0, top_k), jnp.int32)
    chunk = min(max(CHUNK_ELEMENTS // max(elements_per_query, 1), 1), MAX_CHUNK, q_len)

    def select_chunk(start):
        rows = [jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (*per_query, positions)]
        return pick_blocks(
            score(*rows),
            rows[-1],
            top_k=top_k,
            block_size=block_size,
            num_sink_blocks=num_sink_blocks,
            num_local_blocks=num_local_blocks,
            is_causal=is_causal,
        )

    return map_chunks(select_chunk, q_len, chunk)
