"""`XAttention`: blocks of keys by the sums of the antidiagonals of the attention map."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import (
    block_sums,
    causal_block_mask,
    check_fractions,
    cumulative_mass_mask,
    diagonal_block_mask,
    dot_operand,
    masked_softmax,
    per_head,
)
from sparse_attn_jax.selectors.static_rows import check_call

# Attention weights held at once, in elements; at least those of one block of queries.
CHUNK_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class XAttention:
    """Antidiagonal scoring of XAttention, for prefill; no parameters, a list per query head.

    Queries and keys are taken `stride` at a time, a stride of queries in reverse, so that one dot product sums an antidiagonal
    of a stride x stride tile of the map:

      logits[r, c] = scale / stride * sum_t query[stride * r + stride - 1 - t] . key[stride * c + t]
      score[a, b] = sum of softmax_c(logits) over the strides r of query block a and c of key block b

    Of each row of blocks are kept, under causality, the first and those that hold the queries themselves, then the others from
    the highest score down while the scores of what is kept already are below `threshold` times the row's sum. Without causality
    none is kept beforehand, and a threshold of 0 keeps none.

    Under causality a stride of queries sees the strides of keys that start at or before its last query. The original agrees
    where it is defined, q_offset a multiple of the block. It departs from its own rule in places, where ours does not: in its
    first chunk of queries only the diagonal is always kept, and about a block too many; without causality block 0 always is,
    and padding counts as keys; its fallback without Triton drops earlier chunks if nothing is padded. It rounds what it sums
    to the dtype of the inputs, ours is float32, so that blocks near the threshold can differ. A single query (decoding) it
    treats as dense, ours like any other.

    The queries of a block decide together what each of them sees (not `causal_safe`).

    Attributes:
      stride: tokens per antidiagonal; divides `block_size`. Tokens that are missing at the end of an array count as zero.
      threshold: share of a row's score to keep, in [0, 1], or a tuple of one for each query head; 1 keeps every block.
      block_size: tokens per block, of queries and of keys.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    stride: int = 8
    threshold: float | tuple[float, ...] = 0.9
    block_size: int = 128
    scale: float | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        checks.check_int("stride", self.stride, 1)
        check_fractions("threshold", self.threshold)
        checks.check_int("block_size", self.block_size, 1)
        if self.block_size % self.stride:
            raise ValueError(f"`block_size` is {self.block_size}; it must be a multiple of `stride`, {self.stride}.")
        checks.check_scale(self.scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: leave out what comes after the queries, in the scores and in the lists.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query head and block of queries, counted from query 0: int32 [batch, num_q_heads,
          num_q_blocks, num_kv_blocks], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong, or `threshold` does not have an entry for each query head.

        Carries no gradient. Quadratic in the lengths over the stride; memory beyond the lists is bounded.
        """
        check_call(query, key, is_causal, q_offset)
        if 0 in (query.shape[1], key.shape[1]):
            return select_every_block(query.shape[1], key.shape[1], self.block_size)
        return _select(self, *jax.lax.stop_gradient((query, key)), q_offset, is_causal=is_causal)


@functools.partial(jax.jit, static_argnames=("selector", "is_causal"))
def _select(
    selector: XAttention, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None, *, is_causal: bool
) -> BlockSelection:
    block_size = selector.block_size
    scores = antidiagonal_scores(selector, query, key, q_offset, is_causal=is_causal)
    threshold = per_head("threshold", selector.threshold, query.shape[2])
    if is_causal:
        sizes = q_offset, query.shape[1], key.shape[1], block_size, block_size
        is_first = jnp.arange(scores.shape[-1]) == 0
        mask = cumulative_mass_mask(
            scores, threshold, "exclusive", causal_block_mask(*sizes), is_first | diagonal_block_mask(*sizes)
        )
    else:
        mask = cumulative_mass_mask(scores, threshold, "exclusive", True)
    return BlockSelection.from_block_mask(mask, q_block_size=block_size, kv_block_size=block_size)


def antidiagonal_scores(
    selector: XAttention, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None, *, is_causal: bool
) -> jax.Array:
    """The scores that `XAttention` selects by: float32 [batch, num_q_heads, num_q_blocks, num_kv_blocks]."""
    stride, strides_per_block = selector.stride, selector.block_size // selector.stride
    batch, q_len, num_q_heads, head_dim = query.shape
    kv_len, num_kv_heads = key.shape[1:3]
    query_strides = _split(query, selector.block_size)  # [batch, num_q_blocks, block_size, num_q_heads, head_dim]
    num_q_blocks = query_strides.shape[1]
    grouped = (batch, num_q_blocks, strides_per_block, stride, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    query_strides = query_strides.reshape(grouped)[:, :, :, ::-1]
    key_strides = _split(key, stride)  # [batch, num_columns, stride, num_kv_heads, head_dim]
    num_columns = key_strides.shape[1]
    scale = head_dim**-0.5 if selector.scale is None else selector.scale
    first = absolute_positions(q_offset, q_len, kv_len)[:, :1, None]
    column_starts = jnp.arange(num_columns, dtype=jnp.int32) * stride

    def score(block):
        logits = jnp.einsum(
            "brsngd,bcsnd->bngrc",
            jax.lax.dynamic_index_in_dim(query_strides, block, 1, keepdims=False),
            key_strides,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).reshape(batch, num_q_heads, strides_per_block, num_columns)
        starts = (block * strides_per_block + jnp.arange(strides_per_block, dtype=jnp.int32))[:, None] * stride
        visible = (starts < q_len) & jnp.ones((1, 1, num_columns), bool)
        if is_causal:
            visible = visible & (column_starts <= first + jnp.minimum(starts + stride, q_len) - 1)
        weights = masked_softmax(logits * (scale / stride), visible[:, None])
        return block_sums(weights.sum(axis=2), strides_per_block)

    elements = batch * num_q_heads * strides_per_block * num_columns
    rows = jax.lax.map(score, jnp.arange(num_q_blocks), batch_size=max(1, CHUNK_ELEMENTS // elements))
    return jnp.moveaxis(rows, 0, 2)


def _split(x: jax.Array, size: int) -> jax.Array:
    """[batch, length, heads, head_dim] to [batch, ceil(length / size), size, heads, head_dim], zeros at the end."""
    x = jnp.pad(dot_operand(x), [(0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)])
    return x.reshape(x.shape[0], num_blocks(x.shape[1], size), size, *x.shape[2:])
