"""Block-sparse flash attention, backward, as a custom call of the hand-written CUDA kernels."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax.implementations.cuda import custom_call
from sparse_attn_jax.planning import TilePlan, add_inverse
from sparse_attn_jax.problem import Operands, Problem, TokenMask

TARGET = "sparse_attn_attention_backward"


def backward(
    problem: Problem,
    operands: Operands,
    plan: TilePlan,
    mask: TokenMask,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    seed: int = 0,
) -> Operands:
    """Gradients of the operands, each in its operand's shape and dtype, from the results of `forward` and their cotangents."""
    plan = add_inverse(plan)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    bias = operands.key_bias
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.query, operands.key, operands.value)]
    results.append(jax.ShapeDtypeStruct((0,) if bias is None else bias.shape, jnp.float32))
    arguments = (
        *custom_call.inputs(problem, operands, plan, mask),
        d_out.astype(operands.query.dtype),
        lse,
        delta,
        plan.inverse_offsets,
        plan.inverse_tiles,
        plan.inverse_slots,
    )
    call = jax.ffi.ffi_call(TARGET, results)
    d_query, d_key, d_value, d_bias = call(*arguments, **custom_call.attributes(problem, plan, seed))
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return dataclasses.replace(operands, query=d_query, key=d_key, value=d_value, key_bias=d_bias)
