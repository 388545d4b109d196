"""Who is measured: the library's implementations and selectors, and dense attention in JAX."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sparse_attn_jax as sa
from benchmarks import machine, timing
from benchmarks.workloads import Workload
from sparse_attn_jax import dispatch
from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.testing.inputs import Inputs

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
# What a contender is left when it is asked to fit into the memory that is free.
MEMORY_SHARE = 0.6
GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled contender with its arguments.

    Attributes:
      call: runs once; returns when the result is there.
      results: the results for a cotangent of out, by the names of `testing.compare`, still on the device; for a selector,
        `indices`.
      memory_bytes: temporaries and results together; `None` if unknown.
      fetch: a result, or a part of one, as a NumPy array.
    """

    call: timing.Call
    results: Callable[[jax.Array], dict[str, Any]]
    memory_bytes: int | None
    fetch: Callable[[Any], np.ndarray] = jax.device_get


class Contender(Protocol):
    """One line of the table.

    Attributes:
      name: as in the table.
      kind: "implementation", "selector" or "baseline".
      computes: "selected" or "everything", the keys it attends; or "selection".
    """

    name: str
    kind: str
    computes: str

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        """Compiles it for these inputs. Raises `NotImplementedError` with the reason if it cannot run them."""
        ...


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`block_sparse_attention` by one implementation; its plan is built in every call.

    Attributes:
      implementation: its name.
      cuda_arch: "sm80" or "sm90", the kernels that cuda runs; "" for the newest that run on the device.
    """

    implementation: str
    cuda_arch: str = ""
    kind = "implementation"
    computes = "selected"

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.cuda_arch}".rstrip()

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        def attend(operands, selection):
            return sa.block_sparse_attention(
                **operands, selection=selection, **made.options, implementation=self.implementation
            )

        with kernels_of(self.cuda_arch):
            return prepare_jax(attend, made, mode)


@contextlib.contextmanager
def kernels_of(cuda_arch: str) -> Iterator[None]:
    """What is compiled inside has the CUDA kernels of `cuda_arch`, unless that is ""."""
    with mock.patch.dict(os.environ, {library.ARCH: cuda_arch} if cuda_arch else {}):
        yield


@dataclasses.dataclass(frozen=True)
class Selector:
    """The workload's selector, by one implementation."""

    implementation: str
    kind = "selector"
    computes = "selection"

    @property
    def name(self) -> str:
        return f"InfLLMV2 {self.implementation}"

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        query, key = made.operands["query"], made.operands["key"]
        options = {name: made.options[name] for name in ("is_causal", "q_offset") if name in made.options}
        # A selector has no argument for it: the library takes the first that can, and this is the only one.
        with mock.patch.object(dispatch, "default_order", lambda problem: (self.implementation,)):
            compiled = jax.jit(lambda query, key: workload.selector(query, key, **options).indices).lower(query, key).compile()

        call = timing.Enqueued(lambda: compiled(query, key), jax.block_until_ready)
        return Prepared(call, lambda d_out: dict(indices=compiled(query, key)), memory_of(compiled))


@dataclasses.dataclass(frozen=True)
class DenseJax:
    """`jax.nn.dot_product_attention`: everything that causality lets through, whatever is selected."""

    name: str
    implementation: str
    max_len: int
    kind = "baseline"
    computes = "everything"

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        if self.implementation == "cudnn" and jax.default_backend() != "gpu":
            raise NotImplementedError(f"cuDNN needs a GPU, and this is {jax.default_backend()}")
        refuse_unsupported(made, self.max_len)
        options, (q_len, kv_len) = made.options, lengths(made)
        is_causal = options.get("is_causal", False)
        # Aligned top-left, where the op is aligned bottom-right.
        is_aligned = options.get("q_offset", kv_len - q_len) == 0

        def attend(operands, selection):
            mask = None
            if is_causal and not is_aligned:
                last = jnp.arange(q_len)[:, None] + options.get("q_offset", kv_len - q_len)
                mask = (jnp.arange(kv_len) <= last)[None, None]
            return jax.nn.dot_product_attention(
                *(operands[name] for name in ("query", "key", "value")),
                mask=mask,
                scale=options.get("scale"),
                is_causal=is_causal and is_aligned,
                implementation=self.implementation,
            )

        return prepare_jax(attend, made, mode)


def refuse_unsupported(made: Inputs, max_len: int | None = None) -> None:
    """Raises `NotImplementedError` for what the baselines are not asked to do."""
    q_len, kv_len = lengths(made)
    if max_len is not None and max(q_len, kv_len) > max_len:
        raise NotImplementedError(f"dense, and longer than --dense_max_len={max_len}")
    beyond = sorted(set(made.options) - {"is_causal", "q_offset", "scale"})
    beyond += ["key_bias"] if "key_bias" in made.operands else []
    beyond += ["predicate"] if made.selection.predicate is not None else []
    if beyond:
        raise NotImplementedError(f"baselines are not asked for {', '.join(beyond)}")
    if jnp.ndim(made.options.get("q_offset", 0)):
        raise NotImplementedError("baselines are not asked for a q_offset per batch row")
    head_dim, value_head_dim = made.operands["query"].shape[-1], made.operands["value"].shape[-1]
    if head_dim != value_head_dim:
        raise NotImplementedError(f"baselines need value_head_dim ({value_head_dim}) = head_dim ({head_dim})")


def lengths(made: Inputs) -> tuple[int, int]:
    return made.operands["query"].shape[1], made.operands["key"].shape[1]


def prepare_jax(attend: Callable[..., jax.Array], made: Inputs, mode: str) -> Prepared:
    """Compiles `attend(operands, selection) -> out`, or with all of its gradients for a given cotangent."""

    def forward(operands, selection, d_out):
        return dict(out=attend(operands, selection))

    def forward_backward(operands, selection, d_out):
        out, pull_back = jax.vjp(lambda operands: attend(operands, selection), operands)
        (gradients,) = pull_back(d_out)
        return dict(out=out) | {f"d_{name}": gradient for name, gradient in gradients.items()}

    function = jax.jit(forward if mode == FORWARD else forward_backward, keep_unused=True)
    compiled = function.lower(made.operands, made.selection, made.d_out).compile()
    memory = memory_of(compiled)
    free = machine.free_bytes()
    if memory is not None and free is not None and memory > MEMORY_SHARE * free:
        raise NotImplementedError(f"needs {memory / GIBIBYTE:.1f} GiB, and {free / GIBIBYTE:.1f} GiB are free")

    def results(d_out):
        return compiled(made.operands, made.selection, d_out)

    call = timing.Enqueued(lambda: results(made.d_out), jax.block_until_ready)
    return Prepared(call, results, memory)


def memory_of(compiled: jax.stages.Compiled) -> int | None:
    """Temporaries and results of a compiled function, in bytes."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes
