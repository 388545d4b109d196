"""The calls of tests/selection_calls.py as checks."""

import functools
import os
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import selection_calls as calls

from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.scoring import select_from_units
from sparse_attn_jax.implementations.xla import scoring as xla
from sparse_attn_jax.testing import selection_oracle as oracle
from sparse_attn_jax.testing.selection_cases import CASES

Check = Callable[[], None]  # raises AssertionError

SMALL = calls.SMALL


def run_of(call: calls.Call, segment_blocks: int | None = None) -> Callable[[], np.ndarray]:
    """The call, compiled."""
    arrays = call.query, call.compressed, call.coarse, call.positions
    select = functools.partial(select_from_units, problem=call.problem, segment_blocks=segment_blocks)
    compiled = jax.jit(select).lower(*arrays).compile()
    return lambda: np.asarray(compiled(*arrays))


def defined(call: calls.Call, segment_blocks: int | None = None) -> Check:
    """Lists are those of the definition, up to rounding."""
    run = run_of(call, segment_blocks)
    lists, scores = call.define()
    return lambda: oracle.assert_same_up_to_rounding(run(), lists, scores)


def defined_of(*sizes, segment_blocks: int | None = None, **options) -> Check:
    return defined(calls.make_call(*sizes, **options), segment_blocks)


def equal(run: Callable, expected) -> Check:
    return lambda: np.testing.assert_array_equal(run(), expected)


def any_order_check() -> Check:
    return defined(calls.call_with_positions_of_any_order())


def order_check(group_size: int) -> Check:
    call = calls.make_call(40, group_size, 1, use_coarse=True, **SMALL)
    runs = []
    for seed in ("0", "1", "2"):
        with mock.patch.dict(os.environ, {library.SEED: seed}):
            runs.append(run_of(call, 20))

    def check():
        for run in runs[1:]:
            np.testing.assert_array_equal(run(), runs[0]())

    return check


def segments_check(key_of: str) -> Check:
    call = calls.call_of_many_segments(key_of)
    lists, scores = call.define()
    whole, *parts = [run_of(call, blocks) for blocks in (None, 1, 17, 64, 100, 249)]

    def check():
        found = whole()
        oracle.assert_same_up_to_rounding(found, lists, scores)
        for part in parts:
            np.testing.assert_array_equal(part(), found)

    return check


def ties_check(scale: float, segment_blocks: int | None) -> Check:
    call = calls.call_with_ties(scale)
    return equal(run_of(call, segment_blocks), call.define()[0])


def pruned_ties_check() -> Check:
    call = calls.make_call(9, 2, 1, kv_len=2000, block_size=8, kernel_size=8, kernel_stride=8, scale=0.0, top_k=40)
    return equal(run_of(call), call.define()[0])


def shared_unit_check(segment_blocks: int | None) -> Check:
    run = run_of(calls.call_with_a_unit_shared_by_two_blocks(), segment_blocks)
    return equal(lambda: run()[0, 0, 0], [0, 1, 7])


def hidden_check(group_size: int, use_coarse: bool, value: float) -> Check:
    clean, bad = (run_of(call) for call in calls.calls_with_hidden_units(group_size, use_coarse, value))
    return lambda: np.testing.assert_array_equal(bad()[:, :, :27], clean()[:, :, :27])


def nan_query_check() -> Check:
    clean, bad = (run_of(call) for call in calls.calls_with_a_nan_in_the_first_query())
    return lambda: np.testing.assert_array_equal(bad()[:, :, 1:], clean()[:, :, 1:])


def nan_check(use_coarse: bool, pooling: str, reduction: str | None) -> Check:
    call = calls.call_with_a_nan_in_a_unit(use_coarse, pooling, reduction)
    run = run_of(call)
    with np.errstate(invalid="ignore"):
        lists, scores = call.define()
    return lambda: calls.assert_nan_scores_are_chosen_only_if_forced(run(), lists, scores, use_coarse)


def infinite_check(where: str) -> Check:
    call = calls.call_with_infinite_logits(where)
    arrays = call.query, call.compressed, call.coarse, call.positions
    return equal(run_of(call), xla.select_from_units(*arrays, problem=call.problem))


def mapped_check(moving: tuple[int, ...]) -> Check:
    """Two calls in one, by vmap, against each alone."""
    call = calls.make_call(20, batch=2, use_coarse=True, **SMALL)
    arrays = call.query, call.compressed, call.coarse, call.positions
    alone = [arrays, tuple((x - 11 if i == 3 else 2 * x) if i in moving else x for i, x in enumerate(arrays))]
    stacked = [jnp.stack([x[i] for x in alone]) if i in moving else x for i, x in enumerate(arrays)]
    select = functools.partial(select_from_units, problem=call.problem)
    axes = [0 if i in moving else None for i in range(4)]
    mapped = jax.jit(jax.vmap(select, in_axes=axes)).lower(*stacked).compile()
    one = jax.jit(select).lower(*arrays).compile()
    return lambda: np.testing.assert_array_equal(mapped(*stacked), np.stack([one(*x) for x in alone]))


def all_checks() -> dict[str, Callable[[], Check]]:
    """What makes each check, by name, in the order in which they run."""
    make = functools.partial
    checks = {
        "group 2": make(defined_of, 30, 4, 2, **SMALL),
        "group 16": make(defined_of, 40, 32, 2, use_coarse=True, **SMALL),
        "head_dim 256": make(defined_of, 40, 4, 2, 256, use_coarse=True, **SMALL),
    }
    for name, options in CASES.items():
        for use_coarse in (False, True):
            sizes = dict(batch=2, use_coarse=use_coarse)
            checks[f"{name}, coarse {use_coarse}"] = make(defined_of, 40, 6, 2, **sizes, **options)
            if options.get("is_causal", True):
                checks[f"{name} from 9, coarse {use_coarse}"] = make(defined_of, 130, 6, 2, q_offset=9, **sizes, **options)
    for group_size, reduction, pooling in (
        *((1, "max", "max"), (2, "mean", "overlap_sum"), (3, "max", "overlap_sum"), (4, None, "max")),
        *((8, "sum", "overlap_sum"), (8, "max", "max"), (16, None, "overlap_sum"), (16, "mean", "max")),
    ):
        options = dict(pooling=pooling, group_reduction=reduction)
        checks[f"group {group_size}, {reduction} {pooling}"] = make(defined_of, 30, 2 * group_size, 2, **SMALL, **options)
    for group_size, reduction in ((5, "sum"), (17, "max"), (64, "sum"), (64, "max")):
        options = dict(group_reduction=reduction, use_coarse=True)
        checks[f"group {group_size}, {reduction}"] = make(defined_of, 7, group_size, 1, **SMALL, **options)
    for q_len, group_size in ((1, 1), (63, 8), (65, 8), (65, 1)):
        checks[f"{q_len} queries, group {group_size}"] = make(defined_of, q_len, group_size, 1, kv_len=1007)
    for offset in (0, 250, -5, 5000, (3, 133), (780, 0)):
        checks[f"offset {offset}"] = make(defined_of, 43, 8, 2, batch=2, use_coarse=True, q_offset=offset, **SMALL)
    options = SMALL | dict(kernel_size=1, kernel_stride=1, coarse_kernel_size=128, coarse_kernel_stride=64)
    checks["first coarse unit"] = make(defined_of, 33, 4, 2, use_coarse=True, q_offset=100, **options)
    options = dict(kv_len=8 * 1000, block_size=8, kernel_size=8, kernel_stride=8, top_k=8)
    checks["many blocks"] = make(defined_of, 2, 1, 1, **options)
    checks["positions of any order"] = any_order_check
    for options in (dict(top_k=60), dict(top_k=50), dict(top_k=3), dict(top_k=200, is_causal=False)):
        checks[f"{options}"] = make(defined_of, 70, 4, 2, **(SMALL | options))
    for is_causal in (False, True):
        for sinks, local in ((0, 1), (3, 1), (2, 60), (70, 1)):
            options = dict(num_sink_blocks=sinks, num_local_blocks=local, top_k=sinks + local + 2, is_causal=is_causal)
            checks[f"{sinks} sinks, {local} local, {is_causal}"] = make(defined_of, 50, 2, 1, q_offset=300, **SMALL, **options)
            checks[f"{sinks} sinks, {local} local, {is_causal}, early"] = make(
                defined_of, 50, 2, 1, q_offset=0, **SMALL, **options
            )
    checks |= {f"segments, {key_of}": make(segments_check, key_of) for key_of in ("random", "ascending", "descending")}
    for gaps in ({}, dict(block_size=8, kernel_size=4, kernel_stride=20)):
        for blocks in (1, 5, 30):
            options = SMALL | gaps | dict(segment_blocks=blocks, use_coarse=True)
            checks[f"segments of {blocks}, {gaps}"] = make(defined_of, 40, 4, 2, **options)
    checks |= {f"ties {x}": make(ties_check, *x) for x in ((0.0, None), (0.0, 7), (1.0, None), (1.0, 7))}
    checks["pruned ties"] = pruned_ties_check
    checks |= {f"shared unit {blocks}": make(shared_unit_check, blocks) for blocks in (None, 2)}
    for value in (np.nan, np.inf, -np.inf):
        for use_coarse in (False, True):
            checks[f"hidden {value} {use_coarse}"] = make(hidden_check, 2 if use_coarse else 3, use_coarse, value)
    for x in ((False, "max", "sum"), (True, "max", "max"), (True, "overlap_sum", None), (False, "overlap_sum", "sum")):
        checks[f"nan {x}"] = make(nan_check, *x)
    checks["nan in a query"] = nan_query_check
    checks |= {f"infinite {where}": make(infinite_check, where) for where in ("query", "unit")}
    checks |= {f"order, group {size}": make(order_check, size) for size in (4, 16)}
    checks |= {f"vmap {moving}": make(mapped_check, moving) for moving in ((0,), (1, 2), (3,), (0, 1, 2, 3))}
    return checks
