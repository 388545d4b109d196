"""JAX's interpreter of GPUs as tests run it: it looks for races, its callbacks get plain values, and XLA optimizes nothing.

As of JAX 0.12.0, each callback puts its arguments on a device and takes them off again, which takes three quarters of the time.
The rest is mostly that of compiling programs of callbacks, which run once.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Pallas kernels that are called inside run in the interpreter."""
    from jax._src import callback
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plain = SimpleNamespace(device_put=lambda arguments, device: jax.tree.map(_plain_value, arguments))
    was_disabled = jax.config.read("jax_disable_most_optimizations")
    with (
        mock.patch.object(callback, "api", plain),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", was_disabled)


def _plain_value(x: np.ndarray) -> np.ndarray | int | bool:
    """Numbers of threads and barriers are Python's, as the interpreter compares them; arrays stay NumPy's."""
    return x.item() if x.ndim == 0 and x.dtype.kind in "biu" else x
