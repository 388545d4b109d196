"""`SALE`: blocks with any key whose 4-bit score stands out against the sinks and the local window."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.query_rows import reduce_rows
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import causal_block_mask, check_fractions, per_head, row_positions
from sparse_attn_jax.selectors.probe import check_causal_call


@dataclasses.dataclass(frozen=True)
class SALE:
    """Every query and key is compared, in few bits; for causal prefill, no parameters, a list per query head.

    With q' and k' the queries and keys less their means over the sequence, rounded to `bits` bits per token and head,

      s[i, j] = scale * (rounded q'[i] . rounded k'[j] + mean q . k'[j])                    estimate of scale * q[i] . k'[j]
      reference[i] = log sum over the visible keys j of the always-kept blocks of exp(scale * q[i] . k'[j])      not rounded
      block b is kept for a row of queries if s[i, j] > reference[i] + log(threshold) for any of its queries i and keys j <= i

    Always kept are the first blocks and those of the local window. Leaving out q . mean k shifts a row of scores by a constant,
    which is harmless because the reference is one of centred keys too.

    This is the original's test in two passes; its other form lets the reference grow with the blocks that it keeps. The local
    window of the original is rounded up to its segments of keys, ours to blocks. Its scales are of 16 bits, and in one mode
    shared by the tokens of a block; ours are float32, per token. Means over the whole sequence, and one list for the queries of
    a row, let later tokens decide what an earlier one sees (not `causal_safe`).

    Attributes:
      threshold: share of the reference's softmax sum that a key has to exceed, in [0, 1], or a tuple of one for each query
        head. 0 keeps all.
      bits: 2 to 8, of the symmetric range of integers: 4 is -7 to 7. They are kept in 8 bits, which is what an H100 multiplies.
      q_block_size: queries per row.
      kv_block_size: keys per block.
      num_local: keys up to the last query of a row that are always kept, and at least those from its first query on.
      num_sink_blocks: leading blocks that are always kept.
      dense_len: up to this many keys every block is selected.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    threshold: float | tuple[float, ...] = 0.004
    bits: int = 4
    q_block_size: int = 64
    kv_block_size: int = 32
    num_local: int = 128
    num_sink_blocks: int = 1
    dense_len: int = 1024
    scale: float | None = None

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        check_fractions("threshold", self.threshold)
        checks.check_choice("bits", self.bits, range(2, 9))
        checks.check_int("q_block_size", self.q_block_size, 1)
        checks.check_int("kv_block_size", self.kv_block_size, 1)
        checks.check_int("num_local", self.num_local, 1)
        checks.check_int("num_sink_blocks", self.num_sink_blocks, 0)
        checks.check_int("dense_len", self.dense_len, 0)
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
          num_q_blocks, num_kv_blocks], ascending, -1 last; one list [1, 1, 1, num_kv_blocks] for all if kv_len <= dense_len.

        Raises:
          ValueError: an argument is wrong, or `threshold` does not have an entry for each query head.

        Carries no gradient. Quadratic in the lengths; memory beyond the lists is bounded.
        """
        check_causal_call(self, query, key, is_causal, q_offset)
        q_len, kv_len = query.shape[1], key.shape[1]
        if kv_len <= self.dense_len or q_len == 0:
            return select_every_block(q_len, kv_len, self.kv_block_size)
        return _select(self, *jax.lax.stop_gradient((query, key)), q_offset)


@functools.partial(jax.jit, static_argnames=("selector",))
def _select(selector: SALE, query: jax.Array, key: jax.Array, q_offset: int | jax.Array | None) -> BlockSelection:
    batch, q_len, num_q_heads, head_dim = query.shape
    kv_len, num_kv_heads = key.shape[1:3]
    q_block_size, kv_block_size = selector.q_block_size, selector.kv_block_size
    threshold = per_head("threshold", selector.threshold, num_q_heads)
    log_threshold = jnp.log(jnp.broadcast_to(threshold, (num_q_heads, 1, 1))).reshape(num_kv_heads, -1, 1, 1)
    scale = head_dim**-0.5 if selector.scale is None else selector.scale
    query = query.astype(jnp.float32).reshape(batch, q_len, num_kv_heads, -1, head_dim) * scale
    key = key.astype(jnp.float32)
    key = key - key.mean(axis=1, keepdims=True)
    query_mean = query.mean(axis=1, keepdims=True)
    query_codes, query_steps = quantize(query - query_mean, selector.bits)
    estimate = functools.partial(_estimate, *quantize(key, selector.bits), _dot(query_mean, key))
    positions = absolute_positions(q_offset, q_len, kv_len)
    first, last = _local_blocks(selector, q_offset, q_len, kv_len)

    def passes_of(ids):
        """Which queries have a key that passes in a block: bool [batch, num_q_heads, queries, num_kv_blocks]."""
        take = lambda x: jnp.take(x, ids, axis=1, mode="clip")
        first_of, last_of = (jnp.take(x, ids // q_block_size, axis=1, mode="clip") for x in (first, last))
        reference = _reference(selector, take(query), key, take(positions), first_of, last_of)[..., None]
        # Causality needs no look: a block that is not kept anyway lies before all of the row's queries, or after them.
        passes = estimate(take(query_codes), take(query_steps)) > reference + log_threshold
        passes = jnp.pad(passes, [(0, 0)] * 4 + [(0, -kv_len % kv_block_size)])
        return passes.reshape(batch, num_q_heads, len(ids), -1, kv_block_size).any(axis=-1)

    size = batch * num_q_heads * kv_len
    mask = reduce_rows(passes_of, q_len=q_len, q_block_size=q_block_size, reduction="max", values_per_query=size)
    ids = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    kept = (ids < selector.num_sink_blocks) | ((first[..., None] <= ids) & (ids <= last[..., None]))[:, None]
    mask = (mask | kept) & causal_block_mask(q_offset, q_len, kv_len, q_block_size, kv_block_size)
    return BlockSelection.from_block_mask(mask, q_block_size=q_block_size, kv_block_size=kv_block_size)


def quantize(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Rounds along the last axis to integers of one step: int8 of the shape of `x`, and the steps, float32 [...]."""
    highest = 2 ** (bits - 1) - 1
    largest = jnp.abs(x).max(axis=-1)
    step = jnp.where(largest > 0, largest, 1.0) / highest
    return jnp.round(x / step[..., None]).astype(jnp.int8), step


def _dot(query: jax.Array, key: jax.Array, dtype=jnp.float32) -> jax.Array:
    """[batch, q_len, heads, group_size, head_dim] and [batch, kv_len, heads, head_dim]: [batch, heads, group_size, q, kv]."""
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bqngd,bknd->bngqk", query, key, precision=precision, preferred_element_type=dtype)


def _estimate(key_codes, key_steps, shared, query_codes, query_steps) -> jax.Array:
    """Scores of rounded queries and keys, [batch, num_kv_heads, group_size, queries, kv_len]; `shared` are the mean query's."""
    steps = jnp.moveaxis(query_steps, 1, 3)[..., None] * jnp.moveaxis(key_steps, 1, 2)[:, :, None, None]
    return _dot(query_codes, key_codes, jnp.int32) * steps + shared


def _local_blocks(selector: SALE, q_offset, q_len: int, kv_len: int) -> tuple[jax.Array, jax.Array]:
    """The first and the last block of each row's local window: int32 [batch or 1, rows] each; a negative last is none."""
    first, last = row_positions(q_offset, q_len, kv_len, selector.q_block_size)
    first = jnp.maximum(jnp.minimum(first, last - selector.num_local + 1), 0)
    return first // selector.kv_block_size, last // selector.kv_block_size


def _reference(selector: SALE, query, key, position, first, last) -> jax.Array:
    """Log of the softmax sum over the keys that are always kept: [batch, num_kv_heads, group_size, queries].

    Args:
      query: [batch, queries, num_kv_heads, group_size, head_dim], successive, scaled.
      key: [batch, kv_len, num_kv_heads, head_dim].
      position: int32 [batch or 1, queries].
      first: int32 [batch or 1, queries], the first block of the local window of each query's row.
      last: the last one.
    """
    block_size = selector.kv_block_size
    batch, kv_len = key.shape[:2]
    num_sinks = min(selector.num_sink_blocks * block_size, kv_len)
    # From the window of the first query's row to the last query.
    width = min(query.shape[1] + selector.num_local + selector.q_block_size + block_size, kv_len)
    start = jnp.clip(first[:, :1] * block_size, 0, kv_len - width)
    near_ids = jnp.broadcast_to(start + jnp.arange(width, dtype=jnp.int32), (batch, width))
    near = jnp.take_along_axis(key, near_ids[..., None, None], axis=1)
    block = near_ids[:, None] // block_size  # [batch, 1, width]
    # Sinks may be in the window too, but then all that is visible is kept, whatever the reference.
    is_near = (block >= first[..., None]) & (block <= last[..., None]) & (near_ids[:, None] <= position[..., None])
    is_sink = jnp.arange(num_sinks, dtype=jnp.int32) <= position[..., None]
    logits = jnp.concatenate([_dot(query, key[:, :num_sinks]), _dot(query, near)], axis=-1)
    is_sink = jnp.broadcast_to(is_sink, (*is_near.shape[:2], num_sinks))
    mask = jnp.concatenate([is_sink, is_near], axis=-1)[:, None, None]
    return jax.nn.logsumexp(jnp.where(mask, logits, -jnp.inf), axis=-1)
