"""Lists in shared memory: the warpgroup that computes on one item has those that come after it copied meanwhile."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic import ampere_steps, steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SWIZZLE_COLUMNS, Geometry

Config = TypeVar("Config")

# Items that shared memory may hold: one to compute on, and those that are copied.
STAGES = (2, 3, 4)
# Of a multiprocessor of an A100; each thread block takes so much more of it than it asks for.
SHARED_BYTES, RESERVED_BYTES = 164 * 1024, 1024
MAX_SHARED_BYTES = SHARED_BYTES - RESERVED_BYTES
# Thread blocks that registers leave room for.
MAX_BLOCKS = 2


def most_stages(make: Callable[[int], Config], memory_of: Callable[[Config], dict], reduction_bytes: int = 0) -> Config:
    """The config of so many stages as leave room for another thread block; if there is none, of so many as fit.

    Args:
      make: the config of a number of stages.
      memory_of: its shared memory, by name.
      reduction_bytes: that reductions take beside it.

    Raises:
      ValueError: none fits; with what the fewest need.
    """
    sizes = {stages: steps.shared_bytes(memory_of(make(stages)), reduction_bytes) for stages in STAGES}
    blocks = {stages: min(MAX_BLOCKS, SHARED_BYTES // (size + RESERVED_BYTES)) for stages, size in sizes.items()}
    fewest = STAGES[0]
    if not blocks[fewest]:
        needed = f"{make(fewest)} needs {sizes[fewest]} bytes of shared memory"
        raise ValueError(f"{needed}; a thread block may have {MAX_SHARED_BYTES}.")
    return make(max(stages for stages in STAGES if blocks[stages] == blocks[fewest]))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Items of a list, each of which has a slot of shared memory for some time.

    Attributes:
      stages: slots.
      ready: in the interpreter, a barrier of each slot.
      num_items: of the list.
      num_copies: of an item.
      copy: `copy(index, slot, ready)` starts the copies of an item.
    """

    stages: int
    ready: Any
    num_items: jax.Array
    num_copies: int
    copy: Callable[[jax.Array, jax.Array, Any], None]

    def start(self) -> None:
        """Has the first items copied, until one slot is free."""
        for index in range(self.stages - 1):
            self._start(jnp.int32(index))

    def next(self, index: jax.Array) -> jax.Array:
        """The slot of an item, which is there then. The slot of the one before is free, and the next copy goes into it."""
        slot = self._slot(index)
        # Items that may be on their way still.
        later = self.stages - 2
        if self.ready is not None:
            ampere_steps.finish_copies(self.ready.at[slot])
        elif later:
            have_started = index + later < self.num_items
            pl.when(have_started)(lambda: ampere_steps.finish_copies(in_flight=later * self.num_copies))
            pl.when(~have_started)(ampere_steps.finish_copies)
        else:
            ampere_steps.finish_copies()
        self._start(index + self.stages - 1)
        return slot

    def _slot(self, index: jax.Array) -> jax.Array:
        return lax.rem(index, jnp.int32(self.stages))

    def _start(self, index: jax.Array) -> None:
        @pl.when(index < self.num_items)
        def start_copies():
            slot = self._slot(index)
            self.copy(index, slot, None if self.ready is None else self.ready.at[slot])


def memory(g: Geometry, stages: int, *, interpreted: bool) -> dict:
    """Chunks of keys and values; in the interpreter, barriers that say when they are there."""
    keys = lambda columns: steps.smem((stages, CHUNK_KEYS, columns), jnp.dtype(g.dtype), swizzle_of(g.piece_keys, columns))
    parts = dict(key=keys(g.key_columns), value=keys(g.value_columns))
    if interpreted:
        parts["ready"] = plgpu.Barrier(num_arrivals=2 * g.blocks_per_chunk, num_barriers=stages)
    return parts


def swizzle_of(rows: int, columns: int) -> int:
    """In bytes: so wide that a copy of `rows` has boxes of 8 rows for each of four warps."""
    return 64 if rows // 8 * (columns // SWIZZLE_COLUMNS) % 4 else 128


def chunks(g: Geometry, stages: int, inputs, memory, batch, head, ids, spans) -> Ring:
    """The chunks of a query tile's list."""
    key, value = (steps.part_of(inputs[name], batch, head) for name in ("key", "value"))

    def copy_chunk(step, slot, ready):
        for i, piece in enumerate(steps.pieces_of(g, ids, None, spans[0], step)):
            place = pl.ds(i * g.piece_keys, g.piece_keys)
            # Instead of keys that do not exist, others, which no row sees there.
            keys = pl.ds(jnp.minimum(piece.first_key, g.padded_kv_len - g.piece_keys), g.piece_keys)
            ampere_steps.start_copy(key.at[keys], memory["key"].at[slot, place], ready)
            ampere_steps.start_copy(value.at[keys], memory["value"].at[slot, place], ready)

    return Ring(stages, memory.get("ready"), spans[1] * g.chunks_per_block, 2 * g.blocks_per_chunk, copy_chunk)


def with_margins(g: Geometry, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inputs, with so much more at both ends of tables of keys that `load_of_keys` reads nothing beyond them."""
    margin = CHUNK_KEYS - g.piece_keys
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(margin, margin)])
    return inputs | {name: pad(inputs[name]) for name in ("bias", "columns") if name in inputs}


def load_of_keys(g: Geometry, ref, pieces: list[steps.Piece]) -> jax.Array:
    """A value per key of a chunk: what lies in the table around each piece, of which only the piece's own keys count."""
    margin = CHUNK_KEYS - g.piece_keys
    starts = (piece.first_key + margin - i * g.piece_keys for i, piece in enumerate(pieces))
    parts = [steps.load_columns(ref.at[pl.ds(start, CHUNK_KEYS)]) for start in starts]
    if len(parts) == 1:
        return parts[0]
    piece = plgpu.broadcasted_iota(jnp.int32, (CHUNK_KEYS,), 0, layout=steps.COLUMN) // g.piece_keys
    return functools.reduce(lambda x, i: jnp.where(piece == i, parts[i], x), range(1, len(parts)), parts[0])


def load_columns_of(g: Geometry, inputs, batch, pieces: list[steps.Piece]) -> dict[str, jax.Array]:
    """Tables of the keys of a chunk, by name."""
    tables = steps.part_of(inputs["columns"], batch) if g.column_names else None
    return {name: load_of_keys(g, tables.at[i], pieces) for i, name in enumerate(g.column_names)}
