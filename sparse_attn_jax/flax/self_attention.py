"""What the linen and the nnx module do between their projections."""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax.api import block_sparse_attention
from sparse_attn_jax.causal_safety import watch_training
from sparse_attn_jax.flax.decode_cache import Cache, append_tokens, check_fit, drop_beyond, select_cached
from sparse_attn_jax.flax.options import AttentionConfig
from sparse_attn_jax.flax.rotary import apply_rotary
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.validation import is_array, require


def check_inputs(inputs: Any, segment_ids: Any, in_features: int | None = None) -> None:
    """Shape and dtype of the arguments of a call."""
    axes = "[batch, length, features]"
    require(is_array(inputs) and len(inputs.shape) == 3, "inputs", inputs, f"an array {axes}")
    require(jnp.issubdtype(inputs.dtype, jnp.floating), "inputs", inputs, "of a floating-point dtype")
    if in_features is not None:
        require(inputs.shape[-1] == in_features, "inputs", inputs, f"{axes} of {in_features} features")
    if segment_ids is not None:
        shape = inputs.shape[:2]
        needed = f"an integer array {list(shape)}, [batch, length] of `inputs`"
        require(is_array(segment_ids) and tuple(segment_ids.shape) == tuple(shape), "segment_ids", segment_ids, needed)
        require(jnp.issubdtype(segment_ids.dtype, jnp.integer), "segment_ids", segment_ids, needed)


def attend(
    config: AttentionConfig, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, BlockSelection]:
    """Attention of whole sequences.

    Args:
      config: the layer.
      query: [batch, length, num_heads, head_dim].
      key: [batch, length, num_kv_heads, head_dim].
      value: [batch, length, num_kv_heads, value_head_dim].
      segment_ids: integers [batch, length] or `None`.

    Returns:
      [batch, length, num_heads, value_head_dim], dtype of query, and what was selected.
    """
    query, key = _rotate(config, query, key, 0)
    selection = config.selector(query, key, is_causal=config.is_causal, q_offset=None)
    query = watch_training(query, config.selector, config.is_causal)
    segments = dict(query_segment_ids=segment_ids, key_value_segment_ids=segment_ids)
    options = config.options.keywords() | segments
    return block_sparse_attention(query, key, value, selection, is_causal=config.is_causal, **options), selection


def attend_cached(
    config: AttentionConfig, cache: Cache, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, BlockSelection, Cache]:
    """Appends tokens to the cache, and lets them attend to all it holds.

    Args:
      config: the layer; `check_decode` has passed.
      cache: see `decode_cache`.
      query: [batch, length, num_heads, head_dim], of the new tokens only; key and value likewise.
      key: [batch, length, num_kv_heads, head_dim].
      value: [batch, length, num_kv_heads, value_head_dim].

    Returns:
      [batch, length, num_heads, value_head_dim], NaN for tokens that the cache has no room for; what was selected; and the
      new cache.

    Raises:
      ValueError: the cache does not fit the tokens.
    """
    for name, new in (("cached_key", key), ("cached_value", value)):
        check_fit(name, cache[name], new)
    index = cache["cache_index"]
    query, key = _rotate(config, query, key, index)
    cache = append_tokens(cache, config.selector, key, value)
    selection = select_cached(config.selector, query, cache, index)
    # Causality hides the slots that are not filled yet.
    options = config.options.keywords() | dict(is_causal=True, q_offset=index)
    out = block_sparse_attention(query, cache["cached_key"], cache["cached_value"], selection, **options)
    return drop_beyond(out, index, cache["cached_key"].shape[1]), selection, cache


def check_decode(config: AttentionConfig, segment_ids: Any) -> None:
    """Decoding hides the unfilled slots of the cache by causality, and must select as if they did not exist."""
    require(config.is_causal, "is_causal", config.is_causal, "True to decode: later tokens are not known yet")
    require(segment_ids is None, "segment_ids", segment_ids, "None in decode mode: a cache holds one sequence per batch row")
    is_safe = getattr(config.selector, "causal_safe", False)
    require(is_safe, "selector", config.selector, "`causal_safe` to decode: its selection may not depend on later tokens")


def _rotate(config: AttentionConfig, query, key, index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    if config.rotary_theta is None:
        return query, key
    positions = index + jnp.arange(query.shape[1], dtype=jnp.int32)
    return apply_rotary(query, positions, config.rotary_theta), apply_rotary(key, positions, config.rotary_theta)
