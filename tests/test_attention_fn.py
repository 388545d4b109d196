"""`attention_fn` inside the attention modules that Flax has itself."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparse_attn_jax as sa

SELECTOR = sa.selectors.InfLLMV2(top_k=2, block_size=16, kernel_size=8, kernel_stride=4, num_local_blocks=1, coarse_lse=False)
FEATURES = 32


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def linen_module(attention_fn, **options):
    return nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn, **options)


def nnx_module(attention_fn, **options):
    options = dict(num_kv_heads=2, decode=False) | options
    return nnx.MultiHeadAttention(4, FEATURES, attention_fn=attention_fn, rngs=nnx.Rngs(0), **options)


def test_linen_module_equals_our_own():
    inputs = random(2, 63, FEATURES)
    module = linen_module(sa.flax.attention_fn(SELECTOR, is_causal=True))
    own = sa.flax.linen.SparseSelfAttention(4, selector=SELECTOR, is_causal=True)
    params = jax.jit(own.init)(jax.random.key(0), inputs)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(module.init, jax.random.key(0), inputs))
    np.testing.assert_allclose(jax.jit(module.apply)(params, inputs), jax.jit(own.apply)(params, inputs), atol=1e-6)


def test_nnx_module_equals_our_own():
    inputs = random(2, 63, FEATURES)
    # Causal by the module's keyword, not by ours.
    module = nnx_module(sa.flax.attention_fn(SELECTOR))
    options = dict(selector=SELECTOR, is_causal=True, num_kv_heads=2)
    own = sa.flax.nnx.SparseSelfAttention(4, FEATURES, **options, rngs=nnx.Rngs(1))
    nnx.update(own, nnx.state(module, nnx.Param))
    out = nnx.jit(lambda module, x: module(x, is_causal=True))(module, inputs)
    np.testing.assert_allclose(out, nnx.jit(lambda module, x: module(x))(own, inputs), atol=1e-6)


def test_dense_selector_equals_flax():
    """With every block selected the result is that of Flax's own attention, causal by option, by keyword and by both."""
    inputs = random(2, 40, FEATURES)
    expected = nnx_module(nnx.dot_product_attention)(inputs, is_causal=True)
    for by_option, by_keyword in ((True, False), (False, True), (True, True)):
        module = nnx_module(sa.flax.attention_fn(is_causal=by_option))
        np.testing.assert_allclose(module(inputs, is_causal=by_keyword), expected, atol=1e-5)
    uncausal = nnx_module(sa.flax.attention_fn())(inputs)
    np.testing.assert_allclose(uncausal, nnx_module(nnx.dot_product_attention)(inputs), atol=1e-5)
    assert jnp.abs(uncausal - expected).max() > 1e-2


def test_options_reach_the_op():
    query, key, value = (random(1, 32, 4, 8, seed=i) for i in range(3))
    options = dict(local_window_size=(9, 0), num_sinks=(0, 1, 2, 3), logits_soft_cap=1.5, scale=0.7)
    out = sa.flax.attention_fn(SELECTOR, is_causal=True, **options)(query, key, value)
    options["num_sinks"] = jnp.arange(4)
    np.testing.assert_array_equal(out, sa.sparse_attention(query, key, value, SELECTOR, is_causal=True, **options))
    with pytest.raises(NotImplementedError, match="mosaic"):
        sa.flax.attention_fn(SELECTOR, implementation="mosaic")(query, key, value)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_any_number_of_leading_dimensions(leading):
    query, key, value = random(*leading, 20, 4, 8), random(*leading, 20, 2, 8, seed=1), random(*leading, 20, 2, 5, seed=2)
    out = sa.flax.attention_fn(SELECTOR)(query, key, value)
    assert out.shape == (*leading, 20, 4, 5)
    flat = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    np.testing.assert_array_equal(out.reshape(-1, 20, 4, 5), sa.sparse_attention(*flat, SELECTOR))


def test_dtype_is_promoted_as_in_flax():
    query, key, value = random(1, 20, 4, 8), random(1, 20, 4, 8).astype(jnp.bfloat16), random(1, 20, 4, 8)
    attend = sa.flax.attention_fn(SELECTOR)
    assert attend(query, key, value).dtype == jnp.float32
    assert attend(query, key, value, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_causal_cross_attention_needs_an_offset():
    query, key, value = random(1, 10, 4, 8), random(1, 20, 4, 8), random(1, 20, 4, 8, seed=1)
    with pytest.raises(ValueError, match="`q_offset`"):
        sa.flax.attention_fn(is_causal=True)(query, key, value)
    top_left = sa.flax.attention_fn(is_causal=True, q_offset=0)(query, key, value)
    np.testing.assert_allclose(top_left, jax.nn.dot_product_attention(query, key, value, is_causal=True), atol=1e-5)
    uncausal = sa.flax.attention_fn()(query, key, value)
    np.testing.assert_allclose(uncausal, jax.nn.dot_product_attention(query, key, value), atol=1e-5)


def test_linen_module_refuses_what_it_cannot_honour():
    inputs = random(2, 32, FEATURES)
    attend = sa.flax.attention_fn(SELECTOR, is_causal=True)
    run = lambda module, **options: module.init_with_output(dict(params=jax.random.key(0)), inputs, **options)
    with pytest.raises(ValueError, match="`mask`.*SparseSelfAttention"):
        run(linen_module(attend), mask=nn.make_causal_mask(inputs[..., 0]))
    with pytest.raises(ValueError, match="`module`"):
        run(linen_module(attend), sow_weights=True)
    with pytest.raises(ValueError, match="`precision`"):
        run(linen_module(attend, precision=jax.lax.Precision.HIGHEST))
    dropout = linen_module(attend, dropout_rate=0.5)
    with pytest.raises(ValueError, match="`dropout_rate` is 0.5"):
        run(dropout, deterministic=False, dropout_rng=jax.random.key(1))
    run(dropout, deterministic=True)
    einsums = dict(qk_attn_weights_einsum_cls=lambda: jnp.einsum, attn_weights_value_einsum_cls=lambda: jnp.einsum)
    with pytest.raises(ValueError, match="`qk_attn_weights_einsum`"):
        run(linen_module(attend, **einsums))


def test_linen_decode_is_refused():
    module = linen_module(sa.flax.attention_fn(SELECTOR, is_causal=True), decode=True)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 16, FEATURES)))
    with pytest.raises(ValueError, match="`mask`.*SparseSelfAttention"):
        module.apply(variables, jnp.zeros((1, 1, FEATURES)), mutable=["cache"])


def test_nnx_module_refuses_what_it_cannot_honour():
    inputs = random(2, 32, FEATURES)
    attend = sa.flax.attention_fn(SELECTOR)
    with pytest.raises(ValueError, match="`mask`.*SparseSelfAttention"):
        nnx_module(attend)(inputs, mask=jnp.ones((2, 1, 32, 32), bool))
    with pytest.raises(ValueError, match="`module`"):
        nnx_module(attend)(inputs, sow_weights=True)
    with pytest.raises(ValueError, match="`dropout_rate` is 0.5"):
        nnx_module(attend, dropout_rate=0.5, deterministic=False)(inputs)
    nnx_module(attend, dropout_rate=0.5, deterministic=True)(inputs)
    module = nnx_module(attend, decode=True)
    module.init_cache((2, 16, FEATURES))
    with pytest.raises(ValueError, match="`mask`.*SparseSelfAttention"):
        module(inputs[:, :1])


REFUSED = ("bias", "einsum_dot_general", "attn_weights_value_einsum", "promote_dtype", "input_positions", "something_new")


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_every_other_keyword(name):
    query = random(1, 20, 4, 8)
    with pytest.raises(ValueError, match=f"`{name}`"):
        sa.flax.attention_fn(SELECTOR)(query, query, query, **{name: jnp.ones(3)})
    sa.flax.attention_fn(SELECTOR)(query, query, query, **{name: None})


def test_bad_arguments():
    query = random(1, 20, 4, 8)
    with pytest.raises(ValueError, match="`selector` is 3"):
        sa.flax.attention_fn(3)
    with pytest.raises(ValueError, match="`is_causal` is 1"):
        sa.flax.attention_fn(SELECTOR, is_causal=1)
    with pytest.raises(TypeError, match="dropout_rate"):
        sa.flax.attention_fn(SELECTOR, dropout_rate=0.5)
    with pytest.raises(ValueError, match="`query`"):
        sa.flax.attention_fn(SELECTOR)(query[0, 0], query, query)
    with pytest.raises(ValueError, match="`key`.*leading"):
        sa.flax.attention_fn(SELECTOR)(query, query[0], query)


def test_equal_arguments_make_equal_functions():
    """Modules made alike have equal static parts, so that they share compiled code."""
    make = functools.partial(sa.flax.attention_fn, SELECTOR, num_sinks=jnp.arange(4), local_window_size=8)
    assert make() == make() and hash(make()) == hash(make())
    assert make() != make(is_causal=True)
    assert nnx.graphdef(nnx_module(make())) == nnx.graphdef(nnx_module(make()))
