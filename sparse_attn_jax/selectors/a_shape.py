"""`AShape` and `TriShape`: leading tokens and a window of tokens, and for the second the last queries dense."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.sliding_window import SlidingWindow
from sparse_attn_jax.selectors.static_rows import block_positions, check_call, check_is_causal
from sparse_attn_jax.window_predicate import WindowPredicate


@dataclasses.dataclass(frozen=True)
class AShape:
    """The A-shape of MInference: query i sees key j <= i if j < num_initial or i - j < num_local.

    It is `SlidingWindow` under MInference's name. There, 128 and 3968 were deployed, the search over heads tries 100 and 800,
    and the paper has 1024 and 4096.

    Attributes:
      num_initial: leading tokens that every query sees.
      num_local: tokens nearest to a query, itself included.
      block_size: tokens per block of the lists; the result does not depend on it, only the speed.
    """

    num_initial: int
    num_local: int
    block_size: int = 64

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        _check_fields(self)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op, and only the shapes and `q_offset` are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: must be True, here and in the op: the pattern looks back only.
          q_offset: absolute position of query 0; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` as that of `SlidingWindow`, exact to the token.

        Raises:
          ValueError: an argument is wrong.
        """
        check_call(query, key, is_causal, q_offset)
        check_is_causal("AShape", is_causal)
        window = SlidingWindow(self.num_local, self.num_initial, self.block_size)
        return window(query, key, is_causal=True, q_offset=q_offset)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TriShapePredicate:
    """Keeps what a window keeps, and everything for queries from some position on."""

    window: WindowPredicate
    first_dense: jax.Array  # int32 [batch], a position

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise."""
        return self.window(batch, head, q_position, kv_position) | (q_position >= self.first_dense[batch])


@dataclasses.dataclass(frozen=True)
class TriShape:
    """The tri-shape of MInference's later version: an A-shape, and the last queries of the prompt see all keys before them.

    The last queries are those of the call, wherever it ends: a decoding step attends to everything, as in the original. So
    which keys a query sees depends on how many queries follow it, and the selection is not `causal_safe`.

    Attributes:
      num_initial: leading tokens that every query sees.
      num_local: tokens nearest to a query, itself included.
      num_last: queries at the end of the call that see every key up to themselves. 100 in MInference.
      block_size: tokens per block of the lists; the result does not depend on it, only the speed.
    """

    num_initial: int
    num_local: int
    num_last: int = 100
    block_size: int = 64

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        _check_fields(self)
        checks.check_int("num_last", self.num_last, 1)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op, and only the shapes and `q_offset` are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: must be True, here and in the op: the pattern looks back only.
          q_offset: absolute position of query 0; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with one list per `block_size` queries for all heads, int32 [batch or 1, 1, num_q_blocks,
          num_kv_blocks], and a predicate that is exact to the token.

        Raises:
          ValueError: an argument is wrong.
        """
        check_call(query, key, is_causal, q_offset)
        check_is_causal("TriShape", is_causal)
        (batch, q_len), kv_len, block_size = query.shape[:2], key.shape[1], self.block_size
        first, last = (x[..., None] for x in block_positions(q_offset, q_len, kv_len, block_size))
        end = jnp.asarray(kv_len if q_offset is None else q_offset + q_len, jnp.int32)
        first_dense = end.reshape(-1) - self.num_last  # [batch or 1]
        ids = jnp.arange(num_blocks(kv_len, block_size), dtype=jnp.int32)
        is_listed = (ids < num_blocks(self.num_initial, block_size)) | (ids >= (first - self.num_local + 1) // block_size)
        is_listed = (is_listed | (last >= first_dense[:, None, None])) & (ids * block_size <= last)
        predicate = TriShapePredicate(
            WindowPredicate(self.num_local - 1, None, self.num_initial), jnp.broadcast_to(first_dense, (batch,))
        )
        indices = jnp.where(is_listed, ids, -1)[:, None]
        return BlockSelection(indices, q_block_size=block_size, kv_block_size=block_size, predicate=predicate)


def _check_fields(selector: AShape | TriShape) -> None:
    checks.check_int("num_initial", selector.num_initial, 0)
    checks.check_int("num_local", selector.num_local, 1)
    checks.check_int("block_size", selector.block_size, 1)
