"""Sparse-linear attention against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.sparse_linear_attention import sparse_linear_attention
from sparse_attn_jax.testing.methods import sparse_linear as definition


def make_inputs(q_len, kv_len, num_q_heads=4, num_kv_heads=2, batch=2, seed=0):
    """Query and key of 8 channels, values of 6."""
    rng = np.random.default_rng(seed)
    query = 2 * rng.standard_normal((batch, q_len, num_q_heads, 8), np.float32)
    key, value = (rng.standard_normal((batch, kv_len, num_kv_heads, dim), np.float32) for dim in (8, 6))
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)


def make_projection(*shape):
    return jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.float32)


attend = functools.partial(sparse_linear_attention, implementation="xla", block_size=4)
RATIOS = dict(top_ratio=0.3, bottom_ratio=0.4)
CASES = {
    "marginal": (dict(**RATIOS), (30, 38, 4, 2)),
    "complement": (dict(**RATIOS, mode="complement", projection=make_projection(6, 6)), (38, 38, 3, 1)),
    "all, elu": (dict(**RATIOS, mode="all", feature_map="elu", projection=make_projection(2, 6, 6)), (21, 38, 2, 2)),
    "relu": (dict(**RATIOS, feature_map="relu", scale=0.2), (21, 38, 2, 2)),
    "nothing marginal": (dict(top_ratio=0.5, bottom_ratio=0.5), (9, 16, 2, 2)),
    "at least one critical": (dict(top_ratio=0.0, bottom_ratio=1.0), (5, 13, 2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_sparse_linear_attention_is_its_definition(name):
    options, sizes = CASES[name]
    operands = make_inputs(*sizes)
    found = jax.jit(functools.partial(attend, **options))(*operands)
    wanted = definition.attention(*operands, block_size=4, **dict(RATIOS) | options)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert found.dtype == jnp.float32


def test_modes_and_feature_maps_differ():
    """Else the definition would say nothing of them."""
    operands = make_inputs(21, 38, 2, 2)
    outs = [
        definition.attention(*operands, block_size=4, **RATIOS, mode=mode, feature_map=feature_map)
        for mode, feature_map in (
            ("marginal", "softmax"),
            ("complement", "softmax"),
            ("all", "softmax"),
            ("all", "elu"),
            ("all", "relu"),
        )
    ]
    for i, out in enumerate(outs):
        assert all(np.abs(out - other).max() > 0.05 for other in outs[:i])


def test_gradients_are_those_of_finite_differences():
    options = dict(**RATIOS, block_size=4, feature_map="softmax")
    operands = (*make_inputs(9, 22, 2, 1, batch=1), make_projection(2, 6, 6))
    weights = np.random.default_rng(1).standard_normal((1, 9, 2, 6))

    def loss(query, key, value, projection):
        out = sparse_linear_attention(query, key, value, projection=projection, implementation="xla", **options)
        return (out * weights).sum()

    def wanted_loss(query, key, value, projection):
        return (definition.attention(query, key, value, projection=projection, **options) * weights).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*operands)
    operands = [np.asarray(x, np.float64) for x in operands]
    kinds = functools.partial(definition.classify, **RATIOS, block_size=4)
    for n, gradient in enumerate(gradients):
        direction = np.random.default_rng(n).standard_normal(gradient.shape)
        ends = [[x + step * direction if i == n else x for i, x in enumerate(operands)] for step in (1e-5, -1e-5)]
        # The blocks are the same on both sides: their choice has no gradient.
        np.testing.assert_array_equal(kinds(*ends[0][:2]), kinds(*ends[1][:2]))
        wanted = (wanted_loss(*ends[0]) - wanted_loss(*ends[1])) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), wanted, rtol=1e-3, atol=1e-3)


def test_no_gradient_is_nan_where_linear_attention_sees_nothing():
    query, key, value = make_inputs(6, 8, 2, 2)
    # No channel in common with any key.
    query, key = -jnp.abs(query), jnp.abs(key)
    loss = lambda *operands: attend(*operands, **RATIOS, feature_map="relu").sum()
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    assert all(np.isfinite(x).all() for x in gradients)


def test_16_bit_inputs():
    operands = [x.astype(jnp.bfloat16) for x in make_inputs(9, 22, 2, 1)]
    found = jax.jit(functools.partial(attend, **RATIOS))(*operands)
    assert found.dtype == jnp.bfloat16
    wanted = definition.attention(*(np.asarray(x, np.float64) for x in operands), **RATIOS, block_size=4)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=0.05)


@pytest.mark.parametrize("q_len, kv_len", [(0, 8), (3, 0)])
def test_empty_arrays(q_len, kv_len):
    out = attend(*make_inputs(q_len, kv_len, 2, 1))
    assert out.shape == (2, q_len, 2, 6) and not np.asarray(out).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_ratio=1.5), "`top_ratio` is 1.5"),
        (dict(bottom_ratio=-1), "`bottom_ratio` is -1"),
        (dict(mode="none"), "`mode` is 'none'; it must be one of 'marginal', 'complement', 'all'"),
        (dict(feature_map="exp"), "`feature_map` is 'exp'; it must be one of 'softmax', 'elu', 'relu'"),
        (dict(block_size=0), "`block_size` is 0"),
        (dict(projection=jnp.zeros((6, 8))), r"`projection` has shape \(6, 8\); it must be \(6, 6\) or \(4, 6, 6\)"),
        (dict(projection=jnp.zeros((2, 6, 6))), r"`projection` has shape \(2, 6, 6\)"),
        (dict(query=jnp.zeros((2, 4, 3, 8))), "`query` is .*a multiple of 2 heads"),
        (dict(value=jnp.zeros((2, 4, 2))), "`value`"),
        (dict(key=jnp.zeros((2, 4, 2, 7))), "`key`"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_it_refuses(options, message):
    operands = dict(zip(("query", "key", "value"), make_inputs(4, 4)))
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(**operands | options)
