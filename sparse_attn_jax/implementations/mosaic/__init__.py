"""The Pallas Mosaic GPU implementation. Its kernels are not part of this version: it answers every problem with that reason."""

from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem

NO_KERNELS = "this version of sparse_attn_jax has no Pallas Mosaic GPU kernels"


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    if problem.platform == "gpu":
        return (NO_KERNELS,)
    return NO_KERNELS, f"platform is {problem.platform!r}; supported: 'gpu'"


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`."""
    del problem
    return (NO_KERNELS,)
