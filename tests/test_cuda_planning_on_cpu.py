"""The CUDA kernels that build plans, run on a CPU by the simulator: they make the same arrays as XLA does."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax import planning
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.planning import add_inverse, build_plan

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def always_on_cpu(cuda_on_cpu):
    pass


@dataclasses.dataclass(frozen=True)
class Sizes:
    q_len: int
    kv_len: int
    group_size: int = 1
    num_kv_heads: int = 1
    heads: str = "kv"  # of the lists: one, KV or query heads
    q_block_size: int = 1
    kv_block_size: int = 16
    tile_size: int | None = None
    batch: int = 1
    num_slots: int = 5

    def arguments(self) -> dict:
        heads = dict(num_q_heads=self.num_kv_heads * self.group_size, num_kv_heads=self.num_kv_heads)
        return dict(q_len=self.q_len, kv_len=self.kv_len, tile_size=self.tile_size, **heads)


CASES = {
    "per_token": Sizes(50, 70, 2, 2, batch=2),
    "one_tile": Sizes(3, 70, 2, 2, tile_size=8),
    "more_than_32_row_groups": Sizes(100, 90, kv_block_size=8, tile_size=70),
    "more_than_64_row_groups": Sizes(100, 90, 2, 2, heads="q", kv_block_size=8, tile_size=50),
    "per_query_head": Sizes(40, 64, 3, 2, heads="q", tile_size=10, batch=2),
    "per_query_head_blocks": Sizes(64, 64, 3, 2, heads="q", q_block_size=16, tile_size=16),
    "shared_by_heads": Sizes(64, 64, 3, 2, heads="one", q_block_size=16),
    "tiles_within_a_query_block": Sizes(100, 64, 1, 2, q_block_size=48, tile_size=16),
    "query_blocks_within_a_tile": Sizes(100, 64, 1, 2, q_block_size=12, tile_size=48),
    "tile_does_not_divide": Sizes(100, 64, 2, 1, heads="one", q_block_size=30, tile_size=16),
    "one_list_for_all": Sizes(100, 64, 4, q_block_size=1000, tile_size=32),
    "one_list_per_query_head": Sizes(90, 64, 4, heads="q", q_block_size=1000, tile_size=32),
    "many_tiles": Sizes(700, 300, 1, 2, kv_block_size=1, tile_size=1, num_slots=4),
    "more_blocks_than_threads": Sizes(20, 3000, 2, kv_block_size=1, num_slots=200, tile_size=7),
    "more_blocks_than_threads_and_one_row_group": Sizes(3, 3000, kv_block_size=1, num_slots=200, tile_size=1),
    "no_slots": Sizes(20, 60, 2, num_slots=0),
}
HOSTILE = np.array([-1, -2, -(2**31), 2**31 - 1, 2**30])


def make_selection(sizes: Sizes, seed: int = 0) -> sa.BlockSelection:
    """Ids with duplicates, -1 in the middle and values out of range on both sides."""
    heads = dict(one=1, kv=sizes.num_kv_heads, q=sizes.num_kv_heads * sizes.group_size)[sizes.heads]
    num_rows, num_kv_blocks = -(-sizes.q_len // sizes.q_block_size), -(-sizes.kv_len // sizes.kv_block_size)
    generator = np.random.default_rng(seed)
    shape = sizes.batch, heads, num_rows, sizes.num_slots
    indices = generator.integers(0, num_kv_blocks + 1, shape)
    indices = np.where(generator.random(shape) < 0.2, generator.choice(HOSTILE, shape), indices)
    indices[0, 0, num_rows // 2] = -1
    options = dict(q_block_size=sizes.q_block_size, kv_block_size=sizes.kv_block_size)
    return sa.BlockSelection(jnp.asarray(indices, jnp.int32), **options)


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_plan_equals_that_of_xla(name):
    sizes = CASES[name]
    selection = make_selection(sizes)
    expected = planning.build_plan(selection, **sizes.arguments())
    assert_same(build_plan(selection, **sizes.arguments()), expected)


@pytest.mark.parametrize("name", ["more_blocks_than_threads", "more_blocks_than_threads_and_one_row_group"])
@pytest.mark.parametrize("window_blocks", [32, 64, 1024, 4096])
def test_windows_change_nothing(window_blocks, name):
    sizes = CASES[name]
    selection = make_selection(sizes)
    expected = planning.build_plan(selection, **sizes.arguments())
    assert_same(build_plan(selection, **sizes.arguments(), window_blocks=window_blocks), expected)


def test_too_many_row_groups_for_one_window():
    """2,100 row groups have 66 words of membership: 11 windows of blocks."""
    sizes = Sizes(2100, 2000, kv_block_size=1, tile_size=2100, num_slots=1)
    selection = make_selection(sizes)
    assert_same(build_plan(selection, **sizes.arguments()), planning.build_plan(selection, **sizes.arguments()))


@pytest.mark.parametrize("fill", [-1, 3])
def test_lists_that_are_all_the_same(fill):
    sizes = CASES["per_token"]
    selection = make_selection(sizes)
    selection = dataclasses.replace(selection, indices=jnp.full_like(selection.indices, fill))
    assert_same(build_plan(selection, **sizes.arguments()), planning.build_plan(selection, **sizes.arguments()))


def test_order_of_blocks_and_threads_changes_nothing(monkeypatch):
    sizes = CASES["many_tiles"]
    selection = make_selection(sizes)
    expected = build_plan(selection, **sizes.arguments())
    for seed in ("1", "2"):
        monkeypatch.setenv(library.SEED, seed)
        assert_same(build_plan(selection, **sizes.arguments()), expected)


def plan_that_names_blocks_that_do_not_exist() -> planning.TilePlan:
    sizes = CASES["per_token"]
    plan = planning.build_plan(make_selection(sizes), **sizes.arguments(), with_inverse=False)
    generator = np.random.default_rng(0)
    is_bad = generator.random(plan.blocks.shape) < 0.3
    blocks = np.where(is_bad, generator.choice(HOSTILE, plan.blocks.shape), plan.blocks)
    return dataclasses.replace(plan, blocks=jnp.asarray(blocks, jnp.int32))


def test_inverse_of_a_plan_that_names_blocks_that_do_not_exist():
    plan = plan_that_names_blocks_that_do_not_exist()
    assert_same(add_inverse(plan), planning.add_inverse(plan))


def test_inverse_that_is_there_is_kept():
    sizes = CASES["per_token"]
    plan = build_plan(make_selection(sizes), **sizes.arguments())
    assert add_inverse(plan) is plan
    without = build_plan(make_selection(sizes), **sizes.arguments(), with_inverse=False)
    assert without.inverse_offsets is None and without.inverse_tiles is None and without.inverse_slots is None


def test_vmap_and_jit():
    sizes = CASES["per_query_head"]
    selections = [make_selection(sizes, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *selections)
    found = jax.jit(jax.vmap(lambda selection: build_plan(selection, **sizes.arguments())))(stacked)
    expected = [planning.build_plan(selection, **sizes.arguments()) for selection in selections]
    assert_same(found, jax.tree.map(lambda *x: jnp.stack(x), *expected))


@st.composite
def random_sizes(draw) -> Sizes:
    q_len = draw(st.integers(1, 200))
    tile_size = draw(st.one_of(st.none(), st.integers(1, min(80, q_len))))
    q_block_size = draw(st.sampled_from([1, 1, 1, 2, 5, 16, 64, 100, 1000]))
    return Sizes(
        q_len=q_len,
        kv_len=draw(st.integers(1, 900)),
        group_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
        num_kv_heads=draw(st.integers(1, 2)),
        heads=draw(st.sampled_from(["one", "kv", "q"])),
        q_block_size=q_block_size,
        kv_block_size=draw(st.sampled_from([1, 8, 16, 64])),
        tile_size=tile_size,
        batch=draw(st.integers(1, 2)),
        num_slots=draw(st.sampled_from([1, 3, 5, 40])),
    )


@hypothesis.given(random_sizes(), st.integers(0, 100), st.sampled_from([None, None, 32, 96]))
@hypothesis.settings(max_examples=10, suppress_health_check=list(hypothesis.HealthCheck))
def test_random_plans_equal_those_of_xla(sizes, seed, window_blocks):
    selection = make_selection(sizes, seed)
    expected = planning.build_plan(selection, **sizes.arguments())
    assert_same(build_plan(selection, **sizes.arguments(), window_blocks=window_blocks), expected)


# What the handlers refuse.

# 10 tiles of 2 tokens, each token with two lists of 3 slots; 7 blocks.
UNIONS = {
    "indices": ((2, 2, 2, 20, 3), "int32"),
    "blocks": ((2, 2, 10, 7), "int32"),
    "counts": ((2, 2, 10), "int32"),
    "membership": ((2, 2, 10, 7, 1), "uint32"),
}
INVERSE = {
    "blocks": ((2, 2, 10, 7), "int32"),
    "offsets": ((2, 2, 8), "int32"),
    "tiles": ((2, 2, 70), "int32"),
    "slots": ((2, 2, 70), "int32"),
    "cursors": ((2, 2, 3, 7), "int32"),
}
UNION_ATTRIBUTES = dict(
    num_kv_blocks=np.int32(7), q_block_size=np.int32(1), tile_size=np.int32(2), row_group_tokens=np.int32(1),
    window_blocks=np.int32(0), seed=np.int64(0),
)  # fmt: skip
CALLS = {
    library.PLAN_UNIONS: (UNIONS, UNION_ATTRIBUTES),
    library.PLAN_INVERSE: (INVERSE, dict(num_kv_blocks=np.int32(7), seed=np.int64(0))),
}


def call_handler(target: str, arrays: dict | None = None, **attributes) -> list[np.ndarray]:
    library.load(jax.default_backend())
    sound, sound_attributes = CALLS[target]
    argument, *results = (sound | (arrays or {})).values()
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(*result) for result in results])
    argument = jnp.zeros(*argument)
    if argument.ndim > 0:
        argument += jnp.arange(argument.shape[-1], dtype=argument.dtype)
    return [np.asarray(x) for x in call(argument, **(sound_attributes | attributes))]


def test_sound_calls_of_the_handlers():
    """Each list names blocks 0, 1 and 2; and each tile of a plan all seven."""
    blocks, counts, membership = call_handler(library.PLAN_UNIONS)
    assert (blocks == [0, 1, 2, -1, -1, -1, -1]).all() and (counts == 3).all()
    assert (membership[..., 0] == [15, 15, 15, 0, 0, 0, 0]).all()
    offsets, tiles, slots, _ = call_handler(library.PLAN_INVERSE)
    assert (offsets == 10 * np.arange(8)).all()
    assert (tiles == np.tile(np.arange(10), 7)).all() and (slots == np.repeat(np.arange(7), 10)).all()


@pytest.mark.parametrize("target, name", [(target, name) for target in CALLS for name in CALLS[target][0]])
def test_arrays_of_wrong_shape_or_dtype(target, name):
    shape, dtype = CALLS[target][0][name]
    wrong = [(*shape[:i], shape[i] + 1, *shape[i + 1 :]) for i in range(len(shape))]
    if (target, name) == (library.PLAN_UNIONS, "indices"):
        wrong = [(3, *shape[1:]), (2, 3, *shape[2:]), (2, 2, 20, *shape[3:])]  # more rows than tiles need do no harm
    if name == "cursors":
        wrong.remove((2, 2, 4, 7))  # more parts
    for changed in [*((x, dtype) for x in (*wrong, shape[1:], (*shape, 1), ())), (shape, "int16"), (shape, "float32")]:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call_handler(target, {name: changed})
            pytest.fail(f"{name}: {changed}")


@pytest.mark.parametrize(
    ("target", "attributes", "message"),
    [
        (library.PLAN_UNIONS, dict(num_kv_blocks=-1), "num_kv_blocks must not be negative"),
        (library.PLAN_UNIONS, dict(num_kv_blocks=6), "blocks must have room for all slots of a tile or all blocks"),
        (library.PLAN_UNIONS, dict(num_kv_blocks=13), "blocks must have room for all slots of a tile or all blocks"),
        (library.PLAN_UNIONS, dict(q_block_size=0), "q_block_size must be positive"),
        (library.PLAN_UNIONS, dict(tile_size=0), "tile_size must be a positive multiple of row_group_tokens"),
        (library.PLAN_UNIONS, dict(row_group_tokens=0), "tile_size must be a positive multiple of row_group_tokens"),
        (library.PLAN_UNIONS, dict(row_group_tokens=3), "tile_size must be a positive multiple of row_group_tokens"),
        (library.PLAN_UNIONS, dict(tile_size=2**30, row_group_tokens=2**30), "more than 2\\^31 - 1 slots in a tile, or tokens"),
        (library.PLAN_UNIONS, dict(window_blocks=33), "window_blocks must be a multiple of 32"),
        (library.PLAN_UNIONS, dict(window_blocks=2**20), "bytes of shared memory; there are"),
        (library.PLAN_INVERSE, dict(num_kv_blocks=-1), "num_kv_blocks must not be negative"),
        (library.PLAN_INVERSE, dict(num_kv_blocks=8), r"offsets has shape \[2, 2, 8\]; needed is \[2, 2, 9\]"),
    ],
    ids=str,
)
def test_attributes_out_of_range(target, attributes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call_handler(target, **{name: np.int32(value) for name, value in attributes.items()})
