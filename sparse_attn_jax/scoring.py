"""Compress keys, score blocks, select blocks: the pipeline that every data-dependent selector is made of."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_attn_jax import dispatch
from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.block_top_k import pick_blocks
from sparse_attn_jax.problem import device_of
from sparse_attn_jax.scoring_problem import ScoringProblem, absolute_positions, num_units, unit_overlap
from sparse_attn_jax.selection import BlockSelection, num_blocks


def compress_keys(key: jax.Array, kernel_size: int = 32, kernel_stride: int = 16) -> jax.Array:
    """Means over windows of keys, the units that block scores are computed from.

    unit[j] = mean of key[kernel_stride * j : kernel_stride * j + kernel_size], complete windows only

    The parameter-free compression of InfLLM-v2.

    Args:
      key: [batch, kv_len, num_kv_heads, head_dim], any floating dtype.
      kernel_size: tokens per unit.
      kernel_stride: tokens from the start of one unit to the start of the next.

    Returns:
      [batch, num_units, num_kv_heads, head_dim], dtype of key; num_units is (kv_len - kernel_size) // kernel_stride + 1, or 0
      if kv_len < kernel_size.

    Raises:
      ValueError: `key` is not a floating array of rank 4, or a size is no positive int.

    Differentiable. Accumulates in float32 (float64 for float64 keys).
    """
    checks.check_key(key)
    checks.check_units("", kernel_size, kernel_stride)
    batch, kv_len, *rest = key.shape
    count = num_units(kv_len, kernel_size, kernel_stride)
    if count == 0:
        return jnp.zeros((batch, 0, *rest), key.dtype)
    # A window is a run of whole segments, so that the tokens are read once however much the windows overlap.
    segment = math.gcd(kernel_size, kernel_stride)
    segments = key[:, : kv_len - kv_len % segment].reshape(batch, -1, segment, *rest)
    segments = segments.sum(axis=2, dtype=jnp.promote_types(key.dtype, jnp.float32))
    step = kernel_stride // segment
    last_start = (count - 1) * step
    windows = [segments[:, i : i + last_start + 1 : step] for i in range(kernel_size // segment)]
    return (sum(windows) / kernel_size).astype(key.dtype)


def score_blocks(
    query: jax.Array,
    compressed_key: jax.Array,
    *,
    kv_len: int,
    block_size: int = 64,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    pooling: str = "max",
    group_reduction: str | None = "sum",
    is_causal: bool = False,
    q_offset: int | jax.Array | None = None,
    coarse_key: jax.Array | None = None,
    coarse_kernel_size: int = 128,
    coarse_kernel_stride: int = 64,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Scores every block of keys for every query: the definition, for small sizes.

    p[h, i, j] = exp(scale * query[i, h] . unit[j] - lse[h, i])                    j over the units visible to query i
    score[n, i, b] = pool over units j that overlap block b of (reduce over the heads h of group n of p[h, i, j])

    Unit j spans the tokens [kernel_stride * j, kernel_stride * j + kernel_size). Under causality a query at absolute position t
    sees it once its last token is at or before t. `pooling="max"` is InfLLM-v2, `"overlap_sum"` is NSA. It holds
    [batch, num_q_heads, q_len, num_units] at once; selectors use a path that does not.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
      compressed_key: [batch, num_units, num_kv_heads, head_dim], from `compress_keys` with the same sizes.
      kv_len: number of keys before compression.
      block_size: tokens per scored block; need not be a multiple of `kernel_stride`.
      kernel_size: tokens per unit.
      kernel_stride: tokens between the starts of neighbouring units.
      pooling: `"max"`, or `"overlap_sum"`: each unit weighs (tokens it shares with the block) / kernel_stride.
      group_reduction: `"sum"`, `"mean"` or `"max"` over the query heads of a KV head, or `None` for scores per query head.
      is_causal: units that end after the query are invisible. False by default, as in `jax.nn`.
      q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]. `None` is kv_len - q_len: the last
        query is aligned with the last key (bottom-right), where `jax.nn` aligns top-left.
      coarse_key: [batch, num_coarse_units, num_kv_heads, head_dim]: take lse from these units instead, uncorrected for their
        number, as InfLLM-v2 does (a score may then exceed 1; only the order matters). A query that sees no coarse unit uses the
        fine ones.
      coarse_kernel_size: tokens per coarse unit.
      coarse_kernel_stride: tokens between the starts of neighbouring coarse units.
      scale: multiplies the dot products. `None` is head_dim ** -0.5.
      implementation: `None`, or "xla" or a sequence with it: no other implementation gives scores away.

    Returns:
      float32 [batch, num_kv_heads, q_len, num_kv_blocks] (num_q_heads without a group reduction). A block without a visible
      unit is -inf; under causality that includes every block after the query's own.

    Raises:
      ValueError: an argument is wrong; the message names it, what was found and what is needed.
      NotImplementedError: the named implementation does not score blocks.
    """
    checks.check_array("compressed_key", compressed_key, checks.UNIT_AXES)
    checks.check_query(query, compressed_key, "compressed_key")
    problem = scoring_problem(
        query,
        compressed_key,
        kv_len=kv_len,
        block_size=block_size,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        pooling=pooling,
        group_reduction=group_reduction,
        is_causal=is_causal,
        coarse_kernel_size=coarse_kernel_size,
        coarse_kernel_stride=coarse_kernel_stride,
        scale=scale,
    )
    _check_unit_arrays({"compressed_key": compressed_key, "coarse_key": coarse_key}, problem)
    if "xla" not in dispatch.requested_names(implementation):
        raise NotImplementedError(
            f"`implementation` is {implementation!r}; scores are computed by 'xla' alone. Kernels fuse them with the selection."
        )
    batch, q_len, num_q_heads, _ = query.shape
    checks.check_q_offset(q_offset, batch, q_len, kv_len)
    heads = num_q_heads if group_reduction is None else compressed_key.shape[2]
    if compressed_key.shape[1] == 0:
        return jnp.full((batch, heads, q_len, num_blocks(kv_len, block_size)), -jnp.inf, jnp.float32)
    positions = absolute_positions(q_offset, q_len, kv_len)
    probability, visible = _unit_probabilities(query, compressed_key, coarse_key, positions, problem)
    if group_reduction is not None:
        probability = getattr(probability, group_reduction)(axis=2, keepdims=True)
    probability = probability.reshape(batch, heads, q_len, -1)
    return _pool_units(probability, visible[:, :, 0], problem)


def scoring_problem(
    query: jax.Array,
    compressed: jax.Array,
    *,
    scale: float | None,
    top_k: int = 1,
    num_sink_blocks: int = 0,
    num_local_blocks: int = 1,
    **fields,
) -> ScoringProblem:
    """The static description of a call, checked. `fields` are those of `ScoringProblem`."""
    checks.check_array("query", query, checks.QUERY_AXES)
    checks.check_array("compressed", compressed, checks.UNIT_AXES)
    checks.check_length("kv_len", fields["kv_len"])
    checks.check_int("block_size", fields["block_size"], 1)
    checks.check_units("", fields["kernel_size"], fields["kernel_stride"])
    checks.check_units("coarse_", fields["coarse_kernel_size"], fields["coarse_kernel_stride"])
    checks.check_reductions(fields["pooling"], fields["group_reduction"])
    checks.check_bool("is_causal", fields["is_causal"])
    checks.check_scale(scale)
    checks.check_forced_blocks(top_k, num_sink_blocks, num_local_blocks)
    checks.check_own_block(num_local_blocks, fields["is_causal"])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return ScoringProblem(
        num_q_heads=query.shape[2],
        num_kv_heads=compressed.shape[2],
        head_dim=query.shape[-1],
        dtype=query.dtype.name,
        unit_dtype=compressed.dtype.name,
        scale=scale,
        top_k=top_k,
        num_sink_blocks=num_sink_blocks,
        num_local_blocks=num_local_blocks,
        **device_of(query)._asdict(),
        **fields,
    )


def _check_unit_arrays(units: dict[str, jax.Array | None], problem: ScoringProblem) -> None:
    """Both arrays, fine and coarse by name, must hold the complete units of `problem.kv_len` tokens of the same keys."""
    (name, compressed), (coarse_name, coarse) = units.items()
    checks.check_unit_array(name, compressed, problem.kv_len, problem.kernel_size, problem.kernel_stride)
    if coarse is not None:
        sizes = problem.coarse_kernel_size, problem.coarse_kernel_stride
        checks.check_unit_array(coarse_name, coarse, problem.kv_len, *sizes, like=compressed)


def _unit_probabilities(query, compressed, coarse, positions, problem: ScoringProblem) -> tuple[jax.Array, jax.Array]:
    """[batch, num_kv_heads, group_size, q_len, num_units], 0 where invisible, and the visibility it broadcasts with."""
    batch, q_len, num_q_heads, head_dim = query.shape
    num_kv_heads = compressed.shape[2]
    query = query.reshape(batch, q_len, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    query = query.astype(jnp.float32) * problem.scale
    logits, visible = _logits(query, compressed, positions, problem.kernel_size, problem.kernel_stride, problem.is_causal)
    lse = _visible_lse(logits, visible)
    if coarse is not None and coarse.shape[1] > 0:
        coarse_logits, coarse_visible = _logits(
            query, coarse, positions, problem.coarse_kernel_size, problem.coarse_kernel_stride, problem.is_causal
        )
        sees_coarse = coarse_visible.any(axis=-1, keepdims=True)
        lse = jnp.where(sees_coarse, _visible_lse(coarse_logits, coarse_visible), lse)
    return jnp.exp(jnp.where(visible, logits - lse, -jnp.inf)), visible


def _logits(query, units, positions, kernel_size, kernel_stride, is_causal) -> tuple[jax.Array, jax.Array]:
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bqngd,bund->bngqu", query, units.astype(jnp.float32), precision=precision)
    last_token = jnp.arange(units.shape[1], dtype=jnp.int32) * kernel_stride + kernel_size - 1
    positions = positions[:, None, None, :, None]
    visible = last_token <= positions if is_causal else jnp.ones_like(last_token <= positions)
    return logits, visible


def _visible_lse(logits: jax.Array, visible: jax.Array) -> jax.Array:
    # A row that sees nothing takes all its units, so that neither its value nor its gradient is NaN; it is masked later.
    row_sees_none = ~visible.any(axis=-1, keepdims=True)
    return jax.nn.logsumexp(jnp.where(visible | row_sees_none, logits, -jnp.inf), axis=-1, keepdims=True)


def _pool_units(values: jax.Array, visible: jax.Array, problem: ScoringProblem) -> jax.Array:
    """Pools [batch, heads, q_len, num_units] over the units that overlap each block; `visible` broadcasts with it."""
    unit_ids, overlap = unit_overlap(values.shape[-1], problem.kv_len, problem)
    overlaps = jnp.asarray(overlap > 0) & visible[..., unit_ids]  # [batch or 1, 1, q_len, num_kv_blocks, width]
    values = values[..., unit_ids]
    if problem.pooling == "max":
        return jnp.where(overlaps, values, -jnp.inf).max(axis=-1, initial=-jnp.inf)
    weights = jnp.asarray(overlap / problem.kernel_stride, jnp.float32)
    total = jnp.where(overlaps, values * weights, 0.0).sum(axis=-1)
    return jnp.where(overlaps.any(axis=-1), total, -jnp.inf)


def select_blocks(
    scores: jax.Array,
    top_k: int,
    *,
    kv_len: int,
    block_size: int = 64,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    is_causal: bool = False,
    q_offset: int | jax.Array | None = None,
) -> BlockSelection:
    """The blocks each query attends: the forced ones, then those of the highest score.

    The forced blocks are the first `num_sink_blocks` and the `num_local_blocks` up to and including the query's own, those that
    exist; they count inside `top_k`. The others follow by score, the lower id first among equals. A block of score -inf or NaN
    is chosen only if forced. Under causality no block after the query's own is chosen, and its own always is.

    Args:
      scores: floating [batch, heads, q_len, num_kv_blocks], heads in {1, num_kv_heads, num_q_heads}. Higher is better.
      top_k: blocks per query, the forced ones included.
      kv_len: number of keys.
      block_size: tokens per block.
      num_sink_blocks: leading blocks that every query keeps.
      num_local_blocks: most recent blocks that every query keeps, its own included; without causality, too, they are its own
        and those before it. At least 1 if causal.
      is_causal: leave out blocks after the query's own. False by default, as in `jax.nn`.
      q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]. `None` is kv_len - q_len.

    Returns:
      A `BlockSelection` with a list per query (`q_block_size=1`): int32 [batch, heads, q_len, top_k], ascending, -1 last.

    Raises:
      ValueError: an argument is wrong, or the forced blocks exceed `top_k`.

    Carries no gradient: selection is `stop_gradient`.
    """
    checks.check_forced_blocks(top_k, num_sink_blocks, num_local_blocks)
    checks.check_length("kv_len", kv_len)
    checks.check_int("block_size", block_size, 1)
    checks.check_bool("is_causal", is_causal)
    checks.check_own_block(num_local_blocks, is_causal)
    checks.check_scores(scores, kv_len, block_size)
    q_len = scores.shape[2]
    checks.check_q_offset(q_offset, scores.shape[0], q_len, kv_len)
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    ids = pick_blocks(
        scores.swapaxes(2, 3),
        absolute_positions(q_offset, q_len, kv_len),
        top_k=top_k,
        block_size=block_size,
        num_sink_blocks=num_sink_blocks,
        num_local_blocks=num_local_blocks,
        is_causal=is_causal,
    )
    return BlockSelection(ids.swapaxes(2, 3), q_block_size=1, kv_block_size=block_size)


def select_blocks_from_units(
    query: jax.Array,
    compressed: jax.Array,
    coarse: jax.Array | None,
    *,
    problem: ScoringProblem,
    q_offset: int | jax.Array | None,
) -> BlockSelection:
    """`select_blocks(score_blocks(...))` fused over chunks of queries; arguments as there, `problem` from `scoring_problem`."""
    checks.check_array("compressed", compressed, checks.UNIT_AXES)
    checks.check_query(query, compressed, "compressed")
    _check_unit_arrays({"compressed": compressed, "coarse": coarse}, problem)
    batch, q_len = query.shape[:2]
    checks.check_q_offset(q_offset, batch, q_len, problem.kv_len)
    query, compressed, coarse = jax.lax.stop_gradient((query, compressed, coarse))
    positions = absolute_positions(q_offset, q_len, problem.kv_len)
    select_from_units = dispatch.get(dispatch.choose(problem, None)).select_from_units
    ids = select_from_units(query, compressed, coarse, positions, problem=problem)
    return BlockSelection(ids, q_block_size=1, kv_block_size=problem.block_size)
