"""The hand-written CUDA implementation: kernels for compute capability 8.0 and 9.0, as XLA custom calls.

On a CPU the same kernels run in a simulator (`SPARSE_ATTN_HOST_SIM=1`), for tests. They have never run on a GPU.
"""

from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.implementations.cuda import library, planning
from sparse_attn_jax.implementations.cuda.attention_backward import backward as backward
from sparse_attn_jax.implementations.cuda.attention_forward import forward as forward
from sparse_attn_jax.implementations.cuda.bounds import find_extrema as find_extrema
from sparse_attn_jax.implementations.cuda.bounds import reasons_of_bounds
from sparse_attn_jax.implementations.cuda.bounds import select_by_bounds as select_by_bounds
from sparse_attn_jax.implementations.cuda.library import CUSTOM_CALL_TARGETS as CUSTOM_CALL_TARGETS
from sparse_attn_jax.implementations.cuda.paged_attention import attend_pages as attend_pages
from sparse_attn_jax.implementations.cuda.paged_attention import reasons_of_sizes
from sparse_attn_jax.implementations.cuda.scoring import select_from_units as select_from_units
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.planning import TilePlan, default_tile_size
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.selection import BlockSelection

# Query heads of a KV head whose scores the selection kernel sums.
MAX_SELECTION_GROUP = 64


def build_plan(problem: Problem, selection: BlockSelection) -> TilePlan:
    """The plan for which the kernels are made, without its inverse. They take any other as well."""
    sizes = dict(q_len=problem.q_len, kv_len=problem.kv_len)
    heads = dict(num_q_heads=problem.num_q_heads, num_kv_heads=problem.num_kv_heads)
    return planning.build_plan(selection, **sizes, **heads, tile_size=tile_size(problem), with_inverse=False)


def tile_size(problem: Problem) -> int:
    """Tokens of a tile. With the query heads of a KV head they are the rows for which a thread block loads keys once."""
    group_size = problem.group_size

    def tokens_of(rows: int) -> int:
        shared = max(1, rows // group_size)
        return default_tile_size(problem.q_block_size, group_size, problem.q_len, rows, shared)

    if library.arch_for(problem) == 90 and problem.head_dim <= 128:
        # Two warpgroups of the SM90 kernels have 64 rows each, which have to be whole tokens, or a part of one.
        tokens = tokens_of(128)
        if group_size % 64 == 0 or (64 % group_size == 0 and tokens * group_size % 64 == 0):
            return tokens
    return tokens_of(64)


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    reasons = _reasons_of_library(problem, ("dtype", "head_dim", "kv_block_size"))
    if problem.predicate is not None:
        reasons.append(f"the selection has a predicate, {problem.predicate}; supported: none")
    if problem.value_head_dim != problem.head_dim:
        reasons.append(f"value_head_dim is {problem.value_head_dim}; supported: head_dim, which is {problem.head_dim}")
    return tuple(reasons)


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`."""
    reasons = _reasons_of_library(problem, ("dtype", "head_dim"))
    if problem.unit_dtype != problem.dtype:
        reasons.append(f"the compressed keys are {problem.unit_dtype}; supported: the dtype of query, which is {problem.dtype}")
    if problem.group_reduction is not None and problem.group_size > MAX_SELECTION_GROUP:
        reasons.append(f"the group size is {problem.group_size}; supported: at most {MAX_SELECTION_GROUP}")
    return tuple(reasons)


def supports_paged(problem: PagedProblem) -> tuple[str, ...]:
    """Reasons against attending over pages."""
    return (*_reasons_of_library(problem, ("dtype", "head_dim")), *reasons_of_sizes(problem))


def supports_extrema(problem: ExtremaProblem) -> tuple[str, ...]:
    """Reasons against finding the extrema of blocks."""
    return tuple(_reasons_of_library(problem, ("dtype", "head_dim")))


def supports_bounds(problem: BoundProblem) -> tuple[str, ...]:
    """Reasons against selecting blocks by bounds."""
    return (*_reasons_of_library(problem, ("dtype", "head_dim")), *reasons_of_bounds(problem))


def _reasons_of_library(problem: library.AnyProblem, fields: tuple[str, ...]) -> list[str]:
    """Reasons that the device and the compiled variants give, which differ in `fields` of the problem."""
    on_simulator = problem.platform == "cpu" and library.is_simulated()
    missing = library.missing("cpu" if on_simulator else "gpu")
    reasons = [] if missing is None else [f"no kernels: {missing}"]
    if not on_simulator and problem.platform != "gpu":
        reasons.append(f"platform is {problem.platform!r}; supported: 'gpu', and 'cpu' with {library.HOST_SIM}=1")
    if not reasons and not on_simulator and (old_driver := library.reason_of_driver()) is not None:
        reasons.append(old_driver)
    if reasons:
        return reasons
    if not library.architectures(problem):
        if library.asked_for():
            return [f"{library.ARCH} is {library.asked_for()!r}, whose kernels do not run here; supported: 'sm80', 'sm90'"]
        return [f"compute capability is {problem.compute_capability}; supported: {', '.join(library.ARCHITECTURES)}"]
    variants = library.variants_for(problem)
    if not variants:
        return ["no kernels were compiled for this compute capability; see SPARSE_ATTN_CUDA_ARCHITECTURES"]
    for name in fields:
        found, supported = getattr(problem, name), sorted({value for v in variants for value in library.values_of(v, name)})
        if found not in supported:
            reasons.append(f"{name} is {found}; supported: {', '.join(map(str, supported))}")
    if not reasons and not any(library.is_for(variant, problem) for variant in variants):
        sizes = ", ".join(f"{name} {getattr(problem, name)}" for name in fields)
        reasons.append(f"no compiled variant has {sizes} together")
    return reasons
