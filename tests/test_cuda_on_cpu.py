"""The CUDA kernels themselves, run on a CPU by the simulator, against the oracle on the cases of every implementation."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from kernel_cases import (
    FEW_BLOCKS,
    FEW_ROWS_WITH_WINDOW,
    as_kernels_take_it,
    assert_same,
    make_plan,
    small_case,
    split,
    with_bad_numbers,
    with_blocks_that_do_not_exist,
    with_hidden_keys,
    with_keys_hidden_by_bias,
)

import sparse_attn_jax as sa
from sparse_attn_jax.implementations import cuda
from sparse_attn_jax.implementations.cuda import attention_backward, attention_forward, library
from sparse_attn_jax.splitting import Parts
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import CASES, Case, case_named
from sparse_attn_jax.testing.inputs import Inputs, make_inputs

pytestmark = pytest.mark.kernels


# Tests of the kernels themselves: of both folders.
each_arch = pytest.mark.parametrize("arch", ["sm80", "sm90"])


@pytest.fixture
def arch() -> str:
    return "sm80"


@pytest.fixture(autouse=True)
def kernels_of_arch(cuda_on_cpu, arch, monkeypatch):
    monkeypatch.setenv(library.ARCH, arch)


TAKEN = [case for case in map(as_kernels_take_it, CASES) if case is not None]


attend_with = functools.partial(kernel_cases.attend_with, "cuda")


def results_of(inputs: Inputs, plan: sa.TilePlan | None = None) -> compare.Results:
    return compare.results_of(attend_with(inputs, plan), inputs)


@each_arch
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_attention_matches_oracle(case):
    inputs = make_inputs(case)
    compare.assert_results_match(results_of(inputs), inputs)


def test_most_cases_are_taken():
    assert len(TAKEN) > 0.9 * len(CASES)


@each_arch
@pytest.mark.parametrize("name", ["everything", "group16_bf16_d128"])
def test_order_of_blocks_and_threads_changes_nothing(name, monkeypatch):
    inputs = small_case(name)
    expected = results_of(inputs)
    for seed in ("1", "2"):
        monkeypatch.setenv(library.SEED, seed)
        assert_same(results_of(inputs), expected)


@each_arch
@pytest.mark.parametrize("bad_id, batch", [(-(2**31), 1), (-5, 1), (-1, 2), (6, 1), (2**28, 1), (2**31 - 1, 1)])
def test_plan_that_names_blocks_that_do_not_exist(bad_id, batch):
    """2**28 blocks of 16 keys are 2**32 keys, which is 0 in 32 bits. Before a sequence's tiles lie those of another."""
    inputs = small_case("group2_bf16", batch=batch)
    plan = make_plan(inputs)
    assert plan.kv_len == 6 * plan.kv_block_size
    assert_same(results_of(inputs, with_blocks_that_do_not_exist(plan, bad_id)), results_of(inputs, plan))


@each_arch
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_bad_numbers_in_keys_that_no_query_sees(operand, value):
    """Keys in blocks that are not listed, and later keys of a listed block."""
    inputs = with_hidden_keys(small_case("odd_prefix"))
    assert_same(results_of(with_bad_numbers(inputs, operand, value)), results_of(inputs))


@each_arch
@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("options", [FEW_BLOCKS, FEW_ROWS_WITH_WINDOW], ids=["few blocks", "beside the window"])
def test_bad_numbers_in_keys_that_other_rows_would_see(operand, options):
    inputs = small_case("odd_prefix", **options)
    assert_same(results_of(with_bad_numbers(inputs, operand, np.nan)), results_of(inputs))


@each_arch
@pytest.mark.parametrize("operand", ["key", "value"])
def test_bad_numbers_in_keys_that_a_bias_hides(operand):
    """With the gradient of the bias, and a soft cap, whose slope is not a number there."""
    inputs = with_keys_hidden_by_bias(small_case("odd_prefix", has_key_bias=True, logits_soft_cap=2.0))
    assert_same(results_of(with_bad_numbers(inputs, operand, np.nan)), results_of(inputs))


def test_handler_refuses_wrong_shapes(monkeypatch):
    def cut(problem, operands, plan, mask):
        arguments = arguments_of(problem, dataclasses.replace(operands, value=operands.value[:, :-1]), plan, mask)
        return *arguments[:1], operands.key, *arguments[2:]

    arguments_of = attention_forward.attention_arguments
    monkeypatch.setattr(attention_forward, "attention_arguments", cut)
    with pytest.raises(Exception, match=r"value has shape \[1, 95, 2, 64\]; needed is \[1, 96, 2, 64\]"):
        results_of(small_case("group2_bf16"))


# --- random calls ---

PER_HEAD = st.integers(0, 80)


@st.composite
def random_cases(draw) -> Case:
    """Any sizes and options, with lists that hold what no list should."""
    num_kv_heads, group_size = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
    num_q_heads = num_kv_heads * group_size
    sides = st.one_of(st.none(), PER_HEAD, st.tuples(*[PER_HEAD] * num_q_heads))
    batch = draw(st.integers(1, 2))
    return Case(
        name="random",
        special="",
        batch=batch,
        q_len=draw(st.integers(1, 70)),
        kv_len=draw(st.integers(1, 140)),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([64, 64, 64, 96, 128, 256])),
        dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        indices="hostile",
        num_slots=draw(st.integers(1, 9)),
        q_block_size=draw(st.sampled_from([1, 1, 5, 16, 32, 64, 128])),
        kv_block_size=draw(st.sampled_from([16, 32, 64, 128])),
        selection_heads=draw(st.sampled_from([1, num_kv_heads, num_q_heads])),
        selection_batch=draw(st.sampled_from([1, batch])),
        is_causal=draw(st.booleans()),
        q_offset=draw(st.one_of(st.none(), st.integers(-20, 150), st.tuples(*[st.integers(-20, 150)] * batch))),
        local_window_size=draw(st.one_of(st.none(), st.tuples(sides, sides))),
        num_sinks=draw(st.one_of(st.just(0), PER_HEAD)),
        num_segments=draw(st.sampled_from([0, 0, 3])),
        has_key_bias=draw(st.booleans()),
        has_lse_gradient=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 0.3])),
        logits_soft_cap=draw(st.sampled_from([None, None, 2.0])),
    )


@each_arch
@hypothesis.given(random_cases())
@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_random_calls_match_oracle(case):
    inputs = make_inputs(case)
    # With one key per query the gradients of query and key are 0: sums that cancel, of which nothing but rounding is left.
    hypothesis.assume(compare.mask_of(inputs).sum(-1).max() != 1)
    compare.assert_results_match(results_of(inputs), inputs, with_rounded_out=True)


# --- plans of any kind ---


@each_arch
@pytest.mark.parametrize("tile_size", [1, 7, 24, 60])
def test_tiles_of_any_size(tile_size):
    """More rows than a thread block computes on, 8 times the 64 at most, or few."""
    inputs = small_case("group8_bf16_d64")
    compare.assert_results_match(results_of(inputs, make_plan(inputs, tile_size)), inputs)


@pytest.mark.parametrize("arch", ["sm90"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tiles_are_those_that_the_sm90_kernels_take(head_dim):
    """64 rows are whole tokens, or the tile has no more. Other tiles the SM80 kernels compute."""
    largest = 0
    for group_size, q_block_size, q_len in itertools.product(range(1, 65), (1, 16, 48, 64, 100, 128), (1, 33, 128, 1000)):
        arrays = {
            name: jax.ShapeDtypeStruct((1, length, heads, head_dim), "bfloat16")
            for name, length, heads in (("query", q_len, group_size), ("key", 96, 1), ("value", 96, 1))
        }
        indices = jax.ShapeDtypeStruct((1, 1, -(-q_len // q_block_size), 3), "int32")
        selection = sa.BlockSelection(indices, q_block_size=q_block_size, kv_block_size=16)
        rows = cuda.tile_size(sa.explain(**arrays, selection=selection, implementation="cuda").problem) * group_size
        assert rows <= 64 or (rows == 128 and 64 % group_size == 0), (group_size, q_block_size, q_len)
        largest = max(largest, rows)
    assert largest == (128 if head_dim == 64 else 64)


def plan_of_64_rows(inputs: Inputs) -> sa.TilePlan:
    num_q_heads, num_kv_heads = (inputs.operands[name].shape[2] for name in ("query", "key"))
    return make_plan(inputs, max(1, 64 * num_kv_heads // num_q_heads))


@pytest.mark.parametrize("arch", ["sm90"])
@pytest.mark.parametrize("case", TAKEN[::2], ids=lambda case: case.name)
def test_tiles_of_64_rows(case):
    """SM90 kernels compute on 128 where there are as many, in other ways."""
    inputs = make_inputs(case)
    compare.assert_results_match(results_of(inputs, plan_of_64_rows(inputs)), inputs)


def with_lists_of_halves(head_dim: int, kv_block_size: int) -> Inputs:
    """The tokens of each half of a tile chose the same blocks, of which those of the other half chose only the last one."""
    num_blocks = 24 * 64 // kv_block_size
    sizes = dict(head_dim=head_dim, kv_block_size=kv_block_size, q_len=44, kv_len=num_blocks * kv_block_size - 5)
    inputs = make_inputs(dataclasses.replace(as_kernels_take_it(case_named("group8_bf16_d64")), is_causal=False, **sizes))
    half = (np.arange(44) // 8 % 2)[:, None]
    lists = np.arange(num_blocks // 2) + half * (num_blocks // 2)
    # Of the last block not all keys exist.
    lists = np.concatenate([lists, np.where(half == 0, num_blocks - 1, -1)], axis=-1)
    indices = jnp.asarray(np.broadcast_to(lists, (*inputs.selection.indices.shape[:2], *lists.shape)), jnp.int32)
    return dataclasses.replace(inputs, selection=dataclasses.replace(inputs.selection, indices=indices))


@each_arch
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_block_size", [16, 64])
def test_halves_of_a_tile_with_lists_of_their_own(head_dim, kv_block_size):
    """More blocks in a row than the kernels hold at a time."""
    inputs = with_lists_of_halves(head_dim, kv_block_size)
    compare.assert_results_match(results_of(inputs), inputs)


def with_hidden_keys_in_lists_of_halves(kv_block_size: int) -> Inputs:
    """Every seventh key is of another segment. So each half of a tile, for itself, has keys that none of its rows sees."""
    inputs = with_lists_of_halves(64, kv_block_size)
    batch, q_len, kv_len = (*inputs.operands["query"].shape[:2], inputs.operands["key"].shape[1])
    segments = jnp.asarray(np.broadcast_to(np.arange(kv_len) % 7 == 3, (batch, kv_len)), jnp.int32)
    segments = dict(query_segment_ids=jnp.zeros((batch, q_len), jnp.int32), key_value_segment_ids=segments)
    return dataclasses.replace(inputs, options=inputs.options | segments)


@each_arch
@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("kv_block_size", [16, 64])
def test_bad_numbers_in_lists_of_halves(kv_block_size, operand):
    inputs = with_hidden_keys_in_lists_of_halves(kv_block_size)
    assert_same(results_of(with_bad_numbers(inputs, operand, np.nan)), results_of(inputs))


@each_arch
@pytest.mark.parametrize(("num_q_heads", "selection_heads"), [(64, 64), (128, 1), (128, 128), (96, 1)])
def test_more_heads_of_a_token_than_rows(num_q_heads, selection_heads):
    """All heads of one KV head; with a list for each, more than the bits of a word."""
    sizes = dict(num_q_heads=num_q_heads, num_kv_heads=1, selection_heads=selection_heads, q_len=10, kv_len=100)
    inputs = make_inputs(dataclasses.replace(as_kernels_take_it(case_named("group8_bf16_d64")), **sizes))
    compare.assert_results_match(results_of(inputs), inputs)


def with_blocks_beyond_the_window(head_dim: int) -> Inputs:
    """Most queries that chose a block see nothing of it."""
    case = dataclasses.replace(case_named("full_attention"), q_len=220, kv_len=220, num_q_heads=8, num_kv_heads=2)
    case = dataclasses.replace(case, head_dim=head_dim, is_causal=True, local_window_size=(20, 0))
    return make_inputs(as_kernels_take_it(case))


@each_arch
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lists_of_blocks_beyond_the_window(head_dim):
    """More in a row than the kernels hold at a time."""
    inputs = with_blocks_beyond_the_window(head_dim)
    compare.assert_results_match(results_of(inputs), inputs)


def change_parts(monkeypatch, change: Callable[[Parts], Parts]) -> None:
    """Parts are what `change` makes of them."""
    split_lists = attention_backward.split_lists
    monkeypatch.setattr(attention_backward, "split_lists", lambda plan: change(split_lists(plan)))


def num_partials_of(parts: Parts) -> int:
    """The room that sums of several parts need."""
    num_parts = np.diff(parts.first, axis=-1)
    return int(np.where(num_parts > 1, num_parts, 0).sum(-1).max())


@each_arch
@pytest.mark.parametrize(("name", "entries"), [("everything", 30), ("group2_bf16", 9)])
def test_long_lists_are_walked_in_parts(name, entries, monkeypatch):
    inputs = small_case(name)
    whole = results_of(inputs)
    split(monkeypatch, entries)
    plan = make_plan(inputs, tile_size=1)
    parts = attention_backward.split_lists(plan)
    num_parts = np.diff(parts.first, axis=-1)
    assert num_parts.max() > 2 and (num_parts.min() == 1 or name == "everything")
    num_partials = num_partials_of(parts)
    assert 0 < num_partials <= parts.max_partials
    compare.assert_results_match(results_of(inputs, plan), inputs)
    np.testing.assert_allclose(results_of(inputs, plan)["d_key"], whole["d_key"], atol=0.05, rtol=0.05)
    # With room for so many sums and no more.
    change_parts(monkeypatch, lambda parts: dataclasses.replace(parts, max_partials=num_partials))
    compare.assert_results_match(results_of(inputs, plan), inputs)


CONTRADICTIONS = {
    "parts of no block": lambda parts: dataclasses.replace(parts, first=parts.first + 5),
    "blocks without parts": lambda parts: dataclasses.replace(parts, first=0 * parts.first),
    "blocks with fewer parts than none": lambda parts: dataclasses.replace(parts, first=parts.first[..., ::-1]),
    "sums before the first": lambda parts: dataclasses.replace(parts, first_partial=0 * parts.first_partial - 1),
    "sums after the last": lambda parts: dataclasses.replace(
        parts, first_partial=parts.max_partials + 1 - jnp.diff(parts.first, axis=-1)
    ),
}


@each_arch
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_parts_that_contradict_each_other(name, monkeypatch):
    """Gradients of keys are not defined, but the simulator would say if a kernel touched what is not an array."""
    inputs = small_case("group2_bf16")
    plan = make_plan(inputs, tile_size=1)
    expected = results_of(inputs, plan)
    split(monkeypatch, 9)
    change_parts(monkeypatch, CONTRADICTIONS[name])
    found = results_of(inputs, plan)
    by_query = ("out", "lse", "d_query")
    assert_same({x: found[x] for x in by_query}, {x: expected[x] for x in by_query})


# --- transformations ---


def scalar(inputs: Inputs):
    def loss(operands, selection):
        out, lse = attend_with(inputs, selection)(**operands)
        return (out.astype(jnp.float32) ** 2).sum() + jnp.where(jnp.isneginf(lse), 0, jnp.sin(lse)).sum()

    return jax.value_and_grad(loss)


def assert_trees_equal(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@each_arch
@pytest.mark.parametrize("mapped", ["operands", "selection", "both", "query", "key_value"])
def test_vmap_folds_into_the_batch(mapped):
    inputs = small_case("group2_bf16")
    run = scalar(inputs)
    operands = [{name: x * factor for name, x in inputs.operands.items()} for factor in (1, 2)]
    reverse = lambda s: dataclasses.replace(s, indices=s.indices[..., ::-1, :])
    selections = [inputs.selection, reverse(inputs.selection)]
    if mapped in ("selection",):
        operands[1] = operands[0]
    if mapped in ("operands", "query", "key_value"):
        selections[1] = selections[0]
    moving = dict(query={"query"}, key_value={"key", "value"}, selection=set()).get(mapped, set(operands[0]))
    operands[1] = {name: operands[1 if name in moving else 0][name] for name in operands[0]}
    expected = stack([run(x, selection) for x, selection in zip(operands, selections, strict=True)])
    axes = {name: 0 if name in moving else None for name in operands[0]}
    stacked = {name: jnp.stack([x[name] for x in operands]) if name in moving else operands[0][name] for name in axes}
    selection_axis = 0 if mapped in ("selection", "both") else None
    selection = selections[0] if selection_axis is None else stack(selections)
    actual = jax.jit(jax.vmap(run, in_axes=(axes, selection_axis)))(stacked, selection)
    assert_trees_equal(actual, expected)


def test_vmap_of_vmap():
    inputs = small_case("group2_bf16")
    call = lambda query, key: attend_with(inputs)(**inputs.operands | dict(query=query, key=key))
    queries, keys = (jnp.stack([x, 2 * x, -x]) for x in (inputs.operands["query"], inputs.operands["key"]))
    mapped = jax.vmap(jax.vmap(call, in_axes=(None, 0)), in_axes=(0, None))(queries, keys)
    for i in range(3):
        for j in range(3):
            assert_trees_equal(jax.tree.map(lambda x: x[i, j], mapped), call(queries[i], keys[j]))  # noqa: B023


def test_vmap_of_shared_keys_copies_no_keys():
    inputs = small_case("group2_bf16")
    call = lambda query: attend_with(inputs)(**inputs.operands | dict(query=query))
    text = jax.jit(jax.vmap(call)).lower(jnp.stack([inputs.operands["query"]] * 3)).as_text()
    line = next(line for line in text.splitlines() if library.ATTENTION_FORWARD in line)
    batch, kv_len, heads, dim = inputs.operands["key"].shape
    assert line.count(f"tensor<{batch}x{kv_len}x{heads}x{dim}xbf16>") == 2


def test_checkpoint_and_scan():
    inputs = small_case("group2_bf16")

    def layers(query):
        step = jax.checkpoint(lambda x, _: (attend_with(inputs)(**inputs.operands | dict(query=x))[0], None))
        return (jax.lax.scan(step, query, None, length=2)[0].astype(jnp.float32) ** 2).sum()

    value, gradient = jax.jit(jax.value_and_grad(layers))(inputs.operands["query"])
    assert np.isfinite(value) and np.isfinite(gradient.astype(jnp.float32)).all() and jnp.any(gradient != 0)


AUTO = (jax.sharding.AxisType.Auto,) * 2
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


@pytest.mark.parametrize("shared_selection", [False, True])
@pytest.mark.parametrize("shape", [(4, 2), (2, 1), (1, 2), (8, 1)])
def test_sharding_by_batch_and_heads_needs_no_collectives(shape, shared_selection):
    case = as_kernels_take_it(case_named("group2_bf16"))
    case = dataclasses.replace(case, batch=8, q_len=32, kv_len=48, selection_batch=1 if shared_selection else None)
    inputs = make_inputs(case)
    run = jax.jit(scalar(inputs))
    mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]], axis_types=AUTO)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    operands = {name: place(x, "data", None, "model") for name, x in inputs.operands.items()}
    indices = place(inputs.selection.indices, None if shared_selection else "data")
    selection = dataclasses.replace(inputs.selection, indices=indices)
    forward = jax.jit(lambda operands, selection: attend_with(inputs, selection)(**operands))
    text = forward.lower(operands, selection).compile().as_text()
    assert library.ATTENTION_FORWARD in text
    assert not [line for line in text.splitlines() if any(name in line for name in COLLECTIVES)]
    out, lse = forward(operands, selection)
    assert out.sharding.shard_shape(out.shape) == (8 // shape[0], 32, 4 // shape[1], 64)
    assert_trees_equal((out, lse), attend_with(inputs)(**inputs.operands))
    gradients = jax.jit(lambda operands, selection: scalar(inputs)(operands, selection)[1])
    text = gradients.lower(operands, selection).compile().as_text()
    assert library.ATTENTION_BACKWARD in text
    assert not [line for line in text.splitlines() if any(name in line for name in COLLECTIVES)]
    assert_trees_equal(gradients(operands, selection), run(inputs.operands, inputs.selection)[1])


def test_shard_map():
    case = dataclasses.replace(as_kernels_take_it(case_named("group2_bf16")), batch=2)
    inputs = make_inputs(case)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=AUTO)
    spec = PartitionSpec("data", None, "model")
    heads = "model" if inputs.selection.indices.shape[1] > 1 else None
    selection_spec = PartitionSpec("data" if inputs.selection.indices.shape[0] > 1 else None, heads)
    in_specs = ({name: spec for name in inputs.operands}, jax.tree.map(lambda _: selection_spec, inputs.selection))
    call = lambda operands, selection: attend_with(inputs, selection)(**operands)
    local = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=(spec, spec))
    loss = lambda operands: (local(operands, inputs.selection)[0].astype(jnp.float32) ** 2).sum()
    assert_trees_equal(jax.jit(local)(inputs.operands, inputs.selection), call(inputs.operands, inputs.selection))
    plain = lambda operands: (call(operands, inputs.selection)[0].astype(jnp.float32) ** 2).sum()
    assert_trees_equal(jax.jit(jax.grad(loss))(inputs.operands), jax.jit(jax.grad(plain))(inputs.operands))


def test_export_round_trip():
    inputs = small_case("group2_bf16")
    step = jax.jit(lambda operands: scalar(inputs)(operands, inputs.selection))
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in sa.CUSTOM_CALL_TARGETS]
    saved = jax.export.export(step, disabled_checks=checks)(inputs.operands).serialize()
    assert_trees_equal(jax.export.deserialize(saved).call(inputs.operands), step(inputs.operands))


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(dtype="float32"), "dtype is float32; supported: bfloat16, float16"),
        (dict(head_dim=32), "head_dim is 32; supported: 64, 96, 128, 256"),
        (dict(kv_block_size=24), "kv_block_size is 24; supported: 16, 32, 64, 128"),
        (dict(value_head_dim=48), "value_head_dim is 48; supported: head_dim, which is 64"),
        (dict(predicate_stride=2), "the selection has a predicate, DilatedPredicate; supported: none"),
    ],
)
def test_reasons(changes, reason):
    inputs = make_inputs(dataclasses.replace(as_kernels_take_it(case_named("group2_bf16")), **changes))
    with pytest.raises(NotImplementedError) as error:
        attend_with(inputs)(**inputs.operands)
    assert reason in str(error.value)


def test_reason_of_a_missing_simulator(monkeypatch, tmp_path):
    inputs = small_case("group2_bf16")
    monkeypatch.setenv(library.HOST_SIM, str(tmp_path / "nothing.so"))
    with pytest.raises(NotImplementedError, match="no kernels: there is no simulator library '.*nothing.so'"):
        attend_with(inputs)(**inputs.operands)


def test_library_that_jaxlib_refuses(monkeypatch):
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: (_ for _ in ()).throw(ValueError("API 9.9")))
    with pytest.raises(RuntimeError, match=r"does not take the CUDA kernels.*API 9\.9.*pip install"):
        library._register(dict.fromkeys(library.CUSTOM_CALL_TARGETS), "CUDA")


def test_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "broken_kernels.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "MODULE", "broken_kernels")
    library._load_module.cache_clear()
    with pytest.raises(ImportError, match="do not load: undefined symbol: x.*pip install"):
        library.load("gpu")


def test_what_would_run_on_a_gpu_is_not_loaded_for_a_cpu(monkeypatch, tmp_path):
    (tmp_path / "kernels_without_a_driver.py").write_text("raise ImportError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "MODULE", "kernels_without_a_driver")
    monkeypatch.setenv(library.HOST_SIM, "0")
    inputs = small_case("group2_bf16")
    with pytest.raises(NotImplementedError, match="platform is 'cpu'"):
        attend_with(inputs)(**inputs.operands)


def test_reason_of_an_old_driver(monkeypatch, tmp_path):
    (tmp_path / "newer_kernels.py").write_text("import os\ncuda_versions = lambda: (13020, int(os.environ['DRIVER']))")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "MODULE", "newer_kernels")
    reasons = {}
    for driver in (0, 12080, 13000, 13040):
        monkeypatch.setenv("DRIVER", str(driver))
        reasons[driver] = library.reason_of_driver()
    assert "compiled by CUDA 13.2, and the driver of this machine runs programs of CUDA 12.8 and older" in reasons.pop(12080)
    assert set(reasons.values()) == {None}


def test_calls_without_results_launch_nothing():
    """XLA takes no command buffer of a custom call that launches nothing."""
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 0, 4), (2, 3))]
    text = jax.jit(lambda: library.custom_call(library.PAGED_ATTENTION)((), shapes, {})).lower().as_text()
    assert "custom_call" not in text and "tensor<2x3xf32>" in text


def test_kernels_of_a_folder_by_name(monkeypatch):
    inputs = small_case("group2_bf16")
    monkeypatch.setenv(library.ARCH, "sm80")
    compare.assert_results_match(results_of(inputs), inputs)
    monkeypatch.setenv(library.ARCH, "sm75")
    with pytest.raises(NotImplementedError, match="SPARSE_ATTN_CUDA_ARCH is 'sm75'"):
        attend_with(inputs)(**inputs.operands)
