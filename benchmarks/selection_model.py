"""What block selection loads, stores and multiplies, and the least time that takes: the kernels of csrc/sm80 and csrc/sm90.

Nothing depends on the values of queries and keys but the running top-k, which the model leaves out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from benchmarks.devices import EXPS_PER_CLOCK, SHARED_BYTES_PER_CLOCK, Device
from sparse_attn_jax.scoring_problem import ScoringProblem, num_units
from sparse_attn_jax.selection import num_blocks

ELEMENT_BYTES = 2
INDEX_BYTES = 4
# As csrc/common/select_blocks.cuh, csrc/sm80/matrix.cuh and csrc/sm90/selection.cuh have them.
CHUNK_UNITS = 64
MOST_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
CONSUMERS = 2  # of SM90: warpgroups, with 64 rows each
CONSUMER_ROWS = 64
STAGES = 4
STATE_BYTES = 8
NEXT_PIECE_BYTES = 16  # csrc/sm80/pieces.cuh
PIECE_RING_BYTES = 48  # csrc/sm90/pieces.cuh
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
    """One selection by queries at the end of the keys.

    Attributes:
      use_coarse: the softmax denominator is that of coarse units.
      arch: whose kernels, 80 or 90.
    """

    problem: ScoringProblem
    batch: int
    q_len: int
    use_coarse: bool = True
    arch: int = 80

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

    @property
    def group_rows(self) -> int:
        """Rows of a token: its query heads that share a list, and padding."""
        return 2 ** math.ceil(math.log2(self.problem.num_q_heads // self.num_lists))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut: a piece has `rows` query rows of `tokens` tokens, and a CTA the scores of so many blocks at a time.

    Attributes:
      warps: of a CTA, the producer's one included.
      unit_reads: how often the products read each unit of a chunk in shared memory.
      query_reads: and each row of the query: 0 if it never lies there.
    """

    rows: int
    warps: int
    unit_reads: int
    query_reads: int
    tokens: int
    segment_blocks: int
    shared_bytes: int


def tiling_of(selection: Selection) -> Tiling:
    return sm90_tiling(selection) if selection.arch == 90 else sm80_tiling(selection)


def sm80_tiling(selection: Selection) -> Tiling:
    """The largest tile of which two CTAs fit on a multiprocessor, or else one."""
    p = selection.problem
    is_high = p.head_dim <= 128 and selection.group_rows >= 8 and selection.q_len * selection.group_rows > 64
    row_warps, column_warps = (4, 1) if is_high else (2, 2)
    rows = 32 * row_warps
    row_bytes = p.head_dim * ELEMENT_BYTES + 16

    def bytes_of(tokens: int, blocks: int) -> int:
        chunks, query = 2 * CHUNK_UNITS * row_bytes + NEXT_PIECE_BYTES, rows * row_bytes
        statistics = 8 * rows * column_warps if column_warps > 1 else 0
        first = -(-(chunks + statistics + (4 + STATE_BYTES) * tokens) // 16) * 16
        gap = 0 if p.head_dim <= 128 else query
        return max(
            first + gap + table_and_lists(selection, rows // min(selection.group_rows, 32), 1, tokens, blocks), first + query
        )

    most = MOST_SHARED_BYTES[80]
    tokens, blocks, used = fitting(selection, rows, most, (most // 2 - 1024, most), bytes_of)
    reads = dict(warps=row_warps * column_warps, unit_reads=row_warps, query_reads=column_warps)
    return Tiling(rows=rows, tokens=tokens, segment_blocks=blocks, shared_bytes=used, **reads)


def sm90_tiling(selection: Selection) -> Tiling:
    """Each consumer has its own tokens."""
    p = selection.problem
    units = STAGES * (CHUNK_UNITS * p.head_dim * ELEMENT_BYTES + 16) + PIECE_RING_BYTES

    def bytes_of(tokens: int, blocks: int) -> int:
        first = -(-(4 + STATE_BYTES) * tokens // 16) * 16
        own = first + table_and_lists(selection, CONSUMER_ROWS // min(selection.group_rows, 16), 2, tokens, blocks)
        return units + (CONSUMERS - 1) * -(-own // 16) * 16 + own

    most = MOST_SHARED_BYTES[90]
    tokens, blocks, used = fitting(selection, CONSUMER_ROWS, most, (most,), bytes_of)
    reads = dict(warps=4 * CONSUMERS + 1, unit_reads=CONSUMERS, query_reads=0)
    held = dict(rows=CONSUMERS * CONSUMER_ROWS, tokens=CONSUMERS * tokens)
    return Tiling(segment_blocks=blocks, shared_bytes=used, **held, **reads)


def fitting(
    selection: Selection, rows: int, most: int, rooms: tuple[int, ...], bytes_of: Callable[[int, int], int]
) -> tuple[int, int, int]:
    """Tokens, blocks of a segment and bytes: `selection_tiling` of csrc/common/select_blocks.cuh."""
    tokens = rows // selection.group_rows
    while tokens:
        for room in rooms:
            blocks = min(max(selection.num_blocks, 1), most // 4)
            while True:
                used = bytes_of(tokens, blocks)
                if used <= room:
                    return tokens, blocks, used
                if blocks <= FEWEST_BLOCKS:
                    break
                blocks = max(FEWEST_BLOCKS, blocks // 2)
        tokens //= 2
    raise ValueError(f"`problem.top_k` is {selection.problem.top_k}, and the lists of one token do not fit into shared memory.")


def table_and_lists(selection: Selection, table_rows: int, tables: int, tokens: int, blocks: int) -> int:
    """Bytes of the sums of a chunk, the scores of a segment, and the running lists."""
    capacity = min(selection.problem.top_k, selection.num_blocks) + SPARE_ENTRIES
    return 4 * (tables * CHUNK_UNITS * (table_rows + 4) + tokens * (blocks | 1) + 2 * tokens * capacity)


@dataclasses.dataclass(frozen=True)
class SelectionCounts:
    """Of a launch.

    Attributes:
      loaded: bytes of queries, units, positions and the counter of the work.
      stored: bytes of indices and that counter.
      copied: bytes of units that tensor copies bring, of SM90.
      operands: bytes that products read in shared memory.
      written: bytes that copies of queries and units write there, zeros for those that do not exist included.
      flops: of products.
      exps: of scores, of which each warp's rows have all.
    """

    loaded: int
    stored: int
    copied: int
    operands: int
    written: int
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
        for walk in walks_of(selection, tiling, first_position + first, first_position + last):
            chunks += walk.chunks
            # A tensor copy brings all units of a chunk that there are.
            units += min(walk.chunks * CHUNK_UNITS, walk.available) if selection.arch == 90 else walk.length
    # Every warp reads its rows of the query once if registers hold them, and else for every chunk.
    reads = tiling.query_reads * (num_tiles if p.head_dim <= 128 else chunks)
    query_written = num_tiles * tiling.rows if tiling.query_reads else 0
    # By each warp that finds the walks in global memory, and by a thread per token.
    position_reads = 1 + tiling.warps * (selection.arch == 90)
    scores = chunks * tiling.rows * CHUNK_UNITS
    lists = selection.batch * selection.num_lists
    # Of the counter from which CTAs take pieces of work: loaded, and stored again.
    counter_bytes = num_tiles * INDEX_BYTES
    positions = position_reads * selection.q_len * INDEX_BYTES
    return SelectionCounts(
        loaded=lists * ((query_rows + units) * row_bytes + positions + counter_bytes),
        stored=lists * (selection.q_len * p.top_k * INDEX_BYTES + counter_bytes),
        copied=lists * units * row_bytes * (selection.arch == 90),
        operands=lists * row_bytes * (reads * tiling.rows + chunks * CHUNK_UNITS * tiling.unit_reads),
        written=lists * row_bytes * (query_written + chunks * CHUNK_UNITS),
        flops=lists * 2 * scores * p.head_dim,
        exps=lists * scores,
    )


@dataclasses.dataclass(frozen=True)
class Walk:
    """Over `length` units; from its first on there are `available`."""

    length: int
    available: int

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK_UNITS)


def walks_of(selection: Selection, tiling: Tiling, earliest: int, latest: int) -> list[Walk]:
    """Of a tile whose tokens stand at `earliest` to `latest`: for the denominator, then for the scores."""
    p, fine, coarse = selection.problem, selection.fine, selection.coarse
    walks = [Walk(coarse.visible(p.is_causal, latest), coarse.count)]
    if coarse.visible(p.is_causal, earliest) == 0:
        # For tokens that see no coarse unit.
        last = latest if coarse.count == 0 else min(latest, coarse.size - 2)
        walks.append(Walk(fine.visible(p.is_causal, last), fine.count))
    num_visible = fine.visible(p.is_causal, latest)
    end = 0 if num_visible == 0 else ((num_visible - 1) * fine.stride + fine.size - 1) // p.block_size + 1
    block = 0
    while block < end:
        first_unit = 0 if block * p.block_size < fine.size else (block * p.block_size - fine.size) // fine.stride + 1
        stop = min(end - block, tiling.segment_blocks) + block
        if stop < end:
            # Whole chunks, if they end with a later block.
            whole = (end_unit(selection, stop) - first_unit) // CHUNK_UNITS * CHUNK_UNITS
            whole_blocks = (first_unit + whole) * fine.stride // p.block_size
            stop = min(stop, whole_blocks) if whole_blocks > block else stop
        walks.append(Walk(min(end_unit(selection, stop), num_visible) - first_unit, fine.count - first_unit))
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
        tensor=counts.flops / device.flops["wgmma" if selection.arch == 90 else "mma"],
        exp=counts.exps / (device.sms * device.clock * EXPS_PER_CLOCK),
        shared=(counts.operands + counts.written) / (device.sms * device.clock * SHARED_BYTES_PER_CLOCK),
        memory=(counts.loaded + counts.stored) / device.l2_bytes + hbm / device.hbm_bytes,
    )
