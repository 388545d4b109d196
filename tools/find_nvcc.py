"""Prints the nvcc that compiles the kernels, of CUDA 13 or newer; fails if there is none.

It is looked for on PATH, in CUDA_HOME, CUDA_PATH and /usr/local/cuda, and among the packages of the Python that runs this
(the extra `cuda-build` of pyproject.toml).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST_CUDA = 13
PLACES = f"no nvcc of CUDA {OLDEST_CUDA} or newer on PATH, in CUDA_HOME, in /usr/local/cuda, or among Python's packages"
# Each comes in a package of its own; JAX's wheels for GPUs need some of them.
PARTS = ("include/crt", "include/cuda_runtime.h", "include/cccl", "nvvm/bin/cicc", "lib/libcudart_static.a")


def candidates(program: str) -> Iterator[Path]:
    """Where a program of the CUDA toolkit may be, of the system first."""
    if on_path := shutil.which(program):
        yield Path(on_path)
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        roots += Path(folder).glob("cu*")
    for found in (Path(root, "bin", program) for root in roots if root):
        if found.exists():
            yield found


def is_complete(nvcc: Path) -> bool:
    root = nvcc.parent.parent
    return "site-packages" not in root.parts or all((root / part).exists() for part in PARTS)


def cuda_version(nvcc: Path) -> int:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", said)
    return int(found[1]) if found else 0


def find_nvcc() -> Path | None:
    return next((nvcc for nvcc in candidates("nvcc") if is_complete(nvcc) and cuda_version(nvcc) >= OLDEST_CUDA), None)


if __name__ == "__main__":
    sys.exit(print(found) if (found := find_nvcc()) else PLACES)
