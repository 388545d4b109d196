"""How a kernel cuts its work into CTAs, and what that makes it load, store and multiply: exact counts.

Every attention kernel here has the same form. A CTA *owns* rows of one side, queries or keys, which it loads once. It *walks*
pieces of the other side: chunks of the keys of the listed blocks, or the query tiles that list its block. Each piece passes
through shared memory, where all owned rows meet it in two or more matrix products. `docs/performance.md` explains the formulae.
"""

import dataclasses

import numpy as np

from benchmarks.tile_lists import Lists, Tiles, tiles_of
from sparse_attn_jax.testing.cases import Case

ELEMENT_BYTES = 2
MATRIX_FLOPS = 2 * 16 * 8 * 16  # of an mma.m16n8k16
# Of a row of the table that the key-major kernel keeps in shared memory.
TABLE_ROW_BYTES = 32
TABLE_PART = 32  # rows of a tile that it computes on at a time


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Bytes that the threads of a CTA load one by one: lists, positions, membership, lse.

    They are counted to compare with the simulator; a GPU finds nearly all of them in L1, where all lanes share a line.
    """

    per_cta: int
    per_piece: int
    per_row: int = 0  # of an owned row
    per_pair: int = 0  # of a query row and a piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A kernel's way to cut the work.

    Attributes:
      owns: "queries" (forward, dQ) or "keys" (dK and dV): what a CTA keeps while it walks the other.
      tokens: query tokens of a tile. Its rows are these tokens with the query heads of one KV head.
      rows: rows of a tile as computed, padding included.
      keys: keys of a chunk.
      step: walked rows that are multiplied at a time.
      warps: of a CTA, those that multiply.
      unit_warps: warps that multiply together: 1 for mma, 4 for wgmma. They own `16 * unit_warps` rows.
      owned_arrays: arrays of which a CTA loads its own rows. (Of the walked side it is always two: keys and values, or queries
        and gradients of the output.)
      written_bytes: per owned row.
      shared_products: matrix products that read both sides from shared memory.
      register_products: those that have the owned side's factor in registers.
      shared_bytes: of a CTA.
      registers: of a thread.
      instructions: that a warp issues per piece; `None`: not known, and then no bound.
      skips: whether a warp skips a chunk that none of its rows chose; its CTA loads the chunk all the same.
      tensor: which instruction multiplies, "mma" or "wgmma".
      metadata: `None`: not modelled.
    """

    name: str
    owns: str
    tokens: int
    rows: int
    keys: int
    step: int
    warps: int
    unit_warps: int = 1
    owned_arrays: int
    written_bytes: int
    shared_products: int
    register_products: int
    shared_bytes: int
    registers: int
    instructions: int | None = None
    skips: bool = False
    tensor: str = "mma"
    metadata: Metadata | None = None

    @property
    def owned(self) -> int:
        return self.rows if self.owns == "queries" else self.keys

    @property
    def walked(self) -> int:
        return self.keys if self.owns == "queries" else self.rows

    @property
    def units(self) -> int:
        return self.warps // self.unit_warps


# ---- Schedules. Row bytes with padding: sm80/matrix.cuh; shared memory: the Config structs of each kernel.

# For D=128 and chunks of 64 keys, per thread and per warp and piece. Registers: ptxas -v of CUDA 13.0, sm_80. Instructions: of
# the main loop in the same build's listing (cuobjdump -sass), without the soft cap's branch, copy loops as often as they run.
REGISTERS = dict(forward=168, query_gradient=240, key_gradient=240)
INSTRUCTIONS = dict(forward=3000, query_gradient=3900, key_gradient=4000)


def sm80_forward(case: Case, tokens: int, *, warps: int | None = None, **changes) -> Schedule:
    """csrc/sm80/attention_forward.cuh. Without `warps`: as many as the tile has 16 rows."""
    warps = warps or warps_of(case, tokens)
    keys = chunk_keys(case, 32)
    row_bytes = padded_row_bytes(case)
    schedule = Schedule(
        name="SM80 forward",
        owns="queries",
        tokens=tokens,
        rows=16 * warps,
        keys=keys,
        step=keys,
        warps=warps,
        owned_arrays=1,
        written_bytes=case.head_dim * ELEMENT_BYTES + 4,  # and lse
        shared_products=1,
        register_products=1,
        shared_bytes=16 * warps * row_bytes + 2 * 2 * keys * row_bytes,
        registers=REGISTERS["forward"],
        instructions=INSTRUCTIONS["forward"],
        metadata=query_major_metadata(case, tokens, warps, statistics=0),
    )
    return dataclasses.replace(schedule, **changes)


def sm80_query_gradient(case: Case, tokens: int, *, warps: int | None = None, **changes) -> Schedule:
    """The dQ kernel of csrc/sm80/attention_backward.cuh."""
    warps = warps or warps_of(case, tokens)
    keys = chunk_keys(case, 32)
    row_bytes = padded_row_bytes(case)
    schedule = Schedule(
        name="SM80 dQ",
        owns="queries",
        tokens=tokens,
        rows=16 * warps,
        keys=keys,
        step=keys,
        warps=warps,
        owned_arrays=2,
        written_bytes=case.head_dim * ELEMENT_BYTES,
        shared_products=2,
        register_products=1,
        shared_bytes=2 * 16 * warps * row_bytes + 2 * 2 * keys * row_bytes,
        registers=REGISTERS["query_gradient"],
        instructions=INSTRUCTIONS["query_gradient"],
        metadata=query_major_metadata(case, tokens, warps, statistics=2),
    )
    return dataclasses.replace(schedule, **changes)


def sm80_key_gradient(case: Case, tokens: int, *, rows: int | None = None, which: str = "both", **changes) -> Schedule:
    """The dK and dV kernel of csrc/sm80/attention_backward.cuh; `which` is "both", "key" or "value"."""
    rows = rows or -(-tokens * group_size(case) // TABLE_PART) * TABLE_PART
    keys = chunk_keys(case, 64)
    row_bytes = padded_row_bytes(case)
    stages = 1 if case.head_dim > 128 else 2
    threads = 2 * keys
    schedule = Schedule(
        name="SM80 dK and dV",
        owns="keys",
        tokens=tokens,
        rows=rows,
        keys=keys,
        step=TABLE_PART,
        warps=keys // 16,
        owned_arrays=2,
        written_bytes=case.head_dim * ELEMENT_BYTES * (2 if which == "both" else 1),
        shared_products=1 if which == "value" else 2,
        register_products=2 if which == "both" else 1,
        shared_bytes=2 * keys * row_bytes + stages * rows * (2 * row_bytes + TABLE_ROW_BYTES),
        registers=REGISTERS["key_gradient"],
        instructions=INSTRUCTIONS["key_gradient"] * rows // 64,
        # Offsets of the list; tile and slot; slot, position, lse, delta and membership of a row.
        metadata=Metadata(8 * threads, 8 * threads, per_pair=16 + 4 * has_membership(case, tokens)),
    )
    return dataclasses.replace(schedule, **changes)


def infllm_v2_forward(case: Case) -> Schedule:
    """InfLLM-v2's forward as published (github.com/OpenBMB/infllmv2_cuda_impl): a CTA is one warp with one token.

    16 rows (the group's heads) walk the token's own blocks of 64 keys; one buffer each for queries, keys and values.
    """
    row_bytes = case.head_dim * ELEMENT_BYTES
    return Schedule(
        name="InfLLM-v2 forward",
        owns="queries",
        tokens=1,
        rows=16,
        keys=64,
        step=64,
        warps=1,
        owned_arrays=1,
        written_bytes=row_bytes + 4,
        shared_products=1,
        register_products=1,
        shared_bytes=(16 + 2 * 64) * row_bytes,
        registers=255,
    )


def sm90_forward(case: Case, tokens: int) -> Schedule:
    """A plan, no kernel yet: TMA into three stages, wgmma by one or more warpgroups of 64 rows, one warp that loads."""
    groups = -(-tokens * group_size(case) // 64)
    row_bytes = case.head_dim * ELEMENT_BYTES  # swizzled, not padded
    keys = min(case.kv_block_size, 64)
    return Schedule(
        name="SM90 forward (planned)",
        owns="queries",
        tokens=tokens,
        rows=64 * groups,
        keys=keys,
        step=keys,
        warps=4 * groups,
        unit_warps=4,
        owned_arrays=1,
        written_bytes=row_bytes + 4,
        shared_products=1,
        register_products=1,
        shared_bytes=64 * groups * row_bytes + 3 * 2 * keys * row_bytes,
        registers=168 if groups > 1 else 240,
        tensor="wgmma",
    )


def query_major_metadata(case: Case, tokens: int, warps: int, statistics: int) -> Metadata:
    """Of the forward and dQ kernels: four lanes hold a row, and each loads its position and `statistics` floats."""
    threads = 32 * warps
    return Metadata(4 * threads, 8 * threads, 4 * 4 * (1 + statistics), 4 * 4 * has_membership(case, tokens))


def has_membership(case: Case, tokens: int) -> bool:
    """Whether a tile's tokens may have different lists, so that rows look up which blocks are theirs."""
    return case.q_len > case.q_block_size and case.q_block_size % tokens != 0


def group_size(case: Case) -> int:
    return case.num_q_heads // case.num_kv_heads


def warps_of(case: Case, tokens: int) -> int:
    return -(-tokens * group_size(case) // 16)


def padded_row_bytes(case: Case) -> int:
    return case.head_dim * ELEMENT_BYTES + 16


def chunk_keys(case: Case, most_of_large_heads: int) -> int:
    return min(case.kv_block_size, 64 if case.head_dim <= 128 else most_of_large_heads)


# ---- Counts.


@dataclasses.dataclass(frozen=True)
class Work:
    """What the CTAs of a schedule find to do.

    Attributes:
      ctas: number of CTAs.
      owned: owned rows that exist.
      pieces: walked pieces.
      unit_pieces: pieces that are computed on, times the units that compute.
      items: walked rows that exist.
      pairs: pairs of a query row and a piece.
      longest: pieces of the CTA that has most.
      missed: walked rows that L2 cannot keep, by `Device.l2_capacity`.
    """

    ctas: float
    owned: float
    pieces: float
    unit_pieces: float
    items: float
    pairs: float
    longest: float
    missed: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """Bytes and operations of a launch, over all threads; `payload` is what is not metadata."""

    payload_loaded: float
    metadata_loaded: float
    global_stored: float
    shared_loaded: float
    shared_stored: float
    flops: float

    @property
    def global_loaded(self) -> float:
        return self.payload_loaded + self.metadata_loaded

    @property
    def matrix_instructions(self) -> float:
        return self.flops / MATRIX_FLOPS


def work_of(schedule: Schedule, lists: Lists, l2_capacity: float = np.inf) -> Work:
    find = query_major_work if schedule.owns == "queries" else key_major_work
    return find(schedule, lists, tiles_of(lists, schedule.tokens), l2_capacity)


def query_major_work(schedule: Schedule, lists: Lists, tiles: Tiles, l2_capacity: float) -> Work:
    case, scale = lists.case, lists.coverage * lists.repeats
    rows = tiles.tokens * group_size(case)
    last_keys = case.kv_len - (lists.num_kv_blocks - 1) * case.kv_block_size
    keys = tiles.blocks * case.kv_block_size - tiles.has_last * (case.kv_block_size - last_keys)
    chunks_per_block = case.kv_block_size // schedule.keys
    pieces = tiles.blocks * chunks_per_block
    # Chunks of the last block that lie behind the last key hold zeros and are not computed on.
    computed = pieces - tiles.has_last * (chunks_per_block + -last_keys // schedule.keys)
    unit_pieces = computed * schedule.units
    if schedule.skips:
        unit_tokens = 16 * schedule.unit_warps // group_size(case)
        chosen = tiles_of(lists, max(1, unit_tokens)).blocks.sum() * max(1, -(-group_size(case) // 16))
        unit_pieces = chosen * chunks_per_block
    missed = keys * miss_rate(tiles.visible * row_pair_bytes(case), l2_capacity)
    return Work(
        ctas=len(tiles.blocks) * scale,
        owned=rows.sum() * scale,
        pieces=pieces.sum() * scale,
        unit_pieces=unit_pieces.sum() * scale,
        items=keys.sum() * scale,
        pairs=(rows * computed).sum() * scale,
        longest=pieces.max(),
        missed=missed.sum() * scale,
    )


def key_major_work(schedule: Schedule, lists: Lists, tiles: Tiles, l2_capacity: float) -> Work:
    case = lists.case
    # Each CTA is a chunk of one block's keys; all chunks of a block have its list.
    num_chunks = -(-case.kv_len // schedule.keys)
    block = np.arange(num_chunks) * schedule.keys // case.kv_block_size
    pieces = tiles.visits[:, block] * lists.coverage
    rows = tiles.visit_tokens[:, block] * group_size(case) * lists.coverage
    # The tiles that may list the block: all whose last token causality lets see it.
    first_query = np.clip(block * case.kv_block_size - (case.kv_len - case.q_len), 0, case.q_len) if case.is_causal else 0
    reach = (case.q_len - first_query) * group_size(case) * row_pair_bytes(case)
    return Work(
        ctas=pieces.size * lists.repeats,
        owned=case.kv_len * len(pieces) * lists.repeats,
        pieces=pieces.sum() * lists.repeats,
        unit_pieces=pieces.sum() * schedule.units * lists.repeats,
        items=rows.sum() * lists.repeats,
        pairs=rows.sum() * lists.repeats,
        longest=pieces.max(),
        missed=(rows * miss_rate(reach, l2_capacity)).sum() * lists.repeats,
    )


def miss_rate(reach, l2_capacity: float):
    """Share of loads that miss if they are spread evenly over `reach` bytes, of which L2 keeps as much as it can."""
    return np.maximum(0.0, 1 - l2_capacity / np.maximum(reach, 1))


def row_pair_bytes(case: Case) -> int:
    """A key and its value, or a query and the gradient of its output."""
    return 2 * case.head_dim * ELEMENT_BYTES


def counts_of(schedule: Schedule, case: Case, work: Work) -> Counts:
    row_bytes = case.head_dim * ELEMENT_BYTES
    metadata = schedule.metadata or Metadata(0, 0)
    unit_rows = schedule.owned // schedule.units
    steps = schedule.walked // schedule.step
    per_step = schedule.shared_products * (unit_rows + schedule.step) + schedule.register_products * schedule.step
    # Each thread of the key-major kernel reads the table's row of each of its columns, a quarter of all.
    is_key_major = schedule.owns == "keys"
    table_loaded = is_key_major * work.unit_pieces * 32 * schedule.unit_warps * (schedule.rows // 4) * TABLE_ROW_BYTES
    table_stored = is_key_major * work.pieces * schedule.rows * TABLE_ROW_BYTES
    products = schedule.shared_products + schedule.register_products
    return Counts(
        payload_loaded=row_bytes * (schedule.owned_arrays * work.owned + 2 * work.items),
        metadata_loaded=metadata.per_cta * work.ctas
        + metadata.per_piece * work.pieces
        + metadata.per_row * work.owned
        + metadata.per_pair * work.pairs,
        global_stored=schedule.written_bytes * work.owned,
        shared_loaded=work.unit_pieces * steps * per_step * row_bytes + table_loaded,
        shared_stored=row_bytes * (schedule.owned_arrays * schedule.owned * work.ctas + 2 * schedule.walked * work.pieces)
        + table_stored,
        flops=work.unit_pieces * products * 2 * unit_rows * schedule.walked * case.head_dim,
    )
