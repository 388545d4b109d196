"""Inputs that all kernels are tested with."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import sparse_attn_jax as sa
from sparse_attn_jax import splitting
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import Case, case_named
from sparse_attn_jax.testing.inputs import Inputs, make_inputs

# Heads are alike: where a case is not about them, a slow interpreter has those of one KV head.
ONE_GROUP = dict(num_q_heads=2, num_kv_heads=1)


def as_kernels_take_it(case: Case) -> Case | None:
    """The case with a head_dim and dtype that the kernels have; `None` if it has what they have not."""
    if case.predicate_stride is not None:
        return None
    head_dim = case.head_dim if case.head_dim in (64, 96, 128, 256) else 64
    dtype = case.dtype if case.dtype in ("bfloat16", "float16") else "bfloat16"
    kv_block_size = case.kv_block_size if case.kv_block_size in (16, 32, 64, 128) else 16
    changes = dict(head_dim=head_dim, value_head_dim=None, dtype=dtype, kv_block_size=kv_block_size)
    return dataclasses.replace(case, **changes)


def make_plan(inputs: Inputs, tile_size: int | None = None) -> sa.TilePlan:
    q_len, num_q_heads = inputs.operands["query"].shape[1:3]
    kv_len, num_kv_heads = inputs.operands["key"].shape[1:3]
    sizes = dict(q_len=q_len, kv_len=kv_len, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    return sa.plan_attention(inputs.selection, **sizes, tile_size=tile_size)


def attend_with(implementation: str, inputs: Inputs, selection=None) -> compare.Attend:
    """The op, returning lse as well, as a function of its differentiable operands."""
    selection = inputs.selection if selection is None else selection

    def attend(**operands):
        options = dict(return_residual=True, implementation=implementation)
        return sa.block_sparse_attention(**operands, selection=selection, **options, **inputs.options)

    return attend


def mesh_of(device_kind: str, num_cores: int, size: int = 1) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform="gpu")
    return jax.sharding.AbstractMesh((size,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)


def mesh_of_hoppers(size: int = 1) -> jax.sharding.AbstractMesh:
    return mesh_of("NVIDIA H100 80GB HBM3", 132, size)


def trace_for_hopper(run: Callable, *arguments) -> jax.stages.Traced:
    """The program for an H100, which need not be here; it can be lowered for CUDA anywhere."""
    with jax.sharding.use_abstract_mesh(mesh_of_hoppers()):
        return jax.jit(run).trace(*arguments)


def lower_for_hopper(run: Callable, *arguments) -> str:
    return trace_for_hopper(run, *arguments).lower(lowering_platforms=("cuda",)).as_text()


def small_case(name: str, **changes) -> Inputs:
    return make_inputs(dataclasses.replace(as_kernels_take_it(case_named(name)), **changes))


def assert_same(actual: compare.Results, expected: compare.Results) -> None:
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def with_blocks_that_do_not_exist(plan: sa.TilePlan, bad_id: int) -> sa.TilePlan:
    """The plan with `bad_id` wherever it has no block, tile or slot, and in places that it has not."""
    extend = functools.partial(np.pad, mode="constant")
    # The list of each tile is longer by one slot, and counts say that all are used.
    blocks = extend(plan.blocks, [(0, 0)] * 3 + [(0, 1)], constant_values=bad_id)
    membership = extend(plan.membership, [(0, 0)] * 3 + [(0, 1), (0, 0)], constant_values=2**32 - 1)
    blocks[blocks < 0] = bad_id
    counts = np.full_like(plan.counts, blocks.shape[-1] + 7)
    # The first block's list of tiles begins before the memory of all, and the last one's goes on to its end and beyond, with
    # tiles that do not exist.
    pad = [(0, 0), (0, 0), (0, blocks[0, 0].size - plan.inverse_tiles.shape[-1])]
    tiles, slots = (extend(x, pad, constant_values=bad_id) for x in (plan.inverse_tiles, plan.inverse_slots))
    offsets = np.array(plan.inverse_offsets)
    offsets[..., 0], offsets[..., -1] = -7, 2**31 - 1
    bad_slot = bad_id if bad_id < 0 else max(bad_id, blocks.shape[-1])
    for row in np.ndindex(tiles.shape[:-1]):
        # In turn both are bad, the tile, or the slot.
        unused = np.flatnonzero((tiles[row] < 0) | (tiles[row] == bad_id))
        tiles[row][unused] = np.where(np.arange(len(unused)) % 3 == 2, 0, bad_id)
        slots[row][unused] = np.where(np.arange(len(unused)) % 3 == 1, 0, bad_slot)
    bad = dataclasses.replace(
        plan,
        blocks=blocks,
        membership=membership,
        counts=counts,
        inverse_offsets=offsets,
        inverse_tiles=tiles,
        inverse_slots=slots,
    )
    return jax.tree.map(jnp.asarray, bad)


def with_hidden_keys(inputs: Inputs) -> Inputs:
    """The last queries come before the last keys."""
    return dataclasses.replace(inputs, options=inputs.options | dict(q_offset=inputs.operands["key"].shape[1] - 60))


def with_keys_hidden_by_bias(inputs: Inputs) -> Inputs:
    """Besides: the bias of every third key is -inf."""
    inputs = with_hidden_keys(inputs)
    bias = inputs.operands["key_bias"]
    bias = jnp.where(jnp.arange(bias.shape[-1]) % 3 == 0, -jnp.inf, bias)
    return dataclasses.replace(inputs, operands=inputs.operands | dict(key_bias=bias))


def with_bad_numbers(inputs: Inputs, operand: str, value: float) -> Inputs:
    """`value` in each key (or value) that no query sees. A bias of -inf hides a value, but no key: NaN - inf is NaN."""
    seen = compare.mask_of(inputs).any(axis=(1, 2))  # [batch, kv_len]
    if operand == "value" and "key_bias" in inputs.operands:
        seen &= np.isfinite(inputs.operands["key_bias"]).any(axis=1)
    assert not seen.all() and seen.any()
    changed = jnp.where(jnp.asarray(seen)[..., None, None], inputs.operands[operand], value)
    operands = inputs.operands | {operand: changed.astype(inputs.operands[operand].dtype)}
    return dataclasses.replace(inputs, operands=operands)


# Keys that rows see which did not choose their block; those that chose it come before them.
FEW_BLOCKS = dict(indices="random", q_len=30, num_slots=2, has_key_bias=True)
# The last tile is not full: the rows that it lacks have no window, and must not count as seeing the keys beside it.
FEW_ROWS_WITH_WINDOW = dict(indices="all", q_len=21, q_block_size=16, is_causal=False, local_window_size=(4, 5), q_offset=24)


def split(monkeypatch, entries: int) -> None:
    """Lists of the inverse are split that are longer than so many entries."""
    monkeypatch.setattr(splitting, "MIN_ENTRIES_PER_PART", entries)
    monkeypatch.setattr(splitting, "LONG_LIST", 0)
