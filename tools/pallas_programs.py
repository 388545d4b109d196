"""Compiles programs with the Pallas kernels for a GPU that is not there, and prints what became of each as a JSON line.

    python -m tools.pallas_programs [NAME ...]

It needs jax's CUDA plugin on PYTHONPATH, and no GPU; `tools.pallas_table` calls it.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO
from unittest import mock

# Before jax is imported. Of each kernel its code, the compiler's report and the shared memory are printed; all else that could
# be, the passes for one, takes longer to print than to compute.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
os.environ.pop("MOSAIC_GPU_DUMP_TO", None)
os.environ.update(MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.mosaic.gpu import utils as mosaic_utils  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import sparse_attn_jax as sa  # noqa: E402
from sparse_attn_jax.flax.linen import SparseSelfAttention  # noqa: E402

# XLA's description of the device (GpuTargetConfigProto); figures from NVIDIA's data sheet and CUDA's device attributes.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

A100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 167936
  threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85031714816
  shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 13 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""

# Of all programs but the last.
TOKENS, NUM_Q_HEADS, NUM_KV_HEADS, NUM_SLOTS = 16_384, 32, 2, 64
LONG = 131_072

ALL_OPTIONS = dict(local_window_size=(8192, 0), num_sinks=4, logits_soft_cap=30.0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays, their shapes and dtypes, and the device."""

    run: Callable
    arguments: tuple[tuple[tuple[int, ...], str], ...]
    device: str = H100


def attention(head_dim: int, block: int, dtype: str = "bfloat16", with_options: bool = False, device: str = H100) -> Program:
    """Forward and backward, of a list per token and of all options at once."""
    options = ALL_OPTIONS if with_options else {}

    def run(query, key, value, indices, bias, segments):
        def loss(query, key, value, bias):
            selection = sa.BlockSelection(indices, q_block_size=1, kv_block_size=block)
            extra = dict(key_bias=bias, query_segment_ids=segments, key_value_segment_ids=segments) if with_options else {}
            out = sa.block_sparse_attention(
                query, key, value, selection, is_causal=True, implementation="mosaic", **options, **extra
            )
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3) if with_options else (0, 1, 2))(query, key, value, bias)

    query, key = ((1, TOKENS, heads, head_dim) for heads in (NUM_Q_HEADS, NUM_KV_HEADS))
    lists, bias, segments = (1, NUM_KV_HEADS, TOKENS, NUM_SLOTS), (1, NUM_KV_HEADS, TOKENS), (1, TOKENS)
    shapes = (query, dtype), (key, dtype), (key, dtype), (lists, "int32"), (bias, "float32"), (segments, "int32")
    return Program(run, shapes, device)


def selection(head_dim: int, dtype: str = "bfloat16", **options) -> Program:
    """Selection by `InfLLMV2`."""
    selector = sa.selectors.InfLLMV2(**options)
    run = lambda query, key: selector(query, key, is_causal=True).indices
    return Program(run, tuple(((1, TOKENS, heads, head_dim), dtype) for heads in (NUM_Q_HEADS, NUM_KV_HEADS)))


class Layer(nn.Module):
    """A layer of a transformer, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _):
        options = dict(num_heads=16, num_kv_heads=2, head_dim=128, is_causal=True, rotary_theta=1e6, dtype=x.dtype)
        x += SparseSelfAttention(selector=sa.selectors.InfLLMV2(), **options)(nn.RMSNorm(dtype=x.dtype)(x))
        hidden = nn.silu(nn.Dense(4 * x.shape[-1], dtype=x.dtype)(nn.RMSNorm(dtype=x.dtype)(x)))
        return x + nn.Dense(x.shape[-1], dtype=x.dtype)(hidden), None


class Model(nn.Module):
    """A byte-level language model: 4 layers of 2,048 features, each computed again in the backward."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 2048, dtype=jnp.bfloat16)(tokens)
        layers = nn.scan(nn.remat(Layer), variable_axes=dict(params=0), split_rngs=dict(params=True), length=4)
        x, _ = layers()(x, None)
        return nn.Dense(256)(x)


def training_step() -> Program:
    """A step of AdamW on one sequence of 131,072 tokens; selection and attention are whichever dispatch takes."""
    model, optimizer = Model(), optax.adamw(1e-4)
    tokens = ((1, LONG), "int32")
    # The parameters are of any length of sequence, and made by XLA.
    parameters = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32))
    state = jax.tree.flatten((parameters, jax.eval_shape(optimizer.init, parameters)))

    def run(tokens, *leaves):
        parameters, moments = jax.tree.unflatten(state[1], leaves)

        def loss(parameters):
            logits = model.apply(parameters, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, moments = optimizer.update(gradient, moments, parameters)
        return value, optax.apply_updates(parameters, updates), moments

    return Program(run, (tokens, *((x.shape, x.dtype.name) for x in state[0])))


SIZES = ((64, 16), (64, 64), (128, 16), (128, 32), (128, 64), (128, 128), (192, 64), (256, 16), (256, 64))
AMPERE_SIZES = ((64, 64), (128, 16), (128, 64), (128, 128))
AMPERE_SIZES_WITH_OPTIONS = ((128, 64),)
PROGRAMS: dict[str, Callable[[], Program]] = {
    **{f"attention, head_dim {dim}, blocks of {block}": functools.partial(attention, dim, block) for dim, block in SIZES},
    "attention, head_dim 128, blocks of 64, float16": functools.partial(attention, 128, 64, "float16"),
    **{
        f"attention, head_dim {head_dim}, blocks of {block}, all options": functools.partial(
            attention, head_dim, block, with_options=True
        )
        for head_dim, block in ((64, 64), (128, 16), (128, 64), (256, 64))
    },
    **{f"selection, head_dim {head_dim}": functools.partial(selection, head_dim) for head_dim in (64, 128, 256)},
    "selection, head_dim 128, float16": functools.partial(selection, 128, "float16"),
    "selection, head_dim 128, exact": functools.partial(selection, 128, coarse_lse=False),
    "selection, head_dim 128, overlap_sum": functools.partial(selection, 128, pooling="overlap_sum"),
    "selection, head_dim 128, a list per query head": functools.partial(selection, 128, group_reduction=None),
    **{
        f"attention on an A100, head_dim {head_dim}, blocks of {block}": functools.partial(
            attention, head_dim, block, device=A100
        )
        for head_dim, block in AMPERE_SIZES
    },
    **{
        f"attention on an A100, head_dim {head_dim}, blocks of {block}, all options": functools.partial(
            attention, head_dim, block, with_options=True, device=A100
        )
        for head_dim, block in AMPERE_SIZES_WITH_OPTIONS
    },
    "training step, 131,072 tokens": training_step,
}


def compile_program(program: Program) -> dict:
    """Bytes of the compiled program, and its kernels by name."""
    topology = topologies.get_topology_desc("", platform="cuda", target_config=program.device, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for shape, dtype in program.arguments]
    resources = collections.defaultdict(list)

    def keep_resources(text: str, file_name: str, _):
        name, kind = re.fullmatch(r"(.*)_\d+\.(.*)", file_name).groups()
        assert kind == "resources.txt", kind
        resources[name].append(text)

    # Pallas lowers for the default device.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(topology.devices[0]):
        with mock.patch.object(mosaic_utils, "dump_to_file_or_stdout", keep_resources):
            lowered = jax.jit(program.run).lower(*arguments)
        with standard_output() as printed:
            compiled = lowered.compile()
            printed.seek(0)
            codes = split_by_kernel(printed.read())
    memory = compiled.memory_analysis()
    sizes = dict(temporaries="temp_size_in_bytes", arguments="argument_size_in_bytes", results="output_size_in_bytes")
    kernels = {name: read_kernel(codes[name], resources[name]) for name in sorted(codes)}
    return dict(bytes={name: getattr(memory, field) for name, field in sizes.items()}, kernels=kernels)


@contextlib.contextmanager
def standard_output() -> Iterator[IO[str]]:
    """A file with what this process, C++ included, prints meanwhile."""
    sys.stdout.flush()
    before = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield file
        finally:
            os.dup2(before, 1)
            os.close(before)


def split_by_kernel(printed: str) -> dict[str, list[str]]:
    """By kernel, the codes of those of its name, and after each the compiler's report about it."""
    codes = collections.defaultdict(list)
    for code in printed.split("// Generated by LLVM NVPTX Back-End")[1:]:
        (name,) = re.findall(r"[.]entry (\w+)_mosaic_gpu_kernel", code)
        assert re.findall(r"Compiling entry function '(\w+)'", code) == [f"{name}_mosaic_gpu_kernel"], name
        codes[name].append(code)
    return codes


# Until no more than a number of copies that a thread has started are not there, and then for the other threads.
WAIT = re.compile(r"cp[.]async[.]wait_group\s+(\d+);\s*(?:mov[^;]*;\s*|(?://|[.]loc)[^\n]*\n\s*)*bar[.]sync")


def read_kernel(codes: list[str], resources: list[str]) -> dict[str, int | list[int]]:
    """The most that any of the kernels of a name takes."""
    most = lambda pattern, texts: max(int(number) for text in texts for number in re.findall(pattern, text))
    of_size = lambda text: re.findall(r"num_barriers=(\d+)[^:]*: (\d+)", text)
    barriers = [sum(int(size) * int(count) for size, count in of_size(text)) for text in resources]
    return dict(
        registers=most(r"Used (\d+) registers", codes),
        spill_bytes=most(r"(\d+) bytes spill stores", codes),
        stack_bytes=most(r"(\d+) bytes stack frame", codes),
        shared_bytes=most(r"smem_scratch_bytes=(\d+)", resources),
        barriers=max(barriers),
        wgmma=max(code.count("wgmma.mma_async") for code in codes),
        mma=max(code.count("mma.sync") for code in codes),
        cp_async=max(len(re.findall(r"cp[.]async[.]c[ag]", code)) for code in codes),
        copies=max(code.count("cp.async.commit_group") for code in codes),
        waits=max((sorted(map(int, WAIT.findall(code))) for code in codes), key=len),
    )


def compile_in_processes(names: Sequence[str], folder: Path, jobs: int = 2) -> None:
    """Writes what became of each program to a file of its name.

    Each has a process: a kernel that another program has as well would not be compiled again, nor printed. They are forks of
    this one, which has imported everything and started no thread.
    """

    def write(name):
        (folder / name).write_text(json.dumps(dict(program=name) | compile_program(PROGRAMS[name]())))

    def wait_for_one():
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            if process.exitcode != 0:
                sys.exit(f"{process.name} ended with {process.exitcode}")
            print(process.name, file=sys.stderr, flush=True)
            running.remove(process)

    running = []
    # The last takes as long as several others, and goes first.
    for name in reversed(names):
        if len(running) == jobs:
            wait_for_one()
        running.append(multiprocessing.get_context("fork").Process(target=write, args=(name,), name=name, daemon=True))
        running[-1].start()
    while running:
        wait_for_one()


def main(names: Sequence[str]) -> None:
    names = names or list(PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        compile_in_processes(names, Path(folder))
        for name in names:
            print((Path(folder) / name).read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
