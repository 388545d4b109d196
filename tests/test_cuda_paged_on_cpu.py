"""The CUDA kernels of attention over pages, run on a CPU by the simulator, against the definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_attn_jax import dispatch
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.paged_attention import paged_block_sparse_attention
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.testing.compare import assert_close
from sparse_attn_jax.testing.methods import paged

pytestmark = pytest.mark.kernels

attend = functools.partial(paged_block_sparse_attention, return_residual=True, implementation="cuda")


@pytest.fixture(autouse=True, params=["sm80", "sm90"])
def kernels_of_arch(cuda_on_cpu, request, monkeypatch):
    monkeypatch.setenv(library.ARCH, request.param)


@dataclasses.dataclass(frozen=True)
class Sizes:
    q_len: int = 1
    group_size: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    block_size: int = 16
    lengths: tuple[int, ...] = (150, 33)
    max_pages: int = 10
    heads: str = "kv"  # of the lists: one, KV or query heads
    rows: int = 1  # of the lists
    num_slots: int = 6
    dtype: str = "bfloat16"

    @property
    def num_blocks(self) -> int:
        return -(-self.max_pages * self.page_size // self.block_size)


def make_inputs(sizes: Sizes, seed: int = 0) -> tuple:
    """Query, pools whose pages lie in any order, tables and lengths. What no query may read is NaN."""
    rng = np.random.default_rng(seed)
    batch = len(sizes.lengths)
    num_pages = batch * sizes.max_pages + 2
    tables = rng.permutation(num_pages)[: batch * sizes.max_pages].reshape(batch, -1).astype(np.int32)
    pools = []
    for _ in range(2):
        pool = np.full((num_pages, sizes.page_size, sizes.num_kv_heads, sizes.head_dim), np.nan)
        for table, length in zip(tables, sizes.lengths):
            for j in range(min(length, sizes.max_pages * sizes.page_size)):
                pool[table[j // sizes.page_size], j % sizes.page_size] = rng.standard_normal(pool.shape[2:])
        pools.append(jnp.asarray(pool, sizes.dtype))
    shape = batch, sizes.q_len, sizes.num_kv_heads * sizes.group_size, sizes.head_dim
    query = jnp.asarray(rng.standard_normal(shape), sizes.dtype)
    return query, *pools, jnp.asarray(tables), jnp.asarray(sizes.lengths, jnp.int32)


def make_selection(sizes: Sizes, seed: int = 0) -> jax.Array:
    """Lists with empty slots, duplicates and ids that are no block; the first has at least two real ones."""
    rng = np.random.default_rng(seed)
    heads = dict(one=1, kv=sizes.num_kv_heads, q=sizes.num_kv_heads * sizes.group_size)[sizes.heads]
    ids = rng.integers(0, sizes.num_blocks, (len(sizes.lengths), heads, sizes.rows, sizes.num_slots))
    bad = rng.choice([-1, -1, -7, sizes.num_blocks, 2**31 - 1, -(2**31)], ids.shape)
    ids = np.where(rng.random(ids.shape) < 0.3, bad, ids)
    ids[0, ..., :3] = [0, -1, 1 % sizes.num_blocks]
    return jnp.asarray(ids, jnp.int32)


def define(inputs: tuple, selection, sizes: Sizes, **options) -> tuple[np.ndarray, np.ndarray]:
    options.pop("num_splits", None)
    return paged.paged_attention(*inputs, selection, selection_block_size=sizes.block_size, **options)


def assert_is(found: tuple, wanted: tuple, dtype: str) -> None:
    # Rounding the result is all that a reference may do, and half of what the kernel may.
    assert_close("out", found[0], wanted[0], wanted[0].astype(found[0].dtype), dtype=dtype)
    assert_close("lse", found[1], wanted[1], wanted[1], dtype="float32")


def check(sizes: Sizes, selection="lists", **options) -> tuple[jax.Array, jax.Array]:
    inputs = make_inputs(sizes)
    selection = make_selection(sizes) if isinstance(selection, str) else selection
    found = attend(*inputs, selection, selection_block_size=sizes.block_size, **options)
    assert_is(found, define(inputs, selection, sizes, **options), sizes.dtype)
    return found


def assert_equal(found: tuple, wanted: tuple) -> None:
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("q_len, group_size", [(1, 3), (3, 8)])  # rows of one warp, and of several
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_variant(dtype, head_dim, q_len, group_size):
    check(Sizes(q_len, group_size, 1, head_dim, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("group_size", [1, 3, 8, 16])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("heads, rows", [("one", 1), ("kv", "q_len"), ("q", 1), ("q", "q_len")])
def test_heads_and_rows_of_lists(heads, rows, q_len, group_size):
    rows = q_len if rows == "q_len" else 1
    check(Sizes(q_len, group_size, heads=heads, rows=rows, lengths=(70,), max_pages=5))


def test_more_rows_than_a_thread_block_has():
    check(Sizes(q_len=5, group_size=17, num_kv_heads=1, lengths=(75,), max_pages=5), num_splits=2)


@pytest.mark.parametrize(
    "page_size, block_size",
    [(16, 16), (64, 64), (128, 128), (16, 64), (16, 80), (32, 128), (64, 16), (128, 32), (128, 64), (16, 256)],
)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_pages_and_blocks(page_size, block_size, num_splits):
    sizes = Sizes(2, page_size=page_size, block_size=block_size, max_pages=-(-300 // page_size), lengths=(291, 130))
    check(sizes, num_splits=num_splits)


def long_sizes(q_len: int, group_size: int) -> Sizes:
    return Sizes(q_len, group_size, 1, max_pages=41, page_size=128, block_size=128, lengths=(41 * 128 - 3,))


def last_of(results: tuple) -> list[jax.Array]:
    """What the last query of the first head has got."""
    return [x[:, -1:, :1] for x in results]


def define_last(inputs: tuple, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    return define((inputs[0][:, -1:, :1], *inputs[1:]), None, sizes)


@pytest.mark.parametrize("q_len, group_size", [(1, 1), (3, 8)])
def test_more_keys_than_are_looked_up_at_a_time(q_len, group_size):
    sizes = long_sizes(q_len, group_size)
    inputs = make_inputs(sizes)
    found = attend(*inputs, None, num_splits=1)
    assert_is(last_of(found), define_last(inputs, sizes), sizes.dtype)
    parts = attend(*inputs, None, num_splits=5)
    np.testing.assert_allclose(found[1], parts[1], rtol=1e-5)
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (found, parts)), atol=2e-3)


OPTIONS = {
    "dense": {},
    "window": dict(local_window_size=21),
    "window and sinks": dict(local_window_size=(3, None), num_sinks=18),
    "window per head": dict(
        local_window_size=(np.array([0, 3, 90, 37], np.int32), 0), num_sinks=np.array([0, 1, 0, 40], np.int32)
    ),
    "soft cap": dict(logits_soft_cap=1.5, scale=0.7),
    "scale 0": dict(scale=0.0),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "selected"])
def test_options(name, is_dense):
    # Blocks of two pages, the last of which is no page.
    sizes = Sizes(q_len=2, max_pages=11, block_size=32)
    check(sizes, None if is_dense else "lists", **OPTIONS[name], num_splits=2)


def test_check_is_sharp():
    """It fails if a block is dropped, or causality is shifted by one."""
    sizes = Sizes(q_len=3, num_slots=20)
    inputs, selection = make_inputs(sizes), make_selection(sizes)
    found = attend(*inputs, selection)
    for changed in (
        define(inputs, jnp.where(selection == 0, -1, selection), sizes),
        define(inputs, selection, sizes, causal_shift=-1),
    ):
        with pytest.raises(AssertionError):
            assert_is(found, changed, sizes.dtype)


@pytest.mark.parametrize("group_size", [2, 24])
def test_splits_agree(group_size):
    sizes = Sizes(q_len=2, group_size=group_size, num_slots=12)
    inputs, selection = make_inputs(sizes), make_selection(sizes)
    whole = attend(*inputs, selection, num_splits=1)
    for num_splits in (2, 3, 4, 5, 7, 40):
        parts = attend(*inputs, selection, num_splits=num_splits)
        np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (parts, whole)), atol=1e-2)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_order_of_blocks_and_threads_changes_nothing(num_splits, monkeypatch):
    sizes = Sizes(q_len=2, group_size=12)
    inputs, selection = make_inputs(sizes), make_selection(sizes)
    first = attend(*inputs, selection, num_splits=num_splits)
    assert_equal(attend(*inputs, selection, num_splits=num_splits), first)
    for seed in ("1", "2"):
        monkeypatch.setenv(library.SEED, seed)
        assert_equal(attend(*inputs, selection, num_splits=num_splits), first)


def test_order_and_duplicates_do_not_matter():
    sizes = Sizes()
    inputs, selection = make_inputs(sizes), make_selection(sizes)
    longer = jnp.concatenate([selection[..., ::-1], jnp.full_like(selection, -1), selection], axis=-1)
    assert_equal(attend(*inputs, longer, num_splits=2), attend(*inputs, selection, num_splits=2))


HIDING = dict(local_window_size=40, num_sinks=5, num_splits=2)


def inputs_with_nan_that_is_not_seen(sizes: Sizes) -> tuple[tuple, jax.Array]:
    """In what no query selects, and in what the window of `HIDING` hides from all. One list has all heads of a sequence."""
    query, *pools, tables, lengths = make_inputs(sizes)
    selection = make_selection(sizes)
    pools = [np.array(pool) for pool in pools]
    for b, length in enumerate(sizes.lengths):
        listed = set(np.ravel(selection[b]).tolist())
        for j in range(length):
            if j // 16 not in listed or 5 <= j < length - sizes.q_len - 40:
                for pool in pools:
                    pool[tables[b, j // 16], j % 16] = [np.nan, np.inf, -np.inf][j % 3]
    return (query, *map(jnp.asarray, pools), tables, lengths), selection


@pytest.mark.parametrize("q_len, group_size", [(1, 2), (3, 8)])
def test_nothing_that_is_not_seen_leaks(q_len, group_size):
    sizes = Sizes(q_len, group_size, heads="one", lengths=(150, 100))
    inputs, selection = inputs_with_nan_that_is_not_seen(sizes)
    clean = attend(*make_inputs(sizes), selection, **HIDING)
    assert np.isfinite(np.asarray(clean[0], np.float32)).all()
    assert_equal(attend(*inputs, selection, **HIDING), clean)
    query, keys, values, tables, lengths = inputs
    values = values.at[tables[0, 0], 0].set(np.nan)  # the check can fail
    assert np.isnan(np.asarray(attend(query, keys, values, tables, lengths, selection, **HIDING)[0])).any()


def inputs_with_bad_pages(sizes: Sizes, bad: int) -> tuple:
    """A page of the first sequence is none, the first of the second, and all of the third."""
    query, *pools, tables, lengths = make_inputs(sizes)
    return query, *pools, tables.at[0, 1].set(bad).at[1, 0].set(bad).at[2].set(bad), lengths


@pytest.mark.parametrize("bad", [-1, "num_pages", 2**31 - 1, -(2**31)])
def test_bad_physical_pages_read_nothing(bad):
    sizes = Sizes(lengths=(150, 33, 60))
    inputs = inputs_with_bad_pages(sizes, 3 * sizes.max_pages + 2 if bad == "num_pages" else bad)
    out, lse = attend(*inputs, None, num_splits=2)
    assert_is((out, lse), define(inputs, None, sizes), sizes.dtype)
    assert np.all(np.isneginf(lse[2])) and not np.any(np.asarray(out[2], np.float32))


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("lengths", [(0, 1, 2), (-4, 32, 33), (50, 2**31 - 1, -(2**31))], ids=str)
def test_any_length_is_guarded(lengths, num_splits):
    sizes = Sizes(q_len=3, lengths=lengths, max_pages=2)
    if max(lengths) < 100:
        check(sizes, None, num_splits=num_splits)
        check(sizes, num_splits=num_splits)
    out, _ = attend(*make_inputs(sizes), None, local_window_size=5, num_splits=num_splits)
    assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_empty_lists_give_zero_and_minus_infinity(num_splits):
    out, lse = attend(*make_inputs(Sizes(q_len=2)), jnp.full((2, 2, 1, 3), -1, jnp.int32), num_splits=num_splits)
    assert not np.any(np.asarray(out, np.float32)) and np.all(np.isneginf(lse))


def test_infinite_logits_are_as_in_xla():
    query, *rest = make_inputs(Sizes())
    query = query.at[0, 0, 0, 0].set(np.inf)
    wanted = paged_block_sparse_attention(query, *rest, None, implementation="xla", return_residual=True)
    for x, y in zip(attend(query, *rest, None, num_splits=2), wanted, strict=True):
        np.testing.assert_array_equal(np.isnan(np.asarray(x, np.float32)), np.isnan(np.asarray(y, np.float32)))


# Transformations.


@pytest.mark.parametrize("mapped", ["query", "pools", "values", "all but the pools", "all"])
def test_vmap_is_a_loop(mapped):
    sizes = Sizes(group_size=1, lengths=(40, 20), max_pages=3)
    many = [(*make_inputs(sizes, seed), make_selection(sizes, seed)) for seed in range(2)]
    moving = {"query": (0,), "pools": (1, 2), "values": (2,), "all but the pools": (0, 3, 4, 5)}.get(mapped, range(6))
    calls = [[many[k if i in moving else 0][i] for i in range(6)] for k in range(2)]
    stacked = [jnp.stack([c[i] for c in calls]) if i in moving else calls[0][i] for i in range(6)]
    axes = [0 if i in moving else None for i in range(6)]
    found = jax.jit(jax.vmap(functools.partial(attend, num_splits=2), in_axes=axes))(*stacked)
    for k, arrays in enumerate(calls):
        assert_equal([x[k] for x in found], attend(*arrays, num_splits=2))


def test_vmap_twice_joins_pools_twice():
    sizes = Sizes(group_size=1, lengths=(40,), max_pages=3)
    inputs = [[make_inputs(sizes, 2 * i + j) for j in range(2)] for i in range(2)]
    stack = lambda *x: jnp.stack(x)
    stacked = jax.tree.map(stack, *(jax.tree.map(stack, *row) for row in inputs))
    call = lambda *arrays: attend(*arrays, None)
    found = jax.vmap(jax.vmap(call))(*stacked)
    for i, j in np.ndindex(2, 2):
        assert_equal([x[i, j] for x in found], call(*inputs[i][j]))


AUTO = (jax.sharding.AxisType.Auto,) * 2
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


@pytest.mark.parametrize("heads", ["one", "kv", "q"])
def test_sharding_by_batch_and_heads_needs_no_collectives(heads):
    sizes = Sizes(q_len=2, lengths=(40, 20), max_pages=3, heads=heads)
    inputs, selection = make_inputs(sizes), make_selection(sizes)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=AUTO)
    specs = [("data", None, "model"), (None, None, "model"), (None, None, "model"), ("data",), ("data",)]
    specs.append(("data",) if heads == "one" else ("data", "model"))
    arrays = (*inputs, selection)
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(arrays, specs, strict=True)]
    run = jax.jit(functools.partial(attend, num_splits=2))
    text = run.lower(*placed).compile().as_text()
    assert library.PAGED_ATTENTION in text
    assert not [line for line in text.splitlines() if any(name in line for name in COLLECTIVES)]
    found = run(*placed)
    assert found[0].sharding.shard_shape(found[0].shape) == (1, 2, 2, 64)
    assert_equal(found, attend(*arrays, num_splits=2))


# Which calls the kernels take.


def test_default_splits_fill_a_gpu():
    problem = dataclasses.replace(PROBLEM, num_slots=64, max_pages=1000, selection_block_size=64)
    from sparse_attn_jax.implementations.cuda.paged_attention import choose_num_splits

    assert choose_num_splits(problem) == 64 * 64 // 256
    assert choose_num_splits(dataclasses.replace(problem, batch=64)) == 1
    assert choose_num_splits(dataclasses.replace(problem, num_slots=1)) == 1
    assert choose_num_splits(dataclasses.replace(problem, num_splits=3)) == 3


PROBLEM = PagedProblem(
    batch=2, q_len=1, num_q_heads=16, num_kv_heads=8, head_dim=64, value_head_dim=64, dtype="bfloat16", num_pages=100,
    page_size=64, max_pages=10, selection_block_size=64, selection_heads=8, num_slots=5, scale=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        (dict(), []),
        (dict(page_size=16, selection_block_size=80), []),
        (dict(dtype="float32", head_dim=72), ["dtype is float32", "head_dim is 72", "value_head_dim is 64"]),
        (dict(value_head_dim=128), ["value_head_dim is 128; supported: head_dim, which is 64"]),
        (
            dict(page_size=8, selection_block_size=24),
            ["page_size is 8; supported: multiples of 16", "selection_block_size is 24"],
        ),
    ],
    ids=str,
)
def test_every_reason_is_given(changes, reasons):
    found = dispatch.reasons_against("cuda", dataclasses.replace(PROBLEM, **changes))
    assert len(found) == len(reasons) and all(wanted in text for wanted, text in zip(reasons, found)), found


def test_kernels_of_another_kind_are_a_reason(monkeypatch):
    monkeypatch.setenv(library.HOST_SIM, "0")
    inputs = make_inputs(Sizes())
    with pytest.raises(NotImplementedError, match="cuda: .*platform is 'cpu'"):
        attend(*inputs, None)


# What the handler refuses.

ARRAYS = {
    "query": ((2, 3, 4, 64), "bfloat16"),
    "key_pages": ((5, 16, 2, 64), "bfloat16"),
    "value_pages": ((5, 16, 2, 64), "bfloat16"),
    "page_table": ((2, 4), "int32"),
    "seq_lens": ((2,), "int32"),
    "blocks": ((2, 2, 3, 6), "int32"),
    "counts": ((2, 2, 3), "int32"),
    "window_left": ((2, 4), "int32"),
    "num_sinks": ((2, 4), "int32"),
    "out": ((2, 3, 4, 64), "bfloat16"),
    "lse": ((2, 3, 4), "float32"),
    "partial_out": ((2, 7, 3, 4, 64), "float32"),
    "partial_lse": ((2, 7, 3, 4), "float32"),
}
NUM_RESULTS = 4
ATTRIBUTES = dict(
    scale=np.float32(1), logits_soft_cap=np.float32(0), block_size=np.int32(16), num_splits=np.int32(7), seed=np.int64(0),
    arch=np.int32(80),
)  # fmt: skip


def call_handler(arrays: dict | None = None, **attributes) -> list[np.ndarray]:
    library.load(jax.default_backend())
    arrays = list((ARRAYS | (arrays or {})).values())
    call = jax.ffi.ffi_call(library.PAGED_ATTENTION, [jax.ShapeDtypeStruct(*x) for x in arrays[-NUM_RESULTS:]])
    return jax.block_until_ready(call(*(jnp.zeros(*x) for x in arrays[:-NUM_RESULTS]), **(ATTRIBUTES | attributes)))


def test_sound_call_of_the_handler():
    out, lse, *_ = call_handler()
    assert not np.any(np.asarray(out)) and np.isneginf(lse).all()


def handler_arguments(count: int, block: int = 0) -> tuple[list[jax.Array], list[jax.ShapeDtypeStruct]]:
    """The arguments of a sound call, but for the counts and the blocks; and the shapes of its results."""
    arrays = {name: jnp.zeros(*ARRAYS[name]) for name in list(ARRAYS)[:-NUM_RESULTS]}
    arrays["seq_lens"] += 64
    arrays["counts"] += count
    arrays["blocks"] += block
    return list(arrays.values()), [jax.ShapeDtypeStruct(*ARRAYS[name]) for name in list(ARRAYS)[-NUM_RESULTS:]]


@pytest.mark.parametrize("count", [-1, 7, 2**31 - 1, -(2**31)])
def test_counts_of_any_value_are_guarded(count):
    """Slots beyond the list, and more than a sequence has blocks, are not read: the simulator would say so."""
    library.load(jax.default_backend())
    arguments, shapes = handler_arguments(count)
    out, *_ = jax.ffi.ffi_call(library.PAGED_ATTENTION, shapes)(*arguments, **ATTRIBUTES)
    assert not np.any(np.asarray(out, np.float32))


@pytest.mark.parametrize("block", [-1, -(2**31), 9, 2**31 - 1])
def test_blocks_of_any_value_are_guarded(block):
    """Nothing is looked up for a block that is none. What the op itself lists has no such blocks."""
    library.load(jax.default_backend())
    arguments, shapes = handler_arguments(2, block)
    out, lse, *_ = jax.ffi.ffi_call(library.PAGED_ATTENTION, shapes)(*arguments, **ATTRIBUTES)
    assert not np.any(np.asarray(out, np.float32)) and np.all(np.isneginf(lse))


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_wrong_shape_or_dtype(name):
    shape, dtype = ARRAYS[name]
    wrong = [(*shape[:i], shape[i] + 1, *shape[i + 1 :]) for i in range(len(shape))]
    if name in ("blocks", "page_table"):
        wrong.pop()  # more slots, or longer sequences
    wrong += [shape[1:], (*shape, 1), ()]
    for changed in [*((x, dtype) for x in wrong), (shape, "int16"), (shape, "uint32")]:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call_handler({name: changed})
            pytest.fail(f"{name}: {changed}")


@pytest.mark.parametrize(
    ("arrays", "attributes", "message"),
    [
        ({}, dict(num_splits=0), "num_splits must be positive"),
        ({}, dict(num_splits=6), r"partial_out has shape \[2, 7, 3, 4, 64\]; needed is \[2, 6, 3, 4, 64\]"),
        ({}, dict(block_size=0), "page_size and block_size must be multiples of 16"),
        ({}, dict(block_size=24), "page_size and block_size must be multiples of 16"),
        ({"key_pages": ((5, 8, 2, 64), "bfloat16")}, {}, "page_size and block_size must be multiples of 16"),
        ({"key_pages": ((0, 2**30, 2, 64), "bfloat16"), "page_table": ((0, 2), "int32")}, {}, "more than 2\\^30 tokens"),
        ({"page_table": ((2, 0), "int32")}, {}, "page_table must have a page"),
        ({"page_table": ((3, 4), "int32")}, {}, "page_table has 3 rows; needed is a divisor of 2"),
        ({"query": ((2, 3, 5, 64), "bfloat16")}, {}, "num_kv_heads must divide num_q_heads"),
        ({"blocks": ((2, 3, 3, 6), "int32")}, {}, "blocks must have 1, `num_kv_heads` or `num_q_heads` heads"),
        ({"blocks": ((2, 2, 2, 6), "int32")}, {}, "blocks must have 1 or `q_len` rows"),
        ({}, dict(arch=75), "no paged attention kernel of arch 75"),
    ],
    ids=str,
)
def test_calls_that_the_handler_refuses(arrays, attributes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call_handler(arrays, **{name: np.int32(value) for name, value in attributes.items()})
