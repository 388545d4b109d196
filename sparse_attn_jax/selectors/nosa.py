"""`NOSA`: some blocks by what the query asks for, the others by how important the keys are to every query."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring import compress_keys
from sparse_attn_jax.scoring_problem import absolute_positions, num_units, unit_overlap
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.infllm_v2 import InfLLMV2
from sparse_attn_jax.selectors.scored_rows import pick_rows


@dataclasses.dataclass(frozen=True)
class NOSA:
    """Block selection of NOSA (thunlp): InfLLM-v2 chooses a part, a query-agnostic importance of the keys the rest.

    First the blocks of `query_aware`: sinks, local blocks and the best by its score. Then, up to `top_k`, those of the highest
    importance among the others, where the importance of a block is the maximum over the units that overlap it of the mean of
    their tokens' importance. As that part hardly changes from query to query, most of a list is that of the query before, so
    that a cache whose blocks live in another memory moves few of them.

    Attention adds the importance to its logits, and that is where its gradient comes from:

      importance = a[n] * softplus(delta(value))         # of the model: learned, one number per key and KV head; a starts at 0
      selection = NOSA()(query, key, importance=importance, is_causal=True)
      out = block_sparse_attention(query, key, value, selection, key_bias=importance, is_causal=True)

    Under causality a query counts only units that end at or before it, in both parts, so a selection depends on nothing after
    the query (`causal_safe`). Positions are absolute: chunked prefill and decoding choose the same blocks as prefill.

    The original realises exp(s + c) by two calls with scaled values; here it is one call with a bias. Of InfLLM-v2's local rule
    see `InfLLMV2`: `num_local_blocks` includes the query's own.

    Attributes:
      top_k: blocks per query, in all.
      query_aware: the part chosen by score: 1 sink, 16 local blocks and 16 more.
    """

    top_k: int = 64
    query_aware: InfLLMV2 = InfLLMV2(top_k=33, num_local_blocks=16)

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.query_aware, InfLLMV2) or self.query_aware.dense_len:
            raise ValueError(f"`query_aware` is {self.query_aware!r}; it must be an InfLLMV2 whose `dense_len` is 0.")
        checks.check_int("top_k", self.top_k, self.query_aware.top_k)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        importance: jax.Array,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          importance: [batch, num_kv_heads, kv_len], floating point: the `key_bias` of the op. A block of NaN is never chosen by
            it.
          is_causal: a query sees no unit that ends after it, and no block after its own is listed.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query (`q_block_size=1`): int32 [batch, num_kv_heads, q_len, top_k], ascending, -1
          last.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient. Memory is linear in the lengths.
        """
        checks.check_key(key)
        batch, kv_len, num_kv_heads, _ = key.shape
        checks.check_array("importance", importance, ("batch", "num_kv_heads", "kv_len"))
        if importance.shape != (batch, num_kv_heads, kv_len):
            needed = f"[batch, num_kv_heads, kv_len] = {[batch, num_kv_heads, kv_len]}"
            raise ValueError(f"`importance` has shape {importance.shape}; it must be {needed}.")
        first = self.query_aware(query, key, is_causal=is_causal, q_offset=q_offset)
        positions = absolute_positions(q_offset, query.shape[1], kv_len)
        importance = jax.lax.stop_gradient(importance)
        ids = _add_important(first.indices, importance, positions, selector=self, is_causal=is_causal)
        return BlockSelection(ids, q_block_size=1, kv_block_size=first.kv_block_size)


@functools.partial(jax.jit, static_argnames=("selector", "is_causal"))
def _add_important(first, importance, positions, *, selector: NOSA, is_causal: bool) -> jax.Array:
    """The lists `first` [batch, heads, q_len, slots], filled up to int32 [batch, heads, q_len, top_k]."""
    geometry, kv_len = selector.query_aware, importance.shape[2]
    batch, heads, _, num_first = first.shape
    block_ids = jnp.arange(num_blocks(kv_len, geometry.block_size), dtype=jnp.int32)
    of_units = _unit_importance(importance, geometry).repeat(heads // importance.shape[1], axis=1)
    pool = functools.partial(_pool_importance, of_units, geometry=geometry, kv_len=kv_len, is_causal=is_causal)

    def score(some_first, some_positions):
        listed = jnp.moveaxis(some_first, 1, 3)[:, :, :, None, :]  # [batch, heads, slots, 1, queries]
        is_first = (listed == block_ids[:, None]).any(axis=2)
        # No importance is as high as what marks those that are chosen already.
        rest = jnp.minimum(pool(some_positions), jnp.finfo(jnp.float32).max)
        return jnp.where(is_first, jnp.inf, rest)

    return pick_rows(
        score,
        [first.swapaxes(1, 2)],
        positions,
        num_heads=heads,
        elements_per_query=batch * heads * len(block_ids) * (num_first + 1),
        top_k=selector.top_k,
        block_size=geometry.block_size,
        num_sink_blocks=0,
        num_local_blocks=0,
        is_causal=is_causal,
    )


def _unit_importance(importance: jax.Array, geometry: InfLLMV2) -> jax.Array:
    """Means over units: float32 [batch, num_kv_heads, num_units]."""
    tokens = importance.astype(jnp.float32).swapaxes(1, 2)[..., None]
    return compress_keys(tokens, geometry.kernel_size, geometry.kernel_stride)[..., 0].swapaxes(1, 2)


def _pool_importance(units: jax.Array, positions: jax.Array, *, geometry: InfLLMV2, kv_len: int, is_causal: bool) -> jax.Array:
    """The maximum over the visible units that overlap each block, -inf where there is none.

    Args:
      units: float32 [batch, heads, num_units].
      positions: int32 [batch or 1, queries].

    Returns:
      float32 [batch, heads, num_kv_blocks, queries].
    """
    count = num_units(kv_len, geometry.kernel_size, geometry.kernel_stride)
    unit_ids, overlap = unit_overlap(count, kv_len, geometry)
    last_token = unit_ids * geometry.kernel_stride + geometry.kernel_size - 1
    highest = jnp.full((*units.shape[:2], len(unit_ids), positions.shape[1]), -jnp.inf, jnp.float32)
    for column in range(unit_ids.shape[1]):  # one unit of each block at a time
        is_visible = (overlap[:, column] > 0)[:, None]
        if is_causal:
            is_visible = is_visible & (last_token[:, column, None] <= positions[:, None, None, :])
        highest = jnp.maximum(highest, jnp.where(is_visible, units[:, :, unit_ids[:, column], None], -jnp.inf))
    return highest
