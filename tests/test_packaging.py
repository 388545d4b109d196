"""The package as it is installed: its version, its dependencies, and what importing it loads."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import sparse_attn_jax as sa

ROOT = Path(__file__).absolute().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
