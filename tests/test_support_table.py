"""The support table of the README is what the implementations answer, and what GPUs have passed."""

import json

import pytest

from tools import support_table

pytestmark = pytest.mark.kernels


def test_readme_has_the_table(cuda_on_cpu):
    text = support_table.README.read_text()
    assert support_table.with_table(text) == text, "run `python -m tools.support_table`"


def test_rows_hold_each_variant_once(monkeypatch):
    def reasons(name, problem):
        is_able = problem.head_dim == 64 or (problem.head_dim in (96, 128) and problem.kv_block_size == 16)
        return () if is_able and problem.dtype != "float64" else ("no",)

    monkeypatch.setattr(support_table.dispatch, "reasons_against", reasons)
    assert support_table.supported("cuda", support_table.attention, platform="cpu") == [
        ("float16, bfloat16, float32", "64", "any"),
        ("float16, bfloat16, float32", "96, 128", "16"),
    ]


@pytest.mark.parametrize(
    "found, capability, expected", [("passed", "9.0", ["H"]), ("passed", "8.0", []), ("exit status 1", "9.0", [])]
)
def test_gpus_whose_tests_passed(found, capability, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(support_table, "RESULTS", tmp_path)
    assert support_table.devices_of(["9.0"]) == []
    for name, stages in dict(
        built=dict(build=dict(result="passed", device="B", compute_capability="9.0")),
        tested=dict(conformance=dict(result=found, device="H", compute_capability=capability)),
    ).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(stages))
    assert support_table.devices_of(["9.0"]) == expected
