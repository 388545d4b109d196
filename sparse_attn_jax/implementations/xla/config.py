"""Step sizes of the XLA implementation."""

import dataclasses

from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Problem

# Scores held per step. 1 MiB of float32 stay in a CPU core's cache and keep two cores' matmuls busy.
STEP_SCORES = 2**18
CHUNK_KEYS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """How much one loop step holds.

    Attributes:
      items: query tiles, each of one batch row and KV head.
      chunk: listed KV blocks of each item.
    """

    items: int
    chunk: int


def choose_config(problem: Problem, plan: TilePlan) -> Config:
    chunk = min(plan.blocks.shape[-1], max(1, CHUNK_KEYS // problem.kv_block_size))
    scores_per_item = plan.tile_size * problem.group_size * chunk * problem.kv_block_size
    num_items = problem.batch * problem.num_kv_heads * plan.num_tiles
    return Config(items=max(1, min(STEP_SCORES // scores_per_item, num_items)), chunk=chunk)
