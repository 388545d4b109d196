"""Block-sparse flash attention, forward, as a custom call of the hand-written CUDA kernels (`csrc`)."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask

TARGET = "sparse_attn_attention_forward"


def forward(
    problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask, *, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the visible keys of its selected blocks.

    Args:
      seed: the order in which a simulated grid runs.

    Returns:
      out [batch, q_len, num_q_heads, head_dim] in the query's dtype, and the natural-log lse [batch, q_len, num_q_heads],
      float32. A row that sees nothing has out 0 and lse -inf.
    """
    query = operands.query

    def option(x, dtype=jnp.int32):
        return jnp.zeros((0,), dtype) if x is None else x.astype(dtype)

    def per_batch(x):
        return option(None if x is None else jnp.broadcast_to(x, (problem.batch, x.shape[1])))

    call = jax.ffi.ffi_call(
        TARGET,
        (jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)),
    )
    return call(
        query,
        operands.key,
        operands.value,
        option(operands.key_bias, jnp.float32),
        plan.blocks,
        plan.counts,
        option(plan.membership, jnp.uint32),
        mask.q_positions,
        option(mask.kv_positions[0] if problem.varlen else None),
        per_batch(mask.q_segments),
        per_batch(mask.kv_segments),
        option(mask.window_left),
        option(mask.window_right),
        option(mask.num_sinks),
        scale=np.float32(problem.scale),
        logits_soft_cap=np.float32(problem.logits_soft_cap or 0),
        kv_block_size=np.int32(problem.kv_block_size),
        tile_size=np.int32(plan.tile_size),
        row_group_tokens=np.int32(plan.row_group_tokens),
        row_group_heads=np.int32(plan.row_group_heads),
        is_causal=problem.is_causal,
        seed=np.int64(seed),
    )
