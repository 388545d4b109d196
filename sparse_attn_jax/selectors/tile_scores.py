"""Means of tiles, and the choice of tiles by score."""

import jax
import jax.numpy as jnp

from sparse_attn_jax.block_top_k import pick_blocks
from sparse_attn_jax.permutation import TokenPermutation


def mean_of_tiles(x: jax.Array, permutation: TokenPermutation, tile_size: int) -> jax.Array:
    """Means over the tokens of each tile, padding not counted.

    Args:
      x: [batch, permuted_len, heads, dim], zero at the padding.
      permutation: into tiles, the same for all heads; no tile is empty.
      tile_size: tokens of a tile, padding counted.

    Returns:
      float32 (float64 for float64 inputs) [batch, tiles, heads, dim].
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    counts = (permutation.order >= 0).reshape(-1, tile_size).sum(axis=1)
    sums = x.reshape(x.shape[0], -1, tile_size, *x.shape[2:]).sum(axis=2, dtype=dtype)
    return sums / counts[:, None, None].astype(dtype)


def pick_tiles(scores: jax.Array, top_k: int) -> jax.Array:
    """The tiles with the highest scores, the lower id first among equals, NaN never.

    Args:
      scores: floats [batch, heads, kv tiles, q tiles].
      top_k: slots.

    Returns:
      int32 [batch, heads, q tiles, top_k], ascending, -1 last.
    """
    positions = jnp.zeros((1, scores.shape[3]), jnp.int32)
    forced = dict(num_sink_blocks=0, num_local_blocks=0, is_causal=False)
    ids = pick_blocks(scores.astype(jnp.float32), positions, top_k=top_k, block_size=1, **forced)
    return ids.swapaxes(2, 3)
