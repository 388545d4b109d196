"""Every implementation against the oracle on every case; the check itself against mutations; properties of the op."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax import jax_compat
from sparse_attn_jax.implementations.xla import config
from sparse_attn_jax.testing import compare, oracle
from sparse_attn_jax.testing.cases import CASES, Case, case_named
from sparse_attn_jax.testing.inputs import Inputs, hostile_indices, make_inputs

IMPLEMENTATIONS = ("xla", "mosaic", "cuda")

# Must accept every case. The others may refuse one, with reasons.
PORTABLE = "xla"


def attend_with(inputs: Inputs, implementation: str = PORTABLE, selection=None) -> compare.Attend:
    """The op as a function of its differentiable operands."""

    def attend(query, key, value, key_bias=None):
        return sa.block_sparse_attention(
            query,
            key,
            value,
            inputs.selection if selection is None else selection,
            key_bias=key_bias,
            return_residual=True,
            implementation=implementation,
            **inputs.options,
        )

    return attend


def reasons_against(inputs: Inputs, implementation: str) -> tuple[str, ...]:
    options = inputs.options | dict(key_bias=inputs.operands.get("key_bias"), implementation=implementation)
    query, key, value = (inputs.operands[name] for name in ("query", "key", "value"))
    return sa.explain(query, key, value, inputs.selection, **options).reasons[implementation]


def assert_refuses(inputs: Inputs, implementation: str, reasons: tuple[str, ...]) -> None:
    with pytest.raises(NotImplementedError, match="`implementation`") as error:
        jax.eval_shape(lambda operands: attend_with(inputs, implementation)(**operands), inputs.operands)
    assert all(reason in str(error.value) for reason in reasons)


@functools.cache
def portable_results(name: str) -> tuple[Inputs, compare.Results]:
    inputs = make_inputs(case_named(name))
    return inputs, compare.results_of(attend_with(inputs), inputs)


def assert_bitwise_equal(actual: compare.Results, expected: compare.Results) -> None:
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


# --- conformance ---


@pytest.fixture
def small_steps(monkeypatch):
    """Cases are small: at its usual step size, `xla` would walk nearly all of them in one step of one chunk."""
    monkeypatch.setattr(config, "STEP_SCORES", 2**12)
    monkeypatch.setattr(config, "CHUNK_KEYS", 32)


@pytest.fixture
def simulator(implementation, request):
    if implementation == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    if implementation == "mosaic" and jax_compat.HAS_MOSAIC_GPU:
        request.getfixturevalue("mosaic_on_cpu")


def shortened(case: Case) -> Case:
    """The case for a slow interpreter: most have two tiles left, and two blocks of 128 keys."""
    most = max(320 * case.num_kv_heads // case.num_q_heads, 8)
    return dataclasses.replace(case, q_len=min(case.q_len, 70, most), kv_len=min(case.kv_len, 150))


@pytest.mark.usefixtures("small_steps", "simulator")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_matches_oracle(case: Case, implementation: str):
    if implementation == "mosaic":
        case = shortened(case)
    with jax.enable_x64(case.dtype == "float64"):
        inputs = make_inputs(case)
        reasons = reasons_against(inputs, implementation)
        if reasons:
            assert implementation != PORTABLE
            assert_refuses(inputs, implementation, reasons)
            return
        run = compare.forward_and_backward(attend_with(inputs, implementation))
        results = run(inputs.operands, inputs.d_out, inputs.d_lse)
        assert results["out"].dtype == inputs.dtype and results["lse"].dtype == inputs.d_lse.dtype
        for name, operand in inputs.operands.items():
            assert results[f"d_{name}"].dtype == operand.dtype
        compare.assert_results_match(results, inputs)
        if implementation != "mosaic":  # it has a test of its own for this
            assert_bitwise_equal(run(inputs.operands, inputs.d_out, inputs.d_lse), results)


@pytest.mark.parametrize("case", ["group2_bf16", "everything"])
def test_output_does_not_depend_on_return_residual(case):
    inputs, results = portable_results(case)

    def attend(operands):
        return sa.block_sparse_attention(**operands, selection=inputs.selection, **inputs.options)

    np.testing.assert_array_equal(jax.jit(attend)(inputs.operands), results["out"])


# --- the check fails when the mask or the scores are mutated ---


def with_indices(mutate):
    """A mutation of the index array."""

    def mutated(inputs: Inputs) -> Inputs:
        indices = mutate(np.array(inputs.selection.indices))
        return dataclasses.replace(inputs, selection=dataclasses.replace(inputs.selection, indices=indices))

    return mutated


def with_selection(**changes):
    return lambda inputs: dataclasses.replace(inputs, selection=dataclasses.replace(inputs.selection, **changes))


def with_options(**changes):
    return lambda inputs: dataclasses.replace(inputs, options=inputs.options | changes)


def drop_one_block(indices):
    row = indices[0, -1, -1]
    row[np.argmax(row >= 0)] = -1
    return indices


def give_one_row_its_neighbours_list(indices):
    middle = indices.shape[2] // 2
    assert set(indices[0, 0, middle]) != set(indices[0, 0, middle + 1])
    indices[0, 0, middle] = indices[0, 0, middle + 1]
    return indices


def shift_segments(inputs: Inputs) -> Inputs:
    return with_options(query_segment_ids=jnp.roll(inputs.options["query_segment_ids"], 1, axis=1))(inputs)


def shift_phase(inputs: Inputs) -> Inputs:
    predicate = inputs.selection.predicate
    return with_selection(predicate=dataclasses.replace(predicate, phase=predicate.phase + 1))(inputs)


def swap_key_heads(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, operands=inputs.operands | dict(key=inputs.operands["key"][:, :, ::-1]))


MUTATIONS = {
    "drop_one_block": with_indices(drop_one_block),
    "one_row_takes_its_neighbours_list": with_indices(give_one_row_its_neighbours_list),
    "rows_shifted": with_indices(lambda indices: np.roll(indices, 1, axis=2)),
    "heads_swapped": with_indices(lambda indices: np.roll(indices, 1, axis=1)),
    "batch_rows_swapped": with_indices(lambda indices: np.roll(indices, 1, axis=0)),
    "blocks_shifted": with_indices(lambda indices: np.where(indices > 0, indices - 1, indices)),
    "everything_selected": with_indices(lambda indices: np.broadcast_to(np.arange(8), (*indices.shape[:3], 8))),
    "wider_query_blocks": with_selection(q_block_size=17),
    "wider_kv_blocks": with_selection(kv_block_size=17),
    "causal_one_later": with_options(q_offset=1),
    "causal_one_earlier": with_options(q_offset=-1),
    "not_causal": with_options(is_causal=False),
    "window_left_longer": with_options(local_window_size=(21, 0)),
    "window_left_shorter": with_options(local_window_size=(19, 0)),
    "no_window": with_options(local_window_size=None),
    "window_right_longer": with_options(local_window_size=(9, 18)),
    "window_right_shorter": with_options(local_window_size=(9, 16)),
    "one_sink_more": with_options(num_sinks=4),
    "one_sink_less": with_options(num_sinks=2),
    "segments_shifted": shift_segments,
    "no_segments": with_options(query_segment_ids=None, key_value_segment_ids=None),
    "predicate_shifted": shift_phase,
    "no_predicate": with_selection(predicate=None),
    "scale_larger": with_options(scale=32**-0.5 * 1.05),
    "soft_cap_larger": with_options(logits_soft_cap=1.6),
    "key_heads_swapped": swap_key_heads,
}
EVERY_CASE = ("drop_one_block", "rows_shifted", "heads_swapped", "blocks_shifted", "wider_kv_blocks", "key_heads_swapped")
MUTATED_CASES = {
    "group1": (*EVERY_CASE, "one_row_takes_its_neighbours_list", "causal_one_later", "causal_one_earlier", "not_causal"),
    "group2_bf16": (*EVERY_CASE, "one_row_takes_its_neighbours_list", "causal_one_later", "causal_one_earlier", "not_causal"),
    "group4_fp16": ("drop_one_block", "one_row_takes_its_neighbours_list", "causal_one_later", "scale_larger"),
    "q_block16": (*EVERY_CASE, "batch_rows_swapped", "everything_selected", "wider_query_blocks", "causal_one_later"),
    "future_blocks_bf16": (*EVERY_CASE, "wider_query_blocks", "not_causal"),
    "window": ("window_left_longer", "window_left_shorter", "no_window", "one_sink_more", "one_sink_less"),
    "window_two_sided_bf16": ("window_right_longer", "window_right_shorter", "no_window"),
    "segments_bf16": ("segments_shifted", "no_segments", "causal_one_later"),
    "predicate": ("predicate_shifted", "no_predicate"),
    "soft_cap_bf16": ("soft_cap_larger", "drop_one_block"),
}


@pytest.mark.parametrize("case,mutation", [(case, name) for case, names in MUTATED_CASES.items() for name in names])
def test_check_fails_when_the_definition_is_mutated(case, mutation):
    inputs, results = portable_results(case)
    mutated = MUTATIONS[mutation](inputs)
    mask = compare.mask_of(mutated)
    expected, reference = compare.oracle_results(mutated, mask), compare.reference_results(mutated, mask)
    for name in results:
        with pytest.raises(AssertionError, match=f"`{name}`"):
            compare.assert_close(name, results[name], expected[name], reference[name], dtype=inputs.dtype)


# --- NaN and inf where no query looks ---


UNSEEN_KEYS = (
    Case(
        name="unselected_blocks", special="blocks in no list", indices="local", q_len=20, kv_len=150, is_causal=False,
        q_offset=60,
    ),
    Case(
        name="unselected_blocks_bf16", special="the same", indices="local", q_len=20, kv_len=150, dtype="bfloat16",
        q_block_size=16,
    ),
    Case(name="future", special="keys after the last query", indices="all", q_len=40, kv_len=96, q_offset=13),
    Case(
        name="future_bf16", special="the same", indices="all", q_len=40, kv_len=96, q_offset=13, dtype="bfloat16",
        q_block_size=16,
    ),
    Case(
        name="outside_window", special="keys left of every window", indices="all", q_len=20, kv_len=96,
        local_window_size=(9, 0),
    ),
    Case(
        name="between_sinks_and_window", special="sinks too", indices="all", q_len=9, kv_len=96, local_window_size=(9, 0),
        num_sinks=3,
    ),
    Case(name="dilated", special="a predicate", indices="all", q_len=1, kv_len=96, predicate_stride=3),
    Case(
        name="biased", special="a bias", indices="all", q_len=40, kv_len=96, q_offset=13, has_key_bias=True,
        logits_soft_cap=2.0,
    ),
)  # fmt: skip


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", UNSEEN_KEYS, ids=lambda case: case.name)
def test_keys_that_no_query_sees_never_reach_a_result(case, poison):
    inputs = make_inputs(case)
    seen = compare.mask_of(inputs).reshape(case.batch, case.num_kv_heads, -1, case.kv_len).any(axis=2)
    assert not seen.all() and seen.any()
    operands = dict(inputs.operands)
    for name in ("key", "value"):
        operands[name] = jnp.where(seen.swapaxes(1, 2)[..., None], operands[name], jnp.asarray(poison, case.dtype))
    if case.has_key_bias:
        operands["key_bias"] = jnp.where(seen, operands["key_bias"], poison)
    run = compare.forward_and_backward(attend_with(inputs))
    clean = run(inputs.operands, inputs.d_out, inputs.d_lse)
    assert_bitwise_equal(run(operands, inputs.d_out, inputs.d_lse), clean)


def test_keys_of_other_segments_never_reach_a_result():
    inputs = make_inputs(case_named("segments_q_kv"))
    foreign = jnp.where(jnp.arange(96) % 7 == 3, 9, inputs.options["key_value_segment_ids"])  # inside every block
    inputs = with_options(key_value_segment_ids=foreign)(inputs)
    poisoned = {
        name: jnp.where((foreign == 9)[..., None, None], jnp.nan, x) if name in ("key", "value") else x
        for name, x in inputs.operands.items()
    }
    run = compare.forward_and_backward(attend_with(inputs))
    clean = run(inputs.operands, inputs.d_out, inputs.d_lse)
    assert_bitwise_equal(run(poisoned, inputs.d_out, inputs.d_lse), clean)


@pytest.mark.parametrize("argument", ["query", "d_out", "d_lse"])
@pytest.mark.parametrize("case", ["more_queries_than_keys", "sparse_rows_bf16", "all_rows_empty"])
def test_queries_that_see_nothing_never_reach_a_result(case, argument):
    inputs = make_inputs(case_named(case))
    blind = ~compare.mask_of(inputs).any(axis=-1).swapaxes(1, 2)  # [batch, q_len, num_q_heads]
    arguments = inputs.operands | dict(d_out=inputs.d_out, d_lse=inputs.d_lse)
    run = compare.forward_and_backward(attend_with(inputs))
    clean = run(inputs.operands, inputs.d_out, inputs.d_lse)
    where = blind if argument == "d_lse" else blind[..., None]
    arguments[argument] = jnp.where(where, jnp.nan, arguments[argument])
    operands = {name: arguments[name] for name in inputs.operands}
    assert_bitwise_equal(run(operands, arguments["d_out"], arguments["d_lse"]), clean)


# --- properties ---


@pytest.mark.parametrize("causal", [False, True])
def test_everything_selected_is_dense_attention(causal):
    inputs = make_inputs(dataclasses.replace(case_named("full_attention"), is_causal=causal))
    out = sa.block_sparse_attention(**inputs.operands, selection=inputs.selection, is_causal=causal)
    dense = jax.nn.dot_product_attention(**inputs.operands, is_causal=causal)
    np.testing.assert_allclose(out, dense, atol=2e-6)


def test_order_of_a_list_does_not_matter():
    inputs, results = portable_results("duplicates")
    shuffled = np.random.default_rng(0).permuted(np.array(inputs.selection.indices), axis=-1)
    selection = dataclasses.replace(inputs.selection, indices=jnp.asarray(shuffled))
    assert_bitwise_equal(compare.results_of(attend_with(inputs, selection=selection), inputs), results)


@pytest.mark.parametrize("extra", ["empty", "duplicate", "out_of_range"])
def test_slots_that_add_no_block_do_not_matter(extra):
    inputs, results = portable_results("group1")
    indices = np.array(inputs.selection.indices)
    more = {"empty": -np.ones_like(indices), "duplicate": indices[..., ::-1], "out_of_range": indices + 1000}[extra]
    selection = dataclasses.replace(inputs.selection, indices=jnp.concatenate([more, indices], axis=-1))
    for name, values in compare.results_of(attend_with(inputs, selection=selection), inputs).items():
        np.testing.assert_allclose(values, results[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", ["group1", "hostile_ids", "selection_per_q_head_blocks_bf16", "everything"])
def test_plan_gives_what_its_selection_gives(case):
    inputs, results = portable_results(case)
    query, key = inputs.operands["query"], inputs.operands["key"]
    lengths = dict(q_len=query.shape[1], kv_len=key.shape[1], num_q_heads=query.shape[2], num_kv_heads=key.shape[2])
    plan = sa.plan_attention(inputs.selection, **lengths)
    assert_bitwise_equal(compare.results_of(attend_with(inputs, selection=plan), inputs), results)


def test_disjoint_selections_merge_to_one_call():
    inputs = make_inputs(dataclasses.replace(case_named("sparse_rows_bf16"), dtype="float32"))
    parts = []
    for half in (slice(0, 1), slice(1, None)):
        indices = inputs.selection.indices[..., half]
        parts.append(attend_with(inputs, selection=dataclasses.replace(inputs.selection, indices=indices)))

    def merged(**operands):
        outs, lses = zip(*(part(**operands) for part in parts))
        return sa.merge_attention(outs, lses)

    compare.assert_results_match(compare.results_of(merged, inputs), inputs)


def test_key_bias_of_minus_infinity_hides_a_key():
    inputs = make_inputs(case_named("key_bias_bf16"))
    hidden = jnp.zeros((2, 2, 96), bool).at[:, 0, ::3].set(True).at[1, 1].set(True)
    inputs.operands["key_bias"] = jnp.where(hidden, -jnp.inf, inputs.operands["key_bias"])
    compare.assert_results_match(compare.results_of(attend_with(inputs), inputs), inputs)


# --- any indices, any option values ---


FUZZ_SHAPES = (
    dict(batch=2, num_q_heads=4, num_kv_heads=2, q_len=21, kv_len=37, q_block_size=1, kv_block_size=16, heads=2),
    dict(batch=1, num_q_heads=3, num_kv_heads=1, q_len=40, kv_len=17, q_block_size=1, kv_block_size=8, heads=3),
    dict(batch=2, num_q_heads=2, num_kv_heads=2, q_len=33, kv_len=50, q_block_size=10, kv_block_size=7, heads=1),
)


@functools.cache
def fuzzed_call(shape: int, is_causal: bool):
    sizes = FUZZ_SHAPES[shape]

    @jax.jit
    def call(operands, indices, q_offset, window, num_sinks):
        selection = sa.BlockSelection(indices, q_block_size=sizes["q_block_size"], kv_block_size=sizes["kv_block_size"])
        options = dict(is_causal=is_causal, q_offset=q_offset, local_window_size=(window, None), num_sinks=num_sinks)

        def attend(**operands):
            return sa.block_sparse_attention(**operands, selection=selection, return_residual=True, **options)

        (out, lse), pull_back = jax.vjp(lambda operands: attend(**operands), operands)
        (gradients,) = pull_back((jnp.ones_like(out), jnp.ones_like(lse)))
        return dict(out=out, lse=lse, **{f"d_{name}": gradient for name, gradient in gradients.items()})

    return call


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from(range(len(FUZZ_SHAPES))), is_causal=st.booleans(), seed=st.integers(0, 2**20), data=st.data()
)
def test_any_indices_and_offsets_match_the_oracle(shape, is_causal, seed, data):
    sizes = dict(FUZZ_SHAPES[shape])
    heads, num_kv_heads = sizes.pop("heads"), sizes.pop("num_kv_heads")
    batch, q_len, kv_len, num_q_heads = (sizes[name] for name in ("batch", "q_len", "kv_len", "num_q_heads"))
    q_offset = np.array(data.draw(st.lists(st.integers(-50, 90), min_size=batch, max_size=batch)), np.int32)
    window = np.array(data.draw(st.lists(st.integers(0, 60), min_size=num_q_heads, max_size=num_q_heads)), np.int32)
    num_sinks = np.array(data.draw(st.lists(st.integers(0, 20), min_size=num_q_heads, max_size=num_q_heads)), np.int32)
    generator_sizes = {name: sizes[name] for name in ("batch", "q_len", "kv_len", "q_block_size", "kv_block_size")}
    indices = hostile_indices(**generator_sizes, heads=heads, num_slots=4, seed=seed)
    rng = np.random.default_rng(seed)
    operands = dict(
        query=rng.standard_normal((batch, q_len, num_q_heads, 16), np.float32),
        key=rng.standard_normal((batch, kv_len, num_kv_heads, 16), np.float32),
        value=rng.standard_normal((batch, kv_len, num_kv_heads, 16), np.float32),
    )
    results = fuzzed_call(shape, is_causal)(operands, indices, q_offset, window, num_sinks)
    mask = oracle.attention_mask(
        indices, **sizes, is_causal=is_causal, q_offset=q_offset, local_window_size=(window, None), num_sinks=num_sinks
    )
    expected = dict(zip(compare.RESULT_NAMES, oracle.attention(mask, **operands, d_out=1.0, d_lse=1.0)))
    for name, values in results.items():
        compare.assert_close(name, values, expected[name], expected[name], dtype="float32")
