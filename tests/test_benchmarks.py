"""The benchmark command line at tiny sizes: what it prints and writes, and that it refuses to time a wrong result."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

import sparse_attn_jax as sa
from benchmarks import (
    checks,
    decode,
    files,
    gpu_suite,
    memory,
    presets,
    report,
    run,
    timing,
    torch_contenders,
    workloads,
)
from benchmarks.contenders import Implementation, Selector
from benchmarks.measure import FAILED, TIMED, UNAVAILABLE, WRONG, Outcome, Row
from benchmarks.mgpu_contender import attend_densely
from benchmarks.presets import BASELINES
from benchmarks.workloads import Workload, sized_case
from sparse_attn_jax import dispatch, jax_compat
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import CASES, case_named
from sparse_attn_jax.testing.inputs import make_inputs

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--repeats=2", "--matmul_size=64"]
SMALL = ["--q_len=128", "--num_q_heads=2", "--num_kv_heads=1", "--head_dim=16", "--kv_block_size=16", "--num_slots=4", *QUICK]
HAS_TORCH = importlib.util.find_spec("torch") is not None
MODES = ("forward", "forward_backward")
attend = sa.block_sparse_attention


def run_cli(tmp_path, *arguments) -> tuple[int, dict]:
    """Exit status and JSON of the command line, in this process."""
    path = tmp_path / "found.json"
    with flagsaver.flagsaver():
        flags.FLAGS(["run", *arguments, f"--json={path}"])
        status = run.main(["run"])
    return status, json.loads(path.read_text())


def rows_of(data: dict) -> list[dict]:
    return [row for section in data["sections"] for workload in section["workloads"] for row in workload["rows"]]


def by_name(data: dict) -> dict[tuple[str, str], dict]:
    return {(row["contender"], row["mode"]): row for row in rows_of(data)}


def test_every_contender_has_its_line(tmp_path, capsys):
    status, data = run_cli(tmp_path, *SMALL, "--baselines=dense-xla,dense-cudnn,dense-mgpu,torch-sdpa")
    assert status == 0
    rows = by_name(data)
    assert set(rows) == {(name, mode) for name in ("xla", *BASELINES) if name != "torch-flex" for mode in MODES}
    assert [rows["xla", mode]["status"] for mode in MODES] == [TIMED, TIMED]
    assert "needs a GPU" in rows["dense-cudnn", "forward"]["reason"]
    assert "needs a GPU of compute capability 9.0" in rows["dense-mgpu", "forward"]["reason"]
    torch_row = rows["torch-sdpa", "forward"]
    assert torch_row["status"] == TIMED if HAS_TORCH else "not installed" in torch_row["reason"]
    printed = capsys.readouterr().out
    assert "cannot run: cuDNN needs a GPU" in printed and "x dense-xla" in printed and "takes" in printed
    assert jax.__version__ in printed and "seed 0" in printed


@pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU, reason="needs JAX 0.11 or newer")
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_of_jax_lowers_for_hopper(is_causal, monkeypatch):
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # It asks which CUDA is there.
    monkeypatch.setattr(attention_mgpu, "cuda_versions", mock.Mock(cuda_runtime_get_version=lambda: 13000))
    shapes = dict(query=(1, 256, 4, 128), key=(1, 256, 2, 128), value=(1, 256, 2, 128))
    operands = {name: jnp.zeros(shape, jnp.float16) for name, shape in shapes.items()}
    attend = lambda operands: attend_densely(operands, None, is_causal)
    loss = lambda operands: attend(operands).astype(jnp.float32).sum()
    text = kernel_cases.lower_for_hopper(attend if is_causal else jax.grad(loss), operands)
    assert text.count("custom_call @mosaic_gpu") == (1 if is_causal else 3)


def test_json_has_its_schema_and_the_plot_is_written(tmp_path):
    figure = tmp_path / "figure.png"
    plot = [f"--plot={figure}"] if importlib.util.find_spec("matplotlib") else []
    _, data = run_cli(tmp_path, *SMALL, *plot, "--q_len=64,128", "--baselines=dense-xla", "--seed=3", "--mode=forward")
    assert not plot or figure.read_bytes().startswith(b"\x89PNG")
    assert set(data) == {"schema", "machine", "seed", "sections", "memory"} and data["schema"] == report.SCHEMA
    assert data["seed"] == 3 and {"device", "cores", "jax", "jaxlib", "torch", "platform"} <= set(data["machine"])
    (section,) = data["sections"]
    assert any("per doubling" in line for line in section["summaries"])
    assert [workload["case"]["q_len"] for workload in section["workloads"]] == [64, 128]
    for row in rows_of(data):
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["repeats"] == 2
        assert row["useful_tflops"] > 0 and row["percent_of_matmul"] > 0 and row["peak_memory_bytes"] > 0
        assert set(row["ratios"]) == {"dense-xla"}


@pytest.mark.parametrize(
    ("case", "dense_status"), [("narrow_value", UNAVAILABLE), ("odd_prefix", TIMED), ("float64", UNAVAILABLE)]
)
def test_named_cases_run(tmp_path, case, dense_status):
    status, data = run_cli(tmp_path, f"--cases={case}", "--baselines=dense-xla", "--mode=forward_backward", *QUICK)
    rows = by_name(data)
    mode = "forward_backward"
    assert status == 0 and rows["xla", mode]["status"] == TIMED and rows["dense-xla", mode]["status"] == dense_status


def test_selection_is_timed_beside_attention(tmp_path):
    arguments = ["--op=both", "--q_len=300", "--num_slots=5", "--mode=forward", "--baselines=", "--generator=realistic", *QUICK]
    status, data = run_cli(tmp_path, *arguments)
    assert status == 0
    assert set(by_name(data)) == {("InfLLMV2 xla", "forward"), ("xla", "forward")}
    assert any("attention it selects for" in line for line in data["sections"][0]["summaries"])


def test_implementation_that_cannot_run_says_why(tmp_path):
    status, data = run_cli(tmp_path, *SMALL, "--implementations=cuda", "--baselines=", "--mode=forward")
    (row,) = rows_of(data)
    assert status == 1 and row["status"] == UNAVAILABLE and "cuda" in row["reason"] and row["median_ms"] is None


@pytest.mark.kernels
@pytest.mark.usefixtures("cuda_on_cpu")
def test_kernels_of_both_folders_are_timed_side_by_side(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(library, "asked_for", lambda: called.append(os.environ.get(library.ARCH)) or "")
    sizes = ["--q_len=16", "--num_q_heads=1", "--num_kv_heads=1", "--head_dim=64", "--dtype=bfloat16", "--num_slots=1", *QUICK]
    kernels = ["--implementations=xla,cuda", "--cuda_arch=sm90,sm80", "--baselines=", "--mode=forward"]
    status, data = run_cli(tmp_path, *sizes, *kernels)
    assert status == 0 and set(by_name(data)) == {(name, "forward") for name in ("xla", "cuda sm90", "cuda sm80")}
    assert set(called) == {"sm90", "sm80"} and library.ARCH not in os.environ


def test_cuda_arch_without_cuda_is_refused(tmp_path):
    with pytest.raises(app.UsageError, match="--cuda_arch=sm80 needs cuda"):
        run_cli(tmp_path, *SMALL, "--cuda_arch=sm80")


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_flags_of_the_gpu_suite_are_those_of_the_benchmark(capability, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "compute_capability", lambda: capability)
    commands = [command for stage in gpu_suite.STAGES.values() for command in stage.commands(tmp_path)]
    benchmarks = [command[3:] for command in commands if command[1:3] == ["-m", "benchmarks.run"]]
    assert len(benchmarks) > 8 and any("--cuda_arch=sm90,sm80" in command for command in benchmarks) == (capability == "9.0")
    for arguments in benchmarks:
        with flagsaver.flagsaver():
            flags.FLAGS(["run", *arguments])
            run.check_flags()
            (section,) = [run.section_of_flags()]
        assert section.workloads and section.contenders


@pytest.fixture
def decode_flags(monkeypatch) -> flags.FlagValues:
    """Flags of the decoding benchmark, apart from those of other programs."""
    own = flags.FlagValues()
    monkeypatch.setattr(decode, "FLAGS", own)
    for kind in ("integer", "float", "list", "enum", "string"):
        define = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(decode.flags, f"DEFINE_{kind}", functools.partial(define, flag_values=own))
    decode.define_flags()
    return own


def test_decoding_is_checked_and_timed(decode_flags, tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    sizes = ["--kv_len=70", "--head_dim=16", "--page_size=8", "--budgets=3", "--repeats=1", f"--json={path}"]
    decode_flags(["decode", *sizes, "--implementations=xla,cuda"])
    assert decode.main(["decode"]) == 0
    rows = {row["contender"]: row for row in json.loads(path.read_text())["rows"]}
    kinds = ("all blocks", "attention", "selection", "both")
    assert set(rows) == {*decode.BASELINES, *(f"{name}, {kind}" for name in ("xla", "cuda") for kind in kinds)}
    for name, row in rows.items():
        is_able = name == "dense-xla" or name.startswith("xla")
        assert row["status"] == (TIMED if is_able else UNAVAILABLE) and bool(row["median_ms"]) == is_able
    # 4 sequences, 2 KV heads; 70 tokens, 3 blocks of 16 of them, and the extrema of 5 blocks.
    token = 4 * 2 * 2 * 16 * 4
    assert [rows[f"xla, {kind}"]["bytes_read"] // token for kind in kinds] == [70, 48, 5, 53]
    assert "| xla, both" in capsys.readouterr().out

    attend = sa.paged_block_sparse_attention
    monkeypatch.setattr(sa, "paged_block_sparse_attention", lambda *x, **options: attend(*x, **options) * 1.1)
    decode_flags(["decode", *sizes])
    assert decode.main(["decode"]) == 1
    status = {row["contender"]: row["status"] for row in json.loads(path.read_text())["rows"]}
    assert [status[f"xla, {kind}"] for kind in kinds] == [WRONG, WRONG, TIMED, WRONG]


@pytest.mark.parametrize("capability, archs", [("8.0", ["sm80"]), ("9.0", ["sm90", "sm80"])])
def test_flags_of_the_decoding_stage_are_those_of_the_benchmark(decode_flags, capability, archs, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "compute_capability", lambda: capability)
    (command,) = gpu_suite.decoding_commands(tmp_path)
    decode_flags(command[2:])
    assert decode_flags.cuda_arch == archs and decode_flags.implementations == ["xla", "cuda"]


def test_wrong_selection_of_decoding_is_seen():
    step = decode.Step(decode.Sizes(1, 70, 2, 1, 16, 8, 16, "float32"), seed=0)
    selector = sa.selectors.Quest(top_k=3)
    lists = selector.select(step.query, step.metadata(), seq_lens=step.seq_lens)
    step.assert_selects(lists, selector)
    other = min({1, 2, 3} - set(np.asarray(lists).ravel().tolist()))
    with pytest.raises(AssertionError):
        step.assert_selects(lists.at[0, 0, 0, 1].set(other), selector)


def test_dense_baseline_stops_at_its_length(tmp_path):
    _, data = run_cli(tmp_path, *SMALL, "--baselines=dense-xla", "--dense_max_len=64", "--mode=forward")
    assert "--dense_max_len=64" in by_name(data)["dense-xla", "forward"]["reason"]


def shifted_causality(query, key, *arguments, **options):
    return attend(query, key, *arguments, **options | dict(q_offset=key.shape[1] - query.shape[1] + 1))


@pytest.mark.skipif(not jax_compat.HAS_MOSAIC_GPU, reason="needs JAX 0.11 or newer")
@pytest.mark.parametrize(
    ("capability", "contender", "stages"),
    [("9.0", "mosaic forward: warpgroups 1, stages 2", [3, 2]), ("8.0", "mosaic forward: stages 2", [4, 2])],
)
def test_configurations_of_a_sweep(capability, contender, stages, mosaic_on_cpu, monkeypatch):
    """Each fits, none is the kernels' own choice, and it is the one that runs; the results are the same."""
    from benchmarks import mosaic_configs
    from sparse_attn_jax.implementations import mosaic

    monkeypatch.setattr(jax_compat, "lowering_compute_capability", lambda: capability)
    modules = mosaic.kernels_of(SimpleNamespace(compute_capability=capability))
    monkeypatch.setattr(mosaic, "kernels_of", lambda problem: modules)
    module = modules[0]
    run, ran = module.attend_slices, []
    record = lambda g, config, inputs: ran.append(config.stages) or run(g, config, inputs)
    monkeypatch.setattr(module, "attend_slices", record)
    sizes = dict(num_q_heads=4, num_kv_heads=2, head_dim=64, q_block_size=1, kv_block_size=16, num_slots=2)
    workload = Workload(sized_case(seed=0, batch=1, q_len=70, kv_len=None, is_causal=True, dtype="bfloat16", **sizes))
    found = {contender.name: contender for contender in mosaic_configs.contenders_for(workload.case)}
    assert len(found) >= 6 and contender in found
    made = workload.make_inputs()
    prepared = [
        contender.prepare(workload, made, "forward").results(made.d_out)["out"]
        for contender in (Implementation("mosaic"), found[contender])
    ]
    assert ran == stages
    np.testing.assert_array_equal(*prepared)


def dropped_block(*arguments, selection, **options):
    return attend(*arguments, selection=dataclasses.replace(selection, indices=selection.indices[..., :-1]), **options)


def wrong_last_query(*arguments, **options):
    return attend(*arguments, **options).at[:, -1].mul(1.01)


def wrong_gradient(query, key, value, **options):
    key = key + 0.01 * (key - jax.lax.stop_gradient(key))  # the gradient of key is 1% too large
    return attend(query, key, value, **options)


def not_a_number(*arguments, **options):
    return attend(*arguments, **options).at[0, 0].set(jnp.nan)


WRONG_ATTENTION = [shifted_causality, dropped_block, wrong_last_query, wrong_gradient, not_a_number]


@pytest.mark.parametrize(
    ("wrong", "is_sampled"),
    [*((wrong, True) for wrong in WRONG_ATTENTION), (shifted_causality, False)],
)
def test_wrong_attention_is_not_timed(tmp_path, monkeypatch, capsys, wrong, is_sampled):
    monkeypatch.setattr(sa, "block_sparse_attention", lambda query, key, value, **options: wrong(query, key, value, **options))
    if is_sampled:
        monkeypatch.setattr(checks, "MAX_REFERENCE_SCORES", 2**12)
    status, data = run_cli(tmp_path, *SMALL, "--baselines=", "--mode=forward_backward", "--generator=local")
    (row,) = rows_of(data)
    assert status == 1 and row["status"] == WRONG and row["median_ms"] is None and row["repeats"] == 0
    assert "error" in row["reason"] or "special values" in row["reason"]
    captured = capsys.readouterr()
    assert "WRONG: " in captured.out and "WRONG: " in captured.err


def test_wrong_baseline_is_not_timed_and_the_others_are(tmp_path, monkeypatch):
    dense = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, is_causal, **y: dense(*x, is_causal=False, **y))
    status, data = run_cli(tmp_path, *SMALL, "--baselines=dense-xla", "--mode=forward")
    rows = by_name(data)
    assert status == 1 and rows["dense-xla", "forward"]["status"] == WRONG and rows["xla", "forward"]["status"] == TIMED
    assert rows["xla", "forward"]["ratios"] == {}


def fails(*arguments, **options):
    raise RuntimeError("no image\nfor this device")


def test_failure_of_ours_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sa, "block_sparse_attention", fails)
    status, data = run_cli(tmp_path, *SMALL, "--baselines=dense-xla")
    rows = by_name(data)
    assert status == 1 and all(rows["dense-xla", mode]["median_ms"] for mode in MODES)
    assert [rows["xla", mode]["status"] for mode in MODES] == [FAILED, FAILED]
    assert rows["xla", "forward"]["reason"] == "no image" and rows["xla", "forward"]["median_ms"] is None
    captured = capsys.readouterr()
    assert "failed: no image" in captured.out and "in fails" in captured.err


def test_failure_in_a_check_leaves_the_others(tmp_path, monkeypatch):
    right = checks.Checker.error_of
    fail_ours = lambda self, contender, *x: fails() if contender.name == "xla" else right(self, contender, *x)
    monkeypatch.setattr(checks.Checker, "error_of", fail_ours)
    status, data = run_cli(tmp_path, *SMALL, "--baselines=dense-xla", "--mode=forward")
    assert status == 1
    assert {name: row["status"] for (name, _), row in by_name(data).items()} == {"xla": FAILED, "dense-xla": TIMED}


def test_baselines_keep_their_times_when_the_device_is_lost(tmp_path, monkeypatch):
    """Everything fails as soon as something of ours runs."""
    lost = []
    time_calls = timing.time_calls
    monkeypatch.setattr(timing, "time_calls", lambda *x: fails() if lost else time_calls(*x))
    right = checks.Checker.error_of
    lose = lambda self, contender, *x: lost.append(1) if contender.name == "xla" else right(self, contender, *x)
    monkeypatch.setattr(checks.Checker, "error_of", lose)
    status, data = run_cli(tmp_path, *SMALL, "--baselines=dense-xla", "--mode=forward")
    rows = by_name(data)
    baseline, ours = rows["dense-xla", "forward"], rows["xla", "forward"]
    assert status == 1 and ours["status"] == FAILED and ours["median_ms"] is None
    assert baseline["status"] == TIMED and baseline["median_ms"] and baseline["repeats"] == 1
    assert "timed before the others; with them: no image" in baseline["reason"]


def test_interruption_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sa, "block_sparse_attention", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_cli(tmp_path, *SMALL, "--baselines=")


def test_json_is_written_after_each_workload(tmp_path, monkeypatch):
    found = tmp_path / "found.json"
    seen = []

    def record(*arguments):
        seen.append(len(rows_of(json.loads(found.read_text()))) if found.exists() else 0)
        return one_after_another(*arguments)

    one_after_another = run.measure
    monkeypatch.setattr(run, "measure", record)
    run_cli(tmp_path, "--cases=group1,odd_prefix", "--baselines=", "--mode=forward", *QUICK)
    assert seen == [0, 1]


def test_files_are_replaced_at_once(tmp_path):
    path = tmp_path / "found.json"
    files.write_json(path, dict(first=1))
    with pytest.raises(TypeError):
        files.write_json(path, dict(second=object()))
    assert json.loads(path.read_text()) == dict(first=1)
    archive = tmp_path / "all.tar.gz"
    for _ in range(2):
        files.write_archive(archive, tmp_path)
    with tarfile.open(archive) as opened:
        assert opened.getnames() == [f"{tmp_path.name}/found.json"]


@pytest.mark.parametrize("change", ["swapped", "dropped"])
def test_wrong_selection_is_not_timed(tmp_path, monkeypatch, change):
    select = sa.selectors.InfLLMV2.__call__

    def wrong(self, query, key, **options):
        selection = select(self, query, key, **options)
        indices = dict(
            swapped=jnp.roll(selection.indices, 1, axis=2),
            dropped=selection.indices.at[..., 0].set(-1),
        )[change]
        return dataclasses.replace(selection, indices=indices)

    monkeypatch.setattr(sa.selectors.InfLLMV2, "__call__", wrong)
    status, data = run_cli(tmp_path, "--op=selection", "--q_len=600", "--num_slots=5", *QUICK)
    (row,) = rows_of(data)
    assert status == 1 and row["status"] == WRONG and row["median_ms"] is None


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
@pytest.mark.parametrize("q_block_size", [1, 64])
def test_torch_flex_computes_the_same(tmp_path, q_block_size):
    sizes = [f"--q_block_size={q_block_size}", "--q_len=200", "--kv_block_size=64", "--num_slots=2"]
    status, data = run_cli(tmp_path, *SMALL, *sizes, "--baselines=torch-flex", "--mode=forward")
    row = by_name(data)["torch-flex", "forward"]
    # A machine without a compiler cannot run it, and says so; a wrong result would be an error.
    assert status == 0 and row["status"] in (TIMED, UNAVAILABLE), row


def test_help_explains_every_flag():
    command = [sys.executable, "-m", "benchmarks.run", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    defined = flags.FLAGS.flags_by_module_dict()
    names = {flag.name for module, found in defined.items() if module.endswith("benchmarks.run") for flag in found}
    assert len(names) > 20 and "Examples:" in result.stdout
    assert [name for name in names if f"--{name}:" not in result.stdout and f"--[no]{name}:" not in result.stdout] == []


@pytest.mark.parametrize(
    "arguments",
    [["--baselines=fast"], ["--implementations=fast"], ["--cases=nothing"], ["--q_len=0"], ["--q_len=x"], ["--op=fly"]],
    ids=" ".join,
)
def test_bad_flag_is_refused(arguments):
    with flagsaver.flagsaver(), pytest.raises(flags.IllegalFlagValueError):
        flags.FLAGS(["run", *arguments])


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float32"][::3], ids=lambda case: case.name)
def test_pairs_are_counted_from_lists(case):
    made = make_inputs(case)
    assert workloads.count_pairs(made, "selected") == compare.mask_of(made).sum()


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(checks, "MAX_REFERENCE_SCORES", 2**10)
    monkeypatch.setattr(checks, "MAX_UNSAMPLED_ROWS", 16)
    monkeypatch.setattr(workloads, "LARGE_SIZE", 0)


LARGE = ["--batch=2", *SMALL, "--num_q_heads=4", "--num_kv_heads=2"]


@pytest.mark.usefixtures("everything_is_large")
def test_of_large_workloads_a_part_is_checked(tmp_path, capsys):
    status, data = run_cli(tmp_path, *LARGE, "--op=both", "--baselines=dense-xla")
    assert status == 0 and {row["status"] for row in rows_of(data)} == {TIMED}
    assert "checked: batch row 1 with KV head 1" in capsys.readouterr().out
    assert data["sections"][0]["workloads"][0]["checked"] == "batch row 1 with KV head 1"


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
def test_wrong_attention_of_a_large_workload_is_seen(tmp_path, monkeypatch, wrong):
    wrong = (lambda *x, **y: attend(*x, **y).at[1, 0].set(jnp.nan)) if wrong is not_a_number else wrong
    monkeypatch.setattr(sa, "block_sparse_attention", lambda query, key, value, **options: wrong(query, key, value, **options))
    status, data = run_cli(tmp_path, *LARGE, "--baselines=", "--mode=forward_backward", "--generator=local")
    assert status == 1 and [row["status"] for row in rows_of(data)] == [WRONG]


@pytest.mark.usefixtures("everything_is_large")
def test_inputs_of_large_workloads_are_like_the_others():
    sizes = dict(batch=2, q_len=512, kv_len=None, num_q_heads=4, num_kv_heads=2, head_dim=16, q_block_size=1, kv_block_size=16)
    case = sized_case(seed=0, num_slots=4, indices="random", is_causal=True, dtype="bfloat16", **sizes)
    drawn, made = workloads.make_inputs(case), make_inputs(case)
    leaves = lambda x: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((x.operands, x.selection, x.d_out, x.d_lse))]
    assert leaves(drawn) == leaves(made) and drawn.options == made.options
    np.testing.assert_array_equal(drawn.selection.indices, made.selection.indices)
    for x in [*drawn.operands.values(), drawn.d_out]:
        assert abs(np.mean(x, dtype=float)) < 0.05 and abs(np.std(x, dtype=float) - 1) < 0.05


def test_tiles_of_a_block_mask():
    chosen = np.random.default_rng(0).random((1, 2, 5, 7)) < 0.6
    chosen[0, 0, :2, 3:6] = True
    some, whole = torch_contenders.tiles_of(chosen, (2, 3))
    assert some.shape == whole.shape == (1, 2, 3, 3) and whole[0, 0, 0, 1] and not whole[:, :, 2].any()
    for tile in np.ndindex(3, 3):
        part = chosen[:, :, 2 * tile[0] : 2 * tile[0] + 2, 3 * tile[1] : 3 * tile[1] + 3]
        np.testing.assert_array_equal(some[:, :, *tile], part.any(axis=(2, 3)))
        assert (whole[:, :, *tile] <= part.all(axis=(2, 3))).all()
    same, all_of_it = torch_contenders.tiles_of(chosen, (1, 1))
    np.testing.assert_array_equal(same, chosen)
    np.testing.assert_array_equal(all_of_it, chosen)


def test_matmul_is_larger_on_a_gpu(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(run, "run_section", lambda section, settings: sizes.append(settings.matmul_size) or [])
    with flagsaver.flagsaver():
        flags.FLAGS(["run", "--baselines="])
        for backend in ("cpu", "gpu"):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
            run.main(["run"])
    assert sizes == [2048, 8192]


def test_selector_runs_by_one_implementation_on_any_gpu(monkeypatch):
    """Also where the order of preference is another."""
    default_order = dispatch.default_order
    monkeypatch.setattr(
        dispatch, "default_order", lambda problem: default_order(dataclasses.replace(problem, compute_capability="8.0"))
    )
    sizes = dict(batch=1, q_len=300, kv_len=None, num_q_heads=2, num_kv_heads=1, head_dim=16, q_block_size=1, kv_block_size=16)
    case = sized_case(seed=0, num_slots=5, indices="random", is_causal=True, dtype="float32", **sizes)
    workload = Workload(case, sa.selectors.InfLLMV2(top_k=5, block_size=16, num_local_blocks=2))
    made = workload.make_inputs()
    found = Selector("xla").prepare(workload, made, "forward").results(made.d_out)["indices"]
    np.testing.assert_array_equal(found, made.selection.indices)
    with pytest.raises(NotImplementedError, match="cuda: "):
        Selector("cuda").prepare(workload, made, "forward")


def test_pairs_of_everything():
    made = make_inputs(case_named("odd_prefix"))
    every_block = np.arange(100)[None, None, None]
    mask = compare.mask_of(made, indices=every_block, q_block_size=1000)
    assert workloads.count_pairs(made, "everything") == mask.sum()


@pytest.mark.parametrize("name", ["everything", "odd_prefix_blocks", "predicate", "q_offset_per_row", "segments_q_kv"])
def test_mask_of_sampled_rows(name):
    made = make_inputs(case_named(name))
    rows = np.array([0, 7, made.d_out.shape[1] - 1])
    np.testing.assert_array_equal(checks.mask_of_rows(made, rows, is_dense=False), compare.mask_of(made)[:, :, rows])


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 2e-3)
    order = []
    calls = {name: lambda name=name: order.append(name) or timing.time.sleep(3e-3) for name in "abc"}
    samples = timing.time_interleaved(calls, repeats=12, seconds=60)
    assert {name: len(times) for name, times in samples.items()} == dict(a=12, b=12, c=12)
    assert "".join(order[:6]) == "aabbcc"  # a warm-up, and a call that says how many make a sample
    assert order[6::2] == order[7::2]  # one call to settle, one to time
    rounds = ["".join(order[start : start + 6 : 2]) for start in range(6, len(order), 6)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3, "the order must change, or one contender always follows the same other"
    assert all(2e-3 < seconds < 1 for times in samples.values() for seconds in times)


def test_calls_are_enqueued_on_an_accelerator(monkeypatch):
    done = []
    call = timing.Enqueued(lambda: done.append("start") or len(done), lambda result: done.append(f"wait for {result}"))
    timing.time_calls(call, 2)
    assert done == ["start", "wait for 1", "start", "wait for 3"]
    done.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    timing.time_calls(call, 2)
    assert done == ["start", "start", "wait for 2"]


def test_call_that_fails_has_no_more_turns():
    made, failed = [], []
    calls = dict(a=lambda: made.append(1), b=lambda: fails() if len(made) > 4 else timing.time.sleep(1e-3))
    timing.time_interleaved(calls, repeats=3, seconds=60, on_failure=lambda name, error: failed.append((name, type(error))))
    assert failed == [("b", RuntimeError)]


def test_timing_stops_when_its_time_is_over():
    samples = timing.time_interleaved({"a": lambda: timing.time.sleep(1e-3)}, repeats=50, seconds=0)
    assert len(samples["a"]) == timing.MIN_ROUNDS


def test_long_calls_are_not_repeated(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 2e-3)
    monkeypatch.setattr(timing, "SHORT_CALL_SECONDS", 1e-3)
    made = []
    timing.time_interleaved({"a": lambda: made.append(1) or timing.time.sleep(3e-3)}, repeats=3, seconds=60)
    assert len(made) == 1 + 3


def test_lengths_of_a_sweep_take_turns(tmp_path, monkeypatch):
    timed_together = []
    time_interleaved = timing.time_interleaved

    def record(calls, **settings):
        timed_together.append(list(calls))
        return time_interleaved(calls, **settings)

    monkeypatch.setattr(timing, "time_interleaved", record)
    # Twice the same length: their times must not end up in one line.
    status, data = run_cli(tmp_path, *SMALL, "--q_len=64,128,64", "--baselines=", "--mode=forward")
    assert status == 0 and [row["q_len"] for row in rows_of(data)] == [64, 128, 64]
    ((*lines, matmul),) = timed_together
    assert len(lines) == 3 and matmul == "matmul"


def test_growth_is_per_doubling():
    def outcome(q_len, ms):
        row = Row(f"{q_len}", q_len, q_len, "attention", "forward", "xla", "implementation", median_ms=ms)
        case = workloads.sized_case(seed=0, q_len=q_len, kv_len=None)
        return Outcome(workloads.Workload(case), [row], None, 1.0)

    (line,) = report.summarize([outcome(1024, 1.0), outcome(4096, 9.0), outcome(8192, 18.0)])
    assert "3.00x, 2.00x over 1,024, 4,096, 8,192 tokens (most: 3.00x)" in line


def test_memory_is_analyzed_without_running():
    sizes = dict(num_q_heads=4, num_kv_heads=1, head_dim=16, num_slots=4, block_size=16)
    found = memory.analyze_all((256,), **sizes)
    # out and the gradients of query, key and value, and a table of four pointers.
    assert (
        found[0]["results_bytes"] == pytest.approx(2 * 256 * 16 * (4 + 4 + 1 + 1), abs=64) and found[0]["temporary_bytes"] > 0
    )
    assert memory.format_memory([found[0], found[0]]).endswith("1.00x |")


def test_readme_preset_has_its_sections():
    sections = presets.readme_sections(seed=0, implementations=["xla"], dense_max_len=16384)
    lengths = [[workload.case.q_len for workload in section.workloads] for section in sections]
    assert lengths == [[8192], [8192, 16384, 32768, 65536], [32768, 32768], [8192]]
    names = [[contender.name for contender in section.contenders] for section in sections]
    assert names == [["xla", "torch-flex", "torch-sdpa"], ["xla"], ["InfLLMV2 xla", "xla"], ["xla", "dense-xla"]]
