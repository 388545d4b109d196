"""`jax.vmap` of calls that read pools of pages: pools that are mapped become one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def join_mapped_pools(
    call: Callable[..., tuple[jax.Array, ...]],
    first: jax.Array,
    pools: tuple[jax.Array, ...],
    block_tables: jax.Array,
    *others: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Runs call(first, *pools, block_tables, *others), for which `jax.vmap` maps no pool.

    Pools are [num_pages, ...], and `block_tables` has ids of their pages. Whoever maps a pool of the whole has them all joined,
    page by page, and the ids counted on.
    """

    @custom_vmap
    def mapped(first, pools, block_tables, *others):
        return call(first, *pools, block_tables, *others)

    @mapped.def_vmap
    def rule(axis_size, is_mapped, first, pools, block_tables, *others):
        first_mapped, pools_mapped, tables_mapped, *others_mapped = is_mapped
        if any(pools_mapped):
            num_pages = pools[0].shape[1 if pools_mapped[0] else 0]
            pools = [x if is_one else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, is_one in zip(pools, pools_mapped)]
            pools = [x.reshape(axis_size * num_pages, *x.shape[2:]) for x in pools]
            offset = num_pages * jnp.arange(axis_size, dtype=jnp.int32)
            offset = offset.reshape(axis_size, *(1 for _ in range(block_tables.ndim - tables_mapped)))
            is_page = (block_tables >= 0) & (block_tables < num_pages)
            block_tables, tables_mapped = jnp.where(is_page, block_tables + offset, -1), True
        is_mapped = first_mapped, *(False for _ in pools), tables_mapped, *others_mapped
        many = jax.vmap(call, in_axes=[0 if is_one else None for is_one in is_mapped])
        results = join_mapped_pools(many, first, tuple(pools), block_tables, *others)
        return results, tuple(True for _ in results)

    return tuple(mapped(first, tuple(pools), block_tables, *others))
