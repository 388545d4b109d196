"""Arguments of the op -> `Problem`, with every `ValueError`. Reads shapes and dtypes only, never values of arrays."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.planning import TilePlan, default_tile_size, index_overflow
from sparse_attn_jax.problem import MAX_LENGTH, SUPPORTED_DTYPES, Problem, device_of
from sparse_attn_jax.selection import BlockSelection, check_block_sizes, num_blocks
from sparse_attn_jax.window_predicate import WindowPredicate, fold_window


def describe(x: Any) -> str:
    """What was found, for an error message: `float32[2, 3]` for arrays, the value for the rest."""
    return f"{x.dtype}{list(x.shape)}" if is_array(x) else repr(x)


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def require(condition: bool, name: str, found: Any, needed: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {describe(found)}; it must be {needed}.")


def check_qkv(
    query: Any, key: Any, value: Any, *, packed: bool = False, names: Sequence[str] = ("query", "key", "value")
) -> None:
    """Ranks, dtypes, heads and dims of query, key and value that must agree; `names` are what the caller calls them."""
    axes = "[tokens, num_heads, head_dim]" if packed else "[batch, length, num_heads, head_dim]"
    for name, x in zip(names, (query, key, value), strict=True):
        require(is_array(x), name, x, f"an array {axes}")
        require(len(x.shape) == (3 if packed else 4), name, x, f"of shape {axes}")
        require(x.dtype.name in SUPPORTED_DTYPES, name, x, f"of dtype {', '.join(SUPPORTED_DTYPES)}")
        require(0 not in x.shape[-2:], name, x, "of at least one head and one dimension")
        if not packed:
            require(x.shape[1] <= MAX_LENGTH, name, x, f"at most {MAX_LENGTH} tokens long: positions are int32")
            require(x.shape[0] == query.shape[0], name, x, f"of batch size {query.shape[0]}, as `{names[0]}`")
        require(x.dtype == query.dtype, name, x, f"of dtype {query.dtype}, as `{names[0]}`")
    require(key.shape[-1] == query.shape[-1], names[1], key, f"of head_dim {query.shape[-1]}, as `{names[0]}`")
    require(value.shape[-2] == key.shape[-2], names[2], value, f"of {key.shape[-2]} heads, as `{names[1]}`")
    require(value.shape[-3] == key.shape[-3], names[2], value, f"of length {key.shape[-3]}, as `{names[1]}`")
    num_kv_heads = key.shape[-2]
    needed = f"of a multiple of {num_kv_heads} heads: `{names[1]}` has {num_kv_heads}"
    require(query.shape[-2] % num_kv_heads == 0, names[0], query, needed)


def check_selection(selection: BlockSelection, *, batch: int, q_len: int | None, num_q_heads: int, num_kv_heads: int) -> None:
    """Shape and dtype of a selection's indices. `q_len=None` leaves the number of rows alone."""
    check_block_sizes(selection.q_block_size, selection.kv_block_size)
    indices = selection.indices
    name = "selection.indices"
    require(is_array(indices), name, indices, "an int32 array")
    require(indices.dtype == jnp.int32, name, indices, "of dtype int32")
    require(len(indices.shape) == 4, name, indices, "of shape [batch or 1, heads, num_q_blocks, num_slots]")
    require(indices.shape[0] in (1, batch), name, indices, f"of batch size 1 or {batch}")
    heads = sorted({1, num_kv_heads, num_q_heads})
    require(indices.shape[1] in heads, name, indices, f"of {' or '.join(map(str, heads))} heads")
    require(indices.shape[3] >= 1, name, indices, "of at least one slot")
    if q_len is not None:
        rows = num_blocks(q_len, selection.q_block_size)
        needed = f"of {rows} query blocks: {q_len} queries in blocks of q_block_size={selection.q_block_size}"
        require(indices.shape[2] == rows, name, indices, needed)
    predicate = selection.predicate
    require(predicate is None or callable(predicate), "selection.predicate", predicate, "callable or None")


def check_plan(plan: TilePlan, *, batch: int, q_len: int, kv_len: int, num_q_heads: int, num_kv_heads: int) -> None:
    """A plan must have been made for the sizes it is used with."""
    found = dict(q_len=plan.q_len, kv_len=plan.kv_len, num_q_heads=plan.num_q_heads, num_kv_heads=plan.num_kv_heads)
    needed = dict(q_len=q_len, kv_len=kv_len, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    if found != needed:
        raise ValueError(f"`selection` is a plan for {found}; these arguments need {needed}.")
    require(plan.blocks.shape[0] in (1, batch), "selection.blocks", plan.blocks, f"of batch size 1 or {batch}")


def check_plan_sizes(selection: BlockSelection, q_len: int, kv_len: int, group_size: int, tile_size: int | None) -> None:
    """Refuses sizes that would overflow the int32 arithmetic of a plan."""
    if tile_size is None:
        tile_size = default_tile_size(selection.q_block_size, group_size, q_len)
    require(isinstance(tile_size, int) and tile_size >= 1, "tile_size", tile_size, "an int of at least 1")
    row_groups = tile_size // math.gcd(tile_size, selection.q_block_size) * group_size
    num_kv_blocks = num_blocks(kv_len, selection.kv_block_size)
    capacity = min(num_kv_blocks, row_groups * selection.indices.shape[-1])
    overflow = index_overflow(num_kv_blocks, row_groups, num_blocks(q_len, tile_size), capacity)
    if overflow is not None:
        raise ValueError(f"`selection` is {describe(selection.indices)}, too large: {overflow}.")


def check_integers(name: str, x: Any, *shapes: tuple[int, ...]) -> None:
    """An int, or an integer array of one of `shapes`."""
    if isinstance(x, int | np.integer) and not isinstance(x, bool):
        return
    needed = " or ".join(["an int", *(f"an integer array {list(shape)}" for shape in shapes)])
    require(is_array(x) and jnp.issubdtype(x.dtype, jnp.integer), name, x, needed)
    require(tuple(x.shape) in ((), *shapes), name, x, needed)


def check_window(local_window_size: Any, num_sinks: Any, num_q_heads: int) -> None:
    per_head = (num_q_heads,)
    if local_window_size is not None:
        window = local_window_size
        is_pair = isinstance(window, Sequence) and len(window) == 2
        require(is_pair or isinstance(window, int), "local_window_size", window, "a pair (left, right), an int or None")
        for side, size in zip(("left", "right"), window if is_pair else (window, window), strict=True):
            _check_count(f"local_window_size {side}", size, per_head, optional=True)
    _check_count("num_sinks", num_sinks, per_head)


def check_window_predicate(predicate: WindowPredicate, num_q_heads: int) -> None:
    for name in ("left", "right", "num_sinks"):
        size, is_optional = getattr(predicate, name), name != "num_sinks"
        _check_count(f"selection.predicate.{name}", size, (num_q_heads,), optional=is_optional)


def _check_count(name: str, x: Any, shape: tuple[int, ...], optional: bool = False) -> None:
    if optional and x is None:
        return
    check_integers(name, x, shape)
    if isinstance(x, int | np.integer):
        require(0 <= x <= MAX_LENGTH, name, x, f"between 0 and {MAX_LENGTH}")


def check_segment_ids(query_ids: Any, kv_ids: Any, batch: int, q_len: int, kv_len: int) -> None:
    rows = (("query_segment_ids", query_ids, q_len), ("key_value_segment_ids", kv_ids, kv_len))
    if query_ids is None and kv_ids is None:
        return
    for name, x, length in rows:
        needed = f"an integer array [{batch}, {length}], given together with the other side's segment ids"
        require(is_array(x) and jnp.issubdtype(x.dtype, jnp.integer), name, x, needed)
        require(tuple(x.shape) == (batch, length), name, x, needed)


def check_key_bias(key_bias: Any, shape: tuple[int, ...]) -> None:
    if key_bias is None:
        return
    needed = f"a floating-point array {list(shape)}"
    require(is_array(key_bias) and jnp.issubdtype(key_bias.dtype, jnp.floating), "key_bias", key_bias, needed)
    require(tuple(key_bias.shape) == tuple(shape), "key_bias", key_bias, needed)


def check_varlen(
    query: Any, key: Any, value: Any, selection: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, q_offset: Any, key_bias: Any
) -> None:
    """What packed sequences need before they can be laid out as one row."""
    check_qkv(query, key, value, packed=True)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        require(is_array(x) and x.dtype == jnp.int32, name, x, "an int32 array [num_sequences + 1]")
        require(len(x.shape) == 1 and x.shape[0] >= 2, name, x, "an int32 array [num_sequences + 1] of at least one sequence")
    needed = f"of length {cu_seqlens_q.shape[0]}, as `cu_seqlens_q`"
    require(cu_seqlens_kv.shape == cu_seqlens_q.shape, "cu_seqlens_kv", cu_seqlens_kv, needed)
    require(isinstance(selection, BlockSelection), "selection", selection, "a BlockSelection")
    num_sequences, q_tokens = cu_seqlens_q.shape[0] - 1, query.shape[0]
    heads = dict(num_q_heads=query.shape[1], num_kv_heads=key.shape[1])
    check_selection(selection, batch=num_sequences, q_len=None, **heads)
    indices, q_block_size = selection.indices, selection.q_block_size
    if indices.shape[0] == 1:
        rows = num_blocks(q_tokens, q_block_size)
        needed = f"of at least {rows} rows: {q_tokens} packed queries in blocks of q_block_size={q_block_size}"
        require(indices.shape[2] >= rows, "selection.indices", indices, needed)
    if q_offset is not None:
        check_integers("q_offset", q_offset, (num_sequences,))
    check_key_bias(key_bias, (key.shape[1], key.shape[0]))


def static_float(name: str, x: Any) -> float:
    """A number that is known while tracing."""
    concrete = isinstance(x, int | float | np.number) or (is_array(x) and x.shape == () and not isinstance(x, jax.core.Tracer))
    require(concrete and not isinstance(x, bool), name, x, "a number known while tracing")
    require(math.isfinite(float(x)), name, x, "finite")
    return float(x)


def check_options(is_causal: Any, scale: Any, logits_soft_cap: Any, head_dim: int) -> tuple[float, float | None]:
    """The static options; returns the scale and the soft cap as floats."""
    require(isinstance(is_causal, bool | np.bool_), "is_causal", is_causal, "a bool")
    scale = head_dim**-0.5 if scale is None else static_float("scale", scale)
    if logits_soft_cap is not None:
        logits_soft_cap = static_float("logits_soft_cap", logits_soft_cap)
        require(logits_soft_cap > 0, "logits_soft_cap", logits_soft_cap, "greater than 0, or None")
    return scale, logits_soft_cap


def make_problem(
    query: Any,
    key: Any,
    value: Any,
    selection: BlockSelection | TilePlan,
    *,
    is_causal: bool,
    local_window_size: Any,
    num_sinks: Any,
    q_offset: Any,
    query_segment_ids: Any,
    key_value_segment_ids: Any,
    key_bias: Any,
    scale: Any,
    logits_soft_cap: Any,
    varlen: bool = False,
) -> Problem:
    """Checks all arguments of `block_sparse_attention` and describes the call."""
    check_qkv(query, key, value)
    batch, q_len, num_q_heads, head_dim = query.shape
    kv_len, num_kv_heads, value_head_dim = value.shape[1:]
    sizes = dict(batch=batch, q_len=q_len, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    if isinstance(selection, TilePlan):
        check_plan(selection, kv_len=kv_len, **sizes)
        selection_heads, num_slots = selection.selection_heads, selection.num_slots
    else:
        require(isinstance(selection, BlockSelection), "selection", selection, "a BlockSelection or a TilePlan")
        check_selection(selection, **sizes)
        selection_heads, num_slots = selection.indices.shape[1], selection.indices.shape[3]
        check_plan_sizes(selection, max(q_len, 1), kv_len, num_q_heads // num_kv_heads, None)
    check_window(local_window_size, num_sinks, num_q_heads)
    if isinstance(selection.predicate, WindowPredicate):
        check_window_predicate(selection.predicate, num_q_heads)
    local_window_size, num_sinks, predicate = fold_window(selection.predicate, local_window_size, num_sinks)
    if q_offset is not None:
        check_integers("q_offset", q_offset, (batch,))
        if isinstance(q_offset, int):
            require(abs(q_offset) <= MAX_LENGTH, "q_offset", q_offset, f"between -{MAX_LENGTH} and {MAX_LENGTH}")
    check_segment_ids(query_segment_ids, key_value_segment_ids, batch, q_len, kv_len)
    check_key_bias(key_bias, (batch, num_kv_heads, kv_len))
    scale, logits_soft_cap = check_options(is_causal, scale, logits_soft_cap, head_dim)
    return Problem(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        dtype=query.dtype.name,
        q_block_size=selection.q_block_size,
        kv_block_size=selection.kv_block_size,
        num_slots=num_slots,
        selection_heads=selection_heads,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        is_causal=bool(is_causal),
        has_window=local_window_size is not None,
        has_sinks=not (isinstance(num_sinks, int) and num_sinks == 0),
        has_segment_ids=query_segment_ids is not None,
        has_key_bias=key_bias is not None,
        predicate=None if predicate is None else type(predicate).__name__,
        varlen=varlen,
        **device_of(query)._asdict(),
    )
