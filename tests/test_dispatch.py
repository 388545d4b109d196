"""Dispatch: names, reasons, no silent fallback, one log line per choice."""

import dataclasses
import logging as std_logging

import jax
import jax.numpy as jnp
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax import dispatch, measured
from tools import measured_times


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


def test_those_after_the_choice_are_not_asked(monkeypatch):
    """A library that does not load harms nobody who does without it."""

    def fail(problem):
        raise RuntimeError("another jaxlib")

    monkeypatch.setattr(dispatch.cuda, "supports", fail)
    sa.block_sparse_attention(*arguments(), implementation=("xla", "cuda"))
    with pytest.raises(RuntimeError, match="another jaxlib"):
        sa.block_sparse_attention(*arguments(), implementation=("cuda", "xla"))


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
    assert len(lines) == 1 and "attention (forward and backward) runs on: xla" in lines[0] and "not cuda" in lines[0]


def test_problem_is_hashable_and_supports_is_pure():
    problem = sa.explain(*arguments()).problem
    assert hash(problem) == hash(sa.explain(*arguments()).problem)
    for name in dispatch.IMPLEMENTATIONS:
        assert dispatch.reasons_against(name, problem) == dispatch.reasons_against(name, problem)


DEVICE = dict(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")


def gpu_problem(**changes):
    problem = sa.explain(*arguments()).problem
    return dataclasses.replace(problem, **(DEVICE | dict(dtype="bfloat16", head_dim=128, kv_len=32768) | changes))


def row(kv_len, milliseconds, **changes):
    """What `tools.measured_times` writes of one case of `gpu_problem`."""
    case = dict(op="attention", device_kind=DEVICE["device_kind"], dtype="bfloat16", head_dim=128, group_size=2)
    return case | dict(kv_block_size=16, per_token=False, kv_len=kv_len, milliseconds=milliseconds) | changes


def test_nothing_measured_keeps_the_default_order(monkeypatch):
    for rows in ((), (row(32768, dict(cuda=1.0, mosaic=2.0), device_kind="NVIDIA A100-SXM4-80GB"),)):
        monkeypatch.setattr(measured, "read_rows", lambda rows=rows: rows)
        assert tuple(dispatch.explain(gpu_problem(), None).reasons) == ("mosaic", "cuda", "xla")


def test_what_was_measured_faster_is_preferred(monkeypatch):
    rows = (row(32768, dict(cuda=1.0, mosaic=2.0)), row(131072, dict(cuda=9.0, mosaic=8.0)))
    monkeypatch.setattr(measured, "read_rows", lambda: rows)
    order = lambda **changes: tuple(dispatch.explain(gpu_problem(**changes), None).reasons)
    assert order() == order(kv_len=16384) == order(kv_len=60000) == ("cuda", "mosaic", "xla")
    assert order(kv_len=70000) == order(kv_len=10**6) == ("mosaic", "cuda", "xla")
    for other in (dict(head_dim=64), dict(dtype="float16"), dict(kv_block_size=64), dict(q_block_size=1), dict(num_q_heads=2)):
        assert order(**other) == ("mosaic", "cuda", "xla")
    assert tuple(dispatch.explain(gpu_problem(), ("mosaic", "cuda")).reasons) == ("mosaic", "cuda"), "what was asked for stays"


def test_an_implementation_that_was_not_measured_keeps_its_place(monkeypatch):
    monkeypatch.setattr(measured, "read_rows", lambda: (row(32768, dict(cuda=9.0, xla=2.0)),))
    assert tuple(dispatch.explain(gpu_problem(), None).reasons) == ("mosaic", "xla", "cuda")


def test_the_committed_table_can_be_read():
    for found in measured.read_rows():
        assert set(found) == {*measured.CASE, "kv_len", "milliseconds"} and set(found["milliseconds"]) <= set(
            dispatch.IMPLEMENTATIONS
        )


def results(rows, selector=None):
    """A file of results with one workload, the case of `gpu_problem`."""
    case = dict(dtype="bfloat16", head_dim=128, num_q_heads=4, num_kv_heads=2, q_block_size=16, kv_block_size=16, kv_len=32768)
    fields = ("op", "mode", "contender", "kind", "status", "median_ms")
    workload = dict(case=case, selector=selector, rows=[dict(zip(fields, values)) for values in rows])
    return dict(machine=dict(device=DEVICE["device_kind"]), sections=[dict(workloads=[workload])])


def test_times_of_the_benchmarks_become_rows():
    attention = [
        ("attention", "forward", "cuda", "implementation", "timed", 0.1),
        ("attention", "forward_backward", "cuda", "implementation", "timed", 1.5),
        ("attention", "forward_backward", "mosaic", "implementation", "timed", 1.25),
        ("attention", "forward_backward", "xla", "implementation", "WRONG", None),
        ("attention", "forward_backward", "torch-flex", "baseline", "timed", 1.0),
    ]
    expected = row(32768, dict(cuda=1.5, mosaic=1.25))
    assert list(measured_times.rows_of(results(attention))) == [expected]
    assert list(measured_times.rows_of(results(attention[:2]))) == [], "one implementation leaves nothing to choose"
    selection = [("selection", "forward", f"InfLLMV2 {name}", "selector", "timed", 2.0) for name in ("cuda", "mosaic")]
    found = list(measured_times.rows_of(results(selection, selector=dict(block_size=64))))
    times = dict(cuda=2.0, mosaic=2.0)
    assert found == [expected | dict(op="selection", kv_block_size=64, per_token=True, milliseconds=times)]
    newer = expected | dict(milliseconds=dict(cuda=1.0, mosaic=2.0))
    assert measured_times.merge([expected, *found], [newer]) == [newer, *found]


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([("cuda sm90", "timed", 1.5), ("cuda sm80", "timed", 3.0)], dict(cuda=1.5)),
        ([("cuda sm80", "timed", 3.0), ("cuda sm90", "timed", 4.0)], dict(cuda=4.0)),
        ([("cuda sm90", "cannot run", None), ("cuda sm80", "timed", 3.0)], dict(cuda=3.0)),
        ([("cuda sm90", "WRONG", None), ("cuda sm80", "timed", 3.0)], {}),
        ([("mosaic forward: warpgroups 1, stages 2", "timed", 0.5)], {}),
    ],
    ids=str,
)
def test_times_are_of_the_kernels_that_the_dispatch_runs(kernels, expected):
    rows = [("attention", "forward_backward", name, "implementation", *found) for name, *found in kernels]
    others = [("attention", "forward_backward", name, "implementation", "timed", 2.0) for name in ("xla", "mosaic")]
    (found,) = measured_times.rows_of(results(rows + others))
    assert found["milliseconds"] == dict(xla=2.0, mosaic=2.0) | expected
