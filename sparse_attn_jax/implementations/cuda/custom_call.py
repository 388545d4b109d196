"""The arguments that every custom call of an attention kernel takes (`csrc/ffi`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask


def option(x: jax.Array | None, dtype=jnp.int32) -> jax.Array:
    """An option that is off is an array without elements."""
    return jnp.zeros((0,), dtype) if x is None else x.astype(dtype)


def inputs(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, ...]:
    def per_batch(x):
        return option(None if x is None else jnp.broadcast_to(x, (problem.batch, x.shape[1])))

    return (
        operands.query,
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
    )


def attributes(problem: Problem, plan: TilePlan, seed: int) -> dict[str, Any]:
    return dict(
        scale=np.float32(problem.scale),
        logits_soft_cap=np.float32(problem.logits_soft_cap or 0),
        kv_block_size=np.int32(problem.kv_block_size),
        tile_size=np.int32(plan.tile_size),
        row_group_tokens=np.int32(plan.row_group_tokens),
        row_group_heads=np.int32(plan.row_group_heads),
        is_causal=problem.is_causal,
        seed=np.int64(seed),
        arch=np.int32(80),
    )
