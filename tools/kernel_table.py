"""What nvcc made of the CUDA kernels: registers, memory, occupancy and instructions, out of the compiled extension.

`make kernel-table` writes docs/kernel_table.md; tests/test_compiled_kernels.py compares it with a new build.
"""

import collections
import dataclasses
import difflib
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tools.find_nvcc import candidates

ROOT = Path(__file__).absolute().parent.parent
# Of `make cuda` and of `make cuda-wheel`.
BUILDS = (ROOT / "build" / "cuda", ROOT / "build" / "wheel")
TABLE = ROOT / "docs" / "kernel_table.md"

# Matrix products and their loads by architecture; accesses to local memory, which are what spills become; what begins and
# awaits products of a warpgroup (WARPGROUP.ARRIVE, WARPGROUP.DEPBAR), and what moves registers between warpgroups.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "LDL", "STL", "WARPGROUP", "USETMAXREG")
COMPILED_BY = re.compile("Compiled by nvcc ([0-9.]+)[.]")
INSTRUCTION = re.compile(rf"\b({'|'.join(INSTRUCTIONS)})\b")


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities"); the defaults are of 8.0 and 9.0."""

    shared_bytes: int
    most_shared_bytes: int  # of a block
    reported_shared_bytes: int = 0  # what cuobjdump reports of a kernel that has none
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    partitions: int = 4  # among which warps and registers are split evenly
    register_unit: int = 256  # in which a warp's registers are allocated
    shared_unit: int = 128
    reserved_shared_bytes: int = 1024  # per block

    def blocks_of(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks that run at the same time."""
        warps = -(-threads // 32)
        registers_per_warp = _round_up(32 * registers, self.register_unit)
        warps_by_registers = self.registers // self.partitions // registers_per_warp * self.partitions
        shared = _round_up(shared_bytes + self.reserved_shared_bytes, self.shared_unit)
        if shared_bytes > self.most_shared_bytes:
            return 0
        return min(self.blocks, self.warps // warps, warps_by_registers // warps, self.shared_bytes // shared)


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 * 1024, most_shared_bytes=163 * 1024),
    "sm_90a": Multiprocessor(shared_bytes=228 * 1024, most_shared_bytes=227 * 1024, reported_shared_bytes=1024),
}


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel for one architecture."""

    config: str  # sm80::ForwardConfig<BFloat16, 64, 16, 4>, which the kernel is a template over
    kernel: str  # sm80::attention_forward; without the folder, one of csrc/common
    arch: str
    threads: int
    dynamic_shared_bytes: int | None  # None: each call says
    static_shared_bytes: int
    registers: int
    stack_bytes: int
    local_bytes: int
    instructions: collections.Counter

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds, where the calls' shared memory lets it."""
        shared_bytes = (self.dynamic_shared_bytes or 0) + self.static_shared_bytes
        return MULTIPROCESSORS[self.arch].blocks_of(self.threads, self.registers, shared_bytes)

    @property
    def warps(self) -> int:
        return self.blocks * -(-self.threads // 32)


def built_extension() -> Path | None:
    """What was built last for this Python."""
    paths = (build / "csrc" / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}" for build in BUILDS)
    return max((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime, default=None)


def load_extension(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuobjdump() -> Path | None:
    return next(candidates("cuobjdump"), None)


def nvcc_version(extension: Path) -> str:
    """Of the nvcc that CMake compiled it with."""
    text = next(extension.parents[1].glob("CMakeFiles/*/CMakeCUDACompiler.cmake")).read_text()
    return re.search(r'CMAKE_CUDA_COMPILER_VERSION "([^"]+)"', text)[1]


def read_code(extension: Path) -> list[Code]:
    """Every kernel of the extension, for every architecture that it was compiled for."""
    launches = {short_name(kernel["config"]): kernel for kernel in json.loads(load_extension(extension).kernels())}
    resources = dict(_resources(extension))
    instructions = _instructions(extension)
    names = _demangled(sorted({symbol for _, symbol in resources}))
    all_code = []
    for (arch, symbol), found in resources.items():
        kernel, config = re.match(r"void ([\w:]+)<(.*)>\(", names[symbol]).groups()
        launch = launches[config]
        all_code.append(
            Code(
                config=config,
                kernel=kernel,
                arch=arch,
                threads=launch["threads"],
                dynamic_shared_bytes=launch["shared_bytes"],
                # None at all is reported where no kernel of the source file uses any.
                static_shared_bytes=found["SHARED"] and found["SHARED"] - MULTIPROCESSORS[arch].reported_shared_bytes,
                registers=found["REG"],
                stack_bytes=found["STACK"],
                local_bytes=found["LOCAL"],
                instructions=instructions[arch, symbol],
            )
        )
    return sorted(all_code, key=lambda code: (code.kernel, _by_number(code.config), code.arch))


def short_name(name: str) -> str:
    """A C++ name without the namespaces that all share, and without blanks between closing brackets."""
    return re.sub(r"> +(?=>)", ">", name.replace("sparse_attn::", "").replace("ptx::", ""))


def _by_number(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _demangled(symbols: list[str]) -> dict[str, str]:
    shown = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return {symbol: short_name(name) for symbol, name in zip(symbols, shown.splitlines(), strict=True)}


def _lines(*command) -> Iterator[str]:
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def _resources(extension: Path) -> Iterator[tuple[tuple[str, str], dict[str, int]]]:
    """((architecture, symbol), {"REG": ...}) of each kernel."""
    arch = symbol = None
    for line in _lines(find_cuobjdump(), "--dump-resource-usage", extension):
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            symbol = found[1]
        elif "REG:" in line:
            yield (arch, symbol), {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def _instructions(extension: Path) -> dict[tuple[str, str], collections.Counter]:
    counts = collections.defaultdict(collections.Counter)
    arch = counter = None
    for line in _lines(find_cuobjdump(), "--dump-sass", extension):
        if found := INSTRUCTION.search(line):
            counter[found[1]] += 1
        elif found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\w+)", line):
            counter = counts[arch, found[1]]
    return counts


def table(all_code: list[Code], version: str) -> str:
    """The Markdown table, a row per kernel."""
    archs = sorted({code.arch for code in all_code})
    head = ["kernel", "configuration", "threads", "shared bytes"]
    head += [f"{arch} {what}" for arch in archs for what in ("registers", "blocks", "warps")]
    lines = [
        "# What nvcc makes of the kernels",
        "",
        "Registers of a thread, dynamic shared memory of a block, and how many blocks and warps a multiprocessor holds.",
        "Where each call says how much shared memory it needs, they are those that registers allow. No kernel spills, uses",
        "local memory, or has static shared memory. `make kernel-table` writes this page; a test compares it with a build.",
        "",
        f"Compiled by nvcc {version}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * 2 + " ---: |" * (len(head) - 2),
    ]
    rows = collections.defaultdict(dict)
    for code in all_code:
        rows[code.kernel, code.config][code.arch] = code
    for (kernel, config), by_arch in rows.items():
        first = next(iter(by_arch.values()))
        shared_bytes = "per call" if first.dynamic_shared_bytes is None else first.dynamic_shared_bytes
        cells = [kernel, f"`{config.removeprefix(kernel.split('::')[0] + '::')}`", first.threads, shared_bytes]
        for arch in archs:
            code = by_arch.get(arch)
            cells += [code.registers, code.blocks, code.warps] if code else ["", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def differences(old: str, new: str) -> list[str]:
    """Lines of two tables that do not agree. Registers, and what follows from them, are one compiler's."""

    def rows(text):
        lines = text.splitlines()
        if COMPILED_BY.search(old)[1] == COMPILED_BY.search(new)[1]:
            return lines
        return [line if line.startswith("| kernel") else "|".join(line.split("|")[:5]) for line in lines if "nvcc" not in line]

    return [line for line in difflib.unified_diff(rows(old), rows(new), "committed", "built", lineterm="", n=0)]


def main() -> None:
    extension = built_extension()
    if extension is None or find_cuobjdump() is None:
        sys.exit("kernel_table: there is no compiled extension, or no cuobjdump to read it; `make cuda` brings both")
    TABLE.write_text(table(read_code(extension), nvcc_version(extension)))


if __name__ == "__main__":
    main()
