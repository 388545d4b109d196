"""Lists of tiles of a grid. Those that follow from shapes alone are made by NumPy."""

from collections.abc import Sequence

import jax
import numpy as np

# The largest blocks of keys that every kernel takes; tiles with more tokens are several blocks.
KERNEL_BLOCK_SIZES = (128, 64)


def intervals(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """first..last of each row, ascending, then -1: int32 [n] and [n] to int32 [n, the longest]."""
    width = max(1, int((last - first).max(initial=-1)) + 1)
    ids = first[:, None].astype(np.int32) + np.arange(width, dtype=np.int32)
    return np.where(ids <= last[:, None], ids, np.int32(-1))


def product_lists(axes: Sequence[np.ndarray], cells: np.ndarray) -> np.ndarray:
    """What cells of a grid list, where along each dimension a coordinate lists coordinates.

    Args:
      axes: for each dimension int32 [length, width], the coordinates that each coordinate lists; -1 is none.
      cells: int [n], raster ids of cells.

    Returns:
      int32 [n, product of widths], raster ids, ascending where the axes are; -1 is none.
    """
    shape = [len(axis) for axis in axes]
    ids = np.zeros((len(cells), 1), np.int32)
    for axis, length, coordinate in zip(axes, shape, np.unravel_index(cells, shape) if shape else ()):
        near = axis[coordinate][:, None]
        ids = np.where((ids[..., None] >= 0) & (near >= 0), ids[..., None] * length + near, -1).reshape(len(cells), -1)
    return ids.astype(np.int32)


def split_tiles(tiles: np.ndarray | jax.Array, tile_size: int) -> tuple[np.ndarray | jax.Array, int]:
    """Lists of tiles as lists of blocks that every kernel takes, where the tiles allow it.

    Args:
      tiles: int32 [..., slots], NumPy's or JAX's; -1 is none.
      tile_size: tokens of a tile.

    Returns:
      the lists of blocks, of the same kind, and the size of a block, a divisor of `tile_size`.
    """
    fits = [size for size in KERNEL_BLOCK_SIZES if tile_size > size and tile_size % size == 0]
    if not fits:
        return tiles, tile_size
    parts = np.arange(tile_size // fits[0], dtype=np.int32)
    # An empty slot is as many of them.
    blocks = (tiles[..., None] * len(parts) + parts).clip(min=-1)
    return blocks.reshape(*tiles.shape[:-1], -1), fits[0]
