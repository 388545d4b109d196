"""Selectors: frozen, hashable dataclasses; calling one on query and key gives a `BlockSelection`."""

from sparse_attn_jax.selectors.a_shape import AShape, TriShape
from sparse_attn_jax.selectors.bi_level_routing import BiLevelRouting
from sparse_attn_jax.selectors.dense import Dense
from sparse_attn_jax.selectors.dsa_indexer import DSAIndexer
from sparse_attn_jax.selectors.flex_prefill import FlexPrefill
from sparse_attn_jax.selectors.grid import Grid
from sparse_attn_jax.selectors.head_mix import HeadMix
from sparse_attn_jax.selectors.infllm_v2 import InfLLMV2
from sparse_attn_jax.selectors.local_strided import LocalStrided
from sparse_attn_jax.selectors.moa_spans import MoASpans
from sparse_attn_jax.selectors.moba import MoBA
from sparse_attn_jax.selectors.neighborhood import NeighborhoodAttention
from sparse_attn_jax.selectors.nosa import NOSA
from sparse_attn_jax.selectors.nsa import NSA
from sparse_attn_jax.selectors.pooled import PooledCDF, PooledTopK
from sparse_attn_jax.selectors.quest import Quest
from sparse_attn_jax.selectors.sale import SALE
from sparse_attn_jax.selectors.seer_gate import (
    SeerGate,
    SeerGateDecode,
    SeerGateParameters,
    seer_gate_loss,
    seer_gate_target,
)
from sparse_attn_jax.selectors.sliding_tile import SlidingTile
from sparse_attn_jax.selectors.sliding_window import SlidingWindow
from sparse_attn_jax.selectors.vertical_slash import VerticalSlash
from sparse_attn_jax.selectors.x_attention import XAttention

__all__ = [
    "AShape",
    "BiLevelRouting",
    "DSAIndexer",
    "Dense",
    "FlexPrefill",
    "Grid",
    "HeadMix",
    "InfLLMV2",
    "LocalStrided",
    "MoASpans",
    "MoBA",
    "NOSA",
    "NSA",
    "NeighborhoodAttention",
    "PooledCDF",
    "PooledTopK",
    "Quest",
    "SALE",
    "SeerGate",
    "SeerGateDecode",
    "SeerGateParameters",
    "SlidingTile",
    "SlidingWindow",
    "TriShape",
    "VerticalSlash",
    "XAttention",
    "seer_gate_loss",
    "seer_gate_target",
]
