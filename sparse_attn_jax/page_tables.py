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
    return _name_pages(jnp.where(inside, physical, num_pages), num_pages)


def read_pages(pages: jax.Array, block_tables: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All that the pages of each sequence hold, one page after the other.

    Args:
      pages: [num_pages, page_size, ...].
      block_tables: int32 [batch, max_pages]; whatever is not in [0, num_pages) is no page.

    Returns:
      (rows [batch, max_pages * page_size, ...], zeros where there is no page, and whether there is one, bool
      [batch, max_pages * page_size]).
    """
    num_pages, page_size = pages.shape[:2]
    physical = _name_pages(block_tables, num_pages)
    rows = pages.at[physical].get(mode="fill", fill_value=0)
    rows = rows.reshape(rows.shape[0], rows.shape[1] * page_size, *pages.shape[2:])
    return rows, jnp.repeat(physical < num_pages, page_size, axis=1)


def _name_pages(pages: jax.Array, num_pages: int) -> jax.Array:
    """Physical pages with `num_pages` for whatever is none."""
    return jnp.where((pages >= 0) & (pages < num_pages), pages, num_pages)
