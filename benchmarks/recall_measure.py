"""How much of dense attention a selection keeps, and how much the best choice of as many keys would.

Only the op is asked: attention over a subset of keys has lse_subset - lse = log of the mass it keeps, and with a query of zeros
its lse is the log of the number of keys. So nothing is assumed of how a selector says what it selects.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.recall_inputs import Pattern


@dataclasses.dataclass(frozen=True)
class Recall:
    """Of one selector on one pattern, means over queries and heads.

    Attributes:
      mass: attention probability that the selected keys have in dense attention.
      best_mass: that of the best blocks of as many keys: of the selection's block size, and a choice per row of the selection.
      density: selected keys, of those that dense attention sees.
      error: |out - dense| / |dense|, of all outputs together.
    """

    mass: float
    best_mass: float
    density: float
    error: float


@dataclasses.dataclass(frozen=True)
class Dense:
    """Dense attention of a pattern, as the op gives it, and its probabilities, [batch, num_q_heads, length, length]."""

    out: jax.Array
    lse: jax.Array
    probabilities: np.ndarray


def attend_densely(pattern: Pattern) -> Dense:
    """The definition, in float32; the patterns are short enough."""
    group = pattern.query.shape[2] // pattern.key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (pattern.key, pattern.value))
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bihd,bjhd->bhij", pattern.query, key, precision=precision) * pattern.query.shape[-1] ** -0.5
    if pattern.is_causal:
        length = logits.shape[-1]
        logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jnp.exp(logits - lse[..., None])
    out = jnp.einsum("bhij,bjhd->bihd", probabilities, value, precision=precision)
    return Dense(out, lse.swapaxes(1, 2), np.asarray(probabilities))


# (out, lse) of a query and values, with the keys of a pattern and one selection whatever the query is.
Attend = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Counted:
    """What of a pattern is measured: from which row of its batch on, which are layers, and from which query."""

    first_layer: int = 0
    first_query: int = 0


def measure(
    pattern: Pattern, dense: Dense, attend: Attend, q_block_size: int, kv_block_size: int, counted: Counted = Counted()
) -> Recall:
    """What a method keeps of a pattern.

    Args:
      pattern: the inputs.
      dense: dense attention of them.
      attend: the method's, with its selection for the pattern's query.
      q_block_size: queries that the method gives one list.
      kv_block_size: keys of a block of it.
      counted: the queries whose attention is looked at.
    """
    layers, queries = where = np.s_[counted.first_layer :, counted.first_query :]
    out, lse = (x[where] for x in attend(pattern.query, pattern.value))
    _, log_count = attend(jnp.zeros_like(pattern.query), pattern.value)
    counts = np.asarray(jnp.exp(log_count[where]).swapaxes(1, 2), np.float64)  # [layers, heads, queries]
    probabilities = dense.probabilities[layers, :, queries]
    seen = np.ones(probabilities.shape[-1:] * 2)
    seen = (np.tril(seen) if pattern.is_causal else seen)[queries]  # [queries, length]
    return Recall(
        mass=float(jnp.exp(lse - dense.lse[where]).mean()),
        best_mass=best_mass(probabilities, counts, seen, q_block_size, kv_block_size),
        density=float((counts / seen.sum(axis=-1)).mean()),
        error=float(jnp.linalg.norm(out - dense.out[where]) / jnp.linalg.norm(dense.out[where])),
    )


def keys_seen(pattern: Pattern, attend: Attend) -> np.ndarray:
    """bool [num_q_heads, length, length], of the last batch row: values that tell the keys apart, attended to uniformly."""
    batch, length, num_kv_heads = pattern.value.shape[:3]
    values = jnp.broadcast_to(jnp.eye(length)[None, :, None], (batch, length, num_kv_heads, length))
    out, _ = attend(jnp.zeros_like(pattern.query), values)
    return np.asarray(out[-1].swapaxes(0, 1) > 0)


def best_mass(probabilities: np.ndarray, counts: np.ndarray, seen: np.ndarray, q_block_size: int, kv_block_size: int) -> float:
    """The mass of the blocks with the most mass per key, up to as many keys as a method's rows have, the last one in part.

    Args:
      probabilities: [layers, heads, queries, length].
      counts: [layers, heads, queries], the keys that a method reads.
      seen: [queries, length], 1 where dense attention sees a key.
      q_block_size: queries of a row.
      kv_block_size: keys of a block.
    """
    rows, columns = (np.arange(0, n, step) for n, step in zip(seen.shape, (q_block_size, kv_block_size)))
    total = functools.partial(np.add.reduceat, axis=-2)
    mass = total(np.add.reduceat(probabilities, columns, axis=-1), rows)  # [layers, heads, rows, blocks]
    size = total(np.add.reduceat(seen, columns, axis=-1), rows)  # [rows, blocks]
    budget = np.add.reduceat(counts, rows, axis=-1)[..., None]
    per_key = np.where(size > 0, mass / np.maximum(size, 1), -1.0)
    order = np.argsort(-per_key, axis=-1, kind="stable")
    sizes = np.take_along_axis(np.broadcast_to(size, mass.shape), order, axis=-1)
    before = np.cumsum(sizes, axis=-1) - sizes
    share = np.clip((budget - before) / np.maximum(sizes, 1), 0, 1)
    return float((np.take_along_axis(mass, order, axis=-1) * share).sum() / np.prod(counts.shape))
