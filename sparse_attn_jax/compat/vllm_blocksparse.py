"""`blocksparse_attention` of vLLM (Phi-3-small), until it was removed: a static pattern as CSR, and attention to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.api import block_sparse_attention_varlen
from sparse_attn_jax.compat.conventions import QKV, check_max_length, check_sequences, known, locate_tokens, pad_rows, scale_of
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.validation import check_qkv, describe, is_array, require

Layout = tuple[jax.Array, jax.Array]


def get_sparse_attn_mask(
    n_heads: int,
    q_len: int,
    max_seqlen: int,
    dtype: Any,
    device: Any,
    block_size: int = 64,
    local_blocks: int = 4,
    vert_stride: int = 4,
    homo_head: bool = True,
    return_dense: bool = False,
    dense_mask_type: str = "binary",
) -> tuple[Layout, jax.Array, jax.Array | None]:
    """The local-strided pattern as CSR and as masks.

    Head h keeps block j <= i for block i if i - j < local_blocks or (j + h * step + 1) is a multiple of vert_stride.
    The step from head to head is 0 with `homo_head`, else max(1, vert_stride // n_heads). All arguments are static, and what
    is returned is constant, also under `jax.jit`. `selectors.LocalStrided` is the same pattern without these arrays.

    Unlike the original: the dense mask is of the last `q_len` of `max_seqlen` tokens also where `max_seqlen` is no multiple of
    the block, where the original takes rows of the padding.

    Args:
      n_heads: query heads.
      q_len: queries, the last of `max_seqlen` tokens.
      max_seqlen: keys.
      dtype: of the masks.
      device: `None`, or a `jax.Device` or `jax.sharding.Sharding` to put the arrays on.
      block_size: tokens per block.
      local_blocks: near blocks, the query's own included.
      vert_stride: one in so many blocks is seen from everywhere after it.
      homo_head: one pattern for all heads.
      return_dense: also make the mask by tokens.
      dense_mask_type: "binary", 1 where kept, or "bias", 0 where kept and else -inf.

    Returns:
      (crow, col): int32 [n_heads, ceil(q_len / block_size) + 1] and [n_heads, ids of the fullest head], rows of the last blocks
        of queries, padded with -1.
      The mask of all blocks, [n_heads, n, n] with n = ceil(max_seqlen / block_size), [n, n] with `homo_head`.
      The mask by tokens, causal, [n_heads, q_len, max_seqlen], or `None`.

    Raises:
      ValueError: an argument is wrong; the message names it.
    """
    sizes = dict(n_heads=n_heads, q_len=q_len, max_seqlen=max_seqlen, block_size=block_size)
    for name, size in (sizes | dict(local_blocks=local_blocks, vert_stride=vert_stride)).items():
        checks.check_int(name, size, 1)
    require(q_len <= max_seqlen, "q_len", q_len, f"at most `max_seqlen`, {max_seqlen}")
    is_device = device is None or isinstance(device, jax.Device | jax.sharding.Sharding)
    require(is_device, "device", device, "None, a jax.Device or a jax.sharding.Sharding")
    checks.check_bool("homo_head", homo_head)
    checks.check_bool("return_dense", return_dense)
    checks.check_choice("dense_mask_type", dense_mask_type, ("binary", "bias"))
    step = 0 if homo_head else max(1, vert_stride // n_heads)
    head, i, j = np.ogrid[:n_heads, : num_blocks(max_seqlen, block_size), : num_blocks(max_seqlen, block_size)]
    mask = (j <= i) & ((i - j < local_blocks) | ((j + head * step + 1) % vert_stride == 0))
    crow, col = _to_csr(mask[:, -num_blocks(q_len, block_size) :])
    dense = _token_mask(mask, q_len, max_seqlen, block_size, dense_mask_type) if return_dense else None
    # Constants also while tracing, so that the attention knows the longest row.
    with jax.ensure_compile_time_eval():
        layout = tuple(jnp.asarray(x, jnp.int32, device=device) for x in (crow, col))
        mask = jnp.asarray(mask[0] if homo_head else mask, dtype, device=device)
        return layout, mask, None if dense is None else jnp.asarray(dense, dtype, device=device)


def _to_csr(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [heads, rows, columns] -> row offsets [heads, rows + 1] and column ids [heads, capacity], padded with -1."""
    crow = np.pad(mask.sum(axis=2).cumsum(axis=1), ((0, 0), (1, 0)))
    col = np.full((mask.shape[0], crow[:, -1].max()), -1)
    for row, head in zip(col, mask, strict=True):
        ids = np.nonzero(head)[1]
        row[: ids.size] = ids
    return crow, col


def _token_mask(mask: np.ndarray, q_len: int, kv_len: int, block_size: int, kind: str) -> np.ndarray:
    position, key = np.arange(kv_len - q_len, kv_len), np.arange(kv_len)
    kept = mask[:, position[:, None] // block_size, key // block_size] & (key <= position[:, None])
    return kept if kind == "binary" else np.where(kept, 0.0, -np.inf)


def blocksparse_flash_attn_varlen_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_k: jax.Array,
    cu_seqlens_q: jax.Array | None,
    sm_scale: float | None,
    sparse_layout: Layout,
    *,
    block_size: int = 64,
    q_block_size: int | None = None,
    max_seqlen: int | None = None,
) -> jax.Array:
    """Causal attention to the blocks of a CSR pattern, over packed sequences; the last query sees the last key.

    A query at position t of its sequence reads row t // q_block_size of its head.

    Unlike the original: causality holds in every block, where the original with `q_block_size` > `block_size` shows later keys
    to the first queries of a row; a sequence may have any number of queries, where the original wants one or all; there is a
    backward pass.

    Args:
      q: [total_q, num_heads, head_dim].
      k: [total_k, num_kv_heads, head_dim]. Query head h reads KV head h // (num_heads // num_kv_heads).
      v: [total_k, num_kv_heads, head_dim]; its head_dim may differ.
      cu_seqlens_k: int32 [batch + 1], where each sequence's keys start, and the end.
      cu_seqlens_q: int32 [batch + 1], the same for the queries. `None` is one query per sequence if there are as many as
        sequences, else those of the keys. Prefer `None` for a prefill: otherwise, unless both bounds are known while tracing,
        lists are made for every token, where blocks of queries could share them.
      sm_scale: multiplies q . k. `None` is head_dim ** -0.5.
      sparse_layout: (crow, col) of `get_sparse_attn_mask` with q_len = max_seqlen; a row names a block once. Traced, lists are
        as long as the keys; known, as the longest row.
      block_size: keys per column id.
      q_block_size: queries per row. `None` is `block_size`.
      max_seqlen: most keys of a sequence. `None`: as many as the layout has rows for.

    Returns:
      [total_q, num_heads, head_dim].

    Raises:
      ValueError: an argument is wrong; the message names it.

    Differentiable in q, k and v.
    """
    q_block_size = block_size if q_block_size is None else q_block_size
    checks.check_int("block_size", block_size, 1)
    checks.check_int("q_block_size", q_block_size, 1)
    sm_scale = scale_of(sm_scale, "sm_scale")
    check_qkv(q, k, v, packed=True, names=QKV)
    given = {} if cu_seqlens_q is None else dict(cu_seqlens_q=cu_seqlens_q)
    check_sequences(cu_seqlens_k=cu_seqlens_k, **given)
    crow, col = _check_layout(sparse_layout, q.shape[1], k.shape[1])
    if max_seqlen is not None:
        checks.check_int("max_seqlen", max_seqlen, 0)
    covered = (crow.shape[1] - 1) * q_block_size
    is_covered = max_seqlen is None or max_seqlen <= covered
    require(is_covered, "max_seqlen", max_seqlen, f"at most {covered}, which `sparse_layout` has rows for")
    check_max_length("max_seqlen", covered if max_seqlen is None else max_seqlen, cu_seqlens_k)

    is_prefill = _is_prefill(q, k, cu_seqlens_q, cu_seqlens_k)
    if is_prefill:
        cu_seqlens_q = cu_seqlens_k
    elif cu_seqlens_q is None:
        cu_seqlens_q = jnp.arange(cu_seqlens_k.shape[0], dtype=jnp.int32)
    rows = _layout_rows(crow, col, num_blocks(k.shape[0], block_size))
    if is_prefill:
        batch = cu_seqlens_k.shape[0] - 1
        indices = pad_rows(jnp.broadcast_to(rows, (batch, *rows.shape)), q.shape[0], q_block_size)
        selection = BlockSelection(indices, q_block_size=q_block_size, kv_block_size=block_size)
    else:
        row = _token_positions(cu_seqlens_q, cu_seqlens_k, q.shape[0]) // q_block_size
        row = jnp.where(row >= 0, row, rows.shape[1])
        indices = jnp.take(rows, row, axis=1, mode="fill", fill_value=-1)[None]
        selection = BlockSelection(indices, q_block_size=1, kv_block_size=block_size)
    return block_sparse_attention_varlen(q, k, v, selection, cu_seqlens_q, cu_seqlens_k, is_causal=True, scale=sm_scale)


def _check_layout(layout: Any, num_heads: int, num_kv_heads: int) -> Layout:
    """(crow, col) by query head, by KV head or with a single head."""
    is_pair = isinstance(layout, tuple | list) and len(layout) == 2 and all(map(is_array, layout))
    is_pair = is_pair and all(len(x.shape) == 2 and jnp.issubdtype(x.dtype, jnp.integer) for x in layout)
    found = tuple(map(describe, layout)) if isinstance(layout, tuple | list) else layout
    require(is_pair, "sparse_layout", found, "a pair (crow, col) of integers [heads, n]")
    crow, col = layout
    heads = sorted({1, num_kv_heads, num_heads})
    fits = crow.shape[0] == col.shape[0] and crow.shape[0] in heads and crow.shape[1] > 0
    require(fits, "sparse_layout", found, f"of {' or '.join(map(str, heads))} heads, and a row at least")
    return crow, col


def _is_prefill(q: jax.Array, k: jax.Array, cu_seqlens_q: jax.Array | None, cu_seqlens_k: jax.Array) -> bool:
    """Whether every sequence is known to have as many queries as keys."""
    if cu_seqlens_q is None:
        is_decoding = q.shape[0] == cu_seqlens_k.shape[0] - 1
        needed = "given: there are neither as many queries as sequences nor as many as keys"
        require(is_decoding or q.shape[0] == k.shape[0], "cu_seqlens_q", None, needed)
        return not is_decoding
    bounds = known(cu_seqlens_q), known(cu_seqlens_k)
    is_same = bounds[0] is not None and bounds[1] is not None and np.array_equal(*bounds)
    return cu_seqlens_q is cu_seqlens_k or is_same


def _token_positions(cu_seqlens_q: jax.Array, cu_seqlens_k: jax.Array, num_tokens: int) -> jax.Array:
    """The position of each packed query among its sequence's keys."""
    sequence, position = locate_tokens(cu_seqlens_q, num_tokens)
    return position + (jnp.diff(cu_seqlens_k) - jnp.diff(cu_seqlens_q))[sequence]


def _layout_rows(crow: jax.Array, col: jax.Array, num_kv_blocks: int) -> jax.Array:
    """CSR -> lists: int32 [heads, rows, slots]."""
    bounds = known(crow)
    longest = num_kv_blocks if bounds is None else int(np.diff(bounds).max(initial=1))
    slots = max(min(longest, col.shape[1]), 1)
    position = crow[:, :-1, None] + jnp.arange(slots, dtype=jnp.int32)
    position = jnp.where(position < crow[:, 1:, None], position, col.shape[1])
    take = jax.vmap(lambda ids, where: jnp.take(ids, where, mode="fill", fill_value=-1))
    return take(jnp.asarray(col, jnp.int32), position)
