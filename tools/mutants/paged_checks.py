"""The calls of tests/test_cuda_paged_on_cpu.py as checks."""

import functools
import os
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import test_cuda_paged_on_cpu as tests

from sparse_attn_jax.implementations.cuda import library

Check = Callable[[], None]  # raises AssertionError
Sizes = tests.Sizes


def run_of(inputs: tuple, selection, block_size: int, **options) -> Callable[[], tuple]:
    """The call, compiled."""
    call = functools.partial(tests.attend, selection_block_size=block_size, **options)
    compiled = jax.jit(call).lower(*inputs, selection).compile()
    return lambda: compiled(*inputs, selection)


def defined(sizes: Sizes, is_dense: bool = False, **options) -> Check:
    """Results are those of the definition."""
    inputs, selection = tests.make_inputs(sizes), None if is_dense else tests.make_selection(sizes)
    run = run_of(inputs, selection, sizes.block_size, **options)
    wanted = tests.define(inputs, selection, sizes, **options)
    return lambda: tests.assert_is(run(), wanted, sizes.dtype)


def unread_check(sizes: Sizes) -> Check:
    (inputs, selection), options = tests.inputs_with_nan_that_is_not_seen(sizes), tests.HIDING
    run = run_of(inputs, selection, sizes.block_size, **options)
    clean = run_of(tests.make_inputs(sizes), selection, sizes.block_size, **options)
    return lambda: tests.assert_equal(run(), clean())


def order_check(num_splits: int) -> Check:
    sizes = Sizes(q_len=2, group_size=12)
    inputs, selection = tests.make_inputs(sizes), tests.make_selection(sizes)
    runs = []
    for seed in ("0", "1", "2"):
        with mock.patch.dict(os.environ, {library.SEED: seed}):
            runs.append(run_of(inputs, selection, sizes.block_size, num_splits=num_splits))

    def check():
        for run in runs[1:]:
            tests.assert_equal(run(), runs[0]())

    return check


def long_check(q_len: int, group_size: int) -> Check:
    sizes = tests.long_sizes(q_len, group_size)
    inputs = tests.make_inputs(sizes)
    run = run_of(inputs, None, sizes.block_size, num_splits=1)
    wanted = tests.define_last(inputs, sizes)
    return lambda: tests.assert_is(tests.last_of(run()), wanted, sizes.dtype)


def bad_pages_check(page: int | None) -> Check:
    sizes = Sizes(lengths=(150, 33, 60))
    num_pages = tests.make_inputs(sizes)[1].shape[0]
    inputs = tests.inputs_with_bad_pages(sizes, num_pages if page is None else page)
    run = run_of(inputs, None, sizes.block_size, num_splits=2)
    wanted = tests.define(inputs, None, sizes)
    return lambda: tests.assert_is(run(), wanted, sizes.dtype)


def handler_check(count: int, block: int = 0) -> Check:
    """Counts and blocks of any value, to the handler itself."""
    arguments, shapes = tests.handler_arguments(count, block)
    call = jax.ffi.ffi_call(library.PAGED_ATTENTION, shapes)
    arch = library.asked_for().removeprefix("sm")
    attributes = tests.ATTRIBUTES | dict(arch=tests.np.int32(arch or 80))
    run = jax.jit(lambda *arrays: call(*arrays, **attributes)).lower(*arguments).compile()

    def check():
        assert not jnp.any(run(*arguments)[0])

    return check


def all_checks() -> dict[str, Callable[[], Check]]:
    """What makes each check, by name, in the order in which they run."""
    make = functools.partial
    few, many = dict(q_len=1, group_size=3), dict(q_len=3, group_size=8)
    lists = (("one", 1), ("kv", 3), ("q", 1), ("q", 3))
    blocks = ((16, 80), (64, 16), (32, 128), (128, 64))
    return (
        {f"lists of {heads}, {rows}": make(defined, Sizes(3, 3, heads=heads, rows=rows)) for heads, rows in lists}
        | {f"head_dim {d}, {r}": make(defined, Sizes(head_dim=d, **r), num_splits=2) for d in (64, 256) for r in (few, many)}
        | {"rows of two tiles": make(defined, Sizes(q_len=5, group_size=17, num_kv_heads=1), num_splits=2)}
        | {
            f"pages of {page}, blocks of {block}": make(
                defined,
                Sizes(2, page_size=page, block_size=block, max_pages=-(-300 // page), lengths=(291, 130)),
                num_splits=3,
            )
            for page, block in blocks
        }
        | {
            name: make(defined, Sizes(q_len=2, max_pages=11, block_size=32), is_dense, **options, num_splits=2)
            for name, options in tests.OPTIONS.items()
            for is_dense in (False, True)
        }
        | {f"unread, {sizes}": make(unread_check, Sizes(heads="one", lengths=(150, 100), **sizes)) for sizes in (few, many)}
        | {
            f"lengths {n}": make(defined, Sizes(3, lengths=n, max_pages=2), True, num_splits=2)
            for n in ((0, 1, 2), (-4, 32, 33))
        }
        | {f"pages that are {page}": make(bad_pages_check, page) for page in (-1, None, 2**31 - 1, -(2**31))}
        | {f"order, {splits} splits": make(order_check, splits) for splits in (1, 3)}
        | {f"{splits} splits": make(defined, Sizes(num_slots=12), num_splits=splits) for splits in (5, 40)}
        | {f"long, {sizes}": make(long_check, *sizes) for sizes in ((1, 1), (3, 8))}
        | {f"{count} slots": make(handler_check, count) for count in (-1, 7, 2**31 - 1)}
        | {f"blocks that are {block}": make(handler_check, 2, block) for block in (-1, 9, 2**31 - 1)}
    )
