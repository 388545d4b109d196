"""Trainable, data-dependent block-sparse attention in JAX."""

import importlib
from types import ModuleType

from sparse_attn_jax import selectors as selectors
from sparse_attn_jax.api import block_sparse_attention as block_sparse_attention
from sparse_attn_jax.api import block_sparse_attention_varlen as block_sparse_attention_varlen
from sparse_attn_jax.api import explain as explain
from sparse_attn_jax.api import merge_attention as merge_attention
from sparse_attn_jax.api import plan_attention as plan_attention
from sparse_attn_jax.api import sparse_attention as sparse_attention
from sparse_attn_jax.block_mass import block_mass as block_mass
from sparse_attn_jax.cache_policies import delta_pages as delta_pages
from sparse_attn_jax.cache_policies import gather_tokens as gather_tokens
from sparse_attn_jax.cache_policies import snapkv_keep as snapkv_keep
from sparse_attn_jax.cache_policies import zipvl_keep as zipvl_keep
from sparse_attn_jax.dispatch import CUSTOM_CALL_TARGETS as CUSTOM_CALL_TARGETS
from sparse_attn_jax.dispatch import Explanation as Explanation
from sparse_attn_jax.duo import duo_gate_combine as duo_gate_combine
from sparse_attn_jax.duo import duo_threshold as duo_threshold
from sparse_attn_jax.grid_attention import grid_attention as grid_attention
from sparse_attn_jax.index_loss import index_kl_loss as index_kl_loss
from sparse_attn_jax.native_sparse_attention import native_sparse_attention as native_sparse_attention
from sparse_attn_jax.paged_attention import paged_block_sparse_attention as paged_block_sparse_attention
from sparse_attn_jax.paged_cache import OutOfPagesError as OutOfPagesError
from sparse_attn_jax.paged_cache import PageAllocator as PageAllocator
from sparse_attn_jax.paged_cache import PagedKVCache as PagedKVCache
from sparse_attn_jax.permutation import TokenPermutation as TokenPermutation
from sparse_attn_jax.permutation import tile_tokens as tile_tokens
from sparse_attn_jax.planning import TilePlan as TilePlan
from sparse_attn_jax.quest_metadata import QuestMetadata as QuestMetadata
from sparse_attn_jax.scoring import compress_keys as compress_keys
from sparse_attn_jax.scoring import score_blocks as score_blocks
from sparse_attn_jax.scoring import select_blocks as select_blocks
from sparse_attn_jax.selection import BlockSelection as BlockSelection
from sparse_attn_jax.sparse_linear_attention import sparse_linear_attention as sparse_linear_attention
from sparse_attn_jax.video_sparse import video_sparse_attention as video_sparse_attention
from sparse_attn_jax.window_predicate import WindowPredicate as WindowPredicate

__version__ = "0.1.0"

# Imported at first use: the functions do not need Flax, and new code not the originals' interfaces.
_LAZY = ("compat", "flax")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"sparse_attn_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
