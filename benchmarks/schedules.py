"""How a kernel cuts its work into CTAs, and what that makes it load, store and multiply: exact counts.

Every attention kernel here has the same form. A CTA *owns* rows of one side, queries or keys, which it loads once. It *walks*
pieces of the other side: chunks of the keys of the listed blocks, or the query tiles that list its block. Each piece passes
through shared memory. A warp (of wgmma, four together: a *unit*) multiplies its own 16 rows with a *step* of the piece, unless
none of the queries among them sees any of the keys. `docs/performance.md` explains the formulae.
"""

import dataclasses
import math

import numpy as np

from benchmarks.tile_lists import Lists, Tiles, chunks_of_blocks, edges_of_groups, seen_by_groups, tiles_of
from sparse_attn_jax.splitting import LONG_LIST, MIN_ENTRIES_PER_PART
from sparse_attn_jax.testing.cases import Case

ELEMENT_BYTES = 2
SUM_BYTES = 4
NUMBER_BYTES = 4
MATRIX_FLOPS = 2 * 16 * 8 * 16  # of an mma.m16n8k16
WARP_ROWS = 16  # that a warp owns
# The key-major kernel: rows of a tile that it computes on at a time, and bytes of each in a table in shared memory.
PART_ROWS = 32
TABLE_ROW_BYTES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A kernel's way to cut the work.

    Attributes:
      owns: "queries" (forward, dQ) or "keys" (dK and dV): what a CTA keeps while it walks the other.
      tokens: query tokens of a tile. Its rows are these tokens with the query heads of one KV head.
      rows: query rows that a CTA has at a time, padding included. A tile with more is cut into slices.
      keys: keys of a chunk.
      step: walked rows that are multiplied at a time.
      warps: of a CTA, those that multiply.
      producer_warps: and those that only copy.
      unit_warps: warps that multiply together: 1 for mma, 4 for wgmma.
      unit_rows: owned rows that they multiply; `None`: 16 for each warp.
      owned_arrays: arrays of which a CTA loads its own rows. (Of the walked side it is always two: keys and values, or queries
        and gradients of the output.)
      written_arrays: results with a row per owned row.
      writes_lse: and a float32 for each.
      shared_products: matrix products that read both sides from shared memory.
      register_products: those that have the owned side's factor in registers.
      shared_rows: rows of head_dim that products read from shared memory in a step; `None`: as those two say.
      shared_bytes: of a CTA.
      registers: of a thread.
      instructions: `None`: not known, and then no limit.
      tensor: which instruction multiplies, "mma" or "wgmma".
      chunk_blocks: blocks of a chunk. Several are walked without those that no row sees.
      strip_tokens: `None`: whole tiles are walked. Else strips of so many tokens, those of which one chose the block, as many
        in a piece as fit into `rows`.
      skips: a unit does not compute a step in which its rows see nothing.
      tells_threads: a CTA computes several slices or chunks, and each of its threads reads in shared memory which comes next.
    """

    name: str
    owns: str
    tokens: int
    rows: int
    keys: int
    step: int
    warps: int
    producer_warps: int = 0
    unit_warps: int = 1
    unit_rows: int | None = None
    owned_arrays: int
    written_arrays: int
    writes_lse: bool = False
    shared_products: int
    register_products: int
    shared_rows: float | None = None
    shared_bytes: int
    registers: int
    instructions: "Instructions | None" = None
    tensor: str = "mma"
    chunk_blocks: int = 1
    strip_tokens: int | None = None
    skips: bool = True
    tells_threads: bool = False

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.producer_warps)

    @property
    def owned(self) -> int:
        return self.rows if self.owns == "queries" else self.keys

    @property
    def walked(self) -> int:
        return self.keys if self.owns == "queries" else self.rows

    @property
    def units(self) -> int:
        return self.warps // self.unit_warps

    @property
    def products(self) -> int:
        return self.shared_products + self.register_products


# ---- Schedules. Row bytes with padding: sm80/matrix.cuh; shared memory: the Config structs of each kernel.


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What a warp issues in the main loop.

    Attributes:
      step: for a step that it computes, if no row sees only a part of it.
      piece: for each piece, computed or not: tests of what is visible, barriers, bookkeeping.
      copy: for each copy of 16 bytes per lane.
    """

    step: int
    piece: int
    copy: int


# Of D=128 and chunks of 64 keys, by nvcc of CUDA 13.0 for sm_80: registers from ptxas -v, instructions counted in the listing
# (cuobjdump -sass) of sources from which the soft cap and the branch for steps with an edge were taken out.
REGISTERS = dict(forward=176, query_gradient=240, key_gradient=241)
INSTRUCTIONS = dict(
    forward=Instructions(step=920, piece=480, copy=14),
    query_gradient=Instructions(step=890, piece=480, copy=14),
    key_gradient=Instructions(step=565, piece=980, copy=40),
)


def sm80_forward(case: Case, tokens: int, *, warps: int | None = None) -> Schedule:
    """csrc/sm80/attention_forward.cuh. Without `warps`: as many as the tile has 16 rows."""
    return sm80_query_major("forward", case, tokens, warps)


def sm80_query_gradient(case: Case, tokens: int, *, warps: int | None = None) -> Schedule:
    """The dQ kernel of csrc/sm80/attention_backward.cuh."""
    return sm80_query_major("query_gradient", case, tokens, warps)


def sm80_query_major(kernel: str, case: Case, tokens: int, warps: int | None) -> Schedule:
    # The gradient's CTAs also have the gradients of their rows' outputs, and multiply them with the values.
    gradients = 1 if kernel == "query_gradient" else 0
    warps = warps or -(-tokens * group_size(case) // WARP_ROWS)
    rows = WARP_ROWS * warps
    keys = min(case.kv_block_size, 64 if case.head_dim <= 128 else 32)
    return Schedule(
        name=f"SM80 {kernel}",
        owns="queries",
        tokens=tokens,
        rows=rows,
        keys=keys,
        step=keys,
        warps=warps,
        owned_arrays=1 + gradients,
        written_arrays=1,
        writes_lse=gradients == 0,
        shared_products=1 + gradients,
        register_products=1,
        shared_bytes=((1 + gradients) * rows + 2 * 2 * keys) * padded_row_bytes(case) + 16,
        registers=REGISTERS[kernel],
        instructions=INSTRUCTIONS[kernel],
        tells_threads=True,
    )


def sm80_key_gradient(case: Case, tokens: int, *, rows: int | None = None, which: str = "both") -> Schedule:
    """The dK and dV kernel of csrc/sm80/attention_backward.cuh; `which` is "both", "key" or "value"."""
    rows = rows or -(-tokens * group_size(case) // PART_ROWS) * PART_ROWS
    keys = min(case.kv_block_size, 64)
    stages = 1 if case.head_dim > 128 else 2
    return Schedule(
        name="SM80 key_gradient",
        owns="keys",
        tokens=tokens,
        rows=rows,
        keys=keys,
        step=PART_ROWS,
        warps=keys // WARP_ROWS,
        owned_arrays=2,
        written_arrays=2 if which == "both" else 1,
        shared_products=1 if which == "value" else 2,
        register_products=2 if which == "both" else 1,
        shared_bytes=(2 * keys + 2 * stages * rows) * padded_row_bytes(case) + stages * rows * TABLE_ROW_BYTES + 16,
        registers=REGISTERS["key_gradient"],
        instructions=INSTRUCTIONS["key_gradient"],
        tells_threads=True,
    )


def infllm_v2_forward(case: Case) -> Schedule:
    """InfLLM-v2's forward as published (github.com/OpenBMB/infllmv2_cuda_impl): a CTA is one warp with one token.

    16 rows, the group's heads, walk the token's own blocks; one buffer each for queries, keys and values.
    """
    return Schedule(
        name="InfLLM-v2 forward",
        owns="queries",
        tokens=1,
        rows=WARP_ROWS,
        keys=64,
        step=64,
        warps=1,
        owned_arrays=1,
        written_arrays=1,
        writes_lse=True,
        shared_products=1,
        register_products=1,
        shared_bytes=(WARP_ROWS + 2 * 64) * case.head_dim * ELEMENT_BYTES,
        registers=255,
    )


def sm90_forward(case: Case, tokens: int) -> Schedule:
    """csrc/sm90/attention_forward.cuh: a warpgroup for each 64 rows. Two of them share the copies of keys."""
    return sm90_query_major("forward", case, tokens)


def sm90_query_gradient(case: Case, tokens: int) -> Schedule:
    """The dQ kernel of csrc/sm90/attention_backward.cuh."""
    return sm90_query_major("query_gradient", case, tokens)


def sm90_query_major(kernel: str, case: Case, tokens: int) -> Schedule:
    gradients = 1 if kernel == "query_gradient" else 0
    units = min(-(-tokens * group_size(case) // 64), 2 if case.head_dim <= 128 else 1)
    keys = 32 if gradients and (case.head_dim, case.kv_block_size) == (256, 32) else 64
    chunk_blocks = max(1, keys // case.kv_block_size)
    if units > 1:
        stages = 4 if gradients else 5
    elif gradients:
        stages = 2 if case.head_dim >= 128 else 3 if case.head_dim > 64 else 4
    else:
        stages = 3 if case.head_dim >= 128 else 4
    # Per stage a header for each unit and block, and four barriers; which keys are seen; the barriers of the rows; which slices
    # come.
    small_bytes = stages * (16 * units * chunk_blocks + 16 + 32) + 64 * units + 16 + 48
    return Schedule(
        name=f"SM90 {kernel}",
        owns="queries",
        tokens=tokens,
        rows=64 * units,
        keys=keys,
        step=keys,
        warps=4 * units,
        producer_warps=4,
        unit_warps=4,
        owned_arrays=1 + gradients,
        written_arrays=1,
        writes_lse=gradients == 0,
        shared_products=1 + gradients,
        register_products=1,
        shared_bytes=((1 + gradients) * 64 * units + stages * 2 * keys) * case.head_dim * ELEMENT_BYTES + small_bytes,
        registers=255 if case.head_dim > 128 else 128 if units == 1 else 168,
        tensor="wgmma",
        chunk_blocks=chunk_blocks,
    )


def sm90_key_gradient(case: Case, tokens: int) -> Schedule:
    """The dK and dV kernel of csrc/sm90/attention_backward.cuh.

    Two warpgroups take turns at stages of 64 rows; or, where the sums of both gradients are too many for one, each has a
    gradient, and both read all stages. Fewer keys than 64 are multiplied as if they were 64.
    """
    stages = 6 if case.head_dim <= 96 else 4 if case.head_dim <= 128 else 2
    # Of stages: tables, strips, barriers. Then the table of keys, the part and its barriers, that of the keys.
    small_bytes = stages * (64 * TABLE_ROW_BYTES + 16 + 8 * 8 + 16 + 8) + 64 * 16 + 32 + 16 + 8
    return Schedule(
        name="SM90 key_gradient",
        owns="keys",
        tokens=tokens,
        strip_tokens=strip_tokens(case, tokens),
        rows=64,
        keys=min(case.kv_block_size, 64),
        step=64,
        warps=8,
        producer_warps=4,
        unit_warps=4,
        owned_arrays=2,
        written_arrays=2,
        shared_products=2 if case.head_dim <= 128 else 3,
        register_products=2,
        shared_bytes=(2 * 64 + stages * 2 * 64) * case.head_dim * ELEMENT_BYTES + small_bytes,
        registers=168,
        tensor="wgmma",
    )


def strip_tokens(case: Case, tokens: int) -> int:
    """Tokens whose rows a copy of the SM90 kernel brings, those that share a list or few: `StripBox` in csrc/sm90/rows.cuh."""
    shared = tokens if case.q_len <= case.q_block_size else math.gcd(tokens, case.q_block_size)
    fewest = -(-16 // group_size(case))
    return min(tokens, 64 // min(group_size(case), 64), max(shared, fewest))


def group_size(case: Case) -> int:
    return case.num_q_heads // case.num_kv_heads


def padded_row_bytes(case: Case) -> int:
    return case.head_dim * ELEMENT_BYTES + 16


# ---- Counts.


@dataclasses.dataclass(frozen=True)
class Work:
    """What the CTAs of a schedule find to do.

    Attributes:
      ctas: number of CTAs, or of slices of tiles or of chunks of keys that CTAs compute one after the other.
      owned: owned rows that exist.
      pieces: walked pieces.
      items: walked rows that exist.
      steps: pairs of a unit and a step of a piece that are computed.
      longest: pieces of the CTA that has most.
      missed: walked rows that L2 cannot keep, by `Device.l2_capacity`.
      edge_steps: steps in which a row sees some keys and not others; only counted where that makes a difference.
      summed: owned rows whose results are sums of several CTAs', by way of float32.
      taken: what CTAs take, and learn that they have it to compute, or that it is not there.
    """

    ctas: float
    owned: float
    pieces: float
    items: float
    steps: float
    longest: float
    missed: float
    taken: float
    edge_steps: float = 0
    summed: float = 0


def work_of(schedule: Schedule, lists: Lists, l2_capacity: float = np.inf) -> Work:
    if schedule.owns == "queries":
        find = packed_work if schedule.chunk_blocks > 1 and schedule.skips else query_major_work
    else:
        find = strip_work if schedule.strip_tokens else key_major_work
    return find(schedule, lists, tiles_of(lists, schedule.tokens), l2_capacity)


def query_major_work(schedule: Schedule, lists: Lists, tiles: Tiles, l2_capacity: float) -> Work:
    case, scale = lists.case, lists.coverage * lists.repeats
    slices = slices_of_tile(schedule, case)
    # Blocks of less than a chunk share one, and there is a whole number of chunks.
    chunks = -(-tiles.blocks * case.kv_block_size // schedule.keys)
    pieces = chunks * slices
    keys = (chunks * schedule.keys - tiles.has_last * missing_keys(lists)) * slices
    if schedule.skips:
        tokens, repeats = group_of_rows(case, WARP_ROWS * schedule.unit_warps)
        steps = seen_by_groups(lists, schedule.tokens, tokens, schedule.keys, case.kv_len) * repeats
    else:
        steps = pieces.sum() * schedule.units
    missed = keys * miss_rate(tiles.visible * row_pair_bytes(case), l2_capacity)
    return Work(
        ctas=len(pieces) * slices * scale,
        taken=len(pieces) * slices * scale,
        owned=tiles.tokens.sum() * group_size(case) * scale,
        pieces=pieces.sum() * scale,
        items=keys.sum() * scale,
        steps=steps * scale,
        longest=pieces.max() / slices,
        missed=missed.sum() * scale,
    )


def packed_work(schedule: Schedule, lists: Lists, tiles: Tiles, l2_capacity: float) -> Work:
    """Query-major, with several blocks in a chunk."""
    case, scale = lists.case, lists.coverage * lists.repeats
    group = group_of_rows(case, WARP_ROWS * schedule.unit_warps)
    found = chunks_of_blocks(lists, schedule.tokens, group, schedule.units, schedule.chunk_blocks)
    missed = found.keys.sum(axis=1) * miss_rate(tiles.visible * row_pair_bytes(case), l2_capacity)
    return Work(
        ctas=found.chunks.size * scale,
        taken=found.chunks.size * scale,
        owned=tiles.tokens.sum() * group_size(case) * scale,
        pieces=found.chunks.sum() * scale,
        items=found.keys.sum() * scale,
        steps=found.seen * scale,
        longest=found.chunks.max(),
        missed=missed.sum() * scale,
    )


def key_major_work(schedule: Schedule, lists: Lists, tiles: Tiles, l2_capacity: float) -> Work:
    case = lists.case
    slices, chunks = slices_of_tile(schedule, case), case.kv_block_size // schedule.keys
    lengths = tiles.visits * lists.coverage
    rows = tiles.visit_tokens * group_size(case) * lists.coverage
    parts = parts_of_lists(lists, schedule.tokens, lengths)
    keys = keys_of_blocks(lists)
    pieces = lengths.sum() * slices * chunks * lists.repeats
    steps, edge_steps = pieces, 0.0
    if schedule.skips:
        tokens, repeats = group_of_rows(case, PART_ROWS)
        group = (lists, schedule.tokens, tokens, WARP_ROWS, lists.num_kv_blocks * case.kv_block_size)
        scale = repeats * lists.coverage * lists.repeats
        steps, edge_steps = seen_by_groups(*group) * scale, edges_of_groups(*group) * scale
    return Work(
        ctas=parts.sum() * chunks * lists.repeats,
        taken=(parts.size + len(parts) * num_partials(lists, schedule.tokens)) * chunks * lists.repeats,
        owned=(parts * keys).sum() * lists.repeats,
        pieces=pieces,
        items=rows.sum() * chunks * lists.repeats,
        steps=steps,
        edge_steps=edge_steps,
        longest=np.ceil(lengths / parts).max() * slices,
        missed=(rows * miss_rate(reach_of_blocks(lists), l2_capacity)).sum() * chunks * lists.repeats,
        summed=((parts > 1) * parts * keys).sum() * lists.repeats,
    )


def strip_work(schedule: Schedule, lists: Lists, tiles: Tiles, l2_capacity: float) -> Work:
    """Exact where each list has one part, and every strip sees a key of each chunk of the blocks that it chose."""
    case = lists.case
    chunks, strips = case.kv_block_size // schedule.keys, tiles_of(lists, schedule.strip_tokens)
    rows_apart = -(-schedule.strip_tokens * group_size(case) // 8) * 8
    lengths = strips.visits * lists.coverage
    rows = strips.visit_tokens * group_size(case) * lists.coverage
    parts = parts_of_lists(lists, schedule.tokens, tiles.visits * lists.coverage)
    pieces = parts * np.ceil(lengths / parts / (schedule.rows // rows_apart))
    keys = keys_of_blocks(lists)
    return Work(
        ctas=parts.sum() * chunks * lists.repeats,
        taken=(parts.size + len(parts) * num_partials(lists, schedule.tokens)) * chunks * lists.repeats,
        owned=(parts * keys).sum() * lists.repeats,
        pieces=pieces.sum() * chunks * lists.repeats,
        items=rows.sum() * chunks * lists.repeats,
        steps=pieces.sum() * chunks * lists.repeats,
        longest=(pieces / parts).max(),
        missed=(rows * miss_rate(reach_of_blocks(lists), l2_capacity)).sum() * chunks * lists.repeats,
        summed=((parts > 1) * parts * keys).sum() * lists.repeats,
    )


def keys_of_blocks(lists: Lists) -> np.ndarray:
    """Keys of each block: the last may have fewer."""
    keys = np.full(lists.num_kv_blocks, lists.case.kv_block_size)
    keys[-1] -= missing_keys(lists)
    return keys


def reach_of_blocks(lists: Lists) -> np.ndarray:
    """Bytes of the queries, with the gradients of their outputs, that may list each block: all that causality lets see it."""
    case, block = lists.case, np.arange(lists.num_kv_blocks)
    first_query = np.clip(block * case.kv_block_size - (case.kv_len - case.q_len), 0, case.q_len) if case.is_causal else 0
    return (case.q_len - first_query) * group_size(case) * row_pair_bytes(case)


def slices_of_tile(schedule: Schedule, case: Case) -> int:
    return -(-schedule.tokens * group_size(case) // schedule.rows)


def group_of_rows(case: Case, rows: int) -> tuple[int, int]:
    """Tokens that `rows` successive rows of a tile belong to, and how many such groups of rows these tokens have."""
    group = group_size(case)
    if rows % group and group % rows:
        raise ValueError(f"`case` has {group} query heads per KV head; the model needs a divisor or a multiple of {rows}.")
    return max(1, rows // group), max(1, group // rows)


def missing_keys(lists: Lists) -> int:
    """Keys that the last block lacks."""
    return lists.num_kv_blocks * lists.case.kv_block_size - lists.case.kv_len


def parts_of_lists(lists: Lists, tokens: int, lengths: np.ndarray) -> np.ndarray:
    """CTAs that share each block's list of tiles, as implementations/cuda/attention_backward.py has it: as `lengths`."""
    return np.maximum(np.ceil(lengths / entries_per_part(lists, tokens)), 1).astype(np.int64)


def entries_per_part(lists: Lists, tokens: int) -> int:
    return max(MIN_ENTRIES_PER_PART, LONG_LIST * -(-num_entries(lists, tokens) // lists.num_kv_blocks))


def num_partials(lists: Lists, tokens: int) -> int:
    """Most parts of blocks with several: CTAs look for so many besides one per block."""
    return 2 * num_entries(lists, tokens) // entries_per_part(lists, tokens)


def num_entries(lists: Lists, tokens: int) -> int:
    """Slots of all lists of a plan."""
    return -(-lists.case.q_len // tokens) * tile_capacity(lists.case, tokens, lists.ids.shape[-1])


def tile_capacity(case: Case, tokens: int, num_slots: int) -> int:
    """Slots of the list of a tile whose query blocks have `num_slots` each."""
    return min(lists_per_tile(case, tokens) * num_slots, -(-case.kv_len // case.kv_block_size))


def lists_per_tile(case: Case, tokens: int) -> int:
    return 1 if case.q_len <= case.q_block_size else tokens // math.gcd(tokens, case.q_block_size)


def miss_rate(reach, l2_capacity: float):
    """Share of loads that miss if they are spread evenly over `reach` bytes, of which L2 keeps as much as it can."""
    return np.maximum(0.0, 1 - l2_capacity / np.maximum(reach, 1))


def row_pair_bytes(case: Case) -> int:
    """A key and its value, or a query and the gradient of its output."""
    return 2 * case.head_dim * ELEMENT_BYTES


@dataclasses.dataclass(frozen=True)
class Counts:
    """Bytes and operations of a launch. `loaded` is rows of the big arrays; the rest is in `benchmarks.metadata`.

    `exps` are exponentials, one for each pair of rows of a computed step.
    """

    loaded: float
    stored: float
    shared_loaded: float
    shared_stored: float
    flops: float
    exps: float

    @property
    def matrix_instructions(self) -> float:
        return self.flops / MATRIX_FLOPS


def counts_of(schedule: Schedule, case: Case, work: Work) -> Counts:
    row_bytes = case.head_dim * ELEMENT_BYTES
    unit_rows = schedule.unit_rows or WARP_ROWS * schedule.unit_warps
    rows_per_step = schedule.shared_rows
    if rows_per_step is None:
        rows_per_step = schedule.shared_products * (unit_rows + schedule.step) + schedule.register_products * schedule.step
    # Float32 sums have one element more, of the bias, if they are of keys or of both.
    has_table = schedule.owns == "keys" and schedule.unit_warps == 1  # or one that the model leaves out
    sum_bytes = (schedule.written_arrays * case.head_dim + (schedule.shared_products == 2)) * SUM_BYTES
    result_bytes = schedule.written_arrays * row_bytes + schedule.writes_lse * SUM_BYTES
    told_bytes = NUMBER_BYTES * schedule.tells_threads * work.taken
    return Counts(
        loaded=row_bytes * (schedule.owned_arrays * work.owned + 2 * work.items),
        stored=result_bytes * (work.owned - work.summed) + sum_bytes * work.summed,
        shared_loaded=row_bytes * rows_per_step * work.steps
        + has_table * table_bytes(schedule, work)
        + schedule.threads * told_bytes,
        shared_stored=row_bytes * (schedule.owned_arrays * schedule.owned * work.ctas + 2 * schedule.walked * work.pieces)
        + has_table * TABLE_ROW_BYTES * schedule.rows * work.pieces
        + told_bytes,
        flops=work.steps * schedule.products * 2 * unit_rows * schedule.step * case.head_dim,
        exps=work.steps * unit_rows * schedule.step,
    )


def table_bytes(schedule: Schedule, work: Work) -> float:
    """What the key-major kernel reads of its table: 32 lanes a row each to see what is visible, then rows of their columns.

    Each lane has a quarter of the columns, and reads each row twice unless some of the step is hidden.
    """
    looks = work.pieces * schedule.units * (schedule.rows // PART_ROWS)
    columns = PART_ROWS // 4
    return 32 * TABLE_ROW_BYTES * (looks + columns * (2 * work.steps - work.edge_steps))
