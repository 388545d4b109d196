"""`BlockSelection`: which KV blocks each query block may attend."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp


def num_blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSelection:
    """Which KV blocks each query block may attend. A pytree; `indices` and the predicate's arrays are its leaves.

    Attributes:
      indices: int32 [batch or 1, heads, num_q_blocks, num_slots], heads in {1, num_kv_heads, num_q_heads}. KV block ids in any
        order; -1 is an empty slot anywhere in a row, a duplicate counts once, an id outside [0, num_kv_blocks) is ignored.
      q_block_size: query tokens per row of `indices`, counted from query 0; 1 is a list per token.
      kv_block_size: key tokens per block id, counted from key 0.
      predicate: `None`, or a callable pytree `predicate(batch, head, q_position, kv_position) -> bool` that is applied on top
        of the token mask, for selections that are exact below block size. It receives int32 arrays that broadcast together
        (positions are absolute) and must work elementwise. Implementations other than `xla` know only `WindowPredicate`.
    """

    indices: jax.Array
    _: dataclasses.KW_ONLY
    q_block_size: int = dataclasses.field(metadata=dict(static=True))
    kv_block_size: int = dataclasses.field(metadata=dict(static=True))
    predicate: Any = None

    @classmethod
    def from_block_mask(cls, mask: jax.Array, *, q_block_size: int, kv_block_size: int, num_slots: int | None = None) -> Self:
        """Builds a selection from a boolean block mask.

        Args:
          mask: bool [batch or 1, heads, num_q_blocks, num_kv_blocks], True where the query block may attend the KV block.
          q_block_size: query tokens per row of the mask.
          kv_block_size: key tokens per column of the mask.
          num_slots: the length of each list. `None` is num_kv_blocks, which always suffices; a smaller number keeps the
            `num_slots` lowest ids of a row.

        Returns:
          A `BlockSelection` with ascending ids, -1 last.
        """
        check_block_sizes(q_block_size, kv_block_size)
        if mask.ndim != 4:
            raise ValueError(f"`mask` has shape {mask.shape}; it must be [batch, heads, num_q_blocks, num_kv_blocks].")
        if mask.dtype != jnp.bool_:
            raise ValueError(f"`mask` has dtype {mask.dtype}; it must be bool.")
        num_kv_blocks = mask.shape[-1]
        num_slots = num_kv_blocks if num_slots is None else num_slots
        if num_slots < 1:
            raise ValueError(f"`num_slots` is {num_slots}; it must be at least 1.")
        ids = jnp.where(mask, jnp.arange(num_kv_blocks, dtype=jnp.int32), num_kv_blocks)
        ids = jnp.sort(ids, axis=-1)[..., :num_slots]
        ids = jnp.pad(ids, [(0, 0)] * 3 + [(0, num_slots - ids.shape[-1])], constant_values=num_kv_blocks)
        indices = jnp.where(ids < num_kv_blocks, ids, -1)
        return cls(indices, q_block_size=q_block_size, kv_block_size=kv_block_size)

    @classmethod
    def from_csr(cls, crow: jax.Array, col: jax.Array, *, q_block_size: int, kv_block_size: int) -> Self:
        """Builds a selection from per-head CSR, the format of vLLM's local-strided block-sparse attention.

        Args:
          crow: int32 [heads, num_q_blocks + 1], row offsets into `col`, not decreasing, starting at 0.
          col: int32 [heads, capacity], KV block ids; entries past the last offset are padding (-1).
          q_block_size: query tokens per row.
          kv_block_size: key tokens per column id.

        Returns:
          A `BlockSelection` with batch 1 and `capacity` slots per row at most: concrete offsets give the longest row.
        """
        check_block_sizes(q_block_size, kv_block_size)
        for name, x in (("crow", crow), ("col", col)):
            if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(f"`{name}` is {x.dtype}{list(x.shape)}; it must be an integer array [heads, n].")
        if crow.shape[0] != col.shape[0]:
            raise ValueError(f"`crow` has {crow.shape[0]} heads and `col` has {col.shape[0]}; they must be equal.")
        if crow.shape[1] < 1:
            raise ValueError("`crow` has no offsets; it must be [heads, num_q_blocks + 1].")
        counts = crow[:, 1:] - crow[:, :-1]
        capacity = col.shape[1]
        if not isinstance(counts, jax.core.Tracer) and counts.size:
            capacity = min(capacity, max(1, int(counts.max())))
        slots = jnp.arange(capacity, dtype=jnp.int32)
        position = crow[:, :-1, None] + slots  # [heads, num_q_blocks, capacity]
        inside = (slots < counts[..., None]) & (position >= 0) & (position < col.shape[1])
        ids = jnp.take_along_axis(col[:, None], jnp.where(inside, position, 0), axis=-1)
        indices = jnp.where(inside, ids, -1).astype(jnp.int32)[None]
        return cls(indices, q_block_size=q_block_size, kv_block_size=kv_block_size)

    def to_csr(self, kv_len: int) -> tuple[jax.Array, jax.Array]:
        """The selection as per-head CSR: the inverse of `from_csr`. A predicate is lost.

        Args:
          kv_len: number of keys.

        Returns:
          crow: int32 [heads, num_q_blocks + 1], row offsets into `col`.
          col: int32 [heads, capacity], KV block ids, ascending within a row and each once; past the last offset -1. The
            capacity is num_q_blocks * num_slots; concrete indices give that of the head with most ids, at least 1.

        Raises:
          ValueError: the selection has more than one batch row.
        """
        if self.indices.shape[0] != 1:
            raise ValueError(f"`indices` has batch size {self.indices.shape[0]}; CSR holds one batch row, so it must be 1.")
        ids, is_first = (x[0] for x in self._sort_lists(kv_len))
        heads, num_q_blocks, num_slots = ids.shape
        ends = jnp.cumsum(is_first.sum(axis=-1), axis=-1, dtype=jnp.int32)
        crow = jnp.pad(ends, [(0, 0), (1, 0)])
        capacity = num_q_blocks * num_slots
        if not isinstance(crow, jax.core.Tracer):
            capacity = max(1, int(crow[:, -1].max()))
        ids, is_first = ids.reshape(heads, -1), is_first.reshape(heads, -1)
        position = jnp.where(is_first, jnp.cumsum(is_first, axis=-1, dtype=jnp.int32) - 1, capacity)
        col = jnp.full((heads, capacity), -1, jnp.int32)
        return crow, col.at[jnp.arange(heads)[:, None], position].set(ids, mode="drop")

    def to_block_mask(self, kv_len: int) -> jax.Array:
        """The selection as a boolean mask.

        Args:
          kv_len: number of keys.

        Returns:
          bool [batch or 1, heads, num_q_blocks, num_kv_blocks], True where selected. Size grows with the square of the length.
        """
        num_kv_blocks = num_blocks(kv_len, self.kv_block_size)
        valid = (self.indices >= 0) & (self.indices < num_kv_blocks)
        rows = jnp.where(valid, self.indices, num_kv_blocks).reshape(-1, self.indices.shape[-1])
        mask = jnp.zeros((rows.shape[0], num_kv_blocks), bool)
        mask = mask.at[jnp.arange(rows.shape[0])[:, None], rows].set(True, mode="drop")
        return mask.reshape(*self.indices.shape[:-1], num_kv_blocks)

    def to_dense_mask(self, q_len: int, kv_len: int) -> jax.Array:
        """The selection as a boolean token mask: no causality, window, segments or predicate.

        Args:
          q_len: number of queries.
          kv_len: number of keys.

        Returns:
          bool [batch or 1, heads, q_len, kv_len]. For tests and small sizes: it is as large as the scores of dense attention.
        """
        mask = self.to_block_mask(kv_len)
        mask = jnp.repeat(mask, self.q_block_size, axis=-2)[..., :q_len, :]
        return jnp.repeat(mask, self.kv_block_size, axis=-1)[..., :kv_len]

    def density(self, kv_len: int) -> jax.Array:
        """Fraction of (query block, KV block) tiles that are selected.

        Args:
          kv_len: number of keys.

        Returns:
          float32 scalar in [0, 1]. Duplicates count once; ids out of range do not count.
        """
        ids, is_first = self._sort_lists(kv_len)
        return is_first.mean(dtype=jnp.float32) * (ids.shape[-1] / num_blocks(kv_len, self.kv_block_size))

    def _sort_lists(self, kv_len: int) -> tuple[jax.Array, jax.Array]:
        """The ids in ascending order, [batch or 1, heads, num_q_blocks, num_slots], and where the first of each is."""
        num_kv_blocks = num_blocks(kv_len, self.kv_block_size)
        ids = jnp.sort(self.indices, axis=-1)
        is_new = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1)
        return ids, is_new & (ids >= 0) & (ids < num_kv_blocks)


def check_block_sizes(q_block_size: int, kv_block_size: int) -> None:
    """Raises `ValueError` unless both are positive integers."""
    for name, size in (("q_block_size", q_block_size), ("kv_block_size", kv_block_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` is {size!r}; it must be an int of at least 1.")
