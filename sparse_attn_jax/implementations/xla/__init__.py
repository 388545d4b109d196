"""The portable implementation: pure XLA, any platform."""

from sparse_attn_jax import planning
from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.implementations.xla.attention_backward import backward as backward
from sparse_attn_jax.implementations.xla.attention_forward import forward as forward
from sparse_attn_jax.implementations.xla.bounds import find_extrema as find_extrema
from sparse_attn_jax.implementations.xla.bounds import select_by_bounds as select_by_bounds
from sparse_attn_jax.implementations.xla.paged_attention import attend_pages as attend_pages
from sparse_attn_jax.implementations.xla.scoring import select_from_units as select_from_units
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.selection import BlockSelection


def build_plan(problem: Problem, selection: BlockSelection) -> TilePlan:
    """The plan that the loops walk. They have no use for the inverse."""
    sizes = dict(q_len=problem.q_len, kv_len=problem.kv_len)
    heads = dict(num_q_heads=problem.num_q_heads, num_kv_heads=problem.num_kv_heads)
    return planning.build_plan(selection, **sizes, **heads, with_inverse=False)


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward; none."""
    del problem
    return ()


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`; none."""
    del problem
    return ()


def supports_paged(problem: PagedProblem) -> tuple[str, ...]:
    """Reasons against attending over pages; none."""
    del problem
    return ()


def supports_extrema(problem: ExtremaProblem) -> tuple[str, ...]:
    """Reasons against finding the extrema of blocks; none."""
    del problem
    return ()


def supports_bounds(problem: BoundProblem) -> tuple[str, ...]:
    """Reasons against selecting blocks by bounds; none."""
    del problem
    return ()
