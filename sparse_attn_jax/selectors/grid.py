"""`Grid`: one in so many keys for each head, as attention over video frames shows it, with local keys and sinks."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import block_extremes, max_touched_blocks, row_positions
from sparse_attn_jax.selectors.probe import check_causal_call, probe_mass, probe_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GridPredicate:
    """Keeps one in `stride` keys, the nearest and the first ones. Causality is the op's own mask.

    Attributes:
      stride: int32 [batch, num_q_heads].
      phase: int32 [batch, num_q_heads], the remainder of the kept positions.
      num_local: nearest keys that are kept, the query's own included.
      num_sinks: leading keys that are kept.
    """

    stride: jax.Array
    phase: jax.Array
    num_local: int = dataclasses.field(metadata=dict(static=True))
    num_sinks: int = dataclasses.field(metadata=dict(static=True))

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise."""
        on_grid = (kv_position - self.phase[batch, head]) % self.stride[batch, head] == 0
        return on_grid | (q_position - kv_position < self.num_local) | (kv_position < self.num_sinks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PermutedGridPredicate:
    """A `GridPredicate`, and causality, for keys that each head has in an order of its own.

    Attributes:
      order: int32 [batch, num_q_heads, kv_len], the original position of each key.
      grid: the predicate of original positions.
    """

    order: jax.Array
    grid: GridPredicate

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise; `kv_position` counts in the heads' own order."""
        position = self.order[batch, head, jnp.clip(kv_position, 0, self.order.shape[-1] - 1)]
        return (position <= q_position) & self.grid(batch, head, q_position, position)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid heads of MMInference, for the prefill of a causal model over video; no parameters, a list per query head.

      query i sees key j <= i if j % stride == phase, or i - j < num_local, or j < num_sinks

    with a stride and a phase for each head, those that hold the most attention of the last queries. MMInference takes the
    highest "view" over strides and phases and does not say how views of different strides compare: sums favour short strides,
    means long ones. Ours compares a grid's share of the attention less its share of the keys, which is what it would hold if
    attention were even; keys that are kept anyway, as sinks or as local to a query of the probe, do not count. The earlier
    stride and the lower phase win a tie.

    With strides shorter than a block, a list holds almost every block: the result is exact but not fast. `grid_attention` of
    the package takes each head's keys in an order in which those on its grid are next to each other, and reads only the blocks
    that have any. MMInference permutes the queries too; keys suffice.

    Which keys an early query sees depends on the last queries (not `causal_safe`).

    Attributes:
      strides: candidates, such as the tokens of a row and of a frame.
      num_local: nearest keys that every query sees, its own included.
      num_sinks: leading keys that every query sees.
      block_size: tokens per block of the lists; the result does not depend on it, only the speed.
      num_probe: last queries whose attention decides, or all if there are fewer.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    strides: tuple[int, ...]
    num_local: int = 1024
    num_sinks: int = 128
    block_size: int = 64
    num_probe: int = 64
    scale: float | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.strides, tuple) or not self.strides:
            raise ValueError(f"`strides` is {self.strides!r}; it must be a tuple of at least one int.")
        for i, stride in enumerate(self.strides):
            checks.check_int(f"strides[{i}]", stride, 1)
        checks.check_int("num_local", self.num_local, 1)
        checks.check_int("num_sinks", self.num_sinks, 0)
        checks.check_int("block_size", self.block_size, 1)
        checks.check_int("num_probe", self.num_probe, 1)
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
          A `BlockSelection` with a `GridPredicate`, and a list per query head and block of queries, counted from query 0: int32
          [batch, num_q_heads, num_q_blocks, num_slots], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient.
        """
        check_causal_call(self, query, key, is_causal, q_offset)
        if 0 in (query.shape[1], key.shape[1]):
            return select_every_block(query.shape[1], key.shape[1], self.block_size)
        _, selection = _select(self, *jax.lax.stop_gradient((query, key)), q_offset, is_permuted=False)
        return selection

    def select_permuted(
        self, query: jax.Array, key: jax.Array, *, q_offset: int | jax.Array | None = None
    ) -> tuple[jax.Array, BlockSelection]:
        """Selects among keys that each query head has in an order of its own: those on its grid first, then the others.

        Args:
          query: as in `__call__`.
          key: as in `__call__`, in its original order; kv_len at least 1.
          q_offset: as in `__call__`.

        Returns:
          order, int32 [batch, num_q_heads, kv_len], the positions of the keys in their new order; and a selection as
          `__call__` gives it, whose ids are those of blocks of keys in that order and whose predicate includes causality:
          the op must not be causal.

        Raises:
          ValueError: an argument is wrong.
        """
        check_causal_call(self, query, key, True, q_offset)
        return _select(self, *jax.lax.stop_gradient((query, key)), q_offset, is_permuted=True)

    def _num_slots(self, kv_len: int, is_permuted: bool) -> int:
        """The most blocks of keys that the lists of a block of queries can need."""
        on_grid = num_blocks(kv_len, min(self.strides))
        on_grid = num_blocks(on_grid, self.block_size) if is_permuted else on_grid
        near = max_touched_blocks(self.num_local + self.block_size - 1, self.block_size)
        sinks = max_touched_blocks(self.num_sinks, self.block_size)
        return min(on_grid + near + sinks, num_blocks(kv_len, self.block_size))


@functools.partial(jax.jit, static_argnames=("selector", "is_permuted"))
def _select(
    selector: Grid, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None, *, is_permuted: bool
) -> tuple[jax.Array, BlockSelection]:
    q_len, kv_len, block_size = query.shape[1], key.shape[1], selector.block_size
    columns, _ = probe_mass(query, key, q_offset, num_probe=selector.num_probe, scale=selector.scale)
    probe = probe_positions(q_offset, q_len, kv_len, selector.num_probe)
    stride, phase = choose_grid(columns, probe[:, 0], selector)
    grid = GridPredicate(stride, phase, selector.num_local, selector.num_sinks)
    order = jnp.broadcast_to(jnp.arange(kv_len, dtype=jnp.int32), columns.shape)
    on_grid = (order - phase[..., None]) % stride[..., None] == 0
    if is_permuted:
        order = jnp.argsort(~on_grid, axis=-1, stable=True).astype(jnp.int32)
        on_grid = jnp.take_along_axis(on_grid, order, axis=-1)
    tiles = _touched_tiles(selector, order, on_grid, *row_positions(q_offset, q_len, kv_len, block_size))
    num_slots = selector._num_slots(kv_len, is_permuted)
    selection = BlockSelection.from_block_mask(tiles, q_block_size=block_size, kv_block_size=block_size, num_slots=num_slots)
    return order, dataclasses.replace(selection, predicate=PermutedGridPredicate(order, grid) if is_permuted else grid)


def choose_grid(columns: jax.Array, first_probe: jax.Array, selector: Grid) -> tuple[jax.Array, jax.Array]:
    """The stride and the phase of each head: int32 [batch, num_q_heads] each.

    Args:
      columns: float32 [batch, num_q_heads, kv_len], the probe's attention on each key.
      first_probe: int32 [batch or 1], the position of the probe's first query.
      selector: what there is to choose from.
    """
    ids = jnp.arange(columns.shape[-1], dtype=jnp.int32)
    counts = (ids >= selector.num_sinks) & (ids <= first_probe[:, None] - selector.num_local)
    counts = counts[:, None].astype(jnp.float32)
    mass = columns * counts
    even = mass.sum(axis=-1, keepdims=True) / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    excess = mass - even * counts

    def by_phase(stride):
        padded = jnp.pad(excess, [(0, 0), (0, 0), (0, -excess.shape[-1] % stride)])
        return padded.reshape(*padded.shape[:-1], -1, stride).sum(axis=-2)

    best = jnp.concatenate([by_phase(stride) for stride in selector.strides], axis=-1).argmax(axis=-1)
    stride = np.repeat(selector.strides, selector.strides)
    phase = np.concatenate([np.arange(stride) for stride in selector.strides])
    return jnp.asarray(stride, jnp.int32)[best], jnp.asarray(phase, jnp.int32)[best]


def _touched_tiles(selector: Grid, order: jax.Array, on_grid: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Tiles with a kept pair, and perhaps one between whose keys the near ones lie: bool [batch, heads, rows, num_kv_blocks].

    Args:
      selector: what is kept.
      order: int32 [batch, heads, kv_len], the positions of the keys, ascending on the grid and off it.
      on_grid: bool [batch, heads, kv_len], by the same order.
      first: int32 [batch or 1, rows], the position of the first query of each row.
      last: int32 [batch or 1, rows], that of the last.
    """
    first, last = first[:, None, :, None], last[:, None, :, None]
    lowest_on_grid, _ = (x[:, :, None] for x in block_extremes(order, on_grid, selector.block_size))
    lowest, highest = (x[:, :, None] for x in block_extremes(order, ~on_grid, selector.block_size))
    is_near = (lowest <= last) & (highest > first - selector.num_local)
    is_sink = lowest <= jnp.minimum(last, selector.num_sinks - 1)
    return (lowest_on_grid <= last) | is_near | is_sink
