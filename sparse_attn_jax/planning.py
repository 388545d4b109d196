"""`TilePlan`: the union of block lists that each query tile walks, and its inverse."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax.problem import MAX_LENGTH
from sparse_attn_jax.selection import BlockSelection, num_blocks

WORD_BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """What a kernel walks: per query tile the ascending union of its rows' lists, and per KV block the tiles that chose it.

    A query tile is `tile_size` consecutive tokens with all query heads of one KV head. A row group is the set of a tile's rows
    that share one list: `row_group_tokens` consecutive tokens, of one query head when `row_group_heads` is 1, else of all
    `group_size` heads. Row groups are numbered token-major, head-minor.

    Attributes:
      blocks: int32 [batch or 1, heads, num_tiles, capacity], heads in {1, num_kv_heads}; ascending unique ids, then -1.
      counts: int32 [batch or 1, heads, num_tiles], number of ids in each list.
      membership: uint32 [batch or 1, heads, num_tiles, capacity, num_words]; bit r % 32 of word r // 32 tells whether row
        group r chose the block. `None` when a tile is a single row group: then every listed block belongs to all rows.
      inverse_offsets: int32 [batch or 1, heads, num_kv_blocks + 1], CSR offsets into the two arrays below; `None` if not built.
      inverse_tiles: int32 [batch or 1, heads, num_tiles * capacity], ascending tile ids of each block's list.
      inverse_slots: int32, as `inverse_tiles`: where the block stands in that tile's list (to look up its membership).
      predicate: the selection's predicate.
    """

    blocks: jax.Array
    counts: jax.Array
    membership: jax.Array | None
    inverse_offsets: jax.Array | None
    inverse_tiles: jax.Array | None
    inverse_slots: jax.Array | None
    predicate: Any
    q_len: int = dataclasses.field(metadata=dict(static=True))
    kv_len: int = dataclasses.field(metadata=dict(static=True))
    num_q_heads: int = dataclasses.field(metadata=dict(static=True))
    num_kv_heads: int = dataclasses.field(metadata=dict(static=True))
    q_block_size: int = dataclasses.field(metadata=dict(static=True))
    kv_block_size: int = dataclasses.field(metadata=dict(static=True))
    selection_heads: int = dataclasses.field(metadata=dict(static=True))
    num_slots: int = dataclasses.field(metadata=dict(static=True))
    tile_size: int = dataclasses.field(metadata=dict(static=True))
    row_group_tokens: int = dataclasses.field(metadata=dict(static=True))
    row_group_heads: int = dataclasses.field(metadata=dict(static=True))

    @property
    def num_tiles(self) -> int:
        return num_blocks(self.q_len, self.tile_size)

    @property
    def num_row_groups(self) -> int:
        """Row groups per tile."""
        group_size = self.num_q_heads // self.num_kv_heads
        return (self.tile_size // self.row_group_tokens) * (group_size // self.row_group_heads)


# Rows of a tile whose tokens have lists of their own: more share more keys, but their union grows, and with the length.
MIXED_TILE_ROWS = 32
# Tokens of a tile whose tokens share a list.
SHARED_TILE_TOKENS = 64


def default_tile_size(
    q_block_size: int,
    group_size: int,
    q_len: int,
    mixed_tile_rows: int = MIXED_TILE_ROWS,
    shared_tile_tokens: int = SHARED_TILE_TOKENS,
) -> int:
    """Tokens per query tile: whole query blocks where they are small, an even part of one where it is large."""
    tokens = max(1, mixed_tile_rows // group_size)
    if 2 * q_block_size >= tokens:
        # Rows of different query blocks share a tile only if the tile were too small otherwise.
        tokens = max(tokens, min(q_block_size, shared_tile_tokens))
        tile_size = max(n for n in range(1, tokens + 1) if q_block_size % n == 0)
        tile_size = tile_size if 4 * tile_size >= tokens else tokens
    else:
        tile_size = q_block_size * (tokens // q_block_size)
    return min(tile_size, q_len)


def build_plan(
    selection: BlockSelection,
    *,
    q_len: int,
    kv_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    tile_size: int | None = None,
    with_inverse: bool = True,
) -> TilePlan:
    """`plan_attention` without argument checks."""
    group_size = num_q_heads // num_kv_heads
    if tile_size is None:
        tile_size = default_tile_size(selection.q_block_size, group_size, q_len)
    heads = selection.indices.shape[1]
    per_q_head = heads == num_q_heads and group_size > 1
    row_group_tokens = math.gcd(tile_size, selection.q_block_size)
    if q_len <= selection.q_block_size:
        row_group_tokens = tile_size
    lists = _lists_of_tiles(selection, q_len, tile_size, row_group_tokens, group_size if per_q_head else 1)
    num_kv_blocks = num_blocks(kv_len, selection.kv_block_size)
    blocks, membership = _union(lists, num_kv_blocks)
    if row_group_tokens == tile_size:
        # Tiles inside one query block share its list: the union was built once per query block.
        num_tiles = num_blocks(q_len, tile_size)
        repeats = num_blocks(min(selection.q_block_size, q_len), tile_size)
        blocks = jnp.repeat(blocks, repeats, axis=2)[:, :, :num_tiles]
        membership = None if membership is None else jnp.repeat(membership, repeats, axis=2)[:, :, :num_tiles]
    plan = TilePlan(
        blocks=blocks,
        counts=(blocks >= 0).sum(-1, dtype=jnp.int32),
        membership=membership,
        inverse_offsets=None,
        inverse_tiles=None,
        inverse_slots=None,
        predicate=selection.predicate,
        q_len=q_len,
        kv_len=kv_len,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_block_size=selection.q_block_size,
        kv_block_size=selection.kv_block_size,
        selection_heads=heads,
        num_slots=selection.indices.shape[-1],
        tile_size=tile_size,
        row_group_tokens=row_group_tokens,
        row_group_heads=1 if per_q_head else group_size,
    )
    return add_inverse(plan) if with_inverse else plan


def add_inverse(plan: TilePlan) -> TilePlan:
    """The plan with its inverse, which is built if it is not there."""
    if plan.inverse_offsets is not None:
        return plan
    offsets, tiles, slots = _invert(plan.blocks, num_blocks(plan.kv_len, plan.kv_block_size))
    return dataclasses.replace(plan, inverse_offsets=offsets, inverse_tiles=tiles, inverse_slots=slots)


def _lists_of_tiles(
    selection: BlockSelection, q_len: int, tile_size: int, row_group_tokens: int, heads_per_list: int
) -> jax.Array:
    """Lists by tile and row group: [batch, heads, num_tiles, row groups, slots].

    Where a tile lies within one query block, there is one entry per query block instead of one per tile.
    """
    batch, heads, num_rows, num_slots = selection.indices.shape
    indices = selection.indices.reshape(batch, heads // heads_per_list, heads_per_list, num_rows, num_slots)
    indices = jnp.moveaxis(indices, 2, 3)  # [batch, heads, rows, heads_per_list, slots]
    if row_group_tokens == tile_size:
        return indices
    num_groups = tile_size // row_group_tokens
    num_tiles = num_blocks(q_len, tile_size)
    if row_group_tokens == selection.q_block_size:
        padding = num_tiles * num_groups - num_rows
        indices = jnp.pad(indices, [(0, 0), (0, 0), (0, padding), (0, 0), (0, 0)], constant_values=-1)
    else:
        rows = jnp.arange(num_tiles * num_groups) * row_group_tokens // selection.q_block_size
        indices = jnp.take(indices, rows, axis=2, mode="fill", fill_value=-1)
    return indices.reshape(*indices.shape[:2], num_tiles, num_groups * heads_per_list, num_slots)


def _union(lists: jax.Array, num_kv_blocks: int) -> tuple[jax.Array, jax.Array | None]:
    """Ascending unique ids of lists [batch, heads, tiles, row groups, slots] by tile, -1 padded, and their membership bits."""
    num_groups, num_slots = lists.shape[-2:]
    capacity = min(num_groups * num_slots, num_kv_blocks)
    valid = (lists >= 0) & (lists < num_kv_blocks)
    # One int32 sorts by block, then by row group, and carries both.
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    keys = jnp.where(valid, lists * num_groups + group, num_kv_blocks * num_groups)
    keys = jnp.sort(keys.reshape(*lists.shape[:-2], num_groups * num_slots), axis=-1)
    ids = keys // num_groups
    before = jnp.concatenate([jnp.full_like(keys[..., :1], -1), keys[..., :-1]], axis=-1)
    is_first = (ids != jnp.where(before < 0, -1, before // num_groups)) & (ids < num_kv_blocks)
    slot = jnp.cumsum(is_first, axis=-1, dtype=jnp.int32) - 1

    # Mapped over tiles and not over one flat axis of them: XLA can then split batch and heads between devices.
    def over_tiles(function):
        return functools.reduce(lambda mapped, _: jax.vmap(mapped), ids.shape[:-1], function)

    slot_of_first = jnp.where(is_first, slot, capacity)
    empty = jnp.full((capacity,), -1, jnp.int32)
    blocks = over_tiles(lambda slots, ids: empty.at[slots].set(ids, mode="drop"))(slot_of_first, ids)
    if num_groups == 1:
        return blocks, None

    num_words = num_blocks(num_groups, WORD_BITS)
    row_group = keys % num_groups
    is_new = (keys != before) & (ids < num_kv_blocks)
    bit = jnp.uint32(1) << (row_group % WORD_BITS).astype(jnp.uint32)
    slot_of_new = jnp.where(is_new, slot, capacity)
    zeros = jnp.zeros((capacity, num_words), jnp.uint32)
    set_bits = lambda slots, words, bits: zeros.at[slots, words].add(bits, mode="drop")
    return blocks, over_tiles(set_bits)(slot_of_new, row_group // WORD_BITS, bit)


def _invert(blocks: jax.Array, num_kv_blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CSR by KV block of the tiles that list it. blocks: [batch, heads, num_tiles, capacity]."""
    capacity = blocks.shape[-1]
    ids = blocks.reshape(*blocks.shape[:2], -1)
    ids = jnp.where(ids < 0, num_kv_blocks, ids)
    # Stable, so that a block's tiles stay ascending.
    entry = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 2)
    ids, entry = jax.lax.sort((ids, entry), num_keys=1, is_stable=True)
    edges = jnp.arange(num_kv_blocks + 1, dtype=jnp.int32)
    find = jax.vmap(jax.vmap(lambda row: jnp.searchsorted(row, edges)))
    offsets = find(ids).astype(jnp.int32)
    listed = ids < num_kv_blocks
    return offsets, jnp.where(listed, entry // capacity, -1), jnp.where(listed, entry % capacity, -1)


def index_overflow(num_kv_blocks: int, num_row_groups: int, num_tiles: int, capacity: int) -> str | None:
    """Says which int32 product of a plan would overflow, or `None`."""
    for what, size in (
        ("num_kv_blocks * row groups per tile", num_kv_blocks * num_row_groups),
        ("num_tiles * list capacity", num_tiles * capacity),
    ):
        if size > MAX_LENGTH:
            return f"{what} is {size}, more than the {MAX_LENGTH} that int32 plan arithmetic allows"
    return None
