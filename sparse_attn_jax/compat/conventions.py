"""What the originals have in common: packed sequences, -1 for no window, lse +inf for a query that sees nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.problem import MAX_LENGTH, SUPPORTED_DTYPES
from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.validation import is_array, require, static_float

QKV = ("q", "k", "v")


def known(x: Any) -> np.ndarray | None:
    """The values of an array, or None if they are not known while tracing."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def check_dropout(name: str, probability: float) -> None:
    is_zero = isinstance(probability, int | float) and probability == 0
    require(is_zero, name, probability, "0.0: there is no dropout")


def check_flag(name: str, value: Any) -> None:
    """For `deterministic`: gradients always are, so either value is honoured."""
    require(isinstance(value, bool), name, value, "True or False")


def check_absent(why: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        require(value is None, name, value, f"None: {why}")


def check_packed(name: str, x: Any) -> None:
    checks.check_array(name, x, ("tokens", "num_heads", "head_dim"))


def check_sequences(**bounds: Any) -> int:
    """Where packed sequences start, and the end: int32 [batch + 1] each. Returns the batch."""
    first = next(iter(bounds))
    for name, x in bounds.items():
        is_list = is_array(x) and x.dtype == jnp.int32 and len(x.shape) == 1 and x.shape[0] >= 2
        require(is_list, name, x, "int32 [batch + 1], of at least one sequence")
        require(x.shape == bounds[first].shape, name, x, f"of length {bounds[first].shape[0]}, as `{first}`")
    return bounds[first].shape[0] - 1


def check_pages(q: jax.Array, **caches: Any) -> None:
    """Keys and values [num_pages, page_size, num_heads_k, head_dim] that fit the queries [..., num_heads, head_dim]."""
    (key_name, keys), (value_name, values) = caches.items()
    require(q.dtype.name in SUPPORTED_DTYPES, "q", q, f"of dtype {', '.join(SUPPORTED_DTYPES)}")
    for name, x in caches.items():
        checks.check_array(name, x, ("num_pages", "page_size", "num_heads_k", "head_dim"))
        require(x.dtype == q.dtype, name, x, f"of dtype {q.dtype}, as `q`")
        require(0 not in x.shape, name, x, "[num_pages, page_size, num_heads_k, head_dim], none of them 0")
    require(keys.shape[3] == q.shape[-1], key_name, keys, f"of head_dim {q.shape[-1]}, as `q`")
    needed = f"of shape {[*keys.shape[:3], 'head_dim']}, as `{key_name}`"
    require(values.shape[:3] == keys.shape[:3], value_name, values, needed)
    num_heads_k = keys.shape[2]
    is_multiple = q.shape[-2] > 0 and q.shape[-2] % num_heads_k == 0
    require(is_multiple, "q", q, f"of a multiple of {num_heads_k} heads: `{key_name}` has {num_heads_k}")


def check_table(name: str, x: Any, batch: int) -> None:
    is_table = is_array(x) and x.dtype == jnp.int32 and len(x.shape) == 2 and x.shape[0] == batch and x.shape[1] > 0
    require(is_table, name, x, f"int32 [{batch}, pages of a sequence], at least one")


def check_max_length(name: str, max_length: int, cu_seqlens: jax.Array) -> None:
    """A static bound on the lengths, which is compared with them where they are known."""
    is_int = isinstance(max_length, int | np.integer) and not isinstance(max_length, bool)
    require(is_int and 0 <= max_length <= MAX_LENGTH, name, max_length, f"an int in [0, {MAX_LENGTH}], known while tracing")
    bounds = known(cu_seqlens)
    if bounds is not None and bounds.size > 1:
        longest = int(np.diff(bounds).max())
        require(max_length >= longest, name, max_length, f"at least {longest}, the longest sequence")


def window_of(window_size: tuple[int, int]) -> tuple[int | None, int | None] | None:
    """(left, right) with -1 for no bound, in the terms of the op."""
    is_pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    is_pair = is_pair and all(isinstance(size, int) and size >= -1 for size in window_size)
    require(is_pair, "window_size", window_size, "a pair (left, right) of ints of at least -1")
    left, right = (None if size == -1 else size for size in window_size)
    return None if left is None and right is None else (left, right)


def scale_of(softmax_scale: float | None, name: str = "softmax_scale") -> float | None:
    return None if softmax_scale is None else static_float(name, softmax_scale)


def soft_cap_of(softcap: float) -> float | None:
    """0.0 is no cap."""
    cap = static_float("softcap", softcap)
    require(cap >= 0, "softcap", softcap, "at least 0.0, which is no cap")
    return None if cap == 0 else cap


def empty_rows_to_infinity(lse: jax.Array) -> jax.Array:
    """The originals write +inf, where this library writes -inf, for a query that sees nothing."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def pad_sequences(x: jax.Array, cu_seqlens: jax.Array, max_length: int, fill: float = 0) -> jax.Array:
    """Packed tokens [tokens, ...] -> [num_sequences, max_length, ...], `fill` past the end of a sequence."""
    if x.shape[0] == 0:
        return jnp.full((cu_seqlens.shape[0] - 1, max_length, *x.shape[1:]), fill, x.dtype)
    token = cu_seqlens[:-1, None] + jnp.arange(max_length, dtype=jnp.int32)
    token = jnp.where(token < cu_seqlens[1:, None], token, x.shape[0])
    return jnp.take(x, token, axis=0, mode="fill", fill_value=fill)


def pack_sequences(x: jax.Array, cu_seqlens: jax.Array, num_tokens: int, fill: float = 0) -> jax.Array:
    """[num_sequences, max_length, ...] -> packed tokens [num_tokens, ...], `fill` for tokens of no sequence."""
    sequence, position = locate_tokens(cu_seqlens, num_tokens)
    row = jnp.where(position < x.shape[1], sequence * x.shape[1] + position, x.shape[0] * x.shape[1])
    return jnp.take(x.reshape(-1, *x.shape[2:]), row, axis=0, mode="fill", fill_value=fill)


def locate_tokens(cu_seqlens: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Each packed token's sequence and position in it; behind the last sequence, positions past that one's end."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(cu_seqlens[1:], token, side="right").astype(jnp.int32)
    sequence = jnp.minimum(sequence, cu_seqlens.shape[0] - 2)
    return sequence, token - cu_seqlens[sequence]


def pad_rows(indices: jax.Array, num_tokens: int, q_block_size: int) -> jax.Array:
    """Lists by sequence, with empty rows for tokens behind the last sequence where the op takes them for rows of its own.

    The op tells lists by sequence from the rows of all sequences by the batch size, and with one sequence they are the same.
    """
    missing = num_blocks(num_tokens, q_block_size) - indices.shape[2]
    if indices.shape[0] > 1 or missing <= 0:
        return indices
    return jnp.pad(indices, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=-1)
