"""Compiles the CUDA sources for a CPU, where a simulator runs them (`csrc/host_sim`). Needs the source tree and g++."""

import concurrent.futures
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib.version

ROOT = Path(__file__).absolute().parents[3]
CSRC = ROOT / "csrc"
COMPILER = "g++"
# Unique symbols would be shared with the compiled kernels, if a process loads both: each has its own list of them.
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror")
SUFFIXES = (".cc", ".cu", ".cuh", ".h")


def missing(path: str) -> str | None:
    """Why the simulator that `path` names ("1": made from the sources) cannot be had, or `None`."""
    if path != "1":
        return None if Path(path).is_file() else f"there is no simulator library {path!r}"
    if not (CSRC / "host_sim").is_dir():
        return "the simulator is made from the source tree, and this install has none beside it"
    if shutil.which(COMPILER) is None:
        return f"the simulator needs {COMPILER}, of version 12 or newer"
    return None


def sources() -> list[Path]:
    handlers = [path for path in CSRC.glob("ffi/*.cc") if path.name != "module.cc"]
    return sorted([*CSRC.glob("host_sim/*.cc"), *handlers, *CSRC.glob("*.cc"), *CSRC.glob("*/*.cu")])


def build(flags: tuple[str, ...] = ()) -> Path:
    """The simulator library of the present sources, compiled if it is not there yet."""
    folder = _folder()
    made = folder / f"libsparse_attn_host_sim_{_key(flags)}.so"
    with open(folder / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others may want it at the same time
        if made.exists():
            return made
        command = [COMPILER, *FLAGS, *flags, f"-I{CSRC}", "-isystem", jax.ffi.include_dir(), "-x", "c++", "-c"]
        # Those of kernels take long, and are started first.
        parts = {
            source: f"{scratch}/{i}.o" for i, source in enumerate(sorted(sources(), key=lambda path: path.suffix != ".cu"))
        }
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda source: _run([*command, str(source), "-o", parts[source]]), parts))
        _run([COMPILER, *flags, "-shared", *parts.values(), "-o", f"{scratch}/made.so"])
        os.replace(f"{scratch}/made.so", made)
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the simulator does not compile:\n{done.stderr}")


def _key(flags: tuple[str, ...]) -> str:
    """Differs where the library would. jaxlib brings the headers of XLA's FFI, and takes no library made with newer ones."""
    read = sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES and "tests" not in path.parts)
    made_with = " ".join((jaxlib.version.__version__, *FLAGS, *flags))
    return hashlib.sha256(b"\0".join([*(path.read_bytes() for path in read), made_with.encode()])).hexdigest()[:16]


def _folder() -> Path:
    """Where compiled simulators are kept: in the source tree, or with temporary files if that cannot be written."""
    folder = ROOT / "build" / "host_sim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"sparse_attn_host_sim_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
