"""The model of speed: its counts against the simulator's, its unions against plans, its times against published ones."""

import ctypes
import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import sparse_attn_jax as sa
from benchmarks import roofline, roofline_tables, schedules
from benchmarks.devices import A100, H100
from benchmarks.metadata import counter_bytes, delta_bytes, metadata_bytes, sum_partials_bytes
from benchmarks.prediction import occupancy, predict
from benchmarks.roofline_tables import INFLLM_V2, TOKEN_CASES
from benchmarks.tile_lists import Lists, lists_of_case, lists_of_density, sample_lists, tiles_of, visible_pairs
from benchmarks.workloads import count_pairs, sized_case
from sparse_attn_jax import jax_compat
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.testing import inputs
from sparse_attn_jax.testing.cases import Case, case_named
from sparse_attn_jax.testing.inputs import make_inputs
from tools import pallas_table

pytestmark = pytest.mark.kernels
needs_mosaic = pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU, reason="needs JAX 0.11 or newer")

if jax_compat.HAS_MOSAIC_GPU:
    from benchmarks import mosaic_schedules

    PALLAS_SCHEDULES = mosaic_schedules.forward, mosaic_schedules.key_gradient, mosaic_schedules.query_gradient
    AMPERE_SCHEDULES = (
        mosaic_schedules.ampere_forward_pass,
        mosaic_schedules.ampere_key_gradient,
        mosaic_schedules.ampere_query_gradient,
    )

DOCUMENT = (Path(__file__).absolute().parent.parent / "docs" / "performance.md").read_text()
COUNTERS = ("global_loaded", "global_stored", "shared_loaded", "shared_stored", "matrix_instructions")

# Cases that the kernels take, each with tokens per tile. A CTA has 64 rows.
COUNTED = [
    (Case(name="tile part full", special="48 of 64 rows", q_len=50, kv_len=70, head_dim=64, dtype="bfloat16", batch=2), 24),
    (
        Case(name="InfLLM's heads", special="a token is a warp", q_len=30, kv_len=150, num_q_heads=32, num_kv_heads=2,
             head_dim=128, dtype="bfloat16", kv_block_size=64, num_slots=2), 4,
    ),
    (
        Case(name="chunks", special="two per block and slices of tiles; the last chunk has no key", q_len=64, kv_len=300,
             head_dim=96, dtype="float16", kv_block_size=128, num_slots=2, q_block_size=64), 64,
    ),
    (
        Case(name="one list for all", special="no causality, empty rows", q_len=40, kv_len=90, head_dim=64, dtype="bfloat16",
             kv_block_size=32, is_causal=False, indices="sparse_rows", selection_heads=1), 20,
    ),
    (
        Case(name="large heads", special="gradients of keys and values apart", q_len=33, kv_len=64, head_dim=256,
             dtype="bfloat16", kv_block_size=64, num_q_heads=2, num_kv_heads=2, indices="hostile"), 33,
    ),
    (
        Case(name="sink", special="a list in two parts", q_len=90, kv_len=320, num_q_heads=2, num_kv_heads=1, head_dim=64,
             dtype="bfloat16", indices="realistic"), 1,
    ),
]  # fmt: skip


# The same for the SM90 kernels: tiles whose rows are all there, blocks of which all keys are.
SIZES = dict(head_dim=64, dtype="bfloat16", kv_block_size=64, num_kv_heads=2)
COUNTED_ON_SM90 = [
    (Case(name="one consumer", special="64 rows", q_len=32, kv_len=256, num_q_heads=32, num_slots=2, **SIZES), 4),
    (Case(name="two consumers", special="128 rows; each skips blocks", q_len=32, kv_len=512, num_q_heads=32, **SIZES), 8),
    (
        Case(name="two chunks of a block", special="not causal", q_len=16, kv_len=512, num_q_heads=16, is_causal=False,
             **SIZES | dict(kv_block_size=128, head_dim=128)), 8,
    ),
    (Case(name="strips of 16 tokens", special="no groups", q_len=64, kv_len=256, num_q_heads=2, **SIZES), 64),
    (
        Case(name="two slices of a tile", special="256 rows", q_len=32, kv_len=256, num_q_heads=32, num_slots=2, **SIZES), 16,
    ),
    (
        Case(name="four blocks in a chunk", special="the last chunk has fewer", q_len=32, kv_len=512, num_q_heads=32,
             num_slots=3, **SIZES | dict(kv_block_size=16)), 4,
    ),
    (
        Case(name="two blocks in a chunk", special="of two consumers, which skip chunks", q_len=32, kv_len=512,
             num_q_heads=32, num_slots=2, **SIZES | dict(kv_block_size=32)), 8,
    ),
    (
        Case(name="large heads", special="a consumer for each gradient", q_len=16, kv_len=256, num_q_heads=32,
             **SIZES | dict(head_dim=256)), 4,
    ),
    (
        Case(name="large heads, small blocks", special="chunks of 32 keys for dQ", q_len=16, kv_len=256, num_q_heads=16,
             **SIZES | dict(head_dim=256, kv_block_size=32)), 8,
    ),
]  # fmt: skip


@pytest.fixture
def launched(counters_of, monkeypatch):
    """A function that runs forward and backward on the simulator and returns the counters of each launch."""

    def run(case: Case, tokens: int, arch: str) -> list[dict[str, int]]:
        monkeypatch.setenv(library.ARCH, arch)
        made = make_inputs(case)

        @jax.jit
        @jax.grad
        def differentiate(operands):
            plan = plan_of(case, made.selection, tokens)
            return sa.block_sparse_attention(**operands, selection=plan, implementation="cuda", **made.options).sum()

        return counters_of(lambda: jax.block_until_ready(differentiate(made.operands)))

    return run


def plan_of(case: Case, selection: sa.BlockSelection, tokens: int) -> sa.TilePlan:
    sizes = {name: getattr(case, name) for name in ("q_len", "kv_len", "num_q_heads", "num_kv_heads")}
    return sa.plan_attention(selection, **sizes, tile_size=tokens)


def launched_schedules(case: Case, tokens: int) -> list[schedules.Schedule]:
    """In the order of their launches (csrc/sm80/launchers.cu), but for delta: CTAs have 64 rows, whatever tiles have."""
    which = ("both",) if case.head_dim <= 128 else ("key", "value")
    return [
        schedules.sm80_forward(case, tokens, warps=4),
        schedules.sm80_query_gradient(case, tokens, warps=4),
        *(schedules.sm80_key_gradient(case, tokens, rows=64, which=gradient) for gradient in which),
    ]


# ---- What is counted.


@pytest.mark.parametrize("case, tokens", COUNTED, ids=lambda x: getattr(x, "name", ""))
def test_counts_are_the_simulators(case, tokens, launched):
    """Every byte and every matrix instruction."""
    lists = lists_of_case(case)
    expected = []
    for schedule in launched_schedules(case, tokens):
        work = schedules.work_of(schedule, lists)
        counts, counter = schedules.counts_of(schedule, case, work), counter_bytes(schedule, work)
        loaded, stored = counts.loaded + metadata_bytes(schedule, lists) + counter, counts.stored + counter
        found = (loaded, stored, counts.shared_loaded, counts.shared_stored, counts.matrix_instructions)
        expected.append(dict(zip(COUNTERS, found)))
    expected.insert(1, dict(zip(COUNTERS, (*delta_bytes(case), 0, 0, 0))))
    if sums := sum_partials_bytes(lists, tokens):
        expected.append(dict(zip(COUNTERS, (*sums, 0, 0, 0))))
    found = [{name: launch[name] for name in COUNTERS} for launch in launched(case, tokens, "sm80")]
    assert found == expected


@pytest.mark.parametrize("case, tokens", COUNTED_ON_SM90, ids=lambda x: getattr(x, "name", ""))
def test_counts_are_the_simulators_on_sm90(case, tokens, launched):
    """Rows by tensor copies, products and what they read, results. Not what threads load and store besides."""
    lists = lists_of_case(case)
    expected = []
    for make in (schedules.sm90_forward, schedules.sm90_query_gradient, schedules.sm90_key_gradient):
        schedule = make(case, tokens)
        work = schedules.work_of(schedule, lists)
        counts = schedules.counts_of(schedule, case, work)
        stored = counts.stored + counter_bytes(schedule, work)
        figures = dict(copied=counts.loaded, global_stored=stored, flops=counts.flops, operands=counts.shared_loaded)
        expected.append(figures)
    launches = launched(case, tokens, "sm90")
    assert len(launches) == 4 + (sum_partials_bytes(lists, tokens) is not None)
    launches.pop(1)  # of delta, which is the one kernel of both architectures
    assert [{name: launch[name] for name in expected[0]} for launch in launches[:3]] == expected


@pytest.mark.parametrize("head_dim, kv_block_size", [(64, 32), (128, 64), (256, 64)])
def test_threads_and_shared_memory_are_the_kernels(head_dim, kv_block_size, simulated_kernels):
    simulated_kernels.sparse_attn_kernels.restype = ctypes.c_char_p
    kernels = json.loads(simulated_kernels.sparse_attn_kernels())
    case = Case(name="sizes", special="", head_dim=head_dim, kv_block_size=kv_block_size, dtype="bfloat16")
    configs = ("ForwardConfig", "QueryGradientConfig", "KeyGradientConfig")
    for schedule, config in zip(launched_schedules(case, 32), configs):
        named = f"sm80::{config}<sparse_attn::ptx::BFloat16, {head_dim}, {schedule.keys}, "
        found = {(kernel["threads"], kernel["shared_bytes"]) for kernel in kernels if named in kernel["config"]}
        assert found == {(32 * schedule.warps, schedule.shared_bytes)}, config


@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize("head_dim, kv_block_size", [(64, 64), (64, 16), (96, 128), (128, 64), (128, 32), (256, 64), (256, 32)])
def test_threads_and_shared_memory_are_those_of_sm90(head_dim, kv_block_size, tokens, simulated_kernels):
    simulated_kernels.sparse_attn_kernels.restype = ctypes.c_char_p
    kernels = json.loads(simulated_kernels.sparse_attn_kernels())
    case = Case(name="sizes", special="", head_dim=head_dim, kv_block_size=kv_block_size, dtype="bfloat16")
    groups = f"Warpgroups<{tokens * 2 // 64 if head_dim <= 128 else 1}, "
    for make, config in (
        (schedules.sm90_forward, "ForwardConfig"),
        (schedules.sm90_query_gradient, "QueryGradientConfig"),
        (schedules.sm90_key_gradient, "KeyGradientConfig"),
    ):
        schedule = make(case, tokens)
        keys = f"{kv_block_size}, {schedule.keys}, " if schedule.owns == "queries" else f"{schedule.keys}>"
        sizes = f"{head_dim}, {keys}"
        named = f"sm90::{config}<sparse_attn::ptx::BFloat16, {sizes}"
        found = {
            (kernel["threads"], kernel["shared_bytes"])
            for kernel in kernels
            if named in kernel["config"] and (schedule.owns == "keys" or groups in kernel["config"])
        }
        assert found == {(schedule.threads, schedule.shared_bytes)}, config


@needs_mosaic
@pytest.mark.parametrize("is_ampere", [False, True])
@pytest.mark.parametrize("case, tokens", COUNTED_ON_SM90, ids=lambda x: getattr(x, "name", ""))
def test_pallas_kernels_walk_what_plans_say(case, tokens, is_ampere):
    lists, plan = lists_of_case(case), plan_of(case, make_inputs(case).selection, tokens)
    g = mosaic_schedules.geometry_of(case, tokens)
    forward, key, _ = (make(case, tokens) for make in (AMPERE_SCHEDULES if is_ampere else PALLAS_SCHEDULES))
    counts = np.broadcast_to(plan.counts, (case.batch, case.num_kv_heads, g.num_tiles))
    chunks = -(-counts // g.blocks_per_chunk) * g.chunks_per_block
    found = schedules.work_of(forward, lists)
    assert found.pieces == chunks.sum() * g.slices_per_tile * 64 // forward.rows
    assert found.steps * 16 * forward.unit_warps == chunks.sum() * g.slices_per_tile * 64
    assert schedules.work_of(key, lists).steps == counts.sum() * g.slices_per_tile * case.kv_block_size // key.keys


def compiled_pallas_kernel(program: str, case: Case, name: str) -> tuple[int, int]:
    """Its registers and bytes of shared memory."""
    line = rf"{program}, head_dim {case.head_dim}, blocks of {case.kv_block_size} \| {name} \| (\d+) \| \d+ \| \d+ \| (\d+)"
    return tuple(map(int, re.search(line, pallas_table.TABLE.read_text()).groups()))


PALLAS_KERNELS = "attention_forward", "key_gradient", "query_gradient"


@needs_mosaic
@pytest.mark.parametrize("head_dim, kv_block_size", [(64, 16), (128, 32), (128, 128), (192, 64), (256, 64)])
def test_shared_memory_is_that_of_the_compiled_pallas_kernels(head_dim, kv_block_size):
    """Up to what aligns buffers and holds barriers."""
    case = dataclasses.replace(TOKEN_CASES["32k"], head_dim=head_dim, kv_block_size=kv_block_size)
    for name, make in zip(PALLAS_KERNELS, PALLAS_SCHEDULES):
        _, compiled = compiled_pallas_kernel("attention", case, name)
        assert 0 <= make(case, 8).shared_bytes - compiled <= 4096, name


@needs_mosaic
@pytest.mark.parametrize("head_dim, kv_block_size", [(64, 64), (128, 16), (128, 64), (128, 128)])
def test_pallas_kernels_for_ampere_are_those_that_are_compiled(head_dim, kv_block_size):
    """As many thread blocks beside each other by their registers and shared memory."""
    case = dataclasses.replace(TOKEN_CASES["32k"], head_dim=head_dim, kv_block_size=kv_block_size)
    for name, make in zip(PALLAS_KERNELS, AMPERE_SCHEDULES):
        registers, shared_bytes = compiled_pallas_kernel("attention on an A100", case, name)
        schedule = make(case, 4)
        assert schedule.shared_bytes == shared_bytes, name
        compiled = dataclasses.replace(schedule, registers=-(-registers // 8) * 8)
        assert occupancy(schedule, A100) == occupancy(compiled, A100) > 0, name


@needs_mosaic
def test_products_of_the_key_gradient_for_ampere():
    """Two are of 64 rows and d columns, two of d and 64. Each of four warps reads a part of that, and all keys."""
    case, work = TOKEN_CASES["32k"], schedules.Work(*[1.0] * 8)
    schedule, d = mosaic_schedules.ampere_key_gradient(case, 4), case.head_dim
    keys = schedule.keys
    elements = 2 * (64 * d + 4 * d * keys) + 2 * (d * 64 + 4 * 64 * keys)
    found = schedules.counts_of(schedule, case, work)
    assert (keys, found.shared_loaded, found.flops) == (32, 2 * elements, 4 * 2 * 64 * keys * d)
    assert found.exps == 64 * keys


@needs_mosaic
def test_pallas_kernels_that_do_not_fit_on_an_a100():
    case = dataclasses.replace(TOKEN_CASES["32k"], head_dim=256)
    found = [predict(make(case, 4), sample_lists(TOKEN_CASES["32k"], "random"), A100) for make in AMPERE_SCHEDULES]
    assert [x is None for x in found] == [False, True, True]


@pytest.mark.parametrize("name, tokens", [("group2_bf16", 3), ("q_block100", 32), ("hostile_ids", 1), ("duplicates", 4)])
def test_unions_are_those_of_plans(name, tokens):
    case = case_named(name)
    lists = lists_of_case(case)
    tiles = tiles_of(lists, tokens)
    plan = plan_of(case, make_inputs(case).selection, tokens)
    np.testing.assert_array_equal(tiles.blocks, np.ravel(plan.counts))
    np.testing.assert_array_equal(tiles.visits, np.diff(plan.inverse_offsets, axis=-1).reshape(tiles.visits.shape))
    assert schedules.num_entries(lists, tokens) == plan.inverse_tiles.shape[-1]


@pytest.mark.parametrize("name", ["kv_block128_bf16", "q_block100", "hostile_ids_full", "group3"])
def test_pairs_are_those_of_the_benchmarks(name):
    case = case_named(name)
    assert visible_pairs(lists_of_case(case)) == count_pairs(make_inputs(case), "selected")


SAMPLED = sized_case(
    seed=0, batch=2, q_len=16384, kv_len=None, num_q_heads=4, num_kv_heads=2, head_dim=64, q_block_size=1, kv_block_size=64,
    num_slots=64, is_causal=True, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole_and_sample() -> tuple[Lists, Lists]:
    """Random lists of every token of a sequence, and of a quarter of its tokens."""
    sizes = {name: getattr(SAMPLED, name) for name in ("q_len", "kv_len", "num_slots", "is_causal")}
    ids = inputs.random_indices(batch=1, heads=1, **sizes)
    return Lists(SAMPLED, ids, np.zeros(1, np.int64), 4), sample_lists(SAMPLED, "random")


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("make", [schedules.sm80_forward, schedules.sm80_key_gradient])
def test_sample_stands_for_all_tokens(make, tokens, whole_and_sample):
    whole, sample = whole_and_sample
    assert sample.coverage == 4
    schedule = make(SAMPLED, tokens)
    expected, found = (vars(schedules.work_of(schedule, lists, l2_capacity=2**22)) for lists in (whole, sample))
    for name in ("ctas", "owned", "pieces", "items", "steps", "edge_steps", "missed"):
        assert found[name] == pytest.approx(expected[name], rel=0.02), name


def test_realistic_lists_share_blocks():
    lists = sample_lists(SAMPLED, "realistic")
    random, realistic, one = tiles_of(sample_lists(SAMPLED, "random"), 16), tiles_of(lists, 16), tiles_of(lists, 1)
    assert realistic.blocks.mean() < 0.7 * random.blocks.mean()
    assert realistic.visits[0, 0] == len(realistic.blocks)  # the sink
    assert (one.blocks == np.minimum(one.visible // 64 + (one.visible % 64 > 0), 64)).all()


def test_lists_of_a_density():
    case = dataclasses.replace(roofline_tables.block_case(128), q_len=16384, kv_len=16384)
    own = np.arange(128)
    tiles = tiles_of(lists_of_density(case, 0.1), 128)
    np.testing.assert_array_equal(tiles.blocks, np.maximum(1, np.round(0.1 * (own + 1))))
    assert tiles.visits[0, -1] == 1 and (np.flatnonzero(tiles.has_last) == 127).all()
    every_block = lists_of_density(case, 1.0)
    assert visible_pairs(every_block) == case.q_len * (case.q_len + 1) // 2 * case.num_q_heads


# ---- What is predicted.


@pytest.mark.parametrize("case", TOKEN_CASES.values(), ids=TOKEN_CASES)
def test_published_times_of_infllm_v2(case):
    """Its own schedule, one set of ceilings for all lengths."""
    found = predict(schedules.infllm_v2_forward(case), sample_lists(case, "random"), H100)
    assert 1e3 * found.seconds == pytest.approx(INFLLM_V2[case.q_len].forward, rel=0.25)
    assert found.limit == "memory"


def test_infllm_v2_by_hand():
    """32,768 tokens: K/V of each token's blocks pass L2; all of them fit into it, so HBM sees each array once."""
    case = TOKEN_CASES["32k"]
    found = predict(schedules.infllm_v2_forward(case), sample_lists(case, "random"), H100)
    pairs = case.batch * case.num_kv_heads
    blocks = sum(min(token // 64 + 1, 64) for token in range(case.q_len)) * pairs
    q_rows = case.batch * case.q_len * 32
    assert found.counts.loaded == pytest.approx(blocks * 2 * 64 * 256 + q_rows * 256, rel=2e-3)
    assert found.counts.stored == q_rows * (256 + 4)
    assert found.counts.flops == pytest.approx(blocks * 4 * 64 * 128 * 16, rel=2e-3)
    assert found.hbm * H100.hbm_bytes == pytest.approx(q_rows * (2 * 256 + 4) + case.q_len * pairs * 2 * 256)
    assert found.l2 * H100.l2_bytes == pytest.approx(found.counts.loaded + found.counts.stored)
    assert found.ctas_per_sm == 6  # (228 KiB) // (36 KiB + 1 KiB)
    assert found.tensor * 0.629 * 989.4e12 == pytest.approx(found.counts.flops)  # six warps keep four tensor cores busy


def test_few_warps_leave_tensor_cores_idle():
    """One warp per CTA and three CTAs: three of four tensor cores."""
    case = TOKEN_CASES["32k"]
    lists = sample_lists(case, "random")
    found = predict(schedules.sm80_forward(case, 1), lists, H100)
    assert found.ctas_per_sm == 3
    assert found.tensor * H100.flops["mma"] == pytest.approx(found.counts.flops * 4 / 3)


def test_keys_that_l2_cannot_keep_come_from_hbm():
    """K/V of one head at 131,072 tokens are 64 MiB: of the causal prefix L2 keeps its capacity."""
    case = TOKEN_CASES["128k"]
    found = schedules.work_of(schedules.infllm_v2_forward(case), sample_lists(case, "random"), H100.l2_capacity)
    prefix = np.arange(1, case.q_len + 1) * 512
    expected = np.maximum(0, 1 - H100.l2_capacity / prefix).mean()
    assert found.missed / found.items == pytest.approx(expected, rel=0.05)


def test_sixteen_tokens_do_not_fit():
    """512 threads of 168 registers are more than an SM has."""
    case = TOKEN_CASES["32k"]
    lists = sample_lists(case, "random")
    assert predict(schedules.sm80_forward(case, 16), lists, A100) is None
    assert predict(schedules.sm80_forward(case, 8), lists, A100).ctas_per_sm == 1


# ---- What is written.


def test_document_has_the_present_check():
    assert roofline_tables.check_section() in DOCUMENT
    assert DOCUMENT.count(roofline.BEGIN) == DOCUMENT.count(roofline.END) == 1


def test_every_predicted_column_says_so():
    """Columns of times and speeds are predicted, published or goals, and never two of these."""
    tables = DOCUMENT.split(roofline.BEGIN)[1]
    headers = re.findall(r"^(\|.*\|)\n\| *-", tables, flags=re.MULTILINE)
    assert len(headers) >= 11
    for header in headers:
        for column in header.strip("|").split("|"):
            words = set(re.findall(r"predicted|published|goal", column))
            assert len(words) == (1 if re.search(r"ms|TFLOP/s|SM80|SM90|Pallas|dQ|dK|limit", column) else len(words)), column


def test_tables_replace_tables():
    document = f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n"
    assert roofline.with_tables(document, "new") == f"before\n{roofline.BEGIN}\n\nnew\n\n{roofline.END}\nafter\n"


def test_case_of_the_tests():
    entries, text = roofline.predict_case("group16_bf16_d128")
    assert "160 tokens x 1: forward" in text and "backward" in text
    data = json.loads(json.dumps([roofline.entry_data(entry) for entry in entries]))
    assert {entry["kernel"] for entry in data} == set(roofline_tables.KERNELS)
    assert all(entry["predicted"] is None or entry["predicted"]["ms"] > 0 for entry in data)
