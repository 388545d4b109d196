"""The CUDA kernel of block selection, run on a CPU by the simulator, against the definition in float64."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from selection_calls import (
    SMALL,
    Call,
    assert_nan_scores_are_chosen_only_if_forced,
    call_of_many_segments,
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
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.scoring import select_from_units
from sparse_attn_jax.implementations.xla import scoring as xla
from sparse_attn_jax.scoring import score_blocks, select_blocks
from sparse_attn_jax.testing import selection_oracle as oracle
from sparse_attn_jax.testing.selection_cases import CASES

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True, params=["sm80", "sm90"])
def kernels_of_arch(cuda_on_cpu, request, monkeypatch):
    monkeypatch.setenv(library.ARCH, request.param)


def run(call: Call, **options) -> np.ndarray:
    return call.run(select_from_units, **options)


def assert_as_defined(call: Call, **options) -> None:
    lists, scores = call.define()
    found = run(call, **options)
    assert found.shape == lists.shape and found.dtype == np.int32
    oracle.assert_same_up_to_rounding(found, lists, scores)


@pytest.mark.parametrize("use_coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("case", CASES)
def test_lists_match_oracle(case, use_coarse):
    options = CASES[case]
    q_len = min(options["kv_len"], 130)
    assert_as_defined(make_call(q_len, 6, 2, batch=2, use_coarse=use_coarse, **options))
    if options.get("is_causal", True):
        # From query 0 at position 9: some see no unit, some no coarse one.
        assert_as_defined(make_call(q_len, 6, 2, use_coarse=use_coarse, q_offset=9, **options))


@pytest.mark.parametrize("pooling", ["max", "overlap_sum"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max", None])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 8, 16])
def test_group_sizes(group_size, reduction, pooling):
    assert_as_defined(make_call(30, 2 * group_size, 2, pooling=pooling, group_reduction=reduction, **SMALL))


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("group_size", [5, 7, 12, 17, 32, 33, 64])
def test_other_group_sizes(group_size, reduction):
    """Groups that leave rows of a tile empty, and those of two warps."""
    assert_as_defined(make_call(7, group_size, 1, group_reduction=reduction, use_coarse=True, **SMALL))


@pytest.mark.parametrize("group_size", [2, 16])  # low tiles, and high ones where there are some
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_variant(dtype, head_dim, group_size):
    call = make_call(40, 2 * group_size, 2, head_dim, dtype=dtype, use_coarse=True, **SMALL)
    assert_as_defined(call)
    assert_as_defined(dataclasses.replace(call, coarse=None))


@pytest.mark.parametrize("group_size", [1, 8])
@pytest.mark.parametrize("q_len", [1, 63, 65])
def test_odd_lengths(q_len, group_size):
    assert_as_defined(make_call(q_len, group_size, 1, kv_len=1007))  # 1007 mod 16 = 15


@pytest.mark.parametrize("q_offset", [-2, 100, 120, 155])
def test_first_queries_that_see_a_coarse_unit(q_offset):
    """A tile's earlier queries see many units and no coarse one, the later ones have both."""
    options = dict(kernel_size=1, kernel_stride=1, coarse_kernel_size=128, coarse_kernel_stride=64)
    assert_as_defined(make_call(33, 4, 2, use_coarse=True, q_offset=q_offset, **(SMALL | options)))


@pytest.mark.parametrize("use_coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("q_offset", [0, 17, 250, 756, -5, 5000, (3, 133), (780, 0)], ids=str)
def test_chunked_prefill(q_offset, use_coarse):
    """Prefixes that are no multiple of a unit or block, and queries before and after all keys."""
    assert_as_defined(make_call(43, 8, 2, batch=2, use_coarse=use_coarse, q_offset=q_offset, **SMALL))


def test_positions_of_any_order():
    assert_as_defined(call_with_positions_of_any_order())


@pytest.mark.parametrize("shift", [-1, 1])
def test_oracle_notices_causality_off_by_one(shift):
    # Blocks of one stride, so that the newest unit decides about blocks that are not forced.
    call = make_call(271, 2, 1, kv_len=271, block_size=16, top_k=3, num_sink_blocks=0, num_local_blocks=1)
    found, (lists, scores) = run(call), call.define()
    oracle.assert_same_up_to_rounding(found, lists, scores)
    with pytest.raises(AssertionError):
        oracle.assert_same_up_to_rounding(found, call.define(visibility_shift=shift)[0], scores)


@pytest.mark.parametrize("options", [dict(top_k=60), dict(top_k=50), dict(top_k=3), dict(top_k=200, is_causal=False)], ids=str)
def test_top_k(options):
    """More than there are blocks, as many, and no more than are forced."""
    assert_as_defined(make_call(70, 4, 2, **(SMALL | options)))


@pytest.mark.parametrize("sinks, local", [(0, 1), (3, 1), (0, 7), (2, 60), (70, 1)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("q_offset", [0, 300])
def test_forced_blocks(q_offset, is_causal, sinks, local):
    """Also sinks after the query's own block, which it sees if nothing is causal."""
    options = dict(num_sink_blocks=sinks, num_local_blocks=local, top_k=sinks + local + 2, is_causal=is_causal)
    assert_as_defined(make_call(50, 2, 1, q_offset=q_offset, **SMALL, **options))


@pytest.mark.parametrize("key_of", ["random", "ascending", "descending"])
def test_segments_change_nothing(key_of):
    call = call_of_many_segments(key_of)
    lists, scores = call.define()
    whole = run(call)
    oracle.assert_same_up_to_rounding(whole, lists, scores)
    for segment_blocks in (1, 17, 64, 100, 249, 250, 2**31 - 1):
        np.testing.assert_array_equal(run(call, segment_blocks=segment_blocks), whole)


@pytest.mark.parametrize("options", [{}, dict(block_size=8, kernel_size=4, kernel_stride=20)], ids=["overlaps", "gaps"])
def test_segments_of_any_geometry(options):
    call = make_call(40, 4, 2, use_coarse=True, **(SMALL | options))
    for segment_blocks in (1, 5, 30):
        assert_as_defined(call, segment_blocks=segment_blocks)


def test_many_blocks():
    """16,384 blocks, of which 128 are chosen."""
    kv_len = 16384 * 8
    options = dict(block_size=8, kernel_size=8, kernel_stride=8, top_k=128, num_sink_blocks=1, num_local_blocks=2)
    call = make_call(2, 1, 1, kv_len=kv_len, **options)
    options = {name: options[name] for name in ("block_size", "kernel_size", "kernel_stride")}
    scores = score_blocks(call.query, call.compressed, kv_len=kv_len, is_causal=True, **options)
    forced = dict(num_sink_blocks=1, num_local_blocks=2)
    wanted = select_blocks(scores, 128, kv_len=kv_len, block_size=8, is_causal=True, **forced).indices
    oracle.assert_same_up_to_rounding(run(call), np.asarray(wanted), np.asarray(scores))


# Ties.


@pytest.mark.parametrize("segment_blocks", [None, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_go_to_the_lower_block(scale, segment_blocks):
    call = call_with_ties(scale)
    lists, scores = call.define()
    num_equal = (scores[..., None] == scores[..., None, :]).sum(-1)
    assert (num_equal[np.isfinite(scores)] > 1).mean() > 0.5
    np.testing.assert_array_equal(run(call, segment_blocks=segment_blocks), lists)


def test_ties_in_a_list_that_is_pruned():
    """250 blocks with the same score: more than a list holds."""
    call = make_call(9, 2, 1, kv_len=2000, block_size=8, kernel_size=8, kernel_stride=8, scale=0.0, top_k=40)
    np.testing.assert_array_equal(run(call), call.define()[0])


def test_a_unit_shared_by_two_blocks_ties_to_the_lower():
    call = call_with_a_unit_shared_by_two_blocks()
    for segment_blocks in (None, 2):
        np.testing.assert_array_equal(run(call, segment_blocks=segment_blocks)[0, 0, 0], [0, 1, 7])


# Bad numbers.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("use_coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("group_size", [2, 3])
def test_bad_numbers_in_units_that_a_query_does_not_see(group_size, use_coarse, value):
    """The other queries of a tile may see them; and no reduction over rows that pad a group may."""
    clean, found = (run(call) for call in calls_with_hidden_units(group_size, use_coarse, value))
    np.testing.assert_array_equal(found[:, :, :27], clean[:, :, :27])
    assert (found[:, :, 27:] != clean[:, :, 27:]).any()


@pytest.mark.parametrize("reduction", ["sum", "max", None])
@pytest.mark.parametrize("pooling", ["max", "overlap_sum"])
@pytest.mark.parametrize("use_coarse", [False, True], ids=["exact", "coarse"])
def test_blocks_with_nan_scores_are_chosen_only_if_forced(use_coarse, pooling, reduction):
    call = call_with_a_nan_in_a_unit(use_coarse, pooling, reduction)
    with np.errstate(invalid="ignore"):
        lists, scores = call.define()
    assert np.isnan(scores).any() and not np.isnan(scores[:, -1]).any()
    assert_nan_scores_are_chosen_only_if_forced(run(call), lists, scores, use_coarse)


def test_nan_in_a_query_leaves_the_other_lists():
    clean, bad = calls_with_a_nan_in_the_first_query()
    np.testing.assert_array_equal(run(bad)[:, :, 1:], run(clean)[:, :, 1:])


@pytest.mark.parametrize("where", ["query", "unit"])
def test_infinite_logits_are_as_in_xla(where):
    call = call_with_infinite_logits(where)
    expected = xla.select_from_units(call.query, call.compressed, call.coarse, call.positions, problem=call.problem)
    np.testing.assert_array_equal(run(call), expected)


# The order of blocks and threads, transformations, sizes.


@pytest.mark.parametrize("group_size", [4, 16])
def test_order_of_blocks_and_threads_changes_nothing(group_size, monkeypatch):
    call = make_call(40, group_size, 1, use_coarse=True, **SMALL)
    expected = run(call, segment_blocks=20)
    for seed in ("1", "2", "3"):
        monkeypatch.setenv(library.SEED, seed)
        np.testing.assert_array_equal(run(call, segment_blocks=20), expected)


@pytest.mark.parametrize("q_len, kv_len", [(0, 100), (5, 0), (0, 0)])
def test_empty_lengths(q_len, kv_len):
    call = make_call(q_len, kv_len=kv_len, use_coarse=True)
    found = run(call)
    assert found.shape == (1, 2, q_len, 5) and (found == -1).all()


@pytest.mark.parametrize("mapped", ["query", "units", "positions", "all"])
def test_vmap_folds_into_the_batch(mapped):
    call = make_call(20, batch=2, use_coarse=True, **SMALL)
    arrays = call.query, call.compressed, call.coarse, call.positions
    moving = dict(query=(0,), units=(1, 2), positions=(3,)).get(mapped, (0, 1, 2, 3))
    variants = [
        tuple(x * factor - 11 * (factor - 1) * (i == 3) if i in moving else x for i, x in enumerate(arrays))
        for factor in (1, 2)
    ]
    select = lambda *arrays: select_from_units(*arrays, problem=call.problem)
    stacked = [jnp.stack([v[i] for v in variants]) if i in moving else x for i, x in enumerate(arrays)]
    axes = [0 if i in moving else None for i in range(4)]
    found = jax.jit(jax.vmap(select, in_axes=axes))(*stacked)
    np.testing.assert_array_equal(found, np.stack([select(*v) for v in variants]))


AUTO = (jax.sharding.AxisType.Auto,) * 2
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


@pytest.mark.parametrize("reduction", ["sum", None])
def test_sharding_by_batch_and_heads_needs_no_collectives(reduction):
    call = make_call(12, batch=2, use_coarse=True, q_offset=(700, 9), group_reduction=reduction, **SMALL)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=AUTO)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    arrays = [place(x, "data", None, "model") for x in (call.query, call.compressed, call.coarse)]
    arrays.append(place(call.positions, "data"))
    select = jax.jit(lambda *arrays: select_from_units(*arrays, problem=call.problem))
    text = select.lower(*arrays).compile().as_text()
    assert library.SELECT_BLOCKS in text
    assert not [line for line in text.splitlines() if any(name in line for name in COLLECTIVES)]
    found = select(*arrays)
    assert found.sharding.shard_shape(found.shape) == (1, found.shape[1] // 2, 12, 5)
    np.testing.assert_array_equal(found, run(call))


@pytest.mark.parametrize("kernels_of_arch", ["sm90"], indirect=True)
def test_lists_for_which_only_one_token_has_room():
    """The SM90 kernel has two tokens at least, and leaves such calls to that of SM80."""
    assert_as_defined(make_call(2, 1, 1, kv_len=44_000, block_size=4, kernel_size=4, kernel_stride=4, top_k=10_000))


def test_sizes_that_do_not_fit():
    call = make_call(2, 1, 1, kv_len=120_000, block_size=4, kernel_size=4, kernel_stride=4, top_k=25_000)
    with pytest.raises(jax.errors.JaxRuntimeError, match="top_k 25000 and 30000 blocks of keys do not fit"):
        run(call)


# Random calls.


@st.composite
def random_calls(draw) -> tuple[Call, int | None]:
    group_size, num_kv_heads = draw(st.integers(1, 20)), draw(st.integers(1, 2))
    kernel_stride, num_sinks = draw(st.integers(1, 24)), draw(st.integers(0, 3))
    is_causal = draw(st.booleans())
    num_local = draw(st.integers(1 if is_causal else 0, 4))
    call = make_call(
        draw(st.integers(1, 70)),
        group_size * num_kv_heads,
        num_kv_heads,
        head_dim=draw(st.sampled_from([64, 64, 96, 128, 256])),
        batch=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        use_coarse=draw(st.booleans()),
        q_offset=draw(st.one_of(st.none(), st.integers(-20, 700))),
        seed=draw(st.integers(0, 10)),
        kv_len=draw(st.integers(0, 600)),
        block_size=draw(st.integers(1, 80)),
        kernel_size=draw(st.integers(1, 48)),
        kernel_stride=kernel_stride,
        coarse_kernel_size=draw(st.integers(1, 128)),
        coarse_kernel_stride=draw(st.integers(1, 64)),
        pooling=draw(st.sampled_from(["max", "overlap_sum"])),
        group_reduction=draw(st.sampled_from(["sum", "mean", "max", None])),
        top_k=max(1, num_sinks + num_local + draw(st.integers(0, 150))),
        num_sink_blocks=num_sinks,
        num_local_blocks=num_local,
        is_causal=is_causal,
        scale=draw(st.sampled_from([None, None, 0.02, -0.1])),
    )
    return call, draw(st.one_of(st.none(), st.integers(1, 80)))


@hypothesis.given(random_calls())
@hypothesis.settings(max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))
def test_random_calls_match_oracle(call_and_segment):
    call, segment_blocks = call_and_segment
    assert_as_defined(call, segment_blocks=segment_blocks)


# Through the library.


def test_selector_runs_the_kernel(monkeypatch):
    call = make_call(50, 4, 2, use_coarse=True, **SMALL)
    key = jnp.asarray(np.random.default_rng(1).standard_normal((1, 799, 2, 64)), "bfloat16")
    units = {name: SMALL[name] for name in SMALL if name != "kv_len"}
    selector = sa.selectors.InfLLMV2(top_k=5, num_local_blocks=2, **units)
    text = jax.jit(lambda query, key: selector(query, key, is_causal=True).indices).lower(call.query, key).as_text()
    assert library.SELECT_BLOCKS in text
    found = selector(call.query, key, is_causal=True).indices
    monkeypatch.setenv(library.HOST_SIM, "0")
    expected = selector(call.query, key, is_causal=True).indices
    assert (np.asarray(found) == np.asarray(expected)).mean() > 0.99


# What the handler refuses.

ARRAYS = {
    "query": ((2, 8, 4, 64), "bfloat16"),
    "compressed": ((2, 15, 2, 64), "bfloat16"),
    "coarse": ((2, 3, 2, 64), "bfloat16"),
    "positions": ((2, 8), "int32"),
    "indices": ((2, 2, 8, 5), "int32"),
    "num_taken": ((2, 2), "int32"),
}
ATTRIBUTES = dict(
    scale=np.float32(1), kv_len=np.int32(256), block_size=np.int32(64), kernel_size=np.int32(32), kernel_stride=np.int32(16),
    coarse_kernel_size=np.int32(128), coarse_kernel_stride=np.int32(64), top_k=np.int32(5), num_sink_blocks=np.int32(1),
    num_local_blocks=np.int32(2), pooling="max", group_reduction="sum", is_causal=True, segment_blocks=np.int32(0),
    seed=np.int64(0), arch=np.int32(80),
)  # fmt: skip


def call_handler(arrays: dict | None = None, **attributes) -> list[jax.Array]:
    library.load(jax.default_backend())
    *arguments, indices, num_taken = (ARRAYS | (arrays or {})).values()
    call = jax.ffi.ffi_call(library.SELECT_BLOCKS, [jax.ShapeDtypeStruct(*result) for result in (indices, num_taken)])
    return jax.block_until_ready(call(*(jnp.zeros(*argument) for argument in arguments), **(ATTRIBUTES | attributes)))


def test_sound_call_of_the_handler():
    # Positions are 0: all queries see block 0 alone.
    np.testing.assert_array_equal(call_handler()[0], np.broadcast_to([0, -1, -1, -1, -1], (2, 2, 8, 5)))


@pytest.mark.parametrize("arch", [80, 90])
def test_a_block_has_tiles_of_several_lists(arch):
    """Four lists of one tile, and three blocks in the simulator. Whoever has finished a tile takes a number."""
    indices, num_taken = call_handler(arch=np.int32(arch))
    assert num_taken[0, 0] == 4
    np.testing.assert_array_equal(indices, np.broadcast_to([0, -1, -1, -1, -1], (2, 2, 8, 5)))


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_wrong_shape_or_dtype(name):
    shape, dtype = ARRAYS[name]
    wrong = [(*shape[:i], shape[i] + 1, *shape[i + 1 :]) for i in range(len(shape))]
    wrong += [shape[1:], (*shape, 1), ()]
    if name not in ("coarse", "indices", "num_taken"):  # an option that is off; results that nobody computes
        wrong.append((0, *shape[1:]))
    for changed in [*((x, dtype) for x in wrong), (shape, "int16"), (shape, "float32")]:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call_handler({name: changed})
            pytest.fail(f"{name}: {changed}")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (dict(kv_len=-1), "kv_len must be 0 to 2\\^30"),
        (dict(kv_len=2**30 + 1), "kv_len must be 0 to 2\\^30"),
        (dict(kv_len=255), r"compressed has shape \[2, 15, 2, 64\]; needed is \[2, 14, 2, 64\]"),
        (dict(block_size=0), "block_size must be positive"),
        (dict(kernel_size=0), "kernel_size and kernel_stride must be positive"),
        (dict(kernel_stride=-1), "kernel_size and kernel_stride must be positive"),
        (dict(coarse_kernel_size=0), "coarse_kernel_size and coarse_kernel_stride must be positive"),
        (dict(coarse_kernel_stride=0), "coarse_kernel_size and coarse_kernel_stride must be positive"),
        (dict(coarse_kernel_stride=32), r"coarse has shape \[2, 3, 2, 64\]; needed is \[2, 5, 2, 64\]"),
        (dict(top_k=0), "top_k must be positive"),
        (dict(top_k=2), "top_k must be positive and at least num_sink_blocks"),
        (dict(num_sink_blocks=-1), "must not be negative"),
        (dict(num_local_blocks=-1), "must not be negative"),
        (dict(num_local_blocks=2**31 - 1), "top_k must be positive and at least num_sink_blocks"),
        (dict(segment_blocks=-1), "segment_blocks must not be negative"),
        (dict(pooling="mean"), "pooling must be 'max' or 'overlap_sum'"),
        (dict(group_reduction="min"), "group_reduction must be 'sum', 'mean', 'max' or 'none'"),
        (dict(group_reduction="none"), r"indices has shape \[2, 2, 8, 5\]; needed is \[2, 4, 8, 5\]"),
        (dict(arch=75), "no selection kernel of arch 75"),
    ],
    ids=str,
)
def test_attributes_out_of_range(attributes, message):
    typed = {name: value if isinstance(value, str) else np.int32(value) for name, value in attributes.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call_handler(**typed)


def test_head_dim_without_a_kernel():
    shapes = {name: ((*ARRAYS[name][0][:3], 32), "bfloat16") for name in ("query", "compressed", "coarse")}
    with pytest.raises(jax.errors.JaxRuntimeError, match="no selection kernel of arch 80 .* head_dim 32"):
        call_handler(shapes)
