"""The decode cache: keys and values of the tokens so far, and their compressed keys, kept up to date token by token.

A cache is a dict of arrays by the names of the module's cache variables:
  cached_key             [batch, max_len, num_kv_heads, head_dim], rotated if the layer rotates; zeros where unfilled
  cached_value           [batch, max_len, num_kv_heads, value_head_dim]
  cache_index            int32 [], tokens stored so far, at most max_len
  cached_compressed_key  [batch, num_units, num_kv_heads, head_dim], for selectors that score compressed keys
  cached_coarse_key      [batch, num_coarse_units, num_kv_heads, head_dim], for those that score coarser ones as well

A selector that scores means of keys says so by two methods: `unit_sizes()`, the kernel size and stride of each array of
`compress_keys` that it takes, and `select(query, *arrays, kv_len=, is_causal=, q_offset=)`, which selects from them. Others are
called with all keys of the cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax.flax.options import Selector
from sparse_attn_jax.scoring import compress_keys
from sparse_attn_jax.scoring_problem import num_units
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.validation import require

# Of the units of a selector, in the order in which it takes them.
UNIT_NAMES = ("cached_compressed_key", "cached_coarse_key")
CACHE_NAMES = ("cached_key", "cached_value", "cache_index", *UNIT_NAMES)

Cache = dict[str, jax.Array]


def make_cache(selector: Selector, key: jax.ShapeDtypeStruct | jax.Array, value: jax.ShapeDtypeStruct | jax.Array) -> Cache:
    """An empty cache for keys and values of these shapes, [batch, max_len, num_kv_heads, dim], and dtypes."""
    batch, max_len, *rest = key.shape
    cache = dict(
        cached_key=jnp.zeros(key.shape, key.dtype),
        cached_value=jnp.zeros(value.shape, value.dtype),
        cache_index=jnp.zeros((), jnp.int32),
    )
    for name, sizes in unit_sizes(selector).items():
        cache[name] = jnp.zeros((batch, num_units(max_len, *sizes), *rest), key.dtype)
    return cache


def unit_sizes(selector: Selector) -> dict[str, tuple[int, int]]:
    """(kernel_size, kernel_stride) of the compressed keys that a selector can select from, by the name of their cache."""
    return dict(zip(UNIT_NAMES, selector.unit_sizes(), strict=False)) if hasattr(selector, "unit_sizes") else {}


def append_tokens(cache: Cache, selector: Selector, key: jax.Array, value: jax.Array) -> Cache:
    """The cache with tokens appended; those beyond its capacity are dropped, and what it holds stays as it is.

    Args:
      cache: with room for max_len tokens, of which `cache_index` are filled.
      selector: the one that the cache was made for.
      key: [batch, num_new, num_kv_heads, head_dim].
      value: [batch, num_new, num_kv_heads, value_head_dim].

    Returns:
      A new cache. Work is proportional to num_new, whatever max_len.
    """
    updated = store_tokens(cache, dict(cached_key=key, cached_value=value))
    for name, (size, stride) in unit_sizes(selector).items():
        compress = lambda tokens, _, size=size, stride=stride: compress_keys(tokens, size, stride)
        updated[name] = update_units(
            cache[name], updated["cached_key"], compress, cache["cache_index"], key.shape[1], size, stride
        )
    return updated


def store_tokens(cache: Cache, new: Cache) -> Cache:
    """The cache with tokens appended, those beyond its capacity dropped, and its index moved on; units stay as they are.

    Args:
      cache: of `cache_index` and arrays [batch, max_len, heads, dim].
      new: [batch, num_new, heads, dim], by the names of those arrays that hold tokens.
    """
    index, updated = cache["cache_index"], dict(cache)
    for name, tokens in new.items():
        slots = index + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        updated[name] = cache[name].at[:, slots].set(tokens, mode="drop", unique_indices=True, indices_are_sorted=True)
        updated["cache_index"] = jnp.minimum(index + tokens.shape[1], cache[name].shape[1])
    return updated


def update_units(
    units: jax.Array,
    tokens: jax.Array,
    compress: Callable[[jax.Array, jax.Array], jax.Array],
    index: jax.Array,
    num_new: int,
    kernel_size: int,
    kernel_stride: int,
) -> jax.Array:
    """Recomputes the units that `num_new` tokens from `index` on complete: at most one per stride, whatever the length.

    Some of those recomputed may still lack tokens. They are computed again once they are complete, and until then
    no query sees them.

    Args:
      units: [batch, num_units, heads, dim].
      tokens: [batch, max_len, heads, dim], the new ones included.
      compress: makes units, of (tokens of a run of them, the id of the first, int32 []).
      index: int32 [], tokens before the new ones.
      num_new: tokens appended.
      kernel_size: tokens per unit.
      kernel_stride: tokens between the starts of neighbouring units.
    """
    count = min(num_blocks(num_new, kernel_stride), units.shape[1])
    if count == 0:
        return units
    # The first unit whose last token is new; less where the last unit of the cache comes too soon.
    first = jnp.clip((index - kernel_size) // kernel_stride + 1, 0, units.shape[1] - count)
    num_tokens = (count - 1) * kernel_stride + kernel_size
    run = jax.lax.dynamic_slice_in_dim(tokens, first * kernel_stride, num_tokens, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(units, compress(run, first), first, axis=1)


def check_fit(name: str, cached: jax.Array, new: Any) -> None:
    """Of a cached array and new tokens: all but the lengths are equal, and an empty cache would have room."""
    batch, max_len, *rest = cached.shape
    fits = new.shape[0] == batch and new.shape[1] <= max_len and list(new.shape[2:]) == rest and new.dtype == cached.dtype
    needed = f"of dtype {new.dtype} and shape {[new.shape[0], f'max_len >= {new.shape[1]}', *new.shape[2:]]} for these `inputs`"
    require(fits, name, cached, needed)


def drop_beyond(out: jax.Array, index: jax.Array, max_len: int) -> jax.Array:
    """Outputs [batch, length, heads, dim] of tokens from `index` on, NaN for those that a cache has no room for."""
    has_room = index + jnp.arange(out.shape[1]) < max_len
    return jnp.where(has_room[:, None, None], out, jnp.nan)


def select_cached(selector: Selector, query: jax.Array, cache: Cache, q_offset: jax.Array) -> BlockSelection:
    """What the selector, causal, selects for queries that start at position `q_offset` of the cache.

    Args:
      selector: the one that the cache was made for.
      query: [batch, q_len, num_heads, head_dim].
      cache: with the queries' own tokens appended.
      q_offset: int32 [].

    Returns:
      The selector's `BlockSelection`.
    """
    key, units = cache["cached_key"], [cache[name] for name in unit_sizes(selector)]
    if not units:
        return selector(query, key, is_causal=True, q_offset=q_offset)
    return selector.select(query, *units, kv_len=key.shape[1], is_causal=True, q_offset=q_offset)
