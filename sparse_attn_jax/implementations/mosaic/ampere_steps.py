"""What the kernels for Ampere do in one step: copies into shared memory by all threads, products of what registers hold.

Each has a twin for JAX's interpreter, which knows neither `plgpu.mma` nor copies without a barrier.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic import steps
from sparse_attn_jax.implementations.mosaic.geometry import SWIZZLE_COLUMNS

# Columns of an operand from registers, which has as many rows of the other with it in registers at a time.
PART_COLUMNS = 16


def start_copy(src, dst, ready, *, interpreted: bool) -> None:
    """Global to shared memory, in the background. All of it must be within bounds."""
    if interpreted:
        plgpu.copy_gmem_to_smem(src, dst, ready)
    else:
        plgpu.copy_gmem_to_smem(src, dst, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def finish_copies(ready, *, interpreted: bool) -> None:
    """Until all copies that were started are there. What was read before may be overwritten after."""
    if interpreted:
        plgpu.barrier_wait(ready)
        plgpu.commit_smem()
    else:
        plgpu.wait_gmem_to_smem(0)


def load_operand(ref, *, interpreted: bool) -> list[jax.Array]:
    """A matrix in shared memory as the first operand of `add_product`."""
    layout = None if interpreted else plgpu.Layout.MMA_LHS(ref.dtype)
    return [plgpu.load(ref.at[:, part], layout=layout) for part in _parts(ref.shape[1], SWIZZLE_COLUMNS)]


def to_operand(x: jax.Array, dtype, *, interpreted: bool) -> list[jax.Array]:
    """A float32 matrix as the first operand of `add_product`, in dtype: each thread has its part of it already."""
    parts = _parts(x.shape[1], PART_COLUMNS)
    if interpreted:
        return [x[:, part].astype(dtype) for part in parts]
    dtype, layout = jnp.dtype(dtype), plgpu.Layout.MMA_LHS(dtype)
    part_type = plgpu.ShapeDtypeStruct((x.shape[0], PART_COLUMNS), dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(steps.MATRIX,), return_type=[part_type] * len(parts))
    def relabel(context, x):
        del context
        x = x.astype(mgpu.utils.dtype_to_ir_type(dtype))
        return [_as_operand(x[:, part], layout.to_mgpu()) for part in parts]

    return relabel(x)


def _as_operand(x: mgpu.FragmentedArray, layout) -> mgpu.FragmentedArray:
    """The same registers under another name."""
    registers = x.registers.reshape(layout.registers_shape(x.shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def add_product(total: jax.Array, operand: list[jax.Array], ref, *, interpreted: bool) -> jax.Array:
    """total + operand @ ref, a matrix in shared memory."""
    layout = None if interpreted else plgpu.Layout.MMA_RHS(ref.dtype)
    for i, left in enumerate(operand):
        right = plgpu.load(ref.at[_parts(ref.shape[0], left.shape[1])[i]], layout=layout)
        total = (
            total + jnp.dot(left, right, preferred_element_type=jnp.float32) if interpreted else plgpu.mma(total, left, right)
        )
    return total


def _parts(columns: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, columns, size)]
