"""The model of speed: its counts against the simulator's, its unions against plans, its times against published ones."""

import ctypes
from pathlib import Path

import jax
import pytest

import sparse_attn_jax as sa
from benchmarks import schedules
from benchmarks.metadata import metadata_bytes, sum_partials_bytes
from benchmarks.tile_lists import lists_of_case
from sparse_attn_jax.implementations.cuda import host_sim, library
from sparse_attn_jax.testing.cases import Case
from sparse_attn_jax.testing.inputs import make_inputs

ROOT = Path(__file__).absolute().parent.parent
COUNTERS = ("global_loaded", "global_stored", "shared_loaded", "shared_stored", "matrix_instructions")

# Cases that the kernels take, each with tokens per tile. A tile has 64 rows.
COUNTED = [
    (Case(name="tile part full", special="48 of 64 rows", q_len=50, kv_len=70, head_dim=64, dtype="bfloat16", batch=2), 24),
    (
        Case(name="InfLLM's heads", special="a token is a warp", q_len=30, kv_len=150, num_q_heads=32, num_kv_heads=2,
             head_dim=128, dtype="bfloat16", kv_block_size=64, num_slots=2), 4,
    ),
    (
        Case(name="blocks of two chunks", special="the second chunk of the last block is empty", q_len=64, kv_len=300,
             head_dim=96, dtype="float16", kv_block_size=128, num_slots=2, q_block_size=32), 32,
    ),
    (
        Case(name="one list for all", special="no causality, empty rows", q_len=40, kv_len=90, head_dim=64, dtype="bfloat16",
             kv_block_size=32, is_causal=False, indices="sparse_rows", selection_heads=1), 20,
    ),
    (
        Case(name="large heads", special="gradients of keys and values apart", q_len=33, kv_len=64, head_dim=256,
             dtype="bfloat16", kv_block_size=64, num_q_heads=2, num_kv_heads=2, indices="hostile"), 33,
    ),
]  # fmt: skip


@pytest.fixture
def launched(cpp_compiler, monkeypatch):
    """A function that runs forward and backward on the simulator and returns the counters of each launch."""
    monkeypatch.setenv(library.HOST_SIM, "1")
    monkeypatch.setenv(library.ARCH, "sm80")
    take = ctypes.CDLL(str(host_sim.build())).host_sim_take_counters
    take.restype = ctypes.c_bool
    counters = (ctypes.c_uint64 * len(COUNTERS))()

    def run(case: Case, tokens: int) -> list[dict[str, int]]:
        while take(counters):
            continue
        made = make_inputs(case)

        @jax.jit
        @jax.grad
        def differentiate(operands):
            plan = plan_of(case, made.selection, tokens)
            return sa.block_sparse_attention(**operands, selection=plan, implementation="cuda", **made.options).sum()

        jax.block_until_ready(differentiate(made.operands))
        found = []
        while take(counters):
            found.append(dict(zip(COUNTERS, counters)))
        return found

    return run


def plan_of(case: Case, selection: sa.BlockSelection, tokens: int) -> sa.TilePlan:
    sizes = {name: getattr(case, name) for name in ("q_len", "kv_len", "num_q_heads", "num_kv_heads")}
    return sa.plan_attention(selection, **sizes, tile_size=tokens)


def launched_schedules(case: Case, tokens: int) -> list[schedules.Schedule]:
    """In the order of their launches (csrc/sm80/launchers.cu): CTAs have 64 rows, whatever tiles have."""
    which = ("both",) if case.head_dim <= 128 else ("key", "value")
    return [
        schedules.sm80_forward(case, tokens, warps=4),
        schedules.sm80_query_gradient(case, tokens, warps=4),
        *(schedules.sm80_key_gradient(case, tokens, rows=64, which=gradient) for gradient in which),
    ]


@pytest.mark.parametrize("case, tokens", COUNTED, ids=lambda x: getattr(x, "name", ""))
def test_counts_are_the_simulators(case, tokens, launched):
    """Every byte and every matrix instruction."""
    lists = lists_of_case(case)
    expected = []
    for schedule in launched_schedules(case, tokens):
        counts = schedules.counts_of(schedule, case, schedules.work_of(schedule, lists))
        loaded = counts.loaded + metadata_bytes(schedule, lists)
        found = (loaded, counts.stored, counts.shared_loaded, counts.shared_stored, counts.matrix_instructions)
        expected.append(dict(zip(COUNTERS, found)))
    if sums := sum_partials_bytes(lists, tokens):
        expected.append(dict(zip(COUNTERS, (*sums, 0, 0, 0))))
    assert launched(case, tokens) == expected
