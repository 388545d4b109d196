"""The CUDA kernels themselves, run on a CPU by the simulator, against the oracle on the cases of every implementation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax.implementations import cuda
from sparse_attn_jax.implementations.cuda import attention_backward, attention_forward
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import CASES, Case, case_named
from sparse_attn_jax.testing.inputs import Inputs, make_inputs

MAX_ROWS = 64


@pytest.fixture(autouse=True)
def cuda_on_cpu(simulated_kernels, monkeypatch):
    """`implementation="cuda"` runs on the simulator."""
    for target in (attention_forward.TARGET, attention_backward.TARGET):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(simulated_kernels, target)), platform="cpu")
    monkeypatch.setattr(cuda, "supports", lambda problem: ())
    set_order(monkeypatch, seed=0)


def set_order(monkeypatch, seed: int) -> None:
    """The order in which the blocks and threads of a grid run."""
    monkeypatch.setattr(cuda, "forward", functools.partial(attention_forward.forward, seed=seed), raising=False)
    monkeypatch.setattr(cuda, "backward", functools.partial(attention_backward.backward, seed=seed), raising=False)


def as_kernels_take_it(case: Case) -> Case | None:
    """The case with a head_dim and dtype that the kernels have; `None` if it has what they have not."""
    if case.predicate_stride is not None or case.num_q_heads // case.num_kv_heads > MAX_ROWS:
        return None
    head_dim = case.head_dim if case.head_dim in (64, 96, 128, 256) else 64
    dtype = case.dtype if case.dtype in ("bfloat16", "float16") else "bfloat16"
    kv_block_size = case.kv_block_size if case.kv_block_size in (16, 32, 64, 128) else 16
    changes = dict(head_dim=head_dim, value_head_dim=None, dtype=dtype, kv_block_size=kv_block_size)
    return dataclasses.replace(case, **changes)


TAKEN = [case for case in map(as_kernels_take_it, CASES) if case is not None]


def make_plan(inputs: Inputs) -> sa.TilePlan:
    batch, q_len, num_q_heads, _ = inputs.operands["query"].shape
    kv_len, num_kv_heads = inputs.operands["key"].shape[1:3]
    group_size = num_q_heads // num_kv_heads
    heads = dict(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    return sa.plan_attention(
        inputs.selection, q_len=q_len, kv_len=kv_len, **heads, tile_size=min(MAX_ROWS // group_size, q_len)
    )


def results_of(inputs: Inputs, plan: sa.TilePlan | None = None) -> compare.Results:
    plan = make_plan(inputs) if plan is None else plan

    def attend(**operands):
        options = dict(return_residual=True, implementation="cuda")
        return sa.block_sparse_attention(**operands, selection=plan, **options, **inputs.options)

    return compare.results_of(attend, inputs)


def small_case(name: str) -> Inputs:
    return make_inputs(as_kernels_take_it(case_named(name)))


def assert_same(actual: compare.Results, expected: compare.Results) -> None:
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_attention_matches_oracle(case):
    inputs = make_inputs(case)
    compare.assert_results_match(results_of(inputs), inputs)


def test_most_cases_are_taken():
    assert len(TAKEN) > 0.9 * len(CASES)


@pytest.mark.parametrize("name", ["everything", "group16_bf16_d128"])
def test_order_of_blocks_and_threads_changes_nothing(name, monkeypatch):
    inputs = small_case(name)
    expected = results_of(inputs)
    for seed in (1, 2):
        set_order(monkeypatch, seed)
        assert_same(results_of(inputs), expected)


@pytest.mark.parametrize("bad_id", [-(2**31), -5, 6, 2**28, 2**31 - 1])
def test_plan_that_names_blocks_that_do_not_exist(bad_id):
    """2**28 blocks of 16 keys are 2**32 keys, which is 0 in 32 bits."""
    inputs = small_case("group2_bf16")
    plan = make_plan(inputs)
    assert plan.kv_len == 6 * plan.kv_block_size
    expected = results_of(inputs, plan)
    # The list of each tile is longer by one slot, and counts say that all are used.
    extend = functools.partial(np.pad, mode="constant")
    blocks = extend(plan.blocks, [(0, 0)] * 3 + [(0, 1)], constant_values=bad_id)
    membership = extend(plan.membership, [(0, 0)] * 3 + [(0, 1), (0, 0)], constant_values=2**32 - 1)
    blocks[blocks < 0] = bad_id
    counts = np.full_like(plan.counts, blocks.shape[-1] + 7)
    # The last block's list of tiles goes on to the end of memory and beyond, with tiles that do not exist.
    pad = [(0, 0), (0, 0), (0, blocks[0, 0].size - plan.inverse_tiles.shape[-1])]
    tiles, slots = (extend(x, pad, constant_values=bad_id) for x in (plan.inverse_tiles, plan.inverse_slots))
    offsets = np.array(plan.inverse_offsets)
    offsets[..., -1] = 2**31 - 1
    tiles[tiles < 0] = slots[slots < 0] = bad_id
    bad = dataclasses.replace(
        plan,
        blocks=blocks,
        membership=membership,
        counts=counts,
        inverse_offsets=offsets,
        inverse_tiles=tiles,
        inverse_slots=slots,
    )
    assert_same(results_of(inputs, jax.tree.map(jnp.asarray, bad)), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_bad_numbers_in_keys_that_no_query_sees(operand, value):
    """Keys in blocks that are not listed, and later keys of a listed block."""
    inputs = small_case("odd_prefix")
    inputs = dataclasses.replace(inputs, options=inputs.options | dict(q_offset=inputs.operands["key"].shape[1] - 60))
    seen = compare.mask_of(inputs).any(axis=(1, 2))  # [batch, kv_len]
    assert not seen.all() and seen.any()
    expected = results_of(inputs)
    changed = jnp.where(jnp.asarray(seen)[..., None, None], inputs.operands[operand], value)
    operands = inputs.operands | {operand: changed.astype(inputs.operands[operand].dtype)}
    assert_same(results_of(dataclasses.replace(inputs, operands=operands)), expected)


def test_handler_refuses_wrong_shapes(monkeypatch):
    def call(problem, operands, plan, mask):
        return attention_forward.forward(problem, dataclasses.replace(operands, value=operands.value[:, :-1]), plan, mask)

    monkeypatch.setattr(cuda, "forward", call)
    with pytest.raises(Exception, match=r"value has shape \[1, 95, 2, 64\]; needed is \[1, 96, 2, 64\]"):
        results_of(small_case("group2_bf16"))
