"""The op's gradient rule around whichever implementation was chosen."""

import functools

import jax
import jax.numpy as jnp

from sparse_attn_jax import dispatch, jax_compat
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask


def attend(
    implementation: str, problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask
) -> tuple[jax.Array, jax.Array]:
    """Runs a problem: (out, lse), both differentiable with respect to `operands`."""
    # Under `shard_map`, keys that all devices share while queries differ get a gradient that is summed over devices.
    operands = jax.tree.map(lambda x: jax_compat.vary_like(x, (operands, plan, mask)), operands)
    return _attend(implementation, problem, operands, plan, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, problem, operands, plan, mask):
    return dispatch.get(implementation).forward(problem, operands, plan, mask)


def _attend_forward(implementation, problem, operands, plan, mask):
    out, lse = _attend(implementation, problem, operands, plan, mask)
    return (out, lse), (operands, plan, mask, out, lse)


def _attend_backward(implementation, problem, residuals, cotangents):
    operands, plan, mask, out, lse = residuals
    d_operands = dispatch.get(implementation).backward(problem, operands, plan, mask, out, lse, *cotangents)
    return d_operands, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def merge(outs: list[jax.Array], lses: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`merge_attention` without argument checks."""
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    shift = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = [jnp.exp(lse - shift) for lse in lses]
    total = sum(weights)
    is_empty = total == 0
    # Inside the log and the division as well, so that gradients of empty rows are 0 and not NaN.
    safe_total = jnp.where(is_empty, 1, total)
    out = sum(w[..., None] * out.astype(w.dtype) for w, out in zip(weights, outs, strict=True)) / safe_total[..., None]
    return out.astype(outs[0].dtype), jnp.where(is_empty, -jnp.inf, shift + jnp.log(safe_total))
