"""InfLLMV2, LocalStrided, SlidingWindow and Dense as a user calls them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from static_patterns import assert_no_list_repeats, assert_same_in_chunks
from static_patterns import select as select_static

import sparse_attn_jax as sa
from sparse_attn_jax.selectors import Dense, InfLLMV2, LocalStrided, SlidingWindow
from sparse_attn_jax.testing import selection_oracle as oracle

# Small blocks, so that short sequences have many.
SMALL = InfLLMV2(
    top_k=5, block_size=16, kernel_size=8, kernel_stride=4, num_local_blocks=2, coarse_kernel_size=32, coarse_kernel_stride=16
)
SELECTORS = {
    "coarse": SMALL,
    "exact": dataclasses.replace(SMALL, coarse_lse=False),
    "nsa": dataclasses.replace(SMALL, pooling="overlap_sum", group_reduction="mean", coarse_lse=False),
    "per-head": dataclasses.replace(SMALL, group_reduction=None),
    "window": SlidingWindow(20, num_sinks=3, block_size=8),
    "local strided": LocalStrided(local_blocks=2, vert_stride=3, block_size=8),
}
DATA_DEPENDENT = {name: selector for name, selector in SELECTORS.items() if isinstance(selector, InfLLMV2)}


def make_inputs(q_len, kv_len, num_q_heads=4, num_kv_heads=2, head_dim=16, batch=1, seed=0):
    query_seed, key_seed = jax.random.split(jax.random.key(seed))
    query = 3 * jax.random.normal(query_seed, (batch, q_len, num_q_heads, head_dim))
    return query, jax.random.normal(key_seed, (batch, kv_len, num_kv_heads, head_dim))


def oracle_lists(selector, query, key, positions, causal):
    """The lists by definition, and the scores they are made from."""
    kernel = selector.kernel_size, selector.kernel_stride
    coarse_kernel = selector.coarse_kernel_size, selector.coarse_kernel_stride
    scores = oracle.score(
        query, oracle.compress(key, *kernel), positions, kv_len=key.shape[1], block_size=selector.block_size, kernel=kernel,
        pooling=selector.pooling, reduction=selector.group_reduction, causal=causal,
        coarse=oracle.compress(key, *coarse_kernel) if selector.coarse_lse else None, coarse_kernel=coarse_kernel,
    )  # fmt: skip
    lists = oracle.select(
        scores, positions, top_k=selector.top_k, block_size=selector.block_size, num_sink_blocks=selector.num_sink_blocks,
        num_local_blocks=selector.num_local_blocks, causal=causal,
    )  # fmt: skip
    return lists, scores


@pytest.mark.parametrize("name", DATA_DEPENDENT)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("num_q_heads", [2, 6, 8], ids=["group1", "group3", "group4"])
def test_infllm_v2_matches_oracle(name, is_causal, num_q_heads):
    selector = SELECTORS[name]
    query, key = make_inputs(151, 207, num_q_heads)
    selection = selector(query, key, is_causal=is_causal)
    wanted, scores = oracle_lists(selector, query, key, 56 + np.arange(151)[None], is_causal)
    assert selection.q_block_size == 1 and selection.kv_block_size == 16
    oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)


def test_infllm_v2_defaults_are_those_of_the_paper():
    query, key = make_inputs(300, 300)
    selection = InfLLMV2(top_k=4, num_local_blocks=2)(query, key, is_causal=True)
    wanted, scores = oracle_lists(InfLLMV2(top_k=4, num_local_blocks=2), query, key, np.arange(300)[None], True)
    oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)


@pytest.mark.parametrize("shift", [-1, 1])
def test_oracle_notices_a_selector_that_is_off_by_one(shift):
    selector = SELECTORS["exact"]
    query, key = make_inputs(207, 207)
    positions = np.arange(207)[None]
    found = np.asarray(selector(query, key, is_causal=True).indices)
    _, scores = oracle_lists(selector, query, key, positions, True)
    wrong, _ = oracle_lists(selector, query, key, positions + shift, True)
    with pytest.raises(AssertionError):
        oracle.assert_same_up_to_rounding(found, wrong, scores)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_infllm_v2_half_precision_matches_oracle_of_the_same_units(dtype):
    query, key = (x.astype(dtype) for x in make_inputs(100, 100))
    selection = SMALL(query, key, is_causal=True)
    compressed, coarse = SMALL.compress(key)
    scores = oracle.score(
        query, compressed, np.arange(100)[None], kv_len=100, block_size=16, kernel=(8, 4), coarse=coarse, coarse_kernel=(32, 16)
    )
    wanted = oracle.select(
        scores, np.arange(100)[None], top_k=5, block_size=16, num_sink_blocks=1, num_local_blocks=2, causal=True
    )
    oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)


@pytest.mark.parametrize("kv_len", [1, 7, 8, 32])
def test_short_sequences_keep_their_forced_blocks(kv_len):
    query, key = make_inputs(kv_len, kv_len)
    indices = np.asarray(SMALL(query, key, is_causal=True).indices)
    for position in range(kv_len):
        blocks = set(indices[0, 0, position]) - {-1}
        assert blocks == set(range(position // 16 + 1))


@pytest.mark.parametrize("name", SELECTORS)
def test_information_causality(name):
    selector = SELECTORS[name]
    query, key = make_inputs(200, 200)
    before = selector(query, key, is_causal=True).to_dense_mask(200, 200)
    for last in (0, 7, 31, 62, 63, 64, 143, 198):
        other_query, other_key = make_inputs(200, 200, seed=last + 1)
        is_later = jnp.arange(200)[:, None, None] > last
        mixed_query = jnp.where(is_later, other_query, query)
        mixed_key = jnp.where(is_later, 10 * other_key, key).at[:, -1].set(jnp.nan)
        after = selector(mixed_query, mixed_key, is_causal=True).to_dense_mask(200, 200)
        np.testing.assert_array_equal(after[:, :, : last + 1], before[:, :, : last + 1])


def test_information_causality_check_can_fail():
    query, key = make_inputs(200, 200)
    before = SMALL(query, key).indices
    after = SMALL(query, key.at[:, 100:].multiply(-5.0)).indices
    assert (before[:, :, :100] != after[:, :, :100]).any()


@pytest.mark.parametrize("name", DATA_DEPENDENT)
@pytest.mark.parametrize("starts", [(0, 64, 128), (0, 1, 50, 149)], ids=str)
def test_chunked_prefill_equals_prefill(name, starts):
    selector = SELECTORS[name]
    query, key = make_inputs(200, 200)
    whole = np.asarray(selector(query, key, is_causal=True).indices)
    _, scores = oracle_lists(selector, query, key, np.arange(200)[None], True)
    for start, stop in zip(starts, (*starts[1:], 200), strict=True):
        part = selector(query[:, start:stop], key[:, :stop], is_causal=True).indices
        rows = whole[:, :, start:stop]
        visible = -(-stop // selector.block_size)
        oracle.assert_same_up_to_rounding(np.asarray(part), rows, scores[:, :, start:stop, :visible])


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_decoding_from_a_cache_equals_prefill(name):
    selector = SELECTORS[name]
    query, key = make_inputs(100, 160)
    prefill = np.asarray(selector(query, key, is_causal=True, q_offset=0).indices)
    _, scores = oracle_lists(selector, query, key, np.arange(100)[None], True)

    @jax.jit
    def step(query, key, index):
        compressed, coarse = selector.compress(key)
        return selector.select(query, compressed, coarse, kv_len=160, is_causal=True, q_offset=index).indices

    for index in range(100):
        # What the cache holds beyond its filled part must not matter.
        cache = jnp.where(jnp.arange(160)[:, None, None] > index, jnp.nan, key)
        row = step(jax.lax.dynamic_slice_in_dim(query, index, 1, axis=1), cache, jnp.int32(index))
        rows = slice(index, index + 1)
        oracle.assert_same_up_to_rounding(np.asarray(row), prefill[:, :, rows], scores[:, :, rows])


def test_nan_in_a_visible_key_leaves_the_forced_blocks():
    query, key = make_inputs(100, 100)
    indices = np.asarray(SMALL(query, key.at[:, 0].set(jnp.nan), is_causal=True).indices)
    np.testing.assert_array_equal(indices[0, 0, -1], [0, 5, 6, -1, -1])


@pytest.mark.parametrize("name", SELECTORS)
def test_jit_and_vmap_change_nothing(name):
    selector = SELECTORS[name]
    query, key = make_inputs(40, 100, batch=3)
    offsets = jnp.array([0, 33, 60])
    together = selector(query, key, is_causal=True, q_offset=offsets)

    def one(query, key, offset):
        return selector(query[None], key[None], is_causal=True, q_offset=offset).to_dense_mask(40, 100)[0]

    one_by_one = jax.jit(jax.vmap(one))(query, key, offsets)
    np.testing.assert_array_equal(one_by_one, together.to_dense_mask(40, 100))


def test_selection_has_no_gradient_and_survives_remat_and_scan():
    query, key = make_inputs(64, 64)

    @jax.checkpoint
    def layer(carry, _):
        query, key = carry
        weight = SMALL(query, key, is_causal=True).to_dense_mask(64, 64).mean()
        return (query * weight, key * weight), None

    def loss(query, key):
        (query, key), _ = jax.lax.scan(layer, (query, key), length=2)
        return query.sum() + key.sum()

    for grad in jax.jit(jax.grad(loss, (0, 1)))(query, key):
        assert np.isfinite(grad).all() and np.ptp(grad) < 1e-5


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_shard_map_over_batch_and_heads_needs_no_collective(axis):
    num_devices = len(jax.devices())
    query, key = make_inputs(100, 100, 2 * num_devices, num_devices, batch=num_devices)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("shard",))
    spec = P("shard") if axis == "batch" else P(None, None, "shard")
    out_spec = P("shard") if axis == "batch" else P(None, "shard")
    offsets = jnp.zeros(num_devices, jnp.int32)
    offset_spec = P("shard") if axis == "batch" else P()

    def select(query, key, offsets):
        return SMALL(query, key, is_causal=True, q_offset=offsets).indices

    sharded = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=(spec, spec, offset_spec), out_specs=out_spec))
    np.testing.assert_array_equal(sharded(query, key, offsets), select(query, key, offsets))
    text = sharded.lower(query, key, offsets).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


@pytest.mark.parametrize("selector", [dataclasses.replace(SMALL, dense_len=100), Dense(16)], ids=["dense-len", "dense"])
def test_dense_selects_every_block_in_one_row(selector):
    query, key = make_inputs(30, 100)
    selection = selector(query, key, is_causal=True)
    assert selection.indices.shape == (1, 1, 1, 7)
    assert selection.to_dense_mask(30, 100).all()
    assert selection.density(100) == 1.0


def test_dense_len_is_the_last_dense_length():
    selector = dataclasses.replace(SMALL, dense_len=100)
    query, key = make_inputs(30, 101)
    assert selector(query, key).indices.shape == (1, 2, 30, 5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("q_offset", [None, 0, 8, 21, -5, (0, 37)], ids=str)
@pytest.mark.parametrize("window, sinks", [(1, 0), (8, 0), (9, 3), (20, 17), (200, 1)])
def test_sliding_window_is_exact_to_the_token(window, sinks, q_offset, is_causal):
    query, key = make_inputs(43, 75, batch=2)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    selection = SlidingWindow(window, sinks, block_size=8)(query, key, is_causal=is_causal, q_offset=offset)
    assert selection.q_block_size == (8 if q_offset in (None, 0, 8) else 1)
    positions = np.broadcast_to(32 if q_offset is None else np.asarray(q_offset), (2,))[:, None] + np.arange(43)
    blocks = np.broadcast_to(selection.to_dense_mask(43, 75)[:, 0], (2, 43, 75))
    q_position, kv_position = jnp.asarray(positions)[:, :, None], jnp.arange(75)[None, None]
    tokens = selection.predicate(jnp.zeros((1, 1, 1), int), jnp.zeros((1, 1, 1), int), q_position, kv_position)
    visible = blocks & np.asarray(tokens)
    if is_causal:
        visible &= np.asarray(kv_position <= q_position)
    np.testing.assert_array_equal(visible, oracle.window_mask(positions, 75, window, sinks, is_causal))


def test_sliding_window_lists_are_short_and_without_repeats():
    query, key = make_inputs(640, 640)
    selection = SlidingWindow(64, num_sinks=4)(query, key, is_causal=True)
    assert selection.indices.shape == (1, 1, 10, 3)
    np.testing.assert_array_equal(selection.indices[0, 0, :3], [[0, -1, -1], [0, -1, 1], [0, 1, 2]])


def test_window_predicate_is_a_static_pytree():
    query, key = make_inputs(8, 8)
    predicate = SlidingWindow(4)(query, key).predicate
    assert jax.tree.leaves(predicate) == []
    assert hash(predicate) == hash(SlidingWindow(4)(query, key).predicate)


@pytest.mark.parametrize("selector", [InfLLMV2(), SlidingWindow(4), Dense()], ids=lambda s: type(s).__name__)
def test_selectors_are_frozen_hashable_and_causal_safe(selector):
    assert hash(selector) == hash(dataclasses.replace(selector)) and selector == dataclasses.replace(selector)
    assert selector.causal_safe
    with pytest.raises(dataclasses.FrozenInstanceError):
        selector.block_size = 1


BAD_FIELDS = [
    ("top_k", 0), ("top_k", 32), ("block_size", 0), ("kernel_size", -1), ("kernel_stride", 0), ("num_sink_blocks", -1),
    ("num_local_blocks", 1.5), ("coarse_kernel_size", 0), ("coarse_kernel_stride", True), ("coarse_lse", 1),
    ("dense_len", -1), ("pooling", "mean"), ("group_reduction", "min"), ("scale", "auto"),
]  # fmt: skip


@pytest.mark.parametrize("field, value", BAD_FIELDS, ids=lambda x: str(x))
def test_infllm_v2_refuses_a_bad_field_by_name(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        InfLLMV2(**{field: value})


QUERY, KEY = make_inputs(4, 100)
UNITS, COARSE = SMALL.compress(KEY)
select = functools.partial(SMALL.select, kv_len=100)

BAD_CALLS = {
    "window-0": ("`window`", lambda: SlidingWindow(0)),
    "window-beyond-int32": ("`window` is 4294967296; .*int32", lambda: SlidingWindow(2**32)),
    "window-sinks": ("`num_sinks`", lambda: SlidingWindow(4, -1)),
    "window-block": ("`block_size`", lambda: SlidingWindow(4, block_size=0)),
    "dense-block": ("`block_size`", lambda: Dense(0)),
    "local-blocks-0-causal": ("`num_local_blocks`", lambda: InfLLMV2(num_local_blocks=0)(QUERY, KEY, is_causal=True)),
    "units-count": ("`compressed` has 23 units", lambda: select(QUERY, UNITS[:, 1:], COARSE)),
    "units-rank": ("`compressed`", lambda: select(QUERY, UNITS[0], COARSE)),
    "query-rank": ("`query`", lambda: select(QUERY[0, 0, 0, 0], UNITS, COARSE)),
    "query-heads": ("`query` has 3 heads", lambda: select(QUERY[:, :, :3], UNITS, COARSE)),
    "coarse-missing": ("`coarse` is None", lambda: select(QUERY, UNITS, None)),
    "coarse-unwanted": ("`coarse` is an array", lambda: SELECTORS["exact"].select(QUERY, UNITS, COARSE, kv_len=100)),
    "coarse-count": ("`coarse` has 4 units", lambda: select(QUERY, UNITS, COARSE[:, 1:])),
    "select-kv-len": ("`kv_len`", lambda: SMALL.select(QUERY, UNITS, COARSE, kv_len=-1)),
    "select-offset": ("`q_offset`", lambda: select(QUERY, UNITS, COARSE, q_offset=jnp.zeros(2, int))),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_by_name(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("selector", [SMALL, SlidingWindow(4), Dense()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "argument, bad",
    [
        ("key", dict(key=KEY[0])),
        ("key", dict(key=None)),
        ("key", dict(key=KEY.astype(int))),
        ("query", dict(query=QUERY[..., :3])),
        ("query", dict(query=QUERY[:, :, :3])),
        ("is_causal", dict(is_causal=1)),
        ("q_offset", dict(q_offset=0.5)),
        ("q_offset", dict(q_offset=jnp.zeros((1, 1), int))),
    ],
    ids=["key-rank", "key-missing", "key-dtype", "head-dim", "heads", "is-causal", "offset-float", "offset-rank"],
)
def test_every_selector_refuses_a_bad_argument_by_name(selector, argument, bad):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        selector(**(dict(query=QUERY, key=KEY) | bad))


def local_strided_mask(positions, kv_len, block_size, local, stride, offsets):
    """The definition: bool [batch, heads, q_len, kv_len], one entry at a time. `offsets`: by head, or "dense"."""
    mask = np.zeros((len(positions), len(offsets), positions.shape[1], kv_len), bool)
    for b, h, q, k in np.ndindex(mask.shape):
        i, j = positions[b, q] // block_size, k // block_size
        is_kept = offsets[h] == "dense" or i - j < local or (j + offsets[h]) % stride == 0
        mask[b, h, q, k] = is_kept and k <= positions[b, q]
    return mask


def visible_of(selection, positions, kv_len):
    """The selection's tokens, under causality."""
    blocks = np.asarray(selection.to_dense_mask(positions.shape[1], kv_len))
    return blocks & (np.arange(kv_len) <= positions[:, None, :, None])


STRIDED = [
    (dict(), [1, 2, 3, 4]),  # max(1, 3 // 4) is 1
    (dict(vert_stride=9), [1, 3, 5, 7]),
    (dict(stride_offset=0, head_step=2, num_dense_heads=1), [0, 2, 4, "dense"]),
    (dict(head_step=0), [1] * 4),
    (dict(slide="kv"), [1, 1, 2, 2]),
    (dict(slide="kv", head_step=2, num_heads=6, head_range=(3, 5)), [7, 7, 9, 9]),
    (dict(num_heads=8, head_range=(2, 6), vert_stride=16, num_dense_heads=3), [5, 7, 9, "dense"]),
    (dict(local_blocks=40), [1, 2, 3, 4]),
    (dict(vert_stride=1), ["dense"] * 4),
]


@pytest.mark.parametrize(
    "options, offsets, q_offset",
    [(*case, q_offset) for case in STRIDED for q_offset in (None, 21)]
    + [(*STRIDED[i], q_offset) for i in (0, 7) for q_offset in (0, 8, -5, 90, 300, (0, 37))],
    ids=str,
)
def test_local_strided_is_its_definition(options, offsets, q_offset):
    selector = LocalStrided(**dict(local_blocks=2, vert_stride=3, block_size=8) | options)
    query, key = make_inputs(43, 75, batch=2)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    selection = selector(query, key, is_causal=True, q_offset=offset)
    assert selection.q_block_size == (8 if q_offset in (None, 0, 8) else 1)
    positions = np.broadcast_to(32 if q_offset is None else np.asarray(q_offset), (2,))[:, None] + np.arange(43)
    expected = local_strided_mask(positions, 75, 8, selector.local_blocks, selector.vert_stride, offsets)
    heads = selection.indices.shape[1]
    found = visible_of(selection, positions, 75).repeat(4 // heads, axis=1)
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


RELATIVE = [
    # local_blocks, vert_stride, causal, dense heads
    ((2, 1), 3, False, 0),
    ((1, 3), 4, False, 0),
    (2, 3, False, 0),
    ((2, 2), 3, False, 2),
    (2, 3, True, 0),
    ((30, 30), 3, False, 0),
]


@pytest.mark.parametrize("q_offset", [None, 21, -19, 300], ids=str)
@pytest.mark.parametrize("local, stride, is_causal, num_dense_heads", RELATIVE, ids=str)
def test_relative_stride_is_its_definition(local, stride, is_causal, num_dense_heads, q_offset):
    """DKernel's rule: blocks between the query's local ones and a block, modulo the stride."""
    selector = LocalStrided(local, stride, 8, relative=True, num_dense_heads=num_dense_heads)
    selection, found = select_static(selector, 43, 75, is_causal=is_causal, q_offset=q_offset)
    assert_no_list_repeats(selection, 75)
    assert selection.indices.shape[1] == (4 if num_dense_heads else 1)
    left, right = local if isinstance(local, tuple) else (local, local)
    offset = 32 if q_offset is None else q_offset
    expected = np.zeros((1, 4, 43, 75), bool)
    for _, h, q, k in np.ndindex(expected.shape):
        i, j = (q + offset) // 8, k // 8
        is_kept = (max(0, i - j - left + 1) + max(0, j - i - right + 1)) % stride == 0
        expected[0, h, q, k] = (is_kept or h >= 4 - num_dense_heads) and not (is_causal and k > q + offset)
    np.testing.assert_array_equal(found, expected)


def test_stride_from_position_0_with_local_blocks_on_both_sides():
    selection, found = select_static(LocalStrided((2, 3), 4, 8), 75, 75, is_causal=False)
    assert_no_list_repeats(selection, 75)
    expected = np.zeros((1, 4, 75, 75), bool)
    for _, h, q, k in np.ndindex(expected.shape):
        expected[0, h, q, k] = -3 < q // 8 - k // 8 < 2 or (k // 8 + h + 1) % 4 == 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "selector", [LocalStrided(2, 3, 16), LocalStrided(2, 3, 16, relative=True), SlidingWindow(20, 3, 16)], ids=str
)
def test_static_patterns_are_the_same_in_chunks_and_decoding(selector):
    assert_same_in_chunks(selector, 100, (0, 1, 49, 99))


def test_local_strided_check_notices_a_stride_that_is_off_by_one():
    """vLLM's 1 is DKernel's 0."""
    query, key = make_inputs(75, 75)
    positions = np.arange(75)[None]
    found = visible_of(LocalStrided(2, 3, 8, stride_offset=0)(query, key, is_causal=True), positions, 75)
    assert (found != local_strided_mask(positions, 75, 8, 2, 3, [1, 2, 3, 4])).any()


def test_local_strided_shares_equal_lists():
    query, key = make_inputs(64, 640)
    for selector, heads in ((LocalStrided(2), 4), (LocalStrided(2, head_step=0), 1), (LocalStrided(2, slide="kv"), 2)):
        selection = selector(query, key, is_causal=True)
        assert selection.indices.shape == (1, heads, 1, 2 + 2)  # one in 8 of 10 blocks: at most 2
        lists = np.asarray(selection.indices)[0]
        for row in lists.reshape(-1, 4):
            assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_local_strided_attends_as_defined():
    query, key = make_inputs(64, 75)
    selector = LocalStrided(local_blocks=2, vert_stride=3, block_size=8)
    out = sa.sparse_attention(query, key, key, selector, is_causal=True)
    mask = local_strided_mask(11 + np.arange(64)[None], 75, 8, 2, 3, [1, 2, 3, 4])
    scores = np.einsum("bqhd,bkhd->bhqk", query, np.repeat(key, 2, axis=2)) / 4
    probabilities = np.exp(np.where(mask, scores, -np.inf))
    probabilities /= probabilities.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", probabilities, np.repeat(key, 2, axis=2)), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(local_blocks=0), "`local_blocks` is 0; it must be an int of at least 1"),
        (dict(local_blocks=(1, 2, 3)), r"`local_blocks` is \(1, 2, 3\); it must be an int or a tuple"),
        (dict(local_blocks=(1, 0)), r"`local_blocks\[1\]` is 0"),
        (dict(relative=1), "`relative` is 1"),
        (dict(vert_stride=0), "`vert_stride` is 0"),
        (dict(block_size=0), "`block_size` is 0"),
        (dict(head_step=-1), "`head_step` is -1"),
        (dict(stride_offset=-1), "`stride_offset` is -1"),
        (dict(slide="k"), "`slide` is 'k'; it must be one of 'q', 'kv'"),
        (dict(num_heads=0), "`num_heads` is 0"),
        (dict(num_dense_heads=-1), "`num_dense_heads` is -1"),
        (dict(head_range=[0, 1]), r"`head_range` is \[0, 1\]; it must be a tuple"),
        (dict(head_range=(2, 2), num_heads=4), r"`head_range\[1\]` is 2; it must be an int of at least 3"),
        (dict(head_range=(0, 4)), "`num_heads` is None; with head_range="),
        (dict(head_range=(0, 4), num_heads=3), "`num_heads` is 3; with head_range="),
    ],
    ids=str,
)
def test_local_strided_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LocalStrided(**options)


def test_local_strided_refuses_calls():
    query, key = make_inputs(8, 8)
    with pytest.raises(ValueError, match="`is_causal` is False; the pattern of LocalStrided looks back only"):
        LocalStrided()(query, key)
    with pytest.raises(ValueError, match=r"the call has 4 query heads; `num_heads` 8 and `head_range` \(0, 2\) need 2"):
        LocalStrided(num_heads=8, head_range=(0, 2))(query, key, is_causal=True)
    with pytest.raises(ValueError, match="`num_dense_heads` is 5; there are 4 query heads"):
        LocalStrided(num_dense_heads=5)(query, key, is_causal=True)
