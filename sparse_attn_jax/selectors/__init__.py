"""Selectors: frozen, hashable dataclasses; calling one on query and key gives a `BlockSelection`."""

from sparse_attn_jax.selectors.dense import Dense
from sparse_attn_jax.selectors.infllm_v2 import InfLLMV2
from sparse_attn_jax.selectors.local_strided import LocalStrided
from sparse_attn_jax.selectors.sliding_window import SlidingWindow

__all__ = ["Dense", "InfLLMV2", "LocalStrided", "SlidingWindow"]
