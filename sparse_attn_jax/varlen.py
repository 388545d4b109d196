"""Packed sequences of different lengths as one row of a dense problem.

Keys are moved so that each sequence starts at a whole KV block, and queries, if lists are per query block, so that each starts
at a whole query block. Then ids local to a sequence become ids of the packed row by adding the sequence's first block,
sequences are kept apart by segment ids, and positions count within each sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax.selection import BlockSelection


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the tokens of packed sequences stand in a row in which every sequence starts at a whole block.

    Attributes:
      block_size: tokens per block.
      num_blocks: blocks in the row, static; `capacity` = num_blocks * block_size tokens.
      lengths: int32 [num_sequences].
      first_block: int32 [num_sequences], each sequence's first block in the row.
      block_sequence: int32 [num_blocks], the sequence of each block.
      sequence: int32 [capacity], the sequence of each position in the row, -1 where there is no token.
      position: int32 [capacity], position within the sequence.
      source: int32 [capacity], the packed token at each position in the row; past the end where there is none.
      target: int32 [tokens], the position in the row of each packed token; past the end where it is in no sequence.
    """

    block_size: int
    num_blocks: int
    lengths: jax.Array
    first_block: jax.Array
    block_sequence: jax.Array
    sequence: jax.Array
    position: jax.Array
    source: jax.Array
    target: jax.Array


def make_packing(cu_seqlens: jax.Array, num_tokens: int, block_size: int, capacity_blocks: int | None = None) -> Packing:
    """Lays sequences out by block.

    Args:
      cu_seqlens: int32 [num_sequences + 1]. Values outside [0, num_tokens] are clipped, and a value below the one before it is
        raised to it, so that no value can point outside the tokens.
      num_tokens: packed tokens, static.
      block_size: tokens per block.
      capacity_blocks: blocks in the row. `None` is what any lengths need.
    """
    cu_seqlens = jax.lax.cummax(jnp.clip(cu_seqlens.astype(jnp.int32), 0, num_tokens))
    starts, lengths = cu_seqlens[:-1], jnp.diff(cu_seqlens)
    num_sequences = starts.shape[0]
    if capacity_blocks is None:
        capacity_blocks = num_tokens if block_size == 1 else num_tokens // block_size + num_sequences
    block_ends = jnp.cumsum(-(-lengths // block_size), dtype=jnp.int32)
    first_block = block_ends - -(-lengths // block_size)

    blocks = jnp.arange(capacity_blocks, dtype=jnp.int32)
    block_sequence = jnp.minimum(jnp.searchsorted(block_ends, blocks, side="right"), num_sequences - 1).astype(jnp.int32)
    sequence = jnp.repeat(block_sequence, block_size)
    row = jnp.arange(capacity_blocks * block_size, dtype=jnp.int32)
    position = row - first_block[sequence] * block_size
    is_token = position < lengths[sequence]
    source = jnp.where(is_token, starts[sequence] + position, num_tokens)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    of_token = jnp.clip(jnp.searchsorted(cu_seqlens, token, side="right") - 1, 0, num_sequences - 1)
    target = first_block[of_token] * block_size + token - starts[of_token]
    in_sequence = (token >= cu_seqlens[0]) & (token < cu_seqlens[-1]) & (target < row.size)
    return Packing(
        block_size=block_size,
        num_blocks=capacity_blocks,
        lengths=lengths,
        first_block=first_block,
        block_sequence=block_sequence,
        sequence=jnp.where(is_token, sequence, -1),
        position=position,
        source=source,
        target=jnp.where(in_sequence, target, row.size),
    )


def to_row(packing: Packing, x: jax.Array) -> jax.Array:
    """Packed tokens [tokens, ...] -> the row [capacity, ...], zeros where there is no token."""
    return jnp.take(x, packing.source, axis=0, mode="fill", fill_value=0)


def from_row(packing: Packing, x: jax.Array, fill: float) -> jax.Array:
    """The row [capacity, ...] -> packed tokens [tokens, ...], `fill` for tokens of no sequence."""
    return jnp.take(x, packing.target, axis=0, mode="fill", fill_value=fill)


def pack_selection(selection: BlockSelection, q_packing: Packing, kv_packing: Packing) -> BlockSelection:
    """Ids local to each sequence -> ids of the packed row, one list per block of `q_packing`."""
    indices, sequence = selection.indices, q_packing.block_sequence
    if is_per_sequence(selection, kv_packing.lengths.shape[0]):
        # A batch of one selection per sequence: pick each row's sequence and its block in it.
        block = jnp.arange(q_packing.num_blocks, dtype=jnp.int32) - q_packing.first_block[sequence]
        inside = block < indices.shape[2]
        indices = indices[sequence, :, jnp.where(inside, block, 0)]  # [blocks, heads, slots]
        indices = jnp.where(inside[:, None, None], indices, -1).swapaxes(0, 1)[None]
    num_kv_blocks = -(-kv_packing.lengths // selection.kv_block_size)
    valid = (indices >= 0) & (indices < num_kv_blocks[sequence][:, None])
    indices = jnp.where(valid, indices + kv_packing.first_block[sequence][:, None], -1)
    return dataclasses.replace(selection, indices=indices)


def num_rows(selection: BlockSelection, num_tokens: int, num_sequences: int) -> int:
    """Query blocks of the packed row: the selection's own rows, or enough for any lengths if it has one per sequence."""
    if is_per_sequence(selection, num_sequences):
        return num_tokens if selection.q_block_size == 1 else num_tokens // selection.q_block_size + num_sequences
    return selection.indices.shape[2]


def is_per_sequence(selection: BlockSelection, num_sequences: int) -> bool:
    return num_sequences > 1 and selection.indices.shape[0] == num_sequences
