"""What the kernels do in one step of their loops, on registers: scores, masks, products."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, Geometry
from sparse_attn_jax.planning import WORD_BITS
from sparse_attn_jax.selection import num_blocks

Config = TypeVar("Config")

LOG2_E = math.log2(math.e)
WORD_SHIFT = WORD_BITS.bit_length() - 1
MATRIX = plgpu.Layout.WGMMA
ROW = MATRIX.reduce(1)  # a value per row, held where the row's part of a matrix is
COLUMN = MATRIX.reduce(0)


def smem(shape: tuple[int, ...], dtype, swizzle: int = 128) -> plgpu.SMEM:
    """Shared memory for 16-bit operands of products, all of which need one swizzle, in bytes: no longer than their rows."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)))


# Shared memory that a thread block may have, in bytes.
MAX_SHARED_BYTES = 227 * 1024
# What a buffer starts at a multiple of.
ALIGNMENT = 1024


def shared_bytes(memory: dict, reduction_bytes: int = plgpu.CompilerParams().reduction_scratch_bytes) -> int:
    """Bytes of shared memory, at most: not every kernel has reductions that need any."""
    has_barriers = any(isinstance(x, plgpu.Barrier) for x in memory.values())
    total = reduction_bytes + has_barriers * ALIGNMENT
    for x in memory.values():
        size = 0 if isinstance(x, plgpu.Barrier) else math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        total += num_blocks(size, ALIGNMENT) * ALIGNMENT
    return total


def largest(make: Callable[[int], Config], sizes: Sequence[int], memory_of: Callable[[Config], dict]) -> Config:
    """The config of the largest size that fits.

    Raises:
      ValueError: none fits; with what the smallest needs.
    """
    for size in reversed(sizes):
        if shared_bytes(memory_of(make(size))) <= MAX_SHARED_BYTES:
            return make(size)
    needed = shared_bytes(memory_of(make(sizes[0])))
    raise ValueError(f"{make(sizes[0])} needs {needed} bytes of shared memory; a thread block may have {MAX_SHARED_BYTES}.")


def blocks_of_grid(batch: int, heads: int, items: int) -> dict:
    """Arguments of `plgpu.kernel`: a thread block for each item of each head and batch row; see `place_of`.

    Those of one head start one after another, so that they find in the L2 cache what others have read. The last axis is the
    first of CUDA's, the only one with room for more than 65,535 thread blocks.
    """
    return dict(grid=(batch, heads, items), grid_names=("batch", "head", "item"))


def place_of() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch row, head and item of a thread block."""
    return lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("item")


def take_registers(warpgroups: int) -> None:
    """Of a warpgroup that computes, of so many: with those that the one that copies gives. A lone one has all that there are.

    Three warpgroups start with 168 registers a thread each, as many as 2 x 240 + 24.
    """
    if warpgroups == 2:
        plgpu.set_max_registers(240, action="increase")


def give_registers(warpgroups: int) -> None:
    """Of the warpgroup that copies: those that the others take."""
    if warpgroups == 2:
        plgpu.set_max_registers(24, action="decrease")


def full_matrix(shape: tuple[int, int], value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), MATRIX)


def full_rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((SLICE_ROWS,), value, jnp.float32), ROW)


def load_rows(ref) -> jax.Array:
    return plgpu.load(ref, layout=ROW, optimized=False)


def load_columns(ref) -> jax.Array:
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def load_matrix(ref) -> jax.Array:
    return plgpu.load(ref, layout=MATRIX, optimized=False)


def over_columns(rows: jax.Array, columns: int) -> jax.Array:
    """A value per row as a matrix."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], columns), [0])


def over_rows(columns: jax.Array) -> jax.Array:
    """A value per column as a matrix."""
    return lax.broadcast_in_dim(columns, (SLICE_ROWS, columns.shape[0]), [1])


def product(a, b, shape: tuple[int, int]) -> jax.Array:
    """a @ b in float32, of operands in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(total: jax.Array, a, b, *, interpreted: bool) -> jax.Array:
    """total + a @ b."""
    if interpreted:  # the interpreter has no accumulator that starts from registers
        return total + product(a, b, total.shape)
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))


def logits_of(g: Geometry, scores: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Scaled and capped scores, in units of log 2, before bias and mask; and the slope of the cap."""
    if not g.logits_soft_cap:
        return scores * (g.scale * LOG2_E), 1.0
    # The hyperbolic tangent. The instruction for it, which `jnp.tanh` would become, is right to 11 bits only.
    share = 1.0 - 2.0 / (jnp.exp2(scores * (2 * LOG2_E * g.scale / g.logits_soft_cap)) + 1.0)
    return share * (g.logits_soft_cap * LOG2_E), 1.0 - share * share


def gradient_of_logits(g: Geometry, multiply, own, stats, key, value, bias, masked):
    """Weights, gradients of logits, and those of scores before their scale: [64, keys] each, float32.

    Args:
      g: the call.
      multiply: `product`, or another of the kind.
      own: refs of the slice's query and d_out.
      stats: a function that loads the rows' lse in units of log 2, and delta.
      key: ref.
      value: ref.
      bias: a function that loads it, or `None`.
      masked: sets matrices to 0 where a row does not see a key.
    """
    shape = (SLICE_ROWS, key.shape[0])
    logits, slope = logits_of(g, multiply(own["query"], key.transpose((1, 0)), shape))
    if bias is not None:
        logits += over_rows(bias())
    lse, delta = (over_columns(x, shape[1]) for x in stats())
    weights = jnp.exp2(logits - lse)
    d_weights = multiply(own["d_out"], value.transpose((1, 0)), shape)
    weights, d_logits = masked(weights, weights * (d_weights - delta))
    return weights, d_logits, d_logits * slope


@dataclasses.dataclass(frozen=True)
class Piece:
    """Keys that lie one after another: a part of one KV block.

    Attributes:
      exists: whether there is such a piece; else these are keys that another piece of the chunk has as well.
      first_key: its number.
      words: the block's membership in the tile.
    """

    exists: jax.Array
    first_key: jax.Array
    words: list[jax.Array]

    def keys(self, g: Geometry):
        return pl.ds(self.first_key, g.piece_keys)


def list_of(g: Geometry, inputs, batch, head, tile):
    """Refs of a query tile's list: its ids, their membership or `None`, and its row of `layout.spans`."""
    words = part_of(inputs["words"], batch, head).at[tile] if g.has_membership else None
    return part_of(inputs["ids"], batch, head).at[tile], words, inputs["spans"].at[batch, head, tile]


def pieces_of(g: Geometry, ids, words, count, step) -> list[Piece]:
    """Of one chunk of a tile's list, from the refs of its ids and words; `words` is `None` if nobody needs them."""
    pieces = []
    for i in range(g.blocks_per_chunk):
        entry = step // g.chunks_per_block * g.blocks_per_chunk + i
        exists = entry < count
        entry = jnp.minimum(entry, count - 1)
        first_key = ids[entry] * g.kv_block_size + lax.rem(step, jnp.int32(g.chunks_per_block)) * CHUNK_KEYS
        pieces.append(Piece(exists, first_key, [] if words is None else [words[entry, j] for j in range(g.num_words)]))
    return pieces


def visible(
    g: Geometry, rows: dict[str, jax.Array], columns: dict[str, jax.Array], pieces: list[Piece], piece_keys: int
) -> jax.Array:
    """Which keys each row of a slice sees: bool [64, keys], of pieces of equal length.

    Args:
      g: the call.
      rows: a vector per name in `g.row_names`.
      columns: a vector per name in `g.column_names`; of one piece they may lack the position.
      pieces: where the keys come from.
      piece_keys: of each.
    """
    num_keys = len(pieces) * piece_keys
    column = plgpu.broadcasted_iota(jnp.int32, (SLICE_ROWS, num_keys), 1, layout=MATRIX)
    position = over_rows(columns["position"]) if "position" in columns else column + pieces[0].first_key
    row = {name: over_columns(x, num_keys) for name, x in rows.items() if name != "group"}
    seen = position <= row["high"]
    if "low" in row:
        seen = (seen & (position >= row["low"])) | (position < row["sink"])
    if "segment" in row:
        seen &= row["segment"] == over_rows(columns["segment"])
    if g.has_membership or len(pieces) > 1:
        chose = functools.reduce(lambda bits, i: bits | (_chose(g, rows, pieces[i]) << i), range(len(pieces)), rows["high"] * 0)
        bits = over_columns(chose, num_keys)
        seen &= (bits if len(pieces) == 1 else (bits >> (column // piece_keys)) & 1) == 1
    return seen


def _chose(g: Geometry, rows: dict[str, jax.Array], piece: Piece) -> jax.Array:
    """1 for each row whose row group chose the piece's block, else 0."""
    exists = rows["high"] * 0 + piece.exists.astype(jnp.int32)
    if not g.has_membership:
        return exists
    group = rows["group"]
    word = group * 0
    for i in range(g.num_words):
        word = jnp.where(group >> WORD_SHIFT == i, piece.words[i], word)
    return (word >> (group & (WORD_BITS - 1))) & exists


def part_of(ref, batch, head=None):
    """What a batch row and head have of an array. It may have fewer rows, which repeat, and one head for all."""
    row = 0 if ref.shape[0] == 1 else lax.rem(batch, jnp.int32(ref.shape[0]))
    if head is None:
        return ref.at[row]
    return ref.at[row, 0 if ref.shape[1] == 1 else head]


def over_chunks(g: Geometry, spans, body, carry):
    """Runs `body(is_full, step, carry)` for every chunk of a list: with masks, without where all rows see all, and with."""
    chunks, first, end = (spans[i] * g.chunks_per_block for i in range(1, 4))
    for start, stop, is_full in ((0, first, False), (first, end, True), (end, chunks, False)):
        carry = lax.fori_loop(start, stop, functools.partial(body, is_full), carry)
    return carry
