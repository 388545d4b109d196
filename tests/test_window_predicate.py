"""`WindowPredicate`: what it keeps, and that the op runs it as its own window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax import attention
from sparse_attn_jax.testing import compare, oracle
from sparse_attn_jax.testing.cases import Case
from sparse_attn_jax.testing.inputs import Inputs, make_inputs
from sparse_attn_jax.window_predicate import WindowPredicate

HEADS = jnp.array([0, 3, 50, 9], jnp.int32)
PREDICATES = {
    "ints": WindowPredicate(5, 2, 3),
    "left": WindowPredicate(7),
    "right": WindowPredicate(None, 4),
    "unbounded": WindowPredicate(num_sinks=3),
    "heads": WindowPredicate(HEADS, 4, HEADS[::-1]),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opaque:
    """The same, of a type that no implementation knows."""

    predicate: WindowPredicate

    def __call__(self, *positions):
        return self.predicate(*positions)


@functools.cache
def example() -> Inputs:
    sizes = dict(batch=2, q_len=24, kv_len=40, head_dim=16)
    return make_inputs(Case(name="window_predicate", special="one of its own", indices="all", is_causal=False, **sizes))


def with_predicate(predicate, **options) -> Inputs:
    inputs = example()
    return dataclasses.replace(
        inputs, selection=dataclasses.replace(inputs.selection, predicate=predicate), options=inputs.options | options
    )


def assert_output(inputs: Inputs, mask: np.ndarray) -> None:
    attend = jax.jit(lambda operands: sa.block_sparse_attention(**operands, selection=inputs.selection, **inputs.options))
    expected = compare.oracle_results(inputs, mask)["out"]
    np.testing.assert_allclose(attend(inputs.operands), expected, atol=1e-5)


def explain(inputs: Inputs) -> sa.Explanation:
    return sa.explain(**inputs.operands, selection=inputs.selection, **inputs.options)


def has_predicate_reason(explanation) -> dict[str, bool]:
    return {name: any("predicate" in reason for reason in reasons) for name, reasons in explanation.reasons.items()}


def definition(predicate) -> np.ndarray:
    """bool [batch, num_q_heads, q_len, kv_len], query 0 being at position 16."""
    sizes = (getattr(predicate, name) for name in ("left", "right", "num_sinks"))
    left, right, sinks = (np.broadcast_to(10**9 if x is None else x, 4) for x in sizes)
    mask = np.zeros((2, 4, 24, 40), bool)
    for b, h, i, j in np.ndindex(mask.shape):
        mask[b, h, i, j] = i + 16 - left[h] <= j <= i + 16 + right[h] or j < sinks[h]
    return mask


@pytest.mark.parametrize("name", PREDICATES)
def test_predicate_is_the_definition(name):
    inputs = with_predicate(PREDICATES[name])
    np.testing.assert_array_equal(compare.mask_of(inputs), definition(PREDICATES[name]))
    problem = explain(inputs).problem
    assert problem.predicate is None and problem.has_window


def test_op_and_its_gradients_take_the_window():
    inputs = with_predicate(PREDICATES["heads"])
    attend = functools.partial(sa.block_sparse_attention, selection=inputs.selection, return_residual=True)
    compare.assert_results_match(compare.results_of(attend, inputs), inputs, definition(PREDICATES["heads"]))


def test_no_implementation_has_a_reason_against_it():
    for predicate, is_refused in ((PREDICATES["ints"], False), (Opaque(PREDICATES["ints"]), True)):
        found = has_predicate_reason(explain(with_predicate(predicate)))
        assert found == dict(mosaic=is_refused, cuda=is_refused, xla=False)


@pytest.mark.parametrize("is_varlen", [False, True], ids=["rows", "packed"])
def test_implementations_are_given_a_window_and_no_predicate(monkeypatch, is_varlen):
    """Those that know no predicate would not look at it."""
    masks = []

    def attend(name, problem, operands, plan, mask):
        masks.append(mask)
        return jnp.zeros_like(operands.query), jnp.zeros(operands.query.shape[:3])

    monkeypatch.setattr(attention, "attend", attend)
    inputs = with_predicate(PREDICATES["heads"])
    if is_varlen:
        operands, bounds = {name: x[0] for name, x in inputs.operands.items()}, jnp.array([0, 24], jnp.int32)
        selection = dataclasses.replace(inputs.selection, indices=inputs.selection.indices[:1])
        sa.block_sparse_attention_varlen(**operands, selection=selection, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    else:
        sa.block_sparse_attention(**inputs.operands, selection=inputs.selection)
    assert masks[0].predicate is None
    for found, expected in ((masks[0].window_left, HEADS), (masks[0].window_right, [4] * 4), (masks[0].num_sinks, HEADS[::-1])):
        np.testing.assert_array_equal(found, expected)


def test_both_hold_where_the_caller_gives_a_window():
    inputs = with_predicate(PREDICATES["heads"], local_window_size=(9, 1))
    assert explain(inputs).problem.predicate == "WindowPredicate"
    assert_output(inputs, definition(PREDICATES["heads"]) & definition(WindowPredicate(9, 1)))


def test_sinks_of_the_caller_are_no_exception_to_the_predicate():
    inputs = with_predicate(PREDICATES["heads"], num_sinks=1)
    problem = explain(inputs).problem
    assert problem.predicate == "WindowPredicate" and not problem.has_window


def test_a_plan_brings_its_window():
    inputs = with_predicate(PREDICATES["heads"])
    plan = sa.plan_attention(inputs.selection, q_len=24, kv_len=40, num_q_heads=4, num_kv_heads=2)
    inputs = dataclasses.replace(inputs, selection=plan)
    assert not any(has_predicate_reason(explain(inputs)).values())
    assert_output(inputs, definition(PREDICATES["heads"]))


def test_packed_sequences_take_the_window():
    """Two sequences of 20 and 4 queries, whose positions start anew."""
    operands = {name: x[0] for name, x in example().operands.items()}
    bounds = dict(cu_seqlens_q=jnp.array([0, 20, 24], jnp.int32), cu_seqlens_kv=jnp.array([0, 30, 40], jnp.int32))
    indices = jnp.zeros((2, 1, 20, 5), jnp.int32) + jnp.arange(5, dtype=jnp.int32)

    selection = sa.BlockSelection(indices, q_block_size=1, kv_block_size=8, predicate=PREDICATES["heads"])
    attend = jax.jit(lambda operands: sa.block_sparse_attention_varlen(**operands, selection=selection, **bounds))
    sizes = dict(num_q_heads=4, q_len=24, kv_len=40, q_block_size=1, kv_block_size=8)
    mask = oracle.varlen_mask(indices, *bounds.values(), **sizes, predicate=PREDICATES["heads"])
    expected, *_ = oracle.attention(mask, *(x[None] for x in operands.values()))
    np.testing.assert_allclose(attend(operands), expected[0], atol=1e-5)


def test_ints_are_static_and_arrays_are_leaves():
    predicate = WindowPredicate(5, None, HEADS)
    leaves, structure = jax.tree.flatten(predicate)
    assert leaves == [HEADS] and structure.unflatten(leaves).left == 5
    assert jax.tree.leaves(PREDICATES["ints"]) == [] and hash(PREDICATES["ints"]) == hash(WindowPredicate(5, 2, 3))
    # What stands in the place of an array, as `in_axes` does, does not make another structure.
    assert jax.tree.structure(jax.tree.map(lambda _: 0, predicate)) == structure
    by_example = WindowPredicate(jnp.stack([HEADS, HEADS + 1]))
    mapped = jax.vmap(lambda predicate: predicate(0, 2, 60, jnp.arange(20)))(by_example)
    np.testing.assert_array_equal(mapped, np.arange(20) >= np.array([[10], [9]]))


def test_extreme_sizes_do_not_wrap_around():
    largest = np.iinfo(np.int32).max
    for predicate in (WindowPredicate(largest, largest), WindowPredicate(jnp.full(4, largest, jnp.int32), largest)):
        assert predicate(0, 1, jnp.array([-5, 2**30 - 1]), jnp.array([0, 3])).all()


BAD = {
    "left": (r"`selection.predicate.left` is -1; it must be between 0", WindowPredicate(-1)),
    "right": (r"`selection.predicate.right` is 2.5", WindowPredicate(3, 2.5)),
    "num_sinks": (r"`selection.predicate.num_sinks` is None", WindowPredicate(3, num_sinks=None)),
    "shape": (r"`selection.predicate.left` is int32\[3\]", WindowPredicate(HEADS[:3])),
    "dtype": (r"`selection.predicate.num_sinks` is float32\[4\]", WindowPredicate(num_sinks=jnp.ones(4))),
}


@pytest.mark.parametrize("options", [dict(), dict(local_window_size=3)], ids=["alone", "with window"])
@pytest.mark.parametrize("name", BAD)
def test_bad_field_is_refused_by_name(name, options):
    message, predicate = BAD[name]
    with pytest.raises(ValueError, match=message):
        explain(with_predicate(predicate, **options))
