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
from sparse_attn_jax.dispatch import CUSTOM_CALL_TARGETS as CUSTOM_CALL_TARGETS
from sparse_attn_jax.dispatch import Explanation as Explanation
from sparse_attn_jax.planning import TilePlan as TilePlan
from sparse_attn_jax.scoring import compress_keys as compress_keys
from sparse_attn_jax.scoring import score_blocks as score_blocks
from sparse_attn_jax.scoring import select_blocks as select_blocks
from sparse_attn_jax.selection import BlockSelection as BlockSelection

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    # Imported at first use: the functions do not need Flax.
    if name == "flax":
        return importlib.import_module("sparse_attn_jax.flax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "flax"])
