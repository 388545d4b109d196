"""Block-sparse flash attention, backward, as a custom call of the hand-written CUDA kernels."""

import dataclasses

import jax

from sparse_attn_jax.arguments import AXES, attention_arguments, attention_attributes
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.planning import add_inverse
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask
from sparse_attn_jax.splitting import split_lists

BACKWARD = EntryPoint(
    library.custom_call(library.ATTENTION_BACKWARD),
    (
        *AXES.values(),
        *("bshd", "bshd", "bsh", "bsh"),  # out, d_out, lse, d_lse
        *("Ppo", "Ppe", "Ppe"),  # the inverse: offsets, tiles, slots
        *("Ppo", "Ppa"),  # the parts of its lists: parts, first_partials
    ),
    (
        Result("d_query", "bshd"),
        Result("d_key", "btkd"),
        Result("d_value", "btkd"),
        Result("d_key_bias", "bkt", "float32"),
        Result("delta", "bsh", "float32"),
        Result("partials", "bkmuv", "float32"),
        Result("num_taken", "bk", "int32"),
    ),
)


def backward(
    problem: Problem,
    operands: Operands,
    plan: TilePlan,
    mask: TokenMask,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> Operands:
    """Gradients of the operands, each in its operand's shape and dtype, from the results of `forward` and their cotangents."""
    plan = add_inverse(plan)
    parts = split_lists(plan)
    bias = operands.key_bias
    arguments = (
        *attention_arguments(problem, operands, plan, mask),
        out,
        d_out.astype(operands.query.dtype),
        lse,
        d_lse,
        plan.inverse_offsets,
        plan.inverse_tiles,
        plan.inverse_slots,
        parts.first,
        parts.first_partial,
    )
    attributes = library.call_attributes(problem) | attention_attributes(problem, plan)
    sizes = dict(m=parts.max_partials, u=problem.kv_block_size, v=2 * problem.head_dim + 2)
    without = ("d_key_bias",) if bias is None else ()
    d_query, d_key, d_value, d_bias, *_ = BACKWARD(*arguments, sizes=sizes, without=without, **attributes)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return dataclasses.replace(operands, query=d_query, key=d_key, value=d_value, key_bias=d_bias)
