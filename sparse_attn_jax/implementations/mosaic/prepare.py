"""From the arguments of a call to the arrays that the kernels read."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import jax_compat
from sparse_attn_jax.arguments import AXES, attention_attributes
from sparse_attn_jax.entry_point import is_off
from sparse_attn_jax.implementations.mosaic import layout
from sparse_attn_jax.implementations.mosaic.geometry import Geometry
from sparse_attn_jax.implementations.mosaic.steps import LOG2_E
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.selection import num_blocks

# What a part of a block's list does with its sums, if they are not added to those of others: it is the gradient, or nothing.
WHOLE, UNUSED = -1, -2


def call_attributes(problem: Problem, plan: TilePlan) -> dict[str, Any]:
    interpreted = jax_compat.interprets_kernels()
    return attention_attributes(problem, plan) | dict(interpreted=interpreted, may_partition=not interpreted)


def geometry_of(a: Mapping[str, jax.Array | None], attributes: Mapping[str, Any]) -> Geometry:
    batch, q_len, num_q_heads, head_dim = a["query"].shape
    _, kv_len, num_kv_heads, value_head_dim = a["value"].shape
    names = ("kv_block_size", "tile_size", "row_group_tokens", "row_group_heads")
    return Geometry(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        dtype=a["query"].dtype.name,
        **{name: int(attributes[name]) for name in names},
        scale=float(attributes["scale"]),
        logits_soft_cap=float(attributes["logits_soft_cap"]),
        is_causal=attributes["is_causal"],
        is_varlen=a["kv_positions"] is not None,
        has_window=a["window_left"] is not None or a["window_right"] is not None,
        has_segments=a["q_segments"] is not None,
        has_key_bias=a["key_bias"] is not None,
        has_membership=a["membership"] is not None,
    )


def kernel_inputs(
    arrays: Sequence[jax.Array], attributes: Mapping[str, Any]
) -> tuple[Geometry, dict[str, jax.Array], jax.Array]:
    """What a call is, the inputs of the forward kernel, which the others read as well, and `layout.full_entries`.

    Args:
      arrays: as `arguments.AXES` has them; an option that is off has no elements.
      attributes: as `arguments.attention_attributes` makes them.
    """
    a = {name: None if is_off(x.shape) else x for name, x in zip(AXES, arrays, strict=True)}
    g = geometry_of(a, attributes)
    bad_keys, bad_values = (jnp.moveaxis(~jnp.isfinite(a[name]).all(-1), 1, 2) for name in ("key", "value"))
    # No product may meet NaNs and infinities where they are hidden: who sees such a key gets a NaN from its bias instead.
    key, value = (jnp.where(jnp.isfinite(a[name]), a[name], 0) for name in ("key", "value"))
    bias = jnp.zeros(bad_keys.shape, jnp.float32) if a["key_bias"] is None else a["key_bias"]
    bad = bad_keys | (bad_values & ~jnp.isneginf(bias))
    absent = g.padded_kv_len - g.kv_len
    pad = lambda x, absent: jnp.pad(x, [(0, 0), (0, 0), (0, absent)])
    bad_blocks = pad(bad, absent).reshape(*bad.shape[:2], g.num_kv_blocks, g.kv_block_size).any(-1)
    # Ids that name no block become one beyond the last: copies of its keys bring zeros, and tables have an entry for each.
    ids = jnp.where((a["blocks"] < 0) | (a["blocks"] > g.num_kv_blocks), g.num_kv_blocks, a["blocks"])
    counts = jnp.clip(a["counts"], 0, ids.shape[-1])
    rows = layout.row_tables(
        g, *(a[name] for name in ("q_positions", "q_segments", "window_left", "window_right", "num_sinks"))
    )
    columns = layout.column_tables(g, a["kv_positions"], a["kv_segments"])
    is_full = layout.full_entries(g, ids, counts, a["membership"], rows, bad_blocks)
    words = None if a["membership"] is None else jax.lax.bitcast_convert_type(a["membership"], jnp.int32)
    inputs = dict(
        query=layout.to_slices(g, layout.pad_columns(a["query"], g.key_columns)),
        key=layout.by_head(g, key, g.key_columns),
        value=layout.by_head(g, value, g.value_columns),
        bias=pad(jnp.where(bad, jnp.nan, bias), absent + g.kv_block_size) * jnp.float32(LOG2_E),
        rows=rows,
        columns=columns,
        ids=ids,
        words=words,
        spans=layout.spans(g, counts, is_full),
    )
    return g, {name: x for name, x in inputs.items() if x is not None}, is_full


def gradient_inputs(g: Geometry, d_out: jax.Array, lse: jax.Array, delta: jax.Array) -> dict[str, jax.Array]:
    """d_out, arranged as the query, and stats [batch, num_kv_heads, num_slices, 2, 64], float32: lse / log(2), and delta.

    Args:
      g: the call.
      d_out: [batch, q_len, num_q_heads, value_head_dim].
      lse: [batch, q_len, num_q_heads], float32.
      delta: the same, the part of the logits' gradient that all keys of a row share.
    """
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)  # of rows that see nothing: their weights are 0
    # Rows that do not exist weigh nothing, whatever the bias: where a block is full, no mask hides them from its keys.
    stats = [layout.to_slices(g, lse * LOG2_E, jnp.inf), layout.to_slices(g, delta)]
    d_out = layout.to_slices(g, layout.pad_columns(d_out, g.value_columns))
    return dict(d_out=d_out, stats=jnp.stack(stats, axis=3))


def inverse_inputs(g: Geometry, offsets, tiles, slots, first_parts, first_partials, num_partials: int) -> dict[str, jax.Array]:
    """What the kernel of the keys' gradients walks, all of it within bounds.

    Args:
      g: the call.
      offsets: int32 [plan batch, plan heads, num_kv_blocks + 1], of the plan's inverse.
      tiles: int32 [plan batch, plan heads, entries].
      slots: as tiles.
      first_parts: int32 [plan batch, plan heads, num_kv_blocks + 1], of `splitting.Parts`.
      first_partials: int32 [plan batch, plan heads, num_kv_blocks].
      num_partials: how many there are.

    Returns:
      tiles; entries, as tiles, where they stand in the lists of all tiles, one after another; parts int32
      [plan batch, plan heads, num_parts, 4], a KV block, where a part of its list starts and ends, and WHOLE, UNUSED or the
      number of its sums; ranges int32 [plan batch, plan heads, num_kv_blocks, 2], the first of the sums of a block, and their
      number, or 0 if there is one part.
    """
    index = jnp.arange(g.num_kv_blocks + num_partials, dtype=jnp.int32)
    find = jax.vmap(jax.vmap(lambda ends: jnp.searchsorted(ends, index, side="right")))
    block = jnp.minimum(find(first_parts[..., 1:]), g.num_kv_blocks - 1).astype(jnp.int32)
    of_block = lambda x: jnp.take_along_axis(x, block, axis=-1)
    offsets, capacity = jnp.clip(offsets, 0, tiles.shape[-1]), tiles.shape[-1] // g.num_tiles
    num_parts = jnp.clip(jnp.diff(first_parts, axis=-1), 0, num_partials)
    first, end = of_block(offsets[..., :-1]), of_block(offsets[..., 1:])
    number = jnp.maximum(index - of_block(first_parts[..., :-1]), 0)
    length = num_blocks(jnp.maximum(end - first, 0), jnp.maximum(of_block(num_parts), 1))
    start = jnp.minimum(first + number * length, end)
    stop = jnp.minimum(start + length, end)
    sums = jnp.clip(of_block(first_partials) + number, 0, max(num_partials - 1, 0))
    place = jnp.where(of_block(num_parts) > 1, sums, WHOLE)
    exists = index < first_parts[..., -1:]
    start, stop, place = jnp.where(exists, start, 0), jnp.where(exists, stop, 0), jnp.where(exists, place, UNUSED)
    num_sums = jnp.where(num_parts > 1, num_parts, 0)
    first_partials = jnp.clip(first_partials, 0, num_partials - num_sums)
    # Entries that do not exist become a tile beyond the last: kernels read another in its place, and hide all of it.
    tiles = jnp.where((tiles < 0) | (slots < 0) | (slots >= capacity), g.num_tiles, jnp.minimum(tiles, g.num_tiles))
    entries = jnp.minimum(tiles, g.num_tiles - 1) * capacity + jnp.clip(slots, 0, capacity - 1)
    return dict(
        tiles=tiles,
        entries=entries,
        parts=jnp.stack([block, start, stop, place], axis=-1),
        ranges=jnp.stack([first_partials, num_sums], axis=-1),
    )


def full_runs(g: Geometry, is_full: jax.Array, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """Where the first run of full entries of each part starts and ends: int32 [batch, num_kv_heads, num_parts, 2].

    Both are the part's end if it has none. An entry is full if the tile's list has the part's block there, and every row of the
    tile sees all of its keys.

    Args:
      g: the call.
      is_full: of `layout.full_entries`.
      inputs: ids of `kernel_inputs`, and those of `inverse_inputs`.
    """
    tiles, entries, parts, ids = (layout.tile_rows(g, inputs[name]) for name in ("tiles", "entries", "parts", "ids"))
    block, start, stop = (parts[..., i] for i in range(3))
    size = tiles.shape[-1]
    look_up = lambda x, at: jnp.take_along_axis(x, at, axis=-1, mode="clip")
    ids, is_full = (look_up(x.reshape(*x.shape[:2], -1), entries) for x in (ids, is_full))
    is_full &= tiles < g.num_tiles
    # A run has one block: an inverse that contradicts the lists makes no entry full for another.
    goes_on = is_full & (ids == jnp.roll(ids, 1, axis=-1))
    index = jnp.arange(size, dtype=jnp.int32)
    # From each entry on, and from the end, the next of which this is so.
    next_of = lambda is_so: jnp.pad(
        jax.lax.cummin(jnp.where(is_so, index, size), axis=2, reverse=True), [(0, 0), (0, 0), (0, 1)], constant_values=size
    )
    first = jnp.minimum(look_up(next_of(is_full), start), stop)
    first = jnp.where(look_up(ids, first) == block, first, stop)
    end = jnp.clip(look_up(next_of(~goes_on), first + 1), first, stop)
    return jnp.stack([first, end], axis=-1)


def choose_summed(g: Geometry, ranges: jax.Array, summed: jax.Array, whole: jax.Array) -> jax.Array:
    """The sums of the blocks that have several parts, and what was written at once for the others."""
    has_several = layout.tile_rows(g, ranges[..., 1] > 0)
    has_several = jnp.repeat(has_several, whole.shape[2] // g.num_kv_blocks, axis=2)
    return jnp.where(jnp.expand_dims(has_several, range(3, whole.ndim)), summed.astype(whole.dtype), whole)


def keys_of_chunks(g: Geometry, x: jax.Array) -> jax.Array:
    """[batch, num_kv_heads, chunks, columns, keys] to [batch, kv_len, num_kv_heads, columns]."""
    x = jnp.swapaxes(x, -1, -2).reshape(*x.shape[:2], -1, x.shape[3])[:, :, : g.kv_len]
    return jnp.moveaxis(x, 1, 2)
