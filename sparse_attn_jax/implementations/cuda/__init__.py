"""The hand-written CUDA implementation.

Not complete: there is a forward kernel for compute capability 8.0 (`attention_forward`), which is tested on a CPU by simulation
and has never run on a GPU. Until the backward pass is there, every problem is answered with that reason.
"""

from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem

NO_KERNELS = "this version of sparse_attn_jax has no complete hand-written CUDA kernels: the backward pass is missing"


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    if problem.platform == "gpu":
        return (NO_KERNELS,)
    return NO_KERNELS, f"platform is {problem.platform!r}; supported: 'gpu'"


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`."""
    del problem
    return (NO_KERNELS,)
