"""`grid_attention`: attention of MMInference's grid heads, over keys in an order that lets whole blocks be skipped."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_attn_jax import api, validation
from sparse_attn_jax.causal_safety import watch_training
from sparse_attn_jax.selectors.grid import Grid


def grid_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selector: Grid,
    *,
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention as `sparse_attention` with a `Grid` computes it, over fewer blocks.

    Each query head has its keys and values in an order of its own: those on its grid first, then the others. A block of queries
    then reads about kv_len / (stride * block_size) blocks, its local ones and the sinks, where in the original order a grid
    with a stride shorter than the block touches every block. Queries keep their order; positions are the original ones.

    Args:
      query: [batch, q_len, num_q_heads, head_dim].
      key: [batch, kv_len, num_kv_heads, head_dim].
      value: [batch, kv_len, num_kv_heads, value_head_dim].
      selector: a `Grid`; gives a warning once if this is differentiated, as it is not `causal_safe`.
      q_offset: position of query 0 among the keys, an int or an integer array [] or [batch]. Default: kv_len - q_len.
      scale, logits_soft_cap, return_residual, implementation: as in `block_sparse_attention`.

    Returns:
      As `block_sparse_attention`: out [batch, q_len, num_q_heads, value_head_dim]; with `return_residual`, (out, lse).

    Raises:
      ValueError: an argument that no implementation could accept.
      NotImplementedError: none of the implementations asked for can run this call.

    Differentiable in query, key and value. Holds the keys and values of every query head: num_q_heads / num_kv_heads times
    the memory of `key` and `value`.
    """
    validation.check_qkv(query, key, value)
    if not isinstance(selector, Grid):
        raise ValueError(f"`selector` is {selector!r}; it must be a Grid.")
    order, selection = selector.select_permuted(query, key, q_offset=q_offset)
    batch = jnp.arange(query.shape[0])[:, None, None]
    kv_head = jnp.arange(query.shape[2]) // (query.shape[2] // key.shape[2])
    key, value = (x[batch, order.swapaxes(1, 2), kv_head] for x in (key, value))  # [batch, kv_len, num_q_heads, ...]
    return api.block_sparse_attention(
        watch_training(query, selector, True),
        key,
        value,
        selection,
        q_offset=q_offset,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        return_residual=return_residual,
        implementation=implementation,
    )
