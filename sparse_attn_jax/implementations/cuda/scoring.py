"""Block scoring and selection as a custom call of the hand-written CUDA kernel."""

import jax
import numpy as np

from sparse_attn_jax.arguments import SELECTION_AXES, SELECTION_RESULTS
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.scoring_problem import ScoringProblem

_run = library.custom_call(library.SELECT_BLOCKS)
_NUM_TAKEN = Result("num_taken", "bk", "int32")
SELECT, SELECT_PER_QUERY_HEAD = (EntryPoint(_run, SELECTION_AXES, (result, _NUM_TAKEN)) for result in SELECTION_RESULTS)


def select_from_units(
    query: jax.Array,
    compressed: jax.Array,
    coarse: jax.Array | None,
    positions: jax.Array,
    *,
    problem: ScoringProblem,
    segment_blocks: int | None = None,
) -> jax.Array:
    """Block lists of every query; their scores never leave the kernel.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], bfloat16 or float16; head_dim is 64, 96, 128 or 256.
      compressed: [batch, num_units, num_kv_heads, head_dim], dtype of query.
      coarse: [batch, num_coarse_units, num_kv_heads, head_dim], the units of the softmax denominator; `None` is exact.
      positions: int32 [batch or 1, q_len], absolute.
      problem: static description.
      segment_blocks: blocks whose scores are held at a time; `None` is as many as there is room for.

    Returns:
      int32 [batch, num_kv_heads (num_q_heads without a group reduction), q_len, top_k], ascending, -1 last.
    """
    call = SELECT_PER_QUERY_HEAD if problem.group_reduction is None else SELECT
    indices, _ = call(
        query,
        compressed,
        coarse,
        positions,
        sizes=dict(n=problem.top_k),
        scale=np.float32(problem.scale),
        kv_len=np.int32(problem.kv_len),
        block_size=np.int32(problem.block_size),
        kernel_size=np.int32(problem.kernel_size),
        kernel_stride=np.int32(problem.kernel_stride),
        coarse_kernel_size=np.int32(problem.coarse_kernel_size),
        coarse_kernel_stride=np.int32(problem.coarse_kernel_stride),
        top_k=np.int32(problem.top_k),
        num_sink_blocks=np.int32(problem.num_sink_blocks),
        num_local_blocks=np.int32(problem.num_local_blocks),
        pooling=problem.pooling,
        group_reduction=problem.group_reduction or "none",
        is_causal=problem.is_causal,
        segment_blocks=np.int32(segment_blocks or 0),
        **library.call_attributes(problem),
    )
    return indices
