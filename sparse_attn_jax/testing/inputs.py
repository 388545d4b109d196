"""Seeded inputs for a case, and generators of indices: uniform, local, and as a trained scorer would choose them."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.testing.cases import Case

INT32 = np.iinfo(np.int32)

# Rows scored at a time: 4,096 rows x 1,024 blocks of float32 are 16 MiB.
ROWS_PER_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one call of the op, and the cotangents of its results."""

    operands: dict[str, jax.Array]  # query, key, value and perhaps key_bias: what has a gradient
    selection: BlockSelection
    options: dict[str, Any]  # the op's other keyword arguments
    d_out: jax.Array  # [batch, q_len, num_q_heads, value_head_dim]
    d_lse: jax.Array  # float32 (float64) [batch, q_len, num_q_heads]

    @property
    def dtype(self) -> str:
        return self.operands["query"].dtype.name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DilatedPredicate:
    """Keeps every `stride`-th key, at a phase that differs by head and batch row."""

    phase: jax.Array  # int32 [num_q_heads]
    stride: int = dataclasses.field(metadata=dict(static=True))

    def __call__(self, batch, head, q_position, kv_position):
        return (kv_position + self.phase[head] + batch) % self.stride == q_position % self.stride


def make_inputs(case: Case) -> Inputs:
    """Inputs of `case`: query, key, value, bias and cotangents are N(0, 1), seeded by the case's name.

    A float64 case needs `jax.enable_x64`.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    statistics_dtype = "float64" if case.dtype == "float64" else "float32"

    def normal(dtype, *shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q_shape = (case.batch, case.q_len, case.num_q_heads)
    kv_shape = (case.batch, case.kv_len, case.num_kv_heads)
    operands = dict(
        query=normal(case.dtype, *q_shape, case.head_dim),
        key=normal(case.dtype, *kv_shape, case.head_dim),
        value=normal(case.dtype, *kv_shape, case.value_head_dim or case.head_dim),
    )
    if case.sink_strength:
        operands = with_sink_columns(operands, case.sink_strength)
    if case.has_key_bias:
        operands["key_bias"] = normal(statistics_dtype, case.batch, case.num_kv_heads, case.kv_len)
    d_out = normal(case.dtype, *q_shape, case.value_head_dim or case.head_dim)
    d_lse = normal(statistics_dtype, *q_shape) * case.has_lse_gradient
    return Inputs(operands, make_selection(case), make_options(case, rng), d_out, d_lse)


def with_sink_columns(operands: dict[str, jax.Array], strength: float) -> dict[str, jax.Array]:
    """Adds a direction that all queries and the first two keys share: these logits rise by strength**2 / sqrt(head_dim)."""
    shift = jnp.zeros(operands["query"].shape[-1], operands["query"].dtype).at[0].set(strength)
    return operands | dict(query=operands["query"] + shift, key=operands["key"].at[:, :2].add(shift))


def make_options(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """The op's keyword arguments for `case`: only those that it sets."""
    options = {name: getattr(case, name) for name in ("scale", "logits_soft_cap") if getattr(case, name) is not None}

    def array(x):
        return jnp.asarray(x, jnp.int32) if isinstance(x, tuple) else x

    if case.is_causal:
        options["is_causal"] = True
    if case.q_offset is not None:
        options["q_offset"] = array(case.q_offset)
    if case.local_window_size is not None:
        options["local_window_size"] = tuple(array(side) for side in case.local_window_size)
    if case.num_sinks != 0:
        options["num_sinks"] = array(case.num_sinks)
    if case.num_segments:

        def segments(length):
            return jnp.asarray(np.sort(rng.integers(0, case.num_segments, (case.batch, length))), jnp.int32)

        kv_segment_ids = segments(case.kv_len)
        same = case.q_len == case.kv_len
        options |= dict(
            query_segment_ids=kv_segment_ids if same else segments(case.q_len), key_value_segment_ids=kv_segment_ids
        )
    return options


def make_selection(case: Case) -> BlockSelection:
    heads = case.selection_heads or case.num_kv_heads
    seed = zlib.crc32(case.name.encode()) + 1
    shape = dict(
        batch=case.selection_batch or case.batch,
        heads=heads,
        q_len=case.q_len,
        kv_len=case.kv_len,
        num_slots=case.num_slots,
        q_block_size=case.q_block_size,
        kv_block_size=case.kv_block_size,
    )
    indices = INDEX_GENERATORS[case.indices](**shape, is_causal=case.is_causal, q_offset=case.q_offset, seed=seed)
    predicate = None
    if case.predicate_stride is not None:
        phase = jnp.arange(case.num_q_heads, dtype=jnp.int32)
        predicate = DilatedPredicate(phase, stride=case.predicate_stride)
    return BlockSelection(
        jnp.asarray(indices), q_block_size=case.q_block_size, kv_block_size=case.kv_block_size, predicate=predicate
    )


def own_blocks(*, batch, q_len, kv_len, q_block_size, kv_block_size, is_causal, q_offset) -> np.ndarray:
    """The last KV block that each query block may see: int [batch, num_q_blocks], -1 where it sees none.

    Without causality that is the last block there is.
    """
    num_kv_blocks = -(-kv_len // kv_block_size)
    last_query = np.minimum(np.arange(q_block_size, q_len + q_block_size, q_block_size), q_len) - 1
    if not is_causal:
        return np.full((batch, len(last_query)), num_kv_blocks - 1)
    offset = np.broadcast_to(kv_len - q_len if q_offset is None else q_offset, (batch,))
    own = (last_query + offset[:, None]) // kv_block_size  # floor: a negative position has block -1 or less
    return np.clip(own, -1, num_kv_blocks - 1)


def random_indices(
    *, batch, heads, q_len, kv_len, num_slots, q_block_size=1, kv_block_size=64, is_causal=False, q_offset=None, seed=0
) -> np.ndarray:
    """Distinct uniformly random blocks in random order, not future ones if causal, -1 after them.

    Neighbouring queries share nothing but by chance: the worst case for anything that relies on locality.

    Returns:
      int32 [batch, heads, num_q_blocks, num_slots].
    """
    own = own_blocks(**grid(locals()))
    rng = np.random.default_rng(seed)
    num_kv_blocks = -(-kv_len // kv_block_size)

    def draw(rows):
        return rng.random((len(rows), num_kv_blocks), dtype=np.float32)

    ids = best_blocks(draw, rows_of(own, heads), num_slots)
    order = np.where(ids < 0, 2.0, rng.random(ids.shape, dtype=np.float32)).argsort(axis=-1)
    return np.take_along_axis(ids, order, axis=-1).reshape(batch, heads, own.shape[1], num_slots)


def local_indices(
    *, batch, heads, q_len, kv_len, num_slots, q_block_size=1, kv_block_size=64, is_causal=False, q_offset=None, seed=0
) -> np.ndarray:
    """A band: if causal the own block and those before it, otherwise `num_slots` blocks around the diagonal. Ascending.

    All neighbours share nearly all blocks: the best case. `seed` is not used; the signature is that of the other generators.

    Returns:
      int32 [batch, heads, num_q_blocks, num_slots].
    """
    last = own_blocks(**(grid(locals()) | dict(is_causal=True)))
    if not is_causal:
        last = last + num_slots // 2
    ids = last[:, None, :, None] + np.arange(1 - num_slots, 1)
    ids = np.where((ids >= 0) & (ids < -(-kv_len // kv_block_size)), ids, -1)
    return np.broadcast_to(ids, (batch, heads, *ids.shape[2:])).astype(np.int32)


def realistic_indices(
    *, batch, heads, q_len, kv_len, num_slots, q_block_size=1, kv_block_size=64, is_causal=False, q_offset=None,
    num_sink_blocks=1, num_local_blocks=2, correlation_tokens=64, jitter=0.25, seed=0,
) -> np.ndarray:  # fmt: skip
    """Sink, local and top-k blocks whose choice drifts slowly from token to token. Ascending, -1 last.

    Construction: every KV block has a latent N(0, 1) vector of 8 dimensions and a popularity 0.5 * N(0, 1), both per batch row
    and head. The query side has a latent vector that moves linearly between N(0, 1) anchors `correlation_tokens` apart, plus
    `jitter` * N(0, 1) anew for each query block. A block's score is the dot product of both plus sqrt(8) times the popularity.
    The first `num_sink_blocks` and the last `num_local_blocks` visible blocks are forced, and the best scores fill the other
    slots, as in InfLLM-v2. With the defaults, 64 slots and 1,024 blocks, neighbouring tokens share about three quarters of
    their lists, and 16 successive tokens together touch about twice the blocks of one.

    Returns:
      int32 [batch, heads, num_q_blocks, num_slots].
    """
    own = own_blocks(**grid(locals()))
    rng = np.random.default_rng(seed)
    num_rows, num_kv_blocks, rank = batch * heads, -(-kv_len // kv_block_size), 8
    block_latents = rng.standard_normal((num_rows, num_kv_blocks, rank), dtype=np.float32)
    popularity = 0.5 * rank**0.5 * rng.standard_normal((num_rows, num_kv_blocks), dtype=np.float32)
    queries = drifting_latents(rng, num_rows, own.shape[1], rank, max(1.0, correlation_tokens / q_block_size), jitter)
    blocks = np.arange(num_kv_blocks)

    def score(rows):
        scores = np.empty((len(rows), num_kv_blocks), np.float32)
        for head in np.unique(rows // own.shape[1]):
            mine = rows // own.shape[1] == head
            scores[mine] = queries[head, rows[mine] % own.shape[1]] @ block_latents[head].T + popularity[head]
        forced = (blocks < num_sink_blocks) | (blocks > rows_of(own, heads)[rows, None] - num_local_blocks)
        return np.where(forced, np.float32(1e9), scores)

    ids = best_blocks(score, rows_of(own, heads), num_slots)
    return ids.reshape(batch, heads, own.shape[1], num_slots)


def drifting_latents(rng, num_rows, num_queries, rank, spacing, jitter) -> np.ndarray:
    """Vectors that move linearly between random anchors `spacing` queries apart: float32 [num_rows, num_queries, rank]."""
    position = np.arange(num_queries) / spacing
    before = position.astype(int)
    weight = (position - before).astype(np.float32)[:, None]
    anchors = rng.standard_normal((num_rows, before[-1] + 2, rank), dtype=np.float32)
    drift = (1 - weight) * anchors[:, before] + weight * anchors[:, before + 1]
    return drift + np.float32(jitter) * rng.standard_normal(drift.shape, dtype=np.float32)


def best_blocks(score: Callable[[np.ndarray], np.ndarray], own: np.ndarray, num_slots: int) -> np.ndarray:
    """The `num_slots` blocks of the highest score among 0..own, ascending, -1 last: int32 [rows, num_slots].

    `score` maps row numbers to float32 [rows, num_kv_blocks]; it is called for a chunk of rows at a time.
    """
    ids = np.full((len(own), num_slots), INT32.max, np.int32)
    for start in range(0, len(own), ROWS_PER_CHUNK):
        rows = np.arange(start, min(start + ROWS_PER_CHUNK, len(own)))
        scores = score(rows)
        scores = np.where(np.arange(scores.shape[1]) <= own[rows, None], scores, -np.inf)
        count = min(num_slots, scores.shape[1])
        best = np.argpartition(-scores, count - 1, axis=-1)[:, :count]
        visible = np.take_along_axis(scores, best, axis=-1) > -np.inf
        ids[rows, :count] = np.where(visible, best, INT32.max)
    ids.sort(axis=-1)
    return np.where(ids == INT32.max, -1, ids)


def rows_of(own: np.ndarray, heads: int) -> np.ndarray:
    """[batch, num_q_blocks] to [batch * heads * num_q_blocks]."""
    return own[:, None].repeat(heads, axis=1).reshape(-1)


def grid(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("batch", "q_len", "kv_len", "q_block_size", "kv_block_size", "is_causal", "q_offset")
    return {name: arguments[name] for name in names}


def all_indices(*, batch, heads, q_len, kv_len, q_block_size, kv_block_size, **_) -> np.ndarray:
    """Every block, future ones too: dense attention under the token mask."""
    ids = np.arange(-(-kv_len // kv_block_size), dtype=np.int32)
    return np.broadcast_to(ids, (batch, heads, -(-q_len // q_block_size), len(ids))).copy()


def empty_indices(**arguments) -> np.ndarray:
    return np.full_like(random_indices(**arguments), -1)


def future_indices(**arguments) -> np.ndarray:
    """Uniform over all blocks although the case is causal: the token mask must hide the future ones."""
    return random_indices(**(arguments | dict(is_causal=False)))


def sparse_row_indices(*, seed, **arguments) -> np.ndarray:
    """Random lists with slots emptied in the middle, and every third row empty altogether."""
    ids = random_indices(seed=seed, **arguments)
    ids = np.where(np.random.default_rng(seed).random(ids.shape) < 0.4, -1, ids)
    ids[:, :, ::3] = -1
    return ids


def duplicate_indices(*, seed, **arguments) -> np.ndarray:
    """Random lists in which half of the slots repeat another slot of the row."""
    ids = random_indices(seed=seed, **arguments)
    source = np.random.default_rng(seed).integers(0, max(1, ids.shape[-1] // 2), ids.shape)
    return np.take_along_axis(ids, source, axis=-1)


def hostile_indices(*, seed, kv_len, kv_block_size, **arguments) -> np.ndarray:
    """Random lists, future blocks too, with a third of the slots replaced by ids that are out of range, empty or repeated."""
    ids = random_indices(seed=seed, kv_len=kv_len, kv_block_size=kv_block_size, **(arguments | dict(is_causal=False)))
    rng = np.random.default_rng(seed)
    num_kv_blocks = -(-kv_len // kv_block_size)
    bad = [-1, -2, num_kv_blocks, num_kv_blocks + 1, 2**16, 2**30, -(2**30), INT32.min, INT32.min + 1, INT32.max]
    bad = np.where(rng.random(ids.shape) < 0.3, ids[..., :1], rng.choice(np.array(bad, np.int32), ids.shape))
    return np.where(rng.random(ids.shape) < 0.4, bad, ids)


INDEX_GENERATORS = {
    "random": random_indices,
    "local": local_indices,
    "realistic": realistic_indices,
    "all": all_indices,
    "empty": empty_indices,
    "future": future_indices,
    "sparse_rows": sparse_row_indices,
    "duplicates": duplicate_indices,
    "hostile": hostile_indices,
}
