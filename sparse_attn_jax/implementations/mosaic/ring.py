"""Chunks of a query tile's list in shared memory: one warpgroup brings them, the others compute on them."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic import steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, Geometry


def memory(g: Geometry, stages: int, readers: int) -> dict:
    """The ring: keys with what belongs to them, and values, each with barriers that say when they are there, and when read."""
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    parts = dict(
        key=steps.smem((stages, CHUNK_KEYS, g.key_columns), jnp.dtype(g.dtype)),
        bias=plgpu.SMEM((stages, CHUNK_KEYS), jnp.float32),
        value=steps.smem((stages, CHUNK_KEYS, g.value_columns), jnp.dtype(g.dtype)),
        key_ready=barriers(g.blocks_per_chunk * (2 + len(g.column_names))),
        value_ready=barriers(g.blocks_per_chunk),
        key_free=barriers(readers),
        value_free=barriers(readers),
    )
    if g.column_names:
        parts["columns"] = plgpu.SMEM((stages, len(g.column_names), CHUNK_KEYS), jnp.int32)
    return parts


def wait_for_room(free, step, stages: int) -> None:
    """Until what was in a slot has been read; at first there was nothing."""

    @pl.when(step >= stages)
    def wait():
        plgpu.barrier_wait(free)


def fetch_chunks(g: Geometry, stages: int, inputs, memory, batch, head, ids, spans) -> None:
    """Brings all chunks of a list, each as soon as there is room."""
    key, value, bias = (steps.part_of(inputs[name], batch, head) for name in ("key", "value", "bias"))

    @pl.loop(0, spans[1] * g.chunks_per_block)
    def fetch_chunk(step):
        slot = lax.rem(step, jnp.int32(stages))
        pieces = steps.pieces_of(g, ids, None, spans[0], step)
        places = [pl.ds(i * g.piece_keys, g.piece_keys) for i in range(len(pieces))]

        wait_for_room(memory["key_free"].at[slot], step, stages)
        for place, piece in zip(places, pieces, strict=True):
            keys, ready = piece.keys(g), memory["key_ready"].at[slot]
            plgpu.copy_gmem_to_smem(key.at[keys], memory["key"].at[slot, place], ready)
            _copy_table(bias.at[keys], memory["bias"].at[slot, place], ready)
            for i in range(len(g.column_names)):
                columns = steps.part_of(inputs["columns"], batch).at[i, keys]
                _copy_table(columns, memory["columns"].at[slot, i, place], ready)

        wait_for_room(memory["value_free"].at[slot], step, stages)
        for place, piece in zip(places, pieces, strict=True):
            plgpu.copy_gmem_to_smem(value.at[piece.keys(g)], memory["value"].at[slot, place], memory["value_ready"].at[slot])


def _copy_table(src, dst, ready) -> None:
    """Of the keys of a piece, all of which the table has. Few keys lie where a copy that looks at bounds may not write.

    That one, of tensors, writes to multiples of 128 bytes; this one, to multiples of 16.
    """
    plgpu.copy_gmem_to_smem(src, dst, ready, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
