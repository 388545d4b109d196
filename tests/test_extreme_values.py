"""Argument values at the edge of their types: nothing wraps around, nothing is read outside, dtypes may mix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa

INT_MAX, INT_MIN = np.iinfo(np.int32).max, np.iinfo(np.int32).min


def arguments(q_len=40, kv_len=48):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, n, h, 8)), "float32") for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2))
    )
    indices = jnp.asarray(rng.integers(0, 6, (1, 2, q_len, 4)), jnp.int32)
    return query, key, value, sa.BlockSelection(indices, q_block_size=1, kv_block_size=8)


@pytest.mark.parametrize("q_offset", [None, -3, 0])
def test_window_of_the_largest_int_is_no_window(q_offset):
    widest = jnp.full(4, INT_MAX, jnp.int32)
    expected = sa.block_sparse_attention(*arguments(), q_offset=q_offset)
    found = sa.block_sparse_attention(*arguments(), local_window_size=(widest, widest), q_offset=q_offset)
    np.testing.assert_array_equal(found, expected)


def test_far_offsets_see_everything_or_nothing():
    offsets = jnp.asarray([INT_MAX, INT_MIN], jnp.int32)
    everything = sa.block_sparse_attention(*arguments())
    out, lse = sa.block_sparse_attention(*arguments(), is_causal=True, q_offset=offsets, return_residual=True)
    np.testing.assert_allclose(out[0], everything[0], rtol=1e-6, atol=1e-6)
    assert not out[1].any() and jnp.isneginf(lse[1]).all()


@pytest.mark.parametrize("num_sinks", [INT_MAX, INT_MIN])
def test_extreme_sinks(num_sinks):
    window = dict(local_window_size=(2, 0), is_causal=True)
    found = sa.block_sparse_attention(*arguments(), num_sinks=jnp.full(4, num_sinks, jnp.int32), **window)
    expected = dict(is_causal=True) if num_sinks == INT_MAX else window
    np.testing.assert_allclose(found, sa.block_sparse_attention(*arguments(), **expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_key_bias_of_another_dtype(bias_dtype):
    with jax.enable_x64(True):
        query, key, value, selection = arguments()
        bias = jnp.asarray(np.random.default_rng(1).integers(-2, 3, (2, 2, 48)), bias_dtype)

        def loss(bias):
            return sa.block_sparse_attention(query, key, value, selection, key_bias=bias).sum()

        gradient = jax.grad(loss)(bias)
        assert gradient.dtype == bias.dtype
        out = sa.block_sparse_attention(query, key, value, selection, key_bias=bias)
        assert out.dtype == jnp.float32
        same = sa.block_sparse_attention(query, key, value, selection, key_bias=bias.astype("float32"))
        np.testing.assert_array_equal(out, same)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 16), (5, 0)])
def test_no_queries_or_no_keys(q_len, kv_len):
    query, key = jnp.ones((1, q_len, 2, 8)), jnp.ones((1, kv_len, 2, 8))
    selection = sa.BlockSelection(jnp.zeros((1, 1, q_len, 1), jnp.int32), q_block_size=1, kv_block_size=8)
    out, lse = sa.block_sparse_attention(query, key, key, selection, return_residual=True)
    assert out.shape == query.shape and not out.any()
    assert lse.shape == (1, q_len, 2) and jnp.isneginf(lse).all()
