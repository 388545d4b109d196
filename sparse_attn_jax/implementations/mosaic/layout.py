"""Arrays as the kernels read them, arranged by XLA: query rows by slice, keys by KV head, and tables of what each row sees."""

import jax
import jax.numpy as jnp

from sparse_attn_jax.implementations.mosaic.geometry import SLICE_ROWS, Geometry
from sparse_attn_jax.selection import num_blocks

# Of rows and keys that do not exist: no row sees them, and they see nothing.
ABSENT = -1


def to_slices(g: Geometry, x: jax.Array, padding=0) -> jax.Array:
    """[batch, q_len, num_q_heads, ...] to [batch, num_kv_heads, num_slices, 64, ...]."""
    rest = x.shape[3:]
    keep = [(0, 0)] * len(rest)
    x = x.reshape(*x.shape[:2], g.num_kv_heads, g.group_size, *rest)
    x = jnp.moveaxis(x, 2, 1)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, g.num_tiles * g.tile_size - g.q_len), (0, 0), *keep], constant_values=padding)
    x = x.reshape(*x.shape[:2], g.num_tiles, g.tile_rows, *rest)
    rows = g.slices_per_tile * SLICE_ROWS
    x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, rows - g.tile_rows), *keep], constant_values=padding)
    return x.reshape(*x.shape[:2], g.num_slices, SLICE_ROWS, *rest)


def from_slices(g: Geometry, x: jax.Array) -> jax.Array:
    """The inverse of `to_slices`."""
    rest = x.shape[4:]
    x = x.reshape(*x.shape[:2], g.num_tiles, g.slices_per_tile * SLICE_ROWS, *rest)[:, :, :, : g.tile_rows]
    x = x.reshape(*x.shape[:2], g.num_tiles * g.tile_size, g.group_size, *rest)[:, :, : g.q_len]
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], g.num_q_heads, *rest)


def pad_columns(x: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])


def by_head(g: Geometry, x: jax.Array, columns: int) -> jax.Array:
    """Keys or values [rows, kv_len, num_kv_heads, dim] to [rows, num_kv_heads, padded_kv_len, columns]."""
    x = jnp.moveaxis(pad_columns(x, columns), 1, 2)
    return jnp.pad(x, [(0, 0), (0, 0), (0, g.padded_kv_len - g.kv_len), (0, 0)])


def common_rows(g: Geometry, *arrays: jax.Array | None) -> list[jax.Array | None]:
    """Arrays whose batch row i is row i modulo their number, with as many rows each: one, or one per batch row."""
    rows = 1 if all(x is None or x.shape[0] == 1 for x in arrays) else g.batch
    return [None if x is None else jnp.tile(x, (rows // x.shape[0], *(1 for _ in x.shape[1:]))) for x in arrays]


def tile_rows(g: Geometry, x: jax.Array) -> jax.Array:
    """[rows, heads, ...], which repeat, to [batch, num_kv_heads, ...]."""
    x = jnp.tile(x, (g.batch // x.shape[0], *(1 for _ in x.shape[1:])))
    return jnp.broadcast_to(x, (g.batch, g.num_kv_heads, *x.shape[2:]))


def row_tables(g: Geometry, q_positions, q_segments, window_left, window_right, num_sinks) -> jax.Array:
    """int32 [batch or 1, num_kv_heads, num_slices, tables, 64], the tables in the order of `g.row_names`.

    A row sees the keys of positions low to high, and those below sink, of its own segment; and of blocks that its row group
    chose.
    """
    by_token = (x if x is None else x[:, :, None] for x in (q_positions, q_segments))
    by_q_head = (x if x is None else x[:, None] for x in (window_left, window_right, num_sinks))
    position, segment, left, right, sinks = common_rows(g, *by_token, *by_q_head)
    last = (1 << 30) - 1 if g.is_varlen else g.kv_len - 1
    causal = jnp.minimum(position, last) if g.is_causal else jnp.full_like(position, last)
    tables = dict(high=causal if right is None else jnp.minimum(causal, position + right), segment=segment)
    if g.has_window:
        tables["low"] = jnp.zeros_like(position) if left is None else position - left
        tables["sink"] = jnp.minimum(0 if sinks is None else sinks, causal + 1)
    if g.has_membership:
        tables["group"] = row_groups(g)
    shape = (position.shape[0], g.q_len, g.num_q_heads)
    table = jnp.stack([jnp.broadcast_to(tables[name], shape) for name in g.row_names], axis=-1)
    return jnp.moveaxis(to_slices(g, table, ABSENT), -1, 3)


def row_groups(g: Geometry) -> jax.Array:
    """The number within its tile of the row group of each row: int32 [1, q_len, num_q_heads]."""
    token = jnp.arange(g.q_len)[:, None] % g.tile_size // g.row_group_tokens
    head = jnp.arange(g.num_q_heads) % g.group_size // g.row_group_heads
    return (token * (g.group_size // g.row_group_heads) + head).astype(jnp.int32)[None]


def column_tables(g: Geometry, kv_positions, kv_segments) -> jax.Array | None:
    """int32 [batch or 1, tables, keys], the tables in the order of `g.column_names`; `None` if there are none.

    The keys are those of all blocks, and of one that does not exist.
    """
    if not g.column_names:
        return None
    positions = jnp.arange(g.kv_len, dtype=jnp.int32)[None] if kv_positions is None else kv_positions
    tables = dict(position=positions, segment=kv_segments)
    table = jnp.stack(common_rows(g, *(tables[name] for name in g.column_names)), axis=1)
    # Positions beyond those of any row.
    num_absent = g.padded_kv_len - g.kv_len + g.kv_block_size
    return jnp.pad(table, [(0, 0), (0, 0), (0, num_absent)], constant_values=1 << 30)


def full_entries(g: Geometry, ids, counts, membership, rows, bad_blocks) -> jax.Array:
    """bool [batch, num_kv_heads, num_tiles, entries]: whether every row of a tile sees all keys of a block of its list.

    Then no mask needs to be looked at.
    """
    shape = (g.batch, g.num_kv_heads, g.num_tiles, ids.shape[3])
    if g.is_varlen or g.has_segments:
        return jnp.zeros(shape, bool)
    is_full = (jnp.arange(ids.shape[3]) < tile_rows(g, counts)[..., None]) & (tile_rows(g, ids) < g.num_kv_blocks)
    ids = tile_rows(g, jnp.minimum(ids, g.num_kv_blocks - 1))
    tables = tile_rows(g, rows).reshape(*shape[:2], g.num_tiles, g.slices_per_tile, len(g.row_names), SLICE_ROWS)
    tables = jnp.moveaxis(tables, 4, 0).reshape(len(g.row_names), *shape[:3], -1)
    tables = dict(zip(g.row_names, tables, strict=True))
    row = jnp.arange(g.slices_per_tile * SLICE_ROWS)
    row_of_head = jnp.arange(g.num_tiles)[:, None] * g.tile_rows + row
    exists = (row < g.tile_rows) & (row_of_head < g.q_len * g.group_size)
    start = ids * g.kv_block_size
    is_full &= start + g.kv_block_size - 1 <= jnp.where(exists, tables["high"], 1 << 30).min(-1)[..., None]
    if g.has_window:
        is_full &= jnp.where(exists, tables["low"], -(1 << 30)).max(-1)[..., None] <= start
    if g.has_membership:
        tokens = jnp.minimum(g.tile_size, g.q_len - jnp.arange(g.num_tiles) * g.tile_size)
        groups = num_blocks(tokens, g.row_group_tokens) * (g.group_size // g.row_group_heads)
        is_full &= tile_rows(g, jax.lax.population_count(membership).astype(jnp.int32).sum(-1)) == groups[:, None]
    bad = jnp.take_along_axis(tile_rows(g, bad_blocks), ids.reshape(*shape[:2], -1), axis=-1)
    return is_full & ~bad.reshape(shape)


def spans(g: Geometry, counts, is_full) -> jax.Array:
    """int32 [batch, num_kv_heads, num_tiles, 4]: a list's length, its groups, the first run of full ones: start, end.

    A group is the blocks of a chunk. It is full if all of them are, by `full_entries`.
    """
    counts, entries = tile_rows(g, counts), is_full.shape[3]
    groups = num_blocks(entries, g.blocks_per_chunk)
    is_full = jnp.pad(is_full, [(0, 0)] * 3 + [(0, groups * g.blocks_per_chunk - entries)])
    is_full = is_full.reshape(*is_full.shape[:3], groups, g.blocks_per_chunk).all(-1)
    num_groups = num_blocks(counts, g.blocks_per_chunk)
    first = jnp.where(is_full.any(-1), jnp.argmax(is_full, axis=-1), num_groups)
    stops = ~is_full & (jnp.arange(groups) >= first[..., None])
    end = jnp.where(stops.any(-1), jnp.argmax(stops, axis=-1), groups)
    return jnp.stack([counts, num_groups, first, jnp.maximum(first, end)], axis=-1).astype(jnp.int32)
