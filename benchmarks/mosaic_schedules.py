"""How the Pallas kernels cut their work: what `benchmarks.schedules` wants to know of them, from their own configurations."""

import math

from benchmarks.schedules import Schedule, group_size
from sparse_attn_jax.implementations.mosaic import attention_backward, attention_forward, steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, Geometry
from sparse_attn_jax.testing.cases import Case

# What all of them have in common: no warpgroup skips what its rows do not see, and one copies.
SHARED = dict(producer_warps=4, unit_warps=4, registers=168, tensor="wgmma", skips=False)


def geometry_of(case: Case, tokens: int) -> Geometry:
    shared = tokens if case.q_len <= case.q_block_size else math.gcd(tokens, case.q_block_size)
    sizes = dict(q_len=case.q_len, kv_len=case.kv_len, head_dim=case.head_dim, value_head_dim=case.head_dim)
    heads = dict(num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads)
    tile = dict(tile_size=tokens, row_group_tokens=shared, row_group_heads=group_size(case), kv_block_size=case.kv_block_size)
    options = dict(is_varlen=False, has_window=False, has_segments=False, has_key_bias=False, has_membership=shared < tokens)
    kind = dict(dtype=case.dtype, scale=1.0, logits_soft_cap=0.0, is_causal=case.is_causal)
    return Geometry(batch=case.batch, **sizes, **heads, **tile, **options, **kind)


def forward(case: Case, tokens: int) -> Schedule:
    """implementations/mosaic/attention_forward.py."""
    g = geometry_of(case, tokens)
    config = attention_forward.choose_config(g)
    return Schedule(
        name="Pallas forward",
        **_query_major(g, config.warpgroups),
        owned_arrays=1,
        writes_lse=True,
        shared_products=1,
        register_products=1,
        shared_bytes=steps.shared_bytes(attention_forward.memory_of(g, config)),
    )


def query_gradient(case: Case, tokens: int) -> Schedule:
    """The dQ kernel of implementations/mosaic/attention_backward.py, whose gradients of scores pass through shared memory."""
    g = geometry_of(case, tokens)
    config = attention_backward.choose_query_config(g)
    return Schedule(
        name="Pallas query_gradient",
        **_query_major(g, config.warpgroups),
        owned_arrays=2,
        shared_products=3,
        register_products=0,
        shared_bytes=steps.shared_bytes(attention_backward.query_memory_of(g, config)),
    )


def _query_major(g: Geometry, warpgroups: int) -> dict:
    rows = dict(tokens=g.tile_size, rows=SLICE_ROWS * warpgroups, keys=CHUNK_KEYS, step=CHUNK_KEYS)
    return dict(owns="queries", warps=4 * warpgroups, written_arrays=1, chunk_blocks=g.blocks_per_chunk, **rows, **SHARED)


def key_gradient(case: Case, tokens: int) -> Schedule:
    """The dK and dV kernel there: two warpgroups have every second slice of 64 rows each."""
    g = geometry_of(case, tokens)
    config = attention_backward.choose_key_config(g)
    return Schedule(
        name="Pallas key_gradient",
        owns="keys",
        tokens=tokens,
        rows=SLICE_ROWS,
        keys=config.keys,
        step=SLICE_ROWS,
        warps=4 * attention_backward.KEY_WARPGROUPS,
        owned_arrays=2,
        written_arrays=2,
        shared_products=4,
        register_products=0,
        shared_bytes=steps.shared_bytes(attention_backward.key_memory_of(g, config)),
        **SHARED,
    )
