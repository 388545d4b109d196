"""Which variants each implementation takes, as its own `supports` says, and on which GPUs they have passed their tests.

`python -m tools.support_table` writes the table of the README; tests/test_support_table.py compares it.
"""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from sparse_attn_jax import dispatch, jax_compat
from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.problem import SUPPORTED_DTYPES, Problem
from sparse_attn_jax.scoring_problem import ScoringProblem

ROOT = Path(__file__).absolute().parent.parent
README = ROOT / "README.md"
# What `benchmarks.gpu_suite` wrote of a GPU is committed in a folder of its own.
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- support: python -m tools.support_table -->\n", "<!-- end of support -->\n"

HEAD = ("implementation", "what", "platform", "dtypes", "head_dim", "kv_block_size", "passed its tests on")
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512)
NO_GPU = "**no GPU yet**"
KV_BLOCK_SIZES = (8, 16, 32, 48, 64, 96, 128, 256)
VARIANTS = tuple(itertools.product(SUPPORTED_DTYPES, HEAD_DIMS, KV_BLOCK_SIZES))
SIZES = dict(num_q_heads=16, num_kv_heads=2, kv_len=4096, scale=1.0)


def attention(dtype: str, head_dim: int, block: int, **device: str) -> Problem:
    lists = dict(q_block_size=1, kv_block_size=block, num_slots=16, selection_heads=2)
    return Problem(batch=1, q_len=4096, head_dim=head_dim, value_head_dim=head_dim, dtype=dtype, **lists, **SIZES, **device)


def selection(dtype: str, head_dim: int, block: int, *, platform: str, compute_capability: str | None = None) -> ScoringProblem:
    blocks = dict(block_size=block, top_k=16, num_sink_blocks=1, num_local_blocks=2)
    device = dict(platform=platform, compute_capability=compute_capability)
    return ScoringProblem(head_dim=head_dim, dtype=dtype, unit_dtype=dtype, **blocks, **SIZES, **device)


def paged_attention(dtype: str, head_dim: int, block: int, **device: str) -> PagedProblem:
    pages = dict(num_pages=512, page_size=64, max_pages=64, selection_block_size=block, num_slots=16, selection_heads=2)
    heads = dict(num_q_heads=16, num_kv_heads=2, head_dim=head_dim, value_head_dim=head_dim)
    return PagedProblem(batch=1, q_len=1, dtype=dtype, scale=1.0, **heads, **pages, **device)


def bounds(dtype: str, head_dim: int, block: int, **device: str) -> BoundProblem:
    lists = dict(num_blocks=256, block_size=block, group="max", top_k=16)
    heads = dict(num_q_heads=16, num_kv_heads=2, head_dim=head_dim)
    return BoundProblem(batch=1, q_len=1, dtype=dtype, extrema_dtype=dtype, **heads, **lists, **device)


def extrema(dtype: str, head_dim: int, block: int, **device: str) -> ExtremaProblem:
    return ExtremaProblem(batch=1, num_kv_heads=2, head_dim=head_dim, dtype=dtype, block_size=block, kv_len=4096, **device)


EXAMPLES = {
    Problem: attention,
    ScoringProblem: selection,
    PagedProblem: paged_attention,
    ExtremaProblem: extrema,
    BoundProblem: bounds,
}


def rows() -> list[tuple[str, ...]]:
    """The table, a row for all calls that are alike but for what they do."""
    calls = {}
    for what, *others in rows_of_calls():
        calls.setdefault(tuple(others), []).append(what)
    return [(implementation, "; ".join(names), *rest) for (implementation, *rest), names in calls.items()]


def rows_of_calls() -> list[tuple[str, ...]]:
    """What is done, and the rest of the row. The CUDA kernels of the simulator are all that there are."""
    found = []
    for kind, (name, _) in dispatch.CALLS.items():
        what = EXAMPLES[kind]
        found += [(name, "`xla`", "any", *sizes, "CPU") for sizes in supported("xla", what, platform="cpu")]
        for capability in ("9.0", "8.0"):
            with mock.patch.object(jax_compat, "lowering_compute_capability", lambda capability=capability: capability):
                mosaic = supported("mosaic", what, platform="gpu", compute_capability=capability)
            run = ", ".join(["CPU, interpreted", *(devices_of([capability]) or [NO_GPU])])
            found += [(name, "`mosaic`", f"GPU of {capability}", *sizes, run) for sizes in mosaic]
        for arch in library.ARCHITECTURES["9.0"]:
            capabilities = [able for able, folders in library.ARCHITECTURES.items() if arch in folders]
            simulator = os.environ.get(library.HOST_SIM) or "1"
            with mock.patch.dict(os.environ, {library.HOST_SIM: simulator, library.ARCH: f"sm{arch}"}):
                kernels = supported("cuda", what, platform="cpu")
            run = ", ".join(["CPU, simulated", *(devices_of(capabilities) or [NO_GPU])])
            place = f"GPU of {', '.join(capabilities)}"
            found += [(name, f"`cuda` (`csrc/sm{arch}`)", place, *sizes, run) for sizes in kernels]
    return found


def supported(name: str, what: Callable, **device: str) -> list[tuple[str, str, str]]:
    """dtypes, head_dim and kv_block_size of what an implementation takes: a few products that hold each variant once."""
    able = [variant for variant in VARIANTS if not dispatch.reasons_against(name, what(*variant, **device))]
    blocks = gathered([((dtype, dim), block) for dtype, dim, block in able])
    dims = gathered([((dtype, blocks[dtype, dim]), dim) for dtype, dim in blocks])
    dtypes = gathered([((dims[dtype, of], of), dtype) for dtype, of in dims])

    def text(values, every):
        if values == every:
            return "any"
        return f"at most {values[-1]}" if len(values) > 1 and values == every[: len(values)] else ", ".join(map(str, values))

    return [(text(dtypes[dims, blocks], ()), text(dims, HEAD_DIMS), text(blocks, KV_BLOCK_SIZES)) for dims, blocks in dtypes]


def gathered(pairs: list[tuple]) -> dict[Any, tuple]:
    """The second members by the first."""
    first = dict.fromkeys(key for key, _ in pairs)
    return {key: tuple(value for of, value in pairs if of == key) for key in first}


def devices_of(capabilities: list[str]) -> list[str]:
    """The GPUs on which all tests of the kernels passed."""
    stages = [json.loads(path.read_text()).get("conformance") for path in sorted(RESULTS.glob("*/summary.json"))]
    return [
        stage["device"]
        for stage in stages
        if stage and stage["result"] == "passed" and stage["compute_capability"] in capabilities
    ]


def table() -> str:
    lines = [HEAD, ("---",) * len(HEAD), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(text: str) -> str:
    """A README with the table of now."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
