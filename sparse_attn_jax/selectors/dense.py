"""`Dense`: every block, for baselines and for sequences too short to gain from selection."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.static_rows import check_call


@dataclasses.dataclass(frozen=True)
class Dense:
    """Selects every block of keys: the op then computes dense attention under its token mask.

    Attributes:
      block_size: tokens per block.
    """

    block_size: int = 64

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("block_size", self.block_size, 1)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op, and only the shapes are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: blocks in the future are listed too, for the op's token mask to remove.
          q_offset: absolute position of query 0; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` of one list for all queries and heads: int32 [1, 1, 1, num_kv_blocks].

        Raises:
          ValueError: an argument is wrong.
        """
        check_call(query, key, is_causal, q_offset)
        return select_every_block(query.shape[1], key.shape[1], self.block_size)


def select_every_block(q_len: int, kv_len: int, block_size: int) -> BlockSelection:
    """One list for all queries and heads, so that its size does not grow with the queries."""
    ids = jnp.arange(num_blocks(kv_len, block_size), dtype=jnp.int32)
    return BlockSelection(ids[None, None, None], q_block_size=max(q_len, 1), kv_block_size=block_size)
