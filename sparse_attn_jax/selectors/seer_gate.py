"""`SeerGate` and `SeerGateDecode`: blocks by a small learned gate, and what the gate is trained with."""

import dataclasses
import functools
import numbers
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.block_mass import block_mass
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.pooling import (
    block_means,
    causal_block_mask,
    check_fraction,
    diagonal_block_mask,
    masked_softmax,
    pooled_logits,
    row_positions,
    top_k_mask,
)
from sparse_attn_jax.selectors.probe import check_causal_call
from sparse_attn_jax.selectors.scored_rows import pick_rows
from sparse_attn_jax.selectors.static_rows import check_call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeerGateParameters:
    """The weights of a gate, a pytree. The original draws them by Xavier's uniform rule.

    Attributes:
      query: of `SeerGate`, [num_q_heads, head_dim, gate_dim], or `None` for queries as they are, where gate_dim is head_dim. Of
        `SeerGateDecode`, [num_kv_heads, group_size, head_dim, gate_dim].
      key: [num_kv_heads, 3 * head_dim, gate_dim], for the maximum, the minimum and the mean of a block, in this order. Of
        `SeerGate` [num_q_heads, ...] too, for a projection per query head.
    """

    query: jax.Array | None
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class SeerGate:
    """The gate of SeerAttention for prefill: a list per query head.

      q[a] = mean of query block a, projected;  k[b] = (max, min, mean) of key block b, projected;  both rotated to the start
        of their block
      P[a, b] = softmax_b(q[a] . k[b] / sqrt(gate_dim)), over the visible blocks
      kept are the blocks with P > threshold, or the `top_k` best

    Query and key are those before rotary embedding: select with them, then attend with the rotated ones.

        selection = selector(query, key, gate=gate, is_causal=True)
        out = block_sparse_attention(rotate(query), rotate(key), value, selection, is_causal=True)

    Train `gate` alone, on `seer_gate_loss(selector.logits(query, key, gate=gate, is_causal=True), target)`, where target is
    `seer_gate_target` of the rotated query and key. The original does not force the diagonal, and has a switch for the last two
    rows to be dense. The queries of a block decide together what each of them sees (not `causal_safe`).

    Attributes:
      block_size: tokens per block, of queries and of keys.
      threshold: P that kept blocks exceed, in [0, 1].
      top_k: in place of `threshold`, blocks per row, forced ones included.
      force_diagonal: under causality, always keep the blocks that hold the positions of the row's queries, even if they are
        more than `top_k`.
      rope_base: base of the rotary embedding of the gate, whose channel pairs are (i, i + gate_dim / 2); `None` is no rotation.
    """

    block_size: int = 64
    threshold: float = 5e-4
    top_k: int | None = None
    force_diagonal: bool = True
    rope_base: float | None = 10000.0

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        _check_gate_fields(self)
        checks.check_bool("force_diagonal", self.force_diagonal)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        gate: SeerGateParameters,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects for one call.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], before rotary embedding. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim], before rotary embedding.
          gate: its weights.
          is_causal: leave out blocks after the queries. The last block of keys is pooled over all its keys.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query head and block of queries, counted from query 0: int32 [batch, num_q_heads,
          num_q_blocks, num_kv_blocks], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient. Memory is that of the scores of the blocks.
        """
        self._check(query, key, gate, is_causal, q_offset)
        if 0 in (query.shape[1], key.shape[1]):
            return select_every_block(query.shape[1], key.shape[1], self.block_size)
        return _select(self, *jax.lax.stop_gradient((query, key, gate)), q_offset, is_causal=is_causal)

    def logits(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        gate: SeerGateParameters,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> jax.Array:
        """The gate's scores before the softmax, for training; arguments as in `__call__`.

        Returns:
          float32 [batch, num_q_heads, num_q_blocks, num_kv_blocks], -inf where a block is not visible.

        Raises:
          ValueError: an argument is wrong.

        Differentiable in `query`, `key` and `gate`.
        """
        self._check(query, key, gate, is_causal, q_offset)
        q_len, kv_len, size = query.shape[1], key.shape[1], self.block_size
        pooled_query = block_means(query, size)
        if gate.query is not None:
            pooled_query = _project(pooled_query, gate.query)
        pooled_key = _pool_keys(key, size)
        if gate.key.shape[0] != key.shape[2]:
            pooled_key = jnp.repeat(pooled_key, query.shape[2] // key.shape[2], axis=2)
        pooled_key = _project(pooled_key, gate.key)
        if self.rope_base is not None:
            pooled_query = _rotate(pooled_query, row_positions(q_offset, q_len, kv_len, size)[0], self.rope_base)
            pooled_key = _rotate(pooled_key, _block_starts(kv_len, size), self.rope_base)
        logits = pooled_logits(pooled_query, pooled_key, gate.key.shape[-1] ** -0.5)
        if not is_causal:
            return logits
        return jnp.where(causal_block_mask(q_offset, q_len, kv_len, size, size), logits, -jnp.inf)

    def _check(self, query, key, gate, is_causal, q_offset) -> None:
        check_call(query, key, is_causal, q_offset)
        _check_gate(gate, query, key, self.rope_base, by_group=False)


@functools.partial(jax.jit, static_argnames=("selector", "is_causal"))
def _select(selector: SeerGate, query, key, gate, q_offset, *, is_causal: bool) -> BlockSelection:
    logits = selector.logits(query, key, gate=gate, is_causal=is_causal, q_offset=q_offset)
    size = selector.block_size
    allowed = logits > -jnp.inf
    probability = masked_softmax(logits, allowed)
    diagonal = jnp.zeros_like(allowed)
    if is_causal and selector.force_diagonal:
        diagonal = diagonal_block_mask(q_offset, query.shape[1], key.shape[1], size, size)
    if selector.top_k is None:
        mask = allowed & ((probability > selector.threshold) | diagonal)
    else:
        mask = top_k_mask(probability, selector.top_k, allowed, diagonal)
    return BlockSelection.from_block_mask(mask, q_block_size=size, kv_block_size=size)


@dataclasses.dataclass(frozen=True)
class SeerGateDecode:
    """The gate of SeerAttention-R for decoding: a list per query token and KV head.

      q[i] = sum over the heads h of the group of query[i, h] . gate.query[h], rotated to i;  k[b] as in `SeerGate`
      P[i, b] = softmax_b(q[i] . k[b] / sqrt(gate_dim)), over the blocks whose keys i sees all of
      kept are the query's own block and those with P > threshold, or the best, `top_k` with the own one

    A block is scored once it is complete, so a selection depends on nothing after the query (`causal_safe`), and decoding
    selects as prefill does. The original adds the own block to its budget; its optional norm of q and k is left out.

    Attributes:
      block_size: keys per block.
      threshold: P that kept blocks exceed, in [0, 1].
      top_k: in place of `threshold`, blocks per query, its own included: a budget of 4,096 tokens is 64 blocks of 64.
      rope_base: as in `SeerGate`.
    """

    block_size: int = 64
    threshold: float = 5e-4
    top_k: int | None = None
    rope_base: float | None = 10000.0

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        _check_gate_fields(self)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        gate: SeerGateParameters,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects for one call.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], before rotary embedding.
          key: [batch, kv_len, num_kv_heads, head_dim], before rotary embedding.
          gate: its weights.
          is_causal: must be True, here and in the op.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len. Keys
            after the query may hold anything.

        Returns:
          A `BlockSelection` with a list per query (`q_block_size=1`): int32 [batch, num_kv_heads, q_len, slots], ascending, -1
          last. There are `top_k` slots, or as many as blocks with a threshold.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient. Memory beyond the lists is bounded.
        """
        check_causal_call(self, query, key, is_causal, q_offset)
        _check_gate(gate, query, key, self.rope_base, by_group=True)
        if key.shape[1] == 0:
            return select_every_block(query.shape[1], 0, self.block_size)
        query, key, gate = jax.lax.stop_gradient((query, key, gate))
        return BlockSelection(_pick_decode(self, query, key, gate, q_offset), q_block_size=1, kv_block_size=self.block_size)


@functools.partial(jax.jit, static_argnames=("selector",))
def _pick_decode(selector: SeerGateDecode, query, key, gate, q_offset) -> jax.Array:
    batch, q_len, _, head_dim = query.shape
    kv_len, num_kv_heads = key.shape[1:3]
    size, num_kv_blocks = selector.block_size, num_blocks(kv_len, selector.block_size)
    positions = absolute_positions(q_offset, q_len, kv_len)
    starts = _block_starts(kv_len, size)
    group_size, _, gate_dim = gate.query.shape[1:]
    query = query.reshape(batch, q_len, num_kv_heads, group_size * head_dim)
    gate_query = _project(query, gate.query.reshape(num_kv_heads, group_size * head_dim, gate_dim))
    gate_key = _project(_pool_keys(key, size), gate.key)
    if selector.rope_base is not None:
        gate_query = _rotate(gate_query, positions, selector.rope_base)
        gate_key = _rotate(gate_key, starts, selector.rope_base)

    def score(rows, position):
        logits = pooled_logits(rows, gate_key, gate_dim**-0.5)  # [batch, num_kv_heads, rows, num_kv_blocks]
        is_complete = (starts + size <= kv_len) & (starts + size - 1 <= position[:, None, :, None])
        probability = masked_softmax(logits, is_complete)
        is_candidate = is_complete & (True if selector.top_k is not None else probability > selector.threshold)
        return jnp.where(is_candidate, probability, -jnp.inf).swapaxes(2, 3)

    return pick_rows(
        score,
        [gate_query],
        positions,
        num_heads=num_kv_heads,
        elements_per_query=batch * num_kv_heads * num_kv_blocks,
        top_k=num_kv_blocks if selector.top_k is None else selector.top_k,
        block_size=size,
        num_sink_blocks=0,
        num_local_blocks=1,
        is_causal=True,
    )


def seer_gate_target(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array | None = None,
    *,
    block_size: int = 64,
    q_block_size: int | None = None,
    group_reduction: str | None = None,
    is_causal: bool = False,
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """What a gate learns to predict: the largest attention probability of each tile, normalised over the row.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], as attention gets it, after rotary embedding.
      key: [batch, kv_len, num_kv_heads, head_dim], after rotary embedding.
      lse: [batch, q_len, num_q_heads], of dense attention. `None` computes it.
      block_size: keys per block.
      q_block_size: queries per row; `None` is `block_size`, for `SeerGate`. 1 for `SeerGateDecode`.
      group_reduction: `None` for `SeerGate`, "max" over the heads of a KV head for `SeerGateDecode`.
      is_causal: keys after the query are invisible. False by default, as in `jax.nn`.
      q_offset: absolute position of query 0; `None` is kv_len - q_len.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.

    Returns:
      float32 [batch, heads, num_q_blocks, num_kv_blocks], rows of sum 1, or 0 where nothing is visible.

    Raises:
      ValueError: an argument is wrong.

    Carries no gradient. Memory beyond the result is bounded.
    """
    mass = block_mass(
        query,
        key,
        lse,
        block_size=block_size,
        q_block_size=block_size if q_block_size is None else q_block_size,
        reduction="max",
        group_reduction=group_reduction,
        is_causal=is_causal,
        q_offset=q_offset,
        scale=scale,
    )
    total = mass.sum(axis=-1, keepdims=True)
    return mass / jnp.where(total > 0, total, 1.0)


def seer_gate_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The mean over rows of KL(target || softmax(logits)). Differentiable in `logits`.

    The original leaves out the first quarter of the rows, and divides by the number of entries instead of rows.

    Args:
      logits: [batch, heads, rows, num_kv_blocks], -inf where a block is not visible.
      target: as `logits`, from `seer_gate_target`. Rows of zeros do not count.

    Returns:
      A scalar, float32.

    Raises:
      ValueError: shapes that differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"`logits` has shape {logits.shape} and `target` {target.shape}; they must be equal.")
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    # Where the target is 0 the term is 0 whatever the logit is, and its gradient comes from the softmax alone.
    counts = target > 0
    row_counts = counts.any(axis=-1, keepdims=True)
    logits = jnp.where(row_counts, logits.astype(jnp.float32), 0.0)
    log_probability = jnp.where(counts, logits, 0.0) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    terms = jnp.where(counts, target * (jnp.log(jnp.where(counts, target, 1.0)) - log_probability), 0.0)
    return terms.sum() / jnp.maximum(row_counts.sum(), 1)


def _block_starts(kv_len: int, block_size: int) -> jax.Array:
    return jnp.arange(num_blocks(kv_len, block_size), dtype=jnp.int32) * block_size


def _pool_keys(key: jax.Array, block_size: int) -> jax.Array:
    """Maximum, minimum and mean over blocks of tokens, the last over those it has: [batch, blocks, heads, 3 * head_dim]."""
    batch, kv_len, num_heads, head_dim = key.shape
    padding = [(0, 0), (0, -kv_len % block_size), (0, 0), (0, 0)]

    def blocked(fill):
        padded = jnp.pad(key.astype(jnp.float32), padding, constant_values=fill)
        return padded.reshape(batch, -1, block_size, num_heads, head_dim)

    return jnp.concatenate([blocked(-jnp.inf).max(axis=2), blocked(jnp.inf).min(axis=2), block_means(key, block_size)], axis=-1)


def _project(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[batch, n, heads, dim] by [heads, dim, gate_dim]: float32 [batch, n, heads, gate_dim]."""
    x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
    return jnp.einsum("bnhd,hdg->bnhg", x, weights, precision=jax.lax.Precision.HIGHEST)


def _rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embedding of [batch, n, heads, dim] at int32 positions [batch or 1, n] or [n]."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [batch or 1, n, 1, half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _check_gate_fields(selector: SeerGate | SeerGateDecode) -> None:
    checks.check_int("block_size", selector.block_size, 1)
    check_fraction("threshold", selector.threshold)
    if selector.top_k is not None:
        checks.check_int("top_k", selector.top_k, 1)
    if selector.rope_base is not None:
        base = selector.rope_base
        if isinstance(base, bool) or not isinstance(base, numbers.Real) or base <= 0:
            raise ValueError(f"`rope_base` is {base!r}; it must be a positive number, or None.")


def _check_gate(gate: SeerGateParameters, query: jax.Array, key: jax.Array, rope_base: float | None, by_group: bool) -> None:
    num_q_heads, head_dim = query.shape[2:]
    num_kv_heads = key.shape[2]
    allowed_heads = (num_kv_heads,) if by_group else (num_kv_heads, num_q_heads)
    if gate.key.ndim != 3 or gate.key.shape[0] not in allowed_heads or gate.key.shape[1] != 3 * head_dim:
        raise ValueError(f"`gate.key` has shape {gate.key.shape}; it must be [{num_kv_heads}, {3 * head_dim}, gate_dim].")
    gate_dim = gate.key.shape[2]
    needed = (num_kv_heads, num_q_heads // num_kv_heads) if by_group else (num_q_heads,)
    needed = (*needed, head_dim, gate_dim)
    if gate.query is None and (by_group or gate_dim != head_dim):
        raise ValueError(f"`gate.query` is None; with gate.key {gate.key.shape} it must have shape {needed}.")
    if gate.query is not None and gate.query.shape != needed:
        raise ValueError(f"`gate.query` has shape {gate.query.shape}; it must have {needed}.")
    if rope_base is not None and gate_dim % 2:
        raise ValueError(f"`gate.key` has gate_dim {gate_dim}; it must be even for rotary embedding, or rope_base None.")
