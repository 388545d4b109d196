"""The k-th largest of each column, for Hopper, by bisection on its bits: counts of 32 thresholds, in one Pallas kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax import jax_compat
from sparse_attn_jax.implementations.mosaic import steps
from sparse_attn_jax.selection import num_blocks

# Ranks that are compared at a time, of so many columns.
ROWS, COLUMNS = 256, 8
# Those that a thread block holds in its registers; more are read again for each bit.
MAX_HELD_ROWS = 2048
BITS = 32
# Unsigned numbers, whose order is that of signed ones once this bit of them is turned.
SIGN = np.int32(np.iinfo(np.int32).min)


def kth_largest(rank: jax.Array, count: jax.Array) -> jax.Array:
    """The largest value that at least `count` entries along axis -2 reach.

    Args:
      rank: uint32 [batch, heads, entries, queries].
      count: int32 [batch, heads, 1, queries].

    Returns:
      uint32 [batch, heads, 1, queries].
    """
    batch, heads, num_rows, queries = rank.shape
    rows = min(ROWS, num_blocks(num_rows, 64) * 64)
    padding = -num_rows % rows, -queries % COLUMNS
    rank = jnp.pad(rank, [(0, 0), (0, 0), *((0, p) for p in padding)])
    ranks = lax.bitcast_convert_type(rank, jnp.int32) ^ SIGN
    counts = jnp.pad(jnp.broadcast_to(count[:, :, 0], (batch, heads, queries)), [(0, 0), (0, 0), (0, padding[1])])

    def kth_largest(ranks, counts, found):  # the name is what profilers show
        _kernel(rows, ranks, counts, found)

    found = plgpu.kernel(
        kth_largest,
        out_type=jax.ShapeDtypeStruct(counts.shape, jnp.int32),
        **steps.blocks_of_grid(batch, heads, counts.shape[2] // COLUMNS),
    )(ranks, counts)
    return lax.bitcast_convert_type(found[:, :, None, :queries], jnp.uint32)


def _kernel(rows, ranks, counts, found):
    batch, head, item = steps.place_of()
    columns = pl.ds(item * COLUMNS, COLUMNS)
    count = steps.load_columns(counts.at[batch, head, columns])
    matrix = lambda x: lax.broadcast_in_dim(x, (rows, COLUMNS), [1])
    num_pieces = ranks.shape[2] // rows
    load = lambda piece: steps.load_matrix(ranks.at[batch, head, pl.ds(piece * rows, rows), columns])
    held = [load(piece) for piece in range(num_pieces)] if ranks.shape[2] <= MAX_HELD_ROWS else None

    def add_bit(i, threshold):
        raised = threshold | lax.shift_left(jnp.int32(1), (BITS - 1 - i).astype(jnp.int32))
        least = matrix(raised ^ SIGN)
        add = lambda reached, piece: reached + (piece >= least).astype(jnp.int32)
        nothing = matrix(count * 0)
        if held is None:
            reached = lax.fori_loop(0, num_pieces, lambda i, reached: add(reached, load(i)), nothing)
        else:
            reached = functools.reduce(add, held, nothing)
        return jnp.where(reached.sum(axis=0) >= count, raised, threshold)

    jax_compat.store_to_global(found.at[batch, head, columns], lax.fori_loop(0, BITS, add_bit, count * 0))
