"""The simulator that runs CUDA sources on a CPU: its own tests, in C++, also under the address and undefined sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attn_jax.implementations.cuda import host_sim
from tools.mutants.build import simulator_of_few_variants

pytestmark = pytest.mark.kernels

CSRC = Path(__file__).absolute().parent.parent / "csrc"
BUILDS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def run(*command, env=None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("build", BUILDS)
def test_host_sim(cpp_compiler, tmp_path, build):
    simulator = sorted(CSRC.glob("host_sim/*.cc"))
    programs = [CSRC / "host_sim" / "tests" / f"{name}_test.cc" for name in ("simulator", "sm80", "sm90")]
    objects = {source: tmp_path / f"{source.stem}.o" for source in (*simulator, *programs)}
    for source, made in objects.items():
        flags = ("-std=c++20", "-Wall", "-Wextra", "-Werror", *BUILDS[build], f"-I{CSRC}")
        run(cpp_compiler, *flags, "-c", source, "-o", made)
    for source in programs:
        binary = tmp_path / source.stem
        run(cpp_compiler, *BUILDS[build], *(objects[part] for part in (*simulator, source)), "-o", binary)
        names = run(binary).split()
        assert names and source.read_text().count("\nTEST(") == len(names)
        run(binary, *names)
        assert subprocess.run([binary, "no_such_test"], capture_output=True).returncode == 1


# Every kernel, forward and backward, of both folders; lists that name blocks which do not exist. The variants are those that
# together take every path: accesses do not depend on which of the two dtypes of 16 bits it is, for one.
VARIANT = "every_variant and bfloat16 and (64 or 256)"
SANITIZED_TESTS = {
    "test_cuda_on_cpu.py": "oracle and (everything or bf16_d64) or halves_of and 64-256 or 2147483648 or 268435456",
    "test_cuda_selection_on_cpu.py": f"({VARIANT}) or empty_lengths or ties_in",
    "test_cuda_planning_on_cpu.py": "many_tiles or tile_does_not or more_blocks_than_threads or do_not_exist or handlers",
    "test_cuda_paged_on_cpu.py": f"({VARIANT}) or counts or bad_physical or (any_length and 2147483647)",
    "test_cuda_bounds_on_cpu.py": f"({VARIANT}) or test_limits or in_pages",
}


def test_kernels_under_the_sanitizers(cpp_compiler):
    """The handlers and the kernels, in a library in which the address and undefined sanitizers watch every access."""
    # What the library needs to be there before Python is; libstdc++, because the runtime looks for its exceptions.
    runtimes = (
        run(cpp_compiler, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    )
    library = simulator_of_few_variants("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    settings = dict(LD_PRELOAD=":".join(runtimes), ASAN_OPTIONS="detect_leaks=0", SPARSE_ATTN_HOST_SIM=str(library))
    for file, chosen in SANITIZED_TESTS.items():
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            Path(__file__).parent / file,
            "-k",
            chosen,
        ]
        run(*tests, env=os.environ | settings)


def test_another_jaxlib_gets_a_library_of_its_own(cpp_compiler, monkeypatch, tmp_path):
    """A jaxlib refuses handlers made with the headers of a newer one."""
    libraries = []

    def compile_nothing(command, **_):
        libraries.extend(["-shared"] if "-shared" in command else [])
        Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(host_sim, "_folder", lambda: tmp_path)
    monkeypatch.setattr(host_sim.subprocess, "run", compile_nothing)
    first = host_sim.build()
    assert host_sim.build() == first and len(libraries) == 1
    monkeypatch.setattr(host_sim.jaxlib.version, "__version__", "0.0.1")
    assert host_sim.build() != first and len(libraries) == 2


def compile_with_nvcc(source, made, *flags) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    return run(nvcc, "-std=c++20", "-Werror", "all-warnings", f"-I{CSRC}", *flags, source, "-o", made)


def test_instructions_are_what_nvcc_makes_of_them(tmp_path):
    """The device branch of each function is the instruction that the simulator stands for."""
    listing = tmp_path / "instructions.ptx"
    compile_with_nvcc(CSRC / "sm80" / "tests" / "instructions.cu", listing, "-arch=sm_80", "-ptx")
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


def test_sm90_instructions_are_what_nvcc_makes_of_them(tmp_path):
    listing = tmp_path / "instructions.ptx"
    compile_with_nvcc(CSRC / "sm90" / "tests" / "instructions.cu", listing, "-arch=sm_90a", "-ptx")
    kernels = listing.read_text().split(".entry")[1:]
    products = {f"m64n{n}k16.f32.{t}.{t}": 0 for n in (8, 16, 32, 64, 96, 128, 192, 256) for t in ("bf16", "f16")}
    copies = {f"{rank}d": 0 for rank in (2, 3, 4, 5)}
    for kernel in kernels:
        lines = [line.strip() for line in kernel.splitlines()]
        if "wgmma.mma_async" in kernel:
            started = [line for line in lines if line.startswith("wgmma.mma_async.sync.aligned.")]
            (shape,) = {line.split(" ")[0].removeprefix("wgmma.mma_async.sync.aligned.") for line in started}
            products[shape] += 1
            # scale-a and scale-b, then which of the operands in shared memory are MN-major.
            ends = ["p, 1, 1, 0, 1;", "p, 1, 1, 1, 0;", "p, 1, 1, 1;", "p, 1, 1, 0;"]
            assert [line[line.index("p,") :] for line in started] == ends
            num_sums = int(shape.split("k")[0].removeprefix("m64n")) // 2
            assert [line.count("%f") for line in started] == [num_sums] * 4
            order = [line.split(" ")[0].rstrip(";") for line in lines if line.startswith("wgmma")]
            assert order[0] == "wgmma.fence.sync.aligned" and order[-2:] == [
                "wgmma.commit_group.sync.aligned",
                "wgmma.wait_group.sync.aligned",
            ]
        else:
            rank = next(rank for rank in copies if f"bulk.tensor.{rank}" in kernel)
            copies[rank] += 1
            for instruction in (
                "mbarrier.init.shared::cta.b64",
                "fence.mbarrier_init.release.cluster",
                "mbarrier.arrive.shared::cta.b64 _,",
                "mbarrier.arrive.expect_tx.shared::cta.b64 _,",
                "mbarrier.try_wait.parity.shared::cta.b64",
                "fence.proxy.async.shared::cta",
                "prefetch.tensormap",
                f"cp.async.bulk.tensor.{rank}.shared::cluster.global.tile.mbarrier::complete_tx::bytes",
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
                f"cp.async.bulk.tensor.{rank}.global.shared::cta.tile.bulk_group",
                f"cp.reduce.async.bulk.tensor.{rank}.global.shared::cta.add.tile.bulk_group",
                "cp.async.bulk.commit_group",
                "cp.async.bulk.wait_group.read 1;",
                "cp.async.bulk.wait_group 0;",
                "stmatrix.sync.aligned.m8n8.x4.shared.b16",
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
                "elect.sync",
                "setmaxnreg.dec.sync.aligned.u32 24;",
                "setmaxnreg.inc.sync.aligned.u32 240;",
            ):
                assert instruction in kernel, instruction
    assert set(products.values()) == set(copies.values()) == {1}


def test_sm90_instructions_assemble(tmp_path):
    """No spills, no copies of tensor maps, and no word of products that wait for each other or setmaxnreg ignored."""
    source = CSRC / "sm90" / "tests" / "instructions.cu"
    report = compile_with_nvcc(source, tmp_path / "instructions.cubin", "-arch=sm_90a", "-Xptxas", "-v", "-cubin")
    assert report.count("Compiling entry function") == 20
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 20, report
    assert "Potential Performance Loss" not in report, report
