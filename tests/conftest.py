"""Settings that have to be made before jax is imported, and hypothesis profiles."""

import ctypes
import faulthandler
import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Sharding is tested on eight devices that share the CPU.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# A compiled simulator for the tests that want one; "1": they make it.
SIMULATOR = os.environ.get("SPARSE_ATTN_HOST_SIM") or os.environ.get("TEST_SIMULATOR", "1")

# The first example of a test compiles, so time says nothing about an example.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser) -> None:
    parser.addoption("--cases", type=int, help="At most so many cases of each parametrized test, evenly spaced.")


def pytest_collection_modifyitems(config, items) -> None:
    most = config.getoption("--cases")
    if most is None:
        return
    by_test = {}
    for item in items:
        by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {item for cases in by_test.values() for item in cases[:: max(1, -(-len(cases) // most))]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def cpp_compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        assert not os.environ.get("CI"), "CI needs g++"
        pytest.skip("needs g++, of version 12 or newer")
    return found


@pytest.fixture
def cuda_on_cpu(request, monkeypatch) -> None:
    """`implementation="cuda"` runs on the simulator; or on a GPU, with JAX_PLATFORMS=cuda,cpu where there is one."""
    import jax

    if jax.default_backend() == "gpu":
        return
    request.getfixturevalue("simulator")
    monkeypatch.setenv("SPARSE_ATTN_HOST_SIM", SIMULATOR)


@pytest.fixture
def mosaic_on_cpu() -> Iterator[None]:
    """`implementation="mosaic"` runs in JAX's interpreter of GPUs, which finds races; or on a GPU, where there is one."""
    import jax

    from sparse_attn_jax import jax_compat

    if not jax_compat.HAS_MOSAIC_GPU:
        pytest.skip("needs JAX 0.11 or newer")
    if jax.default_backend() == "gpu":
        yield
        return
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX 0.11 wants every barrier to be waited for once more at the end")
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from mosaic_interpreter import interpreted_kernels

    # Threads that wait for each other for ever end the process, with a word of where they are.
    faulthandler.dump_traceback_later(600, exit=True)
    with interpreted_kernels():
        yield
    faulthandler.cancel_dump_traceback_later()
    interpret_pallas_call.reset_gpu_interpret_mode_state()  # as after an exception it has to be


# The fields of `Counters` in csrc/host_sim/simulator.h, in their order.
COUNTERS = (
    "global_loaded",
    "global_stored",
    "shared_loaded",
    "shared_stored",
    "matrix_instructions",
    "flops",
    "copied",
    "operands",
)


@pytest.fixture
def counters_of(cuda_on_cpu, simulated_kernels):
    """A function that calls another, and returns what the simulator counted in each launch meanwhile."""
    take = simulated_kernels.host_sim_take_counters
    take.restype = ctypes.c_bool
    counters = (ctypes.c_uint64 * len(COUNTERS))()

    def run(compute) -> list[dict[str, int]]:
        while take(counters):
            continue
        compute()
        found = []
        while take(counters):
            found.append(dict(zip(COUNTERS, counters)))
        return found

    return run


@pytest.fixture(scope="session")
def simulator(cpp_compiler) -> str:
    """The library that the simulator runs. If it does not compile, that is tried once, not by every test."""
    from sparse_attn_jax.implementations.cuda import host_sim

    return str(host_sim.build()) if SIMULATOR == "1" else SIMULATOR


@pytest.fixture(scope="session")
def simulated_kernels(simulator) -> ctypes.CDLL:
    """The simulator's handlers, for platform "cpu"."""
    return ctypes.CDLL(simulator)
