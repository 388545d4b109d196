"""The Pallas kernels in JAX's interpreter of GPUs, which finds races, against the oracle; and their lowering for a GPU."""

import collections
import dataclasses
import functools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import kernel_cases
import mosaic_mutant
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from kernel_cases import (
    FEW_BLOCKS,
    FEW_ROWS_WITH_WINDOW,
    ONE_GROUP,
    assert_same,
    lower_for_hopper,
    make_plan,
    mesh_of_hoppers,
    small_case,
    split,
    with_bad_numbers,
    with_blocks_that_do_not_exist,
    with_hidden_keys,
    with_keys_hidden_by_bias,
)

import sparse_attn_jax as sa
from sparse_attn_jax import jax_compat, problem, splitting
from sparse_attn_jax.implementations import mosaic
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import case_named
from sparse_attn_jax.testing.inputs import Inputs

needs_mosaic = pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU, reason="needs JAX 0.11 or newer")
interpreted = pytest.mark.usefixtures("mosaic_on_cpu")


attend_with = functools.partial(kernel_cases.attend_with, "mosaic")


def results_of(inputs: Inputs, plan: sa.TilePlan | None = None) -> compare.Results:
    return compare.results_of(attend_with(inputs, plan), inputs)


# Those of the shared cases that have options, which are not in 16 bits there.
OPTIONS = (
    *("everything", "window_per_head", "window_left_none", "segments_q_kv", "hostile_ids", "duplicates", "odd_prefix_blocks"),
    *("q_offset_per_row", "selection_batch1_heads1", "more_queries_than_keys", "all_rows_empty", "group3", "sink_columns"),
)


@interpreted
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_matches_oracle(name):
    """Of one tile, unless there are more queries than keys; test_conformance.py has more."""
    case = case_named(name)
    inputs = small_case(name, q_len=case.q_len if case.q_len > case.kv_len else min(case.q_len, 40))
    compare.assert_results_match(results_of(inputs), inputs)


@interpreted
@pytest.mark.parametrize(("tile_size", "kv_block_size"), [(3, 16), (64, 32), (96, 128)])
def test_tiles_of_any_size(tile_size, kv_block_size):
    """Slices with rows that do not exist; two and three slices; more than one word of membership."""
    inputs = small_case("group2_bf16", kv_block_size=kv_block_size, q_len=10 if tile_size == 3 else 100, kv_len=130)
    compare.assert_results_match(results_of(inputs, make_plan(inputs, tile_size)), inputs)


@interpreted
@pytest.mark.parametrize(("head_dim", "kv_block_size"), [(64, 128), (128, 32), (256, 16), (256, 128)])
def test_sizes_with_all_tables(head_dim, kv_block_size):
    options = dict(has_key_bias=True, logits_soft_cap=2.0, num_segments=2, num_slots=2, local_window_size=(40, 3), num_sinks=2)
    inputs = small_case("odd_prefix_blocks", head_dim=head_dim, kv_block_size=kv_block_size, q_len=40, **options)
    compare.assert_results_match(results_of(inputs), inputs)


@interpreted
@pytest.mark.parametrize(("operand", "value"), [("key", np.nan), ("value", np.inf)])
def test_bad_numbers_in_keys_that_no_query_sees(operand, value):
    inputs = with_hidden_keys(small_case("odd_prefix", **ONE_GROUP))
    assert_same(results_of(with_bad_numbers(inputs, operand, value)), results_of(inputs))


@interpreted
@pytest.mark.parametrize("options", [FEW_BLOCKS, FEW_ROWS_WITH_WINDOW], ids=["few blocks", "beside the window"])
def test_bad_numbers_in_keys_that_other_rows_would_see(options):
    inputs = small_case("odd_prefix", **ONE_GROUP, **options)
    assert_same(results_of(with_bad_numbers(inputs, "value", np.nan)), results_of(inputs))


@interpreted
def test_bad_numbers_in_values_that_a_bias_hides():
    inputs = with_keys_hidden_by_bias(small_case("odd_prefix", **ONE_GROUP, has_key_bias=True, logits_soft_cap=2.0))
    assert_same(results_of(with_bad_numbers(inputs, "value", np.nan)), results_of(inputs))


@interpreted
@pytest.mark.parametrize("name", ["full_attention_odd_bf16", "group2_bf16"])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_bad_number_in_a_key_that_queries_see_reaches_them(operand, name):
    """And no other: not even where every key of the block is seen, and no mask is looked at."""
    inputs = small_case(name)
    seen = compare.mask_of(inputs)[0, :, :, 3].swapaxes(0, 1)  # [q_len, num_q_heads]
    operands = inputs.operands | {operand: inputs.operands[operand].at[0, 3].set(np.nan)}
    out, _ = attend_with(inputs)(**operands)
    assert seen.any()
    np.testing.assert_array_equal(np.isnan(out[0].astype(np.float32)).any(-1), seen)


@interpreted
@pytest.mark.parametrize("bad_id", [-(2**31), 6])
def test_plan_that_names_blocks_that_do_not_exist(bad_id):
    inputs = small_case("group2_bf16", **ONE_GROUP, q_len=24)
    plan = make_plan(inputs)
    assert plan.kv_len == 6 * plan.kv_block_size
    assert_same(results_of(inputs, with_blocks_that_do_not_exist(plan, bad_id)), results_of(inputs, plan))


@interpreted
def test_long_lists_are_walked_in_parts(monkeypatch):
    inputs = small_case("group2_bf16", **ONE_GROUP, q_len=40, has_key_bias=True)
    split(monkeypatch, entries=1)
    plan = make_plan(inputs, tile_size=8)
    num_parts = np.diff(splitting.split_lists(plan).first, axis=-1)
    assert num_parts.max() > 2
    compare.assert_results_match(results_of(inputs, plan), inputs)


@interpreted
@pytest.mark.parametrize("tile_size", [1, 8])
def test_inverse_that_lacks_the_tiles_of_a_block(tile_size):
    """Tiles that do not exist give the block's keys no gradient, and the others theirs."""
    inputs = small_case("group2_bf16", **ONE_GROUP, q_len=10, has_key_bias=True)
    plan = make_plan(inputs, tile_size)
    assert (plan.membership is None) == (tile_size == 1)
    tiles = np.array(plan.inverse_tiles)
    for head in np.ndindex(tiles.shape[:-1]):
        first, end = plan.inverse_offsets[head][:2]
        assert end > first
        tiles[head][first:end] = 2**31 - 1
    expected = results_of(inputs, plan)
    found = results_of(inputs, dataclasses.replace(plan, inverse_tiles=jnp.asarray(tiles)))
    first_keys = {name: np.s_[:, : plan.kv_block_size] for name in ("d_key", "d_value")}
    for name, part in (first_keys | dict(d_key_bias=np.s_[..., : plan.kv_block_size])).items():
        assert expected[name][part].any()
        expected[name] = expected[name].copy()
        expected[name][part] = 0
    assert_same(found, expected)


def runs_by_definition(is_full, ids, tiles, slots, parts) -> np.ndarray:
    """`prepare.full_runs` of one head. is_full, ids: [num_tiles, capacity]; tiles, slots: [entries]; parts: [num_parts, 4]."""
    exists = tiles < len(ids)
    at = np.minimum(tiles, len(ids) - 1), slots
    is_full, ids = is_full[at] & exists, ids[at]
    runs = []
    for block, start, stop, _ in parts:
        first = next((i for i in range(start, stop) if is_full[i]), stop)
        if first < stop and ids[first] != block:  # the inverse contradicts the lists
            first = stop
        end = next((i for i in range(first, stop) if not is_full[i] or ids[i] != block), stop)
        runs.append((first, end))
    return np.array(runs)


@needs_mosaic
@pytest.mark.parametrize("share", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("contradicts", [False, True])
def test_runs_of_full_entries_are_their_definition(share, contradicts):
    from sparse_attn_jax.implementations.mosaic import prepare

    rng = np.random.default_rng(7)
    batch, heads, num_tiles, capacity, num_blocks = 2, 2, 12, 5, 6
    ids = np.sort(np.argsort(rng.random((batch, 1, num_tiles, num_blocks)), axis=-1)[..., :capacity], axis=-1)
    is_full = rng.random((batch, heads, num_tiles, capacity)) < share
    tiles, slots, parts = [], [], []
    for row in ids[:, 0]:
        named = sorted((block, tile, slot) for tile, blocks in enumerate(row) for slot, block in enumerate(blocks))
        blocks = np.array([block for block, *_ in named])
        bounds = np.searchsorted(blocks, np.arange(num_blocks + 1))
        # The list of block 1 in two parts, and a part that no block has.
        middle = (bounds[1] + bounds[2]) // 2
        whole = [(block, bounds[block], bounds[block + 1], -1) for block in range(num_blocks) if block != 1]
        parts.append([*whole, (1, bounds[1], middle, 0), (1, middle, bounds[2], 1), (0, 0, 0, -2)])
        tiles.append([tile for _, tile, _ in named])
        slots.append([slot for *_, slot in named])
    tiles, slots, parts = (np.array(x, np.int32)[:, None] for x in (tiles, slots, parts))
    tiles[:, :, 3] = num_tiles  # an entry that does not exist
    if contradicts:
        tiles, slots = (x[..., rng.permutation(x.shape[-1])] for x in (tiles, slots))
    entries = np.minimum(tiles, num_tiles - 1) * capacity + slots
    inputs = {name: jnp.asarray(x, jnp.int32) for name, x in dict(tiles=tiles, entries=entries, parts=parts, ids=ids).items()}
    g = SimpleNamespace(batch=batch, num_kv_heads=heads, num_tiles=num_tiles)
    found = jax.jit(lambda is_full: prepare.full_runs(g, is_full, inputs))(jnp.asarray(is_full))
    for b in range(batch):
        for h in range(heads):
            expected = runs_by_definition(is_full[b, h], ids[b, 0], tiles[b, 0], slots[b, 0], parts[b, 0])
            np.testing.assert_array_equal(found[b, h], expected)
    assert share == 0 or contradicts or (np.diff(found, axis=-1) > 1).any()


@interpreted
def test_results_are_the_same_each_time():
    inputs = small_case("selection_per_q_head_blocks_bf16", q_len=70)
    run = compare.forward_and_backward(attend_with(inputs))
    first, second = (jax.device_get(run(inputs.operands, inputs.d_out, inputs.d_lse)) for _ in range(2))
    assert_same(first, second)


# --- composition ---


def scalar(inputs: Inputs):
    def loss(operands, selection):
        out, lse = attend_with(inputs, selection)(**operands)
        return (out.astype(jnp.float32) ** 2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    return jax.value_and_grad(loss)


def assert_trees_equal(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@interpreted
def test_vmap_folds_into_the_batch():
    inputs = small_case("group2_bf16", q_len=20, kv_len=40)
    run = scalar(inputs)
    operands = [{name: x * factor for name, x in inputs.operands.items()} for factor in (1, 2)]
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    expected = stack(*(jax.jit(run)(x, inputs.selection) for x in operands))
    actual = jax.jit(jax.vmap(run, in_axes=(0, None)))(stack(*operands), inputs.selection)
    assert_trees_equal(actual, expected)


# --- without an interpreter: what hardware asks for and the interpreter does not, what is refused, and lowering ---


def alignment_of(ref) -> int:
    """Of the first byte of a part of a buffer in shared memory, which itself starts at a multiple of 1,024."""
    indexers = [transform for transform in getattr(ref, "transforms", ()) if hasattr(transform, "indices")]
    shape = indexers[0].shape if indexers else ref.shape
    strides = [math.prod(shape[i + 1 :]) * ref.dtype.itemsize for i in range(len(shape))]
    alignment = 1024
    for indexer in indexers:
        for index, stride in zip(indexer.indices, strides, strict=True):
            start = getattr(index, "start", index)
            alignment = math.gcd(alignment, start * stride if isinstance(start, int) else stride)
        strides = [stride for index, stride in zip(indexer.indices, strides, strict=True) if hasattr(index, "start")]
    return alignment


@needs_mosaic
@pytest.mark.parametrize("kv_block_size", mosaic.KV_BLOCK_SIZES)
def test_copies_write_to_addresses_that_they_may_write_to(kv_block_size, monkeypatch):
    """PTX: cp.async.bulk.tensor writes to multiples of 128 bytes, cp.async.bulk to multiples of 16."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    copy, found = plgpu.copy_gmem_to_smem, set()

    def look(src, dst, ready, **options):
        kind = options.get("oob_mode", plgpu.OOBFillMode.ZEROS)
        is_bulk = kind == plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        found.add((is_bulk, alignment_of(dst)))
        return copy(src, dst, ready, **options)

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", look)
    lowered(small_case("everything", kv_block_size=kv_block_size))
    assert {is_bulk for is_bulk, _ in found} == {False, True}
    for is_bulk, alignment in found:
        assert alignment % (16 if is_bulk else 128) == 0, (is_bulk, alignment)
    assert kv_block_size > 16 or (True, 64) in found


def equations_of(jaxpr, loops: int = 0):
    """(equation, how many loops it is in) of a program and all that it calls."""
    for equation in jaxpr.eqns:
        yield equation, loops
        inner = loops + (equation.primitive.name in ("while", "scan"))
        for called in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))):
            if isinstance(called, (Jaxpr, ClosedJaxpr)):
                yield from equations_of(getattr(called, "jaxpr", called), inner)


def kernels_of(inputs: Inputs) -> dict:
    """The jaxpr of each kernel of a training step, and the mesh that it runs on, by name."""
    traced = kernel_cases.trace_for_hopper(scalar(inputs), inputs.operands, inputs.selection)
    found = {}
    for equation, _ in equations_of(traced.jaxpr.jaxpr):
        params = equation.params
        if equation.primitive.name == "mpmd_map":
            ((found[params["name"]]),) = zip(params["jaxprs"], params["meshes"], strict=True)
        elif equation.primitive.name == "core_map":  # JAX 0.11
            found[params["name"]] = params["jaxpr"], params["mesh"]
    assert len(found) > 2
    return found


@needs_mosaic
def test_grids_are_long_where_they_may_be():
    """CUDA's first dimension is the last here. Others have room for 65,535: tiles of 131,072 tokens of 64 heads are more."""
    inputs = small_case("everything", q_len=70)
    (batch, _, _, _), num_kv_heads = inputs.operands["query"].shape, inputs.operands["key"].shape[2]
    for name, (_, mesh) in kernels_of(inputs).items():
        assert mesh.grid[:-1] == (batch, num_kv_heads), name


@needs_mosaic
def test_warpgroups_do_not_share_the_memory_of_a_sum():
    """A sum over rows passes through memory that Pallas has once for a thread block: one warpgroup has it, after the loops."""
    kernels = kernels_of(small_case("everything", q_len=70))
    found = collections.Counter()
    for name, (jaxpr, mesh) in kernels.items():
        for equation, loops in equations_of(jaxpr):
            if equation.primitive.name.startswith("reduce_") and 0 in equation.params["axes"] and mesh.num_threads > 1:
                found[name, loops] += 1
    assert found == {("key_gradient", 0): 1}


@needs_mosaic
def test_soft_cap_is_not_the_approximate_instruction():
    """tanh.approx is right to 11 bits."""
    for jaxpr, _ in kernels_of(small_case("soft_cap_bf16")).values():
        assert not any(equation.primitive.name == "tanh" for equation, _ in equations_of(jaxpr))


def lowered(inputs: Inputs) -> str:
    return lower_for_hopper(scalar(inputs), inputs.operands, inputs.selection)


@needs_mosaic
@pytest.mark.parametrize("kv_block_size", mosaic.KV_BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_size_lowers_for_a_gpu(head_dim, kv_block_size):
    """The forward; the gradients of queries and of keys; the sums of parts, of keys and of values."""
    inputs = small_case("group16_bf16_d128", head_dim=head_dim, kv_block_size=kv_block_size)
    assert lowered(inputs).count("custom_call @mosaic_gpu") == 5


@needs_mosaic
@pytest.mark.parametrize("name", ["everything", "d64_fp16", "wide_value_bf16", "decode_bf16", "group32_bf16"])
def test_options_lower_for_a_gpu(name):
    assert "mosaic_gpu" in lowered(small_case(name))


@needs_mosaic
def test_attention_lowers_where_integers_have_64_bits():
    inputs = small_case("everything")
    with jax.enable_x64(True):
        assert "mosaic_gpu" in lowered(inputs)


@needs_mosaic
def test_checkpoint_and_scan_lower_for_a_gpu():
    """The interpreter has effects that `jax.checkpoint` does not take."""
    inputs = small_case("group2_bf16")

    def layers(query):
        step = jax.checkpoint(lambda x, _: (attend_with(inputs)(**inputs.operands | dict(query=x))[0], None))
        return (jax.lax.scan(step, query, None, length=2)[0].astype(jnp.float32) ** 2).sum()

    assert "mosaic_gpu" in lower_for_hopper(jax.value_and_grad(layers), inputs.operands["query"])


@needs_mosaic
def test_shard_map_lowers_for_gpus():
    inputs = small_case("group2_bf16", batch=2)
    mesh, row = mesh_of_hoppers(2), jax.sharding.PartitionSpec("data")
    loss = lambda *arguments: jax.tree.map(lambda x: x[None], scalar(inputs)(*arguments))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=row, out_specs=row)).trace(inputs.operands, inputs.selection)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3 and "all_gather" not in text and "all_reduce" not in text


@needs_mosaic
def test_training_step_is_exported_and_loaded():
    """Custom calls of Mosaic are stable: nothing has to be allowed by name."""
    inputs = small_case("group2_bf16")

    def step(operands):
        value, gradient = scalar(inputs)(operands, inputs.selection)
        return value, jax.tree.map(lambda x, dx: x - dx, operands, gradient)

    with jax.sharding.use_abstract_mesh(mesh_of_hoppers()):
        exported = jax.export.export(jax.jit(step), platforms=["cuda"])(inputs.operands)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.mlir_module().count("mosaic_gpu") == exported.mlir_module().count("mosaic_gpu") > 0
    assert [x.shape for x in loaded.out_avals[1:]] == [x.shape for x in jax.tree.leaves(inputs.operands)]


ABLE = problem.Problem(
    **dict(batch=1, q_len=64, kv_len=64, num_q_heads=4, num_kv_heads=2, head_dim=64, value_head_dim=64, scale=1.0),
    **dict(q_block_size=1, kv_block_size=64, num_slots=1, selection_heads=2, dtype="bfloat16"),
    **dict(platform="gpu", compute_capability="9.0"),
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(dtype="float32"), "dtype is float32; supported: bfloat16, float16"),
        (dict(kv_block_size=48), "kv_block_size is 48; supported: 16, 32, 64, 128"),
        (dict(head_dim=320, value_head_dim=64), "head_dim is 320; supported: at most 256"),
        (dict(predicate="Strided"), "predicate, Strided"),
        (dict(platform="tpu"), "platform is 'tpu'"),
        (dict(compute_capability="7.5"), "compute capability is 7.5; supported: 8.0, 9.0"),
        (dict(batch=2**16), "batch is 65536; supported: at most 65535"),
        (dict(q_len=0), "empty"),
        (dict(kv_len=2**23), "there are 1073741824 elements of keys or values; supported: at most 536870912"),
        (dict(q_len=2**20, num_slots=512), "there are 1073741824 slots of the selection; supported: at most 536870912"),
    ],
)
def test_reasons(changes, reason):
    if not jax_compat.HAS_MOSAIC_GPU:
        assert any("JAX" in reason for reason in mosaic.supports(ABLE))
        return
    assert mosaic.supports(ABLE) == ()
    (found,) = mosaic.supports(dataclasses.replace(ABLE, **changes))
    assert reason in found


@needs_mosaic
@pytest.mark.parametrize(("version", "is_able"), [(0, True), (12060, True), (12080, False), (12090, False), (13000, True)])
def test_reason_of_an_assembler(version, is_able, monkeypatch):
    monkeypatch.setattr(jax_compat, "cuda_version", lambda: version)
    assert any("miscompiles masks" in reason for reason in mosaic.supports(ABLE)) != is_able
    assert not any("miscompiles" in reason for reason in mosaic.supports(dataclasses.replace(ABLE, compute_capability="8.0")))


# --- mutations: each breaks the kernels in one place, and the oracle or the search for races has to notice ---

MUTATIONS = (
    ("attention_forward", 'plgpu.barrier_wait(memory["key_ready"].at[slot])', "None"),
    ("attention_forward", 'plgpu.barrier_wait(memory["value_ready"].at[slot])', "None"),
    ("attention_forward", 'plgpu.barrier_wait(own["query_ready"])', "None"),
    ("attention_forward", "acc *= steps.over_columns(rescale, g.value_columns)", "pass"),
    ("attention_forward", "row_sum * rescale + weights.sum(axis=1)", "row_sum + weights.sum(axis=1)"),
    ("attention_forward", "jnp.where(steps.visible(g, rows, columns, pieces, g.piece_keys), logits, -jnp.inf)", "logits"),
    ("ring", 'wait_for_room(memory["key_free"].at[slot], step, stages)', "None"),
    ("ring", 'wait_for_room(memory["value_free"].at[slot], step, stages)', "None"),
    ("steps", 'seen = position <= row["high"]', "seen = position >= 0"),
    ("steps", "& exists", "| exists"),
    ("attention_backward", 'ring.wait_for_room(memory["slice_free"].at[slot], index, config.stages)', "None"),
    ("attention_backward", 'plgpu.barrier_wait(memory["slice_ready"].at[slot])', "None"),
    ("attention_backward", 'plgpu.barrier_wait(memory["keys_ready"])', "None"),
    ("attention_backward", 'plgpu.barrier_wait(memory["sums_ready"])', "None"),
    ("attention_backward", "seen = steps.visible(g, rows, columns, [piece], config.keys)", "seen = True"),
    ("steps", "weights * (d_weights - delta)", "weights * d_weights"),
    ("attention_backward", "jnp.where(edge < first_full, edge, entry)", "entry"),
    ("prepare", "jnp.clip(look_up(next_of(~goes_on), first + 1), first, stop)", "stop"),
    ("block_scores", 'plgpu.barrier_wait(own["query_ready"])', "None"),
    ("block_scores", 'ring.wait_for_room(memory["free"].at[slot], i, config.stages)', "None"),
    ("block_scores", "logits = jnp.where((first <= position) & (position <= last), logits, -jnp.inf)", "pass"),
    ("block_scores", "row_sum * jnp.exp2(row_max - shift)", "row_sum"),
    ("block_scores", "jnp.where(is_seen, score, -jnp.inf)", "score"),
    ("ampere_forward", "acc *= steps.over_columns(rescale, g.value_columns)", "pass"),
    ("ampere_forward", "jnp.where(steps.visible(g, rows, columns, pieces, g.piece_keys), logits, -jnp.inf)", "logits"),
    ("ampere_ring", "ampere_steps.finish_copies(self.ready.at[slot])", "None"),
    ("ampere_ring", "self._start(index + self.stages - 1)", "self._start(index + self.stages - 2)"),
    ("ampere_ring", "g.padded_kv_len - g.piece_keys", "0"),
    ("ampere_ring", "piece.first_key + margin - i * g.piece_keys", "piece.first_key + margin"),
    ("ampere_steps", "plgpu.commit_smem()", "None"),
    ("ampere_backward", 'ampere_steps.finish_copies(memory.get("keys_ready"))', "None"),
    ("ampere_backward", "seen = steps.visible(g, rows, columns, [piece], keys) & exists", "seen = exists"),
    ("scoring_layout", "coarse_size - 2)", "coarse_size + 60)"),
    (
        "scoring_layout",
        "end = jnp.where(is_seen.any(-1), g.num_denominators",
        "end = jnp.where(is_seen.any(-1), -1 + g.num_denominators",
    ),
    ("kth_largest", "piece >= least", "piece > least"),
    ("kth_largest", "BITS - 1 - i", "BITS - 2 - i"),
)


@needs_mosaic
@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS, ids=lambda text: text[:50])
def test_mutations_are_noticed(name, old, new):
    assert run_mutant(name, old, new) == mosaic_mutant.NOTICED


@needs_mosaic
def test_what_is_not_mutated_passes():
    assert run_mutant() == 0


def run_mutant(*mutation: str) -> int:
    """Exit status of a run with the mutation; one that waits for ever is noticed too."""
    command = [sys.executable, mosaic_mutant.__file__, *mutation]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return mosaic_mutant.NOTICED
    assert done.returncode in (0, mosaic_mutant.NOTICED), done.stderr[-2000:]
    return done.returncode
