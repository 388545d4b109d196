"""What one loop step of the XLA implementation reads: a few query tiles, and a chunk of the blocks that each of them lists.

An item is one (batch row, KV head, query tile): `tile_size` tokens x `group_size` heads are its rows. A step walks `items` of
them in lockstep, `chunk` blocks of `kv_block_size` keys at a time. Items go by the length of their lists, so that those of a
step end together.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax import jax_compat
from sparse_attn_jax.implementations.xla.config import Config
from sparse_attn_jax.planning import WORD_BITS, TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask
from sparse_attn_jax.selection import num_blocks


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static sizes of the loop over steps."""

    problem: Problem
    config: Config
    tile_size: int
    row_group_tokens: int
    row_group_heads: int
    num_tiles: int

    @property
    def padded_q_len(self) -> int:
        return self.num_tiles * self.tile_size

    @property
    def num_items(self) -> int:
        return self.problem.batch * self.problem.num_kv_heads * self.num_tiles

    @property
    def num_steps(self) -> int:
        return num_blocks(self.num_items, self.config.items)

    @property
    def accumulator_dtype(self):
        return jnp.float64 if self.problem.dtype == "float64" else jnp.float32

    @property
    def matmul_dtype(self):
        """CPUs have no fast 16-bit matmul; elsewhere the operands keep their dtype."""
        return self.accumulator_dtype if self.problem.platform == "cpu" else jnp.dtype(self.problem.dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """The items of one step, int32 [items] each, and the chunks that they walk. A missing item has batch row `batch`."""

    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    first: jax.Array  # int32 scalar, first chunk that any item needs
    end: jax.Array  # int32 scalar, one past the last


def make_geometry(problem: Problem, plan: TilePlan, config: Config) -> Geometry:
    return Geometry(problem, config, plan.tile_size, plan.row_group_tokens, plan.row_group_heads, plan.num_tiles)


# Arrays that a loop reads from or writes to are kept as `jax_compat.to_bits` gives them.

# ---- rows: [batch, q_len, num_q_heads, n] <-> tiles [batch, num_tiles, tile_size, num_kv_heads, group_size, n]


def to_tiles(geometry: Geometry, x: jax.Array, fill: float = 0) -> jax.Array:
    problem = geometry.problem
    padding = geometry.padded_q_len - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)], constant_values=fill) if padding else x
    heads = (problem.num_kv_heads, problem.group_size)
    return jax_compat.to_bits(x.reshape(x.shape[0], geometry.num_tiles, geometry.tile_size, *heads, x.shape[-1]))


def from_tiles(geometry: Geometry, x: jax.Array) -> jax.Array:
    problem = geometry.problem
    x = x.reshape(problem.batch, geometry.padded_q_len, problem.num_q_heads, x.shape[-1])[:, : problem.q_len]
    return jax_compat.from_bits(x, problem.dtype)


def read_rows(geometry: Geometry, step: Step, x: jax.Array) -> jax.Array:
    """Rows of a step's items, [items, tile_size * group_size, n], from tiles."""
    rows = x.at[step.batch, step.tile, :, step.head].get(mode="clip")
    return jax_compat.from_bits(rows.reshape(rows.shape[0], -1, rows.shape[-1]), geometry.problem.dtype)


def write_rows(step: Step, x: jax.Array, rows: jax.Array) -> jax.Array:
    """The inverse of `read_rows`: tiles with the rows of a step's items replaced."""
    rows = jax_compat.to_bits(rows.reshape(rows.shape[0], x.shape[2], *x.shape[4:]))
    return x.at[step.batch, step.tile, :, step.head].set(rows, mode="drop")


# ---- keys and values: [batch, num_kv_heads, num_kv_blocks + 1, kv_block_size, n]; the last block is where empty slots point


def to_blocks(geometry: Geometry, x: jax.Array) -> jax.Array:
    """x [batch, kv_len, num_kv_heads, n] -> blocks, with zeros after kv_len."""
    problem = geometry.problem
    padding = (problem.num_kv_blocks + 1) * problem.kv_block_size - problem.kv_len
    x = jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, padding), (0, 0)])
    return jax_compat.to_bits(x.reshape(*x.shape[:2], problem.num_kv_blocks + 1, problem.kv_block_size, x.shape[-1]))


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


def zeros(shape: tuple[int, ...], dtype, operands: Operands) -> jax.Array:
    """Zeros for a loop's carry that vary over the same mesh axes as the operands, as shard_map requires."""
    return jax_compat.to_bits(jax_compat.vary_like(jnp.zeros(shape, dtype), operands))


def zero_gradients(geometry: Geometry, operands: Operands, keys: KeyBlocks) -> list[jax.Array | None]:
    """Gradients of key, value and bias, [..., n, kv_block_size]: a CPU multiplies into that order at twice the speed."""
    return [
        None if x is None else zeros((*x.shape[:3], x.shape[4], x.shape[3]), geometry.accumulator_dtype, operands)
        for x in (keys.key, keys.value, keys.key_bias)
    ]


def from_gradient_blocks(geometry: Geometry, blocks: jax.Array) -> jax.Array:
    """Accumulated gradients [batch, num_kv_heads, num_kv_blocks + 1, n, kv_block_size] -> [batch, kv_len, num_kv_heads, n]."""
    x = blocks.transpose(0, 2, 4, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : geometry.problem.kv_len]


def read_blocks(geometry: Geometry, step: Step, x: jax.Array, ids: jax.Array) -> jax.Array:
    """Listed blocks of a step: x blocks, ids [items, chunk] -> [items, chunk * kv_block_size, n]."""
    blocks = x.at[step.batch[:, None], step.head[:, None], ids].get(mode="clip")
    return jax_compat.from_bits(blocks.reshape(ids.shape[0], -1, x.shape[-1]), geometry.problem.dtype)


def add_blocks(step: Step, x: jax.Array, ids: jax.Array, update: jax.Array) -> jax.Array:
    """Adds update [items, n, chunk * kv_block_size] to the listed blocks of x [..., n, kv_block_size]."""
    update = update.reshape(*update.shape[:2], ids.shape[1], x.shape[-1]).swapaxes(1, 2)
    return x.at[step.batch[:, None], step.head[:, None], ids].add(update, mode="drop")


# ---- lists


@dataclasses.dataclass(frozen=True)
class Lists:
    """The plan, padded to whole chunks, and the order in which its items are walked."""

    ids: jax.Array  # int32 [batch or 1, heads or 1, num_tiles, num_chunks, chunk], empty slots point at block num_kv_blocks
    membership: jax.Array | None  # uint32 [..., num_words]
    item: jax.Array  # int32 [num_steps, items], flat index of (batch row, KV head, tile)
    first: jax.Array  # int32 [num_steps, items], first chunk in which the token mask may leave a key visible
    end: jax.Array  # int32 [num_steps, items], one past the last such chunk


def make_lists(geometry: Geometry, plan: TilePlan, mask: TokenMask) -> Lists:
    problem, chunk = geometry.problem, geometry.config.chunk
    alive = _alive_slots(geometry, plan, mask)
    capacity = alive.shape[-1]
    slot = jnp.arange(capacity, dtype=jnp.int32)
    first = jnp.where(alive, slot, capacity).min(-1) // chunk
    end = -(-jnp.where(alive, slot + 1, 0).max(-1) // chunk)
    shape = (problem.batch, problem.num_kv_heads, geometry.num_tiles)
    first, end = (jnp.broadcast_to(x, shape).reshape(-1) for x in (first, end))
    item = jnp.argsort(end, stable=True).astype(jnp.int32)

    def by_step(x, fill):
        missing = geometry.num_steps * geometry.config.items - geometry.num_items
        return jnp.pad(x, (0, missing), constant_values=fill).reshape(geometry.num_steps, geometry.config.items)

    def by_chunk(x, fill):
        more_slots = num_blocks(capacity, chunk) * chunk - capacity
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, more_slots)] + [(0, 0)] * (x.ndim - 4), constant_values=fill)
        return x.reshape(*x.shape[:3], -1, chunk, *x.shape[4:])

    return Lists(
        ids=by_chunk(jnp.where(plan.blocks < 0, problem.num_kv_blocks, plan.blocks), problem.num_kv_blocks),
        membership=None if plan.membership is None else by_chunk(plan.membership, 0),
        item=by_step(item, geometry.num_items),
        first=by_step(first[item], capacity),
        end=by_step(end[item], 0),
    )


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


def locate(geometry: Geometry, lists: Lists, index: jax.Array) -> Step:
    """The step of a loop index."""
    item, first, end = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (lists.item, lists.first, lists.end))
    head, tile = item // geometry.num_tiles, item % geometry.num_tiles
    num_kv_heads = geometry.problem.num_kv_heads
    return Step(head // num_kv_heads, head % num_kv_heads, tile, first.min(), end.max())


def read_list(step: Step, x: jax.Array, c: jax.Array) -> jax.Array:
    """Chunk c of the lists of a step's items: x [batch or 1, heads or 1, num_tiles, num_chunks, ...] -> [items, ...]."""
    batch = step.batch if x.shape[0] > 1 else 0
    head = step.head if x.shape[1] > 1 else 0
    return x.at[batch, head, step.tile, c].get(mode="clip")


# ---- what a row sees


@dataclasses.dataclass(frozen=True)
class MaskTables:
    """The token mask by tile and block."""

    q_positions: jax.Array  # int32 [batch or 1, num_tiles, tile_size]
    kv_positions: jax.Array | None  # int32 [num_kv_blocks + 1, kv_block_size]; None: key j is at position j
    q_segments: jax.Array | None  # int32 [batch, num_tiles, tile_size]
    kv_segments: jax.Array | None  # int32 [batch, num_kv_blocks + 1, kv_block_size]
    mask: TokenMask


def make_mask_tables(geometry: Geometry, mask: TokenMask) -> MaskTables:
    problem = geometry.problem

    def pad_to(x, *shape):
        x = jnp.pad(x, [(0, 0), (0, shape[0] * shape[1] - x.shape[1])])
        return x.reshape(x.shape[0], *shape)

    tiles, blocks = (geometry.num_tiles, geometry.tile_size), (problem.num_kv_blocks + 1, problem.kv_block_size)
    return MaskTables(
        q_positions=pad_to(mask.q_positions, *tiles),
        kv_positions=pad_to(mask.kv_positions, *blocks)[0] if problem.varlen else None,
        q_segments=None if mask.q_segments is None else pad_to(mask.q_segments, *tiles),
        kv_segments=None if mask.kv_segments is None else pad_to(mask.kv_segments, *blocks),
        mask=mask,
    )


def visible(geometry: Geometry, step: Step, tables: MaskTables, ids: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Which keys of a chunk each row may attend.

    Args:
      ids: int32 [items, chunk].
      bits: uint32 [items, chunk, num_words] membership of the chunk, or `None`.

    Returns:
      bool, broadcastable to [items, tile_size, group_size, chunk, kv_block_size].
    """
    problem, mask = geometry.problem, tables.mask
    key = ids[..., None] * problem.kv_block_size + jnp.arange(problem.kv_block_size, dtype=jnp.int32)
    key = key[:, None, None]  # [items, 1, 1, chunk, kv_block_size]
    # Empty slots point past the last block, so this also drops them.
    keep = key < problem.kv_len
    if bits is not None:
        keep = keep & _members(geometry, bits)

    q = _read_tokens(step, tables.q_positions)
    kv = key if tables.kv_positions is None else tables.kv_positions[ids][:, None, None]
    if problem.is_causal:
        keep = keep & (kv <= q)
    near = None
    if mask.window_left is not None:
        near = kv >= q - _read_heads(geometry, step, mask.window_left)
    if mask.window_right is not None:
        right = kv <= q + _read_heads(geometry, step, mask.window_right)
        near = right if near is None else near & right
    if near is not None and mask.num_sinks is not None:
        near = near | (kv < _read_heads(geometry, step, mask.num_sinks))
    if near is not None:
        keep = keep & near
    if tables.q_segments is not None:
        batch = step.batch[:, None] if tables.kv_segments.shape[0] > 1 else 0
        kv_segment = tables.kv_segments.at[batch, ids].get(mode="clip")
        keep = keep & (_read_tokens(step, tables.q_segments) == kv_segment[:, None, None])
    if mask.predicate is not None:
        # Sequences of a packed batch are told apart by their segment.
        batch = _read_tokens(step, tables.q_segments) if problem.varlen else step.batch.reshape(-1, 1, 1, 1, 1)
        q_heads = jnp.arange(problem.num_q_heads, dtype=jnp.int32)
        keep = keep & mask.predicate(batch, _read_heads(geometry, step, q_heads), q, kv)
    return keep


def _members(geometry: Geometry, bits: jax.Array) -> jax.Array:
    """Membership words [items, chunk, num_words] -> bool [items, tile_size, group_size or 1, chunk, 1]."""
    token_groups = geometry.tile_size // geometry.row_group_tokens
    head_groups = geometry.problem.group_size // geometry.row_group_heads
    r = jnp.arange(token_groups * head_groups)
    word = jnp.swapaxes(bits[..., r // WORD_BITS], 1, 2)  # [items, row groups, chunk]
    member = (word >> (r % WORD_BITS).astype(jnp.uint32)[:, None]) & 1
    member = member.reshape(bits.shape[0], token_groups, head_groups, bits.shape[1], 1) != 0
    if token_groups > 1 and geometry.row_group_tokens > 1:
        member = jnp.repeat(member, geometry.row_group_tokens, axis=1)
    return member


def _read_tokens(step: Step, x: jax.Array) -> jax.Array:
    """x [batch or 1, num_tiles, tile_size] -> [items, tile_size, 1, 1, 1]."""
    x = x.at[step.batch if x.shape[0] > 1 else 0, step.tile].get(mode="clip")
    return x[:, :, None, None, None]


def _read_heads(geometry: Geometry, step: Step, x: jax.Array) -> jax.Array:
    """x [num_q_heads] -> [items, 1, group_size, 1, 1]."""
    x = x.reshape(-1, geometry.problem.group_size)[step.head]
    return x[:, None, :, None, None]


def scores(geometry: Geometry, query: jax.Array, key: jax.Array, key_bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Logits before the token mask, and their derivative with respect to the scaled product (1.0 without a soft cap).

    Args:
      query: [items, rows, head_dim].
      key: [items, keys, head_dim].
      key_bias: [items, keys] or `None`.
    """
    problem = geometry.problem
    product = jnp.einsum("ird,ikd->irk", query, key, preferred_element_type=geometry.accumulator_dtype)
    logits, slope = product * problem.scale, 1.0
    if problem.logits_soft_cap is not None:
        capped = jnp.tanh(logits / problem.logits_soft_cap)
        logits, slope = capped * problem.logits_soft_cap, 1 - capped * capped
    if key_bias is not None:
        logits = logits + key_bias[:, None]
    return logits, slope


# ---- one chunk


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The blocks of one step of the inner loop."""

    ids: jax.Array  # int32 [items, chunk]
    key: jax.Array  # [items, keys, head_dim], keys = chunk * kv_block_size
    value: jax.Array  # [items, keys, value_head_dim]
    key_bias: jax.Array | None  # [items, keys]
    visible: jax.Array  # bool [items, rows, keys]


def read_chunk(geometry: Geometry, step: Step, keys: KeyBlocks, lists: Lists, tables: MaskTables, c: jax.Array) -> Chunk:
    ids = read_list(step, lists.ids, c)
    bits = None if lists.membership is None else read_list(step, lists.membership, c)
    key, value = (read_blocks(geometry, step, x, ids).astype(geometry.matmul_dtype) for x in (keys.key, keys.value))

    def drop_unseen(i, pair):
        # The barrier keeps XLA from moving this out of a loop that hardly ever runs.
        own_ids = jax.lax.optimization_barrier((ids, i))[0]
        seen = visible(geometry, step, tables, own_ids, bits).any((1, 2))
        seen = jnp.broadcast_to(seen, (*ids.shape, seen.shape[-1])).reshape(ids.shape[0], -1, 1)
        return tuple(jnp.where(seen, x, 0) for x in pair)

    # A key that no row of a tile sees must not turn into 0 * NaN. Rarely needed, and the reduction over rows is not free: a
    # loop of no or one step costs nothing in the usual case, where a conditional would copy its operands.
    key, value = jax.lax.fori_loop(0, keys.num_repairs, drop_unseen, (key, value))
    return Chunk(
        ids=ids,
        key=key,
        value=value,
        key_bias=None if keys.key_bias is None else read_blocks(geometry, step, keys.key_bias, ids)[..., 0],
        visible=_rows_visible(geometry, visible(geometry, step, tables, ids, bits)),
    )


def _rows_visible(geometry: Geometry, keep: jax.Array) -> jax.Array:
    """`visible`'s result as bool [items, rows, keys]."""
    items, tile_size, group_size = keep.shape[0], geometry.tile_size, geometry.problem.group_size
    keep = jnp.broadcast_to(keep, (items, tile_size, group_size, *keep.shape[3:]))
    return keep.reshape(items, tile_size * group_size, -1)
