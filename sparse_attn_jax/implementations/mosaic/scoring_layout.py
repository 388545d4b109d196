"""Units and queries as the kernel of block scores reads them, arranged by XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.implementations.mosaic.geometry import SLICE_ROWS, SWIZZLE_COLUMNS
from sparse_attn_jax.implementations.mosaic.layout import pad_columns
from sparse_attn_jax.scoring_problem import ScoringProblem, num_units, unit_overlap
from sparse_attn_jax.selection import num_blocks

# Units of a step, and blocks of a group: the rows of one matrix product.
STEP_UNITS = SLICE_ROWS
# Query heads times tokens of a product, its columns. They are head-major, and sums over heads are sums of slices of registers,
# which have multiples of 8 columns.
COLUMNS = 128
SLICE_COLUMNS = 8
MAX_PART_HEADS = COLUMNS // SLICE_COLUMNS
# Rows of `UnitSteps.table`.
FIRST, LAST, SHARED = range(3)
# Positions, of which none is before the earliest or after the latest.
EARLIEST, LATEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringGeometry:
    """Sizes of one call of the kernel.

    A tile is `tile_tokens` tokens, a multiple of 8, with the query heads that share a list, in parts of at most 16 heads.
    """

    batch: int
    q_len: int
    num_lists: int  # of a token
    list_heads: int  # query heads that share one
    lists_per_kv_head: int
    head_dim: int
    dtype: str
    tile_tokens: int
    num_denominators: int  # steps of the softmax denominator
    width: int  # steps of the scores of 64 blocks
    num_block_groups: int  # of 64
    scale: float
    kernel_stride: int
    pooling: str
    group_reduction: str | None

    @property
    def num_parts(self) -> int:
        return parts_of(self.list_heads)[0]

    @property
    def part_heads(self) -> int:
        return parts_of(self.list_heads)[1]

    @property
    def num_tiles(self) -> int:
        return num_blocks(self.q_len, self.tile_tokens)

    @property
    def head_columns(self) -> int:
        """head_dim in shared memory; the columns beyond it are 0."""
        return num_blocks(self.head_dim, SWIZZLE_COLUMNS) * SWIZZLE_COLUMNS

    def heads_of(self, part: int) -> int:
        return min(self.part_heads, self.list_heads - part * self.part_heads)


def parts_of(list_heads: int) -> tuple[int, int]:
    """How many parts a list's query heads have, and the heads of each; the last may have fewer."""
    num_parts = num_blocks(list_heads, MAX_PART_HEADS)
    return num_parts, num_blocks(list_heads, num_parts)


def tokens_of_tile(list_heads: int, q_len: int) -> int:
    """As many as a product has columns for, and no more than there are."""
    most = COLUMNS // parts_of(list_heads)[1] // SLICE_COLUMNS
    return SLICE_COLUMNS * max(1, min(most, num_blocks(q_len, SLICE_COLUMNS)))


@dataclasses.dataclass(frozen=True)
class UnitSteps:
    """The units that the kernel reads, 64 at a time; all of it is known before a call.

    First come those of the softmax denominator. Then, for every 64 blocks, their first units, their second units, and so on:
    row i of such steps belongs to block i of the 64, so that pooling needs no other row. A unit that overlaps two blocks comes
    twice.

    Attributes:
      units: int32 [steps, 64], among the fine ones, followed by the coarse ones.
      table: int32 [steps, 3, 64], the positions of the first and the last query that count a unit, and the tokens that it
        shares with its block.
      num_denominators: steps of the denominator.
      width: steps of 64 blocks.
    """

    units: np.ndarray
    table: np.ndarray
    num_denominators: int
    width: int


@functools.lru_cache(maxsize=16)
def unit_steps(problem: ScoringProblem, num_coarse: int) -> UnitSteps:
    """The steps of a call with so many coarse units; of none, the fine ones are those of the denominator."""
    kv_len, size, stride = problem.kv_len, problem.kernel_size, problem.kernel_stride
    num_fine = num_units(kv_len, size, stride)
    fine_first = _first_positions(problem, num_fine, size, stride)
    if num_coarse == 0:
        denominators = [_step_rows(np.arange(num_fine), fine_first, LATEST)]
    else:
        coarse_size = problem.coarse_kernel_size
        coarse_first = _first_positions(problem, num_coarse, coarse_size, problem.coarse_kernel_stride)
        denominators = [_step_rows(num_fine + np.arange(num_coarse), coarse_first, LATEST)]
        if problem.is_causal:
            # A query that sees no coarse unit stands before the end of the first one, so these are all that it sees.
            early = num_units(min(coarse_size - 1, kv_len), size, stride)
            denominators.insert(0, _step_rows(np.arange(early), fine_first[:early], coarse_size - 2))
    ids, shared = unit_overlap(num_fine, kv_len, problem)
    exists = shared > 0
    first = np.where(exists, fine_first[ids] if num_fine else 0, LATEST)
    last = np.where(exists, LATEST, EARLIEST)
    scored = _to_steps(np.stack([ids, first, last, shared], axis=-1))
    steps = np.concatenate([*denominators, scored]).astype(np.int32)
    num_denominators = sum(map(len, denominators))
    return UnitSteps(steps[..., 0], np.moveaxis(steps[..., 1:], -1, 1), num_denominators, shared.shape[1])


def _first_positions(problem: ScoringProblem, count: int, size: int, stride: int) -> np.ndarray:
    """Positions of the first queries that see each unit."""
    return np.arange(count) * stride + size - 1 if problem.is_causal else np.full(count, EARLIEST)


def _step_rows(units: np.ndarray, first: np.ndarray, last: int) -> np.ndarray:
    """[steps, 64, 4], the unit and its column of the table, of units that belong to no block."""
    return _to_steps(np.stack([units, first, np.full_like(first, last), np.zeros_like(first)], axis=-1)[:, None])


def _to_steps(x: np.ndarray) -> np.ndarray:
    """[rows, width, 4] to [groups of 64 rows * width, 64, 4], with units that nobody sees after the last row."""
    padding = np.full((-len(x) % STEP_UNITS, *x.shape[1:]), (0, LATEST, EARLIEST, 0))
    x = np.concatenate([x, padding])
    x = x.reshape(len(x) // STEP_UNITS, STEP_UNITS, *x.shape[1:])
    return np.moveaxis(x, 2, 1).reshape(-1, STEP_UNITS, 4)


def arrange_units(steps: jax.Array, compressed: jax.Array, coarse: jax.Array | None, columns: int) -> jax.Array:
    """[rows, units, num_kv_heads, head_dim] to [rows, num_kv_heads, steps, 64, columns], as `UnitSteps.units` says."""
    units = compressed if coarse is None else jnp.concatenate([compressed, coarse], axis=1)
    units = jnp.moveaxis(pad_columns(units, columns), 2, 1)
    return jnp.take(units, steps.reshape(-1), axis=2).reshape(*units.shape[:2], *steps.shape, columns)


def arrange_queries(g: ScoringGeometry, query: jax.Array) -> jax.Array:
    """[batch, q_len, num_q_heads, head_dim] to [batch, num_lists, num_tiles, num_parts * 128, head_columns]."""
    padded_len, padded_heads = g.num_tiles * g.tile_tokens, g.num_parts * g.part_heads
    x = query.reshape(g.batch, g.q_len, g.num_lists, g.list_heads, g.head_dim)
    padding = (0, 0), (0, padded_len - g.q_len), (0, 0), (0, padded_heads - g.list_heads), (0, g.head_columns - g.head_dim)
    x = jnp.pad(x, padding)
    x = x.reshape(g.batch, g.num_tiles, g.tile_tokens, g.num_lists, g.num_parts, g.part_heads, g.head_columns)
    x = x.transpose(0, 3, 1, 4, 5, 2, 6)
    x = x.reshape(*x.shape[:4], g.part_heads * g.tile_tokens, g.head_columns)
    x = jnp.pad(x, [(0, 0)] * 4 + [(0, COLUMNS - x.shape[4]), (0, 0)])
    # A copy has no room for one more dimension.
    return x.reshape(*x.shape[:3], g.num_parts * COLUMNS, g.head_columns)


def arrange_positions(g: ScoringGeometry, positions: jax.Array) -> jax.Array:
    """int32 [rows, q_len] to [rows, num_tiles, 128], of each column; tokens that do not exist stand where the last one does."""
    x = jnp.pad(positions, [(0, 0), (0, g.num_tiles * g.tile_tokens - g.q_len)], mode="edge")
    x = jnp.tile(x.reshape(-1, g.num_tiles, g.tile_tokens), (1, 1, g.part_heads))
    return jnp.pad(x, [(0, 0), (0, 0), (0, COLUMNS - x.shape[2])], mode="edge")


def walks(g: ScoringGeometry, table: jax.Array, problem: ScoringProblem, positions: jax.Array) -> jax.Array:
    """What is walked for some neighbouring tokens: int32 [rows, groups, 3].

    The first step of the denominator, the end of those, and the end of the groups of 64 blocks.

    Args:
      g: the call.
      table: of its `UnitSteps`.
      problem: of the call.
      positions: [rows, groups, tokens].
    """
    earliest, latest = positions.min(-1, keepdims=True), positions.max(-1, keepdims=True)
    table = table[: g.num_denominators]
    # [rows, groups, steps]
    is_seen = (table[:, FIRST].min(-1) <= latest) & (table[:, LAST].max(-1) >= earliest)
    first = jnp.argmax(is_seen, axis=-1)
    end = jnp.where(is_seen.any(-1), g.num_denominators - jnp.argmax(is_seen[..., ::-1], axis=-1), first)
    if problem.is_causal:
        group_size = min(problem.block_size * STEP_UNITS, LATEST)
        groups = jnp.clip(latest[..., 0] // group_size + 1, 0, g.num_block_groups)
    else:
        groups = jnp.full_like(first, g.num_block_groups)
    return jnp.stack([first, end, groups], axis=-1).astype(jnp.int32)
