"""`infllm_v2` of OpenBMB's infllmv2_cuda_impl: scores of compressed keys, and of blocks; attention to chosen blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.api import block_sparse_attention, block_sparse_attention_varlen
from sparse_attn_jax.compat.conventions import (
    QKV,
    check_absent,
    check_dropout,
    check_flag,
    check_max_length,
    check_packed,
    check_pages,
    check_sequences,
    check_table,
    empty_rows_to_infinity,
    known,
    pack_sequences,
    pad_sequences,
    scale_of,
    soft_cap_of,
    window_of,
)
from sparse_attn_jax.page_tables import read_pages
from sparse_attn_jax.paged_attention import paged_block_sparse_attention
from sparse_attn_jax.paged_cache import PagedKVCache
from sparse_attn_jax.query_chunks import map_chunks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.validation import check_integers, check_qkv, is_array, require

BLOCK_SIZE = 64
KERNEL_SIZE, KERNEL_STRIDE = 32, 16
COARSE_KERNEL_SIZE, COARSE_KERNEL_STRIDE = 128, 64

# Queries whose scores for every query head are held at once.
CHUNK = 64


def infllmv2_attn_stage1(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    cu_seqlens_v: jax.Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = True,
    block_table: None = None,
    *,
    kv_lens: jax.Array | None = None,
) -> jax.Array:
    """The probability of each compressed key, summed over the query heads of its KV head, for packed sequences.

    p[n, i, j] = sum over the heads h of group n of exp(softmax_scale * q[i, h] . k[j, n] - lse[i, h])

    Compressed key j is the mean of the keys 16 j .. 16 j + 31; with `causal`, a query at position t sees it if 16 j + 31 <= t.
    lse is taken from the coarser compressed keys `v`, means of 64 j .. 64 j + 127, without correction for their number. A
    sequence with as many `v` as `k` has `v` compressed as `k`: pass `k` twice for the exact softmax. A query that sees none of
    `v` uses `k`.

    Unlike the original: visibility follows the positions of the queries, where the original counts from lengths and is exact
    only if the tokens before the queries are a multiple of 16 and the queries are not 15 more than one; otherwise it is up to
    one compressed key short, or lets future tokens in. For any other number of earlier tokens give `kv_lens`. Any group size
    will do, where the original wants 16. Scores are float32, whatever q is.

    Args:
      q: [total_q, num_heads, head_dim].
      k: [total_k, num_heads_k, head_dim], compressed keys.
      v: [total_v, num_heads_k, head_dim], coarser compressed keys: the original's use of its argument for values.
      cu_seqlens_q: int32 [batch + 1], where the queries of each sequence start, and the end.
      cu_seqlens_k: int32 [batch + 1], the same for k.
      cu_seqlens_v: int32 [batch + 1], the same for v.
      max_seqlen_q: most queries of a sequence, static.
      max_seqlen_k: most compressed keys of a sequence, static.
      dropout_p: 0.0.
      softmax_scale: multiplies q . k. `None` is head_dim ** -0.5.
      causal: compressed keys with a token after the query are invisible.
      window_size: (-1, -1).
      softcap: 0.0.
      alibi_slopes: `None`.
      deterministic: either value.
      return_attn_probs: True: they are what is returned.
      block_table: `None`.
      kv_lens: int32 [batch], keys of each sequence before compression, of which the queries are the last. Default: that the
        number of keys before the queries is a multiple of 16. Only read if `causal`.

    Returns:
      float32 [num_heads_k, total_q, max_seqlen_k], columns counted from the sequence's first; 0 where invisible.

    Raises:
      ValueError: an argument is wrong; the message names it.

    Carries no gradient, as the original.
    """
    check_dropout("dropout_p", dropout_p)
    check_flag("deterministic", deterministic)
    check_absent("stage 1 does not have it", alibi_slopes=alibi_slopes, block_table=block_table)
    require(window_of(window_size) is None, "window_size", window_size, "(-1, -1): stage 1 has no window")
    require(softcap == 0, "softcap", softcap, "0.0: stage 1 has no soft cap")
    require(return_attn_probs is True, "return_attn_probs", return_attn_probs, "True: the scores are what is returned")
    checks.check_bool("causal", causal)
    softmax_scale = scale_of(softmax_scale)
    check_qkv(q, k, k, packed=True, names=("q", "k", "k"))
    check_qkv(q, v, v, packed=True, names=("q", "v", "v"))
    require(v.shape[1] == k.shape[1], "v", v, f"of {k.shape[1]} heads, as `k`")
    batch = check_sequences(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, cu_seqlens_v=cu_seqlens_v)
    check_max_length("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    check_max_length("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    num_heads_k, total_q = k.shape[1], q.shape[0]
    if kv_lens is not None:
        is_list = is_array(kv_lens) and jnp.issubdtype(kv_lens.dtype, jnp.integer) and kv_lens.shape == (batch,)
        require(is_list, "kv_lens", kv_lens, f"integers [batch] = [{batch}]")
    if 0 in (max_seqlen_q, max_seqlen_k):
        return jnp.zeros((num_heads_k, total_q, max_seqlen_k), jnp.float32)

    q, k, v = jax.lax.stop_gradient((q, k, v))
    q_lens, k_lens, v_lens = (jnp.diff(bounds) for bounds in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_v))
    if kv_lens is None:
        kv_lens = KERNEL_STRIDE * (k_lens + 1) + q_lens % KERNEL_STRIDE
    queries = pad_sequences(q, cu_seqlens_q, max_seqlen_q).astype(jnp.float32)
    queries = queries * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    queries = queries.reshape(*queries.shape[:2], num_heads_k, -1, q.shape[-1])
    fine = pad_sequences(k, cu_seqlens_k, max_seqlen_k).astype(jnp.float32)
    coarse = pad_sequences(v, cu_seqlens_v, min(max_seqlen_k, v.shape[0])).astype(jnp.float32)
    is_fine = v_lens == k_lens
    coarse_size = jnp.where(is_fine, KERNEL_SIZE, COARSE_KERNEL_SIZE)
    coarse_stride = jnp.where(is_fine, KERNEL_STRIDE, COARSE_KERNEL_STRIDE)
    chunk = min(CHUNK, max_seqlen_q)

    def score(start):
        some = jax.lax.dynamic_slice_in_dim(queries, start, chunk, axis=1)
        position = (kv_lens - q_lens)[:, None] + start + jnp.arange(chunk, dtype=jnp.int32)
        position = position if causal else jnp.full_like(position, jnp.iinfo(jnp.int32).max)
        logits = _unit_logits(some, fine, k_lens, position, KERNEL_SIZE, KERNEL_STRIDE)
        coarse_lse = _lse(_unit_logits(some, coarse, v_lens, position, coarse_size, coarse_stride))
        lse = jnp.where(jnp.isneginf(coarse_lse), _lse(logits), coarse_lse)
        probability = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse))
        return probability.sum(axis=2).swapaxes(2, 3)

    scores = map_chunks(score, max_seqlen_q, chunk)  # [batch, num_heads_k, max_seqlen_q, max_seqlen_k]
    return pack_sequences(jnp.moveaxis(scores, 1, 2), cu_seqlens_q, total_q).swapaxes(0, 1)


def _unit_logits(query, units, count, position, kernel_size, kernel_stride) -> jax.Array:
    """[batch, num_heads_k, group, queries, units], -inf where invisible; sizes are ints or arrays [batch]."""
    logits = jnp.einsum("bqngd,bund->bngqu", query, units, precision=jax.lax.Precision.HIGHEST)
    unit = jnp.arange(units.shape[1], dtype=jnp.int32)
    last_token = unit * jnp.reshape(kernel_stride, (-1, 1)) + jnp.reshape(kernel_size, (-1, 1)) - 1  # [batch or 1, units]
    visible = (unit < count[:, None])[:, None] & (last_token[:, None] <= position[..., None])  # [batch, queries, units]
    return jnp.where(visible[:, None, None], logits, -jnp.inf)


def _lse(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def max_pooling_1d(
    input: jax.Array, cache_len: int, local_blocks: int, init_blocks: int, block_size: int = 64, stride: int = 16
) -> jax.Array:
    """Scores of blocks: the maximum over the compressed keys that overlap each, +inf for first and local blocks.

    Query i, at position i + cache_len, has +inf in the first `init_blocks`, and in the blocks from `local_blocks` before its
    own to its own: `local_blocks` + 1 of them, as in the original. (`selectors.InfLLMV2` counts its own block inside
    `num_local_blocks`.) Blocks after its own are not left out; with the scores of a causal first stage they have 0.

    Unlike the original, takes any floating dtype.

    Args:
      input: [num_heads, q_len, k_len], scores of compressed keys of one sequence, `stride` tokens apart and 2 * stride long.
      cache_len: tokens before the queries, an int.
      local_blocks: blocks before the query's own that are kept with it.
      init_blocks: leading blocks that are kept.
      block_size: tokens per block, a multiple of `stride`.
      stride: tokens between the starts of neighbouring compressed keys.

    Returns:
      [num_heads, q_len, ceil((q_len + cache_len) / block_size)], dtype of input; -inf in a block without a compressed key.

    Raises:
      ValueError: an argument is wrong; the message names it.
    """
    checks.check_array("input", input, ("num_heads", "q_len", "k_len"))
    for name, value in (("cache_len", cache_len), ("local_blocks", local_blocks), ("init_blocks", init_blocks)):
        checks.check_int(name, value, 0)
    checks.check_int("stride", stride, 1)
    checks.check_int("block_size", block_size, 1)
    require(block_size % stride == 0, "block_size", block_size, f"a multiple of `stride`, {stride}")
    q_len, k_len = input.shape[1:]
    per_block = block_size // stride
    block = jnp.arange(num_blocks(q_len + cache_len, block_size), dtype=jnp.int32)
    # The key before a block's first is longer than its stride, so it ends in the block.
    unit = block[:, None] * per_block - 1 + jnp.arange(per_block + 1, dtype=jnp.int32)
    unit = jnp.where(unit >= 0, unit, k_len)
    pooled = jnp.take(input, unit, axis=2, mode="fill", fill_value=-jnp.inf).max(axis=-1)
    own = (cache_len + jnp.arange(q_len, dtype=jnp.int32))[:, None] // block_size
    is_kept = (block < init_blocks) | ((block <= own) & (block >= own - local_blocks))
    return jnp.where(is_kept, jnp.inf, pooled).astype(input.dtype)


def infllmv2_attn_varlen_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: jax.Array | None = None,
    topk_idx: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array, None]:
    """Attention of each query to its chosen blocks of 64 keys, over packed sequences.

    Unlike the original: lse has the layout that the original documents, whatever the group size (the original's kernel writes
    another one for lists of blocks); block ids may repeat, and those outside the sequence do not count.

    Args:
      q: [total_q, num_heads, head_dim].
      k: [total_k, num_heads_k, head_dim], or pages [num_pages, page_size, num_heads_k, head_dim] with `block_table`. Query head
        h reads KV head h // (num_heads // num_heads_k).
      v: as k.
      cu_seqlens_q: int32 [batch + 1], where each sequence starts, and the end.
      cu_seqlens_k: int32 [batch + 1]; with `block_table` only the lengths count.
      max_seqlen_q: most queries of a sequence, static.
      max_seqlen_k: most keys of a sequence, static.
      dropout_p: 0.0.
      softmax_scale: multiplies q . k. `None` is head_dim ** -0.5.
      causal: query i sees key j if j <= i + (keys - queries of its sequence): aligned to the bottom right corner.
      window_size: (left, right) tokens around that corner's diagonal, -1 for no bound.
      softcap: c > 0 replaces a scaled logit s by c * tanh(s / c); 0.0 is no cap.
      alibi_slopes: `None`.
      deterministic: either value; gradients always are.
      return_attn_probs: also return lse, and `None` for the matrix that the original fills only with dropout.
      block_table: int32 [batch, pages of a sequence], which pages hold its keys. Any page size will do; the keys are copied. An
        entry that is no page has no keys.
      topk_idx: int32 [num_heads_k, total_q, blocks], ids of blocks within each query's sequence, -1 for none, in any order.
        `None` is all blocks.

    Returns:
      out [total_q, num_heads, head_dim], or (out, softmax_lse, None), softmax_lse float32 [num_heads, total_q], +inf for a
      query that sees nothing.

    Raises:
      ValueError: an argument is wrong; the message names it.

    Differentiable in q, k and v; never in `topk_idx`.
    """
    check_dropout("dropout_p", dropout_p)
    check_flag("deterministic", deterministic)
    check_absent("the op has no bias by query and key", alibi_slopes=alibi_slopes)
    checks.check_bool("causal", causal)
    check_packed("q", q)
    if block_table is None:
        check_qkv(q, k, v, packed=True, names=QKV)
    else:
        check_pages(q, k=k, v=v)
    num_sequences = check_sequences(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_max_length("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    check_max_length("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    if topk_idx is not None:
        shape = (k.shape[-2], q.shape[0])
        is_list = is_array(topk_idx) and len(topk_idx.shape) == 3 and topk_idx.shape[:2] == shape
        is_list = is_list and topk_idx.dtype == jnp.int32
        require(is_list, "topk_idx", topk_idx, f"int32 [num_heads_k, total_q, blocks] = {[*shape, 'blocks']}")
    options = dict(local_window_size=window_of(window_size), scale=scale_of(softmax_scale))
    options |= dict(logits_soft_cap=soft_cap_of(softcap), return_residual=True)
    if block_table is not None:
        check_table("block_table", block_table, num_sequences)
        _check_fits(cu_seqlens_k, block_table.shape[1] * k.shape[1])
        queries = pad_sequences(q, cu_seqlens_q, max_seqlen_q)
        lists = None if topk_idx is None else _lists_by_sequence(topk_idx, cu_seqlens_q, max_seqlen_q)
        lengths = jnp.diff(cu_seqlens_q), jnp.diff(cu_seqlens_k)
        results = _attend_copy(queries, k, v, block_table, *lengths, lists, causal, **options)
        out, lse = (pack_sequences(x, cu_seqlens_q, q.shape[0], fill) for x, fill in zip(results, (0, -jnp.inf)))
    else:
        if topk_idx is None:
            selection = _every_block(q.shape[0], num_sequences, max_seqlen_k)
        else:
            selection = BlockSelection(topk_idx[None], q_block_size=1, kv_block_size=BLOCK_SIZE)
        bounds = cu_seqlens_q, cu_seqlens_k
        out, lse = block_sparse_attention_varlen(q, k, v, selection, *bounds, is_causal=causal, **options)
    return (out, empty_rows_to_infinity(lse).T, None) if return_attn_probs else out


def infllmv2_attn_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: int | jax.Array | None = None,
    cache_batch_idx: jax.Array | None = None,
    cache_leftpad: None = None,
    block_table: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    topk_idx: jax.Array | None = None,
) -> Any:
    """Attention of new queries to their chosen blocks of 64 keys of a cache, after appending new keys to it.

    Unlike the original: the caches with the new keys and values are returned, not written in place; a cache may be of any page
    size, where the original wants a multiple of 256. Rotate before the call: rotary embeddings are not applied here.

    Causal attention, and that of a single query, is `paged_block_sparse_attention`, which reads chosen blocks only, if the page
    size, or `seqlen_cache`, divides 64 or is a multiple of it, or there are no lists. Otherwise the keys are copied.

    Args:
      q: [batch, seqlen_q, num_heads, head_dim].
      k_cache: [batch_cache, seqlen_cache, num_heads_k, head_dim], or pages [num_pages, page_size, num_heads_k, head_dim] with
        `block_table`.
      v_cache: as k_cache.
      k: [batch, seqlen_new, num_heads_k, head_dim], appended at `cache_seqlens`; what exceeds the capacity is dropped.
      v: as k, given together with it.
      rotary_cos, rotary_sin: `None`.
      cache_seqlens: an int, or int32 [batch]: keys in the cache before `k`. `None`, only without `k`, is all of them.
      cache_batch_idx: int32 [batch], the row of the cache for each of the batch; a row that is none has no keys. Default: the
        same one.
      cache_leftpad: `None`.
      block_table: int32 [batch, pages of a sequence], which pages hold its keys; an entry that is no page has no keys.
      softmax_scale: multiplies q . k. `None` is head_dim ** -0.5.
      causal: query i sees key j if j <= i + (keys after appending) - seqlen_q.
      window_size: (left, right) tokens around that diagonal, -1 for no bound.
      softcap: c > 0 replaces a scaled logit s by c * tanh(s / c); 0.0 is no cap.
      rotary_interleaved: not read without rotary embeddings, as in the original.
      alibi_slopes: `None`.
      num_splits: into how many parts the keys are split; 0 is chosen by size. At most 1 where the keys are copied.
      return_softmax_lse: also return lse.
      topk_idx: int32 [batch, num_heads_k, seqlen_q, blocks], or without the first axis for a batch of 1: block ids within each
        sequence, -1 for none. `None` is all blocks.

    Returns:
      out [batch, seqlen_q, num_heads, head_dim]; with `return_softmax_lse` followed by softmax_lse float32
      [batch, num_heads, seqlen_q], +inf for a query that sees nothing; with `k` followed by k_cache and v_cache. One result is
      returned as it is, several as a tuple.

    Raises:
      ValueError: an argument is wrong; the message names it.
    """
    check_absent("rotate before the call", rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    check_absent("the op has no bias by query and key", alibi_slopes=alibi_slopes)
    check_absent("start sequences at the first key of the cache", cache_leftpad=cache_leftpad)
    check_flag("rotary_interleaved", rotary_interleaved)
    checks.check_bool("causal", causal)
    checks.check_int("num_splits", num_splits, 0)
    require((k is None) == (v is None), "v", v, "given together with `k`")
    both = cache_batch_idx is not None and block_table is not None
    require(not both, "cache_batch_idx", cache_batch_idx, "None with `block_table`")
    checks.check_array("q", q, ("batch", "seqlen_q", "num_heads", "head_dim"))
    check_pages(q, k_cache=k_cache, v_cache=v_cache)
    batch, seqlen_q = q.shape[:2]
    if k is not None:
        _check_new(batch, k, v, k_cache, v_cache)
    if block_table is None:
        rows = jnp.arange(batch, dtype=jnp.int32) if cache_batch_idx is None else cache_batch_idx
        is_list = is_array(rows) and rows.dtype == jnp.int32 and rows.shape == (batch,)
        require(is_list, "cache_batch_idx", rows, f"int32 [batch] = [{batch}]")
        block_table = rows[:, None]
    check_table("block_table", block_table, batch)
    page_size = k_cache.shape[1]
    lengths = _cache_lengths(cache_seqlens, batch, block_table.shape[1] * page_size, None if k is None else k.shape[1])
    cache = PagedKVCache(k_cache, v_cache, block_table, lengths)
    cache = cache if k is None else cache.append(k, v)
    lists = None if topk_idx is None else _cache_lists(topk_idx, (batch, k_cache.shape[2], seqlen_q))

    options = dict(local_window_size=window_of(window_size), scale=scale_of(softmax_scale))
    options |= dict(logits_soft_cap=soft_cap_of(softcap), return_residual=True)
    divides = page_size % BLOCK_SIZE == 0 or BLOCK_SIZE % page_size == 0
    # A last query sees all keys, so that a single one need not be told.
    if (causal or seqlen_q == 1) and (divides or lists is None):
        options |= dict(selection_block_size=BLOCK_SIZE if divides else None, num_splits=num_splits or None)
        pages = cache.key_pages, cache.value_pages, cache.block_tables, cache.lengths
        out, lse = paged_block_sparse_attention(q, *pages, lists, **options)
    else:
        require(num_splits in (0, 1), "num_splits", num_splits, "0 or 1: keys that are read densely are not split")
        pages = cache.key_pages, cache.value_pages, cache.block_tables
        out, lse = _attend_copy(q, *pages, seqlen_q, cache.lengths, lists, causal or seqlen_q == 1, **options)
    results = (out, *((empty_rows_to_infinity(lse).swapaxes(1, 2),) if return_softmax_lse else ()))
    results += () if k is None else (cache.key_pages, cache.value_pages)
    return results if len(results) > 1 else out


def _check_new(batch: int, k: Any, v: Any, k_cache: jax.Array, v_cache: jax.Array) -> None:
    """What is appended fits the caches."""
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        shape = [batch, "seqlen_new", *cache.shape[2:]]
        fits = is_array(x) and len(x.shape) == 4 and x.dtype == cache.dtype
        fits = fits and [x.shape[0], "seqlen_new", *x.shape[2:]] == shape
        require(fits, name, x, f"{cache.dtype}{shape}, as `{name}_cache`")
    require(v.shape[1] == k.shape[1], "v", v, f"of {k.shape[1]} new tokens, as `k`")


def _cache_lengths(cache_seqlens: int | jax.Array | None, batch: int, capacity: int, num_new: int | None) -> jax.Array:
    """Keys of each sequence before the new ones: int32 [batch]."""
    if cache_seqlens is not None:
        check_integers("cache_seqlens", cache_seqlens, (batch,))
    if num_new is not None:
        require(cache_seqlens is not None, "cache_seqlens", None, "given with `k`: it says where to append")
        lengths, most = known(cache_seqlens), capacity - num_new
        fits = lengths is None or int(lengths.max(initial=0)) <= most
        require(fits, "cache_seqlens", cache_seqlens, f"at most {most}: the cache has room for {capacity} keys")
    lengths = jnp.asarray(capacity if cache_seqlens is None else cache_seqlens, jnp.int32)
    return jnp.broadcast_to(lengths, (batch,))


def _cache_lists(topk_idx: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    needed = f"int32 [batch, num_heads_k, seqlen_q, blocks] = {[*shape, 'blocks']}"
    require(is_array(topk_idx), "topk_idx", topk_idx, needed)
    lists = topk_idx[None] if topk_idx.ndim == 3 and shape[0] == 1 else topk_idx
    is_list = lists.ndim == 4 and lists.shape[:3] == shape and lists.dtype == jnp.int32
    require(is_list, "topk_idx", topk_idx, needed)
    return lists


def _check_fits(cu_seqlens_k: jax.Array, capacity: int) -> None:
    """No sequence is longer than its row of the table, where that is known; otherwise the keys beyond do not exist."""
    bounds = known(cu_seqlens_k)
    longest = 0 if bounds is None else int(np.diff(bounds).max())
    needed = f"of sequences of at most {capacity} keys: `block_table` has no room for {longest}"
    require(longest <= capacity, "cu_seqlens_k", cu_seqlens_k, needed)


def _lists_by_sequence(topk_idx: jax.Array, cu_seqlens_q: jax.Array, max_seqlen_q: int) -> jax.Array:
    """[num_heads_k, total_q, blocks] -> [batch, num_heads_k, max_seqlen_q, blocks], empty past a sequence's end."""
    return pad_sequences(topk_idx.swapaxes(0, 1), cu_seqlens_q, max_seqlen_q, fill=-1).swapaxes(1, 2)


def _attend_copy(
    q: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    block_tables: jax.Array,
    q_lens: int | jax.Array,
    kv_lens: jax.Array,
    lists: jax.Array | None,
    causal: bool,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a dense copy of the keys, for what the paged op does not do: queries that see later keys, odd pages.

    Args:
      q: [batch, seqlen_q, num_heads, head_dim], of which the first `q_lens` are queries, the last of `kv_lens` keys.
      lists: int32 [batch, num_heads_k, seqlen_q, blocks], or `None` for all blocks.
    """
    batch, seqlen_q = q.shape[:2]
    (keys, has_page), (values, _) = (read_pages(pages, block_tables) for pages in (key_pages, value_pages))
    exists = has_page & (jnp.arange(keys.shape[1], dtype=jnp.int32) < kv_lens[:, None])
    options |= dict(query_segment_ids=jnp.ones((batch, seqlen_q), jnp.int32), key_value_segment_ids=exists.astype(jnp.int32))
    if lists is None:
        selection = select_every_block(seqlen_q, keys.shape[1], BLOCK_SIZE)
    else:
        selection = BlockSelection(lists, q_block_size=1, kv_block_size=BLOCK_SIZE)
    return block_sparse_attention(q, keys, values, selection, is_causal=causal, q_offset=kv_lens - q_lens, **options)


def _every_block(num_tokens: int, num_sequences: int, max_kv_len: int) -> BlockSelection:
    """All blocks for all packed queries: rows are alike, so it does not matter whose they are."""
    ids = jnp.arange(max(num_blocks(max_kv_len, BLOCK_SIZE), 1), dtype=jnp.int32)
    rows = num_tokens // BLOCK_SIZE + num_sequences
    indices = jnp.broadcast_to(ids, (1, 1, rows, ids.size))
    return BlockSelection(indices, q_block_size=BLOCK_SIZE, kv_block_size=BLOCK_SIZE)
