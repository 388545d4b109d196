"""Sliding tile attention: which token of a grid, with text after it, sees which."""

import itertools

import numpy as np


def mask(shape, tile_shape, window, text_len: int = 0) -> np.ndarray:
    """bool [tokens, tokens] for one head, tokens of the grid in raster order, then text; `window` counts tiles."""
    tiles = [tuple(x // t for x, t in zip(token, tile_shape)) for token in itertools.product(*map(range, shape))]
    num_tiles = [-(-length // t) for length, t in zip(shape, tile_shape)]
    found = np.ones((len(tiles) + text_len,) * 2, bool)
    for i, j in np.ndindex(len(tiles), len(tiles)):
        found[i, j] = all(y in seen_tiles(x, w, n) for x, y, w, n in zip(tiles[i], tiles[j], window, num_tiles))
    return found


def seen_tiles(tile: int, window: int, num_tiles: int) -> range:
    start = min(max(tile - window // 2, 0), num_tiles - window)
    return range(start, start + window)
