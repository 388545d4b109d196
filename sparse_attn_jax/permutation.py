"""Permutations of tokens, after which those that belong together, such as a tile of an image, are one block."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import validation
from sparse_attn_jax.grid_checks import check_shape, per_dim
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.validation import require

TOKEN_AXIS = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenPermutation:
    """Another order of tokens, with room for padding between them. A pytree; `order` is its leaf.

    A selector that works on permuted tokens has a method `permutation(query, key) -> TokenPermutation | None`;
    `sparse_attention` then permutes query, key and value, calls the selector on them and undoes the permutation. What the
    selection's predicate has to do then is said there.

    Attributes:
      order: int32 [permuted_len], or [batch or 1, heads or 1, permuted_len] with heads in {num_kv_heads, num_q_heads}: the
        original index of each permuted token; -1, or any index outside [0, length), is padding. Every token occurs once.
      length: number of tokens before the permutation.
    """

    order: jax.Array
    length: int = dataclasses.field(metadata=dict(static=True))

    @property
    def permuted_len(self) -> int:
        return self.order.shape[-1]

    @property
    def has_padding(self) -> bool:
        return self.permuted_len != self.length

    @property
    def num_heads(self) -> int:
        """Heads that have an order of their own."""
        return 1 if self.order.ndim == 1 else self.order.shape[1]

    def apply(self, x: jax.Array, axis: int = TOKEN_AXIS) -> jax.Array:
        """x with its tokens permuted, and zeros at the padding.

        Args:
          x: an array with `length` tokens along `axis`. If orders differ by head or batch row, [batch, length, heads, ...]: the
            orders of fewer heads are each shared by as many consecutive heads of x.
          axis: of the tokens. Must be 1 if orders differ.

        Returns:
          x with `permuted_len` tokens along `axis`. Differentiable in x.

        Raises:
          ValueError: x does not fit.
        """
        if self.order.ndim not in (1, 3):
            needed = "[permuted_len] or [batch or 1, heads or 1, permuted_len]"
            raise ValueError(f"`order` has shape {self.order.shape}; it must be {needed}.")
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != self.length:
            raise ValueError(f"`x` has shape {x.shape}; it must have {self.length} tokens along axis {axis}.")
        # Distinct even at the padding: gathers and scatters of distinct indices are fast, and their order does not matter.
        outside = self.length + jnp.arange(self.permuted_len, dtype=jnp.int32)
        order = jnp.where((self.order >= 0) & (self.order < self.length), self.order, outside)
        if self.order.ndim == 1:
            return _take(x, order, axis % x.ndim)
        if axis % x.ndim != TOKEN_AXIS or x.ndim < 3:
            raise ValueError(f"`axis` is {axis} of shape {x.shape}; orders differ, so `x` must be [batch, tokens, heads, ...].")
        if self.order.shape[0] not in (1, x.shape[0]) or x.shape[2] % self.num_heads:
            raise ValueError(
                f"`x` has shape {x.shape}; with orders {self.order.shape} it needs batch size {self.order.shape[0]} "
                f"and a multiple of {self.num_heads} heads."
            )
        order = jnp.repeat(order, x.shape[2] // self.num_heads, axis=1)
        order = jnp.broadcast_to(order, (x.shape[0], *order.shape[1:]))
        take_heads = jax.vmap(lambda x, order: _take(x, order, 0), in_axes=(1, 0), out_axes=1)
        return jax.vmap(take_heads)(x, order)

    def undo(self, x: jax.Array, axis: int = TOKEN_AXIS) -> jax.Array:
        """The inverse of `apply`, which drops what stands at the padding.

        Args:
          x: as for `apply`, with `permuted_len` tokens along `axis`.
          axis: as for `apply`.

        Returns:
          x with `length` tokens along `axis`. Differentiable in x.

        Raises:
          ValueError: x does not fit.
        """
        return self.inverse().apply(x, axis)

    def inverse(self) -> "TokenPermutation":
        """The permutation that undoes this one."""
        positions = jnp.arange(self.permuted_len, dtype=jnp.int32)

        def invert(order):
            # A negative index would count from the end.
            target = jnp.where(order < 0, self.length, order)
            return jnp.full((self.length,), -1, jnp.int32).at[target].set(positions, mode="drop")

        if self.order.ndim == 3:
            invert = jax.vmap(jax.vmap(invert))
        return TokenPermutation(invert(self.order), length=self.permuted_len)

    def predicate(self, num_q_heads: int, *, is_causal: bool = False, predicate: Any = None) -> "PermutedPredicate":
        """A predicate of permuted positions, from one of original positions.

        Args:
          num_q_heads: of the call.
          is_causal: also drop the keys that stand after the query in the original order.
          predicate: of original positions, as in `BlockSelection`; `None` keeps all.

        Returns:
          A predicate for `BlockSelection` that also hides the padding.
        """
        return PermutedPredicate(
            self.order, self.length, predicate, is_causal=is_causal, heads_per_order=num_q_heads // self.num_heads
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PermutedPredicate:
    """Keeps what is no padding, and what causality and another predicate keep by original positions.

    Made by `TokenPermutation.predicate`.
    """

    order: jax.Array
    length: int = dataclasses.field(metadata=dict(static=True))
    predicate: Any
    _: dataclasses.KW_ONLY
    is_causal: bool = dataclasses.field(metadata=dict(static=True))
    heads_per_order: int = dataclasses.field(metadata=dict(static=True))

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise, of permuted positions."""
        q, kv = (self._original(batch, head, x) for x in (q_position, kv_position))
        keep = self._is_token(q) & self._is_token(kv)
        if self.is_causal:
            keep = keep & (kv <= q)
        if self.predicate is not None:
            keep = keep & self.predicate(batch, head, q, kv)
        return keep

    def _original(self, batch, head, position) -> jax.Array:
        order = jnp.asarray(self.order)
        if order.ndim == 1:
            return order.at[position].get(mode="clip")
        batch = batch if order.shape[0] > 1 else 0
        return order.at[batch, head // self.heads_per_order, position].get(mode="clip")

    def _is_token(self, position):
        return (position >= 0) & (position < self.length)


def _take(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    where = (slice(None),) * axis + (order,)
    return x.at[where].get(mode="fill", fill_value=0, unique_indices=True)


def tile_tokens(
    shape: tuple[int, ...], tile_shape: int | tuple[int, ...], dilation: int | tuple[int, ...] = 1
) -> TokenPermutation:
    """The permutation after which each tile of a grid is one contiguous block.

    Along each dimension the coordinates are sorted by their residue modulo `dilation`, each residue class is padded to the same
    multiple of the tile, and cut into tiles. Tiles are in raster order, tokens within a tile too.

    Args:
      shape: lengths of a 1-D, 2-D or 3-D grid whose tokens are in raster order, the last dimension the fastest.
      tile_shape: an int or one per dimension.
      dilation: an int or one per dimension.

    Returns:
      A `TokenPermutation` of prod(shape) tokens, the same for all heads; block b of prod(tile_shape) permuted tokens is tile b.

    Raises:
      ValueError: an argument is wrong.
    """
    check_shape("shape", shape)
    tile_shape = per_dim("tile_shape", tile_shape, len(shape))
    dilation = per_dim("dilation", dilation, len(shape))
    return TokenPermutation(jnp.asarray(_tile_order(shape, tile_shape, dilation)), length=math.prod(shape))


@functools.lru_cache(maxsize=16)
def _tile_order(shape: tuple[int, ...], tile_shape: tuple[int, ...], dilation: tuple[int, ...]) -> np.ndarray:
    num_dims = len(shape)
    order = np.zeros([1] * (2 * num_dims), np.int32)
    is_token = np.ones_like(order, bool)
    for d, (length, tile, step) in enumerate(zip(shape, tile_shape, dilation)):
        tiles_per_class = num_blocks(num_blocks(length, step), tile)
        in_class = np.arange(tiles_per_class * tile, dtype=np.int32)
        coordinate = np.arange(step, dtype=np.int32)[:, None] + in_class * step  # [residue, position in the class]
        axes = [1] * (2 * num_dims)
        axes[d], axes[num_dims + d] = step * tiles_per_class, tile
        coordinate = coordinate.reshape(axes)
        order, is_token = order * length + coordinate, is_token & (coordinate < length)
    order = np.where(is_token, order, -1).reshape(-1).astype(np.int32)
    order.flags.writeable = False
    return order


def find_permutation(selector: Any, query: jax.Array, key: jax.Array) -> TokenPermutation | None:
    """The permutation that the selector wants for this call, if any."""
    permutation = selector.permutation(query, key) if hasattr(selector, "permutation") else None
    if permutation is not None:
        needed = f"of length {permutation.length}, as the permutation of `selector`"
        for name, x in (("query", query), ("key", key)):
            require(x.shape[1] == permutation.length, name, x, needed)
        heads = sorted({1, key.shape[2], query.shape[2]})
        needed = f"have orders of {' or '.join(map(str, heads))} heads"
        if permutation.num_heads not in heads:
            raise ValueError(f"the permutation of `selector` has orders {permutation.order.shape}; it must {needed}.")
    return permutation


def permute_call(
    permutation: TokenPermutation, query: jax.Array, key: jax.Array, value: jax.Array, q_offset: Any, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
    """The arguments of `block_sparse_attention` for permuted tokens, from those for the tokens as they are.

    If the orders are those of query heads that share a KV head, each gets a copy of its keys and values.
    """
    is_zero = isinstance(q_offset, int) and q_offset == 0
    require(q_offset is None or is_zero, "q_offset", q_offset, "0 or None: the tokens are permuted")
    options = dict(options)
    window, sinks = options.pop("local_window_size", None), options.pop("num_sinks", 0)
    require(window is None, "local_window_size", window, "None: the tokens are permuted")
    require(isinstance(sinks, int) and sinks == 0, "num_sinks", sinks, "0: the tokens are permuted")
    options |= _permute_segments(permutation, query, options)
    num_q_heads, num_kv_heads = query.shape[2], key.shape[2]
    copies = num_q_heads // num_kv_heads if permutation.num_heads == num_q_heads else 1

    def permute_keys(x):
        return permutation.apply(jnp.repeat(x, copies, axis=2) if copies > 1 else x)

    key_bias = options.get("key_bias")
    validation.check_key_bias(key_bias, (key.shape[0], num_kv_heads, key.shape[1]))
    if key_bias is not None:
        options["key_bias"] = permute_keys(key_bias.swapaxes(1, 2)).swapaxes(1, 2)
    return permutation.apply(query), permute_keys(key), permute_keys(value), options


def _permute_segments(permutation: TokenPermutation, query: jax.Array, options: dict[str, Any]) -> dict[str, Any]:
    names = ("query_segment_ids", "key_value_segment_ids")
    segments = {name: options[name] for name in names if options.get(name) is not None}
    validation.check_segment_ids(*map(segments.get, names), query.shape[0], permutation.length, permutation.length)
    for name, ids in segments.items():
        require(permutation.num_heads == 1, name, ids, "None: each head has its tokens in another order")
        segments[name] = permutation.apply(jnp.asarray(ids)[..., None])[..., 0]
    return segments


def check_permuted_selection(permutation: TokenPermutation, selection: BlockSelection, is_causal: bool) -> None:
    """A selection of permuted tokens must say what is padding and what is causal: the op sees permuted positions only."""
    for needs, what in ((permutation.has_padding, "the padding"), (is_causal, "later tokens in the original order")):
        if needs and selection.predicate is None:
            raise ValueError(f"`selector` gave a selection of permuted tokens without a predicate, which has to hide {what}.")
