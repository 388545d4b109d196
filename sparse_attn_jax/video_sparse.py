"""Video sparse attention: a coarse branch over cubes of tokens, and a fine one over those that the coarse one ranks first."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax import validation
from sparse_attn_jax.api import block_sparse_attention
from sparse_attn_jax.grid_checks import check_shape, per_dim
from sparse_attn_jax.permutation import TokenPermutation, tile_tokens
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.tile_lists import split_tiles
from sparse_attn_jax.selectors.tile_scores import mean_of_tiles, pick_tiles
from sparse_attn_jax.validation import require


def video_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: jax.Array,
    *,
    shape: tuple[int, ...],
    cube_shape: int | tuple[int, ...] = (4, 4, 4),
    top_k: int,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Video sparse attention (VSA), trainable: out = coarse * gate + fine. Not causal.

    The tokens of the grid are cut into cubes; means are over the tokens of a cube that there are.

        P = softmax(scale * mean query . mean key)    of cubes, for each query head
        coarse = P @ mean value                       the same for all tokens of a cube
        fine = softmax attention of each token to the tokens of the `top_k` cubes with the highest P for its own

    Gradients reach query and key through the coarse branch too, never through the choice of cubes. Cubes are ranked by the
    logits of P, which its rounding cannot make equal; the lower id wins a tie. Batch and lengths of queries and keys agree.

    Args:
      query: [batch, tokens, num_q_heads, head_dim], tokens = prod(shape), in raster order, the last dimension the fastest.
      key: [batch, tokens, num_kv_heads, head_dim], dtype of query. Query head h reads KV head h // group_size.
      value: [batch, tokens, num_kv_heads, value_head_dim], dtype of query.
      gate: [batch, tokens, num_q_heads], or [batch, tokens, num_q_heads, value_head_dim] as in FastVideo; dimensions may be 1.
      shape: lengths of a 1-D, 2-D or 3-D grid. Cubes at its ends may be smaller.
      cube_shape: tokens of a cube by dimension: an int or one per dimension. Default: 4 x 4 x 4.
      top_k: cubes that each cube attends to; its own is not forced.
      scale: multiplies query . key in both branches. Default: head_dim ** -0.5.
      implementation: of the fine branch, as in `block_sparse_attention`.

    Returns:
      [batch, tokens, num_q_heads, value_head_dim], dtype of query. The coarse branch is float32 (float64 for float64).

    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: none of the implementations asked for can run the fine branch.

    Memory: the coarse branch holds [batch, num_q_heads, cubes, cubes]. Source: FastVideo, whose cubes have 64 tokens.
    """
    _check_call(query, key, value, gate, shape, cube_shape, top_k)
    scale = query.shape[-1] ** -0.5 if scale is None else validation.static_float("scale", scale)
    permutation = tile_tokens(shape, cube_shape)
    cube_size = math.prod(per_dim("cube_shape", cube_shape, len(shape)))
    query, key, value = (permutation.apply(x) for x in (query, key, value))
    coarse, logits = _attend_means(*(mean_of_tiles(x, permutation, cube_size) for x in (query, key, value)), scale)
    cubes = pick_tiles(jax.lax.stop_gradient(logits).swapaxes(2, 3), top_k)
    blocks, block_size = split_tiles(cubes, cube_size)
    selection = BlockSelection(blocks, q_block_size=cube_size, kv_block_size=block_size)
    segments = _hide_padding(permutation, query.shape[0])
    fine = block_sparse_attention(query, key, value, selection, scale=scale, implementation=implementation, **segments)
    coarse, fine = permutation.undo(jnp.repeat(coarse, cube_size, axis=1)), permutation.undo(fine)
    gate = gate[..., None] if gate.ndim == 3 else gate
    return (coarse * gate + fine).astype(fine.dtype)


def _attend_means(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Attention of means: out [batch, cubes, num_q_heads, value_head_dim], logits [batch, num_q_heads, cubes, cubes]."""
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bqngd,bknd->bngqk", grouped, key, precision=precision) * scale
    out = jnp.einsum("bngqk,bknd->bqngd", jax.nn.softmax(logits, axis=-1), value, precision=precision)
    batch, cubes, num_q_heads, _ = query.shape
    return out.reshape(batch, cubes, num_q_heads, -1), logits.reshape(batch, num_q_heads, cubes, cubes)


def _hide_padding(permutation: TokenPermutation, batch: int) -> dict[str, jax.Array]:
    """Segment ids that no padding shares: every kernel knows segments."""
    if not permutation.has_padding:
        return {}
    is_token = jnp.broadcast_to(permutation.order >= 0, (batch, permutation.permuted_len))
    return dict(query_segment_ids=jnp.where(is_token, 0, -1), key_value_segment_ids=jnp.where(is_token, 0, -2))


def _check_call(query, key, value, gate, shape, cube_shape, top_k) -> None:
    validation.check_qkv(query, key, value)
    check_shape("shape", shape)
    cube_shape = per_dim("cube_shape", cube_shape, len(shape))
    for name, x in (("query", query), ("key", key)):
        require(x.shape[1] == math.prod(shape), name, x, f"of length {math.prod(shape)}, the tokens of shape={shape}")
    checks.check_int("top_k", top_k, 1)
    num_cubes = math.prod(map(num_blocks, shape, cube_shape))
    require(top_k <= num_cubes, "top_k", top_k, f"at most the {num_cubes} cubes that there are")
    wanted = (*query.shape[:3], value.shape[3])
    fits = validation.is_array(gate) and len(gate.shape) in (3, 4)
    fits = fits and all(found in (1, size) for found, size in zip(gate.shape, wanted))
    needed = f"an array {list(wanted[:3])} or {list(wanted)}; dimensions may be 1"
    require(fits and jnp.issubdtype(gate.dtype, jnp.floating), "gate", gate, needed)
