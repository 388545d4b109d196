"""Keys and values of many sequences in pages of one pool, and the bookkeeping of the pages."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import validation
from sparse_attn_jax.page_tables import look_up
from sparse_attn_jax.problem import MAX_LENGTH
from sparse_attn_jax.selection_checks import check_int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of a batch of sequences, as vLLM keeps them: in pages, which tables assign to sequences. A pytree.

    Token j of sequence b lies in page block_tables[b, j // page_size], at j % page_size. A table's entry outside
    [0, num_pages) is no page: what would be written there is dropped, and `paged_block_sparse_attention` sees no key there.
    Two sequences may share pages that neither writes to. Shapes are static, so programs are compiled once, whatever the
    lengths; a method that returns a cache updates it in place where the caller donates it
    (`jax.jit(..., donate_argnums=...)`) and uses it no more.

    Attributes:
      key_pages: [num_pages, page_size, num_kv_heads, head_dim].
      value_pages: [num_pages, page_size, num_kv_heads, value_head_dim].
      block_tables: int32 [batch, max_pages_per_sequence], -1 where unassigned.
      lengths: int32 [batch], tokens of each sequence; values outside [0, max_len] count as the nearest inside.
    """

    key_pages: jax.Array
    value_pages: jax.Array
    block_tables: jax.Array
    lengths: jax.Array

    @classmethod
    def create(
        cls,
        *,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        batch: int,
        max_pages_per_sequence: int,
        value_head_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> Self:
        """An empty cache: zeros in all pages, none of them assigned.

        Args:
          num_pages: pages of the pool.
          page_size: tokens per page.
          num_kv_heads: heads of keys and values.
          head_dim: features per head of the keys.
          batch: sequences at a time.
          max_pages_per_sequence: the longest a sequence may get, in pages.
          value_head_dim: features per head of the values; `None` is head_dim.
          dtype: of keys and values.

        Raises:
          ValueError: a size is no positive int, or a sequence could get longer than positions of int32 can say.
        """
        sizes = dict(num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim, batch=batch)
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        sizes |= dict(max_pages_per_sequence=max_pages_per_sequence, value_head_dim=value_head_dim)
        for name, size in sizes.items():
            check_int(name, size, 1)
        check_pages(num_pages, page_size, max_pages_per_sequence)
        pages = (num_pages, page_size, num_kv_heads)
        return cls(
            key_pages=jnp.zeros((*pages, head_dim), dtype),
            value_pages=jnp.zeros((*pages, value_head_dim), dtype),
            block_tables=jnp.full((batch, max_pages_per_sequence), -1, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def page_size(self) -> int:
        return self.key_pages.shape[1]

    @property
    def max_len(self) -> int:
        """The longest a sequence may get, in tokens."""
        return self.block_tables.shape[1] * self.page_size

    def assign(self, sequence: int | jax.Array, pages: Sequence[int] | jax.Array) -> Self:
        """Gives a sequence these pages in place of those it had, and makes it empty.

        Args:
          sequence: row of the batch; one outside it changes nothing.
          pages: physical ids in the order of the tokens: at most max_pages_per_sequence ints, none to release the row; or the
            whole row of the table, int32 [max_pages_per_sequence], so that programs need not be compiled for each number.

        Raises:
          ValueError: `sequence` is no int, or there are more pages than the table has, or an int that is no page.
        """
        validation.check_integers("sequence", sequence)
        max_pages = self.block_tables.shape[1]
        if validation.is_array(pages):
            fits = pages.dtype == jnp.int32 and tuple(pages.shape) == (max_pages,)
            validation.require(fits, "pages", pages, f"int32 of shape [{max_pages}], a row of the table, or ints")
            row = pages
        else:
            is_list = isinstance(pages, Iterable) and not isinstance(pages, str)
            pages = list(pages) if is_list else pages
            is_list = is_list and all(isinstance(page, int | np.integer) for page in pages)
            validation.require(is_list, "pages", pages, "a sequence of ints, or a row of the table")
            validation.require(len(pages) <= max_pages, "pages", pages, f"at most {max_pages} ids, a sequence's table")
            needed = f"ids of the pool, in [0, {self.key_pages.shape[0]})"
            validation.require(all(0 <= page < self.key_pages.shape[0] for page in pages), "pages", pages, needed)
            row = jnp.asarray(pages + [-1] * (max_pages - len(pages)), jnp.int32)
        return dataclasses.replace(
            self,
            block_tables=self.block_tables.at[sequence].set(row, mode="drop", wrap_negative_indices=False),
            lengths=self.lengths.at[sequence].set(0, mode="drop", wrap_negative_indices=False),
        )

    def append(self, key: jax.Array, value: jax.Array, active: jax.Array | None = None) -> Self:
        """Appends one or a few tokens to each sequence. Work is proportional to them, whatever the size of the pool.

        Args:
          key: [batch, num_new, num_kv_heads, head_dim], dtype of the pool; rotated already if the model rotates.
          value: [batch, num_new, num_kv_heads, value_head_dim].
          active: bool [batch], the sequences that grow; the others stay as they are. `None` is all.

        Returns:
          The cache with every active length greater by num_new, but at most max_len: tokens beyond the table are dropped. So
          are those whose page is not assigned, though they do count in the length.

        Raises:
          ValueError: shapes or dtypes that do not fit the pool.
        """
        batch = self.lengths.shape[0]
        for name, new, pages in (("key", key, self.key_pages), ("value", value, self.value_pages)):
            self._check_new(name, new, pages, (batch, None))
        validation.require(value.shape[1] == key.shape[1], "value", value, f"of {key.shape[1]} new tokens, as `key`")
        check_active(active, batch)
        num_new = key.shape[1]
        lengths = jnp.clip(self.lengths, 0, self.max_len)
        is_active = jnp.ones((batch,), bool) if active is None else active
        positions = lengths[:, None] + jnp.arange(num_new, dtype=jnp.int32)
        updated = self._write(self.block_tables, positions, is_active[:, None], key, value)
        grown = jnp.minimum(lengths + num_new, self.max_len)
        return dataclasses.replace(updated, lengths=jnp.where(is_active, grown, lengths))

    def prefill(
        self,
        sequence: int | jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        start: int | jax.Array = 0,
        length: int | jax.Array | None = None,
    ) -> Self:
        """Writes tokens of one sequence from a position on: a prompt, or a chunk of one.

        Args:
          sequence: row of the batch, an int or an int32 scalar; one outside it changes nothing.
          key: [num_tokens, num_kv_heads, head_dim], dtype of the pool.
          value: [num_tokens, num_kv_heads, value_head_dim].
          start: position of the first token, an int or an int32 scalar.
          length: how many of the tokens there are; the others are padding, so that prompts of many lengths share a program.
            `None` is all.

        Returns:
          The cache with the sequence's length start + length, at most max_len; dropped is what `append` drops.

        Raises:
          ValueError: shapes or dtypes that do not fit the pool.
        """
        for name, new, pages in (("key", key, self.key_pages), ("value", value, self.value_pages)):
            self._check_new(name, new, pages, (None,))
        validation.require(value.shape[0] == key.shape[0], "value", value, f"of {key.shape[0]} tokens, as `key`")
        for name, x in (("sequence", sequence), ("start", start), ("length", 0 if length is None else length)):
            validation.check_integers(name, x)
        batch, num_tokens = self.lengths.shape[0], key.shape[0]
        sequence = jnp.asarray(sequence, jnp.int32)
        is_row = (sequence >= 0) & (sequence < batch)
        count = jnp.clip(jnp.asarray(num_tokens if length is None else length, jnp.int32), 0, num_tokens)
        start = jnp.clip(jnp.asarray(start, jnp.int32), 0, self.max_len)
        offsets = jnp.arange(num_tokens, dtype=jnp.int32)
        table = jax.lax.dynamic_index_in_dim(self.block_tables, jnp.where(is_row, sequence, 0))
        is_written = is_row & (offsets < count)
        updated = self._write(table, (start + offsets)[None], is_written[None], key[None], value[None])
        end = jnp.minimum(start + count, self.max_len)
        row = jnp.where(is_row, sequence, batch)
        return dataclasses.replace(updated, lengths=self.lengths.at[row].set(end, mode="drop"))

    def _check_new(self, name: str, new: jax.Array, pages: jax.Array, leading: tuple[int | None, ...]) -> None:
        shape = [*("num_new" if size is None else size for size in leading), *pages.shape[2:]]
        needed = f"{pages.dtype} of shape {shape}, as the pool"
        fits = validation.is_array(new) and new.dtype == pages.dtype and len(new.shape) == len(shape)
        fits = fits and all(wanted in ("num_new", size) for wanted, size in zip(shape, new.shape, strict=True))
        validation.require(fits, name, new, needed)

    def _write(self, block_tables, positions, is_written, key, value) -> Self:
        """Stores tokens [rows, num_new, ...] at positions [rows, num_new] of the sequences with these tables."""
        num_pages = self.key_pages.shape[0]
        page = look_up(block_tables, positions // self.page_size, num_pages)
        page = jnp.where(is_written, page, num_pages)
        where = page, positions % self.page_size
        return dataclasses.replace(
            self, key_pages=store(self.key_pages, where, key), value_pages=store(self.value_pages, where, value)
        )


def check_active(active: Any, batch: int) -> None:
    fits = validation.is_array(active) and active.dtype == jnp.bool_ and tuple(active.shape) == (batch,)
    validation.require(active is None or fits, "active", active, f"bool [batch] = [{batch}], or None")


def store(pages: jax.Array, where: tuple[jax.Array, jax.Array], rows: jax.Array) -> jax.Array:
    """`pages` with rows written at (page, row of the page); those of a page out of range are dropped."""
    return pages.at[where].set(rows, mode="drop")


def load(pages: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
    """What lies at (page, row of the page); zeros for a page out of range."""
    return pages.at[where].get(mode="fill", fill_value=0)


def check_pages(num_pages: int, page_size: int, max_pages: int) -> None:
    """Refuses pools and tables whose positions would not fit into int32."""
    for name, count in (("num_pages", num_pages), ("max_pages_per_sequence", max_pages)):
        if count * page_size > MAX_LENGTH:
            most = MAX_LENGTH // page_size
            raise ValueError(f"`{name}` is {count}; with pages of {page_size} tokens it must be at most {most}.")


class OutOfPagesError(RuntimeError):
    """There are fewer free pages than were asked for."""


class PageAllocator:
    """Which pages of a pool are free: plain Python, outside of compiled programs.

    Args:
      num_pages: pages of the pool, with ids from 0 on.
    """

    def __init__(self, num_pages: int):
        check_int("num_pages", num_pages, 1)
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages.

        Returns:
          their ids.

        Raises:
          OutOfPagesError: there are not so many; none is taken.
        """
        check_int("count", count, 0)
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages were asked for, and {len(self._free)} are free.")
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives pages back.

        Raises:
          ValueError: a page that is not taken, or is named twice; none is given back.
        """
        pages = list(pages)
        if len(set(pages)) != len(pages) or not self._used.issuperset(pages):
            raise ValueError(f"`pages` is {pages}; each must have been allocated, and not freed since.")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))
