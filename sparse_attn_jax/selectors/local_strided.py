"""`LocalStrided`: near blocks, and every so many blocks one far back, other ones for each head."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.static_rows import check_call, check_is_causal, first_positions


@dataclasses.dataclass(frozen=True)
class LocalStrided:
    """The static pattern of Phi-3-small, as vLLM's block-sparse attention and DKernel (S2-Attention) compute it.

    A query in block i sees block j of head h if i - j < left and j - i < right, (left, right) being `local_blocks`, or if
    (j + h * head_step + stride_offset) is a multiple of `vert_stride`. Blocks are counted from absolute position 0. With
    causality no block j > i is seen.

    `relative` is DKernel's pattern for attention that is not causal: the stride counts from the query's local blocks, and all
    heads have one pattern. Beyond them, block j is seen if max(0, i - j - left + 1) + max(0, j - i - right + 1) is a multiple
    of `vert_stride`.

    Not as in DKernel: with `slide` "kv" the default step spreads the pattern over the KV heads, where that divides by the
    number of query heads; rows of the lists are not merged for larger tiles, which kernels do themselves.

    Attributes:
      local_blocks: near blocks, the query's own included: those before it, or (left, right), before and after it. With
        causality only the first counts. An int looks back only, unless with `relative`, where it is both.
      vert_stride: one in so many blocks is seen from everywhere after it; 1 is dense.
      block_size: tokens per block.
      head_step: how far the pattern moves from head to head; 0 is one pattern for all. `None` spreads it over the heads:
        max(1, vert_stride // num_heads). Not used with `relative`.
      stride_offset: 1 as in vLLM; 0 as in DKernel, where head 0 keeps block 0. Not used with `relative`.
      slide: "q": a pattern per query head; "kv": one per KV head, which its query heads share (vLLM's decoding with a negative
        step, DKernel's `num_kv_heads`).
      num_heads: of the whole model, query heads or KV heads as `slide` says, where a call has only some of them; `None`: those
        of the call.
      head_range: (first, end) of the heads that a call has; `None` is all.
      num_dense_heads: the last heads, which see every block (DKernel).
      relative: the stride counts from the query, not from position 0.
    """

    local_blocks: int | tuple[int, int] = 16
    vert_stride: int = 8
    block_size: int = 64
    head_step: int | None = None
    stride_offset: int = 1
    slide: str = "q"
    num_heads: int | None = None
    head_range: tuple[int, int] | None = None
    num_dense_heads: int = 0
    relative: bool = False

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        self._check_local_blocks()
        checks.check_int("vert_stride", self.vert_stride, 1)
        checks.check_int("block_size", self.block_size, 1)
        if self.head_step is not None:
            checks.check_int("head_step", self.head_step, 0)
        checks.check_int("stride_offset", self.stride_offset, 0)
        checks.check_choice("slide", self.slide, ("q", "kv"))
        if self.num_heads is not None:
            checks.check_int("num_heads", self.num_heads, 1)
        checks.check_int("num_dense_heads", self.num_dense_heads, 0)
        checks.check_bool("relative", self.relative)
        self._check_head_range()

    def _check_local_blocks(self) -> None:
        if not isinstance(self.local_blocks, tuple):
            return checks.check_int("local_blocks", self.local_blocks, 1)
        if len(self.local_blocks) != 2:
            raise ValueError(f"`local_blocks` is {self.local_blocks}; it must be an int or a tuple (left, right).")
        for i, count in enumerate(self.local_blocks):
            checks.check_int(f"local_blocks[{i}]", count, 1)

    def _check_head_range(self) -> None:
        if self.head_range is not None:
            if not isinstance(self.head_range, tuple) or len(self.head_range) != 2:
                raise ValueError(f"`head_range` is {self.head_range!r}; it must be a tuple (first, end) or None.")
            checks.check_int("head_range[0]", self.head_range[0], 0)
            checks.check_int("head_range[1]", self.head_range[1], self.head_range[0] + 1)
            if self.num_heads is None or self.head_range[1] > self.num_heads:
                raise ValueError(
                    f"`num_heads` is {self.num_heads}; with head_range={self.head_range} it must be an int from its end on."
                )

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op, and only the shapes and `q_offset` are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: list no block after the query's; the op must be given the same. True, unless the pattern looks ahead.
          q_offset: absolute position of query 0; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per head of the pattern, or one for all if they are equal. A row is `block_size`
          queries if `q_offset` is a Python int and a multiple of it, else one query.

        Raises:
          ValueError: an argument is wrong, or the call's heads are not those of `num_heads` and `head_range`.
        """
        check_call(query, key, is_causal, q_offset)
        is_pair = isinstance(self.local_blocks, tuple)
        if not is_pair and not self.relative:
            check_is_causal("LocalStrided", is_causal)
        left, right = self.local_blocks if is_pair else (self.local_blocks,) * 2
        strides, remainders = self._heads(query.shape[2] if self.slide == "q" else key.shape[2])
        q_block_size, first = first_positions(q_offset, query.shape[1], key.shape[1], self.block_size)
        own = first[:, None, :, None] // self.block_size  # [batch or 1, 1, rows, 1]
        low, end = own - left + 1, own + (1 if is_causal else right)
        num_kv_blocks = num_blocks(key.shape[1], self.block_size)
        # Downwards from the last near block, or from the last one if that comes after all keys.
        num_near = min(left if is_causal else left + right - 1, num_kv_blocks)
        near = jnp.minimum(end, num_kv_blocks) - 1 - jnp.arange(num_near, dtype=jnp.int32)
        near = jnp.where((near >= 0) & (near >= low), near, -1)
        far = self._list_far(low, end, strides, remainders, num_kv_blocks, is_causal)
        near = jnp.broadcast_to(near, (*far.shape[:-1], num_near))
        ids = jnp.concatenate([far, near[..., ::-1]], axis=-1)
        return BlockSelection(ids, q_block_size=q_block_size, kv_block_size=self.block_size)

    def _list_far(
        self, low: jax.Array, end: jax.Array, strides: np.ndarray, remainders: np.ndarray, num_kv_blocks: int, is_causal: bool
    ) -> jax.Array:
        """One in so many blocks before `low`, and, if not causal, from `end` on: int32 [batch or 1, heads, rows, slots]."""
        steps = np.arange(num_blocks(num_kv_blocks, int(strides.min())))
        strides, remainders = (jnp.asarray(x[:, None, None], jnp.int32) for x in (strides, remainders))
        steps = strides * steps  # [heads, 1, slots]
        if self.relative:
            before, after = low % strides + steps, (end - 1) % strides + steps
            sides = [(before, before < low)] if is_causal else [(before, before < low), (after, after >= end)]
        else:
            far = remainders + steps
            sides = [(far, (far < low) | ((far >= end) & (not is_causal)))]
        return jnp.concatenate([jnp.where(is_far & (ids < num_kv_blocks), ids, -1) for ids, is_far in sides], axis=-1)

    def _heads(self, num_call_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """Which blocks are seen from far, by head of the call: those that are `remainders` modulo `strides`."""
        num_heads = self.num_heads or num_call_heads
        first, end = self.head_range or (0, num_heads)
        kind = "query" if self.slide == "q" else "KV"
        if end - first != num_call_heads:
            raise ValueError(
                f"the call has {num_call_heads} {kind} heads; `num_heads` {self.num_heads} and `head_range` {self.head_range} "
                f"need {end - first}."
            )
        if self.num_dense_heads > num_heads:
            raise ValueError(f"`num_dense_heads` is {self.num_dense_heads}; there are {num_heads} {kind} heads.")
        step = max(1, self.vert_stride // num_heads) if self.head_step is None else self.head_step
        step = 0 if self.relative else step
        heads = np.arange(first, end)
        strides = np.where(heads >= num_heads - self.num_dense_heads, 1, self.vert_stride)
        remainders = -(heads * step + self.stride_offset) % strides
        if len(set(zip(strides, remainders, strict=True))) == 1:
            return strides[:1], remainders[:1]
        return strides, remainders
