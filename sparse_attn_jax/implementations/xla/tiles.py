"""What one loop step of the XLA implementation reads: a box of query tiles x KV heads, and a chunk of their listed blocks.

Shapes: `tiles` x `heads` is the box of a step; a box entry has `tile_size` tokens x `group_size` heads as its rows, and a chunk
has `chunk` blocks of `kv_block_size` keys.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax import compat
from sparse_attn_jax.implementations.xla.config import Config
from sparse_attn_jax.planning import WORD_BITS, TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask
from sparse_attn_jax.selection import num_blocks


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static sizes of the loop over boxes."""

    problem: Problem
    config: Config
    tile_size: int
    row_group_tokens: int
    row_group_heads: int
    num_tiles: int  # rounded up to whole boxes

    @property
    def padded_q_len(self) -> int:
        return self.num_tiles * self.tile_size

    @property
    def num_boxes(self) -> int:
        problem, config = self.problem, self.config
        return problem.batch * (problem.num_kv_heads // config.heads) * (self.num_tiles // config.tiles)

    @property
    def accumulator_dtype(self):
        return jnp.float64 if self.problem.dtype == "float64" else jnp.float32

    @property
    def matmul_dtype(self):
        """CPUs have no fast 16-bit matmul; elsewhere the operands keep their dtype."""
        return self.accumulator_dtype if self.problem.platform == "cpu" else jnp.dtype(self.problem.dtype)


@dataclasses.dataclass(frozen=True)
class Box:
    """Where a step stands: batch row, first tile, first KV head (traced scalars)."""

    batch: jax.Array
    tile: jax.Array
    head: jax.Array


def make_geometry(problem: Problem, plan: TilePlan, config: Config) -> Geometry:
    num_tiles = num_blocks(plan.num_tiles, config.tiles) * config.tiles
    return Geometry(problem, config, plan.tile_size, plan.row_group_tokens, plan.row_group_heads, num_tiles)


def int32(*start: int | jax.Array) -> list[jax.Array]:
    """Where a slice starts. Under x64, literals, loop counters and ids would otherwise differ in dtype."""
    return [jnp.asarray(x, jnp.int32) for x in start]


def locate(geometry: Geometry, index: jax.Array) -> Box:
    """The box of a flat loop index: tiles innermost, so that neighbouring steps share K and V."""
    boxes_of_tiles = geometry.num_tiles // geometry.config.tiles
    boxes_of_heads = geometry.problem.num_kv_heads // geometry.config.heads
    index, tile = index // boxes_of_tiles, index % boxes_of_tiles
    batch, head = index // boxes_of_heads, index % boxes_of_heads
    return Box(batch, tile * geometry.config.tiles, head * geometry.config.heads)


# ---- rows: [batch, q_len, num_q_heads, n] <-> [tiles, heads, tile_size * group_size, n] of one box


def pad_rows(geometry: Geometry, x: jax.Array, fill: float = 0) -> jax.Array:
    padding = geometry.padded_q_len - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=fill) if padding else x


def read_rows(geometry: Geometry, box: Box, x: jax.Array) -> jax.Array:
    """Rows of a box from x [batch, padded_q_len, num_q_heads, n]."""
    config, group_size = geometry.config, geometry.problem.group_size
    tokens, width = config.tiles * geometry.tile_size, x.shape[-1]
    start = int32(box.batch, box.tile * geometry.tile_size, box.head * group_size, 0)
    rows = jax.lax.dynamic_slice(x, start, (1, tokens, config.heads * group_size, width))
    rows = rows.reshape(config.tiles, geometry.tile_size, config.heads, group_size, width).transpose(0, 2, 1, 3, 4)
    return rows.reshape(config.tiles, config.heads, geometry.tile_size * group_size, width)


def write_rows(geometry: Geometry, box: Box, x: jax.Array, rows: jax.Array) -> jax.Array:
    """The inverse of `read_rows`: x with the rows of a box replaced."""
    config, group_size = geometry.config, geometry.problem.group_size
    tokens, width = config.tiles * geometry.tile_size, x.shape[-1]
    rows = rows.reshape(config.tiles, config.heads, geometry.tile_size, group_size, width).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(1, tokens, config.heads * group_size, width).astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, rows, int32(box.batch, box.tile * geometry.tile_size, box.head * group_size, 0))


# ---- keys and values: [batch, num_kv_heads, num_kv_blocks + 1, kv_block_size, n]; the last block is where empty slots point


def to_blocks(geometry: Geometry, x: jax.Array) -> jax.Array:
    """x [batch, kv_len, num_kv_heads, n] -> blocks, with zeros after kv_len."""
    problem = geometry.problem
    padding = (problem.num_kv_blocks + 1) * problem.kv_block_size - problem.kv_len
    x = jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, padding), (0, 0)])
    return x.reshape(*x.shape[:2], problem.num_kv_blocks + 1, problem.kv_block_size, x.shape[-1])


@dataclasses.dataclass(frozen=True)
class KeyBlocks:
    """Keys, values and bias by block."""

    key: jax.Array
    value: jax.Array
    key_bias: jax.Array | None
    num_repairs: jax.Array  # int32 scalar: 1 if any key or value is not finite, else 0


def to_key_blocks(geometry: Geometry, operands: Operands) -> KeyBlocks:
    bias = operands.key_bias
    bias = None if bias is None else jnp.swapaxes(bias, 1, 2)[..., None].astype(geometry.accumulator_dtype)
    # 0 * x is NaN for an infinite or NaN x: one pass, where isfinite would write an array of bool.
    is_finite = jnp.isfinite((operands.key * 0).sum() + (operands.value * 0).sum())
    return KeyBlocks(
        key=to_blocks(geometry, operands.key),
        value=to_blocks(geometry, operands.value),
        key_bias=None if bias is None else to_blocks(geometry, bias),
        num_repairs=1 - is_finite.astype(jnp.int32),
    )


def zeros(geometry: Geometry, shape: tuple[int, ...], dtype, operands: Operands) -> jax.Array:
    """Zeros for a loop's carry that vary over the same mesh axes as the operands, as shard_map requires."""
    return compat.vary_like(jnp.zeros(shape, dtype), operands)


def zero_gradients(geometry: Geometry, operands: Operands, keys: KeyBlocks) -> list[jax.Array | None]:
    """Gradients of key, value and bias, [..., n, kv_block_size]: a CPU multiplies into that order at twice the speed."""
    return [
        None if x is None else zeros(geometry, (*x.shape[:3], x.shape[4], x.shape[3]), geometry.accumulator_dtype, operands)
        for x in (keys.key, keys.value, keys.key_bias)
    ]


def from_gradient_blocks(geometry: Geometry, blocks: jax.Array) -> jax.Array:
    """Accumulated gradients [batch, num_kv_heads, num_kv_blocks + 1, n, kv_block_size] -> [batch, kv_len, num_kv_heads, n]."""
    x = blocks.transpose(0, 2, 4, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : geometry.problem.kv_len]


def read_blocks(box: Box, x: jax.Array, ids: jax.Array) -> jax.Array:
    """Listed blocks of a box: x blocks, ids [tiles, heads, chunk] -> [tiles, heads, chunk * kv_block_size, n]."""
    head = box.head + jnp.arange(ids.shape[1], dtype=jnp.int32)
    blocks = x.at[box.batch, head[:, None], ids].get(mode="clip")
    return blocks.reshape(*ids.shape[:2], ids.shape[2] * x.shape[3], x.shape[4])


def add_blocks(box: Box, x: jax.Array, ids: jax.Array, update: jax.Array) -> jax.Array:
    """Adds update [tiles, heads, n, chunk * kv_block_size] to the listed blocks of x [..., n, kv_block_size]."""
    head = box.head + jnp.arange(ids.shape[1], dtype=jnp.int32)
    update = update.reshape(*update.shape[:3], ids.shape[2], x.shape[4])
    return x.at[box.batch, head[:, None], ids].add(jnp.moveaxis(update, 3, 2), mode="drop")


# ---- lists


@dataclasses.dataclass(frozen=True)
class Lists:
    """The plan, padded to whole boxes and chunks, with the part of each list that the token mask leaves alive."""

    ids: jax.Array  # int32 [batch or 1, heads or 1, num_tiles, capacity], empty slots point at block num_kv_blocks
    first: jax.Array  # int32 [batch, heads or 1, num_tiles], first slot with a visible key
    end: jax.Array  # int32, one past the last such slot
    membership: jax.Array | None  # uint32 [..., num_words]


def make_lists(geometry: Geometry, plan: TilePlan, mask: TokenMask) -> Lists:
    problem = geometry.problem
    alive = _alive_slots(geometry, plan, mask)
    capacity = plan.blocks.shape[-1]
    slot = jnp.arange(capacity, dtype=jnp.int32)
    first = jnp.where(alive, slot, capacity).min(-1)
    end = jnp.where(alive, slot + 1, 0).max(-1)

    more_tiles = geometry.num_tiles - plan.num_tiles
    more_slots = num_blocks(capacity, geometry.config.chunk) * geometry.config.chunk - capacity
    tiles, slots = (0, more_tiles), (0, more_slots)
    ids = jnp.where(plan.blocks < 0, problem.num_kv_blocks, plan.blocks)
    ids = jnp.pad(ids, [(0, 0), (0, 0), tiles, slots], constant_values=problem.num_kv_blocks)
    first = jnp.pad(first, [(0, 0), (0, 0), tiles], constant_values=capacity)
    end = jnp.pad(end, [(0, 0), (0, 0), tiles])
    membership = plan.membership
    if membership is not None:
        membership = jnp.pad(membership, [(0, 0), (0, 0), tiles, slots, (0, 0)])
    return Lists(ids, first, end, membership)


def _alive_slots(geometry: Geometry, plan: TilePlan, mask: TokenMask) -> jax.Array:
    """bool [batch, heads, num_tiles, capacity]: False where position alone rules out every key of a listed block."""
    problem = geometry.problem
    alive = plan.blocks >= 0
    if not (problem.is_causal or problem.has_window):
        return alive
    q_first, q_last = _ranges(mask.q_positions, plan.tile_size)  # [batch or 1, num_tiles]
    q_first, q_last = q_first[:, None, :, None], q_last[:, None, :, None]
    ids = jnp.maximum(plan.blocks, 0)
    if problem.varlen:
        kv_first, kv_last = _ranges(mask.kv_positions, problem.kv_block_size)
        kv_first, kv_last = kv_first[0][ids], kv_last[0][ids]
    else:
        kv_first = ids * problem.kv_block_size
        kv_last = jnp.minimum(kv_first + problem.kv_block_size, problem.kv_len) - 1
    if problem.is_causal:
        alive = alive & (kv_first <= q_last)
    if problem.has_window:
        near = jnp.ones_like(alive)
        if mask.window_left is not None:
            near = near & (kv_last >= q_first - mask.window_left.max())
        if mask.window_right is not None:
            near = near & (kv_first <= q_last + mask.window_right.max())
        if mask.num_sinks is not None:
            near = near | (kv_first < mask.num_sinks.max())
        alive = alive & near
    return alive


def _ranges(positions: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest position in each run of `size` tokens: positions [batch, n] -> two of [batch, runs]."""
    padding = num_blocks(positions.shape[1], size) * size - positions.shape[1]
    runs = jnp.pad(positions, [(0, 0), (0, padding)], mode="edge").reshape(positions.shape[0], -1, size)
    return runs.min(-1), runs.max(-1)


def chunk_range(geometry: Geometry, box: Box, lists: Lists) -> tuple[jax.Array, jax.Array]:
    """First and one past the last chunk that any tile of a box needs."""
    first, end = read_list(geometry, box, lists.first).min(), read_list(geometry, box, lists.end).max()
    return first // geometry.config.chunk, -(-end // geometry.config.chunk)


def read_list(geometry: Geometry, box: Box, x: jax.Array, slot=None) -> jax.Array:
    """A box's part of a per-tile array [batch or 1, heads or 1, num_tiles, ...]: [tiles, heads or 1, ...].

    With `slot`, the fourth dimension is cut to the chunk that starts there.
    """
    batch = box.batch if x.shape[0] > 1 else 0
    head = box.head if x.shape[1] > 1 else 0
    heads = geometry.config.heads if x.shape[1] > 1 else 1
    start = [batch, head, box.tile] + [0] * (x.ndim - 3)
    sizes = [1, heads, geometry.config.tiles, *x.shape[3:]]
    if slot is not None:
        start[3], sizes[3] = slot, geometry.config.chunk
    return jnp.swapaxes(jax.lax.dynamic_slice(x, int32(*start), sizes)[0], 0, 1)


# ---- what a row sees


@dataclasses.dataclass(frozen=True)
class MaskTables:
    """The token mask in the layout of boxes and blocks."""

    q_positions: jax.Array  # int32 [batch or 1, padded_q_len]
    kv_positions: jax.Array | None  # int32 [num_kv_blocks + 1, kv_block_size]; None: key j is at position j
    q_segments: jax.Array | None  # int32 [batch or 1, padded_q_len]
    kv_segments: jax.Array | None  # int32 [batch or 1, num_kv_blocks + 1, kv_block_size]
    mask: TokenMask


def make_mask_tables(geometry: Geometry, mask: TokenMask) -> MaskTables:
    problem = geometry.problem
    kv_padding = (problem.num_kv_blocks + 1) * problem.kv_block_size - problem.kv_len

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, kv_padding)])
        return x.reshape(x.shape[0], problem.num_kv_blocks + 1, problem.kv_block_size)

    return MaskTables(
        q_positions=pad_rows(geometry, mask.q_positions),
        kv_positions=blocks(mask.kv_positions)[0] if problem.varlen else None,
        q_segments=None if mask.q_segments is None else pad_rows(geometry, mask.q_segments),
        kv_segments=None if mask.kv_segments is None else blocks(mask.kv_segments),
        mask=mask,
    )


def visible(geometry: Geometry, box: Box, tables: MaskTables, ids: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Which keys of a chunk each row may attend.

    Args:
      ids: int32 [tiles, heads or 1, chunk].
      bits: uint32 [tiles, heads or 1, chunk, num_words] membership of the chunk, or `None`.

    Returns:
      bool, broadcastable to [tiles, heads, tile_size, group_size, chunk, kv_block_size].
    """
    problem, mask = geometry.problem, tables.mask
    key = ids[..., None] * problem.kv_block_size + jnp.arange(problem.kv_block_size, dtype=jnp.int32)
    key = key[:, :, None, None]  # [tiles, heads or 1, 1, 1, chunk, kv_block_size]
    # Empty slots point past the last block, so this also drops them.
    keep = key < problem.kv_len
    if bits is not None:
        keep = keep & _members(geometry, bits)

    q = _read_tokens(geometry, box, tables.q_positions)
    kv = key if tables.kv_positions is None else tables.kv_positions[ids][:, :, None, None]
    if problem.is_causal:
        keep = keep & (kv <= q)
    near = None
    if mask.window_left is not None:
        near = kv >= q - _read_heads(geometry, box, mask.window_left)
    if mask.window_right is not None:
        right = kv <= q + _read_heads(geometry, box, mask.window_right)
        near = right if near is None else near & right
    if near is not None and mask.num_sinks is not None:
        near = near | (kv < _read_heads(geometry, box, mask.num_sinks))
    if near is not None:
        keep = keep & near
    if tables.q_segments is not None:
        q_segment = _read_tokens(geometry, box, tables.q_segments)
        batch = box.batch if tables.kv_segments.shape[0] > 1 else 0
        keep = keep & (q_segment == tables.kv_segments[batch][ids][:, :, None, None])
    if mask.predicate is not None:
        # Sequences of a packed batch are told apart by their segment.
        batch = _read_tokens(geometry, box, tables.q_segments) if problem.varlen else box.batch
        head = (box.head + jnp.arange(geometry.config.heads, dtype=jnp.int32)) * problem.group_size
        head = head[:, None] + jnp.arange(problem.group_size, dtype=jnp.int32)
        keep = keep & mask.predicate(batch, head[:, None, :, None, None], q, kv)
    return keep


def _members(geometry: Geometry, bits: jax.Array) -> jax.Array:
    """Membership words [tiles, heads, chunk, num_words] -> bool [tiles, heads, tile_size, group_size, chunk, 1]."""
    group_size = geometry.problem.group_size
    token_groups = geometry.tile_size // geometry.row_group_tokens
    head_groups = group_size // geometry.row_group_heads
    r = jnp.arange(token_groups * head_groups)
    word = jnp.moveaxis(bits[..., r // WORD_BITS], -1, 2)  # [tiles, heads, row groups, chunk]
    member = (word >> (r % WORD_BITS).astype(jnp.uint32)[:, None]) & 1
    member = member.reshape(*bits.shape[:2], token_groups, head_groups, bits.shape[2], 1) != 0
    if token_groups > 1 and geometry.row_group_tokens > 1:
        member = jnp.repeat(member, geometry.row_group_tokens, axis=2)
    return member


def _read_tokens(geometry: Geometry, box: Box, x: jax.Array) -> jax.Array:
    """x [batch or 1, padded_q_len] -> [tiles, 1, tile_size, 1, 1, 1] of a box."""
    batch = box.batch if x.shape[0] > 1 else 0
    tokens = geometry.config.tiles * geometry.tile_size
    x = jax.lax.dynamic_slice(x, int32(batch, box.tile * geometry.tile_size), (1, tokens))
    return x.reshape(geometry.config.tiles, 1, geometry.tile_size, 1, 1, 1)


def _read_heads(geometry: Geometry, box: Box, x: jax.Array) -> jax.Array:
    """x [num_q_heads] -> [heads, 1, group_size, 1, 1] of a box."""
    group_size = geometry.problem.group_size
    x = jax.lax.dynamic_slice(x, int32(box.head * group_size), (geometry.config.heads * group_size,))
    return x.reshape(geometry.config.heads, 1, group_size, 1, 1)


def scores(geometry: Geometry, query: jax.Array, key: jax.Array, key_bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Logits before the token mask, and their derivative with respect to the scaled product (1.0 without a soft cap).

    Args:
      query: [tiles, heads, rows, head_dim].
      key: [tiles, heads, keys, head_dim].
      key_bias: [tiles, heads, keys] or `None`.
    """
    problem = geometry.problem
    product = jnp.einsum("thrd,thkd->thrk", query, key, preferred_element_type=geometry.accumulator_dtype)
    logits, slope = product * problem.scale, 1.0
    if problem.logits_soft_cap is not None:
        capped = jnp.tanh(logits / problem.logits_soft_cap)
        logits, slope = capped * problem.logits_soft_cap, 1 - capped * capped
    if key_bias is not None:
        logits = logits + key_bias[:, :, None]
    return logits, slope


# ---- one chunk


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The blocks of one step of the inner loop."""

    ids: jax.Array  # int32 [tiles, heads, chunk]
    key: jax.Array  # [tiles, heads, keys, head_dim], keys = chunk * kv_block_size
    value: jax.Array  # [tiles, heads, keys, value_head_dim]
    key_bias: jax.Array | None  # [tiles, heads, keys]
    visible: jax.Array  # bool [tiles, heads, rows, keys]


def read_chunk(geometry: Geometry, box: Box, keys: KeyBlocks, lists: Lists, tables: MaskTables, slot: jax.Array) -> Chunk:
    # The barrier keeps XLA from computing the ids anew in each of the slices that use them.
    ids = jax.lax.optimization_barrier(read_list(geometry, box, lists.ids, slot))
    bits = None if lists.membership is None else read_list(geometry, box, lists.membership, slot)
    all_ids = jnp.broadcast_to(ids, (ids.shape[0], geometry.config.heads, ids.shape[2]))
    key, value = (read_blocks(box, x, all_ids).astype(geometry.matmul_dtype) for x in (keys.key, keys.value))

    def drop_unseen(i, pair):
        own_ids = jax.lax.optimization_barrier((ids, i))[0]  # else XLA moves this out of a loop that hardly ever runs
        seen = visible(geometry, box, tables, own_ids, bits).any((2, 3))
        seen = jnp.broadcast_to(seen, (*all_ids.shape, seen.shape[-1])).reshape(*all_ids.shape[:2], -1, 1)
        return tuple(jnp.where(seen, x, 0) for x in pair)

    # A key that no row of a tile sees must not turn into 0 * NaN. Rarely needed, and the reduction over rows is not free: a
    # loop of no or one step costs nothing in the usual case, where a conditional would copy its operands.
    key, value = jax.lax.fori_loop(0, keys.num_repairs, drop_unseen, (key, value))
    bias = keys.key_bias
    return Chunk(
        ids=all_ids,
        key=key,
        value=value,
        key_bias=None if bias is None else read_blocks(box, bias, all_ids)[..., 0],
        visible=broadcast_visible(geometry, visible(geometry, box, tables, ids, bits)),
    )


def broadcast_visible(geometry: Geometry, keep: jax.Array) -> jax.Array:
    """`visible`'s result as bool [tiles, heads, rows, keys]."""
    config, problem = geometry.config, geometry.problem
    box = (config.tiles, config.heads, geometry.tile_size, problem.group_size)
    keep = jnp.broadcast_to(keep, (*box, *keep.shape[-2:]))
    return keep.reshape(*box[:2], geometry.tile_size * problem.group_size, -1)
