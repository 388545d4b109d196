"""The Pallas kernels for Ampere in JAX's interpreter of GPUs, against the oracle; and their lowering for an A100."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from kernel_cases import (
    ONE_GROUP,
    assert_same,
    make_plan,
    mesh_of,
    small_case,
    split,
    with_bad_numbers,
    with_blocks_that_do_not_exist,
    with_hidden_keys,
)

import sparse_attn_jax as sa
from sparse_attn_jax import dispatch, jax_compat, problem, splitting
from sparse_attn_jax.implementations import mosaic
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import case_named
from sparse_attn_jax.testing.inputs import Inputs

needs_ampere = pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU_FOR_AMPERE, reason="needs JAX 0.11.2 or newer")

attend_with = functools.partial(kernel_cases.attend_with, "mosaic")


@pytest.fixture
def kernels(mosaic_on_cpu, monkeypatch):
    if jax.default_backend() == "gpu":
        if jax.devices()[0].compute_capability != mosaic.AMPERE:
            pytest.skip("this GPU has other kernels")
        return
    monkeypatch.setattr(mosaic, "kernels_of", lambda problem: (mosaic.ampere_forward, mosaic.ampere_backward))


def results_of(inputs: Inputs, plan: sa.TilePlan | None = None) -> compare.Results:
    return compare.results_of(attend_with(inputs, plan), inputs)


@pytest.mark.parametrize("name", ["everything", "window_per_head", "hostile_ids", "all_rows_empty", "group3"])
def test_attention_matches_oracle(name, kernels):
    inputs = small_case(name, q_len=min(case_named(name).q_len, 40))
    compare.assert_results_match(results_of(inputs), inputs)


@pytest.mark.parametrize(("head_dim", "kv_block_size"), [(64, 64), (128, 16), (128, 128)])
def test_sizes_with_all_tables(head_dim, kv_block_size, kernels):
    options = dict(has_key_bias=True, logits_soft_cap=2.0, num_segments=2, num_slots=2, local_window_size=(40, 3), num_sinks=2)
    inputs = small_case("odd_prefix_blocks", head_dim=head_dim, kv_block_size=kv_block_size, q_len=40, **options)
    compare.assert_results_match(results_of(inputs), inputs)


@pytest.mark.parametrize(("tile_size", "kv_block_size"), [(3, 16), (64, 32), (96, 128)])
def test_tiles_of_any_size(tile_size, kv_block_size, kernels):
    inputs = small_case("group2_bf16", kv_block_size=kv_block_size, q_len=10 if tile_size == 3 else 100, kv_len=130)
    compare.assert_results_match(results_of(inputs, make_plan(inputs, tile_size)), inputs)


@pytest.mark.parametrize(("operand", "value"), [("key", np.nan), ("value", np.inf)])
def test_bad_numbers_in_keys_that_no_query_sees(operand, value, kernels):
    inputs = with_hidden_keys(small_case("odd_prefix", **ONE_GROUP, q_len=40))
    assert_same(results_of(with_bad_numbers(inputs, operand, value)), results_of(inputs))


@pytest.mark.parametrize("bad_id", [-(2**31), 6])
def test_plan_that_names_blocks_that_do_not_exist(bad_id, kernels):
    inputs = small_case("group2_bf16", **ONE_GROUP, q_len=24)
    plan = make_plan(inputs)
    assert plan.kv_len == 6 * plan.kv_block_size
    assert_same(results_of(inputs, with_blocks_that_do_not_exist(plan, bad_id)), results_of(inputs, plan))


def test_long_lists_are_walked_in_parts(monkeypatch, kernels):
    inputs = small_case("group2_bf16", **ONE_GROUP, q_len=40, has_key_bias=True)
    split(monkeypatch, entries=1)
    plan = make_plan(inputs, tile_size=8)
    assert np.diff(splitting.split_lists(plan).first, axis=-1).max() > 2
    compare.assert_results_match(results_of(inputs, plan), inputs)


# --- what the interpreter does not run ---


def elements_of_threads(layout, shape: tuple[int, int]) -> np.ndarray:
    """[warp, lane, register]: which elements of a matrix each thread holds, in the order of its registers."""
    elements = np.arange(shape[0] * shape[1]).reshape(shape)
    for tile in layout.tiling.tiles:
        rank = len(tile)
        kept, tiled = elements.shape[:-rank], elements.shape[-rank:]
        split = [n for size, part in zip(tiled, tile, strict=True) for n in (size // part, part)]
        axes = [len(kept) + i for i in (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))]
        elements = elements.reshape(*kept, *split).transpose(*range(len(kept)), *axes)
    warps, lanes = ([d for d in dims if isinstance(d, int)] for dims in (layout.warp_dims, layout.lane_dims))
    elements = np.moveaxis(elements, [*warps, *lanes], range(len(warps) + len(lanes)))
    return elements.reshape(4, 32, -1)


@needs_ampere
def test_weights_are_an_operand_where_they_are():
    """`ampere_steps.to_operand` moves nothing between threads or registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from sparse_attn_jax.implementations.mosaic import ampere_steps, steps

    shape = (64, ampere_steps.PART_COLUMNS)
    held = elements_of_threads(steps.MATRIX.to_mgpu(), shape)
    wanted = elements_of_threads(plgpu.Layout.MMA_LHS(jnp.bfloat16).to_mgpu(), shape)
    np.testing.assert_array_equal(held, wanted)
    assert plgpu.Layout.MMA_ACC(jnp.bfloat16).to_mgpu() == steps.MATRIX.to_mgpu()


@pytest.fixture
def lowers_for_ampere(monkeypatch):
    """JAX lowers as where the default device is an A100."""
    from jax.experimental.mosaic.gpu import utils

    monkeypatch.setattr(utils, "_infer_arch", lambda: (8, 0))
    monkeypatch.setattr(jax_compat, "lowering_compute_capability", lambda: "8.0")


@needs_ampere
@pytest.mark.parametrize(("head_dim", "kv_block_size"), [(64, 16), (64, 128), (96, 64), (128, 16), (128, 32), (128, 128)])
def test_sizes_lower(head_dim, kv_block_size, lowers_for_ampere):
    """The forward, and the gradients of queries and of keys; the sums of parts, where lists are long."""
    inputs = small_case("everything", head_dim=head_dim, kv_block_size=kv_block_size, dtype="float16")

    def loss(operands):
        out, lse = attend_with(inputs)(**operands)
        return out.astype(jnp.float32).sum() + lse.sum()

    with jax.sharding.use_abstract_mesh(mesh_of("NVIDIA A100-SXM4-80GB", num_cores=108)):
        text = jax.jit(jax.grad(loss)).trace(inputs.operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") >= 3


ABLE = problem.Problem(
    **dict(batch=1, q_len=64, kv_len=64, num_q_heads=4, num_kv_heads=2, head_dim=128, value_head_dim=128, scale=1.0),
    **dict(q_block_size=1, kv_block_size=64, num_slots=1, selection_heads=2, dtype="bfloat16"),
    **dict(platform="gpu", compute_capability="8.0"),
)


@needs_ampere
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(head_dim=192), "head_dim is 192; supported: at most 128"),
        (dict(value_head_dim=192), "value_head_dim is 192; supported: at most 128"),
        (dict(q_len=2**21), "there are 1073741824 elements of queries; supported: at most 536870912"),
        (dict(compute_capability="8.6"), "compute capability is 8.6; supported: 8.0, 9.0"),
    ],
)
def test_reasons(changes, reason, monkeypatch):
    monkeypatch.setattr(jax_compat, "lowering_compute_capability", lambda: "8.0")
    assert mosaic.supports(ABLE) == ()
    assert mosaic.supports(dataclasses.replace(ABLE, **changes)) == (reason,)


@needs_ampere
def test_reason_where_jax_would_lower_for_another_device(monkeypatch):
    """As it does for a device that is not here."""
    monkeypatch.setattr(jax_compat, "lowering_compute_capability", lambda: "9.0")
    (reason,) = mosaic.supports(ABLE)
    assert "JAX lowers kernels for its default device" in reason


def test_reason_of_an_old_jax(monkeypatch):
    monkeypatch.setattr(jax_compat, "lowering_compute_capability", lambda: "8.0")
    monkeypatch.setattr(jax_compat, "HAS_MOSAIC_GPU_FOR_AMPERE", False)
    assert any("0.11.2 and newer" in reason for reason in mosaic.supports(ABLE))


KIB = 1024


@needs_ampere
@pytest.mark.parametrize("kv_block_size", [16, 128])
@pytest.mark.parametrize(("head_dim", "expected"), [(64, (4, 4, 3)), (96, (2, 4, 4)), (128, (2, 4, 4))])
def test_stages_leave_room_for_another_thread_block(head_dim, expected, kv_block_size):
    """An A100 has 164 KiB of shared memory for the thread blocks of a multiprocessor, each of which takes one more."""
    from sparse_attn_jax.implementations.mosaic import ampere_backward, ampere_forward

    g = geometry_of(head_dim, kv_block_size)
    columns = 128 if head_dim > 64 else 64
    matrix = lambda rows: rows * columns * 2
    keys = min(kv_block_size, 64 if head_dim == 64 else 32)
    stage, slices = 2 * matrix(64), 2 * matrix(64)
    chosen = {
        ampere_forward.choose_config(g): lambda stages: matrix(64) + stages * stage,
        ampere_backward.choose_query_config(g): lambda stages: 2 * matrix(64) + stages * stage,
        # Its reductions take 2 KiB more.
        ampere_backward.choose_key_config(g): lambda stages: 2 * matrix(keys) + stages * slices + 64 * keys * 2 + 2 * KIB,
    }
    if kv_block_size == 128:
        assert tuple(config.stages for config in chosen) == expected
    for config, bytes_of in chosen.items():
        blocks = {stages: min(2, 164 * KIB // (bytes_of(stages) + KIB)) for stages in range(2, 6)}
        assert blocks[config.stages] == blocks[2] > 0
        assert config.stages == 4 or blocks[config.stages + 1] < blocks[2]


@needs_ampere
def test_config_that_cannot_fit_says_what_it_needs():
    from sparse_attn_jax.implementations.mosaic import ampere_forward

    message = r"ForwardConfig\(stages=2.*\) needs 245760 bytes of shared memory; a thread block may have 166912"
    with pytest.raises(ValueError, match=message):
        ampere_forward.choose_config(geometry_of(384, 64))


def geometry_of(head_dim: int, kv_block_size: int):
    from benchmarks import mosaic_schedules
    from benchmarks.workloads import sized_case

    heads = dict(num_q_heads=4, num_kv_heads=2, head_dim=head_dim)
    lists = dict(q_block_size=1, kv_block_size=kv_block_size, num_slots=2)
    sizes = dict(seed=0, batch=1, q_len=256, kv_len=None, is_causal=True, dtype="bfloat16")
    return mosaic_schedules.geometry_of(sized_case(**sizes, **heads, **lists), 8)


def test_cuda_comes_first():
    assert dispatch.requested_names(None, ABLE) == ("cuda", "mosaic", "xla")
    assert dispatch.requested_names(None, dataclasses.replace(ABLE, compute_capability="9.0")) == ("mosaic", "cuda", "xla")
