"""`TilePlan` built by hand-written CUDA kernels, in time and memory that are linear in the lists."""

import dataclasses
import functools

import jax
import numpy as np

from sparse_attn_jax import planning
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.selection import BlockSelection, num_blocks

# The lists of one KV head are of all its query heads, or of each.
UNIONS = EntryPoint(
    library.custom_call(library.PLAN_UNIONS),
    ("bkgrs",),
    (Result("blocks", "bknc"), Result("counts", "bkn"), Result("membership", "bkncw", "uint32")),
)
INVERSE = EntryPoint(
    library.custom_call(library.PLAN_INVERSE),
    ("bknc",),
    (Result("offsets", "bko"), Result("tiles", "bke"), Result("slots", "bke"), Result("cursors", "bkmv")),
)

# Tiles that are sorted one after the other. More parts run at a time, and need more memory: a counter per part and block.
MIN_TILES_PER_PART = 32


def build_plan(
    selection: BlockSelection,
    *,
    q_len: int,
    kv_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    tile_size: int | None = None,
    with_inverse: bool = True,
    window_blocks: int | None = None,
) -> TilePlan:
    """The same as `planning.build_plan`.

    Args:
      selection: the lists.
      q_len: number of queries.
      kv_len: number of keys.
      num_q_heads: query heads.
      num_kv_heads: KV heads.
      tile_size: query tokens per tile; `None` chooses.
      with_inverse: build the inverse as well.
      window_blocks: blocks that are marked at a time, a multiple of 32; `None` is as many as there is room for.

    Returns:
      A `TilePlan` with equal arrays.
    """
    sizes = dict(q_len=q_len, kv_len=kv_len, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, tile_size=tile_size)
    plan = jax.eval_shape(functools.partial(planning.build_plan, **sizes, with_inverse=False), selection)
    _, heads, num_tiles, capacity = plan.blocks.shape
    if plan.blocks.size == 0:
        return planning.build_plan(selection, **sizes, with_inverse=with_inverse)
    library.register()
    indices = selection.indices
    results = UNIONS(
        indices.reshape(indices.shape[0], heads, -1, *indices.shape[2:]),
        sizes=dict(n=num_tiles, c=capacity, w=0 if plan.membership is None else plan.membership.shape[-1]),
        without=("membership",) if plan.membership is None else (),
        num_kv_blocks=np.int32(num_blocks(kv_len, plan.kv_block_size)),
        q_block_size=np.int32(plan.q_block_size),
        tile_size=np.int32(plan.tile_size),
        row_group_tokens=np.int32(plan.row_group_tokens),
        window_blocks=np.int32(window_blocks or 0),
        seed=library.seed(),
    )
    membership = None if plan.membership is None else results[2]
    plan = dataclasses.replace(plan, blocks=results[0], counts=results[1], membership=membership, predicate=selection.predicate)
    return add_inverse(plan) if with_inverse else plan


def add_inverse(plan: TilePlan) -> TilePlan:
    """The plan with its inverse, which is built if it is not there."""
    if plan.inverse_offsets is not None:
        return plan
    library.register()
    num_kv_blocks = num_blocks(plan.kv_len, plan.kv_block_size)
    num_tiles, capacity = plan.blocks.shape[2:]
    # No more counters than entries.
    tiles_per_part = max(MIN_TILES_PER_PART, num_blocks(num_kv_blocks, max(capacity, 1)))
    offsets, tiles, slots, _ = INVERSE(
        plan.blocks,
        sizes=dict(o=num_kv_blocks + 1, e=num_tiles * capacity, m=num_blocks(num_tiles, tiles_per_part), v=num_kv_blocks),
        num_kv_blocks=np.int32(num_kv_blocks),
        seed=library.seed(),
    )
    return dataclasses.replace(plan, inverse_offsets=offsets, inverse_tiles=tiles, inverse_slots=slots)
