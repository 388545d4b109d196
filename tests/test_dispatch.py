"""Dispatch: names, reasons, no silent fallback, one log line per choice."""

import logging as std_logging

import jax
import jax.numpy as jnp
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax import dispatch


def arguments():
    query = jnp.ones((1, 32, 4, 8))
    key = jnp.ones((1, 32, 2, 8))
    return query, key, key, sa.BlockSelection(jnp.zeros((1, 1, 2, 1), jnp.int32), q_block_size=16, kv_block_size=16)


def test_explain_names_the_choice_and_every_reason_against_the_others():
    explanation = sa.explain(*arguments(), is_causal=True)
    assert explanation.implementation == "xla"
    assert set(explanation.reasons) == {"mosaic", "cuda", "xla"}
    assert explanation.reasons["xla"] == ()
    for name in ("mosaic", "cuda"):  # cuda has no kernels either, unless they were compiled
        assert any("platform is 'cpu'" in reason for reason in explanation.reasons[name])
        assert f"not {name}: " in str(explanation)
    assert explanation.problem.is_causal and explanation.problem.group_size == 2


def test_explain_computes_nothing():
    query, key, value, selection = arguments()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value, selection.indices)]
    abstract = sa.BlockSelection(shapes[3], q_block_size=16, kv_block_size=16)
    assert sa.explain(*shapes[:3], abstract).implementation == "xla"


@pytest.mark.parametrize("name", ["mosaic", "cuda"])
def test_named_implementation_never_falls_back(name):
    with pytest.raises(NotImplementedError, match=f"{name}: .*platform is 'cpu'"):
        sa.block_sparse_attention(*arguments(), implementation=name)
    assert sa.explain(*arguments(), implementation=name).implementation is None


def test_sequence_takes_the_first_that_can_run():
    assert sa.explain(*arguments(), implementation=("cuda", "xla")).implementation == "xla"
    out = sa.block_sparse_attention(*arguments(), implementation=("cuda", "xla"))
    assert out.shape == (1, 32, 4, 8)
    with pytest.raises(NotImplementedError, match=r"(?s)cuda: .*mosaic: "):
        sa.block_sparse_attention(*arguments(), implementation=("cuda", "mosaic"))


@pytest.mark.parametrize("name", ["triton", "", (), ("xla", "triton")])
def test_unknown_implementation_is_a_value_error(name):
    with pytest.raises(ValueError, match="`implementation`"):
        sa.block_sparse_attention(*arguments(), implementation=name)


def test_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(std_logging.INFO, logger="absl"):
        for _ in range(2):
            sa.block_sparse_attention(*arguments())
    lines = [record.message for record in caplog.records if "sparse_attn_jax" in record.message]
    assert len(lines) == 1 and "attention, forward and backward, runs on: xla" in lines[0] and "not cuda" in lines[0]


def test_problem_is_hashable_and_supports_is_pure():
    problem = sa.explain(*arguments()).problem
    assert hash(problem) == hash(sa.explain(*arguments()).problem)
    for name in dispatch.IMPLEMENTATIONS:
        assert dispatch.reasons_against(name, problem) == dispatch.reasons_against(name, problem)
