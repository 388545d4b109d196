"""The Pallas implementation: kernels of Mosaic GPU for Hopper, and of attention for Ampere. They have never run on a GPU.

On a CPU they run in JAX's interpreter, inside `plgpu.force_gpu_interpret_mode`, for tests.
"""

from types import ModuleType

import jax

from sparse_attn_jax import jax_compat, planning
from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.planning import TilePlan, default_tile_size
from sparse_attn_jax.problem import Operands, Problem, TokenMask
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.selection import BlockSelection

if jax_compat.HAS_MOSAIC_GPU:
    from sparse_attn_jax.implementations.mosaic import ampere_backward, ampere_forward, attention_backward, attention_forward
    from sparse_attn_jax.implementations.mosaic.scoring import reasons_of_size
    from sparse_attn_jax.implementations.mosaic.scoring import select_from_units as select_from_units

HOPPER, AMPERE = "9.0", "8.0"
DTYPES = ("bfloat16", "float16")
KV_BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
# Chunks of keys and values of 256 would not lie in shared memory beside the next, with the matrices of a slice.
MAX_AMPERE_HEAD_DIM = 128
# Of arrays that kernels index themselves, padded or with several words an element: offsets that may be of 32 bits.
MAX_ELEMENTS = 2**29
# Of the second and third dimension of a CUDA grid.
MAX_GRID = 65535
# Versions of CUDA whose assembler miscompiles masks between products of warpgroups, as JAX says of its own attention
# (jax.experimental.pallas.ops.gpu.attention_mgpu): 12.8.0 up to 12.9.0.
MISCOMPILED_BY = range(12080, 12091)
# Rows of a query tile: each warpgroup of a thread block has 64, and there are two of them on Hopper.
TILE_ROWS, AMPERE_TILE_ROWS = 128, 64


def forward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, jax.Array]:
    """out and lse, by the kernels of the problem's device: see `attention_forward.forward`."""
    forward_module, _ = kernels_of(problem)
    return forward_module.forward(problem, operands, plan, mask)


def backward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask, *results: jax.Array) -> Operands:
    """Gradients of the operands, by the kernels of the problem's device: see `attention_backward.backward`."""
    _, backward_module = kernels_of(problem)
    return backward_module.backward(problem, operands, plan, mask, *results)


def kernels_of(problem: Problem) -> tuple[ModuleType, ModuleType]:
    """The modules of forward and backward."""
    if problem.compute_capability == AMPERE:
        return ampere_forward, ampere_backward
    return attention_forward, attention_backward


def build_plan(problem: Problem, selection: BlockSelection) -> TilePlan:
    """The plan for which the kernels are made, without its inverse. They take any other as well."""
    rows = AMPERE_TILE_ROWS if problem.compute_capability == AMPERE else TILE_ROWS
    tokens = tile_size(problem.q_block_size, problem.group_size, problem.q_len, rows)
    sizes = dict(q_len=problem.q_len, kv_len=problem.kv_len)
    heads = dict(num_q_heads=problem.num_q_heads, num_kv_heads=problem.num_kv_heads)
    return planning.build_plan(selection, **sizes, **heads, tile_size=tokens, with_inverse=False)


def tile_size(q_block_size: int, group_size: int, q_len: int, rows: int = TILE_ROWS) -> int:
    """Tokens of a tile: with the query heads of a KV head, so many rows."""
    return default_tile_size(q_block_size, group_size, q_len, rows, max(1, rows // group_size))


def supports(problem: Problem) -> tuple[str, ...]:
    """Reasons against running `problem`, forward and backward."""
    is_ampere = problem.platform == "gpu" and problem.compute_capability == AMPERE
    max_head_dim = MAX_AMPERE_HEAD_DIM if is_ampere else MAX_HEAD_DIM
    reasons = _reasons_of_device(problem, (AMPERE, HOPPER), max_head_dim)
    if is_ampere and not jax_compat.HAS_MOSAIC_GPU_FOR_AMPERE:
        reasons.append("this version of JAX has no Pallas Mosaic GPU for compute capability 8.0; supported: 0.11.2 and newer")
    if is_ampere and (lowered := jax_compat.lowering_compute_capability()) != AMPERE:
        reasons.append(f"JAX lowers kernels for its default device, of compute capability {lowered}; supported: {AMPERE}")
    if problem.kv_block_size not in KV_BLOCK_SIZES:
        reasons.append(f"kv_block_size is {problem.kv_block_size}; supported: {', '.join(map(str, KV_BLOCK_SIZES))}")
    if problem.value_head_dim > max_head_dim:
        reasons.append(f"value_head_dim is {problem.value_head_dim}; supported: at most {max_head_dim}")
    for name in ("batch", "num_kv_heads"):
        if getattr(problem, name) > MAX_GRID:
            reasons.append(f"{name} is {getattr(problem, name)}; supported: at most {MAX_GRID}")
    if problem.predicate is not None:
        reasons.append(f"the selection has a predicate, {problem.predicate}; supported: none")
    width = max(problem.head_dim, problem.value_head_dim)
    keys = problem.batch * problem.num_kv_heads * problem.kv_len * width
    # Those for Hopper leave these to tensor copies.
    queries = problem.batch * problem.num_q_heads * problem.q_len * width if is_ampere else 0
    entries = problem.batch * problem.selection_heads * problem.num_q_blocks * problem.num_slots
    sizes = {"elements of keys or values": keys, "elements of queries": queries, "slots of the selection": entries}
    for what, size in sizes.items():
        if size > MAX_ELEMENTS:
            reasons.append(f"there are {size} {what}; supported: at most {MAX_ELEMENTS}")
    if 0 in (problem.batch, problem.q_len, problem.kv_len, problem.num_slots):
        reasons.append("the call is empty: batch, q_len, kv_len or num_slots is 0; supported: at least 1")
    return tuple(reasons)


def supports_scoring(problem: ScoringProblem) -> tuple[str, ...]:
    """Reasons against scoring and selecting blocks for `problem`."""
    reasons = _reasons_of_device(problem, (HOPPER,), MAX_HEAD_DIM)
    if problem.unit_dtype != problem.dtype:
        reasons.append(f"the compressed keys are {problem.unit_dtype}; supported: the dtype of query, which is {problem.dtype}")
    return tuple(reasons + (reasons_of_size(problem) if jax_compat.HAS_MOSAIC_GPU else []))


def supports_paged(problem: PagedProblem) -> tuple[str, ...]:
    """Reasons against attending over pages."""
    del problem
    return ("there is no kernel that reads pages",)


def supports_extrema(problem: ExtremaProblem) -> tuple[str, ...]:
    """Reasons against finding the extrema of blocks."""
    del problem
    return ("there is no kernel of extrema",)


def supports_bounds(problem: BoundProblem) -> tuple[str, ...]:
    """Reasons against selecting blocks by bounds."""
    del problem
    return ("there is no kernel of bounds",)


def _reasons_of_device(problem: Problem | ScoringProblem, capabilities: tuple[str, ...], max_head_dim: int) -> list[str]:
    """Reasons of JAX and the device, and those against dtype and head_dim."""
    reasons = []
    if not jax_compat.HAS_MOSAIC_GPU:
        reasons.append("this version of JAX has no Pallas Mosaic GPU that the kernels can use; supported: 0.11 and newer")
    if problem.platform != "gpu" and not (problem.platform == "cpu" and jax_compat.interprets_kernels()):
        reasons.append(f"platform is {problem.platform!r}; supported: 'gpu', and 'cpu' inside force_gpu_interpret_mode")
    if problem.platform == "gpu" and problem.compute_capability not in capabilities:
        reasons.append(f"compute capability is {problem.compute_capability}; supported: {', '.join(capabilities)}")
    is_hopper = problem.platform == "gpu" and problem.compute_capability == HOPPER
    if is_hopper and (version := jax_compat.cuda_version()) in MISCOMPILED_BY:
        text = f"{version // 1000}.{version % 1000 // 10}"
        reasons.append(f"JAX's CUDA is {text}, whose assembler miscompiles masks; supported: before 12.8, 12.9.1 and newer")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype is {problem.dtype}; supported: {', '.join(DTYPES)}")
    if problem.head_dim > max_head_dim:
        reasons.append(f"head_dim is {problem.head_dim}; supported: at most {max_head_dim}")
    return reasons
