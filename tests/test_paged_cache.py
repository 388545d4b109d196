"""PagedKVCache: what is written where, in place, and what is dropped; PageAllocator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.paged_cache import OutOfPagesError, PageAllocator, PagedKVCache

PAGE, HEADS, DIM, VALUE_DIM = 4, 2, 3, 5


def make_cache(tables=((5, 0, 2), (1, 6, 3)), lengths=(0, 0), dtype="float32", num_pages=8):
    tables = jnp.array(tables, jnp.int32)
    sizes = dict(num_pages=num_pages, page_size=PAGE, num_kv_heads=HEADS, head_dim=DIM, value_head_dim=VALUE_DIM, dtype=dtype)
    cache = PagedKVCache.create(**sizes, batch=len(tables), max_pages_per_sequence=tables.shape[1])
    return dataclasses.replace(cache, block_tables=tables, lengths=jnp.array(lengths, jnp.int32))


def tokens(*shape, seed=0, dtype="float32"):
    """Keys and values [*shape, heads, dim], none of them 0."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(1 + rng.random((*shape, HEADS, dim)), dtype) for dim in (DIM, VALUE_DIM))


def write_each(cache, rows, positions, key, value):
    """The pools after writing token by token: rows and positions of the tokens of key [n, ...] and value."""
    pools = np.array(cache.key_pages), np.array(cache.value_pages)
    tables = np.array(cache.block_tables)
    for token, (row, position) in enumerate(zip(rows, positions)):
        if not 0 <= position < tables.shape[1] * PAGE:
            continue
        page = tables[row, position // PAGE]
        if 0 <= page < len(pools[0]):
            for pool, new in zip(pools, (key, value)):
                pool[page, position % PAGE] = new[token]
    return pools


def assert_pools(cache, pools):
    np.testing.assert_array_equal(np.asarray(cache.key_pages), pools[0])
    np.testing.assert_array_equal(np.asarray(cache.value_pages), pools[1])


append = jax.jit(PagedKVCache.append)
prefill = jax.jit(PagedKVCache.prefill)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_new", [1, 3])
def test_append_writes_through_the_table(dtype, num_new):
    cache = make_cache(lengths=(0, 3), dtype=dtype)
    for step in range(4):
        key, value = tokens(2, num_new, seed=step, dtype=dtype)
        lengths = np.asarray(cache.lengths)
        where = [(b, lengths[b] + i) for b in range(2) for i in range(num_new)]
        flat = (np.asarray(x).reshape(-1, *x.shape[2:]) for x in (key, value))
        pools = write_each(cache, *zip(*where), *flat)
        cache = append(cache, key, value)
        assert_pools(cache, pools)
        np.testing.assert_array_equal(cache.lengths, np.minimum(lengths + num_new, 3 * PAGE))


def test_inactive_sequences_stay_as_they_are():
    cache = make_cache(lengths=(2, 3))
    key, value = tokens(2, 1)
    after = append(cache, key, value, jnp.array([False, True]))
    assert_pools(after, write_each(cache, [1], [3], np.asarray(key[1]), np.asarray(value[1])))
    assert after.lengths.tolist() == [2, 4]


def test_tokens_beyond_the_table_are_dropped_and_lengths_stop():
    cache = make_cache(lengths=(11, 10**9))
    key, value = tokens(2, 3)
    after = append(cache, key, value)
    assert_pools(after, write_each(cache, [0], [11], np.asarray(key[0]), np.asarray(value[0])))
    assert after.lengths.tolist() == [12, 12]


@pytest.mark.parametrize("bad", [-1, -2, 8, 2**31 - 1, -(2**31)])
def test_what_is_no_page_drops_the_write(bad):
    cache = make_cache(tables=((5, bad, 2), (1, 6, bad)), lengths=(3, 8))
    key, value = tokens(2, 2)
    after = append(cache, key, value)
    assert_pools(after, write_each(cache, [0], [3], np.asarray(key[0]), np.asarray(value[0])))
    assert after.lengths.tolist() == [5, 10]


def test_negative_lengths_count_as_zero():
    key, value = tokens(2, 1)
    assert append(make_cache(lengths=(-5, 0)), key, value).lengths.tolist() == [1, 1]


@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 5), (3, 4), (0, 0), (9, 7), (0, 99), (-3, 2)])
def test_prefill_writes_one_sequence(start, length):
    cache = make_cache(lengths=(7, 2))
    key, value = tokens(7)
    after = prefill(cache, jnp.int32(1), key, value, start=start, length=length)
    count = 7 if length is None else min(length, 7)
    begin = max(start, 0)
    where = range(begin, begin + count)
    assert_pools(after, write_each(cache, [1] * count, where, np.asarray(key), np.asarray(value)))
    assert after.lengths.tolist() == [7, min(begin + count, 12)]


def test_prefill_of_no_sequence_changes_nothing():
    cache = make_cache(lengths=(7, 2))
    for sequence in (-1, 2, 2**31 - 1):
        after = prefill(cache, sequence, *tokens(7))
        jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_prefill_in_chunks_equals_one_and_equals_appending():
    key, value = tokens(10)
    cache = make_cache()
    whole = prefill(cache, 0, key, value)
    chunks = prefill(prefill(cache, 0, key[:5], value[:5]), 0, key[5:], value[5:], start=5)
    one_by_one = cache
    for i in range(10):
        new = (jnp.stack([x[i], x[i]])[:, None] for x in (key, value))
        one_by_one = append(one_by_one, *new, jnp.array([True, False]))
    for other in (chunks, one_by_one):
        jax.tree.map(np.testing.assert_array_equal, other, whole)


def test_assign_gives_pages_and_makes_empty():
    cache = make_cache(lengths=(7, 2)).assign(0, [4, 7])
    assert cache.block_tables.tolist() == [[4, 7, -1], [1, 6, 3]] and cache.lengths.tolist() == [0, 2]
    row = jax.jit(PagedKVCache.assign)(cache, 0, jnp.array([4, 7, -1], jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, row, cache)
    assert cache.assign(1, []).block_tables.tolist() == [[4, 7, -1], [-1, -1, -1]]
    jax.tree.map(np.testing.assert_array_equal, cache.assign(-1, [1]), cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["append", "prefill"])
def test_donated_pool_is_written_in_place(name, dtype):
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.skip("JAX 0.10 copies what it writes 16-bit floats to, on a CPU")
    cache = make_cache(dtype=dtype, num_pages=4096)
    arguments = tokens(2, 2, dtype=dtype) if name == "append" else (1, *tokens(6, dtype=dtype))
    compiled = jax.jit(getattr(PagedKVCache, name), donate_argnums=0).lower(cache, *arguments).compile()
    pool_bytes = cache.key_pages.nbytes + cache.value_pages.nbytes
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= pool_bytes
    assert analysis.temp_size_in_bytes < cache.key_pages.nbytes / 50
    address = cache.key_pages.unsafe_buffer_pointer()
    assert compiled(cache, *arguments).key_pages.unsafe_buffer_pointer() == address


def test_copy_of_the_pool_would_be_seen():
    cache = make_cache(num_pages=4096)
    doubled = jax.jit(lambda cache, *new: jax.tree.map(lambda x: x[::-1], cache.append(*new)), donate_argnums=0)
    analysis = doubled.lower(cache, *tokens(2, 2)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes >= cache.key_pages.nbytes


def test_vmap_is_a_loop():
    caches = [make_cache(lengths=(1, 2)), make_cache(tables=((0, 1, 2), (3, 4, 5)), lengths=(6, 11))]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    news = [tokens(2, 2, seed=seed) for seed in range(2)]
    together = jax.jit(jax.vmap(PagedKVCache.append))(stack(caches), *stack(news))
    jax.tree.map(np.testing.assert_array_equal, together, stack([append(c, *new) for c, new in zip(caches, news)]))


KEY, VALUE = tokens(2, 2)
BAD_CALLS = {
    "rank": (lambda: make_cache().append(KEY[0], VALUE[0]), "`key`"),
    "batch": (lambda: make_cache().append(KEY[:1], VALUE[:1]), "`key`"),
    "heads": (lambda: make_cache().append(KEY[:, :, :1], VALUE), "`key`"),
    "dtype": (lambda: make_cache().append(KEY.astype("bfloat16"), VALUE), "`key`.*bfloat16"),
    "value dim": (lambda: make_cache().append(KEY, KEY), "`value`"),
    "value tokens": (lambda: make_cache().append(KEY, VALUE[:, :1]), "`value`.*2 new tokens"),
    "active": (lambda: make_cache().append(KEY, VALUE, jnp.ones((2,), jnp.int32)), "`active`"),
    "prefill rank": (lambda: make_cache().prefill(0, KEY, VALUE), "`key`"),
    "prefill length": (lambda: make_cache().prefill(0, KEY[0], VALUE[0], length=1.5), "`length`"),
    "prefill sequence": (lambda: make_cache().prefill(jnp.zeros((2,), jnp.int32), KEY[0], VALUE[0]), "`sequence`"),
    "too many pages": (lambda: make_cache().assign(0, range(4)), "`pages`.*at most 3"),
    "row of pages": (lambda: make_cache().assign(0, jnp.zeros((2,), jnp.int32)), "`pages`.*shape .3"),
    "no list of pages": (lambda: make_cache().assign(0, 3), "`pages` is 3"),
    "pages of text": (lambda: make_cache().assign(0, "12"), "`pages` is '12'"),
    "row of no batch": (lambda: make_cache().assign(1.5, [1]), "`sequence` is 1.5"),
    "no such page": (lambda: make_cache().assign(0, [8]), "`pages`"),
    "page size": (lambda: PagedKVCache.create(num_pages=1, page_size=0, num_kv_heads=1, head_dim=1, batch=1,
                                              max_pages_per_sequence=1), "`page_size`"),
    "too long": (lambda: PagedKVCache.create(num_pages=1, page_size=2**20, num_kv_heads=1, head_dim=1, batch=1,
                                             max_pages_per_sequence=2**11), "`max_pages_per_sequence`.*1024"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_named(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_allocator_hands_out_each_page_once():
    allocator = PageAllocator(5)
    first = allocator.allocate(3)
    with pytest.raises(OutOfPagesError, match="3 pages were asked for, and 2 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2
    second = allocator.allocate(2)
    assert sorted(first + second) == [0, 1, 2, 3, 4] and allocator.num_free == 0
    allocator.free(first)
    assert sorted(allocator.allocate(3)) == sorted(first)


@pytest.mark.parametrize("pages", [[0, 0], [4], [1], [-1]], ids=["twice", "unknown", "not taken", "negative"])
def test_allocator_refuses_pages_that_are_not_taken(pages):
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(ValueError, match="`pages`"):
        allocator.free(pages)
    assert allocator.num_free == 3
