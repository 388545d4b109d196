"""The calls of tests/test_cuda_on_cpu.py and tests/test_varlen.py as checks, those that find most first."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import test_cuda_on_cpu as attention
import test_varlen as varlen

from sparse_attn_jax import splitting
from sparse_attn_jax.implementations.cuda import attention_backward, library
from sparse_attn_jax.splitting import Parts
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import CASES, Case, case_named
from sparse_attn_jax.testing.inputs import Inputs, make_inputs
from tools.mutants.build import DTYPE, VARIANTS

Run = Callable[[], compare.Results]
Check = Callable[[], None]  # raises AssertionError

# The first ones see most mutants.
FIRST = ("group2_bf16", "everything", "full_attention_odd_bf16", "kv_block128_bf16", "d256_bf16", "more_queries_than_keys")
# Those that are slow, or are like another one when they have the sizes of the few variants.
LEFT_OUT = {
    *("length1000_bf16", "group16_bf16_d128", "group1", "group3", "group4_fp16", "d64_fp16", "d96_bf16", "d128_fp16"),
    *("narrow_value", "wide_value_bf16", "float64", "kv_block32_bf16", "kv_block48", "hostile_ids", "duplicates"),
    *("more_slots_than_blocks", "lse_gradient_bf16", "sink_columns_bf16", "scale_large_fp16"),
}
HALVES = ((64, 16), (64, 64), (256, 64))  # head_dim and kv_block_size
PACKED = ("per_token_causal", "q_block16_per_sequence", "key_bias", "window", "tokens_of_no_sequence", "everything_bf16")


def for_few_variants(case: Case) -> Case:
    case = attention.as_kernels_take_it(case)
    head_dim = case.head_dim if case.head_dim in VARIANTS else 64
    sizes = VARIANTS[head_dim]
    kv_block_size = case.kv_block_size if case.kv_block_size in sizes else sizes[0]
    return dataclasses.replace(case, head_dim=head_dim, kv_block_size=kv_block_size, dtype=DTYPE)


def inputs_of(name: str, **changes) -> Inputs:
    return make_inputs(dataclasses.replace(for_few_variants(case_named(name)), **changes))


def run_of(inputs: Inputs, plan=None, attend: compare.Attend | None = None) -> Run:
    """Forward and backward, compiled."""
    arguments = inputs.operands, inputs.d_out, inputs.d_lse
    compiled = compare.forward_and_backward(attend or attention.attend_with(inputs, plan)).lower(*arguments).compile()
    return lambda: jax.device_get(compiled(*arguments))


def check_of(run: Run, inputs: Inputs, mask=None) -> Check:
    """Results against the oracle."""
    mask = compare.mask_of(inputs) if mask is None else mask
    expected, reference = compare.oracle_results(inputs, mask), compare.reference_results(inputs, mask)

    def check():
        for name, values in run().items():
            compare.assert_close(name, values, expected[name], reference[name], dtype=inputs.dtype)

    return check


def same(*runs: Run) -> Check:
    def check():
        first = runs[0]()
        for run in runs[1:]:
            attention.assert_same(run(), first)

    return check


def case_check(case: Case) -> Check:
    inputs = make_inputs(for_few_variants(case))
    return check_of(run_of(inputs), inputs)


def packed_check(case: varlen.PackedCase) -> Check:
    case = dataclasses.replace(case, dtype=DTYPE, head_dim=64, value_head_dim=64, kv_block_size=16)
    packed = varlen.make_packed(case)
    inputs = varlen.with_batch(packed)
    run = run_of(inputs, attend=varlen.attend_packed(packed, implementation="cuda"))
    return check_of(run, inputs, varlen.mask_of(case, packed))


def order_check(name: str) -> Check:
    runs = []
    for seed in ("0", "1", "2"):
        with mock.patch.dict(os.environ, {library.SEED: seed}):
            runs.append(run_of(inputs_of(name)))
    return same(*runs)


def bad_plan_check(bad_id: int, batch: int) -> Check:
    inputs = inputs_of("group2_bf16", batch=batch)
    plan = attention.make_plan(inputs)
    return same(run_of(inputs, plan), run_of(inputs, attention.with_blocks_that_do_not_exist(plan, bad_id)))


def bad_number_check(hides: str, operand: str, value: float) -> Check:
    inputs = HIDING[hides]()
    return same(run_of(inputs), run_of(attention.with_bad_numbers(inputs, operand, value)))


# What hides the keys that may hold bad numbers.
HIDING = {
    "later queries": lambda: attention.with_hidden_keys(inputs_of("odd_prefix")),
    "a bias": lambda: attention.with_keys_hidden_by_bias(inputs_of("odd_prefix", has_key_bias=True, logits_soft_cap=2.0)),
    "few blocks": lambda: inputs_of("odd_prefix", **attention.FEW_BLOCKS),
    "a window": lambda: inputs_of("odd_prefix", **attention.FEW_ROWS_WITH_WINDOW),
    "segments, blocks of 16": lambda: attention.with_hidden_keys_in_lists_of_halves(16),
    "segments, blocks of 64": lambda: attention.with_hidden_keys_in_lists_of_halves(64),
}


def tile_check(tile_size: int) -> Check:
    inputs = inputs_of("group8_bf16_d64")
    return check_of(run_of(inputs, attention.make_plan(inputs, tile_size)), inputs)


def rows_check(name: str) -> Check:
    inputs = inputs_of(name)
    return check_of(run_of(inputs, attention.plan_of_64_rows(inputs)), inputs)


def skipped_check(make: Callable[..., Inputs], *sizes: int) -> Check:
    inputs = make(*sizes)
    return check_of(run_of(inputs), inputs)


@contextlib.contextmanager
def split(entries: int, change: Callable[[Parts], Parts] = lambda parts: parts):
    """While a call is traced: lists longer than `entries` have several parts, which `change` then changes."""
    split_lists = splitting.split_lists
    lengths = mock.patch.multiple(splitting, MIN_ENTRIES_PER_PART=entries, LONG_LIST=0)
    with lengths, mock.patch.object(attention_backward, "split_lists", lambda plan: change(split_lists(plan))):
        yield


def heads_check(num_q_heads: int, selection_heads: int) -> Check:
    sizes = dict(num_q_heads=num_q_heads, num_kv_heads=1, selection_heads=selection_heads, q_len=10, kv_len=100)
    inputs = inputs_of("group8_bf16_d64", **sizes)
    return check_of(run_of(inputs), inputs)


def parts_check(name: str, entries: int, **changes) -> Check:
    inputs = inputs_of(name, **changes)
    plan = attention.make_plan(inputs, tile_size=1)
    with split(entries):
        num_partials = attention.num_partials_of(attention_backward.split_lists(plan))
    with split(entries, lambda parts: dataclasses.replace(parts, max_partials=num_partials)):
        return check_of(run_of(inputs, plan), inputs)


def contradiction_check(name: str) -> Check:
    inputs = inputs_of("group2_bf16")
    with split(9, attention.CONTRADICTIONS[name]):
        return run_of(inputs, attention.make_plan(inputs, tile_size=1))


def mapped_check(moving: tuple[str, ...], moves_selection: bool) -> Check:
    """Two calls in one, by vmap, against each alone."""
    inputs = inputs_of("everything", batch=1, q_offset=None)
    changed = dataclasses.replace(inputs.selection, indices=inputs.selection.indices[..., ::-1, :])
    selections = [inputs.selection, changed if moves_selection else inputs.selection]
    operands = [{name: x * (2 if i and name in moving else 1) for name, x in inputs.operands.items()} for i in range(2)]
    alone = [
        run_of(dataclasses.replace(inputs, operands=x, selection=selection))
        for x, selection in zip(operands, selections, strict=True)
    ]
    axes = {name: 0 if name in moving else None for name in operands[0]}
    stacked = {name: jnp.stack([x[name] for x in operands]) if name in moving else x for name, x in operands[0].items()}
    selection = attention.stack(selections) if moves_selection else selections[0]

    def one(operands, selection):
        attend = attention.attend_with(inputs, selection)
        return compare.forward_and_backward(attend)(operands, inputs.d_out, inputs.d_lse)

    mapped = jax.jit(jax.vmap(one, in_axes=(axes, 0 if moves_selection else None))).lower(stacked, selection).compile()

    def check():
        found = jax.device_get(mapped(stacked, selection))
        for i, run in enumerate(alone):
            attention.assert_same({name: x[i] for name, x in found.items()}, run())

    return check


def all_checks() -> dict[str, Callable[[], Check]]:
    """What makes each check, by name, in the order in which they run."""
    make = functools.partial
    cases = {x.name: x for x in CASES if x.name not in LEFT_OUT and attention.as_kernels_take_it(x) is not None}
    return (
        {name: make(case_check, cases.pop(name)) for name in FIRST}
        | {f"64 rows, {name}": make(rows_check, name) for name in FIRST[:4]}
        | {f"lists of halves, {sizes}": make(skipped_check, attention.with_lists_of_halves, *sizes) for sizes in HALVES}
        | {"beyond the window": make(skipped_check, attention.with_blocks_beyond_the_window, 64)}
        | {"parts": make(parts_check, "group2_bf16", 9)}
        | {f"parts, {name}": make(contradiction_check, name) for name in attention.CONTRADICTIONS}
        | {f"bad plan, {bad_id}": make(bad_plan_check, bad_id, 1) for bad_id in (-(2**31), -5, 6, 2**28, 2**31 - 1)}
        | {"bad plan of two sequences": make(bad_plan_check, -1, 2)}
        | {
            f"{value} in {operand}, {hides}": make(bad_number_check, hides, operand, value)
            for hides in HIDING
            for operand in ("key", "value")
            for value in ((np.nan, np.inf) if hides == "later queries" else (np.nan,))
        }
        | {f"tiles of {size}": make(tile_check, size) for size in (1, 7, 24, 60)}
        | {f"{heads} heads, {lists} lists": make(heads_check, heads, lists) for heads, lists in ((64, 64), (128, 128), (96, 1))}
        | {
            "vmap": make(mapped_check, ("query", "key", "value", "key_bias"), True),
            "vmap of queries": make(mapped_check, ("query",), False),
            "vmap of selections": make(mapped_check, (), True),
            "vmap of keys": make(mapped_check, ("key",), False),
        }
        | {f"packed {x.name}": make(packed_check, x) for x in varlen.CASES if x.name in PACKED}
        | {f"order, {name}": make(order_check, name) for name in ("everything", "group2_bf16")}
        | {name: make(case_check, case) for name, case in cases.items()}
        | {"parts, everything": make(parts_check, "everything", 30, q_len=40)}
    )
