"""How many blocks a tile of neighbouring queries has to walk: unions of their lists, counted for a sample of the tokens."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator

import jax
import numpy as np

import sparse_attn_jax as sa
from sparse_attn_jax.testing import inputs
from sparse_attn_jax.testing.cases import Case

# Of arrays [tiles, lists, blocks]: 8 MiB of int32.
ELEMENTS_PER_CHUNK = 2**21
# What a sample is made of: 256 stretches of 16 successive tokens, one at random in each 256th of the sequence.
STRETCHES = 256
STRETCH_TOKENS = 16
# Schedules that share a tile size share its counts.
CACHED_COUNTS = 64
# How fast queries and keys of realistic lists change along the sequence, as in `workloads.drifting_query_and_key`.
DRIFT_TOKENS = 64
JITTER = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """The block lists of a case, or of stretches of its tokens that stand for all. Two are equal if they are the same object.

    Attributes:
      case: sizes and options. Lists belong to a KV head or are shared by all heads.
      ids: int32 [sequences, stretches, rows, slots]; a row is a query block. What is no block is an empty slot.
      first_row: int [stretches], the query block where each stretch starts.
      repeats: (batch row, KV head) pairs for which each sequence stands.
    """

    case: Case
    ids: np.ndarray
    first_row: np.ndarray
    repeats: int

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.case.kv_len // self.case.kv_block_size)

    @property
    def coverage(self) -> float:
        """Query blocks of a sequence for each one that is listed; 1.0 if all are."""
        return -(-self.case.q_len // self.case.q_block_size) / (self.ids.shape[1] * self.ids.shape[2])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Query tiles, and what they list.

    Attributes:
      tokens: int64 [tiles], tokens of each; the last of a sequence may have fewer.
      blocks: int64 [tiles], size of the union.
      has_last: bool [tiles], whether the union has the last block, which may have fewer keys.
      visible: int64 [tiles], keys up to the last that causality shows to the tile.
      visits: int64 [sequences, num_kv_blocks], tiles that list each block.
      visit_tokens: int64 [sequences, num_kv_blocks], tokens of these tiles.
    """

    tokens: np.ndarray
    blocks: np.ndarray
    has_last: np.ndarray
    visible: np.ndarray
    visits: np.ndarray
    visit_tokens: np.ndarray


@functools.lru_cache(CACHED_COUNTS)
def tiles_of(lists: Lists, tokens: int) -> Tiles:
    """Tiles of `tokens` successive tokens, with the query heads of one KV head."""
    case = lists.case
    visits = np.zeros((lists.ids.shape[0], lists.num_kv_blocks), np.int64)
    visit_tokens = np.zeros_like(visits)
    parts = []
    for runs in runs_of_tiles(lists, tokens, tokens):
        union = runs.chosen.any(axis=1)
        size = runs.size.sum(axis=1)
        visits[runs.sequence] += union.sum(axis=0)
        visit_tokens[runs.sequence] += size @ union
        last = runs.first_position[:, 0] + size - 1 if case.is_causal else np.full_like(size, case.kv_len - 1)
        parts.append((size, union.sum(axis=1), union[:, -1], np.clip(last + 1, 0, case.kv_len)))
    return Tiles(*map(np.concatenate, zip(*parts)), visits, visit_tokens)


@functools.lru_cache(CACHED_COUNTS)
def seen_by_groups(lists: Lists, tokens: int, group_tokens: int, keys: int, key_limit: int) -> int:
    """Pairs of a group of `group_tokens` successive tokens of a tile and a piece of `keys` keys, over all tiles.

    Those where a token of the group chose the block, and causality shows it the piece's first key, which is below `key_limit`.
    """
    total = 0
    for runs in runs_of_tiles(lists, tokens, group_tokens):
        last = runs.first_position + runs.size - 1
        seen = np.where(runs.chosen, pieces_begun(lists.case, last, keys, key_limit), 0)
        groups = np.arange(0, seen.shape[1], max(1, group_tokens // runs.run_tokens))
        total += int(np.maximum.reduceat(seen, groups, axis=1).sum())
    return total


@dataclasses.dataclass(frozen=True)
class Chunks:
    """What slices of tiles walk if each chunk has several blocks: those that a row of the slice sees, in ascending order.

    Attributes:
      chunks: int64 [tiles, slices].
      keys: int64 [tiles, slices], of these blocks.
      seen: pairs of a group of rows and a chunk of which it sees a block, over all slices.
    """

    chunks: np.ndarray
    keys: np.ndarray
    seen: int


def chunks_of_blocks(lists: Lists, tokens: int, group: tuple[int, int], groups_per_slice: int, blocks: int) -> Chunks:
    """`group`: tokens of a group of rows, and how many groups the heads of these tokens are. `blocks`: of a chunk."""
    case, (group_tokens, repeats) = lists.case, group
    chunks, keys, total = [], [], 0
    for runs in runs_of_tiles(lists, tokens, group_tokens):
        groups = np.arange(0, runs.size.shape[1], max(1, group_tokens // runs.run_tokens))
        chosen = np.logical_or.reduceat(runs.chosen, groups, axis=1)
        # A run without tokens ends where the sequence does, or before.
        last = np.maximum.reduceat(np.minimum(runs.first_position + runs.size, case.kv_len) - 1, groups, axis=1)
        seen = chosen & (pieces_begun(case, last, case.kv_block_size, case.kv_len) > 0)
        seen = np.repeat(seen, repeats, axis=1)
        seen = np.pad(seen, [(0, 0), (0, -seen.shape[1] % groups_per_slice), (0, 0)])
        seen = seen.reshape(len(seen), -1, groups_per_slice, lists.num_kv_blocks)
        walked = seen.any(axis=2)
        number = (np.cumsum(walked, axis=2) - walked) // blocks + 1  # of the chunk that the block is in, from 1 on
        highest = np.maximum.accumulate(np.where(seen, number[:, :, None], 0), axis=3)
        total += int(highest[..., 0].sum() + np.diff(highest, axis=3).astype(bool).sum())
        count = walked.sum(axis=2)
        chunks.append(-(-count // blocks))
        keys.append(count * case.kv_block_size - walked[..., -1] * (lists.num_kv_blocks * case.kv_block_size - case.kv_len))
    return Chunks(np.concatenate(chunks), np.concatenate(keys), total)


@functools.lru_cache(CACHED_COUNTS)
def edges_of_groups(lists: Lists, tokens: int, group_tokens: int, keys: int, key_limit: int) -> int:
    """Of the pairs of `seen_by_groups`: those where a token sees a part of the piece."""
    case, total = lists.case, 0
    for runs in runs_of_tiles(lists, tokens, group_tokens, run_tokens=1):
        begun = pieces_begun(case, runs.first_position, keys, key_limit)
        whole = pieces_begun(case, runs.first_position - keys + 1, keys, case.kv_len - keys + 1)
        groups = np.arange(0, runs.size.shape[1], group_tokens)
        for piece in range(case.kv_block_size // keys):
            is_edge = runs.chosen & (whole <= piece) & (piece < begun)
            total += int(np.logical_or.reduceat(is_edge, groups, axis=1).sum())
    return total


def pieces_begun(case: Case, position: np.ndarray, keys: int, key_limit: int) -> np.ndarray:
    """Pieces of each block that start at or before `position` and below `key_limit`: int32 [*position.shape, num_kv_blocks]."""
    block = np.arange(-(-case.kv_len // case.kv_block_size), dtype=np.int32)
    last = np.minimum(position[..., None], key_limit - 1) if case.is_causal else np.int32(key_limit - 1)
    pieces = case.kv_block_size // keys
    return np.broadcast_to(np.clip(last // keys + 1 - block * pieces, 0, pieces), (*position.shape, len(block)))


def visible_pairs(lists: Lists) -> float:
    """(query, key) pairs of listed blocks that causality shows, over all batch rows and query heads."""
    case = lists.case
    pairs = seen_by_groups(lists, 1, 1, 1, case.kv_len)
    return pairs * lists.coverage * lists.repeats * (case.num_q_heads // case.num_kv_heads)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Tiles of one sequence, cut into runs of tokens that share a list.

    Attributes:
      run_tokens: of a run; at the end of a sequence it may have fewer, or none.
      first_position: int32 [tiles, runs], of its first token.
      size: int32 [tiles, runs], its tokens.
      chosen: bool [tiles, runs, num_kv_blocks].
    """

    sequence: int
    run_tokens: int
    first_position: np.ndarray
    size: np.ndarray
    chosen: np.ndarray


def runs_of_tiles(lists: Lists, tokens: int, group_tokens: int, run_tokens: int | None = None) -> Iterator[Runs]:
    """Tiles of `tokens` tokens by chunks. Groups of `group_tokens` tokens, counted from a tile's start, have whole runs."""
    case = lists.case
    num_sequences, num_stretches, num_rows, num_slots = lists.ids.shape
    stretch_tokens = min(num_rows * case.q_block_size, case.q_len)
    if num_stretches > 1 and stretch_tokens % tokens:
        raise ValueError(f"`tokens` is {tokens}; it must divide the {stretch_tokens} tokens of a sample's stretch.")
    run_tokens = run_tokens or math.gcd(tokens, case.q_block_size, group_tokens)
    offsets = np.arange(0, tokens, run_tokens)
    tiles_per_stretch = -(-stretch_tokens // tokens)
    num_tiles = num_stretches * tiles_per_stretch
    tiles_per_chunk = max(1, ELEMENTS_PER_CHUNK // (len(offsets) * lists.num_kv_blocks))
    for sequence in range(num_sequences):
        for start in range(0, num_tiles, tiles_per_chunk):
            tile = np.arange(start, min(start + tiles_per_chunk, num_tiles))
            stretch = tile // tiles_per_stretch
            first = (tile % tiles_per_stretch * tokens)[:, None] + offsets  # in the stretch
            token = (lists.first_row[stretch][:, None] * case.q_block_size + first).astype(np.int32)
            size = np.clip(case.q_len - token, 0, run_tokens)
            row = np.minimum(first // case.q_block_size, num_rows - 1)
            ids = lists.ids[sequence, stretch[:, None], row].astype(np.int64)  # [tiles, runs, slots]
            is_block = (ids >= 0) & (ids < lists.num_kv_blocks) & (size > 0)[..., None]
            chosen = np.zeros((*row.shape, lists.num_kv_blocks + 1), bool)
            np.put_along_axis(chosen, np.where(is_block, ids, lists.num_kv_blocks), True, axis=2)
            yield Runs(sequence, run_tokens, token + case.kv_len - case.q_len, size, chosen[..., :-1])


def lists_of_case(case: Case) -> Lists:
    """Every list of a case, as `testing.inputs` makes them."""
    heads = case.selection_heads or case.num_kv_heads
    if heads not in (1, case.num_kv_heads):
        raise ValueError(
            f"`case.selection_heads` is {heads}; the model knows lists of all heads or of {case.num_kv_heads} KV heads."
        )
    ids = np.asarray(inputs.make_selection(case).indices)
    sequences = ids.shape[0] * ids.shape[1]
    repeats = case.batch * case.num_kv_heads // sequences
    return Lists(case, ids.reshape(sequences, 1, *ids.shape[2:]), np.zeros(1, np.int64), repeats)


def sample_lists(case: Case, generator: str) -> Lists:
    """Lists of single tokens: "random" ones, independent of each other, or "realistic" ones, from a selector."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    per_part = case.q_len // STRETCH_TOKENS // STRETCHES
    if per_part == 0:
        raise ValueError(f"`case.q_len` is {case.q_len}; a sample needs at least {STRETCHES * STRETCH_TOKENS} tokens.")
    first = (np.arange(STRETCHES) * per_part + rng.integers(0, per_part, STRETCHES)) * STRETCH_TOKENS
    draw = dict(random=random_ids, realistic=realistic_ids)[generator]
    ids = draw(rng, case, first).reshape(1, STRETCHES, STRETCH_TOKENS, case.num_slots)
    return Lists(case, ids, first, case.batch * case.num_kv_heads)


def random_ids(rng: np.random.Generator, case: Case, first: np.ndarray) -> np.ndarray:
    """Uniform over the blocks that a token sees: int32 [stretches * STRETCH_TOKENS, slots]."""
    own = (first[:, None] + np.arange(STRETCH_TOKENS)).reshape(-1) // case.kv_block_size
    num_kv_blocks = -(-case.kv_len // case.kv_block_size)
    return inputs.best_blocks(lambda rows: rng.random((len(rows), num_kv_blocks), dtype=np.float32), own, case.num_slots)


def realistic_ids(rng: np.random.Generator, case: Case, first: np.ndarray) -> np.ndarray:
    """InfLLM-v2's selector, with 1 sink and 32 local blocks, on queries and keys that drift: shape as `random_ids`."""
    group_size = case.num_q_heads // case.num_kv_heads

    def drift(length):
        return inputs.drifting_latents(rng, 1, length, case.head_dim, DRIFT_TOKENS, JITTER)[0]

    def add_noise(x):
        return x + np.float32(JITTER) * rng.standard_normal(x.shape, dtype=np.float32)

    key = add_noise(drift(case.kv_len))[None, :, None]  # [1, kv_len, 1, head_dim]
    tokens = first[:, None] + np.arange(STRETCH_TOKENS)
    query = add_noise(drift(case.q_len)[tokens][:, :, None].repeat(group_size, axis=2))
    selector = sa.selectors.InfLLMV2(top_k=case.num_slots)
    compressed, coarse = jax.jit(selector.compress)(key)

    @jax.jit
    def select(query, q_offset):
        return selector.select(query, compressed, coarse, kv_len=case.kv_len, is_causal=True, q_offset=q_offset).indices

    return np.concatenate([np.asarray(select(x[None], offset))[0, 0] for x, offset in zip(query, first)])


def lists_of_density(case: Case, density: float) -> Lists:
    """A list per query block, for all heads the same: its own block, and at random that share of those that it sees."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    own = inputs.own_blocks(
        batch=1, q_len=case.q_len, kv_len=case.kv_len, q_block_size=case.q_block_size, kv_block_size=case.kv_block_size,
        is_causal=case.is_causal, q_offset=None,
    )[0]  # fmt: skip
    count = np.maximum(1, np.round(density * (own + 1))).astype(int)
    ids = np.full((len(own), count.max()), -1, np.int32)
    for row, (last, size) in enumerate(zip(own, count)):
        ids[row, :size] = [last, *rng.choice(last, size - 1, replace=False)] if last else [0]
    return Lists(case, ids[None, None], np.zeros(1, np.int64), case.batch * case.num_kv_heads)
