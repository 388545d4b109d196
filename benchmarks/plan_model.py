"""What building a plan loads and stores in global memory, and the least time that takes: csrc/common/plan.cuh on any device."""

import dataclasses

from benchmarks.devices import Device
from benchmarks.schedules import lists_per_tile, tile_capacity
from sparse_attn_jax.implementations.cuda.planning import MIN_TILES_PER_PART
from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.testing.cases import Case

WORD_BYTES = 4
# As csrc/common/plan.cu and csrc/common/plan.cuh have them.
USUAL_SHARED_BYTES = 48 * 1024
THREADS = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a case's lists, one per query block and KV head.

    Attributes:
      tokens: of a tile, a multiple or a divisor of `q_block_size`.
      entries: blocks of all tiles of a (batch row, KV head).
      pairs: (batch row, KV head) pairs.
    """

    case: Case
    tokens: int
    entries: int
    pairs: int

    @property
    def num_tiles(self) -> int:
        return num_blocks(self.case.q_len, self.tokens)

    @property
    def num_kv_blocks(self) -> int:
        return num_blocks(self.case.kv_len, self.case.kv_block_size)

    @property
    def capacity(self) -> int:
        """Slots of a tile."""
        return tile_capacity(self.case, self.tokens, self.case.num_slots)

    @property
    def num_words(self) -> int:
        """Of the membership of a slot; 0 without."""
        lists = lists_per_tile(self.case, self.tokens)
        return num_blocks(lists, 32) if lists > 1 else 0

    @property
    def num_parts(self) -> int:
        """Of the inversion."""
        tiles = max(MIN_TILES_PER_PART, num_blocks(self.num_kv_blocks, self.capacity))
        return num_blocks(self.num_tiles, tiles)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that all threads load and store."""

    loaded: int
    stored: int


def traffic_of(plan: Plan) -> dict[str, Traffic]:
    """By kernel, in the order of their launches."""
    num_kv_blocks, num_parts = plan.num_kv_blocks, plan.num_parts
    slots, listed = plan.num_tiles * plan.capacity, listed_slots(plan)
    counters = num_parts * num_kv_blocks
    windows = num_blocks(num_kv_blocks, window_blocks(plan))
    # Who marks the blocks reads every list, and who notes the members does so again.
    words = dict(
        plan_unions=(windows * listed * (2 if plan.num_words else 1), slots * (1 + plan.num_words) + plan.num_tiles),
        count_blocks=(slots + plan.entries, counters + plan.entries),
        sum_over_parts=(counters, counters + num_kv_blocks),
        sum_over_blocks=(num_kv_blocks, num_kv_blocks + 1),
        place_entries=(slots + 2 * plan.entries + num_parts * THREADS, 3 * plan.entries + 2 * (slots - plan.entries)),
    )
    return {kernel: Traffic(*(WORD_BYTES * plan.pairs * count for count in counts)) for kernel, counts in words.items()}


def listed_slots(plan: Plan) -> int:
    """Slots of the lists that the tiles read; a list that several tiles share counts for each."""
    case, tokens = plan.case, plan.tokens
    groups = lists_per_tile(case, tokens)
    rows = num_blocks(case.q_len, case.q_block_size)
    row_tokens = tokens // groups
    found = sum(
        (tile * tokens + group * row_tokens) // case.q_block_size < rows
        for tile in range(plan.num_tiles)
        for group in range(groups)
    )
    return found * case.num_slots


def window_blocks(plan: Plan) -> int:
    """Blocks that a CTA marks at a time: as many as the usual shared memory has room for."""
    blocks = num_blocks(plan.num_kv_blocks, 32) * 32
    while blocks > 32 and 2 * 4 * (blocks // 32) + 4 + 4 * blocks * plan.num_words > USUAL_SHARED_BYTES:
        blocks = blocks // 64 * 32
    return max(blocks, 32)


def seconds_of(plan: Plan, device: Device) -> float:
    """At most, of memory: as if L2 kept nothing from one kernel to the next."""
    traffic = traffic_of(plan).values()
    moved = sum(kernel.loaded + kernel.stored for kernel in traffic)
    return moved / device.l2_bytes + moved / device.hbm_bytes
