"""Flax modules of sparse attention, and a function for the attention modules that Flax has itself.

`linen.SparseSelfAttention` and `nnx.SparseSelfAttention` are the same layer: same arguments, same parameter names and shapes,
same result. `attention_fn(selector)` goes into `MultiHeadDotProductAttention` (linen) and `MultiHeadAttention` (nnx).
"""

from sparse_attn_jax.flax import linen as linen
from sparse_attn_jax.flax import nnx as nnx
from sparse_attn_jax.flax.attention_fn import attention_fn as attention_fn
