"""What block selection loads, stores and multiplies, and the least time that takes: csrc/sm80/selection.cuh on any device.

Nothing depends on the values of queries and keys but the running top-k, which the model leaves out.
"""

import dataclasses
import functools
import math

from benchmarks.devices import EXPS_PER_CLOCK, SHARED_BYTES_PER_CLOCK, Device
from sparse_attn_jax.scoring_problem import ScoringProblem, num_units
from sparse_attn_jax.selection import num_blocks

ELEMENT_BYTES = 2
INDEX_BYTES = 4
# As csrc/sm80/selection.cuh and csrc/sm80/matrix.cuh have them.
CHUNK_UNITS = 64
MOST_SHARED_BYTES = 163 * 1024
STATE_BYTES = 8
SPARE_ENTRIES = 64
FEWEST_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class Units:
    """Units of `size` tokens, one every `stride`."""

    count: int
    size: int
    stride: int

    def visible(self, is_causal: bool, position: int) -> int:
        """The first ones, up to the last that ends at or before the position."""
        if not is_causal or self.count == 0:
            return self.count
        return 0 if position < self.size - 1 else min((position - self.size + 1) // self.stride, self.count - 1) + 1


@dataclasses.dataclass(frozen=True)
class Selection:
    """One selection by queries at the end of the keys; with `use_coarse` the softmax denominator is that of coarse units."""

    problem: ScoringProblem
    batch: int
    q_len: int
    use_coarse: bool = True

    @property
    def fine(self) -> Units:
        p = self.problem
        return Units(num_units(p.kv_len, p.kernel_size, p.kernel_stride), p.kernel_size, p.kernel_stride)

    @property
    def coarse(self) -> Units:
        p = self.problem
        size, stride = p.coarse_kernel_size, p.coarse_kernel_stride
        return Units(num_units(p.kv_len, size, stride) if self.use_coarse else 0, size, stride)

    @property
    def num_lists(self) -> int:
        return self.problem.num_q_heads if self.problem.group_reduction is None else self.problem.num_kv_heads

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.problem.kv_len, self.problem.block_size)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a CTA cuts the work: `rows` query rows of `tokens` tokens, and scores of so many blocks at a time."""

    rows: int
    row_warps: int
    column_warps: int
    tokens: int
    segment_blocks: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.column_warps


def tiling_of(selection: Selection) -> Tiling:
    """The largest tile of which two CTAs fit on a multiprocessor, or else one."""
    p = selection.problem
    group_rows = 2 ** math.ceil(math.log2(p.num_q_heads // selection.num_lists))
    is_high = p.head_dim <= 128 and group_rows >= 8 and selection.q_len * group_rows > 64
    row_warps, column_warps = (4, 1) if is_high else (2, 2)
    rows = 32 * row_warps
    tokens = rows // group_rows
    while tokens:
        for room in (MOST_SHARED_BYTES // 2 - 1024, MOST_SHARED_BYTES):
            blocks = min(max(selection.num_blocks, 1), MOST_SHARED_BYTES // 4)
            while True:
                used = shared_bytes(selection, rows, column_warps, group_rows, tokens, blocks)
                if used <= room:
                    return Tiling(rows, row_warps, column_warps, tokens, blocks, used)
                if blocks <= FEWEST_BLOCKS:
                    break
                blocks = max(FEWEST_BLOCKS, blocks // 2)
        tokens //= 2
    raise ValueError(f"`problem.top_k` is {p.top_k}, and the lists of one token do not fit into shared memory.")


def shared_bytes(selection: Selection, rows: int, column_warps: int, group_rows: int, tokens: int, blocks: int) -> int:
    """`SelectionMemory` of csrc/sm80/selection.cuh."""
    p = selection.problem
    row_bytes = p.head_dim * ELEMENT_BYTES + 16
    query = 2 * CHUNK_UNITS * row_bytes + 8 * rows * column_warps + (4 + STATE_BYTES) * tokens
    query = -(-query // 16) * 16
    query_bytes = rows * row_bytes
    sums = query if p.head_dim <= 128 else query + query_bytes
    scores = sums + 4 * CHUNK_UNITS * (rows // min(group_rows, 32) + 4)
    capacity = min(p.top_k, selection.num_blocks) + SPARE_ENTRIES
    return max(scores + 4 * tokens * (blocks | 1) + 2 * 4 * tokens * capacity, query + query_bytes)


@dataclasses.dataclass(frozen=True)
class SelectionCounts:
    """Of a launch.

    Attributes:
      loaded: bytes of queries, units and positions.
      stored: bytes of indices.
      operands: bytes that products read in shared memory.
      copied: bytes that copies of queries and units write there, zeros for those that do not exist included.
      flops: of products.
      exps: of scores, of which each warp's rows have all.
    """

    loaded: int
    stored: int
    operands: int
    copied: int
    flops: int
    exps: int


@functools.lru_cache(16)
def counts_of(selection: Selection) -> SelectionCounts:
    p, tiling = selection.problem, tiling_of(selection)
    group_size = p.num_q_heads // selection.num_lists
    row_bytes = p.head_dim * ELEMENT_BYTES
    first_position = p.kv_len - selection.q_len
    query_rows = chunks = units = num_tiles = 0
    for first in range(0, selection.q_len, tiling.tokens):
        last = min(first + tiling.tokens, selection.q_len) - 1
        query_rows += (last - first + 1) * group_size
        num_tiles += 1
        for length in walks_of(selection, tiling, first_position + first, first_position + last):
            chunks += -(-length // CHUNK_UNITS)
            units += length
    # Every warp reads its rows of the query once if registers hold them, and else for every chunk.
    reads = num_tiles if p.head_dim <= 128 else chunks
    scores = chunks * tiling.rows * CHUNK_UNITS
    lists = selection.batch * selection.num_lists
    return SelectionCounts(
        loaded=lists * ((query_rows + units) * row_bytes + selection.q_len * INDEX_BYTES),
        stored=lists * selection.q_len * p.top_k * INDEX_BYTES,
        operands=lists * row_bytes * (reads * tiling.rows * tiling.column_warps + chunks * CHUNK_UNITS * tiling.row_warps),
        copied=lists * row_bytes * (num_tiles * tiling.rows + chunks * CHUNK_UNITS),
        flops=lists * 2 * scores * p.head_dim,
        exps=lists * scores,
    )


def walks_of(selection: Selection, tiling: Tiling, earliest: int, latest: int) -> list[int]:
    """Units of each walk of a tile whose tokens stand at `earliest` to `latest`: for the denominator, then for the scores."""
    p, fine, coarse = selection.problem, selection.fine, selection.coarse
    walks = [coarse.visible(p.is_causal, latest)]
    if coarse.visible(p.is_causal, earliest) == 0:
        # For tokens that see no coarse unit.
        walks.append(fine.visible(p.is_causal, latest if coarse.count == 0 else min(latest, coarse.size - 2)))
    num_visible = fine.visible(p.is_causal, latest)
    end = 0 if num_visible == 0 else ((num_visible - 1) * fine.stride + fine.size - 1) // p.block_size + 1
    block = 0
    while block < end:
        first_unit = 0 if block * p.block_size < fine.size else (block * p.block_size - fine.size) // fine.stride + 1
        stop = min(end - block, tiling.segment_blocks) + block
        if stop < end:
            # Whole chunks, if they end with a later block.
            whole = (end_unit(selection, stop) - first_unit) // CHUNK_UNITS * CHUNK_UNITS
            fitting = (first_unit + whole) * fine.stride // p.block_size
            stop = min(stop, fitting) if fitting > block else stop
        walks.append(min(end_unit(selection, stop), num_visible) - first_unit)
        block = stop
    return walks


def end_unit(selection: Selection, stop: int) -> int:
    """The unit after the last that overlaps the blocks before `stop`."""
    fine = selection.fine
    return min((stop * selection.problem.block_size - 1) // fine.stride, fine.count - 1) + 1


def limits_of(selection: Selection, device: Device) -> dict[str, float]:
    """Seconds that each part of the device would need if it were the only limit. Pooling and top-k are in none of them."""
    counts, p = counts_of(selection), selection.problem
    units = selection.batch * p.num_kv_heads * (selection.fine.count + selection.coarse.count)
    queries = selection.batch * selection.q_len * p.num_q_heads
    hbm = (units + queries) * p.head_dim * ELEMENT_BYTES + counts.stored
    return dict(
        tensor=counts.flops / device.flops["mma"],
        exp=counts.exps / (device.sms * device.clock * EXPS_PER_CLOCK),
        shared=(counts.operands + counts.copied) / (device.sms * device.clock * SHARED_BYTES_PER_CLOCK),
        memory=(counts.loaded + counts.stored) / device.l2_bytes + hbm / device.hbm_bytes,
    )
