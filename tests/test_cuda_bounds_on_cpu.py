"""The CUDA kernels of blocks' extrema, and those that select blocks by them, run on a CPU by the simulator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_attn_jax.bound_problem import BoundOperands, BoundProblem, ExtremaProblem
from sparse_attn_jax.implementations import cuda
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.problem import device_of
from sparse_attn_jax.quest_metadata import QuestMetadata
from sparse_attn_jax.selectors.quest import Quest
from sparse_attn_jax.testing.methods import quest
from sparse_attn_jax.testing.selection_oracle import assert_same_up_to_rounding

pytestmark = pytest.mark.kernels

GROUPS = ("max", "mean_bound", "mean_q", None)


@pytest.fixture(autouse=True)
def always_on_cpu(cuda_on_cpu):
    pass


@dataclasses.dataclass(frozen=True)
class Sizes:
    num_blocks: int = 40
    group_size: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    q_len: int = 1
    batch: int = 2
    top_k: int = 9
    group: str | None = "max"
    page_rows: int | None = None
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Call:
    problem: BoundProblem
    operands: BoundOperands

    def run(self, **changes) -> np.ndarray:
        return np.asarray(cuda.select_by_bounds(self.problem, self.replace(**changes).operands))

    def replace(self, **operands) -> "Call":
        return dataclasses.replace(self, operands=dataclasses.replace(self.operands, **operands))

    def extrema(self) -> np.ndarray:
        """Maxima and minima of every block, [2, batch, num_blocks, num_kv_heads, head_dim]; NaN where there is no page."""
        found = np.stack([np.asarray(x, np.float64) for x in (self.operands.maximum, self.operands.minimum)])
        if self.problem.page_rows is None:
            return found
        pages = np.asarray(self.operands.block_tables)
        is_page = (pages >= 0) & (pages < found.shape[1])
        found = np.where(is_page[..., None, None, None], found[:, np.where(is_page, pages, 0)], np.nan)
        return found.reshape(2, self.problem.batch, self.problem.num_blocks, *found.shape[-2:])

    def define(self) -> tuple[np.ndarray, np.ndarray]:
        """Lists and scores [batch, lists, q_len, ...]."""
        problem, (maximum, minimum) = self.problem, self.extrema()
        limits = np.clip(np.asarray(self.operands.limits), 0, problem.num_blocks)
        query = np.asarray(self.operands.query, np.float64)
        scores = [[quest.score(q, *of_row, problem.group) for q in row] for row, *of_row in zip(query, maximum, minimum)]
        scores = np.array(scores).swapaxes(1, 2)
        lists = []
        for b, h, i in np.ndindex(*scores.shape[:3]):
            first, begin, end, scored = limits[b, i].tolist()
            kept = {*range(first), *range(begin, end)}
            lists.append(quest.select(scores[b, h, i], kept, set(range(scored)), problem.top_k))
        return np.array(lists).reshape(*scores.shape[:3], -1), scores


def make_limits(sizes: Sizes, rng) -> np.ndarray:
    """A sink, some last blocks, and fewer that are scored."""
    own = rng.integers(sizes.num_blocks // 2, sizes.num_blocks, (sizes.batch, sizes.q_len))
    begin = np.maximum(own - rng.integers(0, 3, own.shape), 0)
    return np.stack([np.ones_like(own), begin, own + 1, begin], axis=-1)


def make_call(sizes: Sizes = Sizes(), seed: int = 0, limits=None) -> Call:
    rng = np.random.default_rng(seed)
    shape = sizes.batch, sizes.num_blocks, sizes.num_kv_heads, sizes.head_dim
    if sizes.page_rows is not None:
        max_pages = sizes.num_blocks // sizes.page_rows
        num_pages = sizes.batch * max_pages + 3
        shape = num_pages, sizes.page_rows, *shape[2:]
        tables = jnp.asarray(rng.permutation(num_pages)[: sizes.batch * max_pages].reshape(sizes.batch, -1), jnp.int32)
    extrema = np.sort(rng.standard_normal((2, *shape)), axis=0)
    query = rng.standard_normal((sizes.batch, sizes.q_len, sizes.num_kv_heads * sizes.group_size, sizes.head_dim))
    limits = make_limits(sizes, rng) if limits is None else np.broadcast_to(limits, (sizes.batch, sizes.q_len, 4))
    problem = BoundProblem(
        batch=sizes.batch,
        q_len=sizes.q_len,
        num_q_heads=query.shape[2],
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        dtype=sizes.dtype,
        extrema_dtype=sizes.dtype,
        num_blocks=sizes.num_blocks,
        block_size=16,
        page_rows=sizes.page_rows,
        group=sizes.group,
        top_k=sizes.top_k,
        **device_of(jnp.zeros(()))._asdict(),
    )
    operands = BoundOperands(
        query=jnp.asarray(query, sizes.dtype),
        maximum=jnp.asarray(extrema[1], sizes.dtype),
        minimum=jnp.asarray(extrema[0], sizes.dtype),
        block_tables=None if sizes.page_rows is None else tables,
        limits=jnp.asarray(limits, jnp.int32),
    )
    return Call(problem, operands)


def check(call: Call) -> np.ndarray:
    found = call.run()
    lists, scores = call.define()
    assert found.shape == lists.shape and found.dtype == np.int32
    assert_same_up_to_rounding(found, lists, scores)
    return found


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_variant(dtype, head_dim):
    check(make_call(Sizes(head_dim=head_dim, dtype=dtype, group_size=3)))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("q_len, group_size", [(3, 1), (1, 3), (3, 8), (1, 16)])
def test_groups(q_len, group_size, group):
    check(make_call(Sizes(group=group, group_size=group_size, q_len=q_len)))


@pytest.mark.parametrize("group", ["max", None])
@pytest.mark.parametrize("num_blocks", [1, 5, 127, 129, 257, 700])
def test_numbers_of_blocks(num_blocks, group):
    check(make_call(Sizes(num_blocks=num_blocks, group=group, batch=1, num_kv_heads=1, top_k=40)))


@pytest.mark.parametrize("page_rows", [4, 16])
@pytest.mark.parametrize("q_len", [1, 3])
def test_extrema_in_pages(q_len, page_rows):
    call = make_call(Sizes(page_rows=page_rows, num_blocks=48, q_len=q_len))
    check(call)
    # Where there is no page there is no score; what is kept is kept. There is room for all that may be listed.
    call = make_call(Sizes(page_rows=page_rows, num_blocks=48, q_len=q_len, top_k=48))
    bad = [-1, len(call.operands.maximum), 2**31 - 1, -(2**31)]
    tables = call.operands.block_tables
    for i, page in enumerate(bad):
        tables = tables.at[:, i % tables.shape[1]].set(page) if i < 2 else tables.at[0, i % tables.shape[1]].set(page)
        with np.errstate(invalid="ignore"):
            check(call.replace(block_tables=tables))


LIMITS = {
    "nothing": (0, 0, 0, 0),
    "all compete": (0, 0, 0, 40),
    "all kept": (0, 0, 9, 0),
    "more compete than precede the last": (1, 10, 12, 40),
    "kept overlap": (5, 3, 9, 30),
    "last before first": (4, 0, 2, 40),
    "end before begin": (0, 9, 3, 30),
    "out of range": (-5, 35, 2**31 - 1, 2**31 - 1),
    "below range": (-(2**31), -(2**31), -1, 30),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    check(make_call(Sizes(q_len=2), limits=LIMITS[name]))


@pytest.mark.parametrize("top_k", [1, 3, 39, 40, 41, 300])
def test_top_k(top_k):
    """Fewer than blocks, as many, more."""
    check(make_call(Sizes(top_k=top_k), limits=(1, 38, 39, 40) if top_k > 1 else (0, 0, 1, 40)))


def test_more_kept_than_there_is_room_for_stay_in_the_list():
    found = make_call(Sizes(top_k=3), limits=(2, 10, 20, 0)).run()
    np.testing.assert_array_equal(found, np.broadcast_to([0, 1, 10], found.shape))


def test_group_with_a_head_that_is_nan_lists_what_is_kept():
    call = make_call(Sizes(group_size=3), limits=(1, 38, 40, 40))
    found = call.run(query=call.operands.query.at[:, :, ::3].set(np.nan))
    np.testing.assert_array_equal(found[..., :4], np.broadcast_to([0, 38, 39, -1], (*found.shape[:-1], 4)))


@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_ties_go_to_the_lower_block(scale):
    call = make_call(Sizes(num_blocks=600, top_k=300, batch=1), limits=(1, 590, 595, 600))
    found = call.run(query=scale * call.operands.query)
    np.testing.assert_array_equal(found, np.broadcast_to([*range(295), *range(590, 595)], found.shape))


def call_with_zeros_of_both_signs() -> tuple[Call, list[int]]:
    """Bounds are 0 of one sign in every other block, and -1 in some; and the list."""
    call = make_call(Sizes(group_size=1, batch=1), limits=(0, 0, 0, 40))
    sign = np.where(np.arange(40) % 2 == 0, 0.0, -0.0)
    sign[[3, 8]] = -1
    extrema = jnp.asarray(np.broadcast_to(sign[:, None, None], (1, 40, 2, 64)), "bfloat16")
    query = jnp.zeros_like(call.operands.query).at[..., 0].set(1)
    return call.replace(query=query, maximum=extrema, minimum=extrema), [0, 1, 2, 4, 5, 6, 7, 9, 10]


def test_zeros_of_both_signs_are_equal():
    call, wanted = call_with_zeros_of_both_signs()
    np.testing.assert_array_equal(call.run(), np.broadcast_to(wanted, (1, 2, 1, 9)))


def call_with_blocks_without_a_score(group: str | None, value: float) -> tuple[Call, np.ndarray]:
    """Blocks 5 to 22 have a bound that is NaN, from NaN or from infinity times zero, or minus infinity; and the list."""
    call = make_call(Sizes(group=group, top_k=40), limits=(1, 20, 22, 40))
    query = call.operands.query.at[..., ::2].set(0)
    extrema = [x.at[:, 5:23].set(value) for x in (call.operands.maximum, call.operands.minimum)]
    if value == -np.inf:
        query, extrema[1] = jnp.abs(call.operands.query), call.operands.minimum
    wanted = sorted({*range(40)} - {*range(5, 23)} | {20, 21})
    wanted = np.array(wanted + [-1] * (40 - len(wanted)))
    return call.replace(query=query, maximum=extrema[0], minimum=extrema[1]), wanted


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_blocks_without_a_score_are_chosen_only_if_kept(value, group):
    call, wanted = call_with_blocks_without_a_score(group, value)
    found = call.run()
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, found.shape))


def operands_with_nan_that_is_not_read(call: Call) -> BoundOperands:
    """In blocks that compete for no query of a sequence."""
    hidden = np.arange(call.problem.num_blocks) >= np.asarray(call.operands.limits)[..., 3].max(axis=1, keepdims=True)
    extrema = (jnp.where(hidden[..., None, None], jnp.nan, x) for x in (call.operands.maximum, call.operands.minimum))
    return dataclasses.replace(call.operands, **dict(zip(("maximum", "minimum"), extrema)))


def test_what_does_not_compete_is_not_read():
    call = make_call(Sizes(q_len=2))
    bad = dataclasses.replace(call, operands=operands_with_nan_that_is_not_read(call))
    np.testing.assert_array_equal(bad.run(), call.run())


def test_nan_in_a_query_leaves_the_other_lists():
    call = make_call(Sizes(q_len=2))
    bad = call.run(query=call.operands.query.at[:, 0, 0, 0].set(np.nan))
    clean = call.run()
    np.testing.assert_array_equal(bad[:, :, 1], clean[:, :, 1])
    np.testing.assert_array_equal(bad[:, 1], clean[:, 1])
    assert (bad[:, 0, 0] == -1).any()


def test_order_of_blocks_and_threads_changes_nothing(monkeypatch):
    call = make_call(Sizes(num_blocks=300, top_k=50))
    expected = call.run()
    for seed in ("1", "2"):
        monkeypatch.setenv(library.SEED, seed)
        np.testing.assert_array_equal(call.run(), expected)


@pytest.mark.parametrize("sizes", [dict(batch=0), dict(q_len=0), dict(num_blocks=0)], ids=str)
def test_empty_calls(sizes):
    sizes = Sizes(**sizes)
    call = make_call(sizes, limits=(1, 2, 3, 4))
    found = call.run()
    assert found.shape == (sizes.batch, 2, sizes.q_len, 9) and (found == -1).all()


@pytest.mark.parametrize("page_rows", [None, 8])
@pytest.mark.parametrize("mapped", [("query",), ("maximum",), ("limits",), ("query", "maximum", "minimum", "limits")], ids=str)
def test_vmap_is_a_loop(mapped, page_rows):
    calls = [make_call(Sizes(page_rows=page_rows), seed) for seed in range(2)]
    first = calls[0].operands
    names = ("query", "maximum", "minimum", "limits")
    stacked = [jnp.stack([getattr(c.operands, n) for c in calls]) if n in mapped else getattr(first, n) for n in names]
    run = lambda *x: cuda.select_by_bounds(calls[0].problem, dataclasses.replace(first, **dict(zip(names, x))))
    found = jax.jit(jax.vmap(run, in_axes=[0 if n in mapped else None for n in names]))(*stacked)
    for k, call in enumerate(calls):
        changes = {n: getattr(call.operands, n) for n in mapped}
        np.testing.assert_array_equal(found[k], calls[0].run(**changes))


AUTO = (jax.sharding.AxisType.Auto,) * 2
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


@pytest.mark.parametrize("group", ["max", None])
@pytest.mark.parametrize("page_rows", [None, 8])
def test_sharding_by_batch_and_heads_needs_no_collectives(page_rows, group):
    call = make_call(Sizes(page_rows=page_rows, group=group))
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=AUTO)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    operands, batch = call.operands, "data" if page_rows is None else None
    operands = BoundOperands(
        query=place(operands.query, "data", None, "model"),
        maximum=place(operands.maximum, batch, None, "model"),
        minimum=place(operands.minimum, batch, None, "model"),
        block_tables=None if page_rows is None else place(operands.block_tables, "data"),
        limits=place(operands.limits, "data"),
    )
    run = jax.jit(functools.partial(cuda.select_by_bounds, call.problem))
    text = run.lower(operands).compile().as_text()
    assert library.SELECT_BY_BOUNDS in text
    assert not [line for line in text.splitlines() if any(name in line for name in COLLECTIVES)]
    found = run(operands)
    assert found.sharding.shard_shape(found.shape)[:2] == (1, found.shape[1] // 2)
    np.testing.assert_array_equal(found, call.run())


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        (dict(), []),
        (dict(dtype="float32", head_dim=72), ["dtype is float32", "head_dim is 72", "the metadata is bfloat16"]),
        (dict(num_q_heads=1000), ["the group size is 500; supported with this head_dim: at most 326"]),
        (dict(num_q_heads=1000, group="mean_q"), []),
    ],
    ids=str,
)
def test_every_reason_is_given(changes, reasons):
    found = cuda.supports_bounds(dataclasses.replace(make_call().problem, **changes))
    assert len(found) == len(reasons) and all(wanted in text for wanted, text in zip(reasons, found)), found


# Extrema.


@dataclasses.dataclass(frozen=True)
class ExtremaCall:
    problem: ExtremaProblem
    arrays: tuple  # key, block_tables, blocks, lengths

    def run(self, arrays: tuple | None = None) -> tuple[jax.Array, jax.Array]:
        return cuda.find_extrema(self.problem, *(arrays or self.arrays))

    def define(self) -> tuple[np.ndarray, np.ndarray]:
        """Token by token, in NumPy."""
        key, tables, blocks, lengths = (None if x is None else np.asarray(x) for x in self.arrays)
        key, size = key.astype(np.float32), self.problem.block_size
        results = [np.full((*blocks.shape, *key.shape[2:]), x, np.float32) for x in (-np.inf, np.inf)]
        for b, slot in np.ndindex(*blocks.shape):
            first = max(int(blocks[b, slot]), 0) * size
            for j in range(first, min(first + size if blocks[b, slot] >= 0 else 0, int(lengths[b]), self.problem.kv_len)):
                place = (b, j) if tables is None else (tables[b, j // key.shape[1]], j % key.shape[1])
                if tables is None or 0 <= place[0] < len(key):
                    for result, best in zip(results, (np.maximum, np.minimum)):  # a NaN stays
                        result[b, slot] = best(result[b, slot], key[place])
        return tuple(results)

    def check(self) -> None:
        for found, wanted in zip(self.run(), self.define(), strict=True):
            assert found.dtype == self.problem.dtype
            np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)


def make_extrema_call(
    page_size=None, block_size=16, num_kv_heads=2, head_dim=64, dtype="bfloat16", lengths=(150, 33), seed=0
) -> ExtremaCall:
    """Of some blocks in any order, of which some end, or lie, behind the keys. There is a NaN."""
    rng = np.random.default_rng(seed)
    max_pages = 10 if page_size is None else -(-160 // page_size)
    leading = (2, 160) if page_size is None else (2 * max_pages + 3, page_size)
    key = rng.standard_normal((*leading, num_kv_heads, head_dim))
    key[1, 2, 1, 5:9] = np.nan
    tables = None
    if page_size is not None:
        tables = rng.permutation(leading[0])[: 2 * max_pages].reshape(2, max_pages)
        tables[1, -1] = 2**31 - 1
        tables[0, 1] = -1
        tables = jnp.asarray(tables, jnp.int32)
    blocks = rng.permutation(-(-160 // block_size) + 3)[:9] + np.array([[0], [2]])
    problem = ExtremaProblem(
        batch=2,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block_size=block_size,
        kv_len=160 if page_size is None else max_pages * page_size,
        page_size=page_size,
        **device_of(jnp.zeros(()))._asdict(),
    )
    arrays = jnp.asarray(key, dtype), tables, jnp.asarray(blocks, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return ExtremaCall(problem, arrays)


@pytest.mark.parametrize("page_size", [None, 16, 64, 7])
@pytest.mark.parametrize("block_size", [16, 64, 3])
def test_extrema(block_size, page_size):
    make_extrema_call(page_size, block_size).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_extrema_of_every_variant(head_dim, dtype):
    """The last with more channels than a thread block has."""
    make_extrema_call(16, head_dim=head_dim, num_kv_heads=5, dtype=dtype).check()


@pytest.mark.parametrize("lengths", [(0, 1), (-3, 160), (161, 10**9), (-(2**31), 2**31 - 1)], ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_extrema_of_any_length(page_size, lengths):
    make_extrema_call(page_size, lengths=lengths).check()


@pytest.mark.parametrize("block", [-1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("page_size", [None, 16])
def test_extrema_of_blocks_that_are_none(page_size, block):
    call = make_extrema_call(page_size)
    key, tables, blocks, lengths = call.arrays
    maximum, minimum = call.run((key, tables, jnp.full_like(blocks, block), lengths))
    assert np.isneginf(np.asarray(maximum, np.float32)).all() and np.isposinf(np.asarray(minimum, np.float32)).all()


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("mapped", [(0,), (2,), (3,), (0, 2, 3)], ids=str)
def test_vmap_of_extrema_is_a_loop(mapped, page_size):
    calls = [make_extrema_call(page_size, lengths=(150 - i, 33 + i), seed=i) for i in range(2)]
    first = calls[0].arrays
    stacked = [jnp.stack([c.arrays[i] for c in calls]) if i in mapped else first[i] for i in range(4)]
    axes = [0 if i in mapped else None for i in range(4)]
    found = jax.jit(jax.vmap(lambda *x: calls[0].run(x), in_axes=axes))(*stacked)
    for k, call in enumerate(calls):
        wanted = calls[0].run(tuple(call.arrays[i] if i in mapped else first[i] for i in range(4)))
        for x, y in zip(found, wanted):
            np.testing.assert_array_equal(np.asarray(x[k], np.float32), np.asarray(y, np.float32))


# What the handler refuses.

ARRAYS = {
    "query": ((2, 3, 4, 64), "bfloat16"),
    "maximum": ((2, 10, 2, 64), "bfloat16"),
    "minimum": ((2, 10, 2, 64), "bfloat16"),
    "page_table": ((0,), "int32"),
    "limits": ((2, 3, 4), "int32"),
    "indices": ((2, 2, 3, 5), "int32"),
    "scores": ((2, 2, 3, 10), "float32"),
}
IN_PAGES = {
    "maximum": ((7, 5, 2, 64), "bfloat16"),
    "minimum": ((7, 5, 2, 64), "bfloat16"),
    "page_table": ((2, 2), "int32"),
}
NUM_RESULTS = 2


def call_handler(arrays: dict | None = None, **attributes) -> list[jax.Array]:
    library.load(jax.default_backend())
    arrays = list((ARRAYS | (arrays or {})).values())
    call = jax.ffi.ffi_call(library.SELECT_BY_BOUNDS, [jax.ShapeDtypeStruct(*x) for x in arrays[-NUM_RESULTS:]])
    attributes = dict(top_k=np.int32(5), reduction="max", seed=np.int64(0)) | attributes
    return jax.block_until_ready(call(*(jnp.zeros(*x) for x in arrays[:-NUM_RESULTS]), **attributes))


@pytest.mark.parametrize("arrays", [{}, IN_PAGES], ids=["dense", "in pages"])
def test_sound_calls_of_the_handler(arrays):
    assert (np.asarray(call_handler(arrays)[0]) == -1).all()


@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "in pages"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_wrong_shape_or_dtype(name, is_paged):
    sound = ARRAYS | (IN_PAGES if is_paged else {})
    shape, dtype = sound[name]
    if shape == (0,):
        return
    wrong = [(*shape[:i], shape[i] + 1, *shape[i + 1 :]) for i in range(len(shape))]
    wrong += [shape[1:], (*shape, 1), ()]
    for changed in [*((x, dtype) for x in wrong), (shape, "int16"), (shape, "uint32")]:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call_handler((IN_PAGES if is_paged else {}) | {name: changed})
            pytest.fail(f"{name}: {changed}")


@pytest.mark.parametrize(
    ("arrays", "attributes", "message"),
    [
        ({}, dict(top_k=np.int32(0)), "top_k must be positive"),
        ({}, dict(reduction="sum"), "reduction must be"),
        ({}, dict(reduction="none"), r"indices has shape \[2, 2, 3, 5\]; needed is \[2, 4, 3, 5\]"),
        ({"query": ((2, 3, 5, 64), "bfloat16")}, {}, "num_kv_heads must divide num_q_heads"),
        (
            {"query": ((2, 3, 4, 72), "bfloat16"), **{n: ((2, 10, 2, 72), "bfloat16") for n in ("maximum", "minimum")}},
            {},
            "is 72",
        ),
        ({"query": ((2, 3, 2000, 64), "bfloat16")}, {}, "1000 query heads of a KV head need 512000 bytes"),
    ],
    ids=str,
)
def test_calls_that_the_handler_refuses(arrays, attributes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call_handler(arrays, **attributes)


@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "in pages"])
def test_extrema_of_arrays_that_do_not_fit(is_paged):
    arrays = {
        "blocks": ((2, 3), "int32"),
        "keys": ((5, 16, 2, 64) if is_paged else (2, 16, 2, 64), "bfloat16"),
        "page_table": ((2, 4) if is_paged else (0,), "int32"),
        "lengths": ((2,), "int32"),
        "maximum": ((2, 3, 2, 64), "bfloat16"),
        "minimum": ((2, 3, 2, 64), "bfloat16"),
    }

    def call(changes, **attributes):
        library.load(jax.default_backend())
        *arguments, maximum, minimum = (arrays | changes).values()
        call = jax.ffi.ffi_call(library.BLOCK_EXTREMA, [jax.ShapeDtypeStruct(*x) for x in (maximum, minimum)])
        attributes = dict(block_size=np.int32(16), seed=np.int64(0)) | attributes
        return jax.block_until_ready(call(*(jnp.zeros(*x) for x in arguments), **attributes))

    assert np.isneginf(np.asarray(call({})[0], np.float32)).all()  # of no token
    for name, (shape, dtype) in arrays.items():
        if shape == (0,):
            continue
        wrong = [(*shape[:i], shape[i] + 1, *shape[i + 1 :]) for i in range(len(shape))]
        if name == "keys":
            wrong = wrong[2:] if is_paged else [wrong[0], *wrong[2:]]  # more pages, or longer ones
        if name == "page_table":
            wrong.pop()
        wrong += [shape[1:], (*shape, 1), ()]
        for changed in [*((x, dtype) for x in wrong), (shape, "int16"), (shape, "float32")]:
            with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
                call({name: changed})
                pytest.fail(f"{name}: {changed}")
    with pytest.raises(jax.errors.JaxRuntimeError, match="block_size must be positive"):
        call({}, block_size=np.int32(0))


# Through the library.


@pytest.mark.parametrize("page_rows", [None, 4])
def test_quest_selects_by_the_kernels(page_rows, monkeypatch):
    rng = np.random.default_rng(0)
    key = jnp.asarray(rng.standard_normal((2, 500, 2, 64)), "bfloat16")
    query = jnp.asarray(rng.standard_normal((2, 3, 8, 64)), "bfloat16")
    sizes = dict(num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
    if page_rows is None:
        empty = QuestMetadata.create(batch=2, max_len=512, **sizes)
    else:
        tables = jnp.asarray(rng.permutation(18)[:16].reshape(2, 8), jnp.int32)
        empty = QuestMetadata.create_paged(tables, num_pages=18, rows=page_rows, **sizes)
    metadata, *others = (empty.build(key, jnp.array([470, 120]), implementation=name) for name in ("xla", "cuda"))
    for x, y in zip(jax.tree.leaves(metadata), jax.tree.leaves(others)):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    selector, seq_lens = Quest(top_k=9, block_size=16), jnp.array([500, 130], jnp.int32)
    arguments = dict(seq_lens=seq_lens, tokens_since_update=jnp.array([31, -1], jnp.int32))
    text = jax.jit(lambda *x: selector.select(*x, **arguments)).lower(query, metadata).as_text()
    assert library.SELECT_BY_BOUNDS in text
    found, wanted = (selector.select(query, metadata, **arguments, implementation=name) for name in ("cuda", "xla"))
    assert found.shape == (2, 2, 3, 9) and (np.asarray(found) == np.asarray(wanted)).mean() > 0.99
    if jax.default_backend() != "cpu":
        return
    monkeypatch.setenv(library.HOST_SIM, "0")
    with pytest.raises(NotImplementedError, match="cuda: .*platform is 'cpu'"):
        selector.select(query, metadata, **arguments, implementation="cuda")
    with pytest.raises(NotImplementedError, match="cuda: .*platform is 'cpu'"):
        metadata.refresh(key, None, 500, implementation="cuda")
