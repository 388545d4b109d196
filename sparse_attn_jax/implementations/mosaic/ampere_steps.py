"""What the kernels for Ampere do in one step: copies into shared memory by all threads, products of what registers hold.

Each has a twin for JAX's interpreter, which knows neither `plgpu.mma` nor copies without a barrier.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic import steps
from sparse_attn_jax.implementations.mosaic.geometry import SWIZZLE_COLUMNS

# Columns of an operand from registers: so many rows of the other operand are in registers with them.
PART_COLUMNS = 16
# No reduction leaves a warp, or needs memory, of which there is none left beside a second thread block.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


def start_copy(src, dst, ready=None) -> None:
    """Global to shared memory, in the background: all of it within bounds. `ready`: a barrier for it, in the interpreter."""
    if ready is not None:
        plgpu.copy_gmem_to_smem(src, dst, ready)
    else:
        plgpu.copy_gmem_to_smem(src, dst, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def finish_copies(ready=None, *, in_flight: int = 0) -> None:
    """Until all copies that were started are there. What was read before may be overwritten after.

    Args:
      ready: the barrier that they arrive at, in the interpreter.
      in_flight: copies, those started last, that need not be there.
    """
    if ready is not None:
        plgpu.barrier_wait(ready)
        plgpu.commit_smem()
    else:
        plgpu.wait_gmem_to_smem(in_flight)


def to_operand(x: jax.Array, dtype, *, interpreted: bool) -> list[jax.Array]:
    """A float32 matrix in dtype as the first operand of `add_product`: each thread has its part of it already."""
    parts = _parts(x.shape[1], PART_COLUMNS)
    if interpreted:
        return [x[:, part].astype(dtype) for part in parts]
    dtype, layout = jnp.dtype(dtype), plgpu.Layout.MMA_LHS(dtype)
    part_type = plgpu.ShapeDtypeStruct((x.shape[0], PART_COLUMNS), dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(steps.MATRIX,), return_type=[part_type] * len(parts))
    def relabel(context, x):
        del context
        x = x.astype(mgpu.utils.dtype_to_ir_type(dtype))
        return [_with_layout(x[:, part], layout.to_mgpu()) for part in parts]

    return relabel(x)


def _with_layout(x: mgpu.FragmentedArray, layout) -> mgpu.FragmentedArray:
    """The same registers, under the name of another layout."""
    registers = x.registers.reshape(layout.registers_shape(x.shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def add_product(total: jax.Array, operand, ref, *, interpreted: bool) -> jax.Array:
    """total + operand @ ref: a reference to shared memory, or what `to_operand` makes, times a reference."""
    left_layout, right_layout = (
        (None, None) if interpreted else (plgpu.Layout.MMA_LHS(ref.dtype), plgpu.Layout.MMA_RHS(ref.dtype))
    )
    is_array = isinstance(operand, list)
    for i, part in enumerate(_parts(ref.shape[0], PART_COLUMNS if is_array else SWIZZLE_COLUMNS)):
        left = operand[i] if is_array else plgpu.load(operand.at[:, part], layout=left_layout)
        right = plgpu.load(ref.at[part], layout=right_layout)
        total = (
            total + jnp.dot(left, right, preferred_element_type=jnp.float32) if interpreted else plgpu.mma(total, left, right)
        )
    return total


def product(operand, ref, shape: tuple[int, int], *, interpreted: bool) -> jax.Array:
    """operand @ ref, as in `add_product`."""
    return add_product(steps.full_matrix(shape, 0.0), operand, ref, interpreted=interpreted)


def _parts(columns: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
