"""How many blocks a tile of neighbouring queries has to walk: unions of their lists, counted for a sample of the tokens."""

import dataclasses
import math
import zlib
from collections.abc import Iterator

import jax
import numpy as np

import sparse_attn_jax as sa
from sparse_attn_jax.testing import inputs
from sparse_attn_jax.testing.cases import Case

# Tiles whose unions are marked at a time: with 2,048 blocks, 8 MiB.
TILES_PER_CHUNK = 4096
# What a sample is made of: 256 stretches of 16 successive tokens, one at random in each 256th of the sequence.
STRETCHES = 256
STRETCH_TOKENS = 16
# How fast queries and keys of realistic lists change along the sequence, as in `workloads.drifting_query_and_key`.
DRIFT_TOKENS = 64
JITTER = 0.25


@dataclasses.dataclass(frozen=True)
class Lists:
    """The block lists of a case, or of stretches of its tokens that stand for all.

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
    """Query tiles, and their unions.

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


def tiles_of(lists: Lists, tokens: int) -> Tiles:
    """Tiles of `tokens` successive tokens, with the query heads of one KV head."""
    case = lists.case
    visits = np.zeros((lists.ids.shape[0], lists.num_kv_blocks), np.int64)
    visit_tokens = np.zeros_like(visits)
    parts = []
    for sequence, first_token, size, seen in unions(lists, tokens):
        visits[sequence] += seen.sum(0)
        visit_tokens[sequence] += size @ seen
        last_position = first_token + size - 1 + case.kv_len - case.q_len if case.is_causal else case.kv_len - 1
        visible = np.broadcast_to(np.clip(last_position + 1, 0, case.kv_len), size.shape)
        parts.append((size, seen.sum(1), seen[:, -1], visible))
    return Tiles(*map(np.concatenate, zip(*parts)), visits, visit_tokens)


def visible_pairs(lists: Lists) -> float:
    """(query, key) pairs of listed blocks that causality shows, over all batch rows and query heads."""
    case, pairs = lists.case, 0
    start = np.arange(lists.num_kv_blocks) * case.kv_block_size
    for _, token, _, seen in unions(lists, 1):
        end = np.minimum(token[:, None] + case.kv_len - case.q_len + 1, case.kv_len) if case.is_causal else case.kv_len
        pairs += (np.clip(end - start, 0, case.kv_block_size) * seen).sum()
    return float(pairs) * lists.coverage * lists.repeats * (case.num_q_heads // case.num_kv_heads)


def unions(lists: Lists, tokens: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """By chunks of tiles: the sequence, each tile's first token and number of tokens, and bool [tiles, num_kv_blocks]."""
    case = lists.case
    num_sequences, num_stretches, num_rows, num_slots = lists.ids.shape
    stretch_tokens = min(num_rows * case.q_block_size, case.q_len)
    if num_stretches > 1 and stretch_tokens % tokens:
        raise ValueError(f"`tokens` is {tokens}; it must divide the {stretch_tokens} tokens of a sample's stretch.")
    tiles_per_stretch = -(-stretch_tokens // tokens)
    # Tokens of a tile at which another list may start.
    offsets = np.arange(0, tokens, math.gcd(tokens, case.q_block_size))
    for sequence in range(num_sequences):
        for start in range(0, num_stretches * tiles_per_stretch, TILES_PER_CHUNK):
            tile = np.arange(start, min(start + TILES_PER_CHUNK, num_stretches * tiles_per_stretch))
            stretch, first = tile // tiles_per_stretch, tile % tiles_per_stretch * tokens
            first_token = lists.first_row[stretch] * case.q_block_size + first
            size = np.minimum(tokens, case.q_len - first_token)
            row = np.minimum((first[:, None] + offsets) // case.q_block_size, num_rows - 1)
            ids = lists.ids[sequence, stretch[:, None], row].astype(np.int64)  # [tiles, offsets, slots]
            is_block = (ids >= 0) & (ids < lists.num_kv_blocks) & (offsets < size[:, None])[..., None]
            seen = np.zeros((len(tile), lists.num_kv_blocks + 1), bool)
            np.put_along_axis(seen, np.where(is_block, ids, lists.num_kv_blocks).reshape(len(tile), -1), True, axis=1)
            yield sequence, first_token, size, seen[:, :-1]


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
