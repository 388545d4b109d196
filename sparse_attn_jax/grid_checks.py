"""`ValueError`s of what works on grids of tokens: each names the argument, what was found and what is needed."""

import math

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.problem import MAX_LENGTH

MAX_DIMS = 3


def check_shape(name: str, shape: object) -> None:
    """A grid of tokens: one to three lengths."""
    if not isinstance(shape, tuple) or not 1 <= len(shape) <= MAX_DIMS:
        raise ValueError(f"`{name}` is {shape!r}; it must be a tuple of 1 to {MAX_DIMS} ints.")
    for d, length in enumerate(shape):
        checks.check_int(f"{name}[{d}]", length, 1)
    if math.prod(shape) > MAX_LENGTH:
        raise ValueError(f"`{name}` is {shape}, {math.prod(shape)} tokens; positions are int32, so at most {MAX_LENGTH}.")


def per_dim(name: str, value: object, num_dims: int, minimum: int = 1) -> tuple[int, ...]:
    """An int for all dimensions, or one for each."""
    values = value if isinstance(value, tuple) else (value,) * num_dims
    if len(values) != num_dims:
        raise ValueError(f"`{name}` is {value!r}; of {num_dims} dimensions it must be an int or {num_dims} ints.")
    for d, x in enumerate(values):
        checks.check_int(f"{name}[{d}]" if isinstance(value, tuple) else name, x, minimum)
    return values


def bool_per_dim(name: str, value: object, num_dims: int) -> tuple[bool, ...]:
    """A bool for all dimensions, or one for each."""
    values = value if isinstance(value, tuple) else (value,) * num_dims
    if len(values) != num_dims:
        raise ValueError(f"`{name}` is {value!r}; of {num_dims} dimensions it must be a bool or {num_dims} bools.")
    for d, x in enumerate(values):
        checks.check_bool(f"{name}[{d}]" if isinstance(value, tuple) else name, x)
    return values
