"""Compiles the simulator with one source changed. Of the kernels' variants only a few are compiled, and what a change does not
reach is compiled once."""

import concurrent.futures
import dataclasses
import re
import subprocess
from pathlib import Path

import jax

from sparse_attn_jax.implementations.cuda import host_sim
from tools.mutants.rules import Mutant

CSRC = host_sim.CSRC
FLAGS = ("-std=c++20", "-fPIC", "-w", "-fno-gnu-unique", "-x", "c++")

# By head_dim the KV block sizes: every path through the kernels, no more. Blocks of 128 have the kernels of 64.
VARIANTS = {64: (16, 64, 128), 256: (64,)}
DTYPE = "bfloat16"


def mutated_sources() -> list[Path]:
    """The files whose mutants are tested: device code, without the functions that are one instruction each."""
    return [path for path in sorted(CSRC.glob("*/*.cuh")) if path.name != "ptx.cuh"]


def with_few_variants(launchers: str) -> str:
    """The text of a `launchers.cu` that adds only `VARIANTS`."""

    def few(match):
        sizes = [size for size in VARIANTS.get(int(match[1]), ()) if str(size) in match[2].split(", ")]
        return f"add<T, {match[1]}, {', '.join(map(str, sizes))}>(to);" if sizes else ""

    text = re.sub(r"\badd<T, (\d+), ([\d, ]+)>\(to\);", few, launchers)
    return text.replace("add_dtype<ptx::Float16>(made);", "")


@dataclasses.dataclass(frozen=True)
class Objects:
    """The unchanged library's parts, compiled to `folder`."""

    folder: Path

    def compile_all(self) -> Path:
        """Compiles everything; returns the unchanged library."""
        for source in self.sources():
            if source.suffix == ".cu":
                copy = self.copy_of(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(with_few_variants(source.read_text()))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for error in pool.map(lambda source: self.compile(source, self.object_of(source), self.folder), self.sources()):
                if error:
                    raise RuntimeError(f"the unchanged sources do not compile:\n{error}")
        made = self.folder / "unchanged.so"
        self.link({}, made)
        return made

    def compile_mutant(self, mutant: Mutant, folder: Path) -> Path | None:
        """The library with a mutant, in a folder of its own; `None` if it does not compile."""
        changed = folder / mutant.path
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(mutant.apply((CSRC / mutant.path).read_text()))
        replaced = {}
        for source in self.sources():
            if self.depends_on(source, mutant.path):
                replaced[source] = folder / f"{source.parent.name}_{source.stem}.o"
                if self.compile(source, replaced[source], folder):
                    return None
        made = folder / "mutant.so"
        self.link(replaced, made)
        return made

    def sources(self) -> list[Path]:
        return host_sim.sources()

    def copy_of(self, source: Path) -> Path:
        return self.folder / "few" / source.relative_to(CSRC)

    def object_of(self, source: Path) -> Path:
        return self.folder / f"{source.parent.name}_{source.stem}.o"

    def depends_on(self, source: Path, path: str) -> bool:
        return f"/{path}" in self.object_of(source).with_suffix(".d").read_text()

    def compile(self, source: Path, to: Path, overlay: Path) -> str:
        """Files in `overlay` stand for those of csrc. Returns the compiler's errors."""
        is_kernel = source.suffix == ".cu"
        # Kernels are compiled once per mutant and run for seconds, the simulator is compiled once.
        options = [*FLAGS, "-O1" if is_kernel else "-O2", "-MMD", f"-I{overlay}", f"-I{CSRC}"]
        file = self.copy_of(source) if is_kernel else source
        command = [host_sim.COMPILER, *options, "-isystem", jax.ffi.include_dir(), "-c", file, "-o", to]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    def link(self, replaced: dict[Path, Path], to: Path) -> None:
        objects = [str(replaced.get(source, self.object_of(source))) for source in self.sources()]
        subprocess.run([host_sim.COMPILER, "-shared", *objects, "-o", str(to)], check=True)
