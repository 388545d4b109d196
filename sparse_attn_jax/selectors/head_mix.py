"""`HeadMix`: dense heads, streaming heads and heads with a block mask of the caller's, side by side."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.problem import MAX_LENGTH
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.static_rows import block_positions, check_call
from sparse_attn_jax.window_predicate import WindowPredicate

DENSE, STREAMING, BLOCK_MASK = 0, -1, 1


@dataclasses.dataclass(frozen=True)
class HeadMix:
    """The head patterns of MIT's Block-Sparse-Attention: each query head is dense (0), streaming (-1) or has a block mask (1).

    Query block i is the queries i * block_size .. of the call, whatever their position is; with block_size b, `num_sinks` s and
    `num_local` l, a streaming head sees

      unit "block", causal:      KV blocks [0, s) and [R_i - l, R_i), with R_i = ceil(q_offset / b) + 1 + i (all if they meet)
      unit "block", not causal:  KV blocks [0, s) and the last l, whichever query it is
      unit "token", causal:      keys j < s and the l keys i - l < j <= i

    and causality holds inside the blocks. The original's benchmarks stream with unit "block", 1 sink and 3 local of 128 tokens,
    and with unit "token", 64 sinks and 256 local.

    R_i - 1 is the block of the last query of a whole query block, as in the original. Where `q_offset` is no multiple of the
    block size, as in decoding mostly, other queries have their own block at R_i - 2: they see one whole local block less than
    in a prefill, and with `num_local` 1 perhaps not even themselves. Unit "token" is the same in prefill, chunks and decoding.

    Unlike the original: streaming exact to the token has a backward pass, `block_size` need not be 128.

    Attributes:
      head_mask_type: by query head 0, -1 or 1.
      num_sinks: leading units that streaming heads see; an int, or a tuple with one for each query head.
      num_local: nearest units that streaming heads see, the query's own included, likewise.
      unit: "block" or "token": what these count.
      block_size: tokens per block of queries and of keys.
    """

    head_mask_type: tuple[int, ...]
    num_sinks: int | tuple[int, ...]
    num_local: int | tuple[int, ...]
    unit: str = "block"
    block_size: int = 128

    # A block mask is the caller's, and what may have decided it.
    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.head_mask_type, tuple) or not self.head_mask_type:
            raise ValueError(
                f"`head_mask_type` is {self.head_mask_type!r}; it must be a tuple with one of -1, 0, 1 for each head."
            )
        for head, kind in enumerate(self.head_mask_type):
            checks.check_choice(f"head_mask_type[{head}]", kind, (DENSE, STREAMING, BLOCK_MASK))
        self._check_counts("num_sinks", 0)
        self._check_counts("num_local", 1)
        checks.check_choice("unit", self.unit, ("block", "token"))
        checks.check_int("block_size", self.block_size, 1)

    def _check_counts(self, name: str, minimum: int) -> None:
        """One count, or one for each head; those of heads that do not stream are not used."""
        counts = getattr(self, name)
        if not isinstance(counts, tuple):
            return checks.check_int(name, counts, minimum)
        if len(counts) != len(self.head_mask_type):
            raise ValueError(f"`{name}` has {len(counts)} entries; `head_mask_type` has {len(self.head_mask_type)}.")
        for head, (count, kind) in enumerate(zip(counts, self.head_mask_type, strict=True)):
            checks.check_int(f"{name}[{head}]", count, minimum if kind == STREAMING else 0)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
        block_mask: jax.Array | None = None,
    ) -> BlockSelection:
        """Selects for one call; only the shapes, `q_offset` and `block_mask` are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: as in the op; must be True for streaming heads of unit "token".
          q_offset: absolute position of query 0; `None` is kv_len - q_len, the bottom-right alignment of the original.
          block_mask: bool [batch or 1, heads of type 1, num_q_blocks, num_kv_blocks], given exactly if there are such heads:
            the k-th of them has block_mask[:, k]. A row is for `block_size` queries of the call, counted from its first: a
            decoding step has one row, whatever its position is.

        Returns:
          A `BlockSelection` with a list per `block_size` queries: int32 [batch or 1, heads, num_q_blocks, num_slots], heads
          being num_q_heads, or num_kv_heads or 1 where heads are alike. num_slots is num_kv_blocks unless all heads stream.
          With unit "token" and streaming heads it has a `WindowPredicate`.

        Raises:
          ValueError: an argument is wrong, or the call's heads are not those of `head_mask_type`.
        """
        check_call(query, key, is_causal, q_offset)
        self._check_heads(query, key, is_causal, block_mask)
        q_len, kv_len = query.shape[1], key.shape[1]
        heads = self._list_heads(query.shape[2] // key.shape[2])
        first, last = (x[:, None] for x in block_positions(q_offset, q_len, kv_len, self.block_size))
        indices = self._list_blocks(heads, first, last, num_blocks(kv_len, self.block_size), is_causal)
        if block_mask is not None:
            ids = jnp.where(block_mask, jnp.arange(indices.shape[-1], dtype=jnp.int32), -1)
            indices = jnp.broadcast_to(indices, (max(indices.shape[0], ids.shape[0]), *indices.shape[1:]))
            indices = indices.at[:, self._heads_of(BLOCK_MASK)].set(ids)
        return BlockSelection(
            indices, q_block_size=self.block_size, kv_block_size=self.block_size, predicate=self._token_window()
        )

    def _check_heads(self, query: jax.Array, key: jax.Array, is_causal: bool, block_mask: jax.Array | None) -> None:
        if query.shape[2] != len(self.head_mask_type):
            raise ValueError(f"`query` has {query.shape[2]} heads; `head_mask_type` is for {len(self.head_mask_type)}.")
        if self.unit == "token" and not is_causal and STREAMING in self.head_mask_type:
            raise ValueError("`is_causal` is False; heads that stream by tokens look back only, so it must be True.")
        num_masks = self.head_mask_type.count(BLOCK_MASK)
        if (block_mask is not None) != (num_masks > 0):
            found = "None" if block_mask is None else "an array"
            raise ValueError(f"`block_mask` is {found}; {num_masks} heads have one. Give it exactly if some have.")
        if block_mask is None:
            return
        grid = (num_masks, num_blocks(query.shape[1], self.block_size), num_blocks(key.shape[1], self.block_size))
        if block_mask.dtype != jnp.bool_ or block_mask.ndim != 4 or block_mask.shape[1:] != grid:
            raise ValueError(
                f"`block_mask` is {block_mask.dtype}{list(block_mask.shape)}; it must be bool [batch or 1, heads of type 1, "
                f"num_q_blocks, num_kv_blocks] = [{query.shape[0]} or 1, {', '.join(map(str, grid))}]."
            )
        if block_mask.shape[0] not in (1, query.shape[0]):
            raise ValueError(f"`block_mask` has batch size {block_mask.shape[0]}; it must be 1 or {query.shape[0]}.")

    def _heads_of(self, kind: int) -> np.ndarray:
        return np.flatnonzero(np.array(self.head_mask_type) == kind)

    def _counts(self, name: str) -> np.ndarray:
        """`num_sinks` or `num_local` by head, 0 for those that do not stream."""
        return np.where(np.array(self.head_mask_type) == STREAMING, getattr(self, name), 0)

    def _list_heads(self, group_size: int) -> np.ndarray:
        """One of the heads that share each list: if all are alike, or all of every KV head."""
        kinds, sinks, local = np.array(self.head_mask_type), self._counts("num_sinks"), self._counts("num_local")
        # Every block mask is another one.
        own = np.where(kinds == BLOCK_MASK, np.arange(len(kinds)), -1)
        patterns, heads = np.stack([kinds, sinks, local, own], axis=1), np.arange(len(kinds))
        for sharing in (len(kinds), group_size):
            if (patterns == patterns[heads - heads % sharing]).all():
                return heads[::sharing]
        return heads

    def _list_blocks(
        self, heads: np.ndarray, first: jax.Array, last: jax.Array, num_kv_blocks: int, is_causal: bool
    ) -> jax.Array:
        """Lists of dense and streaming heads: int32 [batch or 1, heads, rows, slots].

        Args:
          heads: which heads have lists.
          first: position of each row's first query, [batch or 1, 1, rows].
          last: position of its last.
        """
        kinds, size = np.array(self.head_mask_type)[heads], self.block_size
        sinks, local = (self._counts(name)[heads] for name in ("num_sinks", "num_local"))
        if self.unit == "token":
            end = last // size + 1
            low = (first - local[:, None] + 1) // size
            sinks, num_near = -(-sinks // size), num_blocks(max(int(local.max()) - 1, 0), size) + 2
        else:
            end = (first + size - 1) // size + 1
            end = end if is_causal else jnp.full_like(end, num_kv_blocks)
            low, num_near = end - local[:, None], int(local.max())
        if (kinds != STREAMING).any():
            # Their lists have room for every block, so the others' may stand in any slot as well.
            sink_slots, num_near = num_kv_blocks, 0
        else:
            sink_slots = min(int(sinks.max()), num_kv_blocks)
            num_near = min(num_near, num_kv_blocks - sink_slots)
        end, low = end[..., None], low[..., None]
        near = jnp.minimum(end, num_kv_blocks) - num_near + jnp.arange(num_near, dtype=jnp.int32)
        near = jnp.where(near >= sink_slots, near, -1)
        leading = jnp.arange(sink_slots, dtype=jnp.int32)
        ids = jnp.concatenate([jnp.broadcast_to(leading, (*near.shape[:-1], sink_slots)), near], axis=-1)
        sinks = np.where(kinds == DENSE, num_kv_blocks, sinks)[:, None, None]
        is_listed = (ids >= 0) & (ids < end) & ((ids < sinks) | (ids >= low))
        return jnp.where(is_listed, ids, -1).astype(jnp.int32)

    def _token_window(self) -> WindowPredicate | None:
        """The windows of heads that stream by tokens; the others' are as long as can be."""
        is_streaming = np.array(self.head_mask_type) == STREAMING
        if self.unit == "block" or not is_streaming.any():
            return None
        left = np.where(is_streaming, self._counts("num_local") - 1, MAX_LENGTH)
        sizes = (left, self._counts("num_sinks"))
        left, sinks = (int(x[0]) if (x == x[0]).all() else jnp.asarray(x, jnp.int32) for x in sizes)
        return WindowPredicate(left, None, sinks)
