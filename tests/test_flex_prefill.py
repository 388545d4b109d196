"""FlexPrefill against its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs

import sparse_attn_jax as sa
from sparse_attn_jax.selectors import flex_prefill
from sparse_attn_jax.selectors.flex_prefill import FlexPrefill
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import flex_prefill as definition
from sparse_attn_jax.testing.methods import probe

SMALL = FlexPrefill(gamma=0.6, tau=0.2, min_budget=9, block_size=8)
RULE = ("gamma", "tau", "min_budget", "max_budget", "block_size")


def inputs(q_len, kv_len, **options):
    """Keys that a block has in common, more so for some heads, so that both kinds of heads occur."""
    query, key = make_inputs(q_len, kv_len, **options)
    block_of = np.arange(kv_len) // 8
    shared = jax.random.normal(jax.random.key(9), (1, block_of[-1] + 1, *key.shape[2:]))[:, block_of]
    query = query * jnp.asarray([0.1, 0.4, 1.0])[: query.shape[2], None]
    return query, 0.3 * key + shared


def expected(selector, query, key, positions):
    return definition.block_mask(query, key, positions, **{name: getattr(selector, name) for name in RULE})


CASES = {
    "aligned": (SMALL, (43, 75), (32, 24)),
    "offset-by-row": (SMALL, (43, 75), (13, 29)),
    "past-the-keys": (SMALL, (43, 75), (60, 90)),
    "query-aware": (dataclasses.replace(SMALL, tau=1.0, gamma=0.8), (43, 75), None),
    "vertical-slash": (dataclasses.replace(SMALL, tau=0.0, gamma=0.95, min_budget=1, max_budget=17), (43, 75), None),
    "fewer-than-a-probe": (SMALL, (5, 75), None),
}


@pytest.mark.parametrize("name", CASES)
def test_flex_prefill_is_its_definition(name):
    selector, (q_len, kv_len), q_offset = CASES[name]
    query, key = inputs(q_len, kv_len, num_q_heads=3, num_kv_heads=1, batch=2)
    positions = probe.absolute_positions(q_offset, 2, q_len, kv_len)
    selection = selector(query, key, is_causal=True, q_offset=q_offset and jnp.asarray(q_offset))
    assert (selection.q_block_size, selection.kv_block_size, selection.predicate) == (8, 8, None)
    wanted, is_query_aware = expected(selector, query, key, positions)
    np.testing.assert_array_equal(selection.to_block_mask(kv_len), wanted)
    if name == "aligned":
        assert is_query_aware.any() and not is_query_aware.all()


def test_flex_prefill_of_all_the_mass_is_dense():
    query, key = inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    selection = dataclasses.replace(SMALL, gamma=1.0)(query, key, is_causal=True, q_offset=jnp.asarray([24, 32]))
    wanted = [np.tri(6, 10, 3, dtype=bool), np.tri(6, 10, 4, dtype=bool)]
    np.testing.assert_array_equal(np.asarray(selection.to_block_mask(75)), np.stack([wanted] * 3, axis=1))


@pytest.mark.parametrize("min_budget, dense_len", [(1, 16), (17, 24)])
def test_flex_prefill_is_dense_up_to_a_length(min_budget, dense_len):
    selector = dataclasses.replace(SMALL, min_budget=min_budget)
    shapes = []
    for q_len, kv_len in ((8, dense_len), (8, dense_len + 1), (1, 99)):
        call = lambda query, key: selector(query, key, is_causal=True)
        shapes.append(jax.eval_shape(call, *make_inputs(q_len, kv_len)).indices.shape)
    assert shapes[0] == (1, 1, 1, dense_len // 8) and shapes[2] == (1, 1, 1, 13)
    assert shapes[1] == (1, 4, 1, dense_len // 8 + 1)


def test_flex_prefill_attends_as_defined():
    query, key = inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    value = key[..., ::-1]
    attend = lambda *operands: sa.sparse_attention(*operands, SMALL, is_causal=True, q_offset=jnp.asarray([13, 29]))
    out = jax.jit(attend)(query, key, value)
    positions = probe.absolute_positions((13, 29), 2, 43, 75)
    blocks, _ = expected(SMALL, query, key, positions)
    mask = blocks.repeat(8, axis=2)[:, :, :43].repeat(8, axis=3)[..., :75]
    mask &= np.arange(75) <= positions[:, None, :, None]
    np.testing.assert_allclose(out, oracle.attention(mask, query, key, value)[0], atol=1e-5)


def test_jensen_shannon_of_zeros_is_a_number():
    rng = np.random.default_rng(0)
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in rng.random((2, 4, 6)) * (rng.random((2, 4, 6)) < 0.6))
    p[0], q[0] = np.eye(6)[0], np.eye(6)[1]
    q[1] = p[1]
    found = flex_prefill.root_jensen_shannon(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(found, [definition.divergence(*rows) for rows in zip(p, q, strict=True)], atol=3e-4)
    np.testing.assert_allclose(found[0], np.sqrt(np.log(2)), rtol=1e-6)


def test_flex_prefill_ignores_keys_that_no_query_sees():
    query, key = inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    options = dict(is_causal=True, q_offset=jnp.asarray([13, 10]))
    poisoned = SMALL(query, key.at[:, 56:].set(jnp.nan), **options)
    np.testing.assert_array_equal(poisoned.indices, SMALL(query, key, **options).indices)


def test_flex_prefill_under_jit_and_vmap_is_itself():
    query, key = inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    offsets = jnp.asarray([13, 29])
    selection = SMALL(query, key, is_causal=True, q_offset=offsets)
    select = lambda q, k, offset: SMALL(q[None], k[None], is_causal=True, q_offset=offset)
    mapped = jax.jit(jax.vmap(select))(query, key, offsets)
    np.testing.assert_array_equal(mapped.indices[:, 0], selection.indices)


def test_flex_prefill_is_frozen_hashable_and_not_causal_safe():
    assert hash(SMALL) == hash(dataclasses.replace(SMALL)) and not SMALL.causal_safe
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.block_size = 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gamma=1.5), r"`gamma` is 1.5; it must be a number in \[0, 1\]"),
        (dict(tau=-0.1), "`tau` is -0.1"),
        (dict(min_budget=0), "`min_budget` is 0; it must be an int of at least 1"),
        (dict(max_budget=511), "`max_budget` is 511; it must be an int of at least 512"),
        (dict(block_size=0), "`block_size` is 0"),
        (dict(scale="auto"), "`scale` is 'auto'"),
    ],
    ids=str,
)
def test_flex_prefill_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**options)


QUERY, KEY = make_inputs(4, 12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(is_causal=False), "`is_causal` is False; FlexPrefill is defined for causal attention only"),
        (dict(key=KEY[0]), "`key` has shape"),
        (dict(query=QUERY[:, :, :3]), "`query` has 3 heads"),
        (dict(q_offset=0.5), "`q_offset` is 0.5"),
    ],
    ids=["not-causal", "key-rank", "heads", "offset"],
)
def test_flex_prefill_refuses_calls(options, message):
    with pytest.raises(ValueError, match=message):
        SMALL(**(dict(query=QUERY, key=KEY, is_causal=True) | options))
