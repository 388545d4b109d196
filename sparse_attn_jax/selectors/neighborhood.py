"""`NeighborhoodAttention`: a window around each token of a 1-D, 2-D or 3-D grid, exact to the token."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.grid_checks import bool_per_dim, check_shape, per_dim
from sparse_attn_jax.permutation import TokenPermutation, tile_tokens
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors.grid_call import check_grid_call
from sparse_attn_jax.selectors.neighborhood_lists import AxisPattern, raster_lists, tile_axis
from sparse_attn_jax.selectors.tile_lists import product_lists, split_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NeighborhoodPredicate:
    """Keeps a key that lies in the query's neighborhood along every dimension; positions are raster ids of the grid."""

    patterns: tuple[AxisPattern, ...] = dataclasses.field(metadata=dict(static=True))

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise: batch and head are not looked at."""
        keep = True
        for pattern in reversed(self.patterns):
            q, kv = q_position % pattern.length, kv_position % pattern.length
            q_position, kv_position = q_position // pattern.length, kv_position // pattern.length
            residue = q % pattern.dilation
            low, high = pattern.bounds(q // pattern.dilation, pattern.class_length(residue))
            index = kv // pattern.dilation
            keep = keep & (kv % pattern.dilation == residue) & (index >= low) & (index <= high)
        return keep


@dataclasses.dataclass(frozen=True)
class NeighborhoodAttention:
    """Neighborhood attention and its generalisation (GNA), as NATTEN computes them; the same for all heads.

    A query sees a key if it does so along every dimension. Along one of length L, with window K, stride S and dilation D,
    coordinates i and j see each other only if i % D == j % D; within such a class of n coordinates, with indices i // D:

        not causal: leader = min(i // S * S + S // 2, n - 1), moved into [K // 2, n - 1 - (K - 1) // 2] where it is outside;
                    i sees the K indices from leader - K // 2 on: at the borders the window is moved, never cut.
        causal:     leader = min(i // S * S + S - 1, n - 1); i sees the indices from max(leader - K + 1, 0) to i.

    Stride 1 is neighborhood attention, a sliding window. Stride = window is attention within windows that do not overlap if K
    divides n, as in Swin and in the Hi-Fi heads of HiLo. An even window reaches one further to the left. With causality and a
    stride, the early queries of a group see fewer than K keys, as in NATTEN.

    A tile of a grid is many short runs of raster-ordered tokens, so blocks of raster order hold many tokens that no query of
    a block sees. With `tile_shape` the tokens are permuted, so that blocks are tiles: call such a selector by
    `sparse_attention`, which permutes them and undoes it. Where a tile is seen by all queries of another or by none, the
    selection has no predicate and every kernel runs it: no padding, stride a multiple of the tile, windows that begin and
    end where tiles do.

    Tokens outside of the grid, such as text that all queries see, take a second call of the op:

        near, near_lse = sa.sparse_attention(query, key, value, NeighborhoodAttention((32, 32), 7), return_residual=True)
        text, text_lse = sa.sparse_attention(query, text_key, text_value, sa.selectors.Dense(), return_residual=True)
        out, _ = sa.merge_attention([near, text], [near_lse, text_lse])

    Source: NATTEN. It has tiles for queries and for keys; here they are the same, as one permutation serves both.

    Attributes:
      shape: lengths of the grid, 1 to 3 of them; tokens are in raster order, the last dimension the fastest.
      window_size: keys that a query sees along each dimension. This and what follows: one for all dimensions, or one for each.
      stride: queries that share a window; at most the window.
      dilation: distance of the keys in a window; dilation * window_size is at most the length.
      causal_dims: dimensions along which no query sees a key after it.
      tile_shape: tokens of a tile by dimension, for permuted tokens. `None`: raster order.
      block_size: tokens per block in raster order; the result does not depend on it, only the speed.
    """

    shape: tuple[int, ...]
    window_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal_dims: bool | tuple[bool, ...] = False
    tile_shape: int | tuple[int, ...] | None = None
    block_size: int = 64

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        check_shape("shape", self.shape)
        num_dims = len(self.shape)
        window, stride, dilation = (
            per_dim(name, getattr(self, name), num_dims) for name in ("window_size", "stride", "dilation")
        )
        bool_per_dim("causal_dims", self.causal_dims, num_dims)
        if self.tile_shape is not None:
            per_dim("tile_shape", self.tile_shape, num_dims)
        checks.check_int("block_size", self.block_size, 1)
        for d in range(num_dims):
            if stride[d] > window[d]:
                raise ValueError(
                    f"`stride` is {self.stride!r}; in dimension {d} it must be at most the window, {window[d]}: "
                    "no query may be left out."
                )
            if dilation[d] * window[d] > self.shape[d]:
                raise ValueError(
                    f"`window_size` is {self.window_size!r}; in dimension {d} with dilation {dilation[d]} it spans "
                    f"{dilation[d] * window[d]} tokens, and must fit in {self.shape[d]}."
                )

    def permutation(self, query: jax.Array, key: jax.Array) -> TokenPermutation | None:
        """What `sparse_attention` has to do with the tokens first; only the configuration is read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].

        Returns:
          The permutation into tiles, or `None` for raster order, or where raster order has the tiles already.
        """
        if self.tile_shape is None or self._raster_is_tiled():
            return None
        return tile_tokens(self.shape, self.tile_shape, self.dilation)

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
          query: [batch, q_len, num_q_heads, head_dim], every token of the grid; permuted if `permutation` is given.
          key: [batch, q_len, num_kv_heads, head_dim], of the same tokens.
          is_causal: must be False, here and in the op: causality is by dimension, `causal_dims`.
          q_offset: must be `None` or 0.
          permutation: what `self.permutation` gave; `sparse_attention` hands it on.

        Returns:
          A `BlockSelection` with one head, and a predicate unless every token of a block sees every token of its list.

        Raises:
          ValueError: an argument is wrong.
        """
        wanted = self.permutation(query, key)
        check_grid_call(query, key, is_causal, q_offset, permutation, wanted, math.prod(self.shape), "use `causal_dims`")
        lists, q_block_size, kv_block_size, is_full = _list_blocks(self)
        predicate = None
        if not is_full:
            predicate = NeighborhoodPredicate(self._patterns())
            predicate = predicate if permutation is None else permutation.predicate(query.shape[2], predicate=predicate)
        indices = jnp.asarray(lists)[None, None]
        return BlockSelection(indices, q_block_size=q_block_size, kv_block_size=kv_block_size, predicate=predicate)

    def _patterns(self) -> tuple[AxisPattern, ...]:
        num_dims = len(self.shape)
        sizes = (per_dim(name, getattr(self, name), num_dims) for name in ("window_size", "stride", "dilation"))
        causal = bool_per_dim("causal_dims", self.causal_dims, num_dims)
        return tuple(AxisPattern(*along) for along in zip(self.shape, *sizes, causal))

    def _raster_is_tiled(self) -> bool:
        """Blocks of a sequence are its tiles."""
        return len(self.shape) == 1 and per_dim("dilation", self.dilation, 1) == (1,)


# Layers share a selector, and every trace asks anew.
@functools.lru_cache(maxsize=16)
def _list_blocks(selector: NeighborhoodAttention) -> tuple[np.ndarray, int, int, bool]:
    """int32 [rows, slots], the sizes of a block of queries and of keys, and whether no predicate is needed."""
    patterns = selector._patterns()
    tiled_raster = selector._raster_is_tiled()
    if selector.tile_shape is None and not tiled_raster:
        size = selector.block_size
        return raster_lists(patterns, size), size, size, False
    tile_shape = selector.block_size if selector.tile_shape is None else selector.tile_shape
    tile_shape = per_dim("tile_shape", tile_shape, len(patterns))
    axes, are_full = zip(*(tile_axis(pattern, tile) for pattern, tile in zip(patterns, tile_shape)))
    tile_size = math.prod(tile_shape)
    lists, kv_block_size = split_tiles(product_lists(axes, np.arange(math.prod(map(len, axes)))), tile_size)
    # The op itself knows where a sequence ends, but not where tiles of permuted tokens do.
    has_padding = any(pattern.length % (pattern.dilation * tile) for pattern, tile in zip(patterns, tile_shape))
    return lists, tile_size, kv_block_size, all(are_full) and (tiled_raster or not has_padding)
