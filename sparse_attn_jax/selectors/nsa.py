"""`NSA`: the blocks that the compressed attention of native sparse attention weighs most."""

import dataclasses
from typing import ClassVar

import jax

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring import compress_keys, scoring_problem, select_blocks_from_units
from sparse_attn_jax.selection import BlockSelection


@dataclasses.dataclass(frozen=True)
class NSA:
    """Block selection of native sparse attention (DeepSeek's NSA): one list per query token and KV head.

    p[h, i, j] = softmax_j(scale * query[i, h] . unit[j])                                     j over the units visible to i
    score[n, i, b] = sum over the heads h of group n and the units j of p[h, i, j] * |unit j and block b share| / kernel_stride

    Unit j spans the tokens [kernel_stride * j, kernel_stride * j + kernel_size); a query sees it once its last token is at or
    before the query. With the sizes of the paper the units 4 b - 1 .. 4 b + 3 count in block b with weights 1, 2, 2, 2, 1.
    Sinks, local blocks and the best of the rest are kept. `native_sparse_attention` is the whole method; alone, this is a
    selector like others, over means of the keys.

    Forced blocks count inside `top_k`, and local ones include the query's own, as in the paper and in XunhaoLai's Triton
    version. FLA pools by plain blocks, `kernel_size = kernel_stride = block_size`, and takes the mean over a group, which
    orders blocks as the sum does. Softmax denominators are exact; InfLLM-v2 takes them from coarser units.

    A selection depends on nothing after the query (`causal_safe`), and counts by absolute position: prefill, chunked prefill
    and step-by-step decoding choose the same blocks.

    Attributes:
      top_k: blocks per query, sinks and local blocks included.
      block_size: tokens per block.
      kernel_size: tokens per unit.
      kernel_stride: tokens between the starts of neighbouring units.
      num_sink_blocks: leading blocks that every query keeps.
      num_local_blocks: most recent blocks that every query keeps, its own included.
      pooling: `"overlap_sum"`, or `"max"` as in InfLLM-v2.
      group_reduction: `"sum"`, `"mean"`, `"max"`, or `None` for a list per query head.
      scale: multiplies the dot products; `None` is head_dim ** -0.5.
    """

    top_k: int = 16
    block_size: int = 64
    kernel_size: int = 32
    kernel_stride: int = 16
    num_sink_blocks: int = 1
    num_local_blocks: int = 2
    pooling: str = "overlap_sum"
    group_reduction: str | None = "sum"
    scale: float | None = None

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("block_size", self.block_size, 1)
        checks.check_units("", self.kernel_size, self.kernel_stride)
        checks.check_forced_blocks(self.top_k, self.num_sink_blocks, self.num_local_blocks)
        checks.check_reductions(self.pooling, self.group_reduction)
        checks.check_scale(self.scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call by means of the keys; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
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
        checks.check_query(query, key, "key")
        compressed = compress_keys(key, self.kernel_size, self.kernel_stride)
        return self.select(query, compressed, kv_len=key.shape[1], is_causal=is_causal, q_offset=q_offset)

    def unit_sizes(self) -> tuple[tuple[int, int], ...]:
        """Kernel size and stride of the compressed keys that `select` takes."""
        return ((self.kernel_size, self.kernel_stride),)

    def select(
        self,
        query: jax.Array,
        compressed: jax.Array,
        *,
        kv_len: int,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects by compressed keys: learned ones, or such as a decode cache keeps.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          compressed: [batch, num_units, num_kv_heads, head_dim], every complete unit of `kv_len` tokens.
          kv_len: number of keys: of a cache, its capacity. With `is_causal` and `q_offset` the tokens filled so far, units that
            are not complete yet are invisible whatever they hold.
          is_causal: as in `__call__`.
          q_offset: as in `__call__`.

        Returns:
          As `__call__`.

        Raises:
          ValueError: an argument is wrong.
        """
        problem = scoring_problem(
            query,
            compressed,
            scale=self.scale,
            kv_len=kv_len,
            is_causal=is_causal,
            top_k=self.top_k,
            block_size=self.block_size,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            # Not used: there are no coarse units.
            coarse_kernel_size=self.kernel_size,
            coarse_kernel_stride=self.kernel_stride,
            pooling=self.pooling,
            group_reduction=self.group_reduction,
            num_sink_blocks=self.num_sink_blocks,
            num_local_blocks=self.num_local_blocks,
        )
        return select_blocks_from_units(query, compressed, None, problem=problem, q_offset=q_offset)
