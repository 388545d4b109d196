"""XAttention against its definition, and the selection by mass that it shares with others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs

import sparse_attn_jax as sa
from sparse_attn_jax.selectors import pooling, x_attention
from sparse_attn_jax.selectors.x_attention import XAttention
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import probe
from sparse_attn_jax.testing.methods import x_attention as definition

SMALL = XAttention(stride=4, threshold=0.7, block_size=8)


def expected_mask(selector, query, key, positions, is_causal):
    sizes = dict(block_size=selector.block_size, is_causal=is_causal)
    scores = definition.scores(query, key, positions, stride=selector.stride, scale=selector.scale, **sizes)
    thresholds = np.broadcast_to(selector.threshold, (query.shape[2],))
    return definition.block_mask(scores, positions, thresholds=thresholds, kv_len=key.shape[1], **sizes)


CASES = {
    "aligned": (SMALL, (43, 75), (32, 24), True),
    "offset-by-row": (SMALL, (43, 75), (0, 37), True),
    "before-the-keys": (SMALL, (43, 75), (-20, -50), True),
    "past-the-keys": (SMALL, (43, 75), (60, 90), True),
    "full": (SMALL, (43, 75), None, False),
    "one-query-and-less-than-a-stride": (SMALL, (1, 3), None, True),
    "block-plus-1": (SMALL, (9, 9), None, True),
    "by-head": (dataclasses.replace(SMALL, threshold=(0.0, 0.5, 1.0), scale=0.1), (43, 75), None, True),
    "by-head-full": (dataclasses.replace(SMALL, threshold=(0.3, 0.9, 1.0)), (43, 75), None, False),
    "stride-is-block": (dataclasses.replace(SMALL, stride=8), (43, 75), None, True),
    "stride-1": (dataclasses.replace(SMALL, stride=1), (43, 75), None, True),
}


@pytest.mark.parametrize("name", CASES)
def test_x_attention_is_its_definition(name):
    selector, (q_len, kv_len), q_offset, is_causal = CASES[name]
    query, key = make_inputs(q_len, kv_len, num_q_heads=3, num_kv_heads=1, batch=2)
    positions = probe.absolute_positions(q_offset, 2, q_len, kv_len)
    selection = selector(query, key, is_causal=is_causal, q_offset=q_offset and jnp.asarray(q_offset))
    assert (selection.q_block_size, selection.kv_block_size, selection.predicate) == (8, 8, None)
    wanted = expected_mask(selector, query, key, positions, is_causal)
    np.testing.assert_array_equal(selection.to_block_mask(kv_len), wanted)
    lists = np.asarray(selection.indices)
    assert (np.sort(np.where(lists < 0, 99, lists), axis=-1) == np.where(lists < 0, 99, lists)).all()


def test_x_attention_scores_do_not_depend_on_how_the_work_is_divided(monkeypatch):
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    positions = probe.absolute_positions(None, 2, 43, 75)
    wanted = definition.scores(query, key, positions, stride=4, block_size=8, is_causal=True)
    monkeypatch.setattr(x_attention, "CHUNK_ELEMENTS", 4 * 2 * 3 * 2 * 19)  # 4 of the 6 blocks, then 2
    scores = x_attention.antidiagonal_scores(SMALL, query, key, None, is_causal=True)
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_x_attention_keeps_a_share_of_each_row():
    """Four heads of the same query, with thresholds that rise."""
    query, key = make_inputs(64, 64, num_q_heads=1, num_kv_heads=1)
    thresholds = (0.0, 0.4, 0.8, 1.0)
    selection = dataclasses.replace(SMALL, threshold=thresholds)(query.repeat(4, axis=2), key, is_causal=True)
    masks = np.asarray(selection.to_block_mask(64))[0]
    scores = definition.scores(query, key, np.arange(64)[None], stride=4, block_size=8, is_causal=True)[0, 0]
    for mask, threshold in zip(masks, thresholds, strict=True):
        assert ((scores * mask).sum(-1) >= threshold * scores.sum(-1) - 1e-5).all()
    np.testing.assert_array_equal(masks[0], np.eye(8, dtype=bool) | (np.arange(8) == 0))
    assert (masks[:-1] <= masks[1:]).all()
    np.testing.assert_array_equal(masks[3], np.tri(8, dtype=bool))


def test_x_attention_attends_as_defined():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    value = key[..., ::-1]
    positions = probe.absolute_positions((0, 37), 2, 43, 75)
    attend = lambda *operands: sa.sparse_attention(*operands, SMALL, is_causal=True, q_offset=jnp.asarray([0, 37]))
    out = jax.jit(attend)(query, key, value)
    blocks = expected_mask(SMALL, query, key, positions, True)
    mask = blocks.repeat(8, axis=2)[:, :, :43].repeat(8, axis=3)[..., :75]
    mask &= np.arange(75) <= positions[:, None, :, None]
    np.testing.assert_allclose(out, oracle.attention(mask, query, key, value)[0], atol=1e-5)


def test_x_attention_ignores_keys_that_no_query_sees():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    options = dict(is_causal=True, q_offset=jnp.asarray([20, 12]))  # to 62 and to 54
    lists = SMALL(query, key, **options).indices
    poisoned = SMALL(query, key.at[:, 64:].set(jnp.nan), **options).indices
    np.testing.assert_array_equal(poisoned, lists)
    # In a stride that some query sees a part of, NaN is no mass, and the block is still the queries' own.
    poisoned = SMALL(query, key.at[:, 63:].set(jnp.nan), **options).indices
    assert (poisoned[0, :, -1] == 7).any(axis=-1).all() and (poisoned[1] == lists[1]).all()


def test_x_attention_under_jit_and_vmap_is_itself():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    offsets = jnp.asarray([0, 37])
    selection = SMALL(query, key, is_causal=True, q_offset=offsets)
    select = lambda q, k, offset: SMALL(q[None], k[None], is_causal=True, q_offset=offset)
    mapped = jax.jit(jax.vmap(select))(query, key, offsets)
    np.testing.assert_array_equal(mapped.indices[:, 0], selection.indices)


def test_x_attention_is_frozen_hashable_and_not_causal_safe():
    assert hash(SMALL) == hash(dataclasses.replace(SMALL)) and not SMALL.causal_safe
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.block_size = 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stride=0), "`stride` is 0; it must be an int of at least 1"),
        (dict(threshold=1.1), r"`threshold` is 1.1; it must be a number in \[0, 1\]"),
        (dict(threshold=()), r"`threshold` is \(\)"),
        (dict(threshold=[0.5]), r"`threshold` is \[0.5\]"),
        (dict(threshold=(0.5, -0.1)), r"`threshold\[1\]` is -0.1"),
        (dict(block_size=0), "`block_size` is 0"),
        (dict(block_size=12), "`block_size` is 12; it must be a multiple of `stride`, 8"),
        (dict(scale=True), "`scale` is True"),
    ],
    ids=str,
)
def test_x_attention_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        XAttention(**options)


QUERY, KEY = make_inputs(4, 12)


@pytest.mark.parametrize(
    "selector, options, message",
    [
        (dataclasses.replace(SMALL, threshold=(0.5, 0.6)), {}, "`threshold` has 2 entries; the call has 4 query heads"),
        (SMALL, dict(is_causal=1), "`is_causal` is 1"),
        (SMALL, dict(key=KEY.astype(int)), "`key` has dtype"),
        (SMALL, dict(query=QUERY[..., :3]), "`query` has head_dim 3"),
        (SMALL, dict(q_offset=0.5), "`q_offset` is 0.5"),
    ],
    ids=["thresholds", "is-causal", "key-dtype", "head-dim", "offset"],
)
def test_x_attention_refuses_calls(selector, options, message):
    with pytest.raises(ValueError, match=message):
        selector(**(dict(query=QUERY, key=KEY, is_causal=True) | options))


MASS = jnp.asarray([0.1, 0.4, 0.0, 0.3, 0.1, 0.1])


@pytest.mark.parametrize(
    "rule, threshold, wanted",
    [
        ("exclusive", 0.0, []),
        ("exclusive", 0.1, [1]),
        ("exclusive", 0.65, [1, 3]),
        ("exclusive", 0.75, [0, 1, 3]),
        ("exclusive", 1.0, [0, 1, 2, 3, 4, 5]),
        ("inclusive", 0.35, []),
        ("inclusive", 0.65, [1]),
        ("inclusive", 0.75, [1, 3]),
        ("inclusive", 0.85, [0, 1, 3]),
        ("inclusive", 1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_cumulative_mass_follows_its_rule(rule, threshold, wanted):
    mask = pooling.cumulative_mass_mask(MASS, threshold, rule, True)
    assert np.flatnonzero(mask).tolist() == wanted


def test_cumulative_mass_that_meets_the_share_exactly():
    mass = jnp.asarray([0.25, 0.5, 0.25])
    for rule, threshold, wanted in (("exclusive", 0.5, [1]), ("inclusive", 0.5, [1]), ("exclusive", 0.75, [0, 1])):
        assert np.flatnonzero(pooling.cumulative_mass_mask(mass, threshold, rule, True)).tolist() == wanted


def test_cover_count_is_the_fewest_that_hold_more_than_the_share():
    assert [int(pooling.cover_count(MASS, share)[0]) for share in (0.0, 0.35, 0.65, 0.75, 1.0)] == [1, 1, 2, 3, 7]


def test_masked_softmax_counts_nan_as_masked():
    logits = jnp.asarray([[1.0, jnp.nan, 2.0, 9.0], [jnp.nan, -jnp.inf, jnp.nan, 9.0]])
    weights = pooling.masked_softmax(logits, jnp.arange(4) < 3)
    np.testing.assert_allclose(weights, [[1 / (1 + np.e), 0, np.e / (1 + np.e), 0], [0] * 4], atol=1e-6)


def test_cumulative_mass_takes_forced_entries_first_and_others_never():
    allowed = jnp.arange(6) != 1
    mask = pooling.cumulative_mass_mask(MASS.at[0].set(jnp.nan), 0.45, "exclusive", allowed, jnp.arange(6) == 4)
    assert np.flatnonzero(mask).tolist() == [3, 4]  # 0.1, then 0.3, of 0.5
    thresholds = jnp.asarray([[0.0], [0.7], [1.0]])
    rows = pooling.cumulative_mass_mask(jnp.stack([MASS] * 3), thresholds, "inclusive", allowed)
    assert [np.flatnonzero(row).tolist() for row in rows] == [[], [0, 3], [0, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="`rule` is 'half'"):
        pooling.cumulative_mass_mask(MASS, 0.5, "half", True)


def test_top_k_marks_the_forced_and_the_highest_the_lower_id_first():
    scores = jnp.asarray([[1.0, 3.0, 3.0, jnp.nan, 3.0, -jnp.inf]])
    marked = lambda *args: np.flatnonzero(pooling.top_k_mask(scores, *args)).tolist()
    assert marked(2, True) == [1, 2]
    assert marked(jnp.asarray([[9]]), True) == [0, 1, 2, 4]
    assert marked(0, True) == []
    assert marked(2, jnp.arange(6) != 1) == [2, 4]
    assert marked(2, True, jnp.arange(6) == 3) == [1, 3]
    assert marked(1, True, jnp.arange(6) >= 4) == [4, 5]
