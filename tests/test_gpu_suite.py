"""`benchmarks.gpu_suite`: its stages and what becomes of those that fail. What they run needs a GPU."""

import json
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_suite


def suite_results(monkeypatch, tmp_path, *stages, **options) -> tuple[int, dict[str, str]]:
    """Exit status, and results by stage, of the suite with these stages in place of its own."""
    monkeypatch.setattr(gpu_suite, "STAGES", dict(stages))
    monkeypatch.setattr(gpu_suite, "why_no_gpu", lambda: None)
    values = dict(out=str(tmp_path), stage=[], archive=None, time_limit=60) | options
    monkeypatch.setattr(gpu_suite, "FLAGS", SimpleNamespace(**values))
    status = gpu_suite.main(["gpu_suite"])
    return status, {name: found["result"] for name, found in json.loads((tmp_path / "summary.json").read_text()).items()}


def python_stage(*programs: str, **options) -> gpu_suite.Stage:
    return gpu_suite.Stage(lambda out: [[sys.executable, "-c", program] for program in programs], **options)


def test_commands_after_a_failure_are_run(monkeypatch, tmp_path):
    stages = (("one", python_stage("raise SystemExit(7)", "print('second')")), ("two", python_stage("print('third')")))
    status, found = suite_results(monkeypatch, tmp_path, *stages, archive=str(tmp_path / "all.tar.gz"))
    assert status == 1 and found["two"] == "passed"
    assert found["one"].startswith("exit status 7: ") and "second" not in found["one"]
    assert "\nsecond" in (tmp_path / "one.log").read_text()
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {Path(name).name for name in archive.getnames()} == {"one.log", "two.log", "summary.json"}


def test_failed_build_ends_the_suite(monkeypatch, tmp_path):
    stages = (("build", python_stage("raise SystemExit(7)", "print('second')")), ("two", python_stage("print('third')")))
    status, found = suite_results(monkeypatch, tmp_path, *stages)
    assert status == 1 and set(found) == {"build"} and "not run: " in found["build"]
    assert "\nsecond" not in (tmp_path / "build.log").read_text()


def test_without_a_gpu_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "FLAGS", SimpleNamespace(time_limit=60))
    monkeypatch.setattr(gpu_suite, "why_no_gpu", lambda: "JAX has no GPU")
    monkeypatch.setattr(gpu_suite, "STAGES", dict(one=python_stage("print('x')")))
    assert gpu_suite.run_one("one", tmp_path)["result"] == "JAX has no GPU" and not (tmp_path / "one.log").exists()


def test_stage_at_its_limit_may_say_what_it_did(monkeypatch, tmp_path):
    wait = "try: import time; print('at work', flush=True); time.sleep(600)\nexcept KeyboardInterrupt: print('so far so good')"
    (ended, rest) = gpu_suite.run_stage([[sys.executable, "-c", wait], ["never"]], {}, tmp_path / "log", 3.0)
    assert ended.startswith("ended after 3 s: ") and rest == "not run: never"
    assert "\nso far so good" in (tmp_path / "log").read_text()


def test_what_a_command_started_ends_with_it(tmp_path):
    """Also where it does not end itself when it is asked to."""
    start = ["sh", "-c", "trap '' INT; sleep 600 & echo $!"]
    program = f"import subprocess, time; subprocess.run({start}); time.sleep(600)"
    gpu_suite.run_stage([[sys.executable, "-c", program]], {}, tmp_path / "log", 3.0)
    words = (tmp_path / "log").read_text().split()
    child = next(int(word) for word in reversed(words) if word.isdecimal())
    is_alive = lambda: (state := Path(f"/proc/{child}/stat")).exists() and state.read_text().split()[2] != "Z"
    for _ in range(1000):  # a signal takes a moment
        if not is_alive():
            return
        time.sleep(0.01)
    pytest.fail(f"process {child} is there still")


@pytest.mark.parametrize("tool", gpu_suite.SANITIZERS)
def test_sanitizer_that_says_nothing_found_nothing_out(tool, tmp_path):
    assert "does not say" in gpu_suite.sanitizer_complaint(tool, tmp_path)
    report = gpu_suite.sanitizer_report(tool, tmp_path)
    report.write_text("========= ERROR SUMMARY: 1 error\n========= RACECHECK SUMMARY: 2 hazards displayed")
    assert "does not say" in gpu_suite.sanitizer_complaint(tool, tmp_path)
    report.write_text("========= ERROR SUMMARY: 0 errors\n========= RACECHECK SUMMARY: 0 hazards displayed")
    assert gpu_suite.sanitizer_complaint(tool, tmp_path) is None


def test_names_of_variables_are_those_of_this_jaxlib(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for source, name, allocator in (
        ("os.getenv('XLA_CLIENT_MEM_FRACTION'), 'address'", "XLA_CLIENT_MEM_FRACTION", "address"),
        ("os.getenv('XLA_PYTHON_CLIENT_MEM_FRACTION')", "XLA_PYTHON_CLIENT_MEM_FRACTION", "platform"),
    ):
        monkeypatch.setattr(gpu_suite, "client_options", lambda source=source: source)
        assert gpu_suite.beside_torch() == {name: ".45"}
        assert gpu_suite.for_sanitizers()["XLA_PYTHON_CLIENT_ALLOCATOR"] == allocator
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".3")
    assert gpu_suite.beside_torch() == {}
