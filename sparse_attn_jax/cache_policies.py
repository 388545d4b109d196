"""What to keep of a KV cache: SnapKV, ZipVL and DELTA as functions that give token or page ids.

A policy gives ids, ascending, -1 last. There are two ways to attend to what it keeps; both give the same numbers.

In place: the ids are a selection of blocks of one token. Nothing moves, so positions and causality are those of the full cache.

    selection = BlockSelection(ids[:, :, None], q_block_size=q_len, kv_block_size=1)      # ids [batch, num_kv_heads, num_kept]
    out = block_sparse_attention(query, key, value, selection, is_causal=True)

Evicted: `gather_tokens` moves the kept tokens to the front of a smaller cache, in their order, so that it is filled up to their
number, and decoding goes on there. Rotary embeddings are those of the original positions, which the keys have in them already.

    key, value = gather_tokens(key, ids), gather_tokens(value, ids)
    num_kept = (ids[:, 0] >= 0).sum(axis=-1)                                              # every head keeps as many
    ... write step t's key and value at num_kept + t, then
    out = block_sparse_attention(query, key, value, Dense()(query, key), is_causal=True, q_offset=num_kept + t)
"""

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.block_mass import block_mass, check_lse, mass_at
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.selectors.pooling import check_fraction

POOLINGS = ("avg", "max")
HEAD_REDUCTIONS = ("sum", "max")


def snapkv_keep(
    query: jax.Array,
    key: jax.Array,
    *,
    capacity: int,
    window: int = 32,
    pooling: str = "avg",
    kernel_size: int = 5,
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The tokens that SnapKV keeps of a prompt: its end, and what the end attends to.

    score[j] = pool over the tokens around j of the sum over the last `window` queries i and the group's heads h of p[h, i, j]
    The `capacity - window` best tokens before the window are kept, the lower id first among equals, and the whole window.

    SnapKV chooses per query head, from keys repeated for each; here the heads that share a KV head vote for one list, by their
    sum, before pooling. Its average pooling divides by `kernel_size` at the ends too, as here.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], the prompt's queries or its last ones; the last `window` are read.
      key: [batch, kv_len, num_kv_heads, head_dim].
      capacity: tokens to keep, the window included. A prompt that is not longer is kept as it is.
      window: queries that observe.
      pooling: "avg" or "max", over `kernel_size` tokens.
      kernel_size: odd. 1 is no pooling. SnapKV has 5 for "avg" and 7 for "max".
      q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]: keys from q_offset + q_len on are
        padding. `None` is kv_len - q_len.
      scale: multiplies the dot products. `None` is head_dim ** -0.5.

    Returns:
      int32 [batch, num_kv_heads, capacity], ascending, -1 last where the prompt is shorter.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.

    Carries no gradient.
    """
    _check_call(query, key, q_offset)
    checks.check_int("window", window, 1)
    checks.check_int("capacity", capacity, window)
    checks.check_choice("pooling", pooling, POOLINGS)
    checks.check_int("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` is {kernel_size}; it must be odd.")
    q_len, kv_len = query.shape[1], key.shape[1]
    if q_len < window:
        raise ValueError(f"`query` has {q_len} queries; `window` is {window}, so it must have as many.")
    positions = absolute_positions(q_offset, q_len, kv_len)[:, -window:]
    options = dict(block_size=1, q_block_size=window, reduction="sum", group_reduction="sum", is_causal=True, scale=scale)
    mass = mass_at(query[:, -window:], key, None, positions, **options)[:, :, 0]
    ids = jnp.arange(kv_len, dtype=jnp.int32)
    length = positions[:, -1:, None] + 1  # [batch or 1, 1, 1]
    is_prefix = ids < length - window
    score = jnp.where(is_prefix, _pool_tokens(jnp.where(is_prefix, mass, 0.0), pooling, kernel_size), -jnp.inf)
    score = jnp.where(~is_prefix & (ids < length), jnp.inf, score)
    return _highest_ids(score, capacity)


def _pool_tokens(mass: jax.Array, pooling: str, kernel_size: int) -> jax.Array:
    """Over `kernel_size` neighbours along the last axis, with zeros beyond the ends."""
    half = kernel_size // 2
    padded = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(half, half)])
    shifted = [padded[..., i : i + mass.shape[-1]] for i in range(kernel_size)]
    if pooling == "avg":
        return sum(shifted) / kernel_size
    return jnp.stack(shifted).max(axis=0)


def zipvl_keep(
    query: jax.Array,
    key: jax.Array,
    *,
    threshold: float,
    max_kept: int | None = None,
    positions: jax.Array | None = None,
    normalize: bool = True,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The tokens that matter in a layer, as many as it takes: ZipVL.

    mass[j] = sum over the probe's queries i and all heads of p[h, i, j]
    count = the fewest tokens that together have at least `threshold` of all mass
    The `count` tokens of the highest mass[j] / (queries of the probe that see j) are kept, the lower id first among equals.

    The list is one for all heads and queries of the layer, in ZipVL for the prefill's attention as well as for the cache.

    Args:
      query: [batch, num_probes, num_q_heads, head_dim], the probe: ZipVL takes recent and random queries of the prompt.
      key: [batch, kv_len, num_kv_heads, head_dim].
      threshold: share of the attention to keep, in [0, 1]. ZipVL has about 0.96 to 0.98.
      max_kept: the length of the list, which is static; more are cut off. `None` is kv_len.
      positions: int32 [num_probes] or [batch, num_probes], absolute positions of the probe's queries, in any order. `None`: the
        last num_probes.
      normalize: choose by mass per query that sees the token, lest early tokens, which more queries see, are favoured. False
        chooses by mass.
      scale: multiplies the dot products. `None` is head_dim ** -0.5.

    Returns:
      ids, int32 [batch, max_kept], ascending, -1 last, and how many there are, int32 [batch]. `ids[:, None]` has an axis of
      heads.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.

    Carries no gradient. A token that no query of the probe sees is never kept.
    """
    _check_call(query, key, None)
    kv_len, num_probes = key.shape[1], query.shape[1]
    check_fraction("threshold", threshold)
    max_kept = kv_len if max_kept is None else max_kept
    checks.check_int("max_kept", max_kept, 1)
    checks.check_bool("normalize", normalize)
    if positions is None:
        positions = absolute_positions(None, num_probes, kv_len)
    positions = _check_positions(positions, query.shape[0], num_probes)
    options = dict(block_size=1, q_block_size=max(num_probes, 1), reduction="sum", group_reduction="sum", is_causal=True)
    mass = mass_at(query, key, None, positions, **options, scale=scale).sum(axis=(1, 2))  # [batch, kv_len]
    viewers = (positions[:, None] >= jnp.arange(kv_len, dtype=jnp.int32)[:, None]).sum(axis=-1)  # [batch or 1, kv_len]
    up_to = jnp.cumsum(jnp.sort(mass, axis=-1, descending=True), axis=-1)
    total = up_to.max(axis=-1, keepdims=True, initial=0.0)
    count = 1 + (up_to < threshold * total).sum(axis=-1, dtype=jnp.int32)
    score = mass / jnp.maximum(viewers, 1) if normalize else mass
    score = jnp.where(viewers > 0, score, -jnp.inf)
    ids = _highest_ids(score, max_kept, jnp.where(total[:, 0] > 0, count, 0))
    return ids, (ids >= 0).sum(axis=-1, dtype=jnp.int32)


def _check_positions(positions: jax.Array, batch: int, num_probes: int) -> jax.Array:
    """int32 [batch or 1, num_probes]."""
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"`positions` has dtype {positions.dtype}; it must be an integer dtype.")
    if positions.shape not in ((num_probes,), (1, num_probes), (batch, num_probes)):
        raise ValueError(
            f"`positions` has shape {positions.shape}; it must be [num_probes] or [batch, num_probes] = {[batch, num_probes]}."
        )
    return positions.astype(jnp.int32).reshape(-1, num_probes)


def delta_pages(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array | None = None,
    *,
    page_size: int = 16,
    num_pages: int = 64,
    num_recent: int = 8,
    head_reduction: str = "sum",
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The pages that the layers after one of dense attention decode from: DELTA.

    score[c] = sum over queries i and keys j of page c, of the sum over all heads h of p[h, i, j]
    The last `num_recent` pages are kept, and the others of the highest score, `num_pages` in all.

    A layer of dense attention has lse already, from which its probabilities are recomputed. The layers up to the next dense
    one share the list:

        ids = delta_pages(query, key, lse)
        selection = BlockSelection(ids[:, None, None], q_block_size=q_len, kv_block_size=16)  # for those layers, all heads

    Ids are logical, so a paged cache translates them with its block table. The original's code takes each key's maximum over
    the heads before it sums over the page, which is "max" here; "sum" is the attention that the page gets. It subtracts 1e-7
    per page so that ties go to the lower id; here they do without.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], of one decoding step, usually one token. Query head h reads KV head
        h // group_size.
      key: [batch, kv_len, num_kv_heads, head_dim].
      lse: [batch, q_len, num_q_heads], of the dense layer. `None` computes it.
      page_size: tokens per page.
      num_pages: the length of the list, the recent pages included.
      num_recent: pages up to the one of the last query, itself included, that are always kept.
      head_reduction: "sum" or "max".
      q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]: keys from q_offset + q_len on are
        not filled yet. `None` is kv_len - q_len.
      scale: multiplies the dot products. `None` is head_dim ** -0.5.

    Returns:
      int32 [batch, num_pages], ascending, -1 last.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.

    Carries no gradient.
    """
    _check_call(query, key, q_offset)
    checks.check_int("page_size", page_size, 1)
    checks.check_int("num_recent", num_recent, 1)
    checks.check_int("num_pages", num_pages, num_recent)
    checks.check_choice("head_reduction", head_reduction, HEAD_REDUCTIONS)
    check_lse(lse, query)
    q_len, kv_len = query.shape[1], key.shape[1]
    options = dict(is_causal=True, q_offset=q_offset, scale=scale, group_reduction=head_reduction)
    if head_reduction == "sum":
        mass = block_mass(query, key, lse, block_size=page_size, q_block_size=max(q_len, 1), **options).sum(axis=(1, 2))
    else:
        tokens = block_mass(query, key, lse, block_size=1, **options).max(axis=1).sum(axis=1)  # [batch, kv_len]
        tokens = jnp.pad(tokens, [(0, 0), (0, -kv_len % page_size)])
        mass = tokens.reshape(tokens.shape[0], -1, page_size).sum(axis=-1)
    ids = jnp.arange(num_blocks(kv_len, page_size), dtype=jnp.int32)
    own = absolute_positions(q_offset, q_len, kv_len)[:, -1:] // page_size  # [batch or 1, 1]
    score = jnp.where(ids > own - num_recent, jnp.inf, mass)
    return _highest_ids(jnp.where(ids <= own, score, -jnp.inf), num_pages)


def gather_tokens(x: jax.Array, ids: jax.Array) -> jax.Array:
    """The tokens of a cache that a policy keeps, in the order of `ids`.

    Args:
      x: [batch, length, heads, head_dim], keys or values.
      ids: int32 [batch, num_kept], or [batch, heads, num_kept] for a list per head. -1, and any other id outside [0, length),
        is an empty place.

    Returns:
      [batch, num_kept, heads, head_dim], dtype of `x`; 0 in empty places.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.

    Differentiable in `x`.
    """
    if x.ndim != 4:
        raise ValueError(f"`x` has shape {x.shape}; it must be [batch, length, heads, head_dim].")
    batch, length, heads, _ = x.shape
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"`ids` has dtype {ids.dtype}; it must be an integer dtype.")
    if ids.ndim not in (2, 3) or ids.shape[:-1] not in ((batch,), (batch, heads)):
        raise ValueError(
            f"`ids` has shape {ids.shape}; `x` is {x.shape}, so it must be [{batch}, num_kept] or [{batch}, {heads}, num_kept]."
        )
    # [batch, num_kept, heads or 1, 1]
    ids = ids[:, :, None, None] if ids.ndim == 2 else ids.swapaxes(1, 2)[..., None]
    inside = (ids >= 0) & (ids < length)
    if length == 0:
        return jnp.zeros((batch, ids.shape[1], heads, x.shape[3]), x.dtype)
    found = jnp.take_along_axis(x, jnp.where(inside, ids, 0), axis=1)
    return jnp.where(inside, found, jnp.zeros_like(found))


def _check_call(query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None) -> None:
    checks.check_key(key)
    checks.check_query(query, key, "key")
    checks.check_q_offset(q_offset, query.shape[0], query.shape[1], key.shape[1])
    if query.shape[1] == 0:
        raise ValueError("`query` has no queries; it must have at least one.")


def _highest_ids(scores: jax.Array, capacity: int, count: jax.Array | None = None) -> jax.Array:
    """The ids of the highest scores, the lower one first among equals; -inf and NaN are not chosen.

    Args:
      scores: [..., n].
      capacity: the length of the lists.
      count: int32 [...], at most so many are chosen.

    Returns:
      int32 [..., capacity], ascending, -1 last.
    """
    num_scores = scores.shape[-1]
    values, ids = jax.lax.top_k(jnp.where(scores > -jnp.inf, scores, -jnp.inf), min(capacity, num_scores))
    is_chosen = values > -jnp.inf
    if count is not None:
        is_chosen &= jnp.arange(ids.shape[-1], dtype=jnp.int32) < count[..., None]
    ids = jnp.sort(jnp.where(is_chosen, ids, num_scores), axis=-1).astype(jnp.int32)
    padding = [(0, 0)] * (ids.ndim - 1) + [(0, capacity - ids.shape[-1])]
    return jnp.pad(jnp.where(ids < num_scores, ids, -1), padding, constant_values=-1)
