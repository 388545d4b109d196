"""The operators of Ascend's select_attn_ops against NumPy definitions of their rules, with the window set right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.compat import (
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_block_select_paged_w,
    quest_prefill_metadata,
)
from tests.compat_checks import signature_of
from tests.fast_calls import compile_fast

QUERY = "query, maxblocks, minblocks, metadata_block_tables, seq_lens"
SIGNATURES = {
    quest_prefill_metadata: "k_cache, block_tables, seq_lens, metadata_block_tables, maxblocks, minblocks",
    quest_block_select_paged: f"{QUERY}, k",
    quest_block_select_paged_in_out: f"{QUERY}, selected_indices",
    quest_block_select_paged_w: f"{QUERY}, tokens_since_metadata_update, k",
    quest_block_select_paged_in_out_w: f"{QUERY}, tokens_since_metadata_update, selected_indices",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature_is_the_original(function):
    assert signature_of(function) == SIGNATURES[function]


BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 6, 2, 8


def make_pages(seq_lens, seed=0):
    """Pages of keys, NaN where there is no token, and their table; the keys by request, [len, heads, dim]."""
    rng = np.random.default_rng(seed)
    num_blocks = [-(-length // BLOCK_SIZE) for length in seq_lens]
    pages = np.full((sum(num_blocks) + 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), np.nan, np.float32)
    table = np.full((len(seq_lens), max(num_blocks)), -1, np.int32)
    free, keys = list(rng.permutation(len(pages))), []
    for request, length in enumerate(seq_lens):
        keys.append(rng.standard_normal((length, NUM_KV_HEADS, HEAD_DIM)).astype(np.float32))
        for block in range(num_blocks[request]):
            table[request, block] = page = free.pop()
            tokens = keys[-1][block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
            pages[page, : len(tokens)] = tokens
    return jnp.asarray(pages), jnp.asarray(table), keys


def extrema(key: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = key[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
    return tokens.max(axis=0), tokens.min(axis=0)


def test_metadata_is_its_definition():
    """A partial block, whole metadata blocks, no token; what is of no request stays."""
    seq_lens = (37, 16, 0, 5)
    pages, table, keys = make_pages(seq_lens)
    metadata_table = np.array([[6, 1, 3], [2, 7, 7], [4, 0, 0], [0, 9, -1]], np.int32)
    before = np.random.default_rng(1).standard_normal((2, 9, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)).astype(np.float32)
    wanted = before.copy()
    for request, length in enumerate(seq_lens):
        num_blocks = -(-length // BLOCK_SIZE)
        for row in range(-(-num_blocks // BLOCK_SIZE) * BLOCK_SIZE):
            place = metadata_table[request, row // BLOCK_SIZE], row % BLOCK_SIZE
            wanted[:, *place] = extrema(keys[request], row) if row < num_blocks else 0
    lengths = jnp.asarray(seq_lens, jnp.int32)
    found = compile_fast(quest_prefill_metadata)(pages, table, lengths, jnp.asarray(metadata_table), *jnp.asarray(before))
    np.testing.assert_array_equal(np.stack(found), wanted)


def make_metadata(keys, covered, num_pages_each, seed=3):
    """Metadata of the blocks before `covered` tokens, NaN in the other rows, and its table."""
    table = np.random.default_rng(seed).permutation(len(keys) * num_pages_each).reshape(len(keys), -1).astype(np.int32)
    metadata = np.full((2, table.size, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), np.nan, np.float32)
    for request, (key, length) in enumerate(zip(keys, covered, strict=True)):
        for block in range(-(-length // BLOCK_SIZE)):
            metadata[:, table[request, block // BLOCK_SIZE], block % BLOCK_SIZE] = extrema(key[:length], block)
    return *jnp.asarray(metadata), jnp.asarray(table)


def bound(query: np.ndarray, key: np.ndarray, head: int, block: int) -> float:
    group_size = NUM_HEADS // NUM_KV_HEADS
    mean = query.astype(np.float64)[head * group_size : (head + 1) * group_size].mean(axis=0)
    return sum(max(q * high, q * low) for q, high, low in zip(mean, *(x[head] for x in extrema(key, block)), strict=True))


def definition(query, keys, since, k) -> np.ndarray:
    """Sink and recent blocks, then the best of the others; `since` -1: the best of all."""
    lists = np.full((len(keys), NUM_KV_HEADS, k), -1)
    for request, head in np.ndindex(lists.shape[:2]):
        key, age = keys[request], since[request]
        blocks, forced = range(-(-len(key) // BLOCK_SIZE)), []
        if age >= 0:
            first_recent = (len(key) - age) // BLOCK_SIZE
            forced = [block for block in blocks if block == 0 or block >= first_recent]
        rest = sorted(set(blocks) - set(forced), key=lambda block: -bound(query[request], key, head, block))
        chosen = sorted(forced + rest[: k - len(forced)])
        lists[request, head, : len(chosen)] = chosen
    return lists


def make_query(batch: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(4).standard_normal((batch, NUM_HEADS, HEAD_DIM)), jnp.float32)


def test_selection_by_score_is_its_definition():
    """From all blocks, a partial one included; fewer blocks than slots end in -1."""
    seq_lens, k = (37, 60, 16, 3, 0), 5
    keys, query = make_pages(seq_lens)[2], make_query(len(seq_lens))
    arrays = query, *make_metadata(keys, seq_lens, 4), jnp.asarray(seq_lens, jnp.int32)
    found = compile_fast(lambda *arrays: quest_block_select_paged(*arrays, k))(*arrays)
    np.testing.assert_array_equal(found, definition(np.asarray(query), keys, [-1] * 5, k))
    slots = jax.ShapeDtypeStruct((5, NUM_KV_HEADS, k), jnp.int32)
    same = compile_fast(lambda *arrays: quest_block_select_paged_in_out(*arrays, slots))(*arrays)
    np.testing.assert_array_equal(found, same)


def original_window(seq_len: int, since: int, block_size: int) -> list[int]:
    """The ids that the original writes over the last slots."""
    updated = seq_len - since
    size = (updated % block_size != 0) + seq_len // block_size - updated // block_size
    return [-(-seq_len // block_size) - u for u in range(1, size + 1)]


def test_window_is_right_at_every_length_and_age():
    """Each length up to more than the tables have room for, at each age up to a block; metadata of whole blocks only."""
    room, k = BLOCK_SIZE**3, 5
    lengths = [*range(1, 14), room - 5, room - 1, room, room + 1, room + 2]
    pairs = [(length, since) for length in lengths for since in range(min(length, BLOCK_SIZE) + 1)]
    seq_lens, since = zip(*pairs, strict=True)
    keys, query = make_pages(seq_lens)[2], make_query(len(pairs))
    covered = [(length - age) // BLOCK_SIZE * BLOCK_SIZE for length, age in pairs]
    arrays = query, *make_metadata(keys, covered, 4), jnp.asarray(seq_lens, jnp.int32), jnp.asarray(since, jnp.int32)
    found = np.asarray(compile_fast(lambda *arrays: quest_block_select_paged_w(*arrays, k))(*arrays))
    np.testing.assert_array_equal(found, definition(np.asarray(query), keys, since, k))

    original = [original_window(length, age, BLOCK_SIZE) for length, age in pairs]
    newest = [-(-length // BLOCK_SIZE) - 1 for length in seq_lens]
    own_is_stale = [last >= (length - age) // BLOCK_SIZE for last, (length, age) in zip(newest, pairs, strict=True)]
    misses = [last not in ids and last > 0 for last, ids, stale in zip(newest, original, own_is_stale, strict=True) if stale]
    assert any(misses) and any(-1 in ids for ids in original)
    for last, stale, lists in zip(newest, own_is_stale, found, strict=True):
        assert not stale or (lists == last).any(axis=1).all()


def test_newest_block_one_token_after_an_update_on_its_boundary():
    """129 tokens, blocks of 128: the original leaves out block 1, of which there is no metadata yet."""
    assert original_window(129, 1, 128) == [] and original_window(128, 1, 128) == [0, -1]
    shape = (1, 128, 1, 8)
    metadata = jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((1, 1), jnp.int32)
    arrays = jnp.ones((1, 2, 8)), *metadata, jnp.asarray([129], jnp.int32)
    slots = jax.ShapeDtypeStruct((1, 1, 8), jnp.int32)
    found = compile_fast(lambda *arrays: quest_block_select_paged_in_out_w(*arrays, 1, slots))(*arrays)
    np.testing.assert_array_equal(found, [[[0, 1, -1, -1, -1, -1, -1, -1]]])


def test_absent_blocks_do_not_outdo_negative_scores():
    """Zeros in their place score 0, and the original takes them for blocks."""
    keys = [-np.ones((12, NUM_KV_HEADS, HEAD_DIM), np.float32)]
    high, low, table = make_metadata(keys, [12], 1)
    query = jnp.ones((1, NUM_HEADS, HEAD_DIM))
    assert bound(np.asarray(query[0]), keys[0], 0, 1) < 0
    arrays = query, jnp.nan_to_num(high), jnp.nan_to_num(low), table, jnp.asarray([12], jnp.int32)
    found = compile_fast(lambda *arrays: quest_block_select_paged(*arrays, 2))(*arrays)
    np.testing.assert_array_equal(found, [[[0, 1]] * NUM_KV_HEADS])


@pytest.mark.parametrize("bad_page", [-1, 4, -(2**31), 2**31 - 1])
def test_blocks_of_metadata_that_has_no_page_are_not_chosen_by_score(bad_page):
    """Two of three blocks of metadata have none; zeros in their place would outdo the scores of the others, all negative."""
    shape = (4, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    table = jnp.asarray([[bad_page, 2, bad_page]], jnp.int32)
    lengths = jnp.asarray([3 * BLOCK_SIZE**2], jnp.int32)
    arrays = jnp.ones((1, NUM_HEADS, HEAD_DIM)), jnp.full(shape, -1.0), jnp.full(shape, -2.0), table, lengths
    found = compile_fast(lambda *arrays: quest_block_select_paged(*arrays, 3))(*arrays)
    np.testing.assert_array_equal(found, [[[4, 5, 6]] * NUM_KV_HEADS])


def test_a_negative_length_is_an_empty_request():
    shape = (1, 4, 1, 8)
    metadata = jnp.ones(shape), jnp.ones(shape), jnp.zeros((2, 1), jnp.int32)
    lengths = jnp.asarray([np.iinfo(np.int32).min, -5], jnp.int32)
    select = compile_fast(lambda *arrays: quest_block_select_paged_w(*arrays, 4))
    found = select(jnp.ones((2, 2, 8)), *metadata, lengths, jnp.int32(0))
    np.testing.assert_array_equal(found, np.full((2, 1, 4), -1))


def select_arguments():
    keys = make_pages((9, 5))[2]
    high, low, table = make_metadata(keys, (9, 5), 1)
    tables = dict(metadata_block_tables=table, seq_lens=jnp.asarray([9, 5], jnp.int32))
    return dict(query=make_query(2), maxblocks=high, minblocks=low, **tables, tokens_since_metadata_update=0, k=4)


REFUSED = [
    (dict(query=jnp.ones((2, 5, 8))), r"`query` is float32\[2, 5, 8\]"),
    (dict(query=jnp.ones((2, 6, 7))), "`maxblocks` is"),
    (dict(minblocks=jnp.ones((3, 4, 2, 8))), "`minblocks` is"),
    (dict(metadata_block_tables=jnp.ones((3, 1), jnp.int32)), "`metadata_block_tables` is"),
    (dict(seq_lens=jnp.ones(2)), "`seq_lens` is float32"),
    (dict(seq_lens=[9, 5]), r"`seq_lens` is \[9, 5\]"),
    (dict(query=None), "`query` is None"),
    (dict(minblocks=jnp.ones((1, 4, 2, 8), jnp.bfloat16)), "`minblocks` is bfloat16"),
    (dict(k=0), "`k` is 0"),
    (dict(k=1), "`k` is 1; it must be at least 2"),
    (dict(k=2, tokens_since_metadata_update=3), "`k` is 2; it must be at least 3"),
    (dict(k=2, tokens_since_metadata_update=jnp.int32(0)), "`k` is 2; it must be at least 3"),
    (dict(tokens_since_metadata_update=-2), "`tokens_since_metadata_update` is -2"),
    (dict(tokens_since_metadata_update=jnp.ones(3, jnp.int32)), "`tokens_since_metadata_update` is"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_wrong_arguments_are_refused(change, message):
    call = select_arguments() | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: quest_block_select_paged_w(**call))


def test_wrong_outputs_and_caches_are_refused():
    call = select_arguments()
    del call["k"], call["tokens_since_metadata_update"]
    with pytest.raises(ValueError, match="`selected_indices` is"):
        quest_block_select_paged_in_out(**call, selected_indices=jnp.zeros((2, 3, 8), jnp.int32))
    cache, table = jnp.ones((2, 8, 2, 8)), jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="`maxblocks` is bfloat16.*as `k_cache`"):
        halves = (x.astype(jnp.bfloat16) for x in (cache, cache))
        quest_prefill_metadata(cache, table, call["seq_lens"], table, *halves)
    with pytest.raises(ValueError, match="`maxblocks` is"):
        quest_prefill_metadata(cache, table, call["seq_lens"], table, call["maxblocks"], call["minblocks"])
