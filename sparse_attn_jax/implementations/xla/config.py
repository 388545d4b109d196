"""Step sizes of the XLA implementation."""

import dataclasses

from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Problem

# Scores held per step. 1 MiB of float32 stay in a CPU core's cache and keep two cores' matmuls busy.
_STEP_SCORES = 2**18
_CHUNK_KEYS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """How much one loop step holds.

    Attributes:
      tiles: query tiles per step.
      heads: KV heads per step; divides num_kv_heads.
      chunk: listed KV blocks per step.
    """

    tiles: int
    heads: int
    chunk: int


def choose_config(problem: Problem, plan: TilePlan) -> Config:
    """Fills a step with heads first, because they share token positions, then with neighbouring tiles."""
    chunk = min(plan.blocks.shape[-1], max(1, _CHUNK_KEYS // problem.kv_block_size))
    scores_per_item = plan.tile_size * problem.group_size * chunk * problem.kv_block_size
    items = max(1, _STEP_SCORES // scores_per_item)
    heads = max(h for h in range(1, problem.num_kv_heads + 1) if problem.num_kv_heads % h == 0 and h <= items)
    tiles = max(1, min(items // heads, plan.num_tiles))
    return Config(tiles=tiles, heads=heads, chunk=chunk)
