"""Calls and inputs for tests in which compiling would take most of the time: programs are not optimised, and are kept."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.selection import BlockSelection

compile_fast = functools.partial(jax.jit, compiler_options=dict(xla_backend_optimization_level=0))


def normal(seed: int, *shape: int) -> jax.Array:
    """N(0, 1), float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fast(selector: Callable[..., BlockSelection]) -> Callable[..., BlockSelection]:
    """The selector, compiled once for arguments of the same shapes."""

    def call(*arrays, is_causal=False, q_offset=None, **options):
        is_static = q_offset is None or isinstance(q_offset, int)
        run = _compiled(selector, is_causal, q_offset if is_static else "array")
        return run(arrays, options if is_static else options | dict(q_offset=q_offset))

    return call


@functools.cache
def _compiled(selector, is_causal, q_offset):
    fixed = dict(is_causal=is_causal) | ({} if q_offset == "array" else dict(q_offset=q_offset))
    return compile_fast(lambda arrays, options: selector(*arrays, **fixed, **options))
