"""The simulator that runs CUDA sources on a CPU: its own tests, in C++, also under the address and undefined sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).absolute().parent.parent / "csrc"
BUILDS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def run(*command) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("program", ["simulator_test", "sm80_test"])
def test_host_sim(cpp_compiler, tmp_path, program, build):
    binary = tmp_path / program
    sources = [*CSRC.glob("host_sim/*.cc"), CSRC / "host_sim" / "tests" / f"{program}.cc"]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", *BUILDS[build]]
    run(cpp_compiler, *flags, f"-I{CSRC}", *sources, "-o", binary)
    names = run(binary).split()
    source = sources[-1].read_text()
    assert names and source.count("\nTEST(") == len(names)
    run(binary, *names)
    assert subprocess.run([binary, "no_such_test"], capture_output=True).returncode == 1


def test_instructions_are_what_nvcc_makes_of_them(tmp_path):
    """The device branch of each function is the instruction that the simulator stands for."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    listing = tmp_path / "instructions.ptx"
    source = CSRC / "sm80" / "tests" / "instructions.cu"
    run(nvcc, "-std=c++20", "-arch=sm_80", "-Werror", "all-warnings", f"-I{CSRC}", "-ptx", source, "-o", listing)
    kernels = listing.read_text().split(".entry")[1:]
    for kernel, dtype, packed in zip(kernels, ("bf16", "f16"), ("bf16x2", "f16x2"), strict=True):
        for instruction in (
            "cp.async.cg.shared.global.L2::128B",
            "cp.async.commit_group",
            "cp.async.wait_group 0",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
            f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32",
            f"cvt.rn.{packed}.f32",
            "bar.sync",
            "bar.arrive",
            "bar.warp.sync",
            "shfl.sync.idx",
            "shfl.sync.bfly",
            "vote.sync.ballot",
            "ld.shared.u32",
            "st.shared.u32",
            "red.shared.or.b32",
            "popc.b32",
            "clz.b32",
            "st.global.f32",
            "atom.global.add",
            "ex2.approx.ftz.f32",
            "lg2.approx.ftz.f32",
        ):
            assert instruction in kernel, instruction


def test_kernels_compile_without_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = CSRC / "sm80" / "tests" / "kernels.cu"
    command = [
        nvcc,
        "-std=c++20",
        "-arch=sm_80",
        "-Xptxas",
        "-v",
        f"-I{CSRC}",
        "-cubin",
        source,
        "-o",
        tmp_path / "kernels.cubin",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    num_kernels = source.read_text().count("template __global__")
    assert report.count("Compiling entry function") == num_kernels
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == num_kernels, report
