"""Training a causal model with a selector that later tokens influence warns; nothing else does."""

import dataclasses
import warnings
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax.selectors import Dense


@dataclasses.dataclass(frozen=True)
class Unsafe(Dense):
    """As a selector of whole query blocks says of itself."""

    causal_safe: ClassVar[bool] = False


QUERY = jnp.ones((1, 8, 2, 4))


def loss(query, selector, is_causal):
    return sa.sparse_attention(query, query, query, selector, is_causal=is_causal).sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_training_with_an_unsafe_selector_warns(wrap):
    with pytest.warns(UserWarning, match="Unsafe is not causal-safe"):
        jax.grad(wrap(lambda query: loss(query, Unsafe(4), True)))(QUERY)


def test_training_a_layer_with_an_unsafe_selector_warns():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            layer = sa.flax.linen.SparseSelfAttention(num_heads=2, selector=Unsafe(4), is_causal=True)
            return layer(inputs).sum()

    model, inputs = Model(), jnp.ones((1, 8, 8))
    parameters = model.init(jax.random.key(0), inputs)
    with pytest.warns(UserWarning, match="Unsafe is not causal-safe"):
        jax.grad(model.apply)(parameters, inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: loss(QUERY, Unsafe(4), True),
        lambda: jax.jit(loss, static_argnums=(1, 2))(QUERY, Unsafe(4), True),
        lambda: jax.grad(loss)(QUERY, Unsafe(4), False),
        lambda: jax.grad(loss)(QUERY, Dense(4), True),
        lambda: jax.grad(loss)(QUERY, lambda *args, **options: Dense(4)(*args, **options), True),
    ],
    ids=["forward", "forward under jit", "not causal", "safe", "unknown"],
)
def test_nothing_else_warns(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
