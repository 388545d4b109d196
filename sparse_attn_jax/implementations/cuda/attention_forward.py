"""Block-sparse flash attention, forward, as a custom call of the hand-written CUDA kernel."""

import jax
import jax.numpy as jnp

from sparse_attn_jax.implementations.cuda import custom_call
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
    results = (jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32))
    arguments = custom_call.inputs(problem, operands, plan, mask)
    return jax.ffi.ffi_call(TARGET, results)(*arguments, **custom_call.attributes(problem, plan, seed))
