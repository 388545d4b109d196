"""The calls of tests/test_cuda_bounds_on_cpu.py as checks."""

import dataclasses
import functools
import os
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import test_cuda_bounds_on_cpu as tests

from sparse_attn_jax.implementations.cuda import library, select_by_bounds
from sparse_attn_jax.testing.selection_oracle import assert_same_up_to_rounding

Check = Callable[[], None]  # raises AssertionError
Sizes = tests.Sizes


def run_of(call: tests.Call) -> Callable[[], np.ndarray]:
    """The call, compiled."""
    compiled = jax.jit(functools.partial(select_by_bounds, call.problem)).lower(call.operands).compile()
    return lambda: np.asarray(compiled(call.operands))


def defined(sizes: Sizes, limits=None, **changes) -> Check:
    """Lists are those of the definition."""
    call = tests.make_call(sizes, limits=limits).replace(**changes)
    run = run_of(call)
    with np.errstate(invalid="ignore"):
        lists, scores = call.define()
    return lambda: assert_same_up_to_rounding(run(), lists, scores)


def bad_pages_check(page: int) -> Check:
    sizes = Sizes(page_rows=4, top_k=40)  # enough for every block that may be listed
    tables = tests.make_call(sizes).operands.block_tables
    return defined(sizes, block_tables=tables.at[:, 1].set(page))


def equal_check(run: Callable, wanted: Callable) -> Check:
    return lambda: np.testing.assert_array_equal(run(), wanted())


def full_check() -> Check:
    """More blocks are kept than there is room for."""
    run = run_of(tests.make_call(Sizes(top_k=3), limits=(2, 10, 20, 0)))
    return lambda: np.testing.assert_array_equal(run() - np.array([0, 1, 10]), 0)


def nan_head_check() -> Check:
    """A query head that is NaN: its list, or that of its group, has no block but those that are kept."""
    call = tests.make_call(Sizes(group_size=3), limits=(1, 38, 40, 40))
    run = run_of(call.replace(query=call.operands.query.at[:, :, ::3].set(np.nan)))
    return lambda: np.testing.assert_array_equal(run()[..., :4] - np.array([0, 38, 39, -1]), 0)


def ties_check() -> Check:
    call = tests.make_call(Sizes(num_blocks=600, top_k=300, batch=1), limits=(1, 590, 595, 600))
    wanted = np.array([*range(295), *range(590, 595)])
    run = run_of(call.replace(query=0 * call.operands.query))
    return lambda: np.testing.assert_array_equal(run(), np.broadcast_to(wanted, (1, 2, 1, 300)))


def zeros_check() -> Check:
    call, wanted = tests.call_with_zeros_of_both_signs()
    return equal_check(run_of(call), lambda: np.broadcast_to(wanted, (1, 2, 1, 9)))


def no_score_check(group: str | None, value: float) -> Check:
    call, wanted = tests.call_with_blocks_without_a_score(group, value)
    run = run_of(call)
    return lambda: np.testing.assert_array_equal(run() - wanted, 0)


def unread_check() -> Check:
    call = tests.make_call(Sizes(q_len=2))
    bad = dataclasses.replace(call, operands=tests.operands_with_nan_that_is_not_read(call))
    return equal_check(run_of(bad), run_of(call))


def order_check() -> Check:
    call = tests.make_call(Sizes(num_blocks=300, top_k=50, q_len=2))
    runs = []
    for seed in ("0", "1", "2"):
        with mock.patch.dict(os.environ, {library.SEED: seed}):
            runs.append(run_of(call))

    def check():
        for run in runs[1:]:
            np.testing.assert_array_equal(run(), runs[0]())

    return check


def extrema_check(*sizes, block: int | None = None, **options) -> Check:
    call = tests.make_extrema_call(*sizes, **options)
    if block is not None:
        key, tables, blocks, lengths = call.arrays
        call = dataclasses.replace(call, arrays=(key, tables, jnp.full_like(blocks, block), lengths))
    run = jax.jit(lambda *arrays: call.run(arrays)).lower(*call.arrays).compile()
    wanted = call.define()

    def check():
        for x, y in zip(run(*call.arrays), wanted):
            np.testing.assert_array_equal(np.asarray(x, np.float32), y)

    return check


def all_checks() -> dict[str, Callable[[], Check]]:
    """What makes each check, by name, in the order in which they run."""
    make = functools.partial
    small = Sizes(q_len=2)
    return (
        {f"{group}, {g}": make(defined, Sizes(group=group, group_size=g, q_len=2)) for group in tests.GROUPS for g in (1, 3)}
        | {f"head_dim {d}": make(defined, Sizes(head_dim=d)) for d in (96, 256)}
        | {f"{n} blocks": make(defined, Sizes(num_blocks=n, num_kv_heads=1, top_k=40)) for n in (1, 129, 700)}
        | {f"limits: {name}": make(defined, small, limits) for name, limits in tests.LIMITS.items()}
        | {f"top_k {k}": make(defined, Sizes(top_k=k), (1, 38, 39, 40)) for k in (3, 39, 40, 41)}
        | {f"pages of {rows}": make(defined, Sizes(num_blocks=48, page_rows=rows, q_len=2)) for rows in (4, 16)}
        | {f"page {page}": make(bad_pages_check, page) for page in (-1, 23, 2**31 - 1)}
        | {f"extrema, pages of {n}": make(extrema_check, n) for n in (None, 16, 7)}
        | {f"extrema, {block} tokens": make(extrema_check, 16, block) for block in (3, 64)}
        | {f"extrema, {n} heads": make(extrema_check, 16, num_kv_heads=n, head_dim=256) for n in (2, 5)}
        | {
            f"extrema before {n}, {page}": make(extrema_check, page, lengths=n)
            for page in (None, 16)
            for n in ((0, 1), (-3, 161), (161, 10**9))
        }
        | {f"extrema of block {n}, {page}": make(extrema_check, page, block=n) for page in (None, 16) for n in (-1, 2**31 - 1)}
        | {"full": full_check, "a head that is NaN": nan_head_check}
        | {"ties": ties_check, "zeros": zeros_check, "unread": unread_check, "order": order_check}
        | {f"no score, {x}, {group}": make(no_score_check, group, x) for x in (np.nan, np.inf) for group in ("max", None)}
    )
