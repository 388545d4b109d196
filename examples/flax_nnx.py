"""The nnx module: make, one gradient, then a prompt and a token through the decode cache."""

import jax
import jax.numpy as jnp
from flax import nnx

import sparse_attn_jax as sa

selector = sa.selectors.InfLLMV2(top_k=4, block_size=16, num_sink_blocks=1, num_local_blocks=1)
options = dict(num_kv_heads=2, selector=selector, is_causal=True, rotary_theta=10_000.0)
layer = sa.flax.nnx.SparseSelfAttention(num_heads=4, in_features=64, **options, rngs=nnx.Rngs(0))

inputs = jax.random.normal(jax.random.key(0), (2, 256, 64))  # [batch, length, features]
loss = nnx.jit(nnx.value_and_grad(lambda layer: (layer(inputs) ** 2).mean()))
print("loss", loss(layer)[0], "parameters", jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer, nnx.Param))))

full = nnx.jit(lambda layer, x: layer(x))(layer, inputs)
layer.init_cache(batch=2, max_len=256)
step = nnx.jit(lambda layer, x: layer(x, decode=True))
prompt_out = step(layer, inputs[:, :255])
token_out = step(layer, inputs[:, 255:])
print("decoding differs from the full pass by", jnp.abs(token_out - full[:, 255:]).max())
