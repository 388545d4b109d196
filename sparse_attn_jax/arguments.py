"""The arguments that every call of the kernels takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.entry_point import Result
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask

# Of block selection: query, compressed, coarse, positions, and the lists of KV heads or of query heads.
SELECTION_AXES = ("bshd", "Uukd", "Uckd", "Qs")
SELECTION_RESULTS = (Result("indices", "bksn", "int32"), Result("indices", "bhsn", "int32"))

# Of attention, by name, as `EntryPoint` takes them.
AXES = dict(
    query="bshd",
    key="Ktkd",
    value="Ktkf",
    key_bias="Kkt",
    blocks="Ppnc",
    counts="Ppn",
    membership="Ppncw",
    q_positions="Qs",
    kv_positions="Tt",
    q_segments="bs",
    kv_segments="bt",
    window_left="Lh",
    window_right="Rh",
    num_sinks="Nh",
)


def attention_arguments(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array | None, ...]:
    """The arrays of `AXES`, in its order."""

    def per_batch(x):
        return None if x is None else jnp.broadcast_to(x, (problem.batch, x.shape[1]))

    def row(x):
        return None if x is None else x[None]

    bias = operands.key_bias
    return (
        operands.query,
        operands.key,
        operands.value,
        None if bias is None else bias.astype(jnp.float32),
        plan.blocks,
        plan.counts,
        plan.membership,
        mask.q_positions,
        mask.kv_positions if problem.varlen else None,
        per_batch(mask.q_segments),
        per_batch(mask.kv_segments),
        row(mask.window_left),
        row(mask.window_right),
        row(mask.num_sinks),
    )


def attention_attributes(problem: Problem, plan: TilePlan) -> dict[str, Any]:
    return dict(
        scale=np.float32(problem.scale),
        logits_soft_cap=np.float32(problem.logits_soft_cap or 0),
        kv_block_size=np.int32(problem.kv_block_size),
        tile_size=np.int32(plan.tile_size),
        row_group_tokens=np.int32(plan.row_group_tokens),
        row_group_heads=np.int32(plan.row_group_heads),
        is_causal=problem.is_causal,
    )
