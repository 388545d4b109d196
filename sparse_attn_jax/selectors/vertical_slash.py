"""`VerticalSlash`: the columns and the diagonals of the attention map that the last queries pay most attention to."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import block_extremes, max_touched_blocks, row_positions, top_k_mask
from sparse_attn_jax.selectors.probe import check_causal_call, probe_mass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VerticalSlashPredicate:
    """Keeps the keys of some columns, and those at some distances. Causality is the op's own mask.

    Attributes:
      column_keep: bool [batch, num_q_heads, kv_len], by the key's position.
      diagonal_keep: bool [batch, num_q_heads, kv_len], by the distance from the query back to the key.
    """

    column_keep: jax.Array
    diagonal_keep: jax.Array

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise. No distance beyond kv_len - 1 is kept."""
        last = self.column_keep.shape[-1] - 1
        distance = q_position - kv_position
        is_diagonal = self.diagonal_keep[batch, head, jnp.clip(distance, 0, last)] & (distance >= 0) & (distance <= last)
        return self.column_keep[batch, head, jnp.clip(kv_position, 0, last)] | is_diagonal


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """The vertical-slash pattern of MInference, for the prefill of a causal model; no parameters, a list per query head.

    The last queries attend to every key; summed over them, the attention on each key and at each distance says which columns
    and diagonals of the map all queries keep:

      query i sees key j <= i if j is one of `num_vertical` columns or i - j one of `num_slash` distances

    The first columns and the nearest distances are always among them. A budget that exceeds the length is clipped to it; the
    lower column and the shorter distance win a tie.

    `exact` attends to those pairs and nothing else, as the paper says: a predicate goes with the lists of all tiles that a kept
    pair lies in. Without it those tiles are whole (causality remains): without a predicate kernels can run it, on more pairs.
    MInference's kernel lies between the two: for a tile of queries it attends, whole, to the range of keys that each diagonal
    crosses (unaligned, where we take the one or two blocks of keys that it lies in), and to the single columns outside the
    ranges. Where ranges overlap it lengthens the earlier one by a whole block, past the end of the later; ours ends where
    the tile does. It also raises budgets below 30 columns and 50 distances to those; ours are as given.

    Which keys an early query sees depends on the last queries (not `causal_safe`).

    Attributes:
      num_vertical: columns, the forced ones included.
      num_slash: distances, the forced ones included.
      num_forced_columns: leading keys that every query sees.
      num_forced_diagonals: nearest keys that every query sees, its own position included.
      num_probe: last queries whose attention decides, or all if there are fewer.
      exact: attend to the kept pairs only, or to the whole of every tile that has one.
      block_size: tokens per block, of queries and of keys.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    num_vertical: int = 1000
    num_slash: int = 6096
    num_forced_columns: int = 30
    num_forced_diagonals: int = 100
    num_probe: int = 64
    exact: bool = True
    block_size: int = 64
    scale: float | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        checks.check_int("num_forced_columns", self.num_forced_columns, 0)
        checks.check_int("num_forced_diagonals", self.num_forced_diagonals, 0)
        checks.check_int("num_vertical", self.num_vertical, self.num_forced_columns)
        checks.check_int("num_slash", self.num_slash, self.num_forced_diagonals)
        checks.check_int("num_probe", self.num_probe, 1)
        checks.check_bool("exact", self.exact)
        checks.check_int("block_size", self.block_size, 1)
        checks.check_scale(self.scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: must be True, here and in the op.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query head and block of queries, counted from query 0: int32 [batch, num_q_heads,
          num_q_blocks, num_slots], ascending, -1 last. num_slots is num_kv_blocks, or the most tiles that the budgets can
          touch (a column one, a distance two) where that is less. If `exact`, with a `VerticalSlashPredicate`.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient.
        """
        check_causal_call(self, query, key, is_causal, q_offset)
        if 0 in (query.shape[1], key.shape[1]):
            return select_every_block(query.shape[1], key.shape[1], self.block_size)
        return _select(self, *jax.lax.stop_gradient((query, key)), q_offset)

    def _num_slots(self, kv_len: int) -> int:
        """The most blocks of keys that the lists of a block of queries can need."""
        columns = num_blocks(self.num_forced_columns, self.block_size) + self.num_vertical - self.num_forced_columns
        num_free = self.num_slash - self.num_forced_diagonals
        diagonals = num_free * max_touched_blocks(self.block_size, self.block_size)
        if self.num_forced_diagonals:
            diagonals += max_touched_blocks(self.num_forced_diagonals + self.block_size - 1, self.block_size)
        return max(1, min(columns + diagonals, num_blocks(kv_len, self.block_size)))


@functools.partial(jax.jit, static_argnames="selector")
def _select(selector: VerticalSlash, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None) -> BlockSelection:
    kv_len, block_size = key.shape[1], selector.block_size
    masses = probe_mass(query, key, q_offset, num_probe=selector.num_probe, scale=selector.scale)
    ids = jnp.arange(kv_len, dtype=jnp.int32)

    def per_mass(columns, diagonals):
        return jnp.asarray([min(columns, kv_len), min(diagonals, kv_len)]).reshape(2, 1, 1, 1)

    budgets = per_mass(selector.num_vertical, selector.num_slash)
    is_forced = ids < per_mass(selector.num_forced_columns, selector.num_forced_diagonals)
    column_keep, diagonal_keep = top_k_mask(jnp.stack(masses), budgets, True, is_forced)
    first, last = row_positions(q_offset, query.shape[1], kv_len, block_size)
    first_column, _ = block_extremes(ids, column_keep, block_size)
    tiles = first_column[:, :, None] <= last[:, None, :, None]
    tiles = tiles | _crossed_tiles(diagonal_keep, first, last, block_size)
    num_slots = selector._num_slots(kv_len)
    selection = BlockSelection.from_block_mask(tiles, q_block_size=block_size, kv_block_size=block_size, num_slots=num_slots)
    predicate = VerticalSlashPredicate(column_keep, diagonal_keep) if selector.exact else None
    return dataclasses.replace(selection, predicate=predicate)


def _crossed_tiles(diagonal_keep: jax.Array, first: jax.Array, last: jax.Array, block_size: int) -> jax.Array:
    """Tiles in which a query and a key have a kept distance: bool [batch, heads, rows, num_kv_blocks].

    Args:
      diagonal_keep: bool [batch, heads, kv_len].
      first: int32 [batch or 1, rows], the position of the first query of each row.
      last: int32 [batch or 1, rows], that of the last.
      block_size: keys per block.
    """
    batch, _, kv_len = diagonal_keep.shape
    num_kept = jnp.pad(jnp.cumsum(diagonal_keep, axis=-1, dtype=jnp.int32), [(0, 0), (0, 0), (1, 0)])
    starts = jnp.arange(num_blocks(kv_len, block_size), dtype=jnp.int32) * block_size
    ends = jnp.minimum(starts + block_size, kv_len)

    def kept_below(distance):  # [batch or 1, rows, num_kv_blocks]
        distance = jnp.broadcast_to(jnp.clip(distance, 0, kv_len), (batch, *distance.shape[1:]))
        return jax.vmap(lambda counts, below: counts[:, below])(num_kept, distance)

    # A tile has every distance from that of its first query to its last key, to that of its last query to its first key.
    return kept_below(last[:, :, None] - starts + 1) > kept_below(first[:, :, None] - ends + 1)
