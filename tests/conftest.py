"""Settings that have to be made before jax is imported, and hypothesis profiles."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Sharding is tested on eight devices that share the CPU.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# The first example of a test compiles, so time says nothing about an example.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def cpp_compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        assert not os.environ.get("CI"), "CI needs g++"
        pytest.skip("needs g++, of version 12 or newer")
    return found


@pytest.fixture(scope="session")
def simulated_kernels(cpp_compiler, tmp_path_factory) -> ctypes.CDLL:
    """The CUDA kernels' custom calls, built for the simulator: handlers for platform "cpu"."""
    import jax

    csrc = Path(__file__).absolute().parent.parent / "csrc"
    made = tmp_path_factory.mktemp("host_sim") / "libsparse_attn_host_sim.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    sources = [*csrc.glob("host_sim/*.cc"), csrc / "ffi" / "handlers.cc", csrc / "launchers.cc"]
    sources += ["-x", "c++", *csrc.glob("sm*/launchers.cu")]
    command = [cpp_compiler, *flags, f"-I{csrc}", "-isystem", jax.ffi.include_dir(), *sources, "-o", made]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return ctypes.cdll.LoadLibrary(str(made))
