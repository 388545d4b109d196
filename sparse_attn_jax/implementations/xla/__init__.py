"""The portable implementation: pure XLA, any platform."""

from sparse_attn_jax.implementations.xla.attention_backward import backward as backward
from sparse_attn_jax.implementations.xla.attention_forward import forward as forward
from sparse_attn_jax.implementations.xla.scoring import select_from_units as select_from_units
from sparse_attn_jax.planning import default_tile_size
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem


def tile_size(problem: Problem) -> int:
    """Query tokens per tile."""
    return default_tile_size(problem.q_block_size, problem.group_size, problem.q_len)


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward; none."""
    del problem
    return ()


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`; none."""
    del problem
    return ()
