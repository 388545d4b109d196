"""A selector: every query reads the 8 blocks of keys that suit it best, chosen by the data, and trains through them."""

import jax

import sparse_attn_jax as sa

key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(key_q, (1, 4096, 8, 64))  # [batch, q_len, num_q_heads, head_dim]
key = jax.random.normal(key_k, (1, 4096, 2, 64))  # [batch, kv_len, num_kv_heads, head_dim]
value = jax.random.normal(key_v, (1, 4096, 2, 64))

selector = sa.selectors.InfLLMV2(top_k=8, block_size=64, num_sink_blocks=1, num_local_blocks=2)
print("blocks of the last query, KV head 0:", selector(query, key, is_causal=True).indices[0, 0, -1])


@jax.jit
def loss(query, key, value):
    return (sa.sparse_attention(query, key, value, selector, is_causal=True) ** 2).mean()


print("loss", loss(query, key, value))
print("gradients", [g.shape for g in jax.grad(loss, argnums=(0, 1, 2))(query, key, value)])
