"""`InfLLMV2`: the blocks whose mean-pooled keys attract the query most, with sinks and a local window."""

import dataclasses
from typing import ClassVar

import jax

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring import compress_keys, scoring_problem, select_blocks_from_units
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors.dense import select_every_block


@dataclasses.dataclass(frozen=True)
class InfLLMV2:
    """Block selection of InfLLM-v2 (MiniCPM4): no parameters, one list per query token and KV head.

    Keys are averaged over overlapping units; a query's softmax over the units it can see, summed over the query heads of the
    KV head, is max-pooled over the units that overlap each block; sinks, local blocks and the best of the rest are kept.

    A selection depends on nothing after the query (`causal_safe`), and counts by absolute position: prefill, chunked prefill
    and step-by-step decoding choose the same blocks. The original derives positions from lengths and can be a unit off.

    Attributes:
      top_k: blocks per query, sinks and local blocks included.
      block_size: tokens per block.
      kernel_size: tokens per unit.
      kernel_stride: tokens between the starts of neighbouring units.
      num_sink_blocks: leading blocks that every query keeps.
      num_local_blocks: most recent blocks that every query keeps, its own included. (The original's rule keeps one more than
        its setting says.)
      coarse_kernel_size: tokens per coarse unit.
      coarse_kernel_stride: tokens between the starts of neighbouring coarse units.
      coarse_lse: take the softmax denominator from the coarse units, as the original does to save a pass over the fine ones;
        False is exact.
      dense_len: up to this many keys (the length of `key`, whatever `q_offset` says) every block is selected.
      pooling: `"max"`, or `"overlap_sum"` as in NSA.
      group_reduction: `"sum"`, `"mean"`, `"max"`, or `None` for a list per query head.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    top_k: int = 96
    block_size: int = 64
    kernel_size: int = 32
    kernel_stride: int = 16
    num_sink_blocks: int = 1
    num_local_blocks: int = 32
    coarse_kernel_size: int = 128
    coarse_kernel_stride: int = 64
    coarse_lse: bool = True
    dense_len: int = 0
    pooling: str = "max"
    group_reduction: str | None = "sum"
    scale: float | None = None

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("block_size", self.block_size, 1)
        checks.check_units("", self.kernel_size, self.kernel_stride)
        checks.check_units("coarse_", self.coarse_kernel_size, self.coarse_kernel_stride)
        checks.check_forced_blocks(self.top_k, self.num_sink_blocks, self.num_local_blocks)
        checks.check_bool("coarse_lse", self.coarse_lse)
        checks.check_int("dense_len", self.dense_len, 0)
        checks.check_reductions(self.pooling, self.group_reduction)
        checks.check_scale(self.scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: a query sees no unit that ends after it, and no block after its own is listed.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query (`q_block_size=1`): int32 [batch, num_kv_heads, q_len, top_k], ascending, -1
          last; one list [1, 1, 1, num_kv_blocks] for all queries if kv_len <= dense_len.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient. Memory is linear in the lengths.
        """
        checks.check_key(key)
        checks.check_query(query, key, "key")
        compressed, coarse = self.compress(key)
        return self.select(query, compressed, coarse, kv_len=key.shape[1], is_causal=is_causal, q_offset=q_offset)

    def compress(self, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The units that `select` takes: [batch, num_units, num_kv_heads, head_dim], and coarse ones if `coarse_lse`."""
        coarse = compress_keys(key, self.coarse_kernel_size, self.coarse_kernel_stride) if self.coarse_lse else None
        return compress_keys(key, self.kernel_size, self.kernel_stride), coarse

    def unit_sizes(self) -> tuple[tuple[int, int], ...]:
        """Kernel size and stride of the compressed keys that `select` takes, one pair for each array."""
        fine, coarse = (self.kernel_size, self.kernel_stride), (self.coarse_kernel_size, self.coarse_kernel_stride)
        return (fine, coarse) if self.coarse_lse else (fine,)

    def select(
        self,
        query: jax.Array,
        compressed: jax.Array,
        coarse: jax.Array | None = None,
        *,
        kv_len: int,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects from keys that are compressed already, such as a decode cache keeps.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          compressed: [batch, num_units, num_kv_heads, head_dim], every complete unit of `kv_len` tokens.
          coarse: the coarse units; `None` exactly if `coarse_lse` is False.
          kv_len: number of keys: of a cache, its capacity. With `is_causal` and `q_offset` the tokens filled so far, units that
            are not complete yet are invisible whatever they hold.
          is_causal: as in `__call__`.
          q_offset: as in `__call__`.

        Returns:
          As `__call__`.

        Raises:
          ValueError: an argument is wrong.
        """
        if (coarse is not None) != self.coarse_lse:
            found = "None" if coarse is None else "an array"
            raise ValueError(f"`coarse` is {found} and coarse_lse={self.coarse_lse}; give it exactly if coarse_lse is set.")
        problem = self._problem(query, compressed, kv_len, is_causal)
        if kv_len <= self.dense_len:
            checks.check_q_offset(q_offset, query.shape[0], query.shape[1], kv_len)
            return select_every_block(query.shape[1], kv_len, self.block_size)
        return select_blocks_from_units(query, compressed, coarse, problem=problem, q_offset=q_offset)

    def _problem(self, query: jax.Array, compressed: jax.Array, kv_len: int, is_causal: bool) -> ScoringProblem:
        return scoring_problem(
            query,
            compressed,
            scale=self.scale,
            kv_len=kv_len,
            is_causal=is_causal,
            top_k=self.top_k,
            block_size=self.block_size,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            coarse_kernel_size=self.coarse_kernel_size,
            coarse_kernel_stride=self.coarse_kernel_stride,
            pooling=self.pooling,
            group_reduction=self.group_reduction,
            num_sink_blocks=self.num_sink_blocks,
            num_local_blocks=self.num_local_blocks,
        )
