"""`DSAIndexer`: the tokens that a small indexer of its own scores highest."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors.scored_rows import pick_rows

INDEX_QUERY_AXES = ("batch", "q_len", "num_index_heads", "index_dim")
INDEX_KEY_AXES = ("batch", "kv_len", "index_dim")
WEIGHT_AXES = ("batch", "q_len", "num_index_heads")


@dataclasses.dataclass(frozen=True)
class DSAIndexer:
    """Token selection of DeepSeek sparse attention (DeepSeek-V3.2): one list per query, which all heads share.

    score[t, s] = sum over the index heads j of weights[t, j] * relu(index_query[t, j] . index_key[s])

    Each query keeps the `top_k` visible tokens of the highest score, the lower id first among equals, all of them if there are
    no more. None is forced: a query's own token competes like any other. Selection carries no gradient; the indexer learns from
    `index_kl_loss`.

    The original scores in 8 bits after a Hadamard rotation; here products are summed in float32. A selection depends on nothing
    after the query (`causal_safe`), and counts by absolute position.

    Attributes:
      top_k: tokens per query.
    """

    top_k: int = 2048

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("top_k", self.top_k, 1)

    def __call__(
        self,
        index_query: jax.Array,
        index_key: jax.Array,
        weights: jax.Array,
        *,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects for one call; query and key are those of the indexer, not of the attention.

        Args:
          index_query: [batch, q_len, num_index_heads, index_dim], any floating dtype.
          index_key: [batch, kv_len, index_dim], shared by the index heads.
          weights: [batch, q_len, num_index_heads], taken as they are. The original's are a projection of the token times
            num_index_heads ** -0.5 * index_dim ** -0.5, which changes no selection, but the loss.
          is_causal: no token after the query is listed. The op must be given the same.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` of tokens (`kv_block_size=1`) with a list per query: int32 [batch, 1, q_len, min(top_k, kv_len)],
          ascending, -1 last.

        Raises:
          ValueError: an argument is wrong.

        Memory is linear in the lengths.
        """
        check_index_arrays(index_query, index_key, weights)
        checks.check_bool("is_causal", is_causal)
        batch, q_len = index_query.shape[:2]
        kv_len = index_key.shape[1]
        checks.check_q_offset(q_offset, batch, q_len, kv_len)
        index_query, index_key, weights = jax.lax.stop_gradient((index_query, index_key, weights))
        positions = absolute_positions(q_offset, q_len, kv_len)
        # A list has at least one slot, so that the op takes it.
        top_k = max(min(self.top_k, kv_len), 1)
        ids = _pick_tokens(index_query, index_key, weights, positions, top_k=top_k, is_causal=is_causal)
        return BlockSelection(ids, q_block_size=1, kv_block_size=1)


def index_scores(index_query: jax.Array, index_key: jax.Array, weights: jax.Array) -> jax.Array:
    """weights . relu(index_query . index_key) for every query and key: float32 [batch, q_len, keys].

    Args:
      index_query: [batch, q_len, num_index_heads, index_dim].
      index_key: [batch, keys, index_dim], or [batch, q_len, keys, index_dim] for keys of each query's own.
      weights: [batch, q_len, num_index_heads].

    Differentiable. Holds [batch, num_index_heads, q_len, keys] at once.
    """
    axes = "bsd" if index_key.ndim == 3 else "bqsd"
    query, key, weights = (x.astype(jnp.float32) for x in (index_query, index_key, weights))
    products = jnp.einsum(f"bqhd,{axes}->bqhs", query, key, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("bqhs,bqh->bqs", jax.nn.relu(products), weights, precision=jax.lax.Precision.HIGHEST)


def check_index_arrays(index_query: jax.Array, index_key: jax.Array, weights: jax.Array) -> None:
    """Raises `ValueError` unless the three fit each other."""
    checks.check_array("index_query", index_query, INDEX_QUERY_AXES)
    checks.check_array("index_key", index_key, INDEX_KEY_AXES)
    checks.check_array("weights", weights, WEIGHT_AXES)
    batch, q_len, _, index_dim = index_query.shape
    checks.check_length("q_len", q_len)
    checks.check_length("kv_len", index_key.shape[1])
    if (index_key.shape[0], index_key.shape[2]) != (batch, index_dim):
        needed = f"[batch, kv_len, index_dim] of batch {batch} and index_dim {index_dim}, as `index_query`"
        raise ValueError(f"`index_key` has shape {index_key.shape}; it must be {needed}.")
    if weights.shape != index_query.shape[:3]:
        raise ValueError(f"`weights` has shape {weights.shape}; it must be {index_query.shape[:3]}, as `index_query`.")


@functools.partial(jax.jit, static_argnames=("top_k", "is_causal"))
def _pick_tokens(index_query, index_key, weights, positions, *, top_k: int, is_causal: bool) -> jax.Array:
    batch, _, num_index_heads, _ = index_query.shape

    def score(some_query, some_weights, _):
        return index_scores(some_query, index_key, some_weights).swapaxes(1, 2)[:, None]

    return pick_rows(
        score,
        [index_query, weights],
        positions,
        num_heads=1,
        elements_per_query=batch * (num_index_heads + 1) * index_key.shape[1],
        top_k=top_k,
        block_size=1,
        num_sink_blocks=0,
        num_local_blocks=0,
        is_causal=is_causal,
    )
