"""The hand-written CUDA implementation. Its kernels are not part of this version: it answers every problem with that reason."""

from sparse_attn_jax.problem import Problem


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    reasons = ["this version of sparse_attn_jax has no hand-written CUDA kernels"]
    if problem.platform != "gpu":
        reasons.append(f"platform is {problem.platform!r}; supported: 'gpu'")
    return tuple(reasons)
