"""Rotary position embedding."""

import jax
import jax.numpy as jnp


def apply_rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs of features by an angle that grows with the position, so that dot products see only distances.

    Feature i pairs with feature i + head_dim / 2 (the half-split layout of Llama and of `flax.nnx.RoPE`) and turns by
    position * theta ** (-2 i / head_dim).

    Args:
      x: [batch, length, num_heads, head_dim], floating, head_dim even.
      positions: int32 [length], absolute.
      theta: base of the wavelengths.

    Returns:
      [batch, length, num_heads, head_dim], dtype of x; computed in float32 at least.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions.astype(dtype)[:, None, None] * frequency  # [length, 1, half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
