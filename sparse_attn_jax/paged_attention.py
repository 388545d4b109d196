"""Attention of the newest tokens over keys and values in pages: the op of decoding, dense or over selected blocks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import dispatch, validation
from sparse_attn_jax.paged_cache import check_pages
from sparse_attn_jax.paged_problem import PagedOperands, PagedProblem
from sparse_attn_jax.problem import MAX_LENGTH, SUPPORTED_DTYPES, device_of
from sparse_attn_jax.selection_checks import check_int

Window = tuple[int | jax.Array, int | jax.Array] | int


def paged_block_sparse_attention(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    page_selection: jax.Array | None,
    *,
    selection_block_size: int | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: Window | None = None,
    num_sinks: int | jax.Array = 0,
    num_splits: int | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of the last tokens of each sequence over the keys of selected blocks, which lie in pages of a pool.

    Query i of sequence b is at position p = seq_lens[b] - q_len + i. Its key j, the one at key_pages[t, j % page_size] with
    t = block_tables[b, j // page_size], counts if and only if

      j <= p                                                           it is not later than the query,
      0 <= j < max_pages * page_size and 0 <= t < num_pages            it exists,
      j // selection_block_size is in page_selection[b, h, i]          it is selected (h the query head's list),
      p - left <= j or j < num_sinks                                   it is in the window, or a sink.

      out[i] = sum_j softmax_j(scale * query[i] . key[j]) value[j]     over the keys that count

    The queries' own keys and values are in the pages already, and `seq_lens` counts them. A query at a position below 0, one
    of a sequence shorter than q_len, sees nothing. Nothing is read through a table's entry that is no page, nor from a page
    that no selected block needs; work and memory are proportional to the selected blocks, not to the pool or the table.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], float16, bfloat16, float32 or float64: the q_len last tokens of each
        sequence; 1, or a few that are speculated. Query head h reads KV head h // (num_q_heads // num_kv_heads).
      key_pages: [num_pages, page_size, num_kv_heads, head_dim], dtype of query.
      value_pages: [num_pages, page_size, num_kv_heads, value_head_dim], dtype of query.
      block_tables: int32 [batch, max_pages], the physical page of each logical one; any value that is no page is none.
      seq_lens: int32 [batch], tokens of each sequence, the queries included. Negative is 0; a length beyond the table is
        taken as it is, and the keys beyond do not exist.
      page_selection: int32 [batch, heads, q_len or 1, num_slots], heads in {1, num_kv_heads, num_q_heads}: logical blocks of
        `selection_block_size` tokens, counted from each sequence's first. In any order; -1 is an empty slot, a duplicate
        counts once, an id that is no block is ignored. `None` is all blocks: dense attention.
      selection_block_size: tokens per selected block: a multiple or a divisor of page_size. Default: page_size.
      scale: multiplies query . key. Default: head_dim ** -0.5.
      logits_soft_cap: c > 0 replaces a scaled logit s by c * tanh(s / c). Default: no cap.
      local_window_size: (left, right), as in `block_sparse_attention`; `right` hides nothing, as no key is later than its
        query. Each an int of at least 0, an int32 array [num_q_heads] or None; an int is both. Default: no window.
      num_sinks: the first keys, visible whatever the window says. An int or int32 [num_q_heads]. Default: 0.
      num_splits: into how many parts each list's blocks are split, equal to within a block, which are computed side by side
        and merged by their lse. The result depends on it by rounding only. Default: chosen by size.
      return_residual: also return lse.
      implementation: "xla", "mosaic" or "cuda", or a sequence of them to try in order. Default: the first that can.

    Returns:
      out [batch, q_len, num_q_heads, value_head_dim], dtype of query; with `return_residual`, (out, lse) with lse
      [batch, q_len, num_q_heads], the natural log of the sum of exponentials, float32 (float64 for float64 inputs).
      A query for which no key counts has out 0 and lse -inf. NaN in keys and values that no query sees changes nothing.

    Raises:
      ValueError: an argument that no implementation could accept; the message names it, what was found and what is needed.
        Values of integer arrays are not checked but guarded: none of them reads out of bounds.
      NotImplementedError: none of the implementations asked for can run this call; the message lists every reason.

    For inference: it has no gradient. Softmax statistics are float32. Deterministic. The list of logical blocks is that of
    Quest and of Ascend's select-attention operators, which must not list a block twice; the equal split is LeanAttention's.
    """
    problem = make_problem(
        query,
        key_pages,
        value_pages,
        block_tables,
        seq_lens,
        page_selection,
        selection_block_size=selection_block_size,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        local_window_size=local_window_size,
        num_sinks=num_sinks,
        num_splits=num_splits,
    )
    name = dispatch.choose(problem, implementation)
    left = local_window_size[0] if isinstance(local_window_size, Sequence) else local_window_size
    operands = PagedOperands(
        query=query,
        key_pages=key_pages,
        value_pages=value_pages,
        block_tables=block_tables,
        seq_lens=jnp.clip(seq_lens, 0, MAX_LENGTH),
        page_selection=page_selection,
        window_left=_per_head(left, problem.num_q_heads) if problem.has_window else None,
        num_sinks=_per_head(num_sinks, problem.num_q_heads) if problem.has_sinks else None,
    )
    if 0 in (problem.batch, problem.q_len, problem.kv_len):
        out, lse = _empty(problem)
    else:
        out, lse = dispatch.get(name).attend_pages(problem, operands)
    return (out, lse) if return_residual else out


def make_problem(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_tables: Any,
    seq_lens: Any,
    page_selection: Any,
    *,
    selection_block_size: Any,
    scale: Any,
    logits_soft_cap: Any,
    local_window_size: Any,
    num_sinks: Any,
    num_splits: Any,
) -> PagedProblem:
    """Checks all arguments of `paged_block_sparse_attention` and describes the call."""
    _check_pools(query, key_pages, value_pages)
    batch, q_len, num_q_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, value_head_dim = value_pages.shape
    for name, x, shape in (("block_tables", block_tables, (batch, "max_pages")), ("seq_lens", seq_lens, (batch,))):
        needed = f"int32 of shape [{', '.join(map(str, shape))}], with the {batch} batch rows of `query`"
        fits = validation.is_array(x) and x.dtype == jnp.int32 and len(x.shape) == len(shape) and x.shape[0] == batch
        validation.require(fits, name, x, needed)
    max_pages = block_tables.shape[1]
    check_pages(num_pages, page_size, max_pages)
    block_size = _check_block_size(selection_block_size, page_size)
    _check_selection(page_selection, batch, q_len, num_q_heads, num_kv_heads)
    validation.check_window(local_window_size, num_sinks, num_q_heads)
    scale, logits_soft_cap = validation.check_options(True, scale, logits_soft_cap, head_dim)
    if num_splits is not None:
        check_int("num_splits", num_splits, 1)
    left = local_window_size[0] if isinstance(local_window_size, Sequence) else local_window_size
    shape = (1, 1, None) if page_selection is None else page_selection.shape[1:]
    return PagedProblem(
        batch=batch,
        q_len=q_len,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        dtype=query.dtype.name,
        num_pages=num_pages,
        page_size=page_size,
        max_pages=max_pages,
        selection_block_size=block_size,
        **dict(zip(("selection_heads", "selection_rows", "num_slots"), shape)),
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        has_window=left is not None,
        # Sinks are exceptions to a window.
        has_sinks=left is not None and not (isinstance(num_sinks, int) and num_sinks == 0),
        num_splits=num_splits,
        **device_of(query)._asdict(),
    )


def _check_pools(query: Any, key_pages: Any, value_pages: Any) -> None:
    require, is_array = validation.require, validation.is_array
    pool = "[num_pages, page_size, num_kv_heads, head_dim]"
    arrays = (("query", query, "[batch, q_len, num_q_heads, head_dim]"), ("key_pages", key_pages, pool))
    for name, x, axes in (*arrays, ("value_pages", value_pages, pool)):
        require(is_array(x) and len(x.shape) == 4, name, x, f"an array {axes}")
        require(x.dtype.name in SUPPORTED_DTYPES, name, x, f"of dtype {', '.join(SUPPORTED_DTYPES)}")
        require(x.dtype == query.dtype, name, x, f"of dtype {query.dtype}, as `query`")
        # Batch and q_len may be 0.
        require(0 not in x.shape[-2:] and (name == "query" or 0 not in x.shape), name, x, f"{axes}, none of them 0")
    require(key_pages.shape[3] == query.shape[3], "key_pages", key_pages, f"of head_dim {query.shape[3]}, as `query`")
    needed = f"of shape {[*key_pages.shape[:3], 'value_head_dim']}, as `key_pages`"
    require(value_pages.shape[:3] == key_pages.shape[:3], "value_pages", value_pages, needed)
    num_kv_heads = key_pages.shape[2]
    needed = f"of a multiple of {num_kv_heads} heads: `key_pages` has {num_kv_heads}"
    require(query.shape[2] % num_kv_heads == 0, "query", query, needed)


def _check_block_size(block_size: Any, page_size: int) -> int:
    if block_size is None:
        return page_size
    check_int("selection_block_size", block_size, 1)
    fits = block_size % page_size == 0 or page_size % block_size == 0
    validation.require(fits, "selection_block_size", block_size, f"a multiple or a divisor of the page size, {page_size}")
    validation.require(block_size <= MAX_LENGTH, "selection_block_size", block_size, f"at most {MAX_LENGTH}")
    return block_size


def _check_selection(selection: Any, batch: int, q_len: int, num_q_heads: int, num_kv_heads: int) -> None:
    if selection is None:
        return
    name, axes = "page_selection", f"int32 [batch, heads, {q_len} or 1, num_slots], or None"
    validation.require(validation.is_array(selection) and len(selection.shape) == 4, name, selection, axes)
    validation.require(selection.dtype == jnp.int32, name, selection, "of dtype int32")
    validation.require(selection.shape[0] == batch, name, selection, f"of batch size {batch}, as `query`")
    heads = sorted({1, num_kv_heads, num_q_heads})
    validation.require(selection.shape[1] in heads, name, selection, f"of {' or '.join(map(str, heads))} heads")
    validation.require(selection.shape[2] in (1, q_len), name, selection, f"of 1 row or {q_len}, as many as there are queries")
    validation.require(selection.shape[3] >= 1, name, selection, "of at least one slot")


def _per_head(x: int | jax.Array, num_q_heads: int) -> jax.Array:
    return jnp.broadcast_to(jnp.clip(jnp.asarray(x), 0, MAX_LENGTH).astype(jnp.int32), (num_q_heads,))


def _empty(problem: PagedProblem) -> tuple[jax.Array, jax.Array]:
    rows = (problem.batch, problem.q_len, problem.num_q_heads)
    lse_dtype = jnp.float64 if problem.dtype == "float64" else jnp.float32
    return jnp.zeros((*rows, problem.value_head_dim), problem.dtype), jnp.full(rows, -jnp.inf, lse_dtype)
