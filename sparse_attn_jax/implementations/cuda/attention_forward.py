"""Block-sparse flash attention, forward, as a custom call of the hand-written CUDA kernel."""

import jax

from sparse_attn_jax.arguments import AXES, attention_arguments, attention_attributes
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask

FORWARD = EntryPoint(
    library.custom_call(library.ATTENTION_FORWARD),
    tuple(AXES.values()),
    (Result("out", "bshd"), Result("lse", "bsh", "float32"), Result("num_taken", "bk", "int32")),
)


def forward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the visible keys of its selected blocks.

    Returns:
      out [batch, q_len, num_q_heads, head_dim] in the query's dtype, and the natural-log lse [batch, q_len, num_q_heads],
      float32. A row that sees nothing has out 0 and lse -inf.
    """
    attributes = library.call_attributes(problem) | attention_attributes(problem, plan)
    out, lse, _ = FORWARD(*attention_arguments(problem, operands, plan, mask), **attributes)
    return out, lse
