"""Neighborhood attention (NATTEN): which token of a grid sees which, dimension by dimension."""

import numpy as np


def mask(shape, window, stride=None, dilation=None, causal=None) -> np.ndarray:
    """bool [tokens, tokens] of a grid in raster order; the arguments are tuples, one entry per dimension."""
    dims = len(shape)
    stride, dilation, causal = stride or (1,) * dims, dilation or (1,) * dims, causal or (False,) * dims
    found = np.ones((1, 1), bool)
    for along in zip(shape, window, stride, dilation, causal, strict=True):
        found = np.kron(found, mask_along(*along))
    return found


def mask_along(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """bool [length, length] of one dimension."""
    found = np.zeros((length, length), bool)
    for i in range(length):
        members = list(range(i % dilation, length, dilation))
        own = members.index(i)
        first = own - own % stride
        if causal:
            leader = min(first + stride, len(members)) - 1
            seen = members[max(leader - window + 1, 0) : own + 1]
        else:
            leader = min(first + stride // 2, len(members) - 1)
            start = min(max(leader - window // 2, 0), len(members) - window)
            seen = members[start : start + window]
        found[i, seen] = True
    return found
