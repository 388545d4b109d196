"""Which blocks of keys a neighborhood touches, from shapes alone."""

import dataclasses
import math

import numpy as np

from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.selectors.tile_lists import intervals, product_lists

# Entries held at once while lists are built, 4 or 8 bytes each in a few arrays.
CHUNK_ENTRIES = 2**21


@dataclasses.dataclass(frozen=True)
class AxisPattern:
    """The neighborhood along one dimension of a grid.

    A coordinate x has the residue x % dilation, and the index x // dilation in the class of its residue. Only coordinates of
    one class see each other: those with the indices `bounds` gives.
    """

    length: int
    window: int
    stride: int
    dilation: int
    is_causal: bool

    def class_length(self, residue):
        """How many coordinates have this residue."""
        return (self.length - residue + self.dilation - 1) // self.dilation

    def bounds(self, index, class_length):
        """The first and last index that each index of a class sees. Integers, NumPy or JAX arrays; both bounds ascend."""
        last = class_length - 1
        if self.is_causal:
            leader = (index // self.stride * self.stride + self.stride - 1).clip(max=last)
            return (leader - self.window + 1).clip(min=0), index
        leader = (index // self.stride * self.stride + self.stride // 2).clip(max=last)
        left = self.window // 2
        right = self.window - 1 - left
        center = leader.clip(min=left).clip(max=last - right)
        return center - left, center + right


def tile_axis(pattern: AxisPattern, tile: int) -> tuple[np.ndarray, bool]:
    """The tiles along one dimension that each tile's tokens see.

    Tiles are those of `tile_tokens`: first the classes, then the tiles of a class.

    Returns:
      int32 [tiles, width], -1 padded; and whether every token of a tile sees every token of the tiles it lists.
    """
    tiles_per_class = num_blocks(pattern.class_length(0), tile)
    residue, own = (x.reshape(-1) for x in np.indices((pattern.dilation, tiles_per_class)))
    class_length = pattern.class_length(residue)
    start, stop = own * tile, np.minimum(own * tile + tile, class_length)
    is_empty = start >= stop  # only in the shorter classes
    q_first, q_last = np.where(is_empty, 0, start), np.where(is_empty, 0, stop - 1)
    # Windows follow each other without a gap, so a tile sees all from where the first of its windows starts to where the last
    # ends; and all its tokens see what is between where the last starts and the first ends.
    first_low, first_high = pattern.bounds(q_first, class_length)
    last_low, last_high = pattern.bounds(q_last, class_length)
    first, last = first_low // tile, np.where(is_empty, first_low // tile - 1, last_high // tile)
    is_full = (last_low <= first * tile) & (np.minimum(last * tile + tile, class_length) - 1 <= first_high)
    lists = intervals(first, last)
    shift = (residue * tiles_per_class)[:, None].astype(np.int32)
    return np.where(lists >= 0, lists + shift, np.int32(-1)), bool((is_full | is_empty).all())


def coordinate_axis(pattern: AxisPattern) -> np.ndarray:
    """The coordinates along one dimension that each coordinate sees: int32 [length, width], -1 padded."""
    coordinate = np.arange(pattern.length)
    index, residue = np.divmod(coordinate, pattern.dilation)
    seen = intervals(*pattern.bounds(index, pattern.class_length(residue)))
    return np.where(seen >= 0, seen * pattern.dilation + residue[:, None].astype(np.int32), np.int32(-1))


def raster_lists(patterns: tuple[AxisPattern, ...], block_size: int) -> np.ndarray:
    """The blocks of raster-ordered tokens that hold a key which a query of a block sees.

    A block of queries is cut where rows end (a row: all tokens with the same coordinates but the last), and a piece into its
    residue classes. What one of these sees of a row of keys is an interval, possibly with holes between its residues.

    Args:
      patterns: by dimension, the last is the fastest.
      block_size: tokens of a block, of queries and keys.

    Returns:
      int32 [num_blocks, slots], ascending, -1 last. The time and memory taken are those of the intervals, and of bits for some
      rows of the block mask at a time.
    """
    *outer, inner = patterns
    num_rows = math.prod(pattern.length for pattern in outer)
    total = num_blocks(num_rows * inner.length, block_size)
    key_axes = [coordinate_axis(pattern) for pattern in outer]
    pieces_per_block = _rows_per_block(inner, block_size) * inner.dilation
    keys_per_piece = max(math.prod(axis.shape[1] for axis in key_axes), inner.window)
    entries = pieces_per_block * keys_per_piece
    step = max(1, CHUNK_ENTRIES // max(entries, total))
    ids, counts = [], []
    for first in range(0, total, step):
        mask = _touched(inner, key_axes, num_rows, block_size, first, min(first + step, total), total)
        ids.append(np.nonzero(mask)[1].astype(np.int32))
        counts.append(mask.sum(axis=1))
    counts = np.concatenate(counts)
    lists = np.full((total, counts.max()), -1, np.int32)
    lists[np.arange(lists.shape[1]) < counts[:, None]] = np.concatenate(ids)
    return lists


def _rows_per_block(inner: AxisPattern, block_size: int) -> int:
    """No block of queries has tokens of more rows."""
    return (block_size - 2) // inner.length + 2


def _touched(inner: AxisPattern, key_axes, num_rows: int, block_size: int, first: int, end: int, total: int) -> np.ndarray:
    """bool [end - first, total], the block mask for the blocks first..end of queries."""
    row, block, low, high = _pieces(inner, num_rows, block_size, first, end)
    rows, row_idx = np.unique(row, return_inverse=True)
    key_row = product_lists(key_axes, rows)[row_idx].astype(np.int64) * inner.length  # [pieces, key rows]
    # Between keys that are nearer than a block no block is skipped; of keys that are further apart, each is in its own.
    step = max(inner.dilation, block_size)
    span = np.minimum(np.arange(num_blocks(int((high - low).max()), step) + 1) * step, (high - low)[:, None])
    mask = np.zeros((end - first, total), bool)
    for seen in (low[:, None] + span).T:
        key_block = np.where(key_row < 0, -1, (key_row + seen[:, None]) // block_size)
        is_key = key_block >= 0
        mask[np.broadcast_to((block - first)[:, None], key_block.shape)[is_key], key_block[is_key]] = True
    return mask


def _pieces(inner: AxisPattern, num_rows: int, block_size: int, first: int, end: int) -> tuple[np.ndarray, ...]:
    """The pieces of blocks first..end of queries by residue class.

    Returns:
      int [pieces] each: row, block, and the first and last coordinate of the keys that the piece sees in a row.
    """
    length, dilation = inner.length, inner.dilation
    block = np.arange(first, end)[:, None, None]
    row = block * block_size // length + np.arange(_rows_per_block(inner, block_size))[:, None]
    residue = np.arange(dilation)
    start = np.maximum(block * block_size - row * length, 0)
    stop = np.minimum((block + 1) * block_size - row * length, length)
    # Indices in the class: the first at or after `start`, and the last before `stop`.
    q_first, q_last = (start - residue + dilation - 1) // dilation, (stop - 1 - residue) // dilation
    is_piece = (q_first <= q_last) & (row < num_rows)
    class_length = inner.class_length(residue)
    low, _ = inner.bounds(np.where(is_piece, q_first, 0), class_length)
    _, high = inner.bounds(np.where(is_piece, q_last, 0), class_length)
    found = (row, block, low * dilation + residue, high * dilation + residue)
    return tuple(np.broadcast_to(x, is_piece.shape)[is_piece] for x in found)
