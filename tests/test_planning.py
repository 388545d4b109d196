"""`TilePlan` against its definition, by loops over rows: unions, membership bits, inverse lists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax.planning import default_tile_size


@dataclasses.dataclass(frozen=True)
class Sizes:
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    q_block_size: int
    kv_block_size: int
    heads: int
    tile_size: int | None = None
    batch: int = 2
    num_slots: int = 5


CASES = {
    "per_token": Sizes(50, 70, 4, 2, 1, 16, 2),
    "per_token_one_tile": Sizes(3, 70, 4, 2, 1, 16, 2, tile_size=8),
    "more_than_32_row_groups": Sizes(100, 90, 2, 2, 1, 8, 2, tile_size=70),
    "per_query_head": Sizes(40, 64, 6, 2, 1, 16, 6, tile_size=10),
    "per_query_head_blocks": Sizes(64, 64, 6, 2, 16, 16, 6, tile_size=16),
    "shared_by_heads": Sizes(64, 64, 6, 2, 16, 16, 1),
    "tiles_within_a_query_block": Sizes(100, 64, 2, 2, 48, 16, 2, tile_size=16),
    "query_blocks_within_a_tile": Sizes(100, 64, 2, 2, 12, 16, 2, tile_size=48),
    "tile_does_not_divide": Sizes(100, 64, 2, 1, 30, 16, 1, tile_size=16),
    "one_list_for_all": Sizes(100, 64, 4, 1, 1000, 16, 1, tile_size=32, batch=1),
    "one_list_per_query_head": Sizes(90, 64, 4, 1, 1000, 16, 4, tile_size=32),
}


def make_selection(sizes: Sizes) -> sa.BlockSelection:
    """Ids with duplicates, -1 in the middle and values out of range on both sides."""
    rows = -(-sizes.q_len // sizes.q_block_size)
    num_kv_blocks = -(-sizes.kv_len // sizes.kv_block_size)
    rng = np.random.default_rng(0)
    indices = rng.integers(-2, num_kv_blocks + 2, (sizes.batch, sizes.heads, rows, sizes.num_slots)).astype(np.int32)
    indices[0, 0, 0] = [-1, np.iinfo(np.int32).max, np.iinfo(np.int32).min, num_kv_blocks, -1]
    return sa.BlockSelection(jnp.asarray(indices), q_block_size=sizes.q_block_size, kv_block_size=sizes.kv_block_size)


def plan_of(sizes: Sizes, selection: sa.BlockSelection) -> sa.TilePlan:
    return sa.plan_attention(
        selection,
        q_len=sizes.q_len,
        kv_len=sizes.kv_len,
        num_q_heads=sizes.num_q_heads,
        num_kv_heads=sizes.num_kv_heads,
        tile_size=sizes.tile_size,
    )


def chosen_by_rows(sizes: Sizes, selection: sa.BlockSelection, plan: sa.TilePlan, batch: int, head: int, tile: int):
    """{block: set of (token, query head in the group)} of one tile, from the lists as they are defined."""
    group_size = sizes.num_q_heads // sizes.num_kv_heads
    num_kv_blocks = -(-sizes.kv_len // sizes.kv_block_size)
    chosen: dict[int, set] = {}
    for token in range(tile * plan.tile_size, min((tile + 1) * plan.tile_size, sizes.q_len)):
        for member in range(group_size):
            list_head = {1: 0, sizes.num_kv_heads: head, sizes.num_q_heads: head * group_size + member}[sizes.heads]
            for block in np.asarray(selection.indices)[batch, list_head, token // sizes.q_block_size]:
                if 0 <= block < num_kv_blocks:
                    chosen.setdefault(int(block), set()).add((token, member))
    return chosen


def rows_of_bits(plan: sa.TilePlan, words, tile: int) -> set:
    """The (token, query head in the group) pairs whose row group has its bit set."""
    group_size = plan.num_q_heads // plan.num_kv_heads
    heads_per_token = group_size // plan.row_group_heads
    rows = set()
    for token in range(tile * plan.tile_size, min((tile + 1) * plan.tile_size, plan.q_len)):
        for member in range(group_size):
            r = (token - tile * plan.tile_size) // plan.row_group_tokens * heads_per_token + member // plan.row_group_heads
            if int(words[r // 32]) >> (r % 32) & 1:
                rows.add((token, member))
    return rows


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_plan_is_the_union_of_its_rows(sizes):
    selection = make_selection(sizes)
    plan = plan_of(sizes, selection)
    blocks, counts = np.asarray(plan.blocks), np.asarray(plan.counts)
    assert blocks.shape[2] == -(-sizes.q_len // plan.tile_size)
    for batch, head, tile in np.ndindex(blocks.shape[:3]):
        chosen = chosen_by_rows(sizes, selection, plan, batch, head, tile)
        listed = blocks[batch, head, tile]
        assert listed[: counts[batch, head, tile]].tolist() == sorted(chosen)
        assert (listed[counts[batch, head, tile] :] == -1).all()
        for slot, block in enumerate(sorted(chosen)):
            everyone = {(t, m) for rows in chosen.values() for t, m in rows}
            if plan.membership is None:
                assert chosen[block] == everyone
            else:
                assert rows_of_bits(plan, np.asarray(plan.membership)[batch, head, tile, slot], tile) == chosen[block]


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_plan_inverse_lists_each_blocks_tiles(sizes):
    plan = plan_of(sizes, make_selection(sizes))
    blocks = np.asarray(plan.blocks)
    offsets, tiles, slots = (np.asarray(x) for x in (plan.inverse_offsets, plan.inverse_tiles, plan.inverse_slots))
    num_kv_blocks = -(-sizes.kv_len // sizes.kv_block_size)
    assert offsets.shape[-1] == num_kv_blocks + 1
    for batch, head in np.ndindex(blocks.shape[:2]):
        for block in range(num_kv_blocks):
            part = slice(offsets[batch, head, block], offsets[batch, head, block + 1])
            wanted = [tuple(x) for x in np.argwhere(blocks[batch, head] == block)]
            assert list(zip(tiles[batch, head, part], slots[batch, head, part], strict=True)) == wanted
        assert (tiles[batch, head, offsets[batch, head, -1] :] == -1).all()


def test_plan_without_inverse_leaves_it_out():
    sizes = CASES["per_token"]
    plan = sa.plan_attention(make_selection(sizes), q_len=50, kv_len=70, num_q_heads=4, num_kv_heads=2, with_inverse=False)
    assert plan.inverse_offsets is None and plan.inverse_tiles is None and plan.inverse_slots is None


def test_plan_passes_through_jit_and_keeps_its_static_fields():
    sizes = CASES["per_query_head"]
    selection = make_selection(sizes)
    plan = plan_of(sizes, selection)
    traced = jax.jit(lambda s: plan_of(sizes, s))(selection)
    assert jax.tree.structure(plan) == jax.tree.structure(traced)
    for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(traced), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("group_size", [1, 3, 16, 200])
@pytest.mark.parametrize("q_block_size", [1, 2, 16, 50, 64, 97, 128, 256, 5000])
def test_default_tile_size_keeps_query_blocks_whole(q_block_size, group_size):
    tile_size = default_tile_size(q_block_size, group_size, q_len=10_000)
    assert 1 <= tile_size <= 64
    assert tile_size % q_block_size == 0 or q_block_size % tile_size == 0 or q_block_size in (97,)
    assert default_tile_size(q_block_size, group_size, q_len=1) == 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(q_len=0), "`q_len`"),
        (dict(q_len=51), "`selection.indices`"),
        (dict(num_kv_heads=3), "`num_kv_heads`"),
        (dict(tile_size=0), "`tile_size`"),
        (dict(kv_len=2**30, num_q_heads=200, num_kv_heads=2), "`selection`"),
    ],
)
def test_plan_refuses_bad_sizes(change, name):
    arguments = dict(q_len=50, kv_len=70, num_q_heads=4, num_kv_heads=2) | change
    with pytest.raises(ValueError, match=name):
        sa.plan_attention(make_selection(CASES["per_token"]), **arguments)
