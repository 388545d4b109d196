"""The hand-written CUDA implementation: kernels for compute capability 8.0 and 9.0, as XLA custom calls.

On a CPU the same kernels run in a simulator (`SPARSE_ATTN_HOST_SIM=1`), for tests. They have never run on a GPU.
"""

from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.attention_backward import backward as backward
from sparse_attn_jax.implementations.cuda.attention_forward import forward as forward
from sparse_attn_jax.implementations.cuda.library import CUSTOM_CALL_TARGETS as CUSTOM_CALL_TARGETS
from sparse_attn_jax.planning import default_tile_size
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem

NO_SELECTION = "there are no hand-written CUDA kernels for selection"

# A thread block computes on so many rows: query tokens times the query heads of a KV head.
ROWS = 64


def tile_size(problem: Problem) -> int:
    """Query tokens per tile for which the kernels are made. They take any other as well."""
    tokens = max(1, ROWS // problem.group_size)
    return default_tile_size(problem.q_block_size, problem.group_size, problem.q_len, ROWS, tokens)


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    reasons = []
    on_simulator = problem.platform == "cpu" and library.is_simulated()
    missing = library.missing("cpu" if on_simulator else "gpu")
    if missing is not None:
        reasons.append(f"no kernels: {missing}")
    elif on_simulator or problem.platform == "gpu":
        reasons += _reasons_of_variants(problem)
    if not on_simulator and problem.platform != "gpu":
        reasons.append(f"platform is {problem.platform!r}; supported: 'gpu', and 'cpu' with {library.HOST_SIM}=1")
    if problem.predicate is not None:
        reasons.append(f"the selection has a predicate, {problem.predicate}; supported: none")
    if problem.value_head_dim != problem.head_dim:
        reasons.append(f"value_head_dim is {problem.value_head_dim}; supported: head_dim, which is {problem.head_dim}")
    return tuple(reasons)


def _reasons_of_variants(problem: Problem) -> list[str]:
    """Reasons that the compiled variants give."""
    if not library.architectures(problem):
        able = ", ".join(library.ARCHITECTURES)
        if library.asked_for():
            return [f"{library.ARCH} is {library.asked_for()!r}, whose kernels do not run here; supported: 'sm80', 'sm90'"]
        return [f"compute capability is {problem.compute_capability}; supported: {able}"]
    variants = library.variants_for(problem)
    if not variants:
        return ["no kernels were compiled for this device's compute capability; see SPARSE_ATTN_CUDA_ARCHITECTURES"]
    reasons = []
    for name, found, supported in (
        ("dtype", problem.dtype, {v.dtype for v in variants}),
        ("head_dim", problem.head_dim, {v.head_dim for v in variants}),
        ("kv_block_size", problem.kv_block_size, {size for v in variants for size in v.kv_block_sizes}),
    ):
        if found not in supported:
            reasons.append(f"{name} is {found}; supported: {', '.join(map(str, sorted(supported)))}")
    if not reasons and not any(library.is_for(variant, problem) for variant in variants):
        reasons.append(
            f"no compiled variant has dtype {problem.dtype}, head_dim {problem.head_dim} and blocks of {problem.kv_block_size}"
        )
    return reasons


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`."""
    del problem
    return (NO_SELECTION,)
