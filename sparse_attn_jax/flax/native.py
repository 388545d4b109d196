"""What the linen and the nnx module of native sparse attention share: all but their parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.flax.options import AttentionConfig, make_config
from sparse_attn_jax.flax.rotary import apply_rotary
from sparse_attn_jax.native_sparse_attention import BRANCHES, native_sparse_attention
from sparse_attn_jax.scoring_problem import num_units
from sparse_attn_jax.selectors.nsa import NSA


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


def attend_native(config: NativeConfig, projected: dict[str, jax.Array], units: dict[str, jax.Array]) -> jax.Array:
    """Attention by the three branches.

    Args:
      config: the layer.
      projected: [batch, length, heads, features], by the names of `config.projections()`.
      units: [batch, num_units, num_kv_heads, features], by the names of `config.compressions()`.

    Returns:
      [batch, length, num_heads, value_head_dim], dtype of the query.
    """
    positions = jnp.arange(projected["query"].shape[1], dtype=jnp.int32)
    unit_positions = jnp.arange(units["key_compression"].shape[1], dtype=jnp.int32) * config.kernel_stride
    gates = jax.nn.sigmoid(projected["gate"].astype(jnp.promote_types(projected["gate"].dtype, jnp.float32)))
    return native_sparse_attention(
        _rotate(config, projected["query"], positions),
        _rotate(config, projected["key"], positions),
        projected["value"],
        [gates[..., i] for i in range(len(BRANCHES))],
        kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride,
        block_size=config.block_size,
        top_k=config.top_k,
        num_sink_blocks=config.num_sink_blocks,
        num_local_blocks=config.num_local_blocks,
        window_size=config.window_size,
        compressed_key=_rotate(config, units["key_compression"], unit_positions),
        compressed_value=units["value_compression"],
        window_key=_rotate(config, projected["window_key"], positions),
        window_value=projected["window_value"],
        scale=config.attention.options.scale,
        implementation=config.attention.options.implementation,
    )


def _rotate(config: NativeConfig, x: jax.Array, positions: jax.Array) -> jax.Array:
    theta = config.attention.rotary_theta
    return x if theta is None else apply_rotary(x, positions, theta)
