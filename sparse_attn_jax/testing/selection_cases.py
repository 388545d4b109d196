"""Named selection problems, on which every implementation is compared with the definition."""

import jax

from sparse_attn_jax.scoring import scoring_problem
from sparse_attn_jax.scoring_problem import ScoringProblem

CASES = {
    "causal": dict(kv_len=799),
    "full": dict(kv_len=799, is_causal=False),
    "no-reduction": dict(kv_len=799, group_reduction=None),
    "nsa": dict(kv_len=799, pooling="overlap_sum", group_reduction="mean"),
    "unaligned-block": dict(kv_len=640, block_size=40),
    "odd-units": dict(kv_len=500, block_size=30, kernel_size=11, kernel_stride=7),
    "gaps": dict(kv_len=300, block_size=8, kernel_size=4, kernel_stride=20),
    "no-unit": dict(kv_len=31),
    "no-coarse-unit": dict(kv_len=127),
    "top-k-beyond-blocks": dict(kv_len=200, top_k=9),
    "fine-units-as-large-as-coarse": dict(kv_len=640, kernel_size=128, kernel_stride=64),
}


def make_problem(query: jax.Array, kv_len: int, *, num_kv_heads: int | None = None, **options) -> ScoringProblem:
    """The problem of a case: `options` replace what is usual; `None` is as many KV heads as query heads."""
    usual = dict(
        scale=None, is_causal=True, block_size=64, kernel_size=32, kernel_stride=16, coarse_kernel_size=128,
        coarse_kernel_stride=64, pooling="max", group_reduction="sum", top_k=5, num_sink_blocks=1, num_local_blocks=2,
    )  # fmt: skip
    units = jax.ShapeDtypeStruct((1, 0, num_kv_heads or query.shape[2], query.shape[3]), query.dtype)
    return scoring_problem(query, units, kv_len=kv_len, **(usual | options))
