"""Compiles the simulator with all mutants of one source in it, between which a variable chooses.

Of the kernels' variants only a few are compiled, and what the source does not reach is compiled once.
"""

import concurrent.futures
import dataclasses
import re
import subprocess
from pathlib import Path

import jax

from sparse_attn_jax.implementations.cuda import host_sim
from tools.mutants.rules import SWITCH, Mutant, with_switch

CSRC = host_sim.CSRC
FLAGS = ("-std=c++20", "-fPIC", "-w", "-fno-gnu-unique", "-DSPARSE_ATTN_FLOAT16=0", "-x", "c++")

# By head_dim the KV block sizes: every path through the kernels, no more. Blocks of 128 have the SM80 kernels of 64.
VARIANTS = {64: (16, 64, 128), 256: (64,)}
DTYPE = "bfloat16"
# Where the variants are listed.
LISTS = "common/variants.cuh"
# Functions that are one instruction each, and code of the host.
NOT_MUTATED = ("ptx.cuh", "launch.cuh", "launchers.cuh", "variants.cuh")


def mutated_sources() -> list[Path]:
    """The files whose mutants are tested: device code, but for `NOT_MUTATED`."""
    return [path for path in sorted(CSRC.glob("*/*.cuh")) if path.name not in NOT_MUTATED]


def with_few_variants(source: str) -> str:
    """The text of the lists of variants, with `VARIANTS` only."""

    def few(match):
        sizes = VARIANTS.get(int(match[1]), ())
        return f"add_attention<kArch, Variant, T, {match[1]}, {', '.join(map(str, sizes))}>(all);" if sizes else ""

    text = re.sub(r"add_attention<kArch, Variant, T, (\d+), ([\d, ]+)>\(all\);", few, source)
    head_dims = ", ".join(map(str, VARIANTS))
    for add in ("add_selection", "add_paged"):
        text = re.sub(rf"{add}<kArch, Variant, T, [\d, ]+>\(all\);", f"{add}<kArch, Variant, T, {head_dims}>(all);", text)
    return text


def write_few_variants(folder: Path) -> None:
    """Makes `folder` one that, before csrc among those of includes, leaves few variants to compile."""
    few = folder / LISTS
    few.parent.mkdir(parents=True, exist_ok=True)
    few.write_text(with_few_variants((CSRC / LISTS).read_text()))


def simulator_of_few_variants(*flags: str) -> Path:
    """The simulator with few variants, in bfloat16 alone: compiled in a quarter of the time."""
    few = host_sim.ROOT / "build" / "few_variants"
    write_few_variants(few)
    return host_sim.build((*flags, "-DSPARSE_ATTN_FLOAT16=0", f"-I{few}"))


@dataclasses.dataclass(frozen=True)
class Objects:
    """The parts of the library, compiled to `folder`."""

    folder: Path

    def compile_all(self) -> Path:
        """Compiles everything; returns the unchanged library."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_few_variants(self.folder / "few")
        (self.folder / "switch.cc").write_text(f'extern "C" int {SWITCH};\nint {SWITCH} = 0;\n')
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for error in pool.map(lambda source: self.compile(source, self.object_of(source), self.folder), self.sources()):
                if error:
                    raise RuntimeError(f"the unchanged sources do not compile:\n{error}")
        return self.link({}, self.folder / "unchanged.so")

    def compile_mutants(self, mutants: list[Mutant]) -> tuple[Path, list[Mutant]]:
        """The library with all mutants of one source, numbered from 1 on; and those that do not compile, which it lacks."""
        path = mutants[0].path
        folder = self.folder / "mutants" / path
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {mutant.id: i for i, mutant in enumerate(mutants, 1)}
        replaced = {source: folder / self.object_of(source).name for source in self.reached_by(path)}

        def compiles(some: list[Mutant]) -> bool:
            changed = folder / path
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(with_switch((CSRC / path).read_text(), some, numbers))
            return not any(self.compile(source, to, folder) for source, to in replaced.items())

        def which_compile(some: list[Mutant]) -> list[Mutant]:
            if compiles(some):
                return some
            half = len(some) // 2
            return [*which_compile(some[:half]), *which_compile(some[half:])] if half else []

        good = which_compile(mutants)
        if len(good) < len(mutants) and not compiles(good):
            raise RuntimeError(f"the mutants of {path} compile in parts but not together")
        return self.link(replaced, folder / "mutants.so"), [mutant for mutant in mutants if mutant not in good]

    def reached_by(self, path: str) -> list[Path]:
        """The sources that include `path`."""
        return [source for source in self.sources() if f"/{path}" in self.object_of(source).with_suffix(".d").read_text()]

    def sources(self) -> list[Path]:
        return [*host_sim.sources(), self.folder / "switch.cc"]

    def object_of(self, source: Path) -> Path:
        return self.folder / f"{source.parent.name}_{source.stem}.o"

    def compile(self, source: Path, to: Path, overlay: Path) -> str:
        """Files in `overlay` stand for those of csrc. Returns the compiler's errors."""
        folders = [f"-I{folder}" for folder in (overlay, self.folder / "few", CSRC)]
        command = [host_sim.COMPILER, *FLAGS, "-O2", "-MMD", *folders, "-isystem", jax.ffi.include_dir()]
        done = subprocess.run([*map(str, command), "-c", str(source), "-o", str(to)], capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    def link(self, replaced: dict[Path, Path], to: Path) -> Path:
        objects = [str(replaced.get(source, self.object_of(source))) for source in self.sources()]
        subprocess.run([host_sim.COMPILER, "-shared", *objects, "-o", str(to)], check=True)
        return to
