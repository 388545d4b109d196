"""The compiled extension, on a machine without a GPU: the code that nvcc made of every kernel, and the Python module."""

import collections
import itertools
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest

from sparse_attn_jax.implementations.cuda import library
from tools import kernel_table
from tools.find_nvcc import find_nvcc
from tools.kernel_table import MULTIPROCESSORS, ROOT

# By the folder of a kernel's source.
ARCHITECTURES = {"": {"sm_80", "sm_90a"}, "sm80": {"sm_80", "sm_90a"}, "sm90": {"sm_90a"}}


def folder_of(name: str) -> str:
    return name.split("::")[0] if "::" in name else ""


@pytest.fixture(scope="module")
def extension():
    path = kernel_table.built_extension()
    if path is None:
        pytest.skip("`make cuda` compiles the kernels")
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cc", ".cu", ".cuh")]
    sources = [file for file in sources if not {"host_sim", "tests"} & set(file.parts)]
    if max(file.stat().st_mtime for file in sources) > path.stat().st_mtime:
        pytest.skip("the compiled kernels are older than their sources; `make cuda` compiles them")
    return path


@pytest.fixture(scope="module")
def all_code(extension):
    if kernel_table.find_cuobjdump() is None:
        pytest.skip("needs cuobjdump and nvdisasm, which `make cuda` brings")
    return kernel_table.read_code(extension)


def test_every_kernel_is_compiled_for_its_architectures(extension, all_code):
    launched = {kernel["config"] for kernel in json.loads(kernel_table.load_extension(extension).kernels())}
    assert len(launched) > 80
    compiled = collections.defaultdict(set)
    for code in all_code:
        compiled[code.config].add(code.arch)
    assert compiled == {config: ARCHITECTURES[folder_of(config)] for config in map(kernel_table.short_name, launched)}


def test_other_gpus_compile_the_kernels_themselves(extension, all_code):
    """The PTX of compute capability 8.0 is there."""
    listing = subprocess.run([kernel_table.find_cuobjdump(), "--list-ptx", extension], capture_output=True, text=True).stdout
    assert ".sm_80.ptx" in listing


def test_no_kernel_uses_local_memory(all_code):
    for code in all_code:
        assert code.stack_bytes == 0 and code.local_bytes == 0, code
        assert code.instructions["LDL"] == 0 and code.instructions["STL"] == 0, code


def test_kernels_fit(all_code):
    for code in all_code:
        assert code.static_shared_bytes == 0, code
        assert code.blocks >= 1, code


def test_products_are_made_by_tensor_cores(all_code):
    products = {"sm80": {"HMMA", "LDSM"}, "sm90": {"HGMMA"}}
    for code in all_code:
        needed = products.get(folder_of(code.kernel), set())
        assert all(code.instructions[instruction] > 0 for instruction in needed), code


def test_products_of_warpgroups_do_not_wait_for_each_other(all_code):
    """Where the compiler cannot follow the sums, it begins and awaits each by itself, and says so where no build shows it."""
    for code in all_code:
        if folder_of(code.kernel) == "sm90":
            assert 0 < code.instructions["WARPGROUP"] < code.instructions["HGMMA"], code


def test_registers_move_between_warpgroups(all_code):
    """Of two alone on a multiprocessor, each thread has all that it can name. The compiler may ignore `setmaxnreg`."""
    for code in all_code:
        moves = folder_of(code.kernel) == "sm90" and "Warpgroups<1, 1>" not in code.config
        assert code.instructions["USETMAXREG"] == 2 * moves, code


def test_table_is_that_of_the_sources(extension, all_code):
    new = kernel_table.table(all_code, kernel_table.nvcc_version(extension))
    differences = kernel_table.differences(kernel_table.TABLE.read_text(), new)
    assert not differences, "`make kernel-table` writes docs/kernel_table.md:\n" + "\n".join(differences)


def test_tables_of_different_compilers_differ_in_registers_only():
    old = "Compiled by nvcc 13.0.88.\n| kernel |\n| a | b | 128 | 1024 | 100 | 4 |\n"
    other_registers = old.replace("100", "101")
    assert kernel_table.differences(old, other_registers)
    assert not kernel_table.differences(old, other_registers.replace("13.0.88", "13.5.37"))
    assert kernel_table.differences(old, old.replace("13.0.88", "13.5.37").replace("1024", "1025"))


OCCUPANCY = r"""
#include <cuda_runtime.h>
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major, threads, registers;
  size_t shared, most_shared, of_block;
  while (std::scanf("%d %zu %zu %d %d %zu", &major, &shared, &most_shared, &threads, &registers, &of_block) == 6) {
    cudaOccDeviceProp gpu;
    gpu.computeMajor = major;
    gpu.computeMinor = 0;
    gpu.maxThreadsPerBlock = 1024;
    gpu.maxThreadsPerMultiprocessor = 2048;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
    gpu.warpSize = 32;
    gpu.sharedMemPerBlock = 48 * 1024;
    gpu.sharedMemPerMultiprocessor = shared;
    gpu.sharedMemPerBlockOptin = most_shared;
    gpu.reservedSharedMemPerBlock = 1024;
    gpu.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = of_block;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, threads, of_block);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    source, program = tmp_path / "occupancy.cu", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run([nvcc, source, "-o", program], check=True)
    shapes = itertools.product((32, 64, 128, 256, 384), range(24, 256, 9), range(0, 228 * 1024, 5000))
    calls = [(arch, *shape) for shape in shapes for arch in MULTIPROCESSORS]
    calls = [call for call in calls if call[3] <= MULTIPROCESSORS[call[0]].most_shared_bytes]
    lines = [
        f"{arch[3]} {MULTIPROCESSORS[arch].shared_bytes} {MULTIPROCESSORS[arch].most_shared_bytes} {' '.join(map(str, shape))}"
        for arch, *shape in calls
    ]
    said = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout.split()
    assert [MULTIPROCESSORS[arch].blocks_of(*shape) for arch, *shape in calls] == [int(blocks) for blocks in said]
    assert len(set(said)) > 10


def test_module_has_the_variants_and_the_calls(extension, cuda_on_cpu):
    """The table is that of the same sources in the simulator."""
    module = kernel_table.load_extension(extension)
    assert library._read_variants(module.variants()) == library.load("cpu")
    assert set(module.registrations()) == set(library.CUSTOM_CALL_TARGETS)


@pytest.mark.parametrize("target", library.CUSTOM_CALL_TARGETS)
def test_custom_call_without_a_gpu_is_an_error(extension, target):
    """Registered for a CPU under another name, where XLA has no stream to give."""
    name = f"{target}_without_gpu"
    jax.ffi.register_ffi_target(name, kernel_table.load_extension(extension).registrations()[target], platform="cpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)INVALID_ARGUMENT.*GPU context is not available"):
        jax.block_until_ready(jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((), jnp.float32))(jnp.zeros(3)))


LAUNCH = """
#include <cstdio>

#include "common/launch.cuh"

struct Config {
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = SHARED_BYTES;
};

__global__ void kernel(int) {}

int main() {
  for (const sparse_attn::Grid& grid : {sparse_attn::Grid{1, 1, 1}, {1, 0, 1}, {1, 1, 65536}}) {
    const sparse_attn::Status status = sparse_attn::launch<Config>(kernel, grid, 1, {nullptr});
    std::puts(status ? status->c_str() : "launched");
  }
}
"""


@pytest.mark.parametrize("shared_bytes", [1024, 100 * 1024])
def test_launch_returns_what_cuda_says(tmp_path, shared_bytes):
    """That there is no GPU, where there is none. A grid without blocks is not launched, nor is one that is too large."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    source, program = tmp_path / "launch.cu", tmp_path / "launch"
    source.write_text(LAUNCH)
    flags = ["-std=c++20", "-arch=sm_80", f"-I{ROOT / 'csrc'}", f"-DSHARED_BYTES={shared_bytes}", "-Werror", "all-warnings"]
    subprocess.run([nvcc, *flags, source, "-o", program], check=True)
    one, none, many = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert one == "launched" if shutil.which("nvidia-smi") else re.match("cudaError(NoDevice|InsufficientDriver): .+", one)
    assert none == "launched"
    assert many.startswith("a grid of 1 x 1 x 65536 blocks")
