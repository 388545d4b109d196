"""Block scoring and selection fused over chunks of queries: memory is linear in the length.

Everything is laid out with queries as the minor dimension, [..., units or blocks, queries], so that reductions over units and
blocks are elementwise between rows and vectorise; a CPU reduces over the minor dimension several times slower.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sparse_attn_jax.block_top_k import pick_blocks
from sparse_attn_jax.query_chunks import map_chunks
from sparse_attn_jax.scoring_problem import ScoringProblem, num_units, unit_overlap
from sparse_attn_jax.selection import num_blocks

# Logits held at once, in elements. Larger chunks leave the cache, smaller ones are dominated by the cost of a loop step.
CHUNK_ELEMENTS = 2**20
MIN_CHUNK, MAX_CHUNK = 32, 512

# A causal chunk reads the shortest of these equal steps of the keys that covers it. 4 waste 1/8 of the work (4% of the time at
# 32,768 tokens, against 8) and compile in half the time.
NUM_BUCKETS = 4
MIN_BUCKET_KEYS = 1024


@functools.partial(jax.jit, static_argnames=("problem", "queries_per_chunk", "num_buckets"))
def select_from_units(
    query: jax.Array,
    compressed: jax.Array,
    coarse: jax.Array | None,
    positions: jax.Array,
    *,
    problem: ScoringProblem,
    queries_per_chunk: int | None = None,
    num_buckets: int | None = None,
) -> jax.Array:
    """Block lists of every query, without ever holding the scores of all queries.

    Args:
      query: [batch, q_len, num_q_heads, head_dim].
      compressed: [batch, num_units, num_kv_heads, head_dim].
      coarse: [batch, num_coarse_units, num_kv_heads, head_dim], the units of the softmax denominator; `None` is exact.
      positions: int32 [batch or 1, q_len], absolute.
      problem: static description.
      queries_per_chunk: `None` chooses by size.
      num_buckets: distinct key lengths that a causal chunk may read; `None` chooses by size.

    Returns:
      int32 [batch, num_kv_heads (num_q_heads without a group reduction), q_len, top_k], ascending, -1 last.
    """
    batch, q_len, num_q_heads, head_dim = query.shape
    num_kv_heads = compressed.shape[2]
    group_size = num_q_heads // num_kv_heads
    if q_len == 0:
        heads = num_q_heads if problem.group_reduction is None else num_kv_heads
        return jnp.zeros((batch, heads, 0, problem.top_k), jnp.int32)
    chunk = min(queries_per_chunk or _chunk_length(batch * num_q_heads * compressed.shape[1]), q_len)
    units = compressed.astype(jnp.float32).swapaxes(1, 2)
    coarse_units = None if coarse is None else coarse.astype(jnp.float32).swapaxes(1, 2)
    limits = _key_limits(problem, num_buckets)
    branches = [functools.partial(_select_within, limit, problem, units, coarse_units) for limit in limits]

    def select_chunk(start):
        chunk_query = jax.lax.dynamic_slice_in_dim(query, start, chunk, axis=1)
        chunk_query = chunk_query.reshape(batch, chunk, num_kv_heads, group_size, head_dim).transpose(0, 2, 4, 3, 1)
        chunk_positions = jax.lax.dynamic_slice_in_dim(positions, start, chunk, axis=1)
        # The first that is after all of them.
        bucket = jnp.searchsorted(jnp.asarray(limits[:-1], jnp.int32), chunk_positions.max(), side="right")
        return jax.lax.switch(bucket, branches, chunk_query, chunk_positions)

    return map_chunks(select_chunk, q_len, chunk)


def _chunk_length(elements_per_query: int) -> int:
    wanted = CHUNK_ELEMENTS // max(elements_per_query, 1)
    return 2 ** int(math.log2(min(max(wanted, MIN_CHUNK), MAX_CHUNK)))


def _key_limits(problem: ScoringProblem, num_buckets: int | None) -> list[int]:
    """Ascending numbers of leading keys that a chunk may read; the last is all of them."""
    if not problem.is_causal:
        return [problem.kv_len]
    blocks = num_blocks(problem.kv_len, problem.block_size)
    if num_buckets is None:
        num_buckets = max(1, min(NUM_BUCKETS, problem.kv_len // MIN_BUCKET_KEYS))
    steps = {num_blocks(blocks * (step + 1), num_buckets) * problem.block_size for step in range(num_buckets)}
    return sorted({min(step, problem.kv_len) for step in steps})


def _select_within(
    limit: int,
    problem: ScoringProblem,
    units: jax.Array,
    coarse: jax.Array | None,
    query: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Selects for one chunk from the first `limit` keys: int32 [batch, heads, top_k, chunk]."""
    scores = score_chunk(query, positions, units=units, coarse=coarse, limit=limit, problem=problem)
    return pick_blocks(
        scores,
        positions,
        top_k=problem.top_k,
        block_size=problem.block_size,
        num_sink_blocks=problem.num_sink_blocks,
        num_local_blocks=problem.num_local_blocks,
        is_causal=problem.is_causal,
    )


def score_chunk(
    query: jax.Array,
    positions: jax.Array,
    *,
    units: jax.Array,
    coarse: jax.Array | None,
    limit: int,
    problem: ScoringProblem,
) -> jax.Array:
    """Scores of the blocks in the first `limit` keys.

    Args:
      query: [batch, num_kv_heads, head_dim, group_size, chunk].
      positions: int32 [batch or 1, chunk].
      units: float32 [batch, num_kv_heads, num_units, head_dim].
      coarse: float32 [batch, num_kv_heads, num_coarse_units, head_dim] or `None`.
      limit: no query of the chunk stands after this many keys, if causal.
      problem: static description.

    Returns:
      float32 [batch, heads, num_blocks(limit), chunk].
    """
    fine_count = num_units(limit, problem.kernel_size, problem.kernel_stride)
    if fine_count == 0:
        heads = units.shape[1] * (query.shape[3] if problem.group_reduction is None else 1)
        shape = (query.shape[0], heads, num_blocks(limit, problem.block_size), query.shape[-1])
        return jnp.full(shape, -jnp.inf, jnp.float32)
    query = query.astype(jnp.float32) * problem.scale
    logits = _unit_logits(query, units[:, :, :fine_count])  # [batch, num_kv_heads, units, group_size, chunk]
    visible = _visible_units(positions, fine_count, problem.kernel_size, problem.kernel_stride, problem.is_causal)
    lse = _denominator(query, positions, logits, visible, coarse, limit, problem)
    probability = jnp.exp(logits - lse)
    return _pool_units(_reduce_group(probability, problem.group_reduction), visible[:, :, :, 0], limit, problem)


def _unit_logits(query: jax.Array, units: jax.Array) -> jax.Array:
    flat = query.reshape(*query.shape[:3], -1)
    logits = jnp.einsum("bnud,bndx->bnux", units, flat, precision=jax.lax.Precision.HIGHEST)
    return logits.reshape(*logits.shape[:3], *query.shape[3:])


def _visible_units(positions: jax.Array, count: int, kernel_size: int, kernel_stride: int, is_causal: bool) -> jax.Array:
    """bool [batch or 1, 1, count, 1, chunk]: a unit is visible once its last token is."""
    last_token = jnp.arange(count, dtype=jnp.int32) * kernel_stride + kernel_size - 1
    positions = positions[:, None, None, None, :]
    return last_token[:, None, None] <= positions if is_causal else jnp.ones_like(positions >= 0)


def _denominator(query, positions, logits, visible, coarse, limit, problem: ScoringProblem) -> jax.Array:
    """Log-sum-exp over the visible units, [batch, num_kv_heads, 1, group_size, chunk]; 0 for a query that sees none."""
    coarse_size, coarse_stride = problem.coarse_kernel_size, problem.coarse_kernel_stride
    coarse_count = 0 if coarse is None else num_units(limit, coarse_size, coarse_stride)
    if coarse_count == 0:
        return _masked_lse(logits, visible)
    coarse_visible = _visible_units(positions, coarse_count, coarse_size, coarse_stride, problem.is_causal)
    coarse_lse = _masked_lse(_unit_logits(query, coarse[:, :, :coarse_count]), coarse_visible)
    if not problem.is_causal:
        return coarse_lse
    # A query that sees no coarse unit stands before the end of the first one, so these are all the units it can see.
    early = num_units(coarse_size - 1, problem.kernel_size, problem.kernel_stride)
    if early == 0:
        return coarse_lse
    early_lse = _masked_lse(logits[:, :, :early], visible[:, :, :early])
    return jnp.where(coarse_visible[:, :, :1], coarse_lse, early_lse)


def _masked_lse(logits: jax.Array, visible: jax.Array) -> jax.Array:
    logits = jnp.where(visible, logits, -jnp.inf)
    highest = logits.max(axis=2, keepdims=True)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    total = jnp.exp(logits - highest).sum(axis=2, keepdims=True)
    return jnp.where(total == 0.0, 0.0, jnp.log(total) + highest)


def _reduce_group(probability: jax.Array, group_reduction: str | None) -> jax.Array:
    """[batch, num_kv_heads, units, group_size, chunk] to [batch, heads, units, chunk]."""
    if group_reduction is not None:
        return getattr(probability, group_reduction)(axis=3)
    batch, num_kv_heads, count, group_size, chunk = probability.shape
    return probability.swapaxes(2, 3).reshape(batch, num_kv_heads * group_size, count, chunk)


def _pool_units(values: jax.Array, visible: jax.Array, limit: int, problem: ScoringProblem) -> jax.Array:
    """Pools [batch, heads, units, chunk] over the units that overlap each block; `visible` is [batch or 1, 1, units, chunk]."""
    unit_ids, overlap = unit_overlap(values.shape[2], limit, problem)
    if unit_ids.shape[1] == 0:
        return jnp.full((*values.shape[:2], unit_ids.shape[0], values.shape[3]), -jnp.inf, values.dtype)
    columns = list(zip(unit_ids.T, overlap.T[:, :, None], strict=True))  # one unit of each block at a time
    if problem.pooling == "max":
        values = jnp.where(visible, values, -jnp.inf)
        terms = [jnp.where(shared > 0, values[:, :, unit], -jnp.inf) for unit, shared in columns]
        return functools.reduce(jnp.maximum, terms)
    values = jnp.where(visible, values, 0.0)
    # Blocks with fewer units name unit 0 instead, which may be NaN.
    weights = [(shared / problem.kernel_stride).astype(values.dtype) for _, shared in columns]
    terms = [jnp.where(w > 0, values[:, :, unit] * w, 0.0) for (unit, _), w in zip(columns, weights, strict=True)]
    # Unit ids ascend along the columns, and a later unit ends later: a block has a visible unit iff its first is one.
    first_visible = jnp.broadcast_to(visible, (*visible.shape[:2], *values.shape[2:]))[:, :, unit_ids[:, 0]]
    return jnp.where((overlap[:, :1] > 0) & first_visible, sum(terms), -jnp.inf)
