"""Differences between JAX versions: the only module that may look at private or renamed names."""

import jax
import jax.numpy as jnp
from jax._src import config as jax_config


def vary_like(x: jax.Array, like) -> jax.Array:
    """x, marked as varying over every mesh axis that any leaf of `like` varies over.

    Inside `shard_map` the carry of a loop must enter with the type that it leaves with; outside it this does nothing.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which x differs between devices, inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


# JAX 0.10 gathers and scatters 16-bit floats on a CPU by way of a float32 copy of the whole array, but not their bits.
_STORES_BITS = jax.__version_info__ < (0, 11)


def to_bits(x: jax.Array) -> jax.Array:
    """x in the dtype in which to gather from it: uint16 for a 16-bit float where JAX needs that, else its own."""
    is_short = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if _STORES_BITS and is_short else x


def from_bits(x: jax.Array, dtype) -> jax.Array:
    """The inverse of `to_bits`, for an x whose dtype was `dtype` if it was a 16-bit float."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


# Pallas kernels of Mosaic GPU need what JAX 0.11 brought.
HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 11)


# Those for Ampere, which have no TMA, need `plgpu.mma` and `plgpu.wait_gmem_to_smem` as of 0.11.2.
HAS_MOSAIC_GPU_FOR_AMPERE = jax.__version_info__ >= (0, 11, 2)


def lowering_compute_capability() -> str:
    """The one that Pallas kernels are lowered for: that of the default device, and 9.0 where that is no GPU."""
    device = jax.config.jax_default_device
    device = device if isinstance(device, jax.Device) else jax.local_devices()[0]
    return getattr(device, "compute_capability", "9.0")


def cuda_version() -> int:
    """Of JAX's plugin, whose assembler compiles Pallas kernels: 1000 x major + 10 x minor; 0 if there is none."""
    from jax._src.lib import cuda_versions

    return 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def interprets_kernels() -> bool:
    """Whether Pallas kernels run in JAX's interpreter of GPUs: inside `plgpu.force_gpu_interpret_mode`."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def store_to_global(ref, x: jax.Array) -> None:
    """In a Pallas kernel: each thread stores its part of x, without a detour through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # JAX 0.12 wants to be told; 0.11 has no other way.
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x
