"""The loss that trains the indexer of DeepSeek sparse attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors.dsa_indexer import check_index_arrays, index_scores
from sparse_attn_jax.validation import require

# Elements held at once.
CHUNK_ELEMENTS = 2**24


def index_kl_loss(
    index_query: jax.Array,
    index_key: jax.Array,
    weights: jax.Array,
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    *,
    selection: BlockSelection | None = None,
    is_causal: bool = False,
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """How far an indexer's distribution over keys is from that of the attention, for each query.

    loss[t] = KL(p[t] || softmax_s(score[t, s])), score as in `selectors.DSAIndexer`,
    p[t, s] = sum over the heads h of exp(scale * query[t, h] . key[s] - lse[t, h]), divided by its sum over s

    over the keys s that query t sees: all of them without a selection, which is the warm-up of DeepSeek-V3.2, or those
    selected, as in its sparse stage. Nothing flows back to query, key and lse.

    Args:
      index_query: [batch, q_len, num_index_heads, index_dim], any floating dtype.
      index_key: [batch, kv_len, index_dim].
      weights: [batch, q_len, num_index_heads]; the original scales them, see `selectors.DSAIndexer`.
      query: [batch, q_len, num_q_heads, head_dim], of the attention.
      key: [batch, kv_len, num_kv_heads, head_dim]. Query head h reads KV head h // group_size.
      lse: [batch, q_len, num_q_heads], as `block_sparse_attention` returns it as well: of dense attention for the warm-up, of
        sparse attention over `selection` for the sparse stage. It decides how much each head counts.
      selection: what `DSAIndexer` selected. A token listed twice counts once. Default: all keys.
      is_causal: a query sees no key after it, as in the attention. Default: False.
      q_offset: position of query 0 among the keys: an int, or an integer array [] or [batch]. Default: kv_len - q_len.
      scale: that of the attention. Default: head_dim ** -0.5.

    Returns:
      float32 [batch, q_len]; 0 for a query that sees no key. The loss of a batch is its mean.

    Raises:
      ValueError: an argument is wrong; the message names it.

    Differentiable in index_query, index_key and weights. Works on some queries at a time, backward too: memory is linear in the
    lengths.
    """
    check_index_arrays(index_query, index_key, weights)
    _check_attention(index_query, index_key, query, key, lse)
    checks.check_bool("is_causal", is_causal)
    checks.check_scale(scale)
    batch, q_len, kv_len = *index_query.shape[:2], index_key.shape[1]
    checks.check_q_offset(q_offset, batch, q_len, kv_len)
    if selection is not None:
        _check_selection(selection, batch, q_len)
    if 0 in (batch, q_len, kv_len):
        return jnp.zeros((batch, q_len), jnp.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    rows = dict(index_query=index_query, weights=weights, query=query, lse=lse)
    rows["positions"] = jnp.broadcast_to(absolute_positions(q_offset, q_len, kv_len), (batch, q_len))
    if selection is not None:
        # Sorted, so that a token that is listed twice shows.
        rows["ids"] = jnp.broadcast_to(jnp.sort(selection.indices[:, 0]), (batch, *selection.indices.shape[2:]))
    return _map_rows(functools.partial(_loss_of_rows, index_key, key, scale, is_causal), rows, _chunk_length(rows, key))


def _loss_of_rows(index_key: jax.Array, key: jax.Array, scale: float, is_causal: bool, rows: dict[str, jax.Array]) -> jax.Array:
    """The loss of some queries: float32 [batch, queries]."""
    positions, ids = rows["positions"][..., None], rows.get("ids")
    if ids is None:
        ids = jnp.arange(key.shape[1], dtype=jnp.int32)
        visible = ids >= 0
    else:
        before = jnp.pad(ids[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=-1)
        visible = (ids != before) & (ids >= 0) & (ids < key.shape[1])
        take = jax.vmap(lambda x, ids: x.at[ids].get(mode="clip"))
        index_key, key = take(index_key, ids), take(key, ids)
    if is_causal:
        visible = visible & (ids <= positions)
    scores = index_scores(rows["index_query"], index_key, rows["weights"])
    mass = _head_sums(rows["query"], key, rows["lse"], scale)
    return _divergence(mass, scores, visible)


def _head_sums(query: jax.Array, key: jax.Array, lse: jax.Array, scale: float) -> jax.Array:
    """The attention's probabilities summed over heads: float32 [batch, queries, keys]."""
    batch, num_queries, num_q_heads, head_dim = query.shape
    num_kv_heads = key.shape[-2]
    grouped = query.astype(jnp.float32).reshape(batch, num_queries, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    axes = "bsnd" if key.ndim == 4 else "bqsnd"
    precision = jax.lax.Precision.HIGHEST
    logits = scale * jnp.einsum(f"bqngd,{axes}->bqngs", grouped, key.astype(jnp.float32), precision=precision)
    lse = lse.astype(jnp.float32).reshape(*grouped.shape[:-1], 1)
    # A head that saw nothing has no say.
    return jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, jnp.inf)).sum(axis=(2, 3))


def _divergence(mass: jax.Array, scores: jax.Array, visible: jax.Array) -> jax.Array:
    """KL(mass / its sum || softmax(scores)) over the visible keys, 0 where there is none."""
    mass = jnp.where(visible, mass, 0.0)
    total = mass.sum(axis=-1, keepdims=True)
    is_counted = total > 0
    target = mass / jnp.where(is_counted, total, 1.0)
    # A row that does not count takes all keys, so that its gradient is 0 and not NaN.
    scores = jnp.where(visible | ~is_counted, scores, -jnp.inf)
    log_index = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    terms = jax.scipy.special.xlogy(target, target) - target * jnp.where(target > 0, log_index, 0.0)
    return terms.sum(axis=-1)


def _map_rows(loss_of_rows: Any, rows: dict[str, jax.Array], chunk: int) -> jax.Array:
    """`loss_of_rows` of all queries, `chunk` at a time; what a step computes is computed again when it is differentiated."""
    batch, q_len = rows["positions"].shape
    padding = -q_len % chunk

    def split(x):
        # Copies of the last query, whose loss is dropped.
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    losses = jax.lax.map(jax.checkpoint(loss_of_rows), jax.tree.map(split, rows))  # [num_chunks, batch, chunk]
    return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :q_len]


def _chunk_length(rows: dict[str, jax.Array], key: jax.Array) -> int:
    batch, q_len, num_index_heads, index_dim = rows["index_query"].shape
    per_key = num_index_heads + rows["query"].shape[2]
    num_keys = key.shape[1]
    if "ids" in rows:
        num_keys = rows["ids"].shape[-1]
        per_key += index_dim + key.shape[2] * key.shape[3]  # gathered for each query
    return min(max(CHUNK_ELEMENTS // (batch * num_keys * per_key), 1), q_len)


def _check_attention(index_query: Any, index_key: Any, query: Any, key: Any, lse: Any) -> None:
    """The attention's arrays fit each other and the indexer's."""
    checks.check_key(key)
    checks.check_query(query, key, "key")
    checks.check_array("lse", lse, ("batch", "q_len", "num_q_heads"))
    batch, q_len = index_query.shape[:2]
    kv_len = index_key.shape[1]
    require(query.shape[:2] == (batch, q_len), "query", query, f"of batch {batch} and q_len {q_len}, as `index_query`")
    require(key.shape[1] == kv_len, "key", key, f"of kv_len {kv_len}, as `index_key`")
    require(lse.shape == query.shape[:3], "lse", lse, f"of shape {list(query.shape[:3])}, as `query`")


def _check_selection(selection: Any, batch: int, q_len: int) -> None:
    require(isinstance(selection, BlockSelection), "selection", selection, "a BlockSelection or None")
    indices, sizes = selection.indices, (selection.q_block_size, selection.kv_block_size)
    if sizes != (1, 1):
        raise ValueError(
            f"`selection` has query and KV blocks of {sizes} tokens; they must be (1, 1), as `DSAIndexer` makes them."
        )
    fits = indices.ndim == 4 and indices.shape[0] in (1, batch) and indices.shape[1:3] == (1, q_len)
    require(fits, "selection.indices", indices, f"of shape [1 or {batch}, 1, {q_len}, num_slots]")
