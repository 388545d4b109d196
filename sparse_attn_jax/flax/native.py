"""What the linen and the nnx module of native sparse attention share: all but their parameters.

A decode cache is a dict of arrays, zeros where unfilled:
  cached_{key,value}               [batch, max_len, num_kv_heads, dim], of the selected branch
  cached_window_{key,value}        likewise, of the window
  cached_uncompressed_{key,value}  likewise, of which units are made
  cached_compressed_{key,value}    [batch, num_units, num_kv_heads, dim], what is made of each complete unit
  cache_index                      int32 [], tokens stored so far, at most max_len

Keys are rotated if the layer rotates, but for those of which units are made. The window and the uncompressed tokens are all
kept, though a step reads only the last of them: so a smaller index takes tokens back, as it does in `decode_cache`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.flax.decode_cache import Cache, check_fit, drop_beyond, store_tokens, update_units
from sparse_attn_jax.flax.options import AttentionConfig, make_config
from sparse_attn_jax.flax.rotary import apply_rotary
from sparse_attn_jax.native_sparse_attention import BRANCHES, native_sparse_attention
from sparse_attn_jax.scoring_problem import num_units
from sparse_attn_jax.selectors.nsa import NSA

# The projection that a cached array holds.
TOKEN_CACHES = dict(
    cached_key="key",
    cached_value="value",
    cached_window_key="window_key",
    cached_window_value="window_value",
    cached_uncompressed_key="compressed_key",
    cached_uncompressed_value="compressed_value",
)
# The compression that makes a cached array, and the array it is made from.
UNIT_CACHES = dict(
    cached_compressed_key=("key_compression", "cached_uncompressed_key"),
    cached_compressed_value=("value_compression", "cached_uncompressed_value"),
)
NATIVE_CACHE_NAMES = (*TOKEN_CACHES, *UNIT_CACHES, "cache_index")
ROTATED = ("query", "key", "window_key", "key_compression")

# By the names of `NativeConfig.compressions()`: tokens [batch, length, heads, dim] to units [batch, num_units, heads, dim].
Compressions = Mapping[str, Callable[[jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeConfig:
    """Everything about native sparse attention but its parameters. Made by `make_native_config`, which checks it."""

    attention: AttentionConfig
    kernel_size: int
    kernel_stride: int
    block_size: int
    top_k: int
    num_sink_blocks: int
    num_local_blocks: int
    window_size: int
    compression_features: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """Heads and features per head of the projections of the input, by the name of their parameters."""
        sizes = self.attention.projections()
        branches = {f"{prefix}{name}": sizes[name] for prefix in ("", "compressed_", "window_") for name in ("key", "value")}
        return dict(query=sizes["query"], gate=(self.attention.num_heads, len(BRANCHES)), **branches)

    def compressions(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """What is compressed, and its heads and features per head, by the name of the compression's parameters."""
        sizes = self.attention.projections()
        return dict(key_compression=("compressed_key", sizes["key"]), value_compression=("compressed_value", sizes["value"]))


def make_native_config(
    in_features: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    top_k: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    window_size: int,
    compression_features: int | None,
    **options: Any,
) -> NativeConfig:
    """Fills in the defaults and checks; `ValueError` names the argument. `options` are those of `make_config`."""
    no_options = dict(selector=None, local_window_size=None, num_sinks=0, logits_soft_cap=None)
    attention = make_config(in_features, is_causal=True, **no_options, **options)
    NSA(top_k, block_size, kernel_size, kernel_stride, num_sink_blocks, num_local_blocks)
    checks.check_int("window_size", window_size, 1)
    if compression_features is None:
        compression_features = attention.head_dim
    checks.check_int("compression_features", compression_features, 1)
    return NativeConfig(
        attention=attention,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        top_k=top_k,
        num_sink_blocks=num_sink_blocks,
        num_local_blocks=num_local_blocks,
        window_size=window_size,
        compression_features=compression_features,
    )


def unit_tokens(config: NativeConfig, x: jax.Array) -> jax.Array:
    """The tokens of each complete unit.

    Args:
      config: the layer.
      x: [batch, length, heads, features].

    Returns:
      [batch, num_units, kernel_size, heads, features].
    """
    count = num_units(x.shape[1], config.kernel_size, config.kernel_stride)
    starts = jnp.arange(count, dtype=jnp.int32) * config.kernel_stride
    return x[:, starts[:, None] + jnp.arange(config.kernel_size, dtype=jnp.int32)]


def flatten_units(units: jax.Array, position_embedding: jax.Array) -> jax.Array:
    """Units with the embedding of each token's place in them, as one vector a head: [batch, num_units, heads, size * features].

    Args:
      units: [batch, num_units, kernel_size, heads, features].
      position_embedding: [kernel_size, heads, features].
    """
    size, _, features = position_embedding.shape
    units = (units + position_embedding.astype(units.dtype)).swapaxes(2, 3)
    return units.reshape(*units.shape[:3], size * features)


def attend_native(config: NativeConfig, projected: dict[str, jax.Array], compressions: Compressions) -> jax.Array:
    """Attention of whole sequences by the three branches.

    Args:
      config: the layer.
      projected: [batch, length, heads, features], by the names of `config.projections()`.
      compressions: see `Compressions`.

    Returns:
      [batch, length, num_heads, value_head_dim], dtype of the query.
    """
    arrays = {name: _rotate_tokens(config, source, projected[source], 0) for name, source in TOKEN_CACHES.items()}
    for name, (compression, tokens) in UNIT_CACHES.items():
        arrays[name] = _compress(config, compressions, compression, arrays[tokens], 0)
    return _attend(config, projected, arrays, 0)


def attend_native_cached(
    config: NativeConfig, cache: Cache, projected: dict[str, jax.Array], compressions: Compressions
) -> tuple[jax.Array, Cache]:
    """Appends tokens to the cache, and lets them attend to all it holds.

    Args:
      config: the layer.
      cache: see above.
      projected: [batch, length, heads, features], of the new tokens only, by the names of `config.projections()`.
      compressions: see `Compressions`.

    Returns:
      [batch, length, num_heads, value_head_dim], NaN for tokens that the cache has no room for; and the new cache.

    Raises:
      ValueError: the cache does not fit the tokens.
    """
    for name, source in TOKEN_CACHES.items():
        check_fit(name, cache[name], projected[source])
    updated = append_native(config, cache, projected, compressions)
    # Causality hides the slots that are not filled yet, and the units that are not complete.
    out = _attend(config, projected, updated, cache["cache_index"])
    return drop_beyond(out, cache["cache_index"], cache["cached_key"].shape[1]), updated


def make_native_cache(config: NativeConfig, projected: Mapping[str, jax.ShapeDtypeStruct | jax.Array]) -> Cache:
    """An empty cache for [batch, max_len, heads, features] of these dtypes, by the names of `config.projections()`."""
    cache = {name: jnp.zeros(projected[source].shape, projected[source].dtype) for name, source in TOKEN_CACHES.items()}
    for name, (_, tokens) in UNIT_CACHES.items():
        batch, max_len, *rest = cache[tokens].shape
        count = num_units(max_len, config.kernel_size, config.kernel_stride)
        cache[name] = jnp.zeros((batch, count, *rest), cache[tokens].dtype)
    return cache | dict(cache_index=jnp.zeros((), jnp.int32))


def append_native(config: NativeConfig, cache: Cache, projected: dict[str, jax.Array], compressions: Compressions) -> Cache:
    """The cache with tokens appended; those beyond its capacity are dropped, and what it holds stays as it is.

    Arguments are those of `attend_native_cached`. Work is proportional to the new tokens, whatever max_len.
    """
    index, num_new = cache["cache_index"], projected["query"].shape[1]
    new = {name: _rotate_tokens(config, source, projected[source], index) for name, source in TOKEN_CACHES.items()}
    updated = store_tokens(cache, new)
    for name, (compression, tokens) in UNIT_CACHES.items():
        compress = functools.partial(_compress, config, compressions, compression)
        updated[name] = update_units(
            cache[name], updated[tokens], compress, index, num_new, config.kernel_size, config.kernel_stride
        )
    return updated


def _attend(config: NativeConfig, projected: dict[str, jax.Array], arrays: Cache, q_offset: int | jax.Array) -> jax.Array:
    """Attention of the projected queries, from position `q_offset` on, to arrays by the names of a cache."""
    gates = jax.nn.sigmoid(projected["gate"].astype(jnp.promote_types(projected["gate"].dtype, jnp.float32)))
    return native_sparse_attention(
        _rotate_tokens(config, "query", projected["query"], q_offset),
        arrays["cached_key"],
        arrays["cached_value"],
        [gates[..., i] for i in range(len(BRANCHES))],
        kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride,
        block_size=config.block_size,
        top_k=config.top_k,
        num_sink_blocks=config.num_sink_blocks,
        num_local_blocks=config.num_local_blocks,
        window_size=config.window_size,
        compressed_key=arrays["cached_compressed_key"],
        compressed_value=arrays["cached_compressed_value"],
        window_key=arrays["cached_window_key"],
        window_value=arrays["cached_window_value"],
        q_offset=q_offset,
        scale=config.attention.options.scale,
        implementation=config.attention.options.implementation,
    )


def _rotate_tokens(config: NativeConfig, name: str, x: jax.Array, first: int | jax.Array) -> jax.Array:
    """A projection by its name, of tokens from position `first` on, rotated if it is one that is."""
    return _rotate(config, name, x, first + jnp.arange(x.shape[1], dtype=jnp.int32))


def _compress(
    config: NativeConfig, compressions: Compressions, name: str, tokens: jax.Array, first: int | jax.Array
) -> jax.Array:
    """The complete units of these tokens, of which the first has this id, rotated if they are keys."""
    units = compressions[name](tokens)
    return _rotate(config, name, units, (first + jnp.arange(units.shape[1], dtype=jnp.int32)) * config.kernel_stride)


def _rotate(config: NativeConfig, name: str, x: jax.Array, positions: jax.Array) -> jax.Array:
    theta = config.attention.rotary_theta
    return x if theta is None or name not in ROTATED else apply_rotary(x, positions, theta)
