"""MoBA: the chunks it selects, against the definition and by their properties, and attention over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, fast
from selector_checks import (
    assert_chunks_see_what_the_whole_sees,
    assert_later_tokens_change_nothing,
    make_inputs,
    select_mask,
    visible_mask,
)

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.moba import MoBA
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import moba as definition

SMALL = MoBA(top_k=3, block_size=8)
select = fast(SMALL)


def wanted_mask(selector, query, key, q_offset=None):
    """(token mask, gates) by definition."""
    q_len, kv_len = query.shape[1], key.shape[1]
    offset = np.broadcast_to(kv_len - q_len if q_offset is None else np.asarray(q_offset), (query.shape[0],))
    positions = offset[:, None] + np.arange(q_len)
    gates = definition.gates(query, key, positions, selector.block_size)
    chunks = definition.chunk_mask(gates, positions, selector.block_size, selector.top_k)
    return definition.token_mask(chunks, positions, selector.block_size, kv_len), gates


@pytest.mark.parametrize("num_q_heads", [2, 6], ids=["group1", "group3"])
@pytest.mark.parametrize("q_offset", [None, 21, (-5, 37)], ids=str)
def test_selects_the_chunks_of_the_definition(q_offset, num_q_heads):
    query, key = make_inputs(43, 75, num_q_heads, batch=2)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    selection = select(query, key, is_causal=True, q_offset=offset)
    assert (selection.q_block_size, selection.kv_block_size) == (1, 8)
    assert selection.indices.shape == (2, num_q_heads, 43, 3) and selection.indices.dtype == jnp.int32
    found = visible_mask(selection, query, key, is_causal=True, q_offset=offset)
    np.testing.assert_array_equal(found, wanted_mask(SMALL, query, key, q_offset)[0])


@pytest.mark.parametrize("block_size, top_k", [(1, 4), (42, 2), (44, 3)], ids=str)
def test_edge_sizes(block_size, top_k):
    selector = MoBA(top_k, block_size)
    query, key = make_inputs(43, 43, 4)
    np.testing.assert_array_equal(select_mask(fast(selector), query, key, is_causal=True), wanted_mask(selector, query, key)[0])


@pytest.mark.parametrize("kv_block_size", [1, 4])
def test_blocks_of_the_lists_change_nothing(kv_block_size):
    query, key = make_inputs(43, 75)
    fine = fast(dataclasses.replace(SMALL, kv_block_size=kv_block_size))(query, key, is_causal=True)
    assert fine.kv_block_size == kv_block_size and fine.indices.shape[-1] == 3 * 8 // kv_block_size
    coarse = select(query, key, is_causal=True)
    np.testing.assert_array_equal(*(visible_mask(x, query, key, is_causal=True) for x in (fine, coarse)))
    # No block after the query, none that does not exist, none twice.
    ids, own = np.asarray(fine.indices), (32 + np.arange(43)) // kv_block_size
    assert (ids >= -1).all() and (ids <= own[:, None]).all()
    for row in ids.reshape(-1, ids.shape[-1]):
        assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_lists_have_blocks_that_kernels_read():
    sizes = {512: 128, 96: 96, 200: 100, 131: 1}
    for block_size, kv_block_size in sizes.items():
        call = functools.partial(MoBA(3, block_size), is_causal=True)
        assert jax.eval_shape(call, *make_inputs(3, 1100)).kv_block_size == kv_block_size


def test_gates_far_apart_are_still_told_apart():
    """A softmax of these gates is 0 in float32 for all chunks but the first, so it does not order them."""
    query, key = make_inputs(9, 72, 2)
    key = key.at[:, :, :, 0].set(jnp.repeat(jnp.array([9.0, -3, 1, -7, 5, -9, 3, -1, 0]), 8)[None, :, None])
    query = 1e3 * query.at[..., 0].set(jnp.abs(query[..., 0]) + 5)
    sizes = dict(kv_len=72, block_size=8, kernel_size=8, kernel_stride=8)
    score = compile_fast(lambda query, units: sa.score_blocks(query, units, is_causal=True, scale=1.0, **sizes))
    gates = score(query, sa.compress_keys(key, 8, 8))
    assert (np.asarray(gates)[0, 0, -1, 1:] == 0).all()
    wanted, _ = wanted_mask(SMALL, query, key)
    np.testing.assert_array_equal(select_mask(select, query, key, is_causal=True), wanted)
    assert set(np.asarray(fast(MoBA(4, 8))(query, key, is_causal=True).indices)[0, 0, -1]) == {0, 4, 6, 8}


def test_ties_go_to_the_lower_chunk():
    query, key = make_inputs(64, 64)
    ids = np.asarray(select(query, jnp.ones_like(key), is_causal=True).indices)
    np.testing.assert_array_equal(ids[0, 0, -1], [0, 1, 7])
    np.testing.assert_array_equal(ids[0, 0, 7], [0, -1, -1])


def test_as_many_chunks_as_there_are_is_causal_attention():
    query, key = make_inputs(43, 75)
    found = select_mask(fast(MoBA(top_k=10, block_size=8)), query, key, is_causal=True)
    np.testing.assert_array_equal(found[0, 0], np.arange(75) <= 32 + np.arange(43)[:, None])


def test_one_chunk_is_the_own_one():
    query, key = make_inputs(64, 64)
    found = select_mask(fast(MoBA(top_k=1, block_size=16)), query, key, is_causal=True)
    i, j = np.ogrid[:64, :64]
    np.testing.assert_array_equal(found[0, 0], (j <= i) & (i // 16 == j // 16))


def test_nothing_after_a_query_is_looked_at():
    assert_later_tokens_change_nothing(fast(MoBA(top_k=3, block_size=16)), lasts=(0, 31, 62, 64, 143))


def test_chunked_prefill_sees_what_prefill_sees():
    assert_chunks_see_what_the_whole_sees(fast(MoBA(top_k=3, block_size=16)), starts=(0, 1, 50))


def test_decoding_from_a_cache_equals_prefill():
    query, key = make_inputs(60, 75)
    prefill = np.asarray(select(query, key, is_causal=True, q_offset=0).indices)

    @compile_fast
    def step(query, key, index):
        units = sa.compress_keys(key, *SMALL.unit_sizes()[0])
        return SMALL.select(query, units, kv_len=75, is_causal=True, q_offset=index).indices

    for index in range(60):
        cache = jnp.where(jnp.arange(75)[:, None, None] > index, jnp.nan, key)
        np.testing.assert_array_equal(step(query[:, index : index + 1], cache, index), prefill[:, :, index : index + 1])


def test_vmap_changes_nothing():
    query, key = make_inputs(20, 75, batch=3)
    offsets = jnp.array([0, 33, 55])
    one = lambda query, key, offset: SMALL(query[None], key[None], is_causal=True, q_offset=offset).indices[0]
    together = select(query, key, is_causal=True, q_offset=offsets).indices
    np.testing.assert_array_equal(compile_fast(jax.vmap(one))(query, key, offsets), together)


def test_attention_and_gradients_are_those_of_the_mask():
    query, key = make_inputs(43, 75)
    value, d_out = make_inputs(75, 43, 2, 4, seed=1)[0], make_inputs(43, 1, seed=2)[0]
    mask, _ = wanted_mask(SMALL, query, key)

    def loss(query, key, value):
        return (sa.sparse_attention(query, key, value, SMALL, is_causal=True) * d_out).sum()

    expected = oracle.attention(mask, query, key, value, d_out=d_out)
    found = compile_fast(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)
    np.testing.assert_allclose(found[0], (expected[0] * d_out).sum(), rtol=1e-4)
    for x, wanted in zip(found[1], expected[2:5], strict=True):
        np.testing.assert_allclose(x, wanted, atol=2e-4)


def test_no_queries_and_no_keys():
    query, key = make_inputs(3, 20)
    assert SMALL(query[:, :0], key, is_causal=True).indices.shape == (1, 4, 0, 3)
    assert (SMALL(query, key[:, :0], is_causal=True).indices == -1).all()


QUERY, KEY = make_inputs(4, 20)
BAD_CALLS = {
    "top-k": ("`top_k` is 0; it must be an int of at least 1", lambda: MoBA(top_k=0)),
    "block-size": ("`block_size` is 2.0", lambda: MoBA(block_size=2.0)),
    "kv-block-size": ("`kv_block_size` is 0", lambda: MoBA(kv_block_size=0)),
    "kv-block-size-divides": ("`kv_block_size` is 3; it must divide", lambda: MoBA(block_size=8, kv_block_size=3)),
    "not-causal": ("`is_causal` is False; MoBA looks back only", lambda: SMALL(QUERY, KEY)),
    "is-causal": ("`is_causal` is 1", lambda: SMALL(QUERY, KEY, is_causal=1)),
    "key": ("`key` has shape", lambda: SMALL(QUERY, KEY[0], is_causal=True)),
    "query": ("`query` has head_dim 3", lambda: SMALL(QUERY[..., :3], KEY, is_causal=True)),
    "heads": ("`query` has 3 heads", lambda: SMALL(QUERY[:, :, :3], KEY, is_causal=True)),
    "q-offset": ("`q_offset` is 0.5", lambda: SMALL(QUERY, KEY, is_causal=True, q_offset=0.5)),
    "units": ("`compressed` has 20 units", lambda: SMALL.select(QUERY, KEY, kv_len=20, is_causal=True)),
    "kv-len": ("`kv_len` is -1", lambda: SMALL.select(QUERY, KEY, kv_len=-1, is_causal=True)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_by_name(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
