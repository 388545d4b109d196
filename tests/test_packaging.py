"""The package as it is installed: its version, its dependencies, and what importing it loads."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparse_attn_jax as sa
from tools import find_nvcc

ROOT = Path(__file__).absolute().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_version_is_the_same_everywhere():
    assert sa.__version__ == PROJECT["version"]
    module = (ROOT / "MODULE.bazel").read_text()
    assert re.search(r'version = "([^"]+)"', module)[1] == PROJECT["version"]


def test_types_are_published():
    assert (Path(sa.__file__).parent / "py.typed").exists()


def test_jax_has_no_upper_pin():
    assert [name for name in PROJECT["dependencies"] if name.startswith("jax") and ("<" in name or "==" in name)] == []


def test_import_loads_only_what_is_needed():
    """What only tests, plots and examples use stays out of a user's process."""
    code = "import sys, sparse_attn_jax; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert loaded & {"sparse_attn_jax.testing", "hypothesis", "jaxtyping", "beartype", "matplotlib", "tqdm", "torch"} == set()


def test_kernels_are_compiled_against_the_oldest_jaxlib():
    (override,) = PYPROJECT["tool"]["scikit-build"]["overrides"]
    (jax,) = [name for name in PROJECT["dependencies"] if re.match("jax[^a-z]", name)]
    assert override["build"]["requires"] == [jax.replace("jax>=", "jaxlib==")]


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """Makes a toolkit whose nvcc says it is of some version, and which is looked into first."""
    found = []
    monkeypatch.setattr(find_nvcc, "candidates", lambda program: (root / "bin" / program for root in found))

    def make(folder: str, version: str, parts=find_nvcc.PARTS) -> Path:
        root = tmp_path / folder
        for part in ("bin", *parts):
            (root / part).mkdir(parents=True)
        nvcc = root / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1")
        nvcc.chmod(0o755)
        found.append(root)
        return nvcc

    return make


def test_nvcc_of_an_old_cuda_is_passed_over(toolkits):
    toolkits("old", "12.9")
    assert find_nvcc.find_nvcc() is None
    new = toolkits("new", "13.0")
    assert find_nvcc.find_nvcc() == new


def test_nvcc_without_the_rest_of_its_packages_is_passed_over(toolkits):
    toolkits("python/site-packages/nvidia/cu13", "13.5", parts=find_nvcc.PARTS[1:])
    assert find_nvcc.find_nvcc() is None
    whole = toolkits("other/site-packages/nvidia/cu13", "13.5")
    assert find_nvcc.find_nvcc() == whole
