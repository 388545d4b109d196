"""Block scoring and selection: the scores by a Pallas kernel, for some queries at a time, and the best of them by another.

What is left to XLA between and after the two is one pass over the scores each: their order as integers, and the lists.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax import jax_compat
from sparse_attn_jax.arguments import SELECTION_AXES, SELECTION_RESULTS
from sparse_attn_jax.block_top_k import pick_blocks
from sparse_attn_jax.entry_point import EntryPoint, is_off
from sparse_attn_jax.implementations.mosaic import block_scores, scoring_layout, steps
from sparse_attn_jax.implementations.mosaic.kth_largest import kth_largest
from sparse_attn_jax.implementations.mosaic.scoring_layout import COLUMNS, STEP_UNITS, ScoringGeometry
from sparse_attn_jax.query_chunks import map_chunks
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.selection import num_blocks

# Scores that are held at a time, unless 8 tokens of all batch rows and lists have more: 128 MiB, and as much for their ranks.
CHUNK_ELEMENTS = 2**25
# That a unit may be as long as: it is multiplied once for each block that it overlaps.
MAX_KERNEL_BLOCKS = 4


def geometry_of(
    problem: ScoringProblem, *, batch: int, q_len: int, num_q_heads: int, plan: scoring_layout.UnitSteps | None
) -> ScoringGeometry:
    """The call of the kernel for so many queries; heads may be fewer than the problem's, of one device."""
    list_heads = 1 if problem.group_reduction is None else problem.group_size
    return ScoringGeometry(
        batch=batch,
        q_len=q_len,
        num_lists=num_q_heads // list_heads,
        list_heads=list_heads,
        lists_per_kv_head=problem.group_size // list_heads,
        head_dim=problem.head_dim,
        dtype=problem.dtype,
        tile_tokens=scoring_layout.tokens_of_tile(list_heads, q_len),
        num_denominators=plan.num_denominators if plan else 0,
        width=plan.width if plan else 0,
        num_block_groups=num_blocks(num_blocks(problem.kv_len, problem.block_size), STEP_UNITS),
        scale=problem.scale,
        kernel_stride=problem.kernel_stride,
        pooling=problem.pooling,
        group_reduction=problem.group_reduction,
    )


def reasons_of_size(problem: ScoringProblem) -> list[str]:
    """Reasons that sizes give against `problem`."""
    reasons = []
    if problem.kernel_size > MAX_KERNEL_BLOCKS * problem.block_size:
        most = f"at most {MAX_KERNEL_BLOCKS} blocks, of {problem.block_size}"
        reasons.append(f"kernel_size is {problem.kernel_size}; supported: {most}")
    g = geometry_of(problem, batch=1, q_len=COLUMNS, num_q_heads=problem.num_q_heads, plan=None)
    needed = block_scores.least_bytes(g)
    if needed > steps.MAX_SHARED_BYTES:
        sizes = f"the group size is {problem.group_size} and head_dim {problem.head_dim}"
        reasons.append(f"{sizes}, which needs {needed} bytes of shared memory; supported: at most {steps.MAX_SHARED_BYTES}")
    return reasons


def _run(arrays, outputs, attributes):
    """One device's part of a call."""
    query, compressed, coarse, positions, unit_ids, table = arrays
    coarse = None if is_off(coarse.shape) or coarse.shape[1] == 0 else coarse
    problem = attributes["problem"]
    batch, q_len, num_q_heads, _ = query.shape
    num_kv_blocks = num_blocks(problem.kv_len, problem.block_size)
    if 0 in (q_len, batch, num_kv_blocks):
        return (jnp.full(outputs[0].shape, -1, jnp.int32),)
    if len(positions) > 1:  # their rows repeat
        positions = jnp.tile(positions, (batch // len(positions), 1))
    plan = scoring_layout.unit_steps(problem, 0 if coarse is None else coarse.shape[1])
    whole = geometry_of(problem, batch=batch, q_len=q_len, num_q_heads=num_q_heads, plan=plan)
    config = block_scores.choose_config(whole)
    tokens = config.warpgroups * whole.tile_tokens  # of a thread block
    most = attributes["chunk_elements"] // (batch * whole.num_lists * whole.num_block_groups * STEP_UNITS)
    num_queries = min(q_len, max(most // tokens, 1) * tokens)  # whose scores are held at a time
    g = dataclasses.replace(whole, q_len=num_blocks(num_queries, tokens) * tokens)
    units = scoring_layout.arrange_units(unit_ids, compressed, coarse, g.head_columns)

    def score(some_query, some_positions):
        if g.width == 0:  # no unit is complete
            return jnp.full((batch, g.num_lists, num_kv_blocks, num_queries), -jnp.inf, jnp.float32)
        padding = (0, g.q_len - num_queries)
        some_positions = jnp.pad(some_positions, [(0, 0), padding], mode="edge")
        inputs = dict(
            query=scoring_layout.arrange_queries(g, jnp.pad(some_query, [(0, 0), padding, (0, 0), (0, 0)])),
            units=units,
            table=table,
            positions=scoring_layout.arrange_positions(g, some_positions),
            walks=scoring_layout.walks(g, table, problem, some_positions.reshape(len(some_positions), -1, tokens)),
        )
        return block_scores.score_tiles(g, config, inputs)[:, :, :num_kv_blocks, :num_queries]

    def select(start):
        some_query = jax.lax.dynamic_slice_in_dim(query, start, num_queries, axis=1)
        some_positions = jax.lax.dynamic_slice_in_dim(positions, start, num_queries, axis=1)
        return pick_blocks(
            score(some_query, some_positions),
            some_positions,
            top_k=problem.top_k,
            block_size=problem.block_size,
            num_sink_blocks=problem.num_sink_blocks,
            num_local_blocks=problem.num_local_blocks,
            is_causal=problem.is_causal,
            kth_largest=kth_largest,
        )

    return (map_chunks(select, q_len, num_queries),)


# Beside those of a selection: units and table of its `UnitSteps`.
ARGUMENTS = (*SELECTION_AXES, "lz", "lyz")
SELECT, SELECT_PER_QUERY_HEAD = (EntryPoint(_run, ARGUMENTS, (result,)) for result in SELECTION_RESULTS)


def select_from_units(
    query: jax.Array,
    compressed: jax.Array,
    coarse: jax.Array | None,
    positions: jax.Array,
    *,
    problem: ScoringProblem,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> jax.Array:
    """Block lists of every query; scores are held for some queries at a time, and those of units never.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], bfloat16 or float16.
      compressed: [batch, num_units, num_kv_heads, head_dim], dtype of query.
      coarse: [batch, num_coarse_units, num_kv_heads, head_dim], the units of the softmax denominator; `None` is exact.
      positions: int32 [batch or 1, q_len], absolute.
      problem: static description.
      chunk_elements: scores that are held at a time, in so far as whole tiles allow.

    Returns:
      int32 [batch, num_kv_heads (num_q_heads without a group reduction), q_len, top_k], ascending, -1 last.
    """
    call = SELECT_PER_QUERY_HEAD if problem.group_reduction is None else SELECT
    plan = scoring_layout.unit_steps(problem, 0 if coarse is None else coarse.shape[1])
    (indices,) = call(
        query,
        compressed,
        coarse,
        positions,
        jnp.asarray(plan.units),
        jnp.asarray(plan.table),
        sizes=dict(n=problem.top_k),
        may_partition=not jax_compat.interprets_kernels(),
        problem=problem,
        chunk_elements=chunk_elements,
    )
    return indices
