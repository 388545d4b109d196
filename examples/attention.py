"""The op: attention of each block of queries over the blocks of keys listed for it, and its gradient."""

import jax
import jax.numpy as jnp

import sparse_attn_jax as sa

key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(key_q, (1, 1024, 8, 64))  # [batch, q_len, num_q_heads, head_dim]
key = jax.random.normal(key_k, (1, 1024, 2, 64))  # [batch, kv_len, num_kv_heads, head_dim]
value = jax.random.normal(key_v, (1, 1024, 2, 64))

# Each of the 16 query blocks reads the first block, the one before it and its own: 3 of 16.
own = jnp.arange(16)
indices = jnp.stack([0 * own, own - 1, own], axis=-1)[None, None]  # [batch, heads, num_q_blocks, num_slots]; -1 is empty
selection = sa.BlockSelection(indices, q_block_size=64, kv_block_size=64)

attend = jax.jit(lambda q, k, v: sa.block_sparse_attention(q, k, v, selection, is_causal=True))
gradients = jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), argnums=(0, 1, 2))(query, key, value)
print("out", attend(query, key, value).shape, "gradients", [g.shape for g in gradients])
print(f"blocks read: {float(selection.density(1024)):.0%}")
