"""Tables of pages: where the tokens of each sequence lie in a pool that all sequences share."""

import jax
import jax.numpy as jnp


def look_up(block_tables: jax.Array, pages: jax.Array, num_pages: int) -> jax.Array:
    """The physical pages of logical ones.

    Args:
      block_tables: int32 [batch, max_pages]; whatever is not in [0, num_pages) is no page.
      pages: int32 [batch, ...], logical; whatever is not in [0, max_pages) is no page.
      num_pages: pages of the pool.

    Returns:
      int32, of the shape of `pages`. No page is `num_pages`, which `.at[]` takes for out of range; a negative number would
      count from the end.
    """
    batch, max_pages = block_tables.shape
    if max_pages == 0:
        return jnp.full(pages.shape, num_pages, jnp.int32)
    inside = (pages >= 0) & (pages < max_pages)
    flat = jnp.where(inside, pages, 0).reshape(batch, -1)
    physical = jnp.take_along_axis(block_tables, flat, axis=1).reshape(pages.shape)
    return jnp.where(inside & (physical >= 0) & (physical < num_pages), physical, num_pages)
