"""The oracle against the definition spelled out one query and key at a time, and the comparison against wrong results."""

import ast
import inspect
import itertools

import jax
import numpy as np
import pytest

from sparse_attn_jax.testing import compare, inputs, oracle
from sparse_attn_jax.testing.cases import CASES, case_named

SMALL = dict(batch=2, num_q_heads=4, q_len=9, kv_len=13, q_block_size=4, kv_block_size=3)


def is_visible(
    indices, b, h, i, j, *, num_q_heads, q_block_size, kv_block_size, offset, causal, window, sinks, segments, predicate
):
    """The definition for one query and key, in plain Python."""
    row = indices[b % len(indices)][h * len(indices[0]) // num_q_heads][i // q_block_size]
    position = i + offset[b]
    left, right = window
    near = (left is None or j >= position - left[h]) and (right is None or j <= position + right[h])
    return (
        j // kv_block_size in list(row)
        and (near or j < sinks[h])
        and (not causal or j <= position)
        and (segments is None or segments[0][b][i] == segments[1][b][j])
        and (predicate is None or bool(predicate(b, h, position, j)))
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [None, 3, (-5, 9)])
@pytest.mark.parametrize("window", [(None, None), (2, None), ((0, 1, 5, 20), 2)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_mask_equals_the_definition_spelled_out(causal, offset, window, heads):
    rng = np.random.default_rng(heads)
    indices = rng.choice([-1, 0, 1, 2, 3, 4, 5, 2**31 - 1, -(2**31)], (1 if heads == 1 else 2, heads, 3, 3))
    sinks = (0, 2, 1, 7)
    segments = [rng.integers(0, 2, (2, length)) for length in (9, 13)] if causal else None
    predicate = (lambda b, h, i, j: (i + j + b + h) % 3 != 0) if heads == 2 else None
    mask = oracle.attention_mask(
        indices,
        **SMALL,
        is_causal=causal,
        q_offset=offset,
        local_window_size=window,
        num_sinks=sinks,
        query_segment_ids=None if segments is None else segments[0],
        key_value_segment_ids=None if segments is None else segments[1],
        predicate=predicate,
    )
    spelled_out = dict(
        num_q_heads=4,
        q_block_size=4,
        kv_block_size=3,
        offset=np.broadcast_to(4 if offset is None else offset, (2,)),
        causal=causal,
        window=[None if side is None else np.broadcast_to(side, (4,)) for side in window],
        sinks=sinks,
        segments=segments,
        predicate=predicate,
    )
    for b, h, i, j in itertools.product(*map(range, mask.shape)):
        assert mask[b, h, i, j] == is_visible(indices, b, h, i, j, **spelled_out), (b, h, i, j)


def test_everything_selected_is_the_softmax_of_all_scores():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, length, 1, 8)) for length in (5, 7, 7))
    out, lse, *_ = oracle.attention(np.ones((2, 1, 5, 7), bool), query, key, value)
    weights = np.exp(np.einsum("bid,bjd->bij", query[:, :, 0], key[:, :, 0]) / np.sqrt(8))
    np.testing.assert_allclose(out[:, :, 0], weights @ value[:, :, 0] / weights.sum(-1, keepdims=True), rtol=1e-13)
    np.testing.assert_allclose(lse[:, :, 0], np.log(weights.sum(-1)), rtol=1e-13)


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("argument", ["query", "key", "value", "key_bias"])
def test_gradients_equal_finite_differences(soft_cap, argument):
    rng = np.random.default_rng(1)
    operands = dict(
        query=rng.standard_normal((2, 5, 4, 6)),
        key=rng.standard_normal((2, 7, 2, 6)),
        value=rng.standard_normal((2, 7, 2, 3)),
        key_bias=rng.standard_normal((2, 2, 7)),
    )
    mask = rng.random((2, 4, 5, 7)) < 0.5
    mask[:, :, 2] = False
    d_out, d_lse = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((2, 5, 4))
    direction = rng.standard_normal(operands[argument].shape)

    def loss(step):
        moved = operands | {argument: operands[argument] + step * direction}
        out, lse, *_ = oracle.attention(mask, **moved, scale=0.6, logits_soft_cap=soft_cap)
        return (out * d_out).sum() + (np.where(np.isinf(lse), 0.0, lse) * d_lse).sum()

    gradients = oracle.attention(mask, **operands, d_out=d_out, d_lse=d_lse, scale=0.6, logits_soft_cap=soft_cap)[2:]
    gradient = dict(zip(operands, gradients))[argument]
    np.testing.assert_allclose((gradient * direction).sum(), (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-7, atol=1e-8)


def test_a_query_that_sees_nothing_has_zero_output_and_gradients():
    rng = np.random.default_rng(2)
    query, key, value = (rng.standard_normal((1, 4, 2, 8)) for _ in range(3))
    mask = np.ones((1, 2, 4, 4), bool)
    mask[:, :, 1] = False
    out, lse, d_query, *others = oracle.attention(mask, query, key, value, d_out=np.ones(out_shape := query.shape), d_lse=1.0)
    assert out.shape == out_shape
    assert (out[:, 1] == 0).all() and np.isneginf(lse[:, 1]).all() and (d_query[:, 1] == 0).all()
    assert all(np.isfinite(x).all() for x in others)


def test_varlen_mask_is_one_mask_per_sequence():
    rng = np.random.default_rng(3)
    packed = rng.integers(-1, 4, (1, 2, 5, 2))  # rows: 2 for the sequence of 5 queries, none, 3 for the one of 9
    bounds = dict(cu_seqlens_q=[0, 5, 5, 14], cu_seqlens_kv=[0, 7, 9, 20])
    options = dict(num_q_heads=2, q_block_size=4, kv_block_size=3, is_causal=True)
    mask = oracle.varlen_mask(packed, **bounds, q_len=16, kv_len=21, **options)
    first = oracle.attention_mask(packed[:, :, :2], batch=1, q_len=5, kv_len=7, **options)
    last = oracle.attention_mask(packed[:, :, 2:], batch=1, q_len=9, kv_len=11, **options)
    np.testing.assert_array_equal(mask[:, :, :5, :7], first)
    np.testing.assert_array_equal(mask[:, :, 5:14, 9:20], last)
    assert mask.sum() == first.sum() + last.sum() > 0


def test_oracle_is_short_and_imports_nothing_but_numpy():
    source = inspect.getsource(oracle)
    tree = ast.parse(source)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported == ["numpy"] and not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    code = [line for number, line in lines if number not in docstrings and line.strip() and line.strip()[0] != "#"]
    assert len(code) <= 60


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
    with pytest.raises(ValueError, match="`name` is 'nothing'"):
        case_named("nothing")


def test_cases_are_reproducible():
    first, second = (jax.tree.leaves(inputs.make_inputs(case_named("everything")).operands) for _ in range(2))
    for x, y in zip(first, second):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("generator", ["random", "local", "realistic"])
@pytest.mark.parametrize("q_block_size", [1, 16])
@pytest.mark.parametrize("q_offset", [None, 0, (5, 90)])
def test_causal_generators_choose_distinct_blocks_of_the_past(generator, q_block_size, q_offset):
    sizes = dict(batch=2, heads=3, q_len=70, kv_len=120, num_slots=4, q_block_size=q_block_size, kv_block_size=16)
    ids = inputs.INDEX_GENERATORS[generator](**sizes, is_causal=True, q_offset=q_offset)
    assert ids.shape == (2, 3, -(-70 // q_block_size), 4) and ids.dtype == np.int32
    last_query = np.minimum(np.arange(ids.shape[2]) * q_block_size + q_block_size, 70) - 1
    position = last_query + np.broadcast_to(50 if q_offset is None else q_offset, (2,))[:, None]
    assert (ids * 16 <= position[:, None, :, None]).all() and ids.max() < 8
    for row in ids.reshape(-1, 4):
        chosen = row[row >= 0]
        assert len(set(chosen)) == len(chosen) > 0


def test_realistic_lists_change_slowly():
    sizes = dict(batch=1, heads=1, q_len=4096, kv_len=4096, num_slots=16, kv_block_size=16, is_causal=True)
    shared = {}
    for generator in (inputs.realistic_indices, inputs.random_indices):
        lists = [set(row) for row in generator(**sizes)[0, 0, 2048:2304].tolist()]
        shared[generator] = np.mean([len(x & y) / 16 for x, y in itertools.pairwise(lists)])
    assert shared[inputs.realistic_indices] > 0.6 > 0.3 > shared[inputs.random_indices]


def test_comparison_accepts_the_reference_and_reports_a_wrong_element():
    x = inputs.make_inputs(case_named("group2_bf16"))
    mask = compare.mask_of(x)
    results = compare.reference_results(x, mask)
    compare.assert_results_match(results, x)
    wrong = np.array(results["out"], np.float32)
    wrong[0, 7, 2, 5] += 0.05
    with pytest.raises(AssertionError, match=r"`out` has max error .* worst at \(0, 7, 2, 5\): .*, expected"):
        compare.assert_results_match(results | dict(out=wrong), x)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_comparison_rejects_a_special_value(special):
    x = inputs.make_inputs(case_named("more_queries_than_keys"))
    results = compare.reference_results(x, compare.mask_of(x))
    wrong = np.array(results["lse"])
    wrong[0, 70, 1] = special
    with pytest.raises(AssertionError, match=r"`lse` differs in special values at 1 positions, first at \(0, 70, 1\)"):
        compare.assert_results_match(results | dict(lse=wrong), x)
