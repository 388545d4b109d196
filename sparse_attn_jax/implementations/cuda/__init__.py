"""The hand-written CUDA implementation.

Not complete: there are attention kernels for compute capability 8.0, forward and backward, tested on a CPU by simulation. No
install compiles them yet, and they have never run on a GPU. Until then every problem is answered with that reason.
"""

from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem

NO_KERNELS = "this version of sparse_attn_jax has no install that compiles the hand-written CUDA kernels"


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    if problem.platform == "gpu":
        return (NO_KERNELS,)
    return NO_KERNELS, f"platform is {problem.platform!r}; supported: 'gpu'"


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`."""
    del problem
    return (NO_KERNELS,)
