"""The linen module: initialise, one gradient, then a prompt and a token through the decode cache."""

import jax
import jax.numpy as jnp

import sparse_attn_jax as sa

selector = sa.selectors.InfLLMV2(top_k=4, block_size=16, num_sink_blocks=1, num_local_blocks=1)
options = dict(num_heads=4, num_kv_heads=2, selector=selector, is_causal=True, rotary_theta=10_000.0)
layer = sa.flax.linen.SparseSelfAttention(**options)

inputs = jax.random.normal(jax.random.key(0), (2, 256, 64))  # [batch, length, features]
params = jax.jit(layer.init)(jax.random.key(1), inputs)["params"]
loss = jax.jit(jax.value_and_grad(lambda params: (layer.apply(dict(params=params), inputs) ** 2).mean()))
print("loss", loss(params)[0], "parameters", jax.tree.map(jnp.shape, params))

decoder = sa.flax.linen.SparseSelfAttention(**options, decode=True)
shapes = jax.eval_shape(decoder.init, jax.random.key(0), inputs)["cache"]  # room for 256 tokens
cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
step = jax.jit(lambda cache, x: decoder.apply(dict(params=params, cache=cache), x, mutable=["cache"]))
prompt_out, state = step(cache, inputs[:, :255])
token_out, state = step(state["cache"], inputs[:, 255:])
full = jax.jit(layer.apply)(dict(params=params), inputs)
print("decoding differs from the full pass by", jnp.abs(token_out - full[:, 255:]).max())
