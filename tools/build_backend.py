"""What pip calls: scikit-build-core, once it is known whether the CUDA kernels are compiled.

The wheel's tag and what the build needs depend on that (the overrides in pyproject.toml), and they are asked for before CMake
runs. So SPARSE_ATTN_CUDA=AUTO becomes ON here if there is an nvcc.
"""

import os
import tomllib

from find_nvcc import find_nvcc
from scikit_build_core import build
from scikit_build_core.build import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

if os.environ.get("SPARSE_ATTN_CUDA", "") in ("", "AUTO") and find_nvcc():
    os.environ["SPARSE_ATTN_CUDA"] = "ON"


def _nvcc_packages() -> list[str]:
    """PyPI's nvcc, where the kernels are to be compiled and there is no other."""
    if os.environ.get("SPARSE_ATTN_CUDA") != "ON" or find_nvcc():
        return []
    with open("pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]["cuda-build"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build.get_requires_for_build_wheel(config_settings) + _nvcc_packages()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build.get_requires_for_build_editable(config_settings) + _nvcc_packages()
