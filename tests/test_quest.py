"""Quest and its metadata against their definitions: bounds, what is forced, what is kept up to date, and where it lies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selector_checks

from sparse_attn_jax.api import sparse_attention
from sparse_attn_jax.block_bounds import bound_scores
from sparse_attn_jax.page_tables import read_pages
from sparse_attn_jax.paged_attention import paged_block_sparse_attention
from sparse_attn_jax.paged_cache import PagedKVCache
from sparse_attn_jax.quest_metadata import QuestMetadata
from sparse_attn_jax.selectors.quest import Quest
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import paged
from sparse_attn_jax.testing.methods import quest as definition
from sparse_attn_jax.testing.selection_oracle import assert_same_up_to_rounding

BLOCK, HEADS, DIM = 4, 2, 8
SMALL = Quest(top_k=4, block_size=BLOCK)
GROUPS = {"max": SMALL} | {
    str(group): dataclasses.replace(SMALL, group=group, num_window_blocks=w)
    for group, w in (("mean_bound", "auto"), ("mean_q", 2), (None, 0))
}

compile_fast = functools.partial(jax.jit, compiler_options=dict(xla_backend_optimization_level=0))
refresh = compile_fast(QuestMetadata.refresh)
append = compile_fast(QuestMetadata.append)


@functools.cache
def compiled(selector, is_causal):
    return compile_fast(lambda query, key, q_offset: selector(query, key, is_causal=is_causal, q_offset=q_offset))


@functools.cache
def compiled_select(selector):
    return compile_fast(functools.partial(selector.select))


def options_of(selector):
    window = 0 if selector.num_window_blocks == "auto" else selector.num_window_blocks
    sinks = selector.num_sink_blocks
    return dict(top_k=selector.top_k, block_size=selector.block_size, group=selector.group, num_sinks=sinks, num_window=window)


def random_keys(batch, length, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, length, HEADS, DIM)), dtype)


def random_query(seed=9):
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal((2, 1, 4, DIM)), jnp.float32)


def create(batch, max_len, block_size=BLOCK, dtype="float32"):
    sizes = dict(batch=batch, max_len=max_len, num_kv_heads=HEADS, head_dim=DIM)
    empty = QuestMetadata.create(**sizes, block_size=block_size, dtype=dtype)
    # What was never written must not matter.
    return dataclasses.replace(empty, maximum=empty.maximum + jnp.nan, minimum=empty.minimum - 7)


def assert_covers(metadata, key, length, row=0):
    """What lies in a row of the batch are the extrema of the first `length` of its keys."""
    assert metadata.covered_len[row] == length
    extrema = metadata.maximum, metadata.minimum
    if metadata.block_tables is not None:
        extrema = (read_pages(x, metadata.block_tables)[0] for x in extrema)
    for found, wanted in zip(extrema, definition.extrema(np.asarray(key)[row], length, metadata.block_size)):
        np.testing.assert_array_equal(np.asarray(found, np.float64)[row, : len(wanted)], wanted)


# ---- the selector of query and key


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_selection_matches_definition(name, is_causal):
    selector = GROUPS[name]
    query, key = selector_checks.make_inputs(23, 37, num_q_heads=6, head_dim=DIM, batch=2)
    found = compiled(selector, is_causal)(query, key, None)
    wanted, scores = definition.select_all(query, key, 14 + np.arange(23), causal=is_causal, **options_of(selector))
    assert found.q_block_size == 1 and found.kv_block_size == BLOCK
    assert_same_up_to_rounding(np.asarray(found.indices), wanted, scores)
    wrong, _ = definition.select_all(query, key, 13 + np.arange(23), causal=is_causal, **options_of(selector))
    if is_causal or selector.num_window_blocks == 2:
        with pytest.raises(AssertionError):
            assert_same_up_to_rounding(np.asarray(found.indices), wrong, scores)


@pytest.mark.parametrize("kv_len", [1, 4, 5])
def test_short_sequences_see_all_their_past(kv_len):
    query, key = selector_checks.make_inputs(kv_len, kv_len, head_dim=DIM)
    selector = lambda query, key, is_causal: compiled(SMALL, is_causal)(query, key, None)
    mask = selector_checks.select_mask(selector, query, key, is_causal=True)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.tri(kv_len, dtype=bool), mask.shape))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_offsets_of_any_kind(is_causal):
    """Several chunks of queries, an offset per sequence, queries before and after all keys."""
    selector = dataclasses.replace(SMALL, block_size=2)
    query, key = selector_checks.make_inputs(700, 40, num_q_heads=2, head_dim=DIM, batch=2)
    offsets = (-9, 3)
    found = np.asarray(compiled(selector, is_causal)(query, key, jnp.array(offsets)).indices)
    for row, offset in enumerate(offsets):
        positions = offset + np.array([0, 5, 9, 15, 33, 699])
        part = query[row : row + 1, positions - offset]
        options = options_of(selector)
        wanted, scores = definition.select_all(part, key[row : row + 1], positions, causal=is_causal, **options)
        assert_same_up_to_rounding(found[row : row + 1][:, :, positions - offset], wanted, scores)


def test_no_queries_give_no_lists():
    query, key = selector_checks.make_inputs(0, 12, head_dim=DIM)
    assert SMALL(query, key, is_causal=True).indices.shape == (1, 2, 0, 4)


def test_later_tokens_change_nothing():
    selector = lambda query, key, is_causal: compiled(SMALL, is_causal)(query, key, None)
    selector_checks.assert_later_tokens_change_nothing(selector, 50, lasts=(0, 3, 4, 30, 48), head_dim=DIM)


def test_later_tokens_do_change_what_is_not_causal():
    query, key = selector_checks.make_inputs(50, 50, head_dim=DIM)
    lists = [compiled(SMALL, False)(query, x, None).indices for x in (key, key.at[:, 30:].multiply(-5.0))]
    assert np.any(lists[0][:, :, :30] != lists[1][:, :, :30])


def test_chunks_see_what_the_whole_sees():
    selector = lambda query, key, is_causal: compiled(SMALL, is_causal)(query, key, None)
    selector_checks.assert_chunks_see_what_the_whole_sees(selector, 30, starts=(0, 1, 10))


def test_attention_is_that_of_the_definition():
    query, key = selector_checks.make_inputs(20, 31, head_dim=DIM)
    value = random_keys(1, 31, seed=5)
    positions = 11 + np.arange(20)
    lists, _ = definition.select_all(query, key, positions, **options_of(SMALL))
    mask = definition.visible_mask(lists, positions, BLOCK, 4, 31)
    out = compile_fast(functools.partial(sparse_attention, selector=SMALL, is_causal=True))(query, key, value)
    np.testing.assert_allclose(out, oracle.attention(mask, query, key, value)[0], rtol=1e-4, atol=1e-5)


def test_every_block_is_dense():
    query, key = selector_checks.make_inputs(21, 21, head_dim=DIM)
    every = dataclasses.replace(SMALL, top_k=6)
    selector = lambda query, key, is_causal: compiled(every, is_causal)(query, key, None)
    mask = selector_checks.select_mask(selector, query, key, is_causal=True)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.tri(21, dtype=bool), mask.shape))


# ---- the bound


@pytest.mark.parametrize("group", ["max", None])
def test_bound_is_at_least_every_product(group):
    """It is the product itself for blocks of one token."""
    query, key = selector_checks.make_inputs(50, 64, num_q_heads=6, head_dim=DIM)
    products = np.einsum("qhd,jhd->hjq", np.asarray(query[0]), np.asarray(key[0]).repeat(3, axis=1))
    for block_size in (1, 16):
        bounds = jnp.concatenate([jnp.asarray(x)[None] for x in definition.extrema(key[0], 64, block_size)], axis=-1)
        scores = np.asarray(bound_scores(query, bounds, group))  # [1, heads, blocks, queries]
        largest = products.reshape(6, -1, block_size, 50).max(axis=2)
        largest = largest if group is None else largest.reshape(2, 3, -1, 50).max(axis=1)
        assert np.all(scores[0] >= largest - 1e-4)
        assert (block_size == 1) == bool(np.all(scores[0] <= largest + 1e-4))


def test_opposite_heads_cancel_in_the_mean_query_only():
    """Both heads want key 9, one with its largest product and one with its smallest."""
    key = jnp.zeros((1, 16, 1, DIM)).at[0, 9].set(3.0)
    query = jnp.ones((1, 16, 2, DIM)) * jnp.array([1.0, -1.0])[:, None]
    lists = {}
    for group in ("max", "mean_bound", "mean_q"):
        selector = Quest(top_k=3, block_size=4, group=group)
        lists[group] = compiled(selector, True)(query, key, None).indices[0, 0, -1].tolist()
    assert lists == {"max": [0, 2, 3], "mean_bound": [0, 2, 3], "mean_q": [0, 1, 3]}


def test_nan_is_chosen_last_and_ties_go_to_the_lower_id():
    key = jnp.zeros((1, 24, 1, DIM)).at[0, 5].set(jnp.nan)
    query = jnp.ones((1, 24, 1, DIM))
    selectors = [Quest(top_k=k, block_size=4) for k in (4, 6)]
    lists = [compiled(selector, True)(query, key, None).indices[0, 0, -1].tolist() for selector in selectors]
    assert lists == [[0, 2, 3, 5], [0, 2, 3, 4, 5, -1]]


# ---- selection for decoding


def near_multiples(limit=3 * BLOCK + 2):
    return [(seq, covered) for seq in range(1, limit) for covered in range(seq + 1)]


def forced_by(select, pairs, top_k=8):
    """The blocks that are kept whatever the scores, for each (seq, covered): those that a query of NaN selects."""
    seqs, covered = (jnp.array(x, jnp.int32) for x in zip(*pairs))
    metadata = dataclasses.replace(create(len(pairs), 4 * BLOCK), covered_len=covered)
    query = jnp.full((len(pairs), 1, HEADS, DIM), jnp.nan)
    return [set(ids[0, 0].tolist()) - {-1} for ids in np.asarray(select(query, metadata, seqs, seqs - covered))]


def assert_no_holes(forced, pairs):
    """Every block of which some token is newer than the metadata is kept, and what is kept exists."""
    for (seq, covered), found in zip(pairs, forced):
        newer = {token // BLOCK for token in range(covered // BLOCK * BLOCK, seq)}
        assert newer <= found <= set(range(-(-seq // BLOCK))), (seq, covered, found)


@pytest.mark.parametrize("is_told", [False, True], ids=["by covered_len", "by tokens_since_update"])
def test_forced_blocks_are_those_newer_than_the_metadata(is_told):
    selector = dataclasses.replace(SMALL, top_k=8)

    def select(query, metadata, seqs, since):
        if is_told:
            metadata = dataclasses.replace(metadata, covered_len=seqs)
        return compiled_select(selector)(query, metadata, seq_lens=seqs, tokens_since_update=since if is_told else None)

    pairs = near_multiples()
    forced = forced_by(select, pairs)
    assert_no_holes(forced, pairs)
    assert forced == [definition.forced_blocks(seq - 1, covered, BLOCK) for seq, covered in pairs]


def test_the_original_window_leaves_holes():
    """The check above notices the formula of Ascend's operator. Where the metadata ends with a block and the sequence does not,
    it misses the first block after the metadata, unless that is the sink; where it is the other way round, it may list -1."""
    wrong = []
    for seq, covered in near_multiples():
        try:
            assert_no_holes([definition.original_forced_blocks(seq, seq - covered, BLOCK)], [(seq, covered)])
        except AssertionError:
            wrong.append((seq, covered))
    holes = [(seq, covered) for seq, covered in near_multiples() if covered and covered % BLOCK == 0 and seq % BLOCK]
    outside = [(seq, covered) for seq, covered in near_multiples() if seq % BLOCK == 0 and 0 < covered < BLOCK]
    assert (BLOCK + 1, BLOCK) in holes and sorted(wrong) == sorted(holes + outside)


def test_num_window_blocks_are_kept_besides():
    selector = dataclasses.replace(SMALL, top_k=8, num_window_blocks=2, num_sink_blocks=0)
    metadata = create(2, 40).build(random_keys(2, 40), jnp.array([40, 22]))
    seqs = jnp.array([38, 37], jnp.int32)
    ids = compiled_select(selector)(jnp.full((2, 1, HEADS, DIM), jnp.nan), metadata, seq_lens=seqs)
    assert [set(row[0, 0].tolist()) - {-1} for row in np.asarray(ids)] == [{8, 9}, {5, 6, 7, 8, 9}]


def test_more_new_blocks_than_room_keeps_the_newest():
    metadata = create(1, 40)
    ids = compiled_select(SMALL)(jnp.ones((1, 1, HEADS, DIM)), metadata, seq_lens=jnp.array([37], jnp.int32))
    assert ids[0, 0, 0].tolist() == [0, 7, 8, 9]


def test_negative_tokens_since_update_forces_nothing():
    key = random_keys(2, 40)
    metadata = create(2, 40).build(key, jnp.array([18, 24]))
    query = random_query()
    found = np.asarray(
        compiled_select(SMALL)(query, metadata, seq_lens=jnp.array([22, 24], jnp.int32), tokens_since_update=jnp.array([-1, 3]))
    )
    maximum, minimum = definition.extrema(np.asarray(key)[0], 18, BLOCK)
    scores = definition.score(query[0, 0], maximum, minimum, "max")
    wanted = [definition.select(row, set(), set(range(5)), 4) for row in scores]
    np.testing.assert_array_equal(found[0, :, 0], wanted)
    assert all({0, 5} <= set(row) for row in found[1, :, 0].tolist())


@pytest.mark.parametrize("name", GROUPS)
def test_decoding_selects_what_prefill_selects(name):
    """Token by token, and three speculated tokens at a time, with metadata of every layout."""
    selector = GROUPS[name]
    query, key = selector_checks.make_inputs(34, 34, num_q_heads=4, head_dim=DIM)
    whole = np.asarray(compiled(selector, True)(query, key, None).indices)
    _, scores = definition.select_all(query, key, np.arange(34), **options_of(selector))
    metadata = create(1, 48)
    for position in range(34):
        metadata = append(metadata, key[:, position : position + 1])
        length = jnp.array([position + 1], jnp.int32)
        found = compiled_select(selector)(query[:, position : position + 1], metadata, seq_lens=length)
        assert_same_up_to_rounding(
            np.asarray(found), whole[:, :, position : position + 1], scores[:, :, position : position + 1]
        )
        if position >= 2:
            last = slice(position - 2, position + 1)
            found = compiled_select(selector)(query[:, last], metadata, seq_lens=length)
            assert_same_up_to_rounding(np.asarray(found), whole[:, :, last], scores[:, :, last])


def test_lists_take_the_place_of_a_donated_buffer():
    metadata = create(2, 40).build(random_keys(2, 40), 40)
    query, seqs = jnp.ones((2, 1, 4, DIM)), jnp.array([40, 17], jnp.int32)
    out = jnp.full((2, HEADS, 1, 4), -5, jnp.int32)
    wanted = compiled_select(SMALL)(query, metadata, seq_lens=seqs)
    step = lambda out, query, metadata, seqs: SMALL.select(query, metadata, seq_lens=seqs, out=out)
    step = jax.jit(step, donate_argnums=0).lower(out, query, metadata, seqs).compile()
    assert step.memory_analysis().alias_size_in_bytes >= out.nbytes
    address = out.unsafe_buffer_pointer()
    found = step(out, query, metadata, seqs)
    np.testing.assert_array_equal(found, wanted)
    assert found.unsafe_buffer_pointer() == address


# ---- metadata


def test_refresh_equals_rebuild_for_every_pair():
    """One row of the batch for each (sequence, refresh) pair near multiples of the block."""
    pairs = near_multiples()
    key = random_keys(len(pairs), 4 * BLOCK)
    seqs, starts = (jnp.array(x, jnp.int32) for x in zip(*pairs))
    metadata = refresh(create(len(pairs), 4 * BLOCK), key, None, starts)
    metadata = refresh(metadata, key, None, seqs)
    for row, (seq, _) in enumerate(pairs):
        assert_covers(metadata, key, seq, row)


def test_appending_equals_rebuild():
    key = random_keys(2, 14)
    metadata = create(2, 12).build(key[:, :12], jnp.array([5, 0]))
    for step in range(3):
        new = jnp.stack([key[0, 5 + 3 * step : 8 + 3 * step], key[1, 3 * step : 3 * step + 3]])
        metadata = append(metadata, new, jnp.array([True, step != 1]))
        if step == 0:
            assert_covers(metadata, key, 8, 0)
            assert_covers(metadata, key, 3, 1)
    assert metadata.covered_len.tolist() == [12, 6]
    assert_covers(metadata, key, 12, 0)


def test_refresh_of_a_changed_range_reads_only_its_blocks():
    key = random_keys(1, 30)
    metadata = create(1, 40).build(key, 30)
    changed = key.at[:, 9:14].multiply(-3.0)
    assert_covers(refresh(metadata, changed, 9, 14), changed, 30)
    poisoned = changed.at[:, :8].set(jnp.nan).at[:, 16:].set(jnp.nan)
    found = refresh(metadata, poisoned, 9, 14)
    np.testing.assert_array_equal(found.maximum[:, :8], refresh(metadata, changed, 9, 14).maximum[:, :8])


def test_a_gap_is_not_covered():
    key = random_keys(1, 30)
    metadata = refresh(create(1, 40).build(key, 6), key, 12, 20)
    assert metadata.covered_len.tolist() == [6]
    assert_covers(refresh(metadata, key, 6, 12), key, 12)


def test_reset_forgets_one_sequence():
    key = random_keys(3, 20)
    metadata = create(3, 20).build(key, jnp.array([20, 11, 7]))
    other = key.at[1].multiply(-1.0)
    metadata = refresh(metadata.reset(1), other, None, jnp.array([20, 9, 7]))
    for row, length in enumerate((20, 9, 7)):
        assert_covers(metadata, other, length, row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [4, 8, 2], ids=["page", "two pages", "part of a page"])
def test_paged_metadata_of_paged_keys(block_size, dtype):
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.permutation(14)[:12].reshape(2, 6), jnp.int32)
    key = random_keys(2, 24, dtype=dtype)
    pools = jnp.asarray(paged.in_pages(np.asarray(key), tables, np.full((14, 4, HEADS, DIM), np.nan, key.dtype)))
    meta_tables = jnp.array([[4, 0, 2, 6, 9, 10], [3, 1, 5, 7, 8, 11]], jnp.int32)
    sizes = dict(num_pages=12, rows=3, num_kv_heads=HEADS, head_dim=DIM, block_size=block_size, dtype=dtype)
    metadata = QuestMetadata.create_paged(meta_tables, **sizes)
    metadata = refresh(metadata, pools, None, jnp.array([13, 7]), block_tables=tables)
    metadata = refresh(metadata, pools, None, jnp.array([22, 8]), block_tables=tables)
    assert_covers(metadata, key, 22, 0)
    assert_covers(metadata, key, 8, 1)
    metadata = append(metadata, key[:, 22:23], jnp.array([True, False]))
    assert_covers(metadata, key, 23, 0)
    selector = dataclasses.replace(SMALL, block_size=block_size, top_k=3)
    query, seqs = random_query(), jnp.array([23, 9], jnp.int32)
    dense = create(2, 24, block_size, dtype).build(key, jnp.array([23, 8]))
    np.testing.assert_array_equal(*(compiled_select(selector)(query, x, seq_lens=seqs) for x in (metadata, dense)))


def test_metadata_in_the_pool_of_the_keys():
    """Keys, values and metadata share pages; a step of decoding updates all of them in place."""
    sizes = dict(num_pages=2000, page_size=BLOCK, num_kv_heads=HEADS, head_dim=DIM, batch=2, max_pages_per_sequence=6)
    cache = PagedKVCache.create(**sizes).assign(0, [7, 3, 9, 1, 4, 5]).assign(1, [0, 2, 11, 12, 13, 14])
    meta_tables = jnp.array([[6, 15], [8, 10]], jnp.int32)
    key, value = random_keys(2, 24), random_keys(2, 24, seed=1)

    def step(cache, covered_len, key, value):
        cache = cache.append(key, value)
        metadata = QuestMetadata.in_pool(cache, meta_tables, covered_len)
        metadata = metadata.refresh(None, None, cache.lengths, block_tables=cache.block_tables)
        return metadata.to_pool(cache), metadata.covered_len

    arguments = cache, jnp.zeros((2,), jnp.int32), key[:, :1], value[:, :1]
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.key_pages.nbytes / 4
    covered_len = arguments[1]
    for i in range(22):
        cache, covered_len = compiled(cache, covered_len, key[:, i : i + 1], value[:, i : i + 1])
    metadata = QuestMetadata.in_pool(cache, meta_tables, covered_len)
    for row in range(2):
        assert_covers(metadata, key, 22, row)
    contents = paged.contiguous(cache.key_pages, cache.block_tables)
    np.testing.assert_array_equal(contents[:, :22], key[:, :22])
    query = random_query()
    options = dict(selection_block_size=BLOCK)
    pools = cache.key_pages, cache.value_pages, cache.block_tables, cache.lengths
    ids = compiled_select(SMALL)(query, metadata, seq_lens=cache.lengths)
    out = compile_fast(functools.partial(paged_block_sparse_attention, **options))(query, *pools, ids)
    np.testing.assert_allclose(out, paged.paged_attention(query, *pools, ids, **options)[0], rtol=1e-4, atol=1e-5)


def test_refresh_writes_in_place():
    metadata = create(2, 40_000)
    key = random_keys(2, 40_000)
    compiled = jax.jit(QuestMetadata.refresh, donate_argnums=0).lower(metadata, key, None, 40_000).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < metadata.maximum.nbytes / 4


@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1])
def test_metadata_pages_that_are_none_are_neither_written_nor_chosen(bad):
    tables = jnp.array([[0, bad, 2]], jnp.int32)
    metadata = QuestMetadata.create_paged(tables, num_pages=9, rows=2, num_kv_heads=HEADS, head_dim=DIM, block_size=BLOCK)
    before = metadata.maximum
    metadata = metadata.build(random_keys(1, 24) + 9, 24)
    written = np.any(np.asarray(metadata.maximum != before), axis=(1, 2, 3))
    assert written.nonzero()[0].tolist() == [0, 2]
    select = compiled_select(Quest(top_k=6, block_size=BLOCK))
    ids = select(jnp.ones((1, 1, 2, DIM)), metadata, seq_lens=jnp.array([24], jnp.int32))
    assert set(ids[0, 0, 0].tolist()) == {0, 1, 4, 5, -1}


def test_metadata_of_a_longer_sequence_is_guarded():
    """More is covered than there is: only blocks before the query's own are scored."""
    metadata = create(1, 40).build(random_keys(1, 40), 40)
    ids = compiled_select(SMALL)(jnp.ones((1, 1, 4, DIM)), metadata, seq_lens=jnp.array([9], jnp.int32))
    assert ids[0, 0, 0].tolist() == [0, 1, 2, -1]
    ids = compiled_select(SMALL)(jnp.ones((1, 1, 4, DIM)), metadata, seq_lens=jnp.array([10**9], jnp.int32))
    assert np.all(np.asarray(ids) < 10) and 9 in np.asarray(ids[0, 0, 0])


# ---- bad input

METADATA = create(2, 40)
QUERY = jnp.ones((2, 1, 4, DIM))
LENGTHS = jnp.array([3, 4], jnp.int32)


def select(selector=SMALL, query=QUERY, metadata=METADATA, seq_lens=LENGTHS, **options):
    return selector.select(query, metadata, seq_lens=seq_lens, **options)


BAD_CALLS = {
    "top_k": (lambda: Quest(top_k=1), "`top_k`"),
    "sinks": (lambda: Quest(top_k=4, num_sink_blocks=4), "`top_k`"),
    "block size": (lambda: Quest(top_k=4, block_size=0), "`block_size`"),
    "group": (lambda: Quest(top_k=4, group="sum"), "`group`.*mean_q"),
    "window": (lambda: Quest(top_k=4, num_window_blocks="all"), "`num_window_blocks`.*auto"),
    "window int": (lambda: Quest(top_k=4, num_window_blocks=-1), "`num_window_blocks`"),
    "window too large": (lambda: Quest(top_k=4, num_window_blocks=4), "`top_k`"),
    "query": (lambda: SMALL(QUERY[0], random_keys(2, 8)), "`query`"),
    "key heads": (lambda: SMALL(QUERY[:, :, :3], random_keys(2, 8)), "`query` has 3 heads"),
    "select heads": (lambda: select(query=QUERY[:, :, :3]), "`query` has 3 heads.*metadata's 2"),
    "select metadata": (lambda: select(metadata=random_keys(2, 8)), "`metadata`"),
    "select batch": (lambda: select(metadata=create(3, 40)), "`metadata` has batch 3"),
    "select block size": (lambda: select(metadata=create(2, 40, 8)), "`metadata` has block_size 8.*4"),
    "select head_dim": (lambda: select(query=QUERY[..., :4]), "`metadata` has head_dim 8"),
    "select lengths": (lambda: select(seq_lens=LENGTHS[:1]), "`seq_lens`"),
    "select since": (lambda: select(tokens_since_update=1.0), "`tokens_since_update`"),
    "select out": (lambda: select(out=jnp.zeros((2, 2, 1, 5), jnp.int32)), "`out`.*2, 2, 1, 4"),
    "too many keys": (lambda: METADATA.build(random_keys(2, 41), 41), "`key`.*at most 40 tokens"),
    "key batch": (lambda: METADATA.build(random_keys(3, 8), 8), "`key`"),
    "key dtype": (lambda: METADATA.build(random_keys(2, 8, dtype="bfloat16"), 8), "`key`.*float32"),
    "no pool": (lambda: METADATA.build(None, 8), "`key`.*block_tables"),
    "key tables": (lambda: METADATA.build(random_keys(2, 8), 8, block_tables=LENGTHS), "`block_tables`"),
    "end": (lambda: METADATA.refresh(random_keys(2, 8), None, 8.0), "`end`"),
    "lengths": (lambda: METADATA.build(random_keys(2, 8), 8.0), "`seq_lens`"),
    "start": (lambda: METADATA.refresh(random_keys(2, 8), jnp.zeros((3,), jnp.int32), 8), "`start`"),
    "append": (lambda: METADATA.append(random_keys(2, 1)[:, 0]), "`key`"),
    "append active": (lambda: METADATA.append(random_keys(2, 1), jnp.ones(2)), r"`active` is float32\[2\]"),
    "append actives": (lambda: METADATA.append(random_keys(2, 1), jnp.ones(3, bool)), r"`active` is bool\[3\]"),
    "reset": (lambda: METADATA.reset(0.5), "`sequence` is 0.5"),
    "pool": (lambda: QuestMetadata.in_pool(METADATA, METADATA.block_tables, LENGTHS), "`cache` is"),
    "meta tables": (lambda: QuestMetadata.create_paged(LENGTHS, num_pages=1, rows=1, num_kv_heads=1, head_dim=1),
                    "`block_tables`"),
    "too long": (lambda: QuestMetadata.create(batch=1, max_len=2**30 + 1, num_kv_heads=1, head_dim=1), "`max_len`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_named(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_pool_of_other_values_cannot_hold_metadata():
    sizes = dict(num_pages=4, page_size=2, num_kv_heads=1, head_dim=4, value_head_dim=2, batch=1, max_pages_per_sequence=2)
    with pytest.raises(ValueError, match="`cache.value_pages`"):
        QuestMetadata.in_pool(PagedKVCache.create(**sizes), jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32))
