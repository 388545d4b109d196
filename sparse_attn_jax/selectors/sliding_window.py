"""`SlidingWindow`: the nearest tokens and a few leading ones, exact to the token."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.static_rows import check_call, first_positions
from sparse_attn_jax.window_predicate import WindowPredicate


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """A window of tokens around each query, and the first tokens of the sequence: the pattern of StreamingLLM.

    Attributes:
      window: tokens a query sees, itself included: i - window < j <= i. Without causality as many follow it:
        i - window < j < i + window.
      num_sinks: leading tokens that every query sees.
      block_size: tokens per block of the lists; the result does not depend on it, only the speed.
    """

    window: int
    num_sinks: int = 0
    block_size: int = 64

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("window", self.window, 1)
        checks.check_int("num_sinks", self.num_sinks, 0)
        checks.check_int("block_size", self.block_size, 1)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op, and only the shapes and `q_offset` are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: list no block after the query. The op must be given the same.
          q_offset: absolute position of query 0; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with one head and a predicate that is exact to the token. One list per `block_size` queries if
          `q_offset` is a Python int and a multiple of it (blocks are counted from absolute position 0), else one per query.

        Raises:
          ValueError: an argument is wrong.
        """
        check_call(query, key, is_causal, q_offset)
        kv_len = key.shape[1]
        q_block_size, first = first_positions(q_offset, query.shape[1], kv_len, self.block_size)
        ids = self._list_blocks(first, first + q_block_size - 1, kv_len, is_causal)
        predicate = WindowPredicate(self.window - 1, self.window - 1, self.num_sinks)
        return BlockSelection(ids[:, None], q_block_size=q_block_size, kv_block_size=self.block_size, predicate=predicate)

    def _list_blocks(self, first: jax.Array, last: jax.Array, kv_len: int, is_causal: bool) -> jax.Array:
        """Blocks for the rows of queries at positions first..last, [batch or 1, rows]: int32 [batch or 1, rows, slots]."""
        num_kv_blocks = num_blocks(kv_len, self.block_size)
        num_sink_blocks = min(num_blocks(self.num_sinks, self.block_size), num_kv_blocks)
        ahead = 0 if is_causal else self.window - 1
        low = jnp.maximum(first - (self.window - 1), 0) // self.block_size
        high = (last + ahead) // self.block_size
        # The windows of 1 or block_size neighbouring queries, wherever they start, touch at most this many blocks.
        num_near = min(num_blocks(self.window - 1, self.block_size) + num_blocks(ahead, self.block_size) + 1, num_kv_blocks)
        near = low[..., None] + jnp.arange(num_near, dtype=jnp.int32)
        is_listed = (near >= num_sink_blocks) & (near <= high[..., None]) & (near < num_kv_blocks)
        near = jnp.where(is_listed, near, -1)
        sinks = jnp.arange(num_sink_blocks, dtype=jnp.int32)
        furthest = last // self.block_size if is_causal else jnp.full_like(last, num_kv_blocks)
        sinks = jnp.where(sinks <= furthest[..., None], sinks, -1)
        return jnp.concatenate([sinks, near], axis=-1)
