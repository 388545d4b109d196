"""The portable implementation: pure XLA, any platform."""

from sparse_attn_jax.implementations.xla.attention_backward import backward as backward
from sparse_attn_jax.implementations.xla.attention_forward import forward as forward
from sparse_attn_jax.problem import Problem


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward; none."""
    del problem
    return ()
