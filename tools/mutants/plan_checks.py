"""The calls of tests/test_cuda_planning_on_cpu.py as checks."""

import dataclasses
import functools
import os
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import test_cuda_planning_on_cpu as tests

from sparse_attn_jax import planning
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.planning import add_inverse, build_plan

Check = Callable[[], None]  # raises AssertionError

LONG = tests.Sizes(2100, 2000, kv_block_size=1, tile_size=2100, num_slots=1)


def plan_check(sizes: tests.Sizes, window_blocks: int | None = None, fill: int | None = None, seed: str = "0") -> Check:
    selection = tests.make_selection(sizes)
    if fill is not None:
        selection = dataclasses.replace(selection, indices=jnp.full_like(selection.indices, fill))
    expected = planning.build_plan(selection, **sizes.arguments())
    build = functools.partial(build_plan, **sizes.arguments(), window_blocks=window_blocks)
    with mock.patch.dict(os.environ, {library.SEED: seed}):
        run = jax.jit(build).lower(selection).compile()
    return lambda: tests.assert_same(run(selection), expected)


def bad_inverse_check() -> Check:
    plan = tests.plan_that_names_blocks_that_do_not_exist()
    expected = planning.add_inverse(plan)
    run = jax.jit(add_inverse).lower(plan).compile()
    return lambda: tests.assert_same(run(plan), expected)


def all_checks() -> dict[str, Callable[[], Check]]:
    """What makes each check, by name, in the order in which they run."""
    make = functools.partial
    many, few = tests.CASES["more_blocks_than_threads"], tests.CASES["per_token"]
    one_list = tests.CASES["more_blocks_than_threads_and_one_row_group"]
    return (
        {name: make(plan_check, sizes) for name, sizes in tests.CASES.items()}
        | {"bad inverse": bad_inverse_check}
        | {f"windows of {blocks}": make(plan_check, many, blocks) for blocks in (32, 64, 1024)}
        | {f"windows of {blocks}, one list": make(plan_check, one_list, blocks) for blocks in (32, 1024)}
        | {f"lists of {fill}": make(plan_check, few, fill=fill) for fill in (-1, 3)}
        | {f"order {seed}": make(plan_check, tests.CASES["many_tiles"], seed=seed) for seed in ("1", "2")}
        | {"many row groups": make(plan_check, LONG)}
    )
