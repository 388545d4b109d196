"""BiFormer's bi-level routing: the score of each pair of regions, and which tokens see each other."""

import itertools

import numpy as np


def regions(shape, num_regions: int) -> np.ndarray:
    """int [tokens]: the region of each token of a grid in raster order; regions are numbered in raster order too."""
    sizes = [-(-length // num_regions) for length in shape]
    counts = [-(-length // size) for length, size in zip(shape, sizes)]
    places = [tuple(x // size for x, size in zip(token, sizes)) for token in itertools.product(*map(range, shape))]
    return np.array([np.ravel_multi_index(place, counts) for place in places])


def scores(query, key, region: np.ndarray) -> np.ndarray:
    """Means of regions multiplied over all channels: [batch, 1, regions of queries, regions of keys]."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = key.repeat(query.shape[2] // key.shape[2], axis=2)
    count = region.max() + 1
    found = np.zeros((query.shape[0], 1, count, count))
    for b, r, s in np.ndindex(query.shape[0], count, count):
        found[b, 0, r, s] = (query[b, region == r].mean(axis=0) * key[b, region == s].mean(axis=0)).sum()
    return found


def mask(query, key, shape, num_regions: int, top_k: int) -> np.ndarray:
    """bool [batch, 1, tokens, tokens], the same for all heads. Ties go to the lower region."""
    region = regions(shape, num_regions)
    score = scores(query, key, region)
    chosen = np.argsort(-score, axis=-1, kind="stable")[..., :top_k]  # [batch, 1, regions, top_k]
    return (chosen[:, :, region][:, :, :, None] == region[:, None]).any(axis=-1)
