"""`BiLevelRouting`: regions of an image whose mean queries and keys agree best."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.grid_checks import check_shape
from sparse_attn_jax.permutation import TokenPermutation, tile_tokens
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.grid_call import check_grid_call
from sparse_attn_jax.selectors.tile_scores import mean_of_tiles, pick_tiles


@dataclasses.dataclass(frozen=True)
class BiLevelRouting:
    """Bi-level routing attention of BiFormer: all tokens of a region see all tokens of the `top_k` regions it is routed to.

    score(region r, region s) = sum over query heads h of mean(query of r in h) . mean(key of s in h's KV head)

    One routing serves all heads: the scores are products over the full width of the channels. Only their order counts, so
    there is no scale. Not causal; the routing has no gradient, as in BiFormer by default.

    Regions are ceil(length / num_regions) tokens long along each dimension; where that does not divide the length, the last
    one is shorter, or there are fewer. BiFormer pads the image before the projections and its means count the padding; here
    they are over the tokens there are, and no region is empty. The position term that BiFormer adds to the result (LEPE, a
    depthwise convolution of the values), soft routing weights and pooled keys are not part of this.

    Call it by `sparse_attention`, which permutes the tokens into regions.

    Attributes:
      shape: lengths of the grid, 1 to 3 of them; tokens are in raster order, the last dimension the fastest.
      num_regions: along each dimension, at most.
      top_k: regions that each region sees; its own is not forced.
    """

    shape: tuple[int, ...]
    num_regions: int = 7
    top_k: int = 4

    causal_safe: ClassVar[bool] = False

    def __post_init__(self):
        check_shape("shape", self.shape)
        checks.check_int("num_regions", self.num_regions, 1)
        if self.num_regions > min(self.shape):
            raise ValueError(f"`num_regions` is {self.num_regions}; the lengths of {self.shape} must be at least that.")
        checks.check_int("top_k", self.top_k, 1)
        if self.top_k > self.num_regions ** len(self.shape):
            raise ValueError(f"`top_k` is {self.top_k}; there are {self.num_regions ** len(self.shape)} regions.")

    def permutation(self, query: jax.Array, key: jax.Array) -> TokenPermutation:
        """What `sparse_attention` has to do with the tokens first; only the configuration is read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].

        Returns:
          The permutation into regions.
        """
        return tile_tokens(self.shape, self._region_shape())

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        is_causal: bool = False,
        q_offset: int | None = None,
        permutation: TokenPermutation | None = None,
    ) -> BlockSelection:
        """Selects for one call.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], every token of the grid, permuted: zero at the padding.
          key: [batch, q_len, num_kv_heads, head_dim], of the same tokens.
          is_causal: must be False, here and in the op.
          q_offset: must be `None` or 0.
          permutation: what `self.permutation` gave; `sparse_attention` hands it on.

        Returns:
          A `BlockSelection` with one head whose blocks are regions; with a predicate only where regions do not divide the
          grid, to hide the padding. Lists are shorter than `top_k` if there are fewer regions.

        Raises:
          ValueError: an argument is wrong.
        """
        wanted = self.permutation(query, key)
        check_grid_call(query, key, is_causal, q_offset, permutation, wanted, math.prod(self.shape))
        size = math.prod(self._region_shape())
        query_mean, key_mean = (mean_of_tiles(jax.lax.stop_gradient(x), wanted, size) for x in (query, key))
        grouped = query_mean.reshape(*query_mean.shape[:2], key.shape[2], -1, query.shape[3])
        precision = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bqngd,bknd->bkq", grouped, key_mean, precision=precision)[:, None]
        lists = pick_tiles(scores, min(self.top_k, scores.shape[2]))
        predicate = permutation.predicate(query.shape[2]) if permutation.has_padding else None
        return BlockSelection(lists, q_block_size=size, kv_block_size=size, predicate=predicate)

    def _region_shape(self) -> tuple[int, ...]:
        return tuple(num_blocks(length, self.num_regions) for length in self.shape)
