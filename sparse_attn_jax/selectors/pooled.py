"""`PooledTopK` and `PooledCDF`: blocks of keys by the products of block means."""

import dataclasses
import functools
import numbers
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring_problem import GROUP_REDUCTIONS
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import (
    block_means,
    causal_block_mask,
    check_fraction,
    check_fractions,
    cumulative_mass_mask,
    diagonal_block_mask,
    masked_softmax,
    max_touched_blocks,
    per_head,
    pooled_logits,
    top_k_mask,
)
from sparse_attn_jax.selectors.static_rows import check_call


@dataclasses.dataclass(frozen=True)
class PooledTopK:
    """The blocks whose mean key has the highest product with the mean query of a block, a fixed number of them.

      score[a, b] = mean of query block a . mean of key block b

    It is the block-sparse head of MInference (`top_k=100`), the critical blocks of SLA (`ratio=0.05`), and the fine branch of
    VSA on a sequence. Where those scale the scores, take their softmax or subtract the mean of all keys first ("smooth" keys),
    that changes no order within a row, and is left out. Means are float32.

    MInference does not force the diagonal, so that a query may see nothing. The queries of a block decide together what each of
    them sees (not `causal_safe`).

    Attributes:
      top_k: blocks per row, forced ones included. Give this or `ratio`.
      ratio: their share of the blocks, in [0, 1], rounded down, at least one block.
      q_block_size: queries per row.
      kv_block_size: keys per block.
      force_diagonal: under causality, always keep the blocks that hold the positions of the row's queries, even if they are
        more than `top_k`.
      visible_ratio: take the share of the blocks that a row may see. False: of all there are, as SpargeAttention does, so that
        early rows are dense under causality.
      group_reduction: `None` for a list per query head, or "sum", "mean" or "max" of the scores over the heads of a KV head.
    """

    top_k: int | None = None
    ratio: float | None = None
    q_block_size: int = 64
    kv_block_size: int = 64
    force_diagonal: bool = True
    visible_ratio: bool = False
    group_reduction: str | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        if (self.top_k is None) == (self.ratio is None):
            raise ValueError(f"`top_k` is {self.top_k} and `ratio` is {self.ratio}; give exactly one of them.")
        if self.top_k is not None:
            checks.check_int("top_k", self.top_k, 1)
        else:
            check_fraction("ratio", self.ratio)
        checks.check_int("q_block_size", self.q_block_size, 1)
        checks.check_int("kv_block_size", self.kv_block_size, 1)
        checks.check_bool("force_diagonal", self.force_diagonal)
        checks.check_bool("visible_ratio", self.visible_ratio)
        checks.check_choice("group_reduction", self.group_reduction, GROUP_REDUCTIONS)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: leave out blocks after the queries. The means of the last block are those of all its keys.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query head (KV head with a group reduction) and block of queries, counted from
          query 0: int32 [batch, heads, num_q_blocks, slots], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient. Memory is that of the scores of the blocks.
        """
        check_call(query, key, is_causal, q_offset)
        if 0 in (query.shape[1], key.shape[1]):
            return select_every_block(query.shape[1], key.shape[1], self.kv_block_size)
        return _select_top_k(self, *jax.lax.stop_gradient((query, key)), q_offset, is_causal=is_causal)


@functools.partial(jax.jit, static_argnames=("selector", "is_causal"))
def _select_top_k(selector: PooledTopK, query, key, q_offset, *, is_causal: bool) -> BlockSelection:
    q_block_size, kv_block_size = selector.q_block_size, selector.kv_block_size
    scores = pooled_logits(block_means(query, q_block_size), block_means(key, kv_block_size))
    if selector.group_reduction is not None:
        scores = scores.reshape(scores.shape[0], key.shape[2], -1, *scores.shape[2:])
        scores = getattr(scores, selector.group_reduction)(axis=2)
    allowed, diagonal = _block_masks(selector, query, key, q_offset, is_causal)
    num_kv_blocks = scores.shape[-1]
    if selector.top_k is None:
        count = ratio_count(selector.ratio, allowed, selector.visible_ratio)
        num_slots = max(1, int(selector.ratio * num_kv_blocks))
    else:
        count = num_slots = min(selector.top_k, num_kv_blocks)
    if selector.force_diagonal and is_causal:
        num_slots = min(max(num_slots, max_touched_blocks(q_block_size, kv_block_size)), num_kv_blocks)
    mask = top_k_mask(scores, count, allowed, diagonal)
    return BlockSelection.from_block_mask(mask, q_block_size=q_block_size, kv_block_size=kv_block_size, num_slots=num_slots)


@dataclasses.dataclass(frozen=True)
class PooledCDF:
    """The selection of SpargeAttention: as many of the best blocks as have a share of the pooled attention.

      P[a, b] = softmax_b(scale * mean of query block a . mean of key block b)    over the visible and similar blocks of keys
      a block is similar if the mean cosine between its tokens, each with itself included, exceeds `similarity`

    The mean of a block whose tokens differ says little of it: all rows keep such a block of keys, and such a block of queries
    keeps all blocks. Other rows keep, from the highest P down, the blocks that together have at most `cdf` of the row, without
    the one that would exceed it, and at least one; or, with `ratio`, a share of the number of blocks.

    The original forces no diagonal: its blocks of 128 queries may leave their first queries without a key. Its second stage,
    which skips products with values, and its 8-bit arithmetic are not part of a selection. The queries of a block decide
    together what each of them sees (not `causal_safe`).

    Attributes:
      cdf: share of the pooled attention, in [0, 1], or a tuple of one for each query head. 1 keeps all.
      similarity: what similar blocks exceed, in [-1, 1], or a tuple of one for each query head. -1 takes all as similar.
      ratio: in place of `cdf`, the share of blocks to keep, rounded down, at least one. The original has 0.5 with a
        `similarity` of -0.1.
      q_block_size: queries per row.
      kv_block_size: keys per block.
      force_diagonal: under causality, also keep the blocks that hold the positions of the row's queries.
      force_sink: also keep block 0.
      smooth_key: subtract the mean of all keys first, as the original's interface does. It leaves P as it is, up to rounding,
        but keys are no longer similar for a direction that all of them share.
      visible_ratio: take `ratio` of the blocks that a row may see. False: of all, as the original.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    cdf: float | tuple[float, ...] = 0.98
    similarity: float | tuple[float, ...] = 0.6
    ratio: float | None = None
    q_block_size: int = 128
    kv_block_size: int = 64
    force_diagonal: bool = True
    force_sink: bool = False
    smooth_key: bool = True
    visible_ratio: bool = False
    scale: float | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        check_fractions("cdf", self.cdf)
        _check_cosine("similarity", self.similarity)
        if self.ratio is not None:
            check_fraction("ratio", self.ratio)
        checks.check_int("q_block_size", self.q_block_size, 1)
        checks.check_int("kv_block_size", self.kv_block_size, 1)
        for name in ("force_diagonal", "force_sink", "smooth_key", "visible_ratio"):
            checks.check_bool(name, getattr(self, name))
        checks.check_scale(self.scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: leave out blocks after the queries. The means of the last block are those of all its keys.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query head and block of queries, counted from query 0: int32 [batch, num_q_heads,
          num_q_blocks, num_kv_blocks], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong, or `cdf` or `similarity` does not have an entry for each query head.

        Carries no gradient. Memory is that of the scores of the blocks.
        """
        check_call(query, key, is_causal, q_offset)
        if 0 in (query.shape[1], key.shape[1]):
            return select_every_block(query.shape[1], key.shape[1], self.kv_block_size)
        return _select_cdf(self, *jax.lax.stop_gradient((query, key)), q_offset, is_causal=is_causal)


@functools.partial(jax.jit, static_argnames=("selector", "is_causal"))
def _select_cdf(selector: PooledCDF, query, key, q_offset, *, is_causal: bool) -> BlockSelection:
    q_block_size, kv_block_size = selector.q_block_size, selector.kv_block_size
    num_q_heads, head_dim = query.shape[2:]
    cdf = per_head("cdf", selector.cdf, num_q_heads)
    similarity = per_head("similarity", selector.similarity, num_q_heads)
    if selector.smooth_key:
        key = key.astype(jnp.float32)
        key = key - key.mean(axis=1, keepdims=True)
    # [batch, num_q_heads, blocks]: each query head compares the keys' similarity with a bound of its own.
    q_is_similar = block_similarity(query, q_block_size).swapaxes(1, 2) > similarity[..., 0]
    kv_similarity = block_similarity(key, kv_block_size).swapaxes(1, 2)
    kv_is_similar = jnp.repeat(kv_similarity, num_q_heads // key.shape[2], axis=1) > similarity[..., 0]
    allowed, diagonal = _block_masks(selector, query, key, q_offset, is_causal)
    scale = head_dim**-0.5 if selector.scale is None else selector.scale
    logits = pooled_logits(block_means(query, q_block_size), block_means(key, kv_block_size), scale)
    ranked = allowed & kv_is_similar[:, :, None]
    mass = masked_softmax(logits, ranked)
    if selector.ratio is None:
        mask = cumulative_mass_mask(mass, cdf, "inclusive", ranked) | top_k_mask(mass, 1, ranked)
    else:
        mask = top_k_mask(mass, ratio_count(selector.ratio, allowed, selector.visible_ratio), ranked)
    mask = mask | ~kv_is_similar[:, :, None] | ~q_is_similar[..., None]
    if diagonal is not None:
        mask = mask | diagonal
    if selector.force_sink:
        mask = mask | (jnp.arange(mask.shape[-1]) == 0)
    return BlockSelection.from_block_mask(mask & allowed, q_block_size=q_block_size, kv_block_size=kv_block_size)


def _block_masks(
    selector: PooledTopK | PooledCDF, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None, is_causal: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The blocks of keys that each block of queries may see, and those that it always does, or `None`."""
    sizes = query.shape[1], key.shape[1], selector.q_block_size, selector.kv_block_size
    if not is_causal:
        return jnp.ones((1, 1, 1, num_blocks(sizes[1], selector.kv_block_size)), bool), None
    diagonal = diagonal_block_mask(q_offset, *sizes) if selector.force_diagonal else None
    return causal_block_mask(q_offset, *sizes), diagonal


def ratio_count(ratio: float, allowed: jax.Array, visible_ratio: bool) -> jax.Array | int:
    """A share of the blocks, rounded down, at least one: of all, or for each row of the allowed ones (int32 [..., 1])."""
    # Of float64 products, which 0.05 * 20 needs to be 1.
    counts = np.maximum((ratio * np.arange(allowed.shape[-1] + 1)).astype(np.int32), 1)
    if not visible_ratio:
        return int(counts[-1])
    return jnp.asarray(counts)[allowed.sum(axis=-1, keepdims=True, dtype=jnp.int32)]


def block_similarity(x: jax.Array, block_size: int) -> jax.Array:
    """The mean cosine between the tokens of a block, each with itself included.

    Args:
      x: [batch, length, heads, head_dim]. A token of zeros has cosine 0 with all.
      block_size: tokens per block.

    Returns:
      float32 [batch, num_blocks, heads].
    """
    x = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    # The mean of all products of two directions is the square of the mean direction.
    mean = block_means(x / jnp.where(norm > 0, norm, 1.0), block_size)
    return jnp.square(mean).sum(axis=-1)


def _check_cosine(name: str, value: float | tuple[float, ...]) -> None:
    for x in value if isinstance(value, tuple) and value else (value,):
        if isinstance(x, bool) or not isinstance(x, numbers.Real) or not -1 <= x <= 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a number in [-1, 1], or a tuple of one for each query head.")
