"""Attention over pages in XLA: a loop over a few blocks of every list at a time, with online softmax.

A list is one of (batch row, head, row of queries). Every list's blocks are ordered and split into parts of equal length, which
are walked in lockstep and merged at the end. Heads of lists are KV heads, or query heads where these have lists of their own.
A block is read as whole pages, or as a part of one: units of `gcd(page_size, selection_block_size)` tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparse_attn_jax import jax_compat
from sparse_attn_jax.page_tables import look_up
from sparse_attn_jax.paged_problem import PagedOperands, PagedProblem
from sparse_attn_jax.selection import num_blocks

# Tokens of a list that are read at a time, and bytes of all that are: enough to keep two cores busy, and soon walked in vain.
CHUNK_TOKENS = 128
STEP_BYTES = 2**20
NO_BLOCK = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much one step of the loop reads.

    Attributes:
      num_splits: parts of a list, walked side by side.
      chunk: blocks of a part.
    """

    num_splits: int
    chunk: int


def choose_schedule(problem: PagedProblem) -> Schedule:
    chunk = min(max(1, CHUNK_TOKENS // problem.selection_block_size), problem.list_len)
    if problem.num_splits is not None:
        return Schedule(problem.num_splits, chunk)
    lists = problem.batch * max(problem.selection_heads, problem.num_kv_heads) * problem.selection_rows
    tokens = lists * chunk * problem.selection_block_size
    step_bytes = tokens * (problem.head_dim + problem.value_head_dim) * jnp.dtype(problem.dtype).itemsize
    return Schedule(max(1, min(STEP_BYTES // step_bytes, num_blocks(problem.list_len, chunk))), chunk)


def attend_pages(problem: PagedProblem, operands: PagedOperands) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the keys that count for it, see `paged_block_sparse_attention`.

    Returns:
      out [batch, q_len, num_q_heads, value_head_dim] in the query's dtype and the natural-log lse [batch, q_len, num_q_heads].
    """
    schedule = choose_schedule(problem)
    rows = _to_rows(problem, operands)
    lists, counts = _make_lists(problem, operands, rows)
    shape = (problem.batch, rows.query.shape[1], *lists.shape[2:])
    lists = jnp.broadcast_to(lists, shape)
    counts = jnp.broadcast_to(counts, shape[:-1])[..., None]  # [batch, heads, selection_rows, 1]
    split = jnp.arange(schedule.num_splits, dtype=jnp.int32)
    shortest, num_longer = counts // schedule.num_splits, counts % schedule.num_splits
    first = split * shortest + jnp.minimum(split, num_longer)
    end = first + shortest + (split < num_longer)
    query = rows.query.astype(_matmul_dtype(problem))[:, :, :, None]  # [batch, heads, selection_rows, 1, queries, head_dim]

    def attend_chunk(step, carry):
        row_max, row_sum, acc = carry
        slot = first[..., None] + step * schedule.chunk + jnp.arange(schedule.chunk, dtype=jnp.int32)
        blocks = jnp.take_along_axis(lists[..., None, :], jnp.minimum(slot, lists.shape[-1] - 1), axis=-1)
        blocks = jnp.where(slot < end[..., None], blocks, NO_BLOCK)
        keys = _locate(problem, operands, blocks)
        visible = _is_visible(keys.position, rows) & keys.exists[..., None, :]
        logits = jnp.einsum("bhrsmd,bhrstd->bhrsmt", query, _load(problem, operands.key_pages, keys), **_product(problem))
        logits = jnp.where(visible, _cap(problem, logits * problem.scale), -jnp.inf)
        new_max = jnp.maximum(row_max, logits.max(-1, keepdims=True))
        shift = jnp.where(new_max == -jnp.inf, 0, new_max)
        probs, rescale = jnp.exp(logits - shift), jnp.exp(row_max - shift)
        # What no query sees may be anything, NaN too.
        value = jnp.where(visible.any(axis=-2)[..., None], _load(problem, operands.value_pages, keys), 0)
        product = jnp.einsum("bhrsmt,bhrstd->bhrsmd", probs.astype(value.dtype), value, **_product(problem))
        return new_max, row_sum * rescale + probs.sum(-1, keepdims=True), acc * rescale + product

    stat = jnp.zeros((*first.shape, query.shape[-2], 1), _accumulator_dtype(problem))
    acc = jnp.zeros((*stat.shape[:-1], problem.value_head_dim), stat.dtype)
    carry = tuple(jax_compat.vary_like(x, operands) for x in (stat - jnp.inf, stat, acc))
    num_steps = num_blocks((end - first).max(), schedule.chunk)
    return _from_rows(problem, *_merge(*jax.lax.fori_loop(0, num_steps, attend_chunk, carry)))


def _accumulator_dtype(problem: PagedProblem):
    return jnp.dtype("float64" if problem.dtype == "float64" else "float32")


def _matmul_dtype(problem: PagedProblem):
    """CPUs have no fast 16-bit matmul; elsewhere the operands keep their dtype."""
    return _accumulator_dtype(problem) if problem.platform == "cpu" else jnp.dtype(problem.dtype)


def _product(problem: PagedProblem) -> dict:
    return dict(preferred_element_type=_accumulator_dtype(problem))


def _cap(problem: PagedProblem, logits: jax.Array) -> jax.Array:
    cap = problem.logits_soft_cap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


# ---- queries by list: [batch, heads, selection_rows, queries of the list, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The queries of each list, and what limits the keys they see. Broadcasts with [batch, heads, selection_rows, queries]."""

    query: jax.Array  # [batch, heads, selection_rows, queries, head_dim]
    position: jax.Array  # int32
    window_start: jax.Array | None  # int32, the first key of the window
    num_sinks: jax.Array | None  # int32


def _to_rows(problem: PagedProblem, operands: PagedOperands) -> Rows:
    position = operands.seq_lens[:, None] - problem.q_len + jnp.arange(problem.q_len, dtype=jnp.int32)
    position = position[:, :, None, None]
    start = sinks = None
    if problem.has_window:
        start = _by_list(problem, position - operands.window_left[:, None])[..., 0]
    if problem.has_sinks:
        sinks = jnp.broadcast_to(operands.num_sinks[:, None], (1, problem.q_len, problem.num_q_heads, 1))
        sinks = _by_list(problem, sinks)[..., 0]
    position = jnp.broadcast_to(position, (problem.batch, problem.q_len, problem.num_q_heads, 1))
    return Rows(_by_list(problem, operands.query), _by_list(problem, position)[..., 0], start, sinks)


def _by_list(problem: PagedProblem, x: jax.Array) -> jax.Array:
    """[batch or 1, q_len, num_q_heads, n] to [batch or 1, heads, selection_rows, queries, n]."""
    heads = max(problem.selection_heads, problem.num_kv_heads)
    rows = problem.selection_rows
    x = x.reshape(x.shape[0], rows, problem.q_len // rows, heads, problem.num_q_heads // heads, x.shape[-1])
    return x.transpose(0, 3, 1, 2, 4, 5).reshape(x.shape[0], heads, rows, -1, x.shape[-1])


def _from_rows(problem: PagedProblem, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_by_list`, for out [batch, heads, selection_rows, queries, n] and lse [..., queries]."""
    batch, heads, rows = out.shape[:3]

    def back(x):
        x = x.reshape(batch, heads, rows, problem.q_len // rows, problem.num_q_heads // heads, -1)
        return x.transpose(0, 2, 3, 1, 4, 5).reshape(batch, problem.q_len, problem.num_q_heads, -1)

    return back(out).astype(problem.dtype), back(lse)[..., 0]


def _is_visible(position: jax.Array, rows: Rows) -> jax.Array:
    """Keys at int32 [batch, heads, selection_rows, splits, tokens]: bool [..., queries, tokens]."""
    position = position[..., None, :]
    per_query = lambda x: x[:, :, :, None, :, None]
    visible = position <= per_query(rows.position)
    if rows.window_start is None:
        return visible
    near = position >= per_query(rows.window_start)
    return visible & (near if rows.num_sinks is None else near | (position < per_query(rows.num_sinks)))


def _merge(row_max: jax.Array, row_sum: jax.Array, acc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """out and lse of the parts together, which are along axis 3."""
    largest = row_max.max(axis=3, keepdims=True)
    weight = jnp.exp(row_max - jnp.where(largest == -jnp.inf, 0, largest))
    total = (row_sum * weight).sum(axis=3)
    out = (acc * weight).sum(axis=3) / jnp.where(total == 0, 1, total)
    return out, (largest[:, :, :, 0] + jnp.log(total))[..., 0]


# ---- lists of blocks


def _make_lists(problem: PagedProblem, operands: PagedOperands, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """The blocks that some query of the list may see, once each, ascending, before all else; and how many they are.

    Returns:
      int32 [batch, selection_heads, selection_rows, list_len] and int32 [batch, selection_heads, selection_rows].
    """
    heads = (problem.batch, problem.selection_heads, problem.selection_rows)
    if operands.page_selection is None:
        ids = jnp.broadcast_to(jnp.arange(problem.num_blocks, dtype=jnp.int32), (*heads, problem.num_blocks))
        is_listed = True
    else:
        ids = jnp.sort(operands.page_selection, axis=-1)
        is_listed = (ids >= 0) & (ids < problem.num_blocks)
        is_listed &= jnp.concatenate([jnp.ones_like(is_listed[..., :1]), ids[..., 1:] != ids[..., :-1]], axis=-1)
    start = jnp.clip(ids, 0, problem.num_blocks - 1) * problem.selection_block_size
    is_listed &= start <= _over_queries(problem, jnp.max, rows.position)
    if problem.has_window:
        is_near = start + (problem.selection_block_size - 1) >= _over_queries(problem, jnp.min, rows.window_start)
        if problem.has_sinks:
            is_near |= start < _over_queries(problem, jnp.max, rows.num_sinks)
        is_listed &= is_near
    is_ordered = operands.page_selection is None and not problem.has_window
    ids = jnp.where(is_listed, ids, NO_BLOCK)
    return ids if is_ordered else jnp.sort(ids, axis=-1), is_listed.sum(axis=-1, dtype=jnp.int32)


def _over_queries(problem: PagedProblem, reduce, x: jax.Array) -> jax.Array:
    """[batch or 1, heads, selection_rows, queries] to [batch or 1, selection_heads, selection_rows, 1]."""
    axes = (1, 3) if problem.selection_heads == 1 else (3,)
    return reduce(x, axis=axes, keepdims=True)


# ---- keys and values of blocks


@dataclasses.dataclass(frozen=True)
class Keys:
    """The tokens of some blocks of every part, int32 and bool [batch, heads, selection_rows, splits, tokens]."""

    position: jax.Array
    exists: jax.Array
    units: jax.Array  # int32 [batch, heads, selection_rows, splits, units], out of range where there is no page
    unit_size: int


def _locate(problem: PagedProblem, operands: PagedOperands, blocks: jax.Array) -> Keys:
    unit_size = math.gcd(problem.page_size, problem.selection_block_size)
    inside = blocks < problem.num_blocks
    start = jnp.where(inside, blocks, 0) * problem.selection_block_size
    start = start[..., None] + jnp.arange(0, problem.selection_block_size, unit_size, dtype=jnp.int32)
    page = look_up(operands.block_tables, jnp.where(inside[..., None], start // problem.page_size, -1), problem.num_pages)
    per_page = problem.page_size // unit_size
    units = (page * per_page + start % problem.page_size // unit_size).reshape(*blocks.shape[:-1], -1)
    position = start[..., None] + jnp.arange(unit_size, dtype=jnp.int32)
    exists = jnp.broadcast_to((page < problem.num_pages)[..., None], position.shape)
    flat = (*blocks.shape[:-1], -1)
    return Keys(position.reshape(flat), exists.reshape(flat), units, unit_size)


def _load(problem: PagedProblem, pages: jax.Array, keys: Keys) -> jax.Array:
    """[batch, heads, selection_rows, splits, tokens, n]; zeros where there is no page."""
    heads = keys.units.shape[1]
    kv_heads = jnp.arange(heads, dtype=jnp.int32) // (heads // problem.num_kv_heads)
    units = pages.reshape(-1, keys.unit_size, *pages.shape[2:])
    found = units.at[keys.units, :, kv_heads[:, None, None, None]].get(mode="fill", fill_value=0)
    return found.reshape(*keys.position.shape, -1).astype(_matmul_dtype(problem))
