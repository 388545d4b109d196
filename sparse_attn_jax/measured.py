"""What was measured of the implementations on real devices, for the dispatch to prefer the fastest.

`measured.json` holds one row per case that two implementations or more were timed on, side by side in one run; `python -m
tools.measured_times` writes it from the results of the benchmarks. What no row speaks of keeps the default order.
"""

import functools
import json
import math
from collections.abc import Iterable
from importlib import resources

from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.problems import AnyProblem
from sparse_attn_jax.scoring_problem import ScoringProblem

FILE = "measured.json"
# A row speaks for the problems that have these in common with it, the row of the nearest length first.
CASE = ("op", "device_kind", "dtype", "head_dim", "group_size", "kv_block_size", "per_token")


@functools.cache
def read_rows() -> tuple[dict, ...]:
    """Each has the fields of `CASE`, `kv_len`, and `milliseconds` by the name of the implementation."""
    return tuple(json.loads(resources.files(__package__).joinpath(FILE).read_text()))


def case_of(problem: AnyProblem) -> dict:
    """The fields of `CASE`, of a problem."""
    common = {name: getattr(problem, name) for name in ("device_kind", "dtype", "head_dim", "group_size")}
    if isinstance(problem, ScoringProblem):
        return common | dict(op="selection", kv_block_size=problem.block_size, per_token=True)
    if isinstance(problem, PagedProblem):
        return common | dict(op="paged", kv_block_size=problem.selection_block_size, per_token=problem.selection_rows > 1)
    if isinstance(problem, ExtremaProblem | BoundProblem):
        op = "bounds" if isinstance(problem, BoundProblem) else "extrema"
        return common | dict(op=op, kv_block_size=problem.block_size, per_token=True)
    return common | dict(op="attention", kv_block_size=problem.kv_block_size, per_token=problem.q_block_size == 1)


def fastest_first(names: Iterable[str], problem: AnyProblem) -> tuple[str, ...]:
    """`names` with those that were measured for such a problem in order of time; the others stay where they are."""
    names, case = tuple(names), case_of(problem)
    rows = [row for row in read_rows() if all(row[field] == case[field] for field in CASE)]
    if not rows:
        return names
    length = math.log(max(problem.kv_len, 1))
    times = min(rows, key=lambda row: abs(math.log(row["kv_len"]) - length))["milliseconds"]
    ranked = iter(sorted((name for name in names if name in times), key=times.__getitem__))
    return tuple(next(ranked) if name in times else name for name in names)
