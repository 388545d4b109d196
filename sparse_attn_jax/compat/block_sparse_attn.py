"""`block_sparse_attn` of MIT's Block-Sparse-Attention: dense, streaming and block-masked heads side by side."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.api import block_sparse_attention_varlen
from sparse_attn_jax.compat.conventions import (
    QKV,
    check_dropout,
    check_flag,
    check_max_length,
    check_sequences,
    empty_rows_to_infinity,
    known,
    pad_rows,
    pad_sequences,
    scale_of,
)
from sparse_attn_jax.problem import MAX_LENGTH
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.validation import check_qkv, is_array, require

BLOCK_SIZE = 128
DENSE, STREAMING, BLOCK_MASK = 0, -1, 1

Result = jax.Array | tuple[jax.Array, jax.Array, None]


def block_sparse_attn_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    head_mask_type: Any,
    streaming_info: Any,
    base_blockmask: jax.Array | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    exact_streaming: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention whose heads are dense, streaming or block-masked, over packed sequences, in blocks of 128.

    With b = 128, s sinks, l local, and d keys of a sequence in excess of its queries, its query i sees, in a streaming head,

      blocks, causal:      KV blocks [0, s) and (floor((t + d) / b) - l, floor((t + d + b - 1) / b)], t = b * floor(i / b)
      blocks, not causal:  the sequence's first s and last l KV blocks
      exact, causal:       keys j < s and the l keys i + d - l < j <= i + d

    Causality, j <= i + d, holds inside blocks.

    Unlike the original: where d is no multiple of 128, a streaming head also sees the block of its tile's first queries, which
    the original leaves out, so that with l = 1 they may see no local key at all; exact streaming has a backward pass; any head
    size and dtype of the op will do.

    Args:
      q: [total_q, num_heads, head_dim].
      k: [total_k, num_heads_k, head_dim]. Query head h reads KV head h // (num_heads // num_heads_k).
      v: [total_k, num_heads_k, head_dim].
      cu_seqlens_q: int32 [batch + 1], where each sequence starts, and the end.
      cu_seqlens_k: int32 [batch + 1].
      head_mask_type: ints [num_heads] known while tracing: 0 dense, -1 streaming, 1 block mask.
      streaming_info: ints [2 * num_heads] known while tracing: sinks and local of each head, in blocks, or in tokens if
        `exact_streaming`; those of heads that do not stream are not read. May be `None` if none streams.
      base_blockmask: bool [batch, heads of type 1, ceil(max_seqlen_q_ / 128), ceil(max_seqlen_k_ / 128)]; the k-th head of type
        1 has base_blockmask[:, k]. `None` if there are none.
      max_seqlen_q_: most queries of a sequence, static.
      max_seqlen_k_: most keys of a sequence, static.
      p_dropout: 0.0.
      deterministic: either value; gradients always are.
      softmax_scale: multiplies q . k. `None` is head_dim ** -0.5.
      is_causal: align the mask to the bottom right corner.
      exact_streaming: `streaming_info` counts tokens; needs `is_causal`.
      return_attn_probs: also return lse, and `None` for the matrix that the original fills only with dropout.

    Returns:
      out [total_q, num_heads, head_dim], or (out, softmax_lse, None), softmax_lse float32 [batch, num_heads, max_seqlen_q_],
      +inf for a query that sees nothing and past a sequence's end.

    Raises:
      ValueError: an argument is wrong; the message names it.

    Differentiable in q, k and v.
    """
    check_dropout("p_dropout", p_dropout)
    check_flag("deterministic", deterministic)
    flags = dict(is_causal=is_causal, exact_streaming=exact_streaming, return_attn_probs=return_attn_probs)
    for name, flag in flags.items():
        checks.check_bool(name, flag)
    softmax_scale = scale_of(softmax_scale)
    check_qkv(q, k, v, packed=True, names=QKV)
    batch = check_sequences(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, bounds, max_length in (("q", cu_seqlens_q, max_seqlen_q_), ("k", cu_seqlens_k, max_seqlen_k_)):
        check_max_length(f"max_seqlen_{name}_", max_length, bounds)
    require(is_causal or not exact_streaming, "is_causal", is_causal, "True with exact streaming, which looks back only")
    kinds = _head_kinds(head_mask_type, q.shape[1])
    sinks, local = _streaming_counts(streaming_info, kinds)
    masked = _masked_heads(base_blockmask, kinds, batch, max_seqlen_q_, max_seqlen_k_)

    window = dict(local_window_size=None, num_sinks=0)
    if exact_streaming and (kinds == STREAMING).any():
        left = np.where(kinds == STREAMING, local - 1, MAX_LENGTH)
        window = dict(local_window_size=(jnp.asarray(left, jnp.int32), None), num_sinks=jnp.asarray(sinks, jnp.int32))
    lengths = jnp.diff(cu_seqlens_q), jnp.diff(cu_seqlens_k)
    visible = _streaming_blocks(kinds, sinks, local, *lengths, max_seqlen_q_, max_seqlen_k_, is_causal, exact_streaming)
    if masked is not None:
        visible = visible.at[:, np.flatnonzero(kinds == BLOCK_MASK)].set(masked)
    selection = BlockSelection.from_block_mask(
        visible,
        q_block_size=BLOCK_SIZE,
        kv_block_size=BLOCK_SIZE,
        num_slots=_num_slots(kinds, sinks, local, visible.shape[-1], exact_streaming),
    )
    indices = pad_rows(selection.indices, q.shape[0], BLOCK_SIZE)
    selection = BlockSelection(indices, q_block_size=BLOCK_SIZE, kv_block_size=BLOCK_SIZE)
    options = dict(is_causal=is_causal, scale=softmax_scale, return_residual=return_attn_probs, **window)
    result = block_sparse_attention_varlen(q, k, v, selection, cu_seqlens_q, cu_seqlens_k, **options)
    if not return_attn_probs:
        return result
    out, lse = result
    lse = pad_sequences(empty_rows_to_infinity(lse), cu_seqlens_q, max_seqlen_q_, fill=jnp.inf)
    return out, lse.swapaxes(1, 2), None


def token_streaming_attn_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    head_mask_type: Any,
    streaming_info: Any,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    return_attn_probs: bool = False,
) -> Result:
    """Causal attention of dense and streaming heads, whose sinks and local keys are counted in tokens.

    `block_sparse_attn_func` with `exact_streaming` and without block masks. Unlike the original, it has a backward pass.

    Args:
      q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q_, max_seqlen_k_, deterministic, softmax_scale, return_attn_probs: as in
        `block_sparse_attn_func`.
      head_mask_type: ints [num_heads]: 0 dense, -1 streaming.
      streaming_info: ints [2 * num_heads]: sink tokens and local tokens, its own included, of each head.

    Returns:
      As `block_sparse_attn_func`.

    Raises:
      ValueError: an argument is wrong.
    """
    bounds = q, k, v, cu_seqlens_q, cu_seqlens_k
    sizes = max_seqlen_q_, max_seqlen_k_, 0.0
    options = dict(is_causal=True, exact_streaming=True, return_attn_probs=return_attn_probs)
    options |= dict(deterministic=deterministic, softmax_scale=softmax_scale)
    return block_sparse_attn_func(*bounds, head_mask_type, streaming_info, None, *sizes, **options)


def block_streaming_attn_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    head_mask_type: Any,
    streaming_info: Any,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = True,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of dense and streaming heads, whose sinks and local keys are counted in blocks of 128.

    `block_sparse_attn_func` without block masks; causal unless told otherwise, as the original.

    Args:
      q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q_, max_seqlen_k_, p_dropout, deterministic, softmax_scale, is_causal,
        return_attn_probs: as in `block_sparse_attn_func`.
      head_mask_type: ints [num_heads]: 0 dense, -1 streaming.
      streaming_info: ints [2 * num_heads]: sink blocks and local blocks of each head.

    Returns:
      As `block_sparse_attn_func`.

    Raises:
      ValueError: an argument is wrong.
    """
    bounds = q, k, v, cu_seqlens_q, cu_seqlens_k
    sizes = max_seqlen_q_, max_seqlen_k_, p_dropout
    options = dict(is_causal=is_causal, return_attn_probs=return_attn_probs)
    options |= dict(deterministic=deterministic, softmax_scale=softmax_scale)
    return block_sparse_attn_func(*bounds, head_mask_type, streaming_info, None, *sizes, **options)


def _head_kinds(head_mask_type: Any, num_heads: int) -> np.ndarray:
    kinds = known(head_mask_type)
    require(kinds is not None, "head_mask_type", head_mask_type, "known while tracing")
    is_valid = kinds.shape == (num_heads,) and np.isin(kinds, (DENSE, STREAMING, BLOCK_MASK)).all()
    require(is_valid, "head_mask_type", kinds.tolist(), f"{num_heads} of 0 (dense), -1 (streaming) and 1 (block mask)")
    return kinds


def _streaming_counts(streaming_info: Any, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sinks and local by head, 0 for heads that do not stream."""
    streams = kinds == STREAMING
    if streaming_info is None:
        require(not streams.any(), "streaming_info", None, "given: there are streaming heads")
        return np.zeros_like(kinds), np.zeros_like(kinds)
    info = known(streaming_info)
    require(info is not None, "streaming_info", streaming_info, "known while tracing")
    needed = f"{2 * len(kinds)} ints of at least 0: sinks and local of each head"
    is_valid = info.shape == (2 * len(kinds),) and np.issubdtype(info.dtype, np.integer)
    is_valid = is_valid and (info.reshape(-1, 2)[streams] >= 0).all()
    require(is_valid, "streaming_info", info.tolist(), needed)
    sinks, local = np.where(streams, info.reshape(-1, 2).T, 0)
    return sinks, local


def _masked_heads(base_blockmask, kinds: np.ndarray, batch: int, max_q: int, max_k: int) -> jax.Array | None:
    """The masks of the heads of type 1 as bool, of the right shape."""
    num_masked = int((kinds == BLOCK_MASK).sum())
    if base_blockmask is None:
        require(num_masked == 0, "base_blockmask", None, f"given: `head_mask_type` has {num_masked} heads of type 1")
        return None
    shape = (batch, num_masked, num_blocks(max_q, BLOCK_SIZE), num_blocks(max_k, BLOCK_SIZE))
    needed = f"{list(shape)}: batch, heads of type 1, and blocks of {BLOCK_SIZE} of the longest sequences"
    is_mask = is_array(base_blockmask) and tuple(base_blockmask.shape) == shape
    require(is_mask, "base_blockmask", base_blockmask, needed)
    return base_blockmask != 0


def _streaming_blocks(kinds, sinks, local, q_lens, kv_lens, max_q, max_k, is_causal, exact) -> jax.Array:
    """The blocks that streaming heads may see, and for the others all: bool [batch, num_heads, num_q_blocks, num_kv_blocks]."""
    tile = jnp.arange(num_blocks(max_q, BLOCK_SIZE), dtype=jnp.int32)
    block = jnp.arange(num_blocks(max_k, BLOCK_SIZE), dtype=jnp.int32)
    sinks, local, streams = (x[:, None, None] for x in (sinks, local, kinds == STREAMING))
    if is_causal:
        first = tile[:, None] * BLOCK_SIZE + (kv_lens - q_lens)[:, None, None, None]  # [batch, 1, num_q_blocks, 1]
        last = (first + BLOCK_SIZE - 1) // BLOCK_SIZE
        lowest = (first - local + 1) // BLOCK_SIZE if exact else first // BLOCK_SIZE - local + 1
    else:
        last = (-(-kv_lens // BLOCK_SIZE) - 1)[:, None, None, None]
        lowest = last - local + 1
    num_sink_blocks = -(-sinks // BLOCK_SIZE) if exact else sinks
    seen = (block < num_sink_blocks) | ((block >= lowest) & (block <= last) & (local > 0))
    shape = (q_lens.shape[0], len(kinds), tile.size, block.size)
    return jnp.broadcast_to(seen | ~streams, shape)


def _num_slots(kinds, sinks, local, num_kv_blocks: int, exact: bool) -> int:
    """Slots for the longest list: of all blocks, unless every head streams."""
    if (kinds != STREAMING).any():
        return max(num_kv_blocks, 1)
    if exact:
        sinks, local = -(-sinks // BLOCK_SIZE), -(-local // BLOCK_SIZE) + 1
    return max(min(int((sinks + local + 1).max()), num_kv_blocks), 1)
