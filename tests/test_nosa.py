"""NOSA: what it selects by score and by importance, against the definition, and training through the bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, fast, normal
from selector_checks import make_inputs, visible_mask

import sparse_attn_jax as sa
from sparse_attn_jax.selectors import InfLLMV2
from sparse_attn_jax.selectors.nosa import NOSA
from sparse_attn_jax.testing import oracle, selection_oracle
from sparse_attn_jax.testing.methods import nosa as definition

# One local block, so that units which reach into the query's own block count in blocks that are not forced.
BY_SCORE = InfLLMV2(top_k=3, block_size=8, kernel_size=4, kernel_stride=2, num_local_blocks=1, coarse_lse=False)
SMALL = NOSA(top_k=5, query_aware=BY_SCORE)
PER_HEAD = dataclasses.replace(SMALL, query_aware=dataclasses.replace(BY_SCORE, group_reduction=None))
select = fast(SMALL)


def make_importance(kv_len=75, batch=2, seed=7):
    return normal(seed, batch, 2, kv_len)


def wanted_lists(first, importance, positions, causal=True):
    """(lists, importance of the blocks), where the first part is `first`."""
    sizes = dict(block_size=8, causal=causal)
    scores = definition.block_importance(importance, positions, kernel=(4, 2), **sizes)
    scores = scores.repeat(first.shape[1] // 2, axis=1)
    return definition.fill(np.asarray(first), scores, positions, top_k=5, **sizes), scores


@pytest.mark.parametrize(
    "selector, is_causal, q_offset", [(SMALL, True, (-5, 30)), (PER_HEAD, False, None)], ids=["causal", "per-head"]
)
def test_selects_the_blocks_of_the_definition(selector, is_causal, q_offset):
    (query, key), importance = make_inputs(43, 75, batch=2), make_importance()
    options = dict(is_causal=is_causal, q_offset=None if q_offset is None else jnp.asarray(q_offset))
    selection = fast(selector)(query, key, importance=importance, **options)
    assert (selection.q_block_size, selection.kv_block_size) == (1, 8)
    assert selection.indices.shape == (2, 4 if selector is PER_HEAD else 2, 43, 5)
    positions = np.broadcast_to(32 if q_offset is None else q_offset, (2,))[:, None] + np.arange(43)
    first = fast(selector.query_aware)(query, key, **options).indices
    wanted, scores = wanted_lists(first, importance, positions, is_causal)
    selection_oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)


def test_the_part_by_score_is_that_of_infllm_v2():
    (query, key), importance = make_inputs(43, 75, batch=2), make_importance()
    blocks = select(query, key, importance=importance, is_causal=True).to_block_mask(75)
    first = fast(BY_SCORE)(query, key, is_causal=True).to_block_mask(75)
    assert (blocks >= first).all() and (blocks.sum(-1) == np.minimum(5, 1 + (32 + np.arange(43)) // 8)).all()


def test_neighbouring_queries_share_what_is_important():
    (query, key), importance = make_inputs(43, 75, batch=2), make_importance()
    blocks = np.asarray(select(query, key, importance=importance, is_causal=True).to_block_mask(75))
    late = blocks[:, :, -3:]  # of the same own block
    assert ((late[:, :, 1:] & late[:, :, :-1]).sum(-1) >= SMALL.top_k - BY_SCORE.top_k + 2).all()


def test_ties_and_extreme_importance():
    query, key = make_inputs(75, 75, batch=2)
    # Sinks and local blocks are the only ones chosen by score, so that it is known which are left.
    forced_only = fast(NOSA(4, dataclasses.replace(BY_SCORE, top_k=2)))
    tokens = np.arange(75.0)
    # A unit whose tokens 38 and 39 are infinite starts in block 4.
    for importance, wanted in ((0 * tokens, [1, 2]), (tokens, [7, 8]), (np.where(tokens > 37, np.inf, 0), [4, 5])):
        importance = jnp.broadcast_to(jnp.asarray(importance, jnp.float32), (2, 2, 75))
        ids = forced_only(query, key, importance=importance, is_causal=True).indices
        np.testing.assert_array_equal(ids[0, 0, -1], [0, *wanted, 9])
    # NaN is never chosen for its importance, and leaves the part by score as it is.
    query, key = make_inputs(43, 75, batch=2)
    bad = select(query, key, importance=jnp.full((2, 2, 75), jnp.nan), is_causal=True)
    first = fast(BY_SCORE)(query, key, is_causal=True)
    np.testing.assert_array_equal(bad.to_block_mask(75), first.to_block_mask(75))


def test_nothing_after_a_query_is_looked_at():
    (query, key), importance = make_inputs(75, 75, batch=2), make_importance()
    before = visible_mask(select(query, key, importance=importance, is_causal=True), query, key, is_causal=True)
    # Where blocks and units end, and near it.
    for last in (0, 24, 37, 38, 39, 63):
        is_later = np.arange(75) > last
        changed = jnp.where(is_later, 9.0, importance).at[:, :, -1].set(jnp.nan)
        some = jnp.where(is_later[:, None, None], -9.0, key)
        after = visible_mask(select(query, some, importance=changed, is_causal=True), query, key, is_causal=True)
        np.testing.assert_array_equal(after[:, :, : last + 1], before[:, :, : last + 1])


def test_one_query_at_a_time_selects_the_same():
    (query, key), importance = make_inputs(75, 75, batch=2), make_importance()
    whole = select(query, key, importance=importance, is_causal=True).indices
    for i in (0, 13, 40, 74):
        row = select(query[:, i : i + 1], key, importance=importance, is_causal=True, q_offset=jnp.int32(i))
        np.testing.assert_array_equal(row.indices[:, :, 0], whole[:, :, i])


def test_importance_learns_through_the_bias():
    (query, key), importance = make_inputs(43, 75, batch=2), make_importance()
    value, d_out = normal(8, 2, 75, 2, 6), np.asarray(normal(9, 2, 43, 4, 6))

    def loss(importance, query, key):
        selection = SMALL(query, key, importance=importance, is_causal=True)
        out = sa.block_sparse_attention(query, key, value, selection, key_bias=importance, is_causal=True)
        return (out * d_out).sum(), (out, selection)

    gradient = compile_fast(jax.grad(loss, (0, 1, 2), has_aux=True))
    (d_importance, d_query, d_key), (out, selection) = gradient(importance, query, key)
    mask = visible_mask(selection, query, key, is_causal=True)
    expected = oracle.attention(mask, query, key, value, importance, d_out=d_out)
    for x, wanted in ((out, expected[0]), (d_query, expected[2]), (d_key, expected[3]), (d_importance, expected[5])):
        np.testing.assert_allclose(x, wanted, atol=5e-4)
    assert np.abs(d_importance).max() > 0.1
    # What it is the gradient of: the softmax with the importance, and not without.
    assert np.abs(oracle.attention(mask, query, key, value)[0] - expected[0]).max() > 0.1


def test_short_sequences_and_no_queries():
    query, key = make_inputs(3, 3, batch=2)
    selection = select(query, key, importance=make_importance(3), is_causal=True)
    np.testing.assert_array_equal(selection.indices[..., 0], 0)
    np.testing.assert_array_equal(selection.indices[..., 1:], -1)
    assert SMALL(query[:, :0], key, importance=make_importance(3)).indices.shape == (2, 2, 0, 5)


QUERY, KEY = make_inputs(4, 20)
IMPORTANCE = make_importance(20, 1)
BAD_CALLS = {
    "top-k": ("`top_k` is 32; it must be an int of at least 33", lambda: NOSA(top_k=32)),
    "query-aware": ("`query_aware` is 3", lambda: NOSA(query_aware=3)),
    "dense-len": ("`query_aware` is .*`dense_len` is 0", lambda: NOSA(query_aware=InfLLMV2(top_k=40, dense_len=1))),
    "importance-rank": ("`importance` has shape", lambda: SMALL(QUERY, KEY, importance=IMPORTANCE[0])),
    "importance-heads": (r"`importance` has shape \(1, 1, 20\)", lambda: SMALL(QUERY, KEY, importance=IMPORTANCE[:, :1])),
    "importance-dtype": ("`importance` has dtype int32", lambda: SMALL(QUERY, KEY, importance=IMPORTANCE.astype(int))),
    "key": ("`key` has shape", lambda: SMALL(QUERY, KEY[0], importance=IMPORTANCE)),
    "is-causal": ("`is_causal` is 1", lambda: SMALL(QUERY, KEY, importance=IMPORTANCE, is_causal=1)),
    "q-offset": ("`q_offset` is 0.5", lambda: SMALL(QUERY, KEY, importance=IMPORTANCE, q_offset=0.5)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_by_name(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
