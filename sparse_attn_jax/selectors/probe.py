"""The attention of the last queries of a prompt, which several selectors take for that of all."""

import jax
import jax.numpy as jnp

from sparse_attn_jax.jax_compat import vary_like
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.selectors.pooling import dot_operand, masked_softmax
from sparse_attn_jax.selectors.static_rows import check_call

# Attention weights held at once, in elements; at least one query's.
CHUNK_ELEMENTS = 2**24


def check_causal_call(
    selector: object, query: jax.Array, key: jax.Array, is_causal: bool, q_offset: int | jax.Array | None
) -> None:
    """Raises `ValueError` for arguments that no selector takes, and for attention that is not causal."""
    check_call(query, key, is_causal, q_offset)
    if not is_causal:
        name = type(selector).__name__
        raise ValueError(f"`is_causal` is False; {name} is defined for causal attention only, so it must be True.")


def probe_positions(q_offset: int | jax.Array | None, q_len: int, kv_len: int, num_probe: int) -> jax.Array:
    """The absolute positions of the last `num_probe` queries, or of all if there are fewer: int32 [batch or 1, rows]."""
    return absolute_positions(q_offset, q_len, kv_len)[:, -num_probe:]


def probe_mass(
    query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None, *, num_probe: int, scale: float | None
) -> tuple[jax.Array, jax.Array]:
    """How much attention the last queries pay to each key, and to each distance.

    With A[i, j] the causal softmax of the probe query at position i, columns[j] = sum_i A[i, j] and
    diagonals[o] = sum_i A[i, i - o].

    Args:
      query: [batch, q_len, num_q_heads, head_dim]; its last `num_probe` are read, or all if there are fewer.
      key: [batch, kv_len, num_kv_heads, head_dim], kv_len at least 1.
      q_offset: absolute position of query 0; `None` is kv_len - q_len.
      num_probe: queries of the probe.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.

    Returns:
      columns and diagonals, float32 [batch, num_q_heads, kv_len] each. Memory does not grow with `num_probe`.
    """
    batch, q_len, num_q_heads, head_dim = query.shape
    kv_len, num_kv_heads = key.shape[1:3]
    query = dot_operand(query[:, -num_probe:])
    num_rows = query.shape[1]
    chunk = min(max(CHUNK_ELEMENTS // (batch * num_q_heads * kv_len), 1), num_rows)
    num_chunks = num_blocks(num_rows, chunk)
    query = jnp.pad(query, [(0, 0), (0, num_chunks * chunk - num_rows), (0, 0), (0, 0)])
    grouped = query.reshape(batch, num_chunks, chunk, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    first = probe_positions(q_offset, q_len, kv_len, num_probe)[:, 0]
    scale = head_dim**-0.5 if scale is None else scale
    key = dot_operand(key)

    def add_chunk(chunk_idx, sums):
        logits = scale * jnp.einsum(
            "bqngd,bknd->bngqk",
            jax.lax.dynamic_index_in_dim(grouped, chunk_idx, 1, keepdims=False),
            key,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).reshape(batch, num_q_heads, chunk, kv_len)
        rows = chunk_idx * chunk + jnp.arange(chunk, dtype=jnp.int32)
        positions = first[:, None] + rows
        visible = (jnp.arange(kv_len, dtype=jnp.int32) <= positions[..., None]) & (rows < num_rows)[:, None]
        weights = masked_softmax(logits, visible[:, None])
        columns, diagonals = sums
        return columns + weights.sum(axis=2), diagonals + _sum_diagonals(weights, positions[:, 0])

    zeros = vary_like(jnp.zeros((batch, num_q_heads, kv_len), jnp.float32), (query, key, first))
    return jax.lax.fori_loop(0, num_chunks, add_chunk, (zeros, zeros))


def _sum_diagonals(weights: jax.Array, first: jax.Array) -> jax.Array:
    """Sums over queries by distance.

    Args:
      weights: [batch, heads, rows, kv_len], of queries at consecutive positions.
      first: int32 [batch or 1], the position of the first of them.

    Returns:
      [batch, heads, kv_len]: entry o is the sum of weights[r, first + r - o].
    """
    batch, heads, rows, kv_len = weights.shape
    # Row r moves right by r: padded by `rows` and read as if it were padded by one less.
    width = kv_len + rows
    sheared = jnp.pad(weights[..., ::-1], [(0, 0)] * 3 + [(0, rows)]).reshape(batch, heads, rows * width)
    sums = sheared[..., : rows * (width - 1)].reshape(batch, heads, rows, width - 1).sum(axis=2)
    # Entry x of `sums` is distance x - (kv_len - 1 - first).
    start = jnp.broadcast_to(kv_len - 1 - first, (batch,))
    index = start[:, None] + jnp.arange(kv_len, dtype=jnp.int32)
    inside = (index >= 0) & (index < width - 1)
    index = jnp.clip(index, 0, width - 2)
    return jnp.where(inside[:, None], jnp.take_along_axis(sums, index[:, None], axis=-1), 0.0)
