"""The static description of one block-scoring call: unit geometry, pooling and the blocks that are always kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.selection import num_blocks

POOLINGS = ("max", "overlap_sum")
GROUP_REDUCTIONS = ("sum", "mean", "max", None)


def num_units(length: int, kernel_size: int, kernel_stride: int) -> int:
    """How many complete compression units lie in `length` tokens."""
    return 0 if length < kernel_size else (length - kernel_size) // kernel_stride + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringProblem:
    """One selection call without its array values. Hashable. Lengths count tokens, `num_*_blocks` count KV blocks."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the queries
    unit_dtype: str  # of the compressed keys
    platform: str
    compute_capability: str | None
    device_kind: str | None = None
    kv_len: int
    block_size: int = 64
    kernel_size: int = 32
    kernel_stride: int = 16
    coarse_kernel_size: int = 128
    coarse_kernel_stride: int = 64
    pooling: str = "max"
    group_reduction: str | None = "sum"
    scale: float
    is_causal: bool = False
    top_k: int
    num_sink_blocks: int
    num_local_blocks: int

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


def absolute_positions(q_offset: int | jax.Array | None, q_len: int, kv_len: int) -> jax.Array:
    """The position of each query among the keys, int32 [batch or 1, q_len]; a `q_offset` of `None` is kv_len - q_len."""
    offset = jnp.asarray(kv_len - q_len if q_offset is None else q_offset, jnp.int32)
    return offset.reshape(-1, 1) + jnp.arange(q_len, dtype=jnp.int32)


@functools.lru_cache
def unit_overlap(count: int, limit: int, problem: ScoringProblem) -> tuple[np.ndarray, np.ndarray]:
    """The units that overlap each block, and by how many tokens: two int arrays [num_blocks(limit), width].

    Ids ascend along a row; entries past the last unit of a block have overlap 0 and id 0.
    """
    block_start = np.arange(num_blocks(limit, problem.block_size))[:, None] * problem.block_size
    first = np.maximum((block_start - problem.kernel_size) // problem.kernel_stride + 1, 0)
    width = -(-(problem.block_size + problem.kernel_size) // problem.kernel_stride)
    unit_ids = first + np.arange(width)
    unit_start = unit_ids * problem.kernel_stride
    stop = np.minimum(unit_start + problem.kernel_size, block_start + problem.block_size)
    overlap = np.maximum(stop - np.maximum(unit_start, block_start), 0) * (unit_ids < count)
    width = int((overlap > 0).any(axis=0).sum())
    return np.where(overlap > 0, unit_ids, 0)[:, :width], overlap[:, :width]
