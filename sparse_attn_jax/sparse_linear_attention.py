"""`sparse_linear_attention`: softmax attention to the blocks that matter most, linear attention to those that matter little."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax import validation
from sparse_attn_jax.api import block_sparse_attention
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.pooling import block_means, check_fraction, pooled_logits, top_k_mask

MODES = ("marginal", "complement", "all")
FEATURE_MAPS = {
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
}


def sparse_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    top_ratio: float = 0.05,
    bottom_ratio: float = 0.10,
    mode: str = "marginal",
    feature_map: str = "softmax",
    projection: jax.Array | None = None,
    block_size: int = 64,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Sparse-linear attention (SLA), not causal, for diffusion transformers and the like.

    By the products of block means, each block of queries ranks the blocks of keys, of which there are n: the highest
    max(1, floor(top_ratio * n)) are critical, the lowest floor(bottom_ratio * n) negligible, the others marginal.

      out = attention to the critical blocks + linear @ projection
      linear[i] = f(q[i]) . H / (f(q[i]) . Z)
      H = sum over the keys j of the marginal blocks of f(k[j]) v[j]^T,  Z = the same sum of f(k[j])

    The original's code has had three rules for the linear part: the paper's, above; all but the critical blocks ("complement"),
    as the total minus the selected, which cancels; and all blocks ("all"), with 1e-5 added to the denominator. Here each is a
    direct sum, and a denominator of 0, as of no blocks at all, gives 0. The original's projection also has a bias.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], floating point. Query head h reads KV head h // group_size.
      key: [batch, kv_len, num_kv_heads, head_dim], dtype of query.
      value: [batch, kv_len, num_kv_heads, value_head_dim], dtype of query.
      top_ratio: share of the blocks that are critical, in [0, 1].
      bottom_ratio: share of the blocks that are negligible, in [0, 1]. Matters in mode "marginal" only.
      mode: which blocks linear attention sees: "marginal", "complement" (those that are not critical) or "all".
      feature_map: f: "softmax" over the channels, "elu" (elu(x) + 1) or "relu".
      projection: [value_head_dim, value_head_dim], or one for each query head, [num_q_heads, value_head_dim, value_head_dim].
        The original learns one, which starts at zero. Default: the identity.
      block_size: tokens per block, of queries and of keys.
      scale: multiplies the dot products of softmax attention. Default: head_dim ** -0.5.
      implementation: of `block_sparse_attention`.

    Returns:
      [batch, q_len, num_q_heads, value_head_dim], dtype of query.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.
      NotImplementedError: none of the implementations asked for can run this call.

    Differentiable in query, key, value and projection; the choice of blocks carries no gradient. The linear part is float32 and
    takes memory linear in the length: head_dim * value_head_dim for each block and query head.
    """
    validation.check_qkv(query, key, value)
    check_fraction("top_ratio", top_ratio)
    check_fraction("bottom_ratio", bottom_ratio)
    checks.check_choice("mode", mode, MODES)
    checks.check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
    checks.check_int("block_size", block_size, 1)
    _check_projection(projection, query, value)
    if 0 in (query.shape[1], key.shape[1]):
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    critical, marginal, num_critical = _classify_blocks(query, key, top_ratio, bottom_ratio, block_size)
    sizes = dict(q_block_size=block_size, kv_block_size=block_size)
    selection = BlockSelection.from_block_mask(critical, num_slots=num_critical, **sizes)
    sparse = block_sparse_attention(query, key, value, selection, scale=scale, implementation=implementation)
    seen = {"marginal": marginal, "complement": ~critical, "all": jnp.ones_like(critical)}[mode]
    linear = _attend_linearly(FEATURE_MAPS[feature_map], query, key, value, seen, block_size)
    if projection is not None:
        projection = jnp.broadcast_to(projection, (query.shape[2], *projection.shape[-2:])).astype(linear.dtype)
        linear = jnp.einsum("bqhd,hde->bqhe", linear, projection, precision=jax.lax.Precision.HIGHEST)
    return (sparse.astype(linear.dtype) + linear).astype(query.dtype)


def _check_projection(projection: jax.Array | None, query: jax.Array, value: jax.Array) -> None:
    num_q_heads, dim = query.shape[2], value.shape[3]
    if projection is not None and projection.shape not in ((dim, dim), (num_q_heads, dim, dim)):
        raise ValueError(f"`projection` has shape {projection.shape}; it must be {(dim, dim)} or {(num_q_heads, dim, dim)}.")


def _classify_blocks(query, key, top_ratio: float, bottom_ratio: float, block_size: int) -> tuple[jax.Array, jax.Array, int]:
    """The critical and the marginal blocks, bool [batch, num_q_heads, num_q_blocks, num_kv_blocks], and how many are critical.

    Ties go to the lower id: it counts as higher.
    """
    query, key = jax.lax.stop_gradient((query, key))
    scores = pooled_logits(block_means(query, block_size), block_means(key, block_size))
    num_kv_blocks = num_blocks(key.shape[1], block_size)
    num_critical = max(1, int(top_ratio * num_kv_blocks))
    num_seen = max(num_kv_blocks - int(bottom_ratio * num_kv_blocks), num_critical)
    # A score that is NaN or -inf ranks nowhere: its block counts as negligible.
    critical = top_k_mask(scores, num_critical, jnp.bool_(True))
    return critical, top_k_mask(scores, num_seen, jnp.bool_(True)) & ~critical, num_critical


def _attend_linearly(feature_map, query, key, value, seen: jax.Array, block_size: int) -> jax.Array:
    """Linear attention of each block of queries to the blocks it sees: [batch, q_len, num_q_heads, value_head_dim].

    Args:
      feature_map: elementwise or over channels.
      query, key, value: as in `sparse_linear_attention`.
      seen: bool [batch, num_q_heads, num_q_blocks, num_kv_blocks].
      block_size: tokens per block.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    batch, q_len, num_q_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    query, key = feature_map(query.astype(dtype)), feature_map(key.astype(dtype))

    def blocked(x):
        """[batch, length, heads, dim] to [batch, num_blocks, block_size, heads, dim]; tokens past the end are 0."""
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, -x.shape[1] % block_size), (0, 0), (0, 0)])
        return x.reshape(batch, -1, block_size, *x.shape[2:])

    def product(equation, *operands):
        return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

    keys, values = blocked(key), blocked(value)
    # One more channel of ones: its sums are the denominator's.
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    sums = product("bktnd,bktne->bknde", keys, values)
    seen = seen.reshape(batch, num_kv_heads, -1, *seen.shape[2:]).astype(dtype)
    sums = product("bngqk,bknde->bqngde", seen, sums)
    queries = blocked(query).reshape(batch, -1, block_size, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    out = product("bqtngd,bqngde->bqtnge", queries, sums)
    out = out.reshape(batch, -1, num_q_heads, out.shape[-1])[:, :q_len]
    numerator, denominator = out[..., :-1], out[..., -1:]
    # Divided by something else first, so that no gradient is NaN.
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)
