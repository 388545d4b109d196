"""`AShape` and `TriShape` against their definition."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from static_patterns import assert_no_list_repeats, assert_same_in_chunks, select, shapes_of

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.a_shape import AShape, TriShape
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import a_shape as definition


def assert_is_definition(selector, q_len, kv_len, q_offset=None, **wanted):
    selection, found = select(selector, q_len, kv_len, q_offset=q_offset, batch=2)
    assert_no_list_repeats(selection, kv_len)
    offsets = np.broadcast_to(kv_len - q_len if q_offset is None else q_offset, (2,))
    sizes = dict(num_initial=selector.num_initial, num_local=selector.num_local, num_last=getattr(selector, "num_last", 0))
    expected = definition.mask(offsets, q_len, kv_len, **(sizes | wanted))
    np.testing.assert_array_equal(found, expected[:, None].repeat(4, axis=1))


SELECTORS = [AShape(3, 9, 8), AShape(0, 1, 8), TriShape(3, 9, 10, 8), TriShape(17, 8, 1, 8), TriShape(0, 1, 500, 8)]


@pytest.mark.parametrize("q_offset", [None, 21, -5, (0, 37)], ids=str)
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_mask_is_the_definition(selector, q_offset):
    assert_is_definition(selector, 43, 75, jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset)


@pytest.mark.parametrize("selector", SELECTORS[::2], ids=str)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (7, 7), (9, 9), (1, 20), (12, 8)], ids=str)
def test_edge_sizes(selector, q_len, kv_len):
    assert_is_definition(selector, q_len, kv_len)


@pytest.mark.parametrize("wanted", [dict(num_initial=4), dict(num_local=8), dict(num_last=11), dict(num_last=0)], ids=str)
def test_check_notices_another_shape(wanted):
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_is_definition(SELECTORS[2], 43, 75, **wanted)


def test_a_shape_is_the_same_in_chunks_and_decoding():
    assert_same_in_chunks(AShape(5, 20, 16), 100, (0, 1, 49, 99))


def test_attention_with_a_tri_shape_is_that_of_the_definition():
    query, key = (jax.random.normal(jax.random.key(length), (2, length, 2, 16)) for length in (40, 75))
    attend = functools.partial(sa.sparse_attention, selector=TriShape(3, 9, 10, 8), is_causal=True)
    expected, *_ = oracle.attention(definition.mask((35, 35), 40, 75, 3, 9, 10)[:, None].repeat(2, axis=1), query, key, key)
    np.testing.assert_allclose(jax.jit(attend)(query, key, key), expected, atol=1e-5)


def test_only_a_tri_shape_warns_when_it_is_trained_causally():
    assert AShape.causal_safe and not TriShape.causal_safe
    query, key = (jnp.zeros((1, 8, 2, 16)) for _ in range(2))

    def train(selector):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            attend = lambda query: sa.sparse_attention(query, key, key, selector, is_causal=True).sum()
            jax.eval_shape(jax.grad(attend), query)
        return any("not causal-safe" in str(warning.message) for warning in found)

    assert train(TriShape(1, 2, 1)) and not train(AShape(1, 2))


def test_tri_shape_takes_a_traced_offset_and_vmap():
    query, key = (jnp.zeros((2, length, 2, 16)) for length in (20, 40))
    offsets = jnp.array([3, 20])

    @jax.jit
    def choose(query, key, q_offset):
        return TriShape(2, 5, 4, 8)(query, key, is_causal=True, q_offset=q_offset)

    together, mapped = choose(query, key, offsets), jax.jit(jax.vmap(choose))(query[:, None], key[:, None], offsets)
    np.testing.assert_array_equal(mapped.indices[:, 0], together.indices)
    np.testing.assert_array_equal(mapped.predicate.first_dense[:, 0], [19, 36])
    assert together.predicate.first_dense.tolist() == [19, 36]


@pytest.mark.parametrize("shape", [AShape, TriShape])
@pytest.mark.parametrize("field, value", [("num_initial", -1), ("num_local", 0), ("num_last", 0), ("block_size", 0)])
def test_bad_field_is_refused_by_name(shape, field, value):
    if field == "num_last" and shape is AShape:
        return
    with pytest.raises(ValueError, match=f"`{field}`"):
        shape(**(dict(num_initial=1, num_local=1) | {field: value}))


@pytest.mark.parametrize("selector", [AShape(1, 2), TriShape(1, 2)], ids=["a", "tri"])
def test_bad_call_is_refused_by_name(selector):
    query, key = shapes_of(4, 4)
    with pytest.raises(ValueError, match="`is_causal` is False; the pattern of .*Shape looks back only"):
        selector(query, key)
    with pytest.raises(ValueError, match="`q_offset`"):
        selector(query, key, is_causal=True, q_offset=1.5)
