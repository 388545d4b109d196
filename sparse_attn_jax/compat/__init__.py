"""The interfaces of the projects whose methods this library has: code ports by changing an import.

Names, argument order, layouts and conventions are the originals'; what an original writes in place is returned. Arguments that
nothing here could honour are accepted at their neutral value only.
"""

from sparse_attn_jax.compat.block_sparse_attn import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    token_streaming_attn_func,
)
from sparse_attn_jax.compat.infllm_v2 import (
    infllmv2_attn_stage1,
    infllmv2_attn_varlen_func,
    infllmv2_attn_with_kvcache,
    max_pooling_1d,
)
from sparse_attn_jax.compat.quest import (
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_block_select_paged_w,
    quest_prefill_metadata,
)
from sparse_attn_jax.compat.vllm_blocksparse import blocksparse_flash_attn_varlen_fwd, get_sparse_attn_mask

__all__ = [
    "block_sparse_attn_func",
    "block_streaming_attn_func",
    "blocksparse_flash_attn_varlen_fwd",
    "get_sparse_attn_mask",
    "infllmv2_attn_stage1",
    "infllmv2_attn_varlen_func",
    "infllmv2_attn_with_kvcache",
    "max_pooling_1d",
    "quest_block_select_paged",
    "quest_block_select_paged_in_out",
    "quest_block_select_paged_in_out_w",
    "quest_block_select_paged_w",
    "quest_prefill_metadata",
    "token_streaming_attn_func",
]
