"""The Pallas kernels of block selection in JAX's interpreter of GPUs, which finds races, against the definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import lower_for_hopper, mesh_of_hoppers, trace_for_hopper
from selection_calls import (
    SMALL,
    Call,
    assert_nan_scores_are_chosen_only_if_forced,
    call_with_a_nan_in_a_unit,
    call_with_a_unit_shared_by_two_blocks,
    call_with_infinite_logits,
    call_with_positions_of_any_order,
    call_with_ties,
    calls_with_a_nan_in_the_first_query,
    calls_with_hidden_units,
    make_call,
)

import sparse_attn_jax as sa
from sparse_attn_jax import dispatch, jax_compat
from sparse_attn_jax.block_top_k import pick_blocks
from sparse_attn_jax.implementations import mosaic
from sparse_attn_jax.implementations.xla import scoring as xla
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.testing import selection_oracle as oracle
from sparse_attn_jax.testing.selection_cases import CASES, make_problem

if jax_compat.HAS_MOSAIC_GPU:
    from sparse_attn_jax.implementations.mosaic.kth_largest import kth_largest

SELECTOR = sa.selectors.InfLLMV2()

needs_mosaic = pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU, reason="needs JAX 0.11 or newer")
interpreted = pytest.mark.usefixtures("mosaic_on_cpu")


def run(call: Call) -> np.ndarray:
    return call.run(mosaic.select_from_units)


def assert_as_defined(call: Call) -> None:
    lists, scores = call.define()
    found = run(call)
    assert found.shape == lists.shape and found.dtype == np.int32
    oracle.assert_same_up_to_rounding(found, lists, scores)


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_lists_match_oracle(case):
    options = CASES[case]
    # From query 0 at position 9: some see no unit, some no coarse one.
    offsets = (9, options["kv_len"] - 60)
    assert_as_defined(make_call(60, 6, 2, batch=2, use_coarse=True, q_offset=offsets, **options))


@interpreted
@pytest.mark.parametrize("case", ["full", "odd-units", "gaps"])
def test_lists_with_an_exact_denominator(case):
    assert_as_defined(make_call(60, 6, 2, **CASES[case]))


@interpreted
@pytest.mark.parametrize(
    ("group_size", "reduction", "pooling"),
    [
        *((1, "sum", "max"), (5, "mean", "overlap_sum"), (12, "max", "max"), (16, None, "overlap_sum")),
        *((17, "sum", "overlap_sum"), (33, "max", "max")),
    ],
)
def test_group_sizes(group_size, reduction, pooling):
    """Groups that leave columns of a product empty, and those of several products."""
    assert_as_defined(make_call(20, group_size, 1, pooling=pooling, group_reduction=reduction, **SMALL))


@interpreted
@pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 32), ("bfloat16", 96), ("float16", 128), ("bfloat16", 256)])
def test_head_dims(dtype, head_dim):
    assert_as_defined(make_call(20, 8, 2, head_dim, dtype=dtype, use_coarse=True, **SMALL))


@interpreted
@pytest.mark.parametrize("q_len", [1, 65])
def test_odd_lengths(q_len):
    assert_as_defined(make_call(q_len, 8, 1, kv_len=1007))  # 1007 mod 16 = 15


@interpreted
def test_first_queries_that_see_a_coarse_unit():
    """A tile's earlier queries see many units and no coarse one, the later ones have both."""
    options = dict(kernel_size=1, kernel_stride=1, coarse_kernel_size=128, coarse_kernel_stride=64)
    assert_as_defined(make_call(33, 4, 2, use_coarse=True, q_offset=100, **(SMALL | options)))


@interpreted
@pytest.mark.parametrize("q_offset", [-5, 5000, (3, 133)], ids=str)
def test_chunked_prefill(q_offset):
    """Prefixes that are no multiple of a unit or block, and queries before and after all keys."""
    assert_as_defined(make_call(43, 8, 2, batch=2, use_coarse=True, q_offset=q_offset, **SMALL))


@interpreted
def test_positions_of_any_order():
    assert_as_defined(call_with_positions_of_any_order())


@interpreted
@pytest.mark.parametrize("options", [dict(top_k=60), dict(top_k=200, is_causal=False)], ids=str)
def test_top_k(options):
    """More than there are blocks."""
    assert_as_defined(make_call(70, 4, 2, **(SMALL | options)))


@interpreted
def test_sinks_after_the_own_block():
    options = dict(num_sink_blocks=70, num_local_blocks=1, top_k=73, is_causal=False)
    assert_as_defined(make_call(50, 2, 1, q_offset=300, **SMALL, **options))


@interpreted
def test_queries_are_walked_in_chunks():
    call = make_call(150, 16, 2, use_coarse=True, **SMALL)
    whole = run(call)
    oracle.assert_same_up_to_rounding(whole, *call.define())
    in_chunks = functools.partial(mosaic.select_from_units, chunk_elements=1)
    np.testing.assert_array_equal(call.run(in_chunks), whole)
    arrays = call.query, call.compressed, call.coarse, call.positions
    program = lambda select: str(jax.make_jaxpr(functools.partial(select, problem=call.problem))(*arrays))
    # 32 queries at a time.
    assert "length=5\n" in program(in_chunks) and "length=5\n" not in program(mosaic.select_from_units)


@interpreted
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_go_to_the_lower_block(scale):
    call = call_with_ties(scale)
    first = 480  # queries before it are as those after it, and would take long
    call = dataclasses.replace(call, query=call.query[:, first:], positions=call.positions[:, first:])
    np.testing.assert_array_equal(run(call), call.define()[0])


@interpreted
def test_a_unit_shared_by_two_blocks_ties_to_the_lower():
    np.testing.assert_array_equal(run(call_with_a_unit_shared_by_two_blocks())[0, 0, 0], [0, 1, 7])


@interpreted
@pytest.mark.parametrize(("value", "use_coarse"), [(np.nan, True), (-np.inf, False)])
def test_bad_numbers_in_units_that_a_query_does_not_see(use_coarse, value):
    """The other queries of a tile may see them."""
    clean, found = (run(call) for call in calls_with_hidden_units(3, use_coarse, value))
    np.testing.assert_array_equal(found[:, :, :27], clean[:, :, :27])
    assert (found[:, :, 27:] != clean[:, :, 27:]).any()


@interpreted
@pytest.mark.parametrize(("pooling", "reduction", "use_coarse"), [("max", "max", True), ("overlap_sum", "sum", False)])
def test_blocks_with_nan_scores_are_chosen_only_if_forced(use_coarse, pooling, reduction):
    call = call_with_a_nan_in_a_unit(use_coarse, pooling, reduction)
    with np.errstate(invalid="ignore"):
        lists, scores = call.define()
    assert np.isnan(scores).any() and not np.isnan(scores[:, -1]).any()
    assert_nan_scores_are_chosen_only_if_forced(run(call), lists, scores, use_coarse)


@interpreted
def test_nan_in_a_query_leaves_the_other_lists():
    clean, bad = calls_with_a_nan_in_the_first_query()
    np.testing.assert_array_equal(run(bad)[:, :, 1:], run(clean)[:, :, 1:])


@interpreted
@pytest.mark.parametrize("where", ["query", "unit"])
def test_infinite_logits_are_as_in_xla(where):
    call = call_with_infinite_logits(where)
    np.testing.assert_array_equal(run(call), call.run(xla.select_from_units))


@interpreted
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 100), (5, 0)])
def test_empty_lengths(q_len, kv_len):
    found = run(make_call(q_len, kv_len=kv_len, use_coarse=True))
    assert found.shape == (1, 2, q_len, 5) and (found == -1).all()


@interpreted
def test_vmap_folds_into_the_batch():
    call = make_call(20, batch=2, use_coarse=True, **SMALL)
    arrays = call.query, call.compressed, call.coarse, call.positions
    variants = [tuple(x * factor - 11 * (factor - 1) * (i == 3) for i, x in enumerate(arrays)) for factor in (1, 2)]
    select = jax.jit(lambda *arrays: mosaic.select_from_units(*arrays, problem=call.problem))
    found = jax.jit(jax.vmap(select))(*(jnp.stack(x) for x in zip(*variants, strict=True)))
    np.testing.assert_array_equal(found, np.stack([select(*v) for v in variants]))


@interpreted
def test_vmap_over_queries_alone():
    """Units and positions have fewer rows than the batch becomes, which repeat."""
    call = make_call(12, batch=2, use_coarse=True, q_offset=(3, 700), **SMALL)
    queries = jnp.stack([call.query, 2 * call.query])
    select = lambda query: dataclasses.replace(call, query=query).run(mosaic.select_from_units)
    arrays = call.compressed, call.coarse, call.positions
    mapped = jax.vmap(lambda query: mosaic.select_from_units(query, *arrays, problem=call.problem))
    np.testing.assert_array_equal(jax.jit(mapped)(queries), np.stack([*map(select, queries)]))


@interpreted
@pytest.mark.parametrize("num_entries", [3, 64, 700])
def test_kth_largest(num_entries):
    """Through the lists that are made with it, of scores with many ties, NaNs and infinities."""
    scores = np.random.default_rng(0).integers(-3, 9, (2, 3, num_entries, 13)).astype(np.float32)
    scores[:, :, ::5] = -np.inf
    scores[:, 1, 1] = np.nan
    positions = np.arange(13)[None] * 16 + 600
    options = dict(top_k=min(40, num_entries), block_size=16, num_sink_blocks=1, num_local_blocks=1, is_causal=False)
    found, wanted = (pick_blocks(jnp.asarray(scores), positions, kth_largest=by, **options) for by in (kth_largest, None))
    np.testing.assert_array_equal(found, wanted)


# --- without an interpreter ---


@needs_mosaic
def test_a_program_for_another_gpu_gets_its_kernels():
    query = jax.ShapeDtypeStruct((1, 64, 4, 64), "bfloat16")
    problems = []
    trace_for_hopper(lambda query: problems.append(make_problem(query, 640, num_kv_heads=2)), query)
    assert (problems[0].platform, problems[0].compute_capability) == ("gpu", "9.0")
    assert dispatch.choose(problems[0], None) == "mosaic"


@needs_mosaic
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 12, 16, 17, 32])
def test_selectors_lower_for_a_gpu(group_size, head_dim):
    query, key = (jax.ShapeDtypeStruct((2, 4096, heads, head_dim), "bfloat16") for heads in (2 * group_size, 2))
    text = lower_for_hopper(lambda query, key: SELECTOR(query, key, is_causal=True).indices, query, key)
    assert text.count("custom_call @mosaic_gpu") == 2


@needs_mosaic
def test_selectors_lower_where_integers_have_64_bits():
    query, key = (jax.ShapeDtypeStruct((2, 4096, heads, 64), "bfloat16") for heads in (8, 2))
    with jax.enable_x64(True):
        text = lower_for_hopper(lambda query, key: SELECTOR(query, key, is_causal=True).indices, query, key)
    assert text.count("custom_call @mosaic_gpu") == 2


@needs_mosaic
@pytest.mark.parametrize("q_len", [1, 300])
def test_lists_per_query_head_and_few_queries_lower_for_a_gpu(q_len):
    query, key = (jax.ShapeDtypeStruct((2, length, heads, 128), "bfloat16") for length, heads in ((q_len, 8), (4096, 2)))
    selector = dataclasses.replace(SELECTOR, group_reduction=None, coarse_lse=False)
    text = lower_for_hopper(lambda query, key: selector(query, key, is_causal=True).indices, query, key)
    assert text.count("custom_call @mosaic_gpu") == 2


@needs_mosaic
def test_shard_map_lowers_for_gpus():
    query, key = (jax.ShapeDtypeStruct((4, 4096, heads, 64), "bfloat16") for heads in (8, 2))
    mesh, row = mesh_of_hoppers(2), jax.sharding.PartitionSpec("data")
    select = lambda query, key: SELECTOR(query, key, is_causal=True).indices
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=row, out_specs=row)).trace(query, key)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2 and "all_gather" not in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(dtype="float32", unit_dtype="float32"), "dtype is float32; supported: bfloat16, float16"),
        (dict(unit_dtype="float32"), "the compressed keys are float32; supported: the dtype of query, which is bfloat16"),
        (dict(head_dim=320), "head_dim is 320; supported: at most 256"),
        (dict(compute_capability="8.0"), "compute capability is 8.0; supported: 9.0"),
        (dict(num_q_heads=256, head_dim=256), "the group size is 128 and head_dim 256, which needs"),
        (dict(kernel_size=512), "kernel_size is 512; supported: at most 4 blocks, of 64"),
    ],
)
def test_reasons(changes, reason):
    sizes = dict(num_q_heads=32, num_kv_heads=2, head_dim=128, kv_len=4096, top_k=16, num_sink_blocks=1, num_local_blocks=2)
    device = dict(platform="gpu", compute_capability="9.0")
    able = ScoringProblem(**sizes, **device, dtype="bfloat16", unit_dtype="bfloat16", scale=1.0)
    if not jax_compat.HAS_MOSAIC_GPU:
        assert any("JAX" in reason for reason in mosaic.supports_scoring(able))
        return
    assert mosaic.supports_scoring(able) == ()
    (found,) = mosaic.supports_scoring(dataclasses.replace(able, **changes))
    assert reason in found
