"""Extrema of the keys of a block, bounds on their products with queries, and lists of the blocks with the highest, in XLA."""

import jax
import jax.numpy as jnp

from sparse_attn_jax.block_top_k import list_highest
from sparse_attn_jax.page_tables import look_up
from sparse_attn_jax.paged_cache import load


def block_extrema(tokens: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maxima and minima over the tokens that exist.

    Args:
      tokens: [batch, blocks, block_size, num_kv_heads, head_dim].
      exists: bool, broadcasts with [batch, blocks, block_size].

    Returns:
      [batch, blocks, num_kv_heads, head_dim] each, NaN where a token has one. A block without a token has -inf and inf, and
      scores -inf or NaN: it is not chosen.
    """
    exists = exists[..., None, None]
    maximum, minimum = jnp.where(exists, tokens, -jnp.inf).max(axis=2), jnp.where(exists, tokens, jnp.inf).min(axis=2)
    # On a CPU, XLA's reductions lose a NaN or keep it, as the compiler likes.
    has_nan = (exists & jnp.isnan(tokens)).any(axis=2)
    return jnp.where(has_nan, jnp.nan, maximum), jnp.where(has_nan, jnp.nan, minimum)


def read_blocks(key: jax.Array, block_tables: jax.Array | None, blocks: jax.Array, block_size: int):
    """The tokens of int32 [batch, n] blocks: [batch, n, block_size, num_kv_heads, head_dim], positions, and which exist."""
    positions = blocks[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
    if block_tables is None:
        sequence = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None, None]
        exists = positions < key.shape[1]
        return load(key, (sequence, jnp.where(exists, positions, 0))), positions, exists
    num_pages, page_size = key.shape[:2]
    page = look_up(block_tables, positions // page_size, num_pages)
    return load(key, (page, positions % page_size)), positions, page < num_pages


def stack_bounds(maximum: jax.Array, minimum: jax.Array) -> jax.Array:
    """Extrema [batch, num_blocks, num_kv_heads, head_dim] as `bound_scores` takes them: float32, one after the other."""
    return jnp.concatenate([maximum, minimum], axis=-1).astype(jnp.float32)


def bound_scores(query: jax.Array, bounds: jax.Array, group: str | None) -> jax.Array:
    """The bounds float32 [batch, heads, num_blocks, queries] of queries [batch, queries, num_q_heads, head_dim].

    max(q M, q m) is q M for a positive q and q m for a negative one, so that both make one product of matrices.

    Args:
      query: [batch, queries, num_q_heads, head_dim].
      bounds: float32 [batch, num_blocks, num_kv_heads, 2 * head_dim], the maxima and the minima.
      group: what becomes of the query heads of a KV head, as of `Quest`.
    """
    batch, num_queries, num_q_heads, head_dim = query.shape
    num_kv_heads = bounds.shape[2]
    query = query.astype(jnp.float32).reshape(batch, num_queries, num_kv_heads, -1, head_dim)
    if group == "mean_q":
        query = query.mean(axis=3, keepdims=True)
    signed = jnp.concatenate([jnp.maximum(query, 0), jnp.minimum(query, 0)], axis=-1)
    scores = jnp.einsum("bqngd,bknd->bngkq", signed, bounds, precision=jax.lax.Precision.HIGHEST)
    if group is None:
        return scores.reshape(batch, num_q_heads, -1, num_queries)
    return scores.mean(axis=2) if group == "mean_bound" else scores.max(axis=2)


def list_by_limits(scores: jax.Array, limits: jax.Array, top_k: int) -> jax.Array:
    """Lists int32 [batch, heads, top_k, queries], ascending, -1 last, as `BoundOperands` has it.

    Args:
      scores: float32 [batch, heads, num_blocks, queries].
      limits: int32 [batch or 1, queries, 4].
      top_k: slots.
    """
    ids = jnp.arange(scores.shape[2], dtype=jnp.int32)[:, None]
    end_of_first, begin_of_last, end_of_last, end_of_scored = (limits[:, None, None, :, i] for i in range(4))
    kept = (ids < end_of_first) | ((ids >= begin_of_last) & (ids < end_of_last))
    return list_highest(scores, kept | (ids < end_of_scored), kept, top_k)
