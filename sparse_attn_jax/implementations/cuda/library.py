"""The compiled kernels: where they are, what they can do, and their registration as custom calls.

On a GPU they are the extension module `_kernels`, which an install makes when it finds an nvcc. On a CPU the same sources run
in a simulator, for tests: `SPARSE_ATTN_HOST_SIM=1` asks for it.
"""

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.implementations.cuda import host_sim
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.problems import AnyProblem
from sparse_attn_jax.scoring_problem import ScoringProblem

ATTENTION_FORWARD = "sparse_attn_attention_forward"
ATTENTION_BACKWARD = "sparse_attn_attention_backward"
SELECT_BLOCKS = "sparse_attn_select_blocks"
PAGED_ATTENTION = "sparse_attn_paged_attention"
BLOCK_EXTREMA = "sparse_attn_block_extrema"
SELECT_BY_BOUNDS = "sparse_attn_select_by_bounds"
PLAN_UNIONS = "sparse_attn_plan_unions"
PLAN_INVERSE = "sparse_attn_plan_inverse"
CUSTOM_CALL_TARGETS = (
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
    SELECT_BLOCKS,
    PAGED_ATTENTION,
    BLOCK_EXTREMA,
    SELECT_BY_BOUNDS,
    PLAN_UNIONS,
    PLAN_INVERSE,
)

# Environment variables.
HOST_SIM = "SPARSE_ATTN_HOST_SIM"  # "1", or the path of a compiled simulator
ARCH = "SPARSE_ATTN_CUDA_ARCH"  # "sm80" or "sm90": kernels of that folder, instead of the newest that run
SEED = "SPARSE_ATTN_HOST_SIM_SEED"  # the order in which a simulated grid runs

MODULE = "sparse_attn_jax.implementations.cuda._kernels"

INSTALL_AGAIN = (
    "They were compiled for another Python, or against a newer jaxlib: `SPARSE_ATTN_CUDA=ON pip install` compiles them anew"
)

# The kernels that run on a compute capability, the fastest first.
ARCHITECTURES = {"8.0": (80,), "9.0": (90, 80)}

# By the kind of a problem: the name that the library has for its kernels.
KERNELS = {
    Problem: "attention",
    ScoringProblem: "selection",
    PagedProblem: "paged_attention",
    ExtremaProblem: "bounds",
    BoundProblem: "bounds",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A set of kernels that were compiled together, as the library says it."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    kv_block_sizes: tuple[int, ...]


def missing(platform: str) -> str | None:
    """Why there are no kernels for "gpu", or for "cpu" where `is_simulated`; or `None`."""
    if platform == "cpu":
        return host_sim.missing(os.environ[HOST_SIM])
    if importlib.util.find_spec(MODULE) is None:
        return (
            "this install has no CUDA kernels, because it found no nvcc; `SPARSE_ATTN_CUDA=ON pip install` brings one, or says "
            "what is missing"
        )
    return None


def reason_of_driver() -> str | None:
    """Why the driver of this machine, if it has one, cannot run the kernels, which must not be `missing`; or `None`."""
    runtime, driver = _import_module().cuda_versions()
    text = lambda version: f"{version // 1000}.{version % 1000 // 10}"
    if 0 < driver < runtime // 1000 * 1000:
        return (
            f"the kernels were compiled by CUDA {text(runtime)}, and the driver of this machine runs programs of CUDA "
            f"{text(driver)} and older: they want a driver for {runtime // 1000}.0, or `SPARSE_ATTN_CUDA=ON pip install` with "
            "an older nvcc"
        )
    return None


def is_simulated() -> bool:
    return os.environ.get(HOST_SIM, "") not in ("", "0")


def load(platform: str) -> tuple[Variant, ...]:
    """The compiled variants for "cpu" or "gpu", of which none must be `missing`. Registers them once per process."""
    return _load_simulator(os.environ[HOST_SIM]) if platform == "cpu" else _load_module()


@functools.cache
def _load_simulator(path: str) -> tuple[Variant, ...]:
    library = ctypes.CDLL(str(host_sim.build() if path == "1" else Path(path)))
    _register({target: jax.ffi.pycapsule(getattr(library, target)) for target in CUSTOM_CALL_TARGETS}, "cpu")
    library.sparse_attn_variants.restype = ctypes.c_char_p
    return _read_variants(library.sparse_attn_variants().decode())


def _import_module() -> ModuleType:
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise ImportError(f"the CUDA kernels of this install do not load: {error}. {INSTALL_AGAIN}") from error


@functools.cache
def _load_module() -> tuple[Variant, ...]:
    module = _import_module()
    _register(module.registrations(), "CUDA")
    return _read_variants(module.variants())


def _register(capsules: Mapping[str, Any], platform: str) -> None:
    try:
        for target in CUSTOM_CALL_TARGETS:
            jax.ffi.register_ffi_target(target, capsules[target], platform=platform)
    except Exception as error:
        text = f"jaxlib {jaxlib.version.__version__} does not take the CUDA kernels of this install: {error}. {INSTALL_AGAIN}"
        raise RuntimeError(text) from error


def _read_variants(text: str) -> tuple[Variant, ...]:
    return tuple(Variant(**entry | dict(kv_block_sizes=tuple(entry["kv_block_sizes"]))) for entry in json.loads(text))


def architectures(problem: AnyProblem) -> tuple[int, ...]:
    """The kernels that may run on the problem's device, the fastest first."""
    able = ARCHITECTURES["9.0"] if problem.platform == "cpu" else ARCHITECTURES.get(problem.compute_capability, ())
    return tuple(arch for arch in able if asked_for() in ("", f"sm{arch}"))


def asked_for() -> str:
    """The folder whose kernels are to run, or "" for the fastest."""
    return os.environ.get(ARCH, "")


def variants_for(problem: AnyProblem) -> list[Variant]:
    """The compiled kernels for this kind of problem that run on its device, the fastest first."""
    kernel = KERNELS[type(problem)]
    variants = load(problem.platform)
    return [v for arch in architectures(problem) for v in variants if v.kernel == kernel and v.arch == arch]


def values_of(variant: Variant, field: str) -> tuple:
    """The values that a variant takes for a field of a problem."""
    return variant.kv_block_sizes if field == "kv_block_size" else (getattr(variant, field),)


def is_for(variant: Variant, problem: AnyProblem) -> bool:
    sizes = (variant.dtype, variant.head_dim) == (problem.dtype, problem.head_dim)
    return sizes and (not isinstance(problem, Problem) or problem.kv_block_size in variant.kv_block_sizes)


def arch_for(problem: AnyProblem) -> int:
    """Whose kernels run the problem, which must be supported: 80 or 90."""
    return next(variant.arch for variant in variants_for(problem) if is_for(variant, problem))


def custom_call(target: str) -> Callable[..., tuple[jax.Array, ...]]:
    """What an `EntryPoint` runs: a custom call, whose attributes are NumPy scalars, typed as its handler expects them."""

    def run(arrays, outputs, attributes):
        # Nothing would be launched, and XLA takes no command buffer of a call that launches nothing.
        if 0 in outputs[0].shape:
            return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)
        return jax.ffi.ffi_call(target, outputs)(*arrays, **attributes)

    return run


def call_attributes(problem: AnyProblem) -> dict[str, Any]:
    """The attributes that choose a compiled variant."""
    return dict(arch=np.int32(arch_for(problem)), seed=seed())


def seed() -> np.int64:
    """The order in which a simulated grid runs."""
    return np.int64(os.environ.get(SEED, 0))


def register() -> None:
    """Registers the custom calls, once per process, where a problem has no platform: for the simulator if it is asked for."""
    load("cpu" if is_simulated() else "gpu")
