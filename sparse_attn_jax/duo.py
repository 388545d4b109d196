"""DuoAttention: gates that learn which KV heads need all keys, and the head patterns that they decide."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.selectors.head_mix import DENSE, STREAMING
from sparse_attn_jax.validation import is_array, require


def duo_gate_combine(out_full: jax.Array, out_streaming: jax.Array, gate: jax.Array) -> jax.Array:
    """What a layer passes on while its gates are trained: gate * out_full + (1 - gate) * out_streaming.

    DuoAttention trains nothing but the gates, from 1 on, on a loss of the last hidden states against those of the full model
    plus 0.05 times the sum of the gates, and clips them to [0, 1] after every step. They are not clipped here, where that
    would halve the gradient of a gate that is 1.

    Args:
      out_full: [batch, q_len, num_q_heads, value_head_dim], attention to all keys.
      out_streaming: of the same shape and dtype, attention with sinks and a window: `HeadMix` or `SlidingWindow`.
      gate: floating point [num_kv_heads]; query head h has gate[h // (num_q_heads // num_kv_heads)].

    Returns:
      [batch, q_len, num_q_heads, value_head_dim], dtype of out_full. Differentiable in all three.

    Raises:
      ValueError: shapes or dtypes that do not fit.

    Source: DuoAttention (mit-han-lab/duo-attention).
    """
    require(is_array(out_full) and len(out_full.shape) == 4, "out_full", out_full, "an array [batch, q_len, num_q_heads, dim]")
    needed = f"{out_full.dtype}{list(out_full.shape)}, as `out_full`"
    is_like = is_array(out_streaming) and (out_streaming.shape, out_streaming.dtype) == (out_full.shape, out_full.dtype)
    require(is_like, "out_streaming", out_streaming, needed)
    require(is_array(gate) and jnp.issubdtype(gate.dtype, jnp.floating), "gate", gate, "a floating-point array [num_kv_heads]")
    num_q_heads, needed = out_full.shape[2], f"[num_kv_heads], of a divisor of num_q_heads, {out_full.shape[2]}"
    require(len(gate.shape) == 1 and gate.shape[0] > 0 and num_q_heads % gate.shape[0] == 0, "gate", gate, needed)
    gate = jnp.repeat(gate, num_q_heads // gate.shape[0])[:, None]  # [num_q_heads, 1]
    return (gate * out_full + (1 - gate) * out_streaming).astype(out_full.dtype)


def duo_threshold(
    gate: jax.Array | np.ndarray, group_size: int, *, threshold: float = 0.5, sparsity: float | None = None
) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """The heads that trained gates leave dense (0) and those that stream (-1), as `HeadMix` takes them.

    Args:
      gate: concrete, [num_kv_heads], or [num_layers, num_kv_heads] to rank the heads of all layers together.
      group_size: query heads per KV head.
      threshold: heads whose gate is at least that are dense. Default: 0.5.
      sparsity: in place of the threshold, the fraction of heads that stream, from 0 to 1: of n heads, ceil(sparsity * (n - 1))
        with the lowest gates (all of them if 1), where two are equal the one that comes first. The original draws lots there.

    Returns:
      `head_mask_type` with an entry per query head; a tuple of them, one per layer, if the gate has two dimensions.

    Raises:
      ValueError: an argument is wrong, or `gate` is traced.

    Source: DuoAttention (mit-han-lab/duo-attention).
    """
    needed = "a concrete array [num_kv_heads] or [num_layers, num_kv_heads]"
    require(is_array(gate) and not isinstance(gate, jax.core.Tracer), "gate", gate, needed)
    require(len(gate.shape) in (1, 2) and 0 not in gate.shape, "gate", gate, needed)
    require(isinstance(group_size, int) and group_size >= 1, "group_size", group_size, "an int of at least 1")
    require(isinstance(threshold, numbers.Real), "threshold", threshold, "a number")
    values = np.asarray(gate, np.float64)
    is_dense = values >= threshold
    if sparsity is not None:
        require(isinstance(sparsity, numbers.Real) and 0 <= sparsity <= 1, "sparsity", sparsity, "None or a number in [0, 1]")
        # Rounded first: a product that misses a whole number by an ulp must not gain a head.
        count = values.size if sparsity == 1 else math.ceil(round(sparsity * (values.size - 1), 9))
        rank = np.argsort(np.argsort(values, axis=None, kind="stable"), kind="stable")
        is_dense = (rank >= count).reshape(values.shape)
    kinds = np.where(is_dense, DENSE, STREAMING).repeat(group_size, axis=-1).tolist()
    return tuple(kinds) if values.ndim == 1 else tuple(map(tuple, kinds))
