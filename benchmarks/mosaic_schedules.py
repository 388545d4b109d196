"""How the Pallas kernels cut their work: what `benchmarks.schedules` wants to know of them, from their own configurations."""

import math
from typing import Any

from benchmarks.schedules import Schedule, group_size
from sparse_attn_jax.implementations.mosaic import (
    ampere_backward,
    ampere_forward,
    ampere_ring,
    attention_backward,
    attention_forward,
    steps,
)
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, Geometry
from sparse_attn_jax.testing.cases import Case

# What all of them have in common: no warpgroup skips what its rows do not see, and one copies.
SHARED = dict(producer_warps=4, unit_warps=4, registers=168, tensor="wgmma", skips=False)
# And those for Ampere: a thread block is one warpgroup, with as many registers as threads may have.
AMPERE = dict(warps=4, registers=255, skips=False)


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


# ---- For Ampere.


def fewest_if_none_fits(choose, make, g: Geometry) -> Any:
    """The config that a kernel chooses; or that of the fewest stages, which does not fit either."""
    try:
        return choose(g)
    except ValueError:
        return make(stages=ampere_ring.STAGES[0])


def ampere_forward_pass(case: Case, tokens: int) -> Schedule:
    """implementations/mosaic/ampere_forward.py."""
    g = geometry_of(case, tokens)
    config = fewest_if_none_fits(ampere_forward.choose_config, ampere_forward.ForwardConfig, g)
    return Schedule(
        name="Pallas forward, Ampere",
        **_ampere_query_major(g),
        owned_arrays=1,
        writes_lse=True,
        shared_products=1,
        register_products=1,
        shared_bytes=steps.shared_bytes(ampere_forward.memory_of(g, config), 0),
    )


def ampere_query_gradient(case: Case, tokens: int) -> Schedule:
    """The dQ kernel of implementations/mosaic/ampere_backward.py."""
    g = geometry_of(case, tokens)
    config = fewest_if_none_fits(ampere_backward.choose_query_config, ampere_backward.QueryGradientConfig, g)
    return Schedule(
        name="Pallas query_gradient, Ampere",
        **_ampere_query_major(g),
        owned_arrays=2,
        shared_products=2,
        register_products=1,
        shared_bytes=steps.shared_bytes(ampere_backward.query_memory_of(g, config), 0),
    )


def _ampere_query_major(g: Geometry) -> dict:
    rows = dict(tokens=g.tile_size, rows=SLICE_ROWS, keys=CHUNK_KEYS, step=CHUNK_KEYS)
    return dict(owns="queries", written_arrays=1, chunk_blocks=g.blocks_per_chunk, **rows, **AMPERE)


def ampere_key_gradient(case: Case, tokens: int) -> Schedule:
    """The dK and dV kernel there.

    Two products have a slice's rows on one side: each warp reads its 16 rows, and all keys. The other two have columns there,
    of which each warp reads its own, and all weights: their writing is left out.
    """
    g = geometry_of(case, tokens)
    make = lambda stages: ampere_backward.KeyGradientConfig(32, stages)
    config = fewest_if_none_fits(ampere_backward.choose_key_config, make, g)
    warps, columns = AMPERE["warps"], g.key_columns
    of_rows = SLICE_ROWS + warps * config.keys
    of_columns = SLICE_ROWS + warps * SLICE_ROWS * config.keys / columns
    return Schedule(
        name="Pallas key_gradient, Ampere",
        owns="keys",
        tokens=tokens,
        rows=SLICE_ROWS,
        keys=config.keys,
        step=SLICE_ROWS,
        unit_warps=warps,
        unit_rows=config.keys,
        owned_arrays=2,
        written_arrays=2,
        shared_products=4,
        register_products=0,
        shared_rows=2 * of_rows + 2 * of_columns,
        shared_bytes=steps.shared_bytes(ampere_backward.key_memory_of(g, config), 0),
        **AMPERE,
    )
