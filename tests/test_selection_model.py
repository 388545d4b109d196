"""The model of block selection counts what the simulator does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import selection_model as model
from benchmarks.devices import A100, H100
from sparse_attn_jax import jax_compat
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.scoring import select_from_units
from sparse_attn_jax.testing.selection_cases import make_problem

pytestmark = pytest.mark.kernels

UNITS = dict(block_size=16, kernel_size=8, kernel_stride=4, coarse_kernel_size=32, coarse_kernel_stride=16)
# (queries, options): those of the problem, and whether coarse units give the denominator.
CASES = {
    "first queries see no unit": (200, dict(kv_len=200, num_q_heads=16, num_kv_heads=1)),
    "coarse units": (70, dict(kv_len=333, num_q_heads=8, num_kv_heads=2, use_coarse=True)),
    "no tile is full": (5, dict(kv_len=100, num_q_heads=12, num_kv_heads=2, head_dim=128)),
    "query read for each chunk": (40, dict(kv_len=520, num_q_heads=4, num_kv_heads=2, head_dim=256)),
    "not causal": (30, dict(kv_len=520, num_q_heads=4, num_kv_heads=2, is_causal=False, use_coarse=True)),
    "a list per query head": (30, dict(kv_len=300, num_q_heads=4, num_kv_heads=2, group_reduction=None)),
    "several segments": (9, dict(kv_len=88000, num_q_heads=16, num_kv_heads=1, top_k=300)),
}


def selection_of(q_len: int, *, arch, head_dim=64, use_coarse=False, num_kv_heads, num_q_heads, **options) -> model.Selection:
    query = jax.ShapeDtypeStruct((1, q_len, num_q_heads, head_dim), "bfloat16")
    problem = make_problem(query, num_kv_heads=num_kv_heads, **UNITS | options)
    return model.Selection(problem, 1, q_len, use_coarse, arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_counts_are_the_simulators(name, arch, counters_of, monkeypatch):
    monkeypatch.setenv(library.ARCH, f"sm{arch}")
    q_len, options = CASES[name]
    selection = selection_of(q_len, arch=arch, **options)
    p = selection.problem
    random = np.random.default_rng(0)

    def draw(length, heads):
        return jnp.asarray(random.standard_normal((1, length, heads, p.head_dim)), p.dtype)

    query, units = draw(q_len, p.num_q_heads), draw(selection.fine.count, p.num_kv_heads)
    coarse = draw(selection.coarse.count, p.num_kv_heads) if selection.use_coarse else None
    positions = p.kv_len - q_len + jnp.arange(q_len, dtype=jnp.int32)[None]
    (launch,) = counters_of(lambda: select_from_units(query, units, coarse, positions, problem=p).block_until_ready())
    counts = model.counts_of(selection)
    expected = dict(global_loaded=counts.loaded, global_stored=counts.stored, flops=counts.flops, operands=counts.operands)
    expected["copied"] = counts.copied
    assert {counter: launch[counter] for counter in expected} == expected
    if arch == 80:
        assert launch["shared_stored"] >= counts.written


@pytest.mark.parametrize("arch", [80, 90])
def test_several_segments_are_several(arch):
    q_len, options = CASES["several segments"]
    selection = selection_of(q_len, arch=arch, **options)
    assert model.tiling_of(selection).segment_blocks < selection.num_blocks


def test_limits_by_hand():
    """8,192 queries of 16 heads, each 8,192 x 16 rows against on average half of 511 units and of 127 coarse ones."""
    problem = make_problem(
        jax.ShapeDtypeStruct((1, 8192, 16, 128), "bfloat16"), num_kv_heads=1, kv_len=8192, is_causal=True, top_k=16
    )
    found = model.Selection(problem, 2, 8192)
    assert (found.fine.count, found.coarse.count) == (511, 127)
    flops = 2 * 8192 * 16 * (511 + 127) / 2 * 2 * 128
    limits = model.limits_of(found, H100)
    # Chunks of 64 units: on average half a chunk more, for each.
    assert limits["tensor"] == pytest.approx(flops * (1 + 64 / (511 + 127) * 2) / (0.629 * 989.4e12), rel=0.02)
    assert limits["exp"] / limits["tensor"] == pytest.approx(0.629 * 989.4e12 / (132 * 1.83e9 * 16 * 2 * 128))
    assert model.limits_of(found, A100)["tensor"] / limits["tensor"] == pytest.approx(0.629 * 989.4 / 312)
    of_wgmma = model.limits_of(dataclasses.replace(found, arch=90), H100)
    assert limits["tensor"] / of_wgmma["tensor"] == pytest.approx(1 / 0.629)
    # Of 64 units and 128 rows: units are written once and read by two warpgroups, and rows stay in registers.
    seconds_per_byte, seconds_per_flop = 1 / (132 * 1.83e9 * 128), 1 / 989.4e12
    expected = (3 * 64 * 256 * seconds_per_byte) / (2 * 64 * 128 * 128 * seconds_per_flop)
    assert of_wgmma["shared"] / of_wgmma["tensor"] == pytest.approx(expected, rel=1e-3)


def walked_steps(selection) -> int:
    """Of thread blocks of 32 tokens: steps of 64 coarse units that the last query sees, 5 for every 64 blocks up to its own.

    A block of 16 keys overlaps 5 units of 8 keys that start every 4.
    """
    p, total = selection.problem, 0
    for first in range(0, selection.q_len, 32):
        position = p.kv_len - selection.q_len + min(first + 31, selection.q_len - 1)
        seen = [
            unit
            for unit in range(selection.coarse.count)
            if unit * p.coarse_kernel_stride + p.coarse_kernel_size - 1 <= position
        ]
        blocks = position // p.block_size + 1
        total += -(-len(seen) // 64) + 5 * -(-blocks // 64)
    return total * selection.num_lists


@pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU, reason="needs JAX 0.11 or newer")
def test_pallas_counts_follow_from_the_definition():
    from benchmarks import mosaic_selection_model as mosaic_model

    selection = selection_of(70, kv_len=2333, num_q_heads=16, num_kv_heads=2, use_coarse=True, arch=90)
    counts = mosaic_model.counts_of(selection)
    assert counts.steps == walked_steps(selection)
    # A tile has 16 tokens of 8 heads, and a thread block two tiles.
    assert counts.products == 2 * counts.steps
    scores_of_a_step = 64 * 32 * 4
    assert counts.stored == 2 * 3 * 3 * scores_of_a_step, "2 lists, 3 thread blocks, 3 groups of 64 blocks"
    step_bytes, tile_bytes = 64 * 64 * 2 + 3 * 64 * 4, 128 * 64 * 2 + 128 * 4
    assert counts.loaded == counts.steps * step_bytes + 2 * 3 * 2 * tile_bytes
    limits, lists = mosaic_model.seconds_of(selection, H100)
    assert limits["tensor"] == pytest.approx(counts.products * 2 * 64 * 128 * 64 / 989.4e12)
    num_scores = 2 * 70 * 146  # lists, queries, blocks
    counting, passes = num_scores * 64 / (132 * 1.83e9 * 64), num_scores * 4 * 3 / 3.35e12
    indices = 2 * 70 * selection.problem.top_k * 4 / 3.35e12
    assert lists == pytest.approx(max(counting, num_scores * 4 / 3.35e12) + passes + indices)
