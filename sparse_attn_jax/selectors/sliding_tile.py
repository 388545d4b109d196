"""`SlidingTile`: a window of whole tiles around each tile of a grid, other ones for each head."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.grid_checks import check_shape, per_dim
from sparse_attn_jax.permutation import TokenPermutation, tile_tokens
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.grid_call import check_grid_call
from sparse_attn_jax.selectors.neighborhood_lists import AxisPattern, tile_axis
from sparse_attn_jax.selectors.tile_lists import product_lists, split_tiles


@dataclasses.dataclass(frozen=True)
class SlidingTile:
    """Sliding tile attention (STA) of FastVideo: all tokens of a tile see all tokens of the tiles around it.

    Along each dimension a tile sees `window` consecutive tiles with itself in the middle; at the borders the window is moved,
    never cut. Text tokens, which follow the grid, see everything and are seen by all.

    With an odd window this is `NeighborhoodAttention` with stride = tile and a window of as many tiles. An even window has one
    tile more before the query's own than after it; FastVideo's code sees window + 1 tiles then, the odd window above.

    Call it by `sparse_attention`, which permutes the tokens into tiles. If the tiles divide the grid, the selection has no
    predicate, and every kernel runs it. With text, lists are as long as there are tiles.

    Attributes:
      shape: lengths of the grid, 1 to 3 of them; tokens are in raster order, the last dimension the fastest.
      tile_shape: tokens of a tile by dimension: an int or one per dimension.
      window_size: tiles that a tile sees by dimension: a tuple for all heads, or a tuple of such tuples, one for each query
        head, or for each KV head.
      text_len: tokens after those of the grid.
    """

    shape: tuple[int, ...]
    tile_shape: int | tuple[int, ...]
    window_size: tuple[int, ...] | tuple[tuple[int, ...], ...]
    text_len: int = 0

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        check_shape("shape", self.shape)
        checks.check_int("text_len", self.text_len, 0)
        if not isinstance(self.window_size, tuple) or not self.window_size:
            raise ValueError(f"`window_size` is {self.window_size!r}; it must be a tuple of ints, or one such tuple per head.")
        num_tiles = self._num_tiles()
        for window in self._windows():
            if not isinstance(window, tuple):
                raise ValueError(f"`window_size` is {window!r}; it must be a tuple of ints for each head.")
            for d, size in enumerate(per_dim("window_size", window, len(self.shape))):
                if size > num_tiles[d]:
                    raise ValueError(
                        f"`window_size` is {window}; in dimension {d} it must be at most the {num_tiles[d]} tiles there are."
                    )

    def permutation(self, query: jax.Array, key: jax.Array) -> TokenPermutation:
        """What `sparse_attention` has to do with the tokens first; only the configuration is read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].

        Returns:
          The permutation into tiles, text last.
        """
        tiles = tile_tokens(self.shape, self.tile_shape)
        text = tiles.length + jnp.arange(self.text_len, dtype=jnp.int32)
        return TokenPermutation(jnp.concatenate([tiles.order, text]), length=tiles.length + self.text_len)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        is_causal: bool = False,
        q_offset: int | None = None,
        permutation: TokenPermutation | None = None,
    ) -> BlockSelection:
        """Selects for one call; only the shapes are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], all tokens, permuted.
          key: [batch, q_len, num_kv_heads, head_dim], of the same tokens.
          is_causal: must be False, here and in the op.
          q_offset: must be `None` or 0.
          permutation: what `self.permutation` gave; `sparse_attention` hands it on.

        Returns:
          A `BlockSelection` with a list per head of `window_size`, or one for all if they are equal; with a predicate only
          where tiles do not divide the grid, to hide the padding.

        Raises:
          ValueError: an argument is wrong.
        """
        wanted = self.permutation(query, key)
        check_grid_call(query, key, is_causal, q_offset, permutation, wanted, math.prod(self.shape) + self.text_len)
        windows = self._windows()
        heads = sorted({key.shape[2], query.shape[2]})
        if isinstance(self.window_size[0], tuple) and len(windows) not in heads:
            raise ValueError(
                f"`window_size` has windows for {len(windows)} heads; the call has {' or '.join(map(str, heads))} of them."
            )
        tile_size = math.prod(per_dim("tile_shape", self.tile_shape, len(self.shape)))
        lists, kv_block_size = _list_blocks(self._num_tiles(), windows if len(set(windows)) > 1 else windows[:1], tile_size)
        indices = jnp.asarray(lists)[None]
        if self.text_len:
            indices = self._add_text(indices, tile_size, kv_block_size, wanted.permuted_len)
        predicate = permutation.predicate(query.shape[2]) if permutation.has_padding else None
        return BlockSelection(indices, q_block_size=tile_size, kv_block_size=kv_block_size, predicate=predicate)

    def _num_tiles(self) -> tuple[int, ...]:
        return tuple(map(num_blocks, self.shape, per_dim("tile_shape", self.tile_shape, len(self.shape))))

    def _windows(self) -> tuple[tuple[int, ...], ...]:
        """One window per head, or a single one."""
        return self.window_size if isinstance(self.window_size[0], tuple) else (self.window_size,)

    def _add_text(self, lists: jax.Array, tile_size: int, kv_block_size: int, permuted_len: int) -> jax.Array:
        """The lists with the text's blocks in all of them, and with rows for the text's queries, which see all blocks."""
        heads, rows, slots = lists.shape[1:]
        every = jnp.arange(num_blocks(permuted_len, kv_block_size), dtype=jnp.int32)
        text = every[rows * tile_size // kv_block_size :]
        lists = jnp.pad(lists, [(0, 0), (0, 0), (0, 0), (0, len(every) - len(text) - slots)], constant_values=-1)
        lists = jnp.concatenate([lists, jnp.broadcast_to(text, (1, heads, rows, len(text)))], axis=-1)
        text_rows = num_blocks(self.text_len, tile_size)
        return jnp.concatenate([lists, jnp.broadcast_to(every, (1, heads, text_rows, len(every)))], axis=2)


@functools.lru_cache(maxsize=16)
def _list_blocks(num_tiles: tuple[int, ...], windows: tuple[tuple[int, ...], ...], tile_size: int) -> tuple[np.ndarray, int]:
    """int32 [heads, tiles, slots], and the size of a block of keys."""
    lists = []
    for window in windows:
        axes = [tile_axis(AxisPattern(n, w, stride=1, dilation=1, is_causal=False), 1)[0] for n, w in zip(num_tiles, window)]
        lists.append(product_lists(axes, np.arange(math.prod(num_tiles))))
    slots = max(x.shape[1] for x in lists)
    lists = [np.pad(x, [(0, 0), (0, slots - x.shape[1])], constant_values=-1) for x in lists]
    return split_tiles(np.stack(lists), tile_size)
