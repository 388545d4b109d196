"""`FlexPrefill`: by head, block scores where they estimate the attention well, else its columns and diagonals."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import (
    block_means,
    block_sums,
    causal_block_mask,
    check_fraction,
    cover_count,
    cumulative_mass_mask,
    masked_softmax,
    pooled_logits,
    row_positions,
    top_k_mask,
)
from sparse_attn_jax.selectors.probe import check_causal_call, probe_mass, probe_positions


@dataclasses.dataclass(frozen=True)
class FlexPrefill:
    """FlexPrefill, for the prefill of a causal model; no parameters, a list per query head.

    The last `block_size` queries are a probe. With v the attention that they pay, on average, to each block of keys, and
    e = softmax(scale * mean(probe queries) . mean(block of keys)) its estimate, sqrt(JSD(v, e)) < tau decides for each head:

      vertical-slash: as many columns, and as many distances, as hold more than `gamma` of the probe's attention, counted in
        tokens; divided by `block_size`, plus 1, within the budgets, so many columns of blocks and diagonals of blocks are
        kept, the highest in mass.
      query-aware: of P = softmax(scale * mean(block of queries) . mean(block of keys)), all rows together, the highest
        entries while they sum up to no more than `gamma` of all; and the vertical-slash of the smallest budget.

    The first column and the main diagonal of blocks are always kept, within the budgets. The lower id wins a tie.

    From the original differ: batches, query blocks at any q_offset (a diagonal of blocks then crosses two blocks of keys per
    row), `block_size` where the original divides by 128 whatever its block, 0 log 0 = 0 where it gives NaN and so decides for
    vertical-slash, distances o grouped by o // block_size also where the length is no multiple of the block.

    Which keys an early query sees depends on the last queries (not `causal_safe`).

    Attributes:
      gamma: share of the attention to keep, in [0, 1]; 1 keeps every block that the budgets allow.
      tau: how far, in [0, 1], the estimate may be off; 0 makes every head vertical-slash.
      min_budget: tokens of columns, and of distances, that are kept at least; rounded up to blocks.
      max_budget: tokens of columns, and of distances, that are kept at most; rounded up to blocks. `None` is no limit.
      block_size: tokens per block, of queries and of keys.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None
    block_size: int = 128
    scale: float | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        check_fraction("gamma", self.gamma)
        check_fraction("tau", self.tau)
        checks.check_int("min_budget", self.min_budget, 1)
        if self.max_budget is not None:
            checks.check_int("max_budget", self.max_budget, self.min_budget)
        checks.check_int("block_size", self.block_size, 1)
        checks.check_scale(self.scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: must be True, here and in the op.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query head and block of queries, counted from query 0: int32 [batch, num_q_heads,
          num_q_blocks, num_kv_blocks], ascending, -1 last. As in the original one list of every block, for all, if there is
          but one query (decoding), or no more keys than two blocks or than the smallest budget.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient.
        """
        check_causal_call(self, query, key, is_causal, q_offset)
        q_len, kv_len = query.shape[1], key.shape[1]
        if q_len <= 1 or kv_len <= self.block_size * max(2, self._budgets(kv_len)[0]):
            return select_every_block(q_len, kv_len, self.block_size)
        return _select(self, *jax.lax.stop_gradient((query, key)), q_offset)

    def _budgets(self, kv_len: int) -> tuple[int, int]:
        """The least and the most columns of blocks, or diagonals of blocks, that a head keeps."""
        num_kv_blocks = num_blocks(kv_len, self.block_size)
        most = num_kv_blocks if self.max_budget is None else min(num_blocks(self.max_budget, self.block_size), num_kv_blocks)
        return num_blocks(self.min_budget, self.block_size), most


@functools.partial(jax.jit, static_argnames="selector")
def _select(selector: FlexPrefill, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None) -> BlockSelection:
    kv_len, block_size = key.shape[1], selector.block_size
    masses = jnp.stack(probe_mass(query, key, q_offset, num_probe=block_size, scale=selector.scale))
    key_means = block_means(key, block_size)
    is_query_aware = _probe_distance(selector, query, key_means, masses[0], q_offset)[..., None] < selector.tau
    least, most = selector._budgets(kv_len)
    counts = jnp.clip(cover_count(masses, selector.gamma) // block_size + 1, least, most)
    counts = jnp.where(is_query_aware, least, counts)
    is_first = jnp.arange(num_blocks(kv_len, block_size)) == 0
    columns, diagonals = top_k_mask(block_sums(masses, block_size), counts, True, is_first)
    sizes = query.shape[1], kv_len, block_size
    visible = causal_block_mask(q_offset, *sizes, block_size)
    crossed = _expand_diagonals(diagonals, *row_positions(q_offset, *sizes), block_size)
    mask = visible & (columns[:, :, None] | crossed)
    mask = mask | (is_query_aware[..., None] & _query_aware_mask(selector, query, key_means, visible))
    return BlockSelection.from_block_mask(mask, q_block_size=block_size, kv_block_size=block_size)


def _probe_distance(selector, query, key_means, columns, q_offset) -> jax.Array:
    """How far the estimate is from the probe's attention on the blocks: float32 [batch, num_q_heads]."""
    kv_len, block_size = columns.shape[-1], selector.block_size
    attention = block_sums(columns, block_size)
    attention = attention / jnp.maximum(attention.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    probe = query[:, -block_size:].astype(jnp.float32).mean(axis=1, keepdims=True)
    logits = pooled_logits(probe, key_means, _scale(selector, query))[:, :, 0]
    last = probe_positions(q_offset, query.shape[1], kv_len, block_size)[:, -1]
    starts = jnp.arange(attention.shape[-1], dtype=jnp.int32) * block_size
    return root_jensen_shannon(attention, masked_softmax(logits, (starts <= last[:, None])[:, None]))


def root_jensen_shannon(p: jax.Array, q: jax.Array) -> jax.Array:
    """The square root of the Jensen-Shannon divergence, in nats, of distributions along the last axis."""
    middle = (p + q) / 2

    def divergence(x):
        return (x * jnp.log(jnp.where(x > 0, x / middle, 1.0))).sum(axis=-1)

    return jnp.sqrt(jnp.maximum((divergence(p) + divergence(q)) / 2, 0.0))


def _expand_diagonals(keep: jax.Array, first: jax.Array, last: jax.Array, block_size: int) -> jax.Array:
    """The tiles of diagonals of blocks: bool [batch, heads, rows, num_kv_blocks].

    Args:
      keep: bool [batch, heads, num_kv_blocks], by how many blocks back.
      first: int32 [batch or 1, rows], the position of the first query of each row.
      last: int32 [batch or 1, rows], that of the last.
      block_size: tokens per block.
    """
    batch, _, num_kv_blocks = keep.shape
    ids = jnp.arange(num_kv_blocks, dtype=jnp.int32)

    def crossed(positions):
        back = positions[..., None] // block_size - ids  # [batch or 1, rows, num_kv_blocks]
        inside = (back >= 0) & (back < num_kv_blocks)
        back = jnp.broadcast_to(jnp.where(inside, back, 0), (batch, *back.shape[1:]))
        return jax.vmap(lambda row, ids: row[:, ids])(keep, back) & inside[:, None]

    return crossed(first) | crossed(last)


def _query_aware_mask(selector, query, key_means, visible) -> jax.Array:
    """The blocks of highest estimated attention, of all rows of a head together."""
    logits = pooled_logits(block_means(query, selector.block_size), key_means, _scale(selector, query))
    mass = masked_softmax(logits, visible)
    flat = (*mass.shape[:2], -1)
    allowed = jnp.broadcast_to(visible, mass.shape).reshape(flat)
    return cumulative_mass_mask(mass.reshape(flat), selector.gamma, "inclusive", allowed).reshape(mass.shape)


def _scale(selector: FlexPrefill, query: jax.Array) -> float:
    return query.shape[-1] ** -0.5 if selector.scale is None else selector.scale
