"""`MoBA`: a query's own chunk of keys, and the earlier chunks whose mean attracts it most."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring import compress_keys
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.scored_rows import pick_rows

# What kernels can read; a list of larger blocks would leave them out.
MAX_KV_BLOCK_SIZE = 128


@dataclasses.dataclass(frozen=True)
class MoBA:
    """Mixture of block attention (MoBA, MoonshotAI): no parameters, one list per query token and query head.

    gate[h, i, c] = query[i, h] . (mean of the keys of chunk c)          for the chunks c before the query's own

    The query's own chunk, and the `top_k - 1` others of the highest gate, the lower id first among equals. The gate is float32
    and unscaled, for only its order matters. No softmax is taken: its weights underflow where gates are far apart, and chunks
    that they order would be level.

    A chunk before the query's own lies before the query, all of it, and the own chunk is never scored, so a selection depends
    on nothing after the query (`causal_safe`). The incomplete chunk at the end can be a query's own and nothing else. Chunks
    are counted by absolute position: prefill, chunked prefill and step-by-step decoding choose the same.

    The original computes the own chunk and the others apart and merges them; with `top_k=1` its fast path attends to every
    earlier key, where its naive path and this one attend to the own chunk alone.

    Attributes:
      top_k: chunks per query, its own included. The paper has 3 of 512 tokens, and 12 of 4096 for a million tokens.
      block_size: tokens per chunk.
      kv_block_size: tokens per block of the lists, a divisor of `block_size`; the result does not depend on it, only which
        kernels can run, and the length of the lists: top_k * block_size / kv_block_size. `None` is the largest divisor up to
        128.
    """

    top_k: int = 3
    block_size: int = 512
    kv_block_size: int | None = None

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("top_k", self.top_k, 1)
        checks.check_int("block_size", self.block_size, 1)
        if self.kv_block_size is None:
            return
        checks.check_int("kv_block_size", self.kv_block_size, 1)
        if self.block_size % self.kv_block_size:
            raise ValueError(f"`kv_block_size` is {self.kv_block_size}; it must divide `block_size`, {self.block_size}.")

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: must be True, here and in the op: without an own chunk and a past the method has no meaning.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query and query head (`q_block_size=1`): int32 [batch, num_q_heads, q_len,
          top_k * block_size / kv_block_size], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient; query, key and value get theirs from the attention. Memory is linear in the lengths.
        """
        checks.check_key(key)
        checks.check_query(query, key, "key")
        compressed = compress_keys(key, self.block_size, self.block_size)
        return self.select(query, compressed, kv_len=key.shape[1], is_causal=is_causal, q_offset=q_offset)

    def unit_sizes(self) -> tuple[tuple[int, int], ...]:
        """Kernel size and stride of the compressed keys that `select` takes: the chunks."""
        return ((self.block_size, self.block_size),)

    def select(
        self,
        query: jax.Array,
        compressed: jax.Array,
        *,
        kv_len: int,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
    ) -> BlockSelection:
        """Selects by means of chunks that exist already, such as a decode cache keeps.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          compressed: [batch, num_chunks, num_kv_heads, head_dim], every complete chunk of `kv_len` tokens:
            `compress_keys(key, block_size, block_size)`.
          kv_len: number of keys: of a cache, its capacity. Chunks that are not complete yet may hold anything.
          is_causal: as in `__call__`.
          q_offset: as in `__call__`.

        Returns:
          As `__call__`.

        Raises:
          ValueError: an argument is wrong.
        """
        checks.check_bool("is_causal", is_causal)
        if not is_causal:
            raise ValueError("`is_causal` is False; MoBA looks back only, so it must be True.")
        checks.check_length("kv_len", kv_len)
        checks.check_unit_array("compressed", compressed, kv_len, self.block_size, self.block_size)
        checks.check_query(query, compressed, "compressed")
        checks.check_q_offset(q_offset, query.shape[0], query.shape[1], kv_len)
        query, compressed = jax.lax.stop_gradient((query, compressed))
        positions = absolute_positions(q_offset, query.shape[1], kv_len)
        chunks = _pick_chunks(query, compressed, positions, top_k=self.top_k, block_size=self.block_size, kv_len=kv_len)
        kv_block_size = self.kv_block_size or largest_divisor(self.block_size, MAX_KV_BLOCK_SIZE)
        ids = _blocks_of_chunks(chunks, positions, self.block_size // kv_block_size, kv_block_size, kv_len)
        return BlockSelection(ids, q_block_size=1, kv_block_size=kv_block_size)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


@functools.partial(jax.jit, static_argnames=("top_k", "block_size", "kv_len"))
def _pick_chunks(query, units, positions, *, top_k: int, block_size: int, kv_len: int) -> jax.Array:
    """Chunk ids: int32 [batch, num_q_heads, q_len, top_k], ascending, -1 last."""
    batch, _, num_q_heads, head_dim = query.shape
    num_units, num_kv_heads = units.shape[1:3]
    units = units.astype(jnp.float32)
    num_incomplete = num_blocks(kv_len, block_size) - num_units

    def gate(some_query, _):
        grouped = some_query.reshape(*some_query.shape[:2], num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        scores = jnp.einsum("bund,bqngd->bnguq", units, grouped.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        scores = scores.reshape(batch, num_q_heads, num_units, some_query.shape[1])
        return jnp.pad(scores, [(0, 0), (0, 0), (0, num_incomplete), (0, 0)], constant_values=-jnp.inf)

    return pick_rows(
        gate,
        [query],
        positions,
        num_heads=num_q_heads,
        elements_per_query=batch * num_q_heads * (num_units + 1),
        top_k=top_k,
        block_size=block_size,
        num_sink_blocks=0,
        num_local_blocks=1,
        is_causal=True,
    )


def _blocks_of_chunks(chunks: jax.Array, positions: jax.Array, per_chunk: int, kv_block_size: int, kv_len: int) -> jax.Array:
    """The blocks of listed chunks, without those after the query: [..., q_len, top_k] to [..., q_len, top_k * per_chunk]."""
    if per_chunk == 1:
        return chunks
    blocks = chunks[..., None] * per_chunk + jnp.arange(per_chunk, dtype=jnp.int32)
    last = jnp.minimum(positions // kv_block_size, num_blocks(kv_len, kv_block_size) - 1)
    is_listed = (chunks[..., None] >= 0) & (blocks <= last[:, None, :, None, None])
    return jnp.where(is_listed, blocks, -1).reshape(*chunks.shape[:-1], -1)
