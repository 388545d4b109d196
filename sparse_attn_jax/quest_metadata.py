"""`QuestMetadata`: the extrema of every channel in every block of keys, dense or in pages, kept up to date as tokens come."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from sparse_attn_jax import dispatch, jax_compat, validation
from sparse_attn_jax.bound_problem import ExtremaProblem
from sparse_attn_jax.page_tables import look_up
from sparse_attn_jax.paged_cache import PagedKVCache, check_active, load, store
from sparse_attn_jax.problem import MAX_LENGTH, device_of
from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.selection_checks import check_int

# Blocks of every sequence that a step of `refresh` reads.
REFRESH_BLOCKS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuestMetadata:
    """Per block of keys the extrema of each channel, from which `Quest` bounds any query's products. A pytree.

    maximum[b, n, d] = max of key[j, n, d] over the tokens j of block b, minimum likewise. The tokens that are covered are the
    first `covered_len` of each sequence; a last block of which some tokens are covered has the extrema of these. Blocks
    without any covered token hold anything, and no score may be read from them.

    The metadata lies in one of two layouts. Dense: block b of a sequence is maximum[sequence, b]. Paged: it is row b % rows of
    the page block_tables[sequence, b // rows], and an entry that is no page has no metadata. Pages may be those of a
    `PagedKVCache` itself, the maxima where other pages have keys and the minima where they have values; see `in_pool`.

    A method that returns metadata updates it in place where the caller donates it.

    Attributes:
      maximum: [batch, num_blocks, num_kv_heads, head_dim], or in pages [num_pages, rows, num_kv_heads, head_dim].
      minimum: of the same shape and dtype.
      covered_len: int32 [batch].
      block_tables: int32 [batch, max_metadata_pages] of the paged layout, -1 where unassigned; `None` is the dense one.
      block_size: tokens per block.
    """

    maximum: jax.Array
    minimum: jax.Array
    covered_len: jax.Array
    block_tables: jax.Array | None = None
    _: dataclasses.KW_ONLY
    block_size: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(
        cls,
        *,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: Any = jnp.float32,
    ) -> Self:
        """Dense metadata that covers nothing yet, with room for `max_len` tokens per sequence; sizes are positive ints."""
        sizes = dict(batch=batch, max_len=max_len, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size)
        for name, size in sizes.items():
            check_int(name, size, 1)
        _check_room("max_len", num_blocks(max_len, block_size), block_size)
        shape = (batch, num_blocks(max_len, block_size), num_kv_heads, head_dim)
        empty = [jnp.zeros(shape, dtype) for _ in range(2)]
        return cls(*empty, jnp.zeros((batch,), jnp.int32), block_size=block_size)

    @classmethod
    def create_paged(
        cls,
        block_tables: jax.Array,
        *,
        num_pages: int,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: Any = jnp.float32,
    ) -> Self:
        """Metadata in pages of its own that covers nothing yet.

        Args:
          block_tables: int32 [batch, max_metadata_pages].
          num_pages: pages of the pool.
          rows: blocks per page.
          num_kv_heads: heads of the keys.
          head_dim: features per head.
          block_size: tokens per block.
          dtype: of the keys.
        """
        sizes = dict(num_pages=num_pages, rows=rows, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size)
        for name, size in sizes.items():
            check_int(name, size, 1)
        _check_tables(block_tables)
        _check_room("block_tables", block_tables.shape[1] * rows, block_size)
        empty = [jnp.zeros((num_pages, rows, num_kv_heads, head_dim), dtype) for _ in range(2)]
        covered_len = jnp.zeros((block_tables.shape[0],), jnp.int32)
        return cls(*empty, covered_len, block_tables, block_size=block_size)

    @classmethod
    def in_pool(
        cls, cache: PagedKVCache, block_tables: jax.Array, covered_len: jax.Array, *, block_size: int | None = None
    ) -> Self:
        """Metadata in pages of a cache's own pool: maxima in the pages of keys, minima in those of values.

        It holds the cache's arrays. After a change the cache has to be given them back: `metadata.to_pool(cache)`.

        Args:
          cache: its keys and values must be of one shape.
          block_tables: int32 [batch, max_metadata_pages]: pages of the pool that no sequence has tokens in.
          covered_len: int32 [batch], as it was when the cache was last given the metadata; zeros at first.
          block_size: tokens per block; `None` is the cache's page size.
        """
        validation.require(isinstance(cache, PagedKVCache), "cache", cache, "a PagedKVCache")
        keys, values = cache.key_pages, cache.value_pages
        needed = f"of shape {list(keys.shape)}, as `cache.key_pages`: metadata of keys is to lie there"
        validation.require(keys.shape == values.shape, "cache.value_pages", values, needed)
        block_size = cache.page_size if block_size is None else block_size
        check_int("block_size", block_size, 1)
        _check_tables(block_tables)
        _check_room("block_tables", block_tables.shape[1] * cache.page_size, block_size)
        batch = block_tables.shape[0]
        _check_lengths("covered_len", covered_len, batch)
        return cls(keys, values, jnp.asarray(covered_len), block_tables, block_size=block_size)

    def to_pool(self, cache: PagedKVCache) -> PagedKVCache:
        """The cache of `in_pool` with what has been written since."""
        return dataclasses.replace(cache, key_pages=self.maximum, value_pages=self.minimum)

    @property
    def batch(self) -> int:
        return self.covered_len.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks per sequence there is room for."""
        rows = self.maximum.shape[1]
        return rows if self.block_tables is None else self.block_tables.shape[1] * rows

    @property
    def max_len(self) -> int:
        """Tokens per sequence there is room for."""
        return self.num_blocks * self.block_size

    def build(
        self,
        key: jax.Array | None,
        seq_lens: jax.Array | int,
        *,
        block_tables: jax.Array | None = None,
        implementation: str | Sequence[str] | None = None,
    ) -> Self:
        """Covers the first `seq_lens` tokens anew, whatever was covered before. Arguments as in `refresh`."""
        validation.check_integers("seq_lens", seq_lens, (self.batch,))
        empty = self.reset(jnp.arange(self.batch, dtype=jnp.int32))
        return empty.refresh(key, None, seq_lens, block_tables=block_tables, implementation=implementation)

    def reset(self, sequence: int | jax.Array) -> Self:
        """Covers nothing of a sequence, an int or int32 array of rows of the batch: another one takes its place."""
        validation.check_integers("sequence", sequence, tuple(getattr(sequence, "shape", ())))
        covered_len = self.covered_len.at[sequence].set(0, mode="drop", wrap_negative_indices=False)
        return dataclasses.replace(self, covered_len=covered_len)

    def refresh(
        self,
        key: jax.Array | None,
        start: jax.Array | int | None,
        end: jax.Array | int,
        *,
        block_tables: jax.Array | None = None,
        implementation: str | Sequence[str] | None = None,
    ) -> Self:
        """Reads the tokens start .. end - 1 of each sequence, which are new or have changed, and covers them.

        The extrema of every block that has one of these tokens are computed anew from all its tokens before
        max(end, covered_len). `covered_len` becomes `end` if that is more, unless tokens before `start` are missing.
        Work is proportional to the longest range of the batch.

        Args:
          key: [batch, kv_len, num_kv_heads, head_dim], all keys of each sequence; or with `block_tables` the pages
            [num_pages, page_size, num_kv_heads, head_dim]; `None` with `block_tables` is the pool that the metadata lies in.
          start: int32 [batch] or an int; `None` is `covered_len`: all that has come since.
          end: int32 [batch] or an int. Values outside [0, max_len] count as the nearest inside, of `start` too.
          block_tables: int32 [batch, max_pages], of the keys.
          implementation: what finds the extrema: "xla", "mosaic" or "cuda", or a sequence of them to try in order. Default: the
            first that can.

        Raises:
          ValueError: keys that do not fit the metadata, or a length of `key` for which it has no room.
          NotImplementedError: none of the implementations asked for can run this call; the message lists every reason.
        """
        self._check_keys(key, block_tables)
        for name, x in (("start", 0 if start is None else start), ("end", end)):
            validation.check_integers(name, x, (self.batch,))
        covered_len = jnp.clip(self.covered_len, 0, self.max_len)
        first_token, end = (
            jnp.broadcast_to(jnp.clip(jnp.asarray(x, jnp.int32), 0, self.max_len), (self.batch,))
            for x in (covered_len if start is None else start, end)
        )
        new_len = jnp.maximum(end, covered_len)
        first = first_token // self.block_size
        last = jnp.where(end > first_token, num_blocks(end, self.block_size), first)

        problem = self._problem(key, block_tables)
        find_extrema = dispatch.get(dispatch.choose(problem, implementation)).find_extrema

        def refresh_some(step, arrays):
            blocks = first[:, None] + step * REFRESH_BLOCKS + jnp.arange(REFRESH_BLOCKS, dtype=jnp.int32)
            extrema = find_extrema(problem, arrays[0] if key is None else key, block_tables, blocks, new_len)
            where = self._locate(jnp.where(blocks < last[:, None], blocks, -1))
            return tuple(store(array, where, x) for array, x in zip(arrays, extrema, strict=True))

        num_steps = num_blocks((last - first).max(), REFRESH_BLOCKS)
        operands = (self, key, end, first_token)
        arrays = tuple(jax_compat.vary_like(x, operands) for x in (self.maximum, self.minimum))
        maximum, minimum = jax.lax.fori_loop(0, num_steps, refresh_some, arrays)
        covered_len = jnp.where(first_token <= covered_len, new_len, covered_len)
        return dataclasses.replace(self, maximum=maximum, minimum=minimum, covered_len=covered_len)

    def append(self, key: jax.Array, active: jax.Array | None = None) -> Self:
        """Covers the next token of each sequence, or the next few, from their keys alone.

        Args:
          key: [batch, num_new, num_kv_heads, head_dim], the keys of the tokens from `covered_len` on.
          active: bool [batch], the sequences that grow; `None` is all.

        Returns:
          The metadata; tokens beyond max_len are dropped. Equal to a rebuild, as long as covered tokens do not change.
        """
        shape = [self.batch, "num_new", *self.maximum.shape[2:]]
        fits = validation.is_array(key) and len(key.shape) == 4 and key.dtype == self.maximum.dtype
        fits = fits and [key.shape[0], "num_new", *key.shape[2:]] == shape
        validation.require(fits, "key", key, f"{self.maximum.dtype} of shape {shape}, as the metadata")
        check_active(active, self.batch)
        updated = self
        for i in range(key.shape[1]):
            updated = updated._append_token(key[:, i], active)
        return updated

    def _append_token(self, key: jax.Array, active: jax.Array | None) -> Self:
        position = jnp.clip(self.covered_len, 0, self.max_len)
        is_new = (position < self.max_len) if active is None else active & (position < self.max_len)
        where = self._locate(jnp.where(is_new, position // self.block_size, -1)[:, None])
        is_first = (position % self.block_size == 0)[:, None, None, None]
        key = key[:, None]
        maximum = jnp.where(is_first, key, jnp.maximum(load(self.maximum, where), key))
        minimum = jnp.where(is_first, key, jnp.minimum(load(self.minimum, where), key))
        return dataclasses.replace(
            self,
            maximum=store(self.maximum, where, maximum),
            minimum=store(self.minimum, where, minimum),
            covered_len=jnp.where(is_new, position + 1, position),
        )

    def _locate(self, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where blocks, int32 [batch, n], are in `maximum`: (first index, row), the first out of range where nowhere."""
        inside = (blocks >= 0) & (blocks < self.num_blocks)
        blocks = jnp.where(inside, blocks, 0)
        if self.block_tables is None:
            sequence = jnp.arange(self.batch, dtype=jnp.int32)[:, None]
            return jnp.where(inside, sequence, self.batch), blocks
        num_pages, rows = self.maximum.shape[:2]
        page = look_up(self.block_tables, jnp.where(inside, blocks // rows, -1), num_pages)
        return page, blocks % rows

    def _problem(self, key: jax.Array | None, block_tables: jax.Array | None) -> ExtremaProblem:
        keys = self.maximum if key is None else key
        return ExtremaProblem(
            batch=self.batch,
            num_kv_heads=keys.shape[2],
            head_dim=keys.shape[3],
            dtype=keys.dtype.name,
            block_size=self.block_size,
            kv_len=keys.shape[1] * (1 if block_tables is None else block_tables.shape[1]),
            page_size=None if block_tables is None else keys.shape[1],
            **device_of(keys)._asdict(),
        )

    def _check_keys(self, key: jax.Array | None, block_tables: jax.Array | None) -> None:
        if block_tables is not None:
            _check_tables(block_tables, self.batch)
        if key is None:
            needed = "an array; `None` is the pool that the metadata lies in, and both need `block_tables`"
            validation.require(block_tables is not None and self.block_tables is not None, "key", key, needed)
            return
        leading = [self.batch, "kv_len"] if block_tables is None else ["num_pages", "page_size"]
        shape = [*leading, *self.maximum.shape[2:]]
        fits = validation.is_array(key) and len(key.shape) == 4 and key.dtype == self.maximum.dtype
        fits = fits and tuple(key.shape[2:]) == self.maximum.shape[2:]
        fits = fits and (block_tables is not None or key.shape[0] == self.batch)
        validation.require(fits, "key", key, f"{self.maximum.dtype} of shape {shape}, as the metadata")
        if block_tables is None:
            needed = f"of at most {self.max_len} tokens: the metadata has {self.num_blocks} blocks of {self.block_size}"
            validation.require(key.shape[1] <= self.max_len, "key", key, needed)


def _check_tables(block_tables: Any, batch: int | None = None) -> None:
    needed = f"int32 of shape [{'batch' if batch is None else batch}, max_pages]"
    fits = validation.is_array(block_tables) and block_tables.dtype == jnp.int32 and len(block_tables.shape) == 2
    fits = fits and batch in (None, block_tables.shape[0])
    validation.require(fits, "block_tables", block_tables, needed)


def _check_lengths(name: str, x: Any, batch: int) -> None:
    fits = validation.is_array(x) and x.dtype == jnp.int32 and tuple(x.shape) == (batch,)
    validation.require(fits, name, x, f"int32 of shape [{batch}]")


def _check_room(name: str, blocks: int, block_size: int) -> None:
    if blocks * block_size > MAX_LENGTH:
        raise ValueError(
            f"`{name}` makes room for {blocks} blocks of {block_size} tokens; positions are int32, so that must be at most "
            f"{MAX_LENGTH} tokens."
        )
