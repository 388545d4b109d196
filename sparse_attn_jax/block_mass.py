"""`block_mass`: how much of each query's attention goes to each block of keys."""

import functools

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.query_rows import REDUCTIONS, reduce_rows
from sparse_attn_jax.scoring_problem import GROUP_REDUCTIONS, absolute_positions
from sparse_attn_jax.selection import num_blocks


def block_mass(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array | None = None,
    *,
    block_size: int = 64,
    q_block_size: int = 1,
    reduction: str = "sum",
    group_reduction: str | None = None,
    is_causal: bool = False,
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention probabilities, reduced over blocks of keys and of queries.

    p[h, i, j] = exp(scale * query[i, h] . key[j] - lse[i, h])      j visible to i, else 0
    mass[h, r, c] = reduce over the queries i of row r, of the sum or the maximum of p[h, i, j] over the keys j of block c

    "sum" with the lse of dense attention tells how much of it a selection keeps, and is the page score of DELTA; "max" is what
    the gates of SeerAttention learn to predict. A pass over all keys, cheaper than attention but quadratic as it is.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
      key: [batch, kv_len, num_kv_heads, head_dim].
      lse: [batch, q_len, num_q_heads], as `block_sparse_attention` returns it. That of a selection or with a bias gives masses
        relative to it, which may exceed 1. `None` takes it over the visible keys: dense attention.
      block_size: keys per column of the result, counted from key 0.
      q_block_size: queries per row of the result, counted from query 0. 1 is a row per query.
      reduction: "sum" or "max", over the keys of a block and over the queries of a row.
      group_reduction: "sum", "mean" or "max" over the query heads of a KV head, for each query and block of keys, or `None` for
        masses per query head.
      is_causal: keys after the query are invisible. False by default, as in `jax.nn`.
      q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]. `None` is kv_len - q_len.
      scale: multiplies the dot products. `None` is head_dim ** -0.5.

    Returns:
      float32 (float64 for float64 queries) [batch, num_q_heads (num_kv_heads with a group reduction), num_q_blocks,
      num_kv_blocks]. A query that sees nothing has no mass.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.

    Carries no gradient. Memory beyond the result is bounded: queries are taken some at a time.
    """
    checks.check_key(key)
    checks.check_query(query, key, "key")
    checks.check_q_offset(q_offset, query.shape[0], query.shape[1], key.shape[1])
    positions = absolute_positions(q_offset, query.shape[1], key.shape[1])
    return mass_at(
        query, key, lse, positions, block_size=block_size, q_block_size=q_block_size, reduction=reduction,
        group_reduction=group_reduction, is_causal=is_causal, scale=scale,
    )  # fmt: skip


def mass_at(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array | None,
    positions: jax.Array,
    *,
    block_size: int,
    q_block_size: int,
    reduction: str,
    group_reduction: str | None,
    is_causal: bool,
    scale: float | None,
) -> jax.Array:
    """`block_mass` of queries at any positions, int32 [batch or 1, q_len]."""
    checks.check_int("block_size", block_size, 1)
    checks.check_int("q_block_size", q_block_size, 1)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("group_reduction", group_reduction, GROUP_REDUCTIONS)
    checks.check_bool("is_causal", is_causal)
    checks.check_scale(scale)
    check_lse(lse, query)
    return _reduce_mass(
        *jax.lax.stop_gradient((query, key, lse)), positions, block_size=block_size, q_block_size=q_block_size,
        reduction=reduction, group_reduction=group_reduction, is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("block_size", "q_block_size", "reduction", "group_reduction", "is_causal", "scale")
)
def _reduce_mass(
    query, key, lse, positions, *, block_size: int, q_block_size: int, reduction: str, group_reduction: str | None,
    is_causal: bool, scale: float,
) -> jax.Array:  # fmt: skip
    batch, q_len, num_q_heads, _ = query.shape
    heads = num_q_heads if group_reduction is None else key.shape[2]
    num_kv_blocks = num_blocks(key.shape[1], block_size)
    if 0 in (batch, q_len, num_kv_blocks):
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        return jnp.zeros((batch, heads, num_blocks(q_len, q_block_size), num_kv_blocks), dtype)

    def masses_of(ids):
        """[batch, heads, queries, num_kv_blocks]."""
        query_rows, lse_rows, last = (
            None if x is None else jnp.take(x, ids, axis=1, mode="clip") for x in (query, lse, positions)
        )
        probability = _probabilities(query_rows, key, lse_rows, last if is_causal else None, scale)
        mass = _reduce_blocks(probability, block_size, reduction)
        if group_reduction is not None:
            mass = getattr(mass, group_reduction)(axis=2, keepdims=True)
        return mass.reshape(batch, heads, len(ids), num_kv_blocks)

    values_per_query = batch * num_q_heads * key.shape[1]
    return reduce_rows(
        masses_of, q_len=q_len, q_block_size=q_block_size, reduction=reduction, values_per_query=values_per_query
    )


def _probabilities(query: jax.Array, key: jax.Array, lse: jax.Array | None, last: jax.Array | None, scale: float) -> jax.Array:
    """[batch, num_kv_heads, group_size, q_len, kv_len], 0 where invisible.

    `last`, int32 [batch or 1, q_len], is the last position that each query sees; `None` is all.
    """
    batch, q_len, num_q_heads, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, q_len, key.shape[2], -1, head_dim)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
    logits = product("bqngd,bknd->bngqk", query, key) * jnp.asarray(scale, dtype)
    kv_ids = jnp.arange(key.shape[1], dtype=jnp.int32)
    visible = jnp.ones_like(kv_ids, bool) if last is None else kv_ids <= last[:, None, None, :, None]
    if lse is None:
        lse = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    else:
        lse = jnp.moveaxis(lse.reshape(batch, q_len, key.shape[2], -1), 1, 3)
    lse = lse[..., None].astype(dtype)
    return jnp.where(visible & (lse > -jnp.inf), jnp.exp(logits - lse), 0.0)


def check_lse(lse: jax.Array | None, query: jax.Array) -> None:
    """Raises `ValueError` unless `lse` is `None` or fits the query."""
    if lse is None:
        return
    checks.check_array("lse", lse, ("batch", "q_len", "num_q_heads"))
    if lse.shape != query.shape[:3]:
        raise ValueError(f"`lse` has shape {lse.shape}; the query's is {query.shape}, so it must be {query.shape[:3]}.")


def _reduce_blocks(values: jax.Array, block_size: int, reduction: str) -> jax.Array:
    """[..., kv_len] to [..., num_kv_blocks]; `values` are not negative."""
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % block_size)]
    values = jnp.pad(values, padding)
    return getattr(values.reshape(*values.shape[:-1], -1, block_size), reduction)(axis=-1)
