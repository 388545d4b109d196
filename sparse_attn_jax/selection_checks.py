"""Every `ValueError` of scoring and selection: each names the argument, what was found and what is needed."""

import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_attn_jax.problem import MAX_LENGTH
from sparse_attn_jax.scoring_problem import GROUP_REDUCTIONS, POOLINGS, num_units
from sparse_attn_jax.selection import num_blocks

MAX_INT = 2**31 - 1

KEY_AXES = ("batch", "kv_len", "num_kv_heads", "head_dim")
QUERY_AXES = ("batch", "q_len", "num_q_heads", "head_dim")
UNIT_AXES = ("batch", "num_units", "num_kv_heads", "head_dim")
SCORE_AXES = ("batch", "heads", "q_len", "num_kv_blocks")


def check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"`{name}` is {value!r}; it must be an int of at least {minimum}.")
    if value > MAX_INT:
        raise ValueError(f"`{name}` is {value}; sizes and positions are int32, so it must be at most {MAX_INT}.")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; it must be True or False.")


def check_choice(name: str, value: object, choices: Sequence) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def check_scale(scale: object) -> None:
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        raise ValueError(f"`scale` is {scale!r}; it must be a Python float or None.")


def check_length(name: str, length: int) -> None:
    check_int(name, length, 0)
    if length > MAX_LENGTH:
        raise ValueError(f"`{name}` is {length}; positions are int32, so it must be at most {MAX_LENGTH}.")


def check_array(name: str, array: jax.Array, axes: Sequence[str]) -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ValueError(f"`{name}` is {array!r}; it must be an array [{', '.join(axes)}].")
    if array.ndim != len(axes):
        raise ValueError(f"`{name}` has shape {array.shape}; it must be [{', '.join(axes)}].")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"`{name}` has dtype {array.dtype}; it must be a floating dtype.")


def check_units(prefix: str, kernel_size: int, kernel_stride: int) -> None:
    check_int(f"{prefix}kernel_size", kernel_size, 1)
    check_int(f"{prefix}kernel_stride", kernel_stride, 1)


def check_key(key: jax.Array) -> None:
    check_array("key", key, KEY_AXES)
    check_length("kv_len", key.shape[1])


def check_query(query: jax.Array, other: jax.Array, other_name: str) -> None:
    """The query fits `other`, a key or an array of units."""
    check_array("query", query, QUERY_AXES)
    check_length("q_len", query.shape[1])
    for axis in (0, 3):
        if query.shape[axis] != other.shape[axis]:
            raise ValueError(
                f"`query` has {QUERY_AXES[axis]} {query.shape[axis]} and `{other_name}` has {other.shape[axis]}; "
                "they must be equal."
            )
    num_q_heads, num_kv_heads = query.shape[2], other.shape[2]
    if num_kv_heads == 0 or num_q_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"`query` has {num_q_heads} heads and `{other_name}` has {num_kv_heads}; "
            "the query heads must be a positive multiple of the KV heads."
        )


def check_unit_array(
    name: str, units: jax.Array, kv_len: int, kernel_size: int, kernel_stride: int, like: jax.Array | None = None
) -> None:
    """`units` holds every complete unit of `kv_len` tokens; `like` is another array of units of the same keys."""
    check_array(name, units, UNIT_AXES)
    expected = num_units(kv_len, kernel_size, kernel_stride)
    if units.shape[1] != expected:
        raise ValueError(
            f"`{name}` has {units.shape[1]} units; kv_len={kv_len} with kernel size {kernel_size} and stride "
            f"{kernel_stride} has {expected} complete ones. Use `compress_keys` with the same sizes."
        )
    if like is not None and (units.shape[0], *units.shape[2:]) != (like.shape[0], *like.shape[2:]):
        raise ValueError(f"`{name}` has shape {units.shape}; all but its units must equal those of {like.shape}.")
    if like is not None and units.dtype != like.dtype:
        raise ValueError(f"`{name}` is {units.dtype}; it must be {like.dtype}, as the other units are.")


def check_q_offset(q_offset: object, batch: int, q_len: int, kv_len: int) -> None:
    if q_offset is None:
        return
    if not hasattr(q_offset, "dtype"):
        check_int("q_offset", q_offset, -MAX_LENGTH)
        if q_offset + q_len > MAX_LENGTH:
            raise ValueError(f"`q_offset` is {q_offset}; with q_len={q_len} it must end by {MAX_LENGTH}.")
        return
    if not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"`q_offset` has dtype {q_offset.dtype}; it must be an integer dtype.")
    if q_offset.shape not in ((), (batch,)):
        raise ValueError(f"`q_offset` has shape {q_offset.shape}; it must be a scalar or [batch] = [{batch}].")


def check_reductions(pooling: str, group_reduction: str | None) -> None:
    check_choice("pooling", pooling, POOLINGS)
    check_choice("group_reduction", group_reduction, GROUP_REDUCTIONS)


def check_forced_blocks(top_k: int, num_sink_blocks: int, num_local_blocks: int) -> None:
    check_int("top_k", top_k, 1)
    check_int("num_sink_blocks", num_sink_blocks, 0)
    check_int("num_local_blocks", num_local_blocks, 0)
    if num_sink_blocks + num_local_blocks > top_k:
        raise ValueError(
            f"`top_k` is {top_k}; {num_sink_blocks=} and {num_local_blocks=} count inside it, so it must be at least "
            f"{num_sink_blocks + num_local_blocks}."
        )


def check_own_block(num_local_blocks: int, is_causal: bool) -> None:
    if is_causal and num_local_blocks == 0:
        raise ValueError("`num_local_blocks` is 0; a causal query always keeps its own block, so it must be at least 1.")


def check_scores(scores: jax.Array, kv_len: int, block_size: int) -> None:
    check_array("scores", scores, SCORE_AXES)
    if scores.shape[3] != num_blocks(kv_len, block_size):
        raise ValueError(
            f"`scores` has {scores.shape[3]} blocks; {kv_len=} and {block_size=} make {num_blocks(kv_len, block_size)}."
        )
