"""Chunks of a query tile's list in shared memory: the warpgroup that computes on one has the next copied meanwhile."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic import ampere_steps, steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SWIZZLE_COLUMNS, Geometry

# Chunks that shared memory holds: one to compute on, one that is copied.
STAGES = 2


def memory(g: Geometry, *, interpreted: bool) -> dict:
    """Keys and values; in the interpreter, barriers that say when they are there."""
    keys = lambda columns: steps.smem((STAGES, CHUNK_KEYS, columns), jnp.dtype(g.dtype), swizzle_of(g.piece_keys, columns))
    parts = dict(key=keys(g.key_columns), value=keys(g.value_columns))
    if interpreted:
        parts["ready"] = plgpu.Barrier(num_arrivals=2 * g.blocks_per_chunk, num_barriers=STAGES)
    return parts


def swizzle_of(rows: int, columns: int) -> int:
    """In bytes: so wide that a copy of `rows` has boxes of 8 rows for each of four warps."""
    return 64 if rows // 8 * (columns // SWIZZLE_COLUMNS) % 4 else 128


def start_chunk(g: Geometry, inputs, memory, batch, head, ids, spans, step, *, interpreted: bool) -> None:
    """Has a chunk of the list copied, if there is such a one."""
    key, value = (steps.part_of(inputs[name], batch, head) for name in ("key", "value"))

    @pl.when(step < spans[1] * g.chunks_per_block)
    def copy_chunk():
        slot = lax.rem(step, jnp.int32(STAGES))
        ready = memory["ready"].at[slot] if interpreted else None
        for i, piece in enumerate(steps.pieces_of(g, ids, None, spans[0], step)):
            place = pl.ds(i * g.piece_keys, g.piece_keys)
            # Instead of keys that do not exist, others, which no row sees there.
            keys = pl.ds(jnp.minimum(piece.first_key, g.padded_kv_len - g.piece_keys), g.piece_keys)
            ampere_steps.start_copy(key.at[keys], memory["key"].at[slot, place], ready, interpreted=interpreted)
            ampere_steps.start_copy(value.at[keys], memory["value"].at[slot, place], ready, interpreted=interpreted)


def with_margins(g: Geometry, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inputs, with so much more at both ends of tables of keys that `load_of_keys` reads nothing beyond them."""
    margin = CHUNK_KEYS - g.piece_keys
    # The columns have the block that does not exist already.
    after = dict(bias=margin + g.kv_block_size, columns=margin)
    pad = lambda x, end: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(margin, end)])
    return inputs | {name: pad(inputs[name], end) for name, end in after.items() if name in inputs}


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
