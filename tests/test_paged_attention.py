"""paged_block_sparse_attention against its definition, what it does not read, and how its work and memory grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax import dispatch
from sparse_attn_jax.paged_attention import paged_block_sparse_attention
from sparse_attn_jax.testing.compare import assert_close
from sparse_attn_jax.testing.methods import paged

STATIC = (
    "selection_block_size", "scale", "logits_soft_cap", "local_window_size", "num_splits", "return_residual", "implementation"
)  # fmt: skip
attend = jax.jit(
    functools.partial(paged_block_sparse_attention, return_residual=True),
    static_argnames=STATIC,
    compiler_options=dict(xla_backend_optimization_level=0),
)

PAGE, MAX_PAGES, BATCH = 4, 6, 3
LENGTHS = (9, 23, 16)


def make_inputs(
    q_len=1, heads=4, kv_heads=2, page=PAGE, max_pages=MAX_PAGES, lengths=LENGTHS, dtype="float32", seed=0, value_dim=6
):
    """Query, pools whose pages lie in any order, tables and lengths. Pages that no table names hold NaN."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    num_pages = batch * max_pages + 3
    tables = rng.permutation(num_pages)[: batch * max_pages].reshape(batch, max_pages)
    pools = []
    for dim in (8, value_dim):
        pool = rng.standard_normal((num_pages, page, kv_heads, dim))
        pool[np.setdiff1d(np.arange(num_pages), tables)] = np.nan
        pools.append(jnp.asarray(pool, dtype))
    query = jnp.asarray(2 * rng.standard_normal((batch, q_len, heads, 8)), dtype)
    return query, *pools, jnp.asarray(tables, jnp.int32), jnp.asarray(lengths, jnp.int32)


def make_selection(heads, rows, slots=5, num_blocks=6, seed=0, batch=BATCH):
    """Lists with empty slots, duplicates and ids that are no block."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_blocks, (batch, heads, rows, slots))
    bad = rng.choice([-1, -1, -7, num_blocks, 2**31 - 1, -(2**31)], ids.shape)
    return jnp.asarray(np.where(rng.random(ids.shape) < 0.25, bad, ids), jnp.int32)


def check(inputs, selection, **options):
    """Compares with the definition; returns out and lse."""
    out, lse = attend(*inputs, selection, **options)
    options = {name: x for name, x in options.items() if name not in ("num_splits", "implementation")}
    wanted = paged.paged_attention(*inputs, selection, **options)
    dtype = inputs[0].dtype.name
    # The op computes with 16-bit inputs in float32: rounding the result is its only error.
    assert_close("out", out, wanted[0], wanted[0].astype(out.dtype), dtype=dtype)
    assert_close("lse", lse, wanted[1], wanted[1], dtype=dtype)
    return out, lse


SHAPES = {
    "one list": dict(heads=1, rows=1),
    "per KV head": dict(heads=2, rows=1),
    "per query head": dict(heads=4, rows=1),
    "per query": dict(heads=2, rows=3, q_len=3),
    "per query and head": dict(heads=4, rows=3, q_len=3),
    "shared by queries": dict(heads=1, rows=1, q_len=3),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("block_size", [4, 2, 8], ids=["page", "part of a page", "two pages"])
def test_attention_matches_definition(name, block_size):
    shape = dict(SHAPES[name])
    inputs = make_inputs(q_len=shape.pop("q_len", 1))
    check(inputs, make_selection(**shape, num_blocks=24 // block_size), selection_block_size=block_size)


def test_dense_is_every_block():
    inputs = make_inputs(q_len=2)
    out, lse = check(inputs, None)
    every = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (BATCH, 1, 1, 6))
    for result, other in zip((out, lse), attend(*inputs, every)):
        np.testing.assert_array_equal(result, other)


OPTIONS = {
    "window": dict(local_window_size=5),
    "one-sided window": dict(local_window_size=(3, None), num_sinks=2),
    "no window to the left": dict(local_window_size=(None, 0), num_sinks=2),
    "window per head": dict(local_window_size=(jnp.array([0, 3, 30, 7]), 0), num_sinks=jnp.array([0, 1, 0, 6])),
    "soft cap": dict(logits_soft_cap=1.5, scale=0.7),
    "scale 0": dict(scale=0.0),
    "large blocks": dict(selection_block_size=32),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "selected"])
def test_options_match_definition(name, is_dense):
    options = OPTIONS[name]
    inputs = make_inputs(q_len=2)
    selection = None if is_dense else make_selection(2, 1, num_blocks=2 if name == "large blocks" else 6)
    static = {k: x for k, x in options.items() if not (k == "local_window_size" and name == "window per head")}
    if name != "window per head":
        check(inputs, selection, **static)
        return
    found = jax.jit(lambda *a: paged_block_sparse_attention(*a, **options, return_residual=True))(*inputs, selection)
    for result, wanted in zip(found, paged.paged_attention(*inputs, selection, **options)):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_matches_definition(dtype):
    check(make_inputs(dtype=dtype), make_selection(2, 1))


def test_float64_matches_definition():
    with jax.enable_x64(True):
        out, lse = check(make_inputs(dtype="float64"), make_selection(2, 1))
    assert out.dtype == lse.dtype == jnp.float64


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (3, 3), (6, 2)])
def test_group_sizes_match_definition(heads, kv_heads):
    inputs = make_inputs(heads=heads, kv_heads=kv_heads, value_dim=8)
    check(inputs, make_selection(kv_heads, 1))


def test_definition_is_sharp():
    """The comparison fails if a block is dropped, or causality is shifted by one."""
    inputs, selection = make_inputs(q_len=3), make_selection(2, 1)
    out, _ = attend(*inputs, selection)
    dropped = selection.at[:, :, :, 0].set(jnp.where(selection[..., 0] == selection[..., 1], -1, selection[..., 1]))
    for changed in (
        paged.paged_attention(*inputs, dropped),
        paged.paged_attention(*inputs, None, causal_shift=0),
        paged.paged_attention(*inputs, selection, causal_shift=1),
        paged.paged_attention(*inputs, selection, causal_shift=-1),
    ):
        with pytest.raises(AssertionError):
            assert_close("out", out, changed[0], changed[0], dtype="float32")


@pytest.mark.parametrize("num_splits", [2, 3, 7])
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "selected"])
def test_splits_agree(num_splits, is_dense):
    inputs = make_inputs(q_len=2)
    selection = None if is_dense else make_selection(2, 2, slots=9)
    whole = attend(*inputs, selection, num_splits=1)
    for result, other in zip(whole, attend(*inputs, selection, num_splits=num_splits)):
        np.testing.assert_allclose(result, other, rtol=2e-6, atol=1e-6)


def test_long_lists_match_definition():
    """Several steps of several blocks, of sequences of very different lengths."""
    inputs = make_inputs(page=16, max_pages=40, lengths=(633, 17, 300), kv_heads=1, heads=2)
    rng = np.random.default_rng(0)
    selection = jnp.asarray(np.argsort(rng.random((3, 1, 1, 40)))[..., :30], jnp.int32)
    for listed in (None, selection):
        check(inputs, listed)
        check(inputs, listed, num_splits=4)


def test_placement_of_pages_does_not_matter():
    query, *pools, tables, lengths = make_inputs(q_len=2)
    contents = [paged.contiguous(pool, tables) for pool in pools]
    selection = make_selection(2, 1)
    first = attend(query, *pools, tables, lengths, selection)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(pools[0]))
        moved = np.argsort(order)[np.asarray(tables)].astype(np.int32)
        other_pools = [pool[order] for pool in pools]
        for pool, content in zip(other_pools, contents):
            np.testing.assert_array_equal(paged.contiguous(pool, moved), content)
        for result, other in zip(first, attend(query, *other_pools, jnp.asarray(moved), lengths, selection)):
            np.testing.assert_array_equal(result, other)


def test_paged_is_contiguous_attention():
    query, *pools, tables, _ = make_inputs(q_len=3)
    selection = make_selection(2, 3)
    lengths = jnp.full((BATCH,), 24, jnp.int32)
    key, value = (jnp.asarray(paged.contiguous(pool, tables)) for pool in pools)
    blocks = sa.BlockSelection(selection, q_block_size=1, kv_block_size=PAGE)
    options = dict(is_causal=True, return_residual=True, implementation="xla")
    wanted = jax.jit(functools.partial(sa.block_sparse_attention, **options))(query, key, value, blocks)
    for result, other in zip(attend(query, *pools, tables, lengths, selection), wanted):
        np.testing.assert_allclose(result, other, rtol=1e-5, atol=1e-6)


def test_nothing_unread_leaks():
    """NaN in pages of others, in pages not selected, and past the end of a sequence's last page."""
    query, *pools, tables, lengths = make_inputs(q_len=2)
    selection = make_selection(1, 1)
    selection = selection.at[0].set(jnp.where(selection[0] == 2, 1, selection[0]))  # the last page is not selected
    clean = attend(query, *pools, tables, lengths, selection)
    assert np.isfinite(np.asarray(clean[0])).all()
    listed = [{int(b) for b in np.ravel(selection[row]) if 0 <= b < MAX_PAGES} for row in range(BATCH)]
    poisoned = []
    for pool in pools:
        pool = np.array(pool)
        for row, table in enumerate(np.asarray(tables)):
            for block, page in enumerate(table):
                for offset in range(PAGE):
                    if block not in listed[row] or block * PAGE + offset >= LENGTHS[row]:
                        pool[page, offset] = [np.nan, np.inf, -np.inf][(page + offset) % 3]
        poisoned.append(jnp.asarray(pool))
    for result, other in zip(clean, attend(query, *poisoned, tables, lengths, selection)):
        np.testing.assert_array_equal(result, other)
    seen = np.array(poisoned[1])
    seen[int(tables[1, sorted(listed[1])[0]]), 0] = np.nan  # the check can fail
    assert np.isnan(np.asarray(attend(query, poisoned[0], jnp.asarray(seen), tables, lengths, selection)[0])).any()


@pytest.mark.parametrize("bad", [-1, -9, 21, 2**31 - 1, -(2**31)])
def test_bad_physical_pages_read_nothing(bad):
    query, *pools, tables, lengths = make_inputs()
    tables = tables.at[0, 1].set(bad).at[1, 0].set(bad).at[2].set(bad)
    out, lse = check((query, *pools, tables, lengths), None)
    assert np.all(np.isneginf(lse[2])) and not np.any(out[2])


@pytest.mark.parametrize("lengths", [(0, 1, 2), (-4, 24, 25), (30, 2**31 - 1, -(2**31))], ids=str)
def test_any_length_is_guarded(lengths):
    inputs = make_inputs(q_len=3, lengths=lengths)
    if max(lengths) < 100:
        check(inputs, None)
        check(inputs, make_selection(2, 1))
    out, _ = attend(*inputs, None, local_window_size=5)
    assert np.isfinite(np.asarray(out)).all()


def test_empty_lists_give_zero_and_minus_infinity():
    inputs = make_inputs(q_len=2)
    out, lse = attend(*inputs, jnp.full((BATCH, 2, 1, 3), -1, jnp.int32))
    assert not np.any(out) and np.all(np.isneginf(lse))


@pytest.mark.parametrize(("batch", "q_len"), [(0, 1), (2, 0)])
def test_no_queries_give_no_results(batch, q_len):
    query, *pools, tables, lengths = make_inputs(q_len=1)
    out, lse = attend(query[:batch, :q_len], *pools, tables[:batch], lengths[:batch], None)
    assert out.shape == (batch, q_len, 4, 6) and lse.shape == (batch, q_len, 4)


def test_same_inputs_give_the_same_bits():
    inputs, selection = make_inputs(q_len=2), make_selection(4, 2)
    for result, other in zip(attend(*inputs, selection), attend(*inputs, selection)):
        np.testing.assert_array_equal(result, other)


def test_order_and_duplicates_do_not_matter():
    inputs, selection = make_inputs(), make_selection(2, 1)
    longer = jnp.concatenate([selection[..., ::-1], jnp.full((BATCH, 2, 1, 2), -1, jnp.int32), selection], axis=-1)
    for result, other in zip(attend(*inputs, selection, num_splits=1), attend(*inputs, longer, num_splits=1)):
        np.testing.assert_array_equal(result, other)


def test_vmap_is_a_loop():
    many = [make_inputs(seed=seed) for seed in range(2)]
    selections = [make_selection(2, 1, seed=seed) for seed in range(2)]
    stacked = [jnp.stack(x) for x in zip(*(([*inputs, s]) for inputs, s in zip(many, selections)))]
    together = jax.jit(jax.vmap(functools.partial(paged_block_sparse_attention, return_residual=True)))(*stacked)
    for i in range(2):
        for result, other in zip(together, attend(*many[i], selections[i])):
            np.testing.assert_allclose(result[i], other, rtol=1e-6, atol=1e-6)


def memory(num_pages, max_pages, slots, dtype="float32", lengths=2):
    """Bytes of the temporaries of a call over tables of `max_pages`, with lists of `slots`."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pool = jax.ShapeDtypeStruct((num_pages, 16, 2, 64), dtype)
    arguments = (
        jax.ShapeDtypeStruct((2, 1, 4, 64), dtype),
        pool,
        pool,
        shape((2, max_pages)),
        shape((2,)),
        shape((2, 2, 1, slots)),
    )
    return attend.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_follows_the_selection_not_the_pool(dtype):
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.skip("JAX 0.10 reads 16-bit floats in a loop from a copy, on a CPU")
    small = memory(1000, 100, 16, dtype)
    assert memory(16_000, 1600, 16, dtype) <= 1.1 * small
    # No more than a step's keys and values and what is computed from them, whatever the number of slots.
    assert memory(16_000, 1600, 256, dtype) < 12 * 2**20


def test_work_follows_the_longest_list():
    """What runs is a loop over steps whose number is computed from the lists."""
    inputs = make_inputs(page=16, max_pages=64, lengths=(20, 30, 40), kv_heads=1, heads=1)
    text = attend.lower(*inputs, None, num_splits=1).as_text()
    assert "stablehlo.while" in text
    # 64 blocks are 8 steps of 128 tokens; these sequences need one. NaN in the others would show if they were read.
    check(inputs, None, num_splits=1)


QUERY, KEYS, VALUES, TABLES, SEQ_LENS = make_inputs(q_len=2)
CALL = dict(query=QUERY, key_pages=KEYS, value_pages=VALUES, block_tables=TABLES, seq_lens=SEQ_LENS)
CALL |= dict(page_selection=make_selection(2, 1))
BAD_CALLS = {
    "query rank": (dict(query=QUERY[0]), "`query`"),
    "query dtype": (dict(query=QUERY.astype(jnp.int32)), "`query`.*dtype"),
    "heads": (dict(query=QUERY[:, :, :3]), "`query`.*multiple of 2 heads"),
    "key dtype": (dict(key_pages=KEYS.astype("bfloat16")), "`key_pages`.*float32"),
    "head_dim": (dict(key_pages=KEYS[..., :7]), "`key_pages`.*head_dim 8"),
    "pages": (dict(value_pages=VALUES[1:]), "`value_pages`"),
    "no pages": (dict(key_pages=KEYS[:0], value_pages=VALUES[:0]), "`key_pages`"),
    "table rank": (dict(block_tables=TABLES[0]), "`block_tables`"),
    "table dtype": (dict(block_tables=TABLES.astype(jnp.int16)), "`block_tables`.*int32"),
    "table batch": (dict(block_tables=TABLES[:2]), "`block_tables`.*3 batch rows"),
    "lengths": (dict(seq_lens=SEQ_LENS[:2]), "`seq_lens`"),
    "block size": (dict(selection_block_size=6), "`selection_block_size`.*page size, 4"),
    "block size 0": (dict(selection_block_size=0), "`selection_block_size`"),
    "selection rank": (dict(page_selection=CALL["page_selection"][0]), "`page_selection`"),
    "selection dtype": (dict(page_selection=CALL["page_selection"].astype(jnp.int16)), "`page_selection`.*int32"),
    "selection batch": (dict(page_selection=CALL["page_selection"][:1]), "`page_selection`.*batch size 3"),
    "selection heads": (dict(page_selection=make_selection(3, 1)), "`page_selection`.*1 or 2 or 4 heads"),
    "selection rows": (dict(page_selection=make_selection(2, 3)), "`page_selection`.*1 row or 2"),
    "selection slots": (dict(page_selection=CALL["page_selection"][..., :0]), "`page_selection`.*slot"),
    "splits": (dict(num_splits=0), "`num_splits`"),
    "scale": (dict(scale="1"), "`scale`"),
    "cap": (dict(logits_soft_cap=-1.0), "`logits_soft_cap`"),
    "window": (dict(local_window_size=(-1, 0)), "`local_window_size left`"),
    "sinks": (dict(num_sinks=-1), "`num_sinks`"),
    "implementation": (dict(implementation="triton"), "`implementation`"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_named(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: paged_block_sparse_attention(**(CALL | changes)))


def test_implementation_by_name():
    out = attend(**CALL)
    for implementation in ("xla", ("mosaic", "xla")):
        jax.tree.map(np.testing.assert_array_equal, attend(**CALL, implementation=implementation), out)
    for name in set(dispatch.IMPLEMENTATIONS) - {"xla"}:
        with pytest.raises(NotImplementedError, match=f"{name}: "):
            jax.eval_shape(functools.partial(paged_block_sparse_attention, implementation=name), *CALL.values())
