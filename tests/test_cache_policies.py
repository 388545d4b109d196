"""SnapKV, ZipVL and DELTA: what is kept, and attention to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs

import sparse_attn_jax as sa
from sparse_attn_jax.cache_policies import delta_pages, gather_tokens, snapkv_keep, zipvl_keep
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors import Dense
from sparse_attn_jax.testing import oracle


def probabilities(query, key, positions) -> np.ndarray:
    """float64 [batch, num_q_heads, q_len, kv_len], causal at `positions` [batch, q_len]."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    logits = np.einsum("bihd,bjhd->bhij", query, key.repeat(query.shape[2] // key.shape[2], axis=2)) * query.shape[-1] ** -0.5
    logits = np.where(np.arange(key.shape[1]) <= positions[:, None, :, None], logits, -np.inf)
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def padded(ids, capacity: int) -> list[int]:
    return sorted(ids) + [-1] * (capacity - len(ids))


def snapkv_definition(query, key, lengths, *, capacity, window, pooling, kernel_size) -> np.ndarray:
    batch, _, num_q_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    kept = np.zeros((batch, num_kv_heads, capacity), int)
    for b, n in np.ndindex(batch, num_kv_heads):
        length = lengths[b]
        if length <= capacity:
            kept[b, n] = padded(range(length), capacity)
            continue
        positions = np.arange(length - window, length)[None]
        p = probabilities(query[b : b + 1, -window:], key[b : b + 1, :length], positions)[0]
        group = num_q_heads // num_kv_heads
        mass = p[n * group : (n + 1) * group, :, : length - window].sum(axis=(0, 1))
        half = kernel_size // 2
        around = [mass[max(j - half, 0) : j + half + 1] for j in range(len(mass))]
        pooled = [x.sum() / kernel_size if pooling == "avg" else x.max() for x in around]
        best = sorted(range(len(pooled)), key=lambda j: (-pooled[j], j))[: capacity - window]
        kept[b, n] = padded(best + list(range(length - window, length)), capacity)
    return kept


@pytest.mark.parametrize(
    "pooling, kernel_size, q_offset, lengths",
    [
        ("avg", 5, None, (40, 40)),
        ("max", 7, (13, 30), (23, 40)),
        ("avg", 5, (13, 30), (23, 40)),
        ("avg", 1, 3, (13, 13)),
    ],
    ids=str,
)
def test_snapkv_is_its_definition(pooling, kernel_size, q_offset, lengths):
    query, key = make_inputs(10, 40, 6, 2, batch=2)
    # The window attends to its own first token, which must not count for the prompt's last ones.
    key = key.at[jnp.arange(2), jnp.asarray(lengths) - 4].multiply(5)
    options = dict(capacity=14, window=4, pooling=pooling, kernel_size=kernel_size)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    found = jax.jit(functools.partial(snapkv_keep, **options))(query, key, q_offset=offset)
    np.testing.assert_array_equal(found, snapkv_definition(query, key, lengths, **options))


def test_snapkv_keeps_its_window_and_short_prompts():
    query, key = make_inputs(8, 20)
    ids = np.asarray(snapkv_keep(query, key, capacity=9, window=6))
    np.testing.assert_array_equal(ids[:, :, 3:], np.broadcast_to(range(14, 20), (1, 2, 6)))
    np.testing.assert_array_equal(snapkv_keep(query, key, capacity=6, window=6)[0, 1], range(14, 20))
    ids = snapkv_keep(query, key, capacity=23, window=6)
    np.testing.assert_array_equal(ids[0, 0], padded(range(20), 23))


def test_snapkv_reads_the_window_only():
    query, key = make_inputs(8, 20)
    keep = jax.jit(functools.partial(snapkv_keep, capacity=12, window=4))
    np.testing.assert_array_equal(keep(query.at[:, :4].set(jnp.nan), key), keep(query, key))
    np.testing.assert_array_equal(keep(query[:, -4:], key), keep(query, key))


def zipvl_definition(query, key, positions, threshold, normalize, max_kept) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(positions), max_kept), int)
    counts = np.zeros(len(positions), int)
    p = probabilities(query, key, positions)
    for b in range(len(positions)):
        mass = p[b].sum(axis=(0, 1))
        count, held = 0, 0.0
        for x in sorted(mass, reverse=True):
            count, held = count + 1, held + x
            if held >= threshold * mass.sum() * (1 - 1e-9):
                break
        viewers = np.array([(positions[b] >= j).sum() for j in range(key.shape[1])])
        score = [(mass[j] / viewers[j] if normalize else mass[j], -j) for j in range(key.shape[1]) if viewers[j]]
        chosen = [-j for _, j in sorted(score, reverse=True)[: min(count, max_kept)]]
        ids[b], counts[b] = padded(chosen, max_kept), len(chosen)
    return ids, counts


PROBES = np.array([[30, 3, 17, 39], [39, 38, 37, 12]])


@pytest.mark.parametrize(
    "threshold, max_kept, normalize",
    [(0.9, None, True), (0.9, None, False), (0.5, 60, True), (0.9, 7, True), (0.0, 5, False)],
)
def test_zipvl_is_its_definition(threshold, max_kept, normalize):
    query, key = make_inputs(4, 40, 4, 2, batch=2)
    keep = jax.jit(functools.partial(zipvl_keep, threshold=threshold, max_kept=max_kept, normalize=normalize))
    ids, counts = keep(query, key, positions=jnp.asarray(PROBES))
    wanted = zipvl_definition(query, key, PROBES, threshold, normalize, max_kept or 40)
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_array_equal(counts, wanted[1])


def test_zipvl_of_everything_and_of_a_token_that_has_it_all():
    query, key = make_inputs(4, 12)
    ids, count = zipvl_keep(query, 0 * key, threshold=1.0)
    np.testing.assert_array_equal(ids[0], range(12))
    assert count[0] == 12
    half, count = zipvl_keep(query, 0 * key[:, :8], threshold=0.5, positions=jnp.full(4, 7))
    assert count[0] == 4 and half[0, 3] == 3
    key = jnp.zeros((1, 12, 2, 16)).at[:, 5].set(1.0)
    ids, count = zipvl_keep(jnp.full((1, 4, 4, 16), 20.0), key, threshold=0.99)
    assert count[0] == 1 and ids[0, 0] == 5


def delta_definition(query, key, positions, *, page_size, num_pages, num_recent, head_reduction) -> np.ndarray:
    p = probabilities(query, key, positions)
    kept = np.zeros((len(p), num_pages), int)
    for b in range(len(p)):
        tokens = getattr(np, head_reduction)(p[b], axis=0).sum(axis=0)
        pages = [tokens[j : j + page_size].sum() for j in range(0, len(tokens), page_size)]
        own = positions[b, -1] // page_size
        recent = [c for c in range(len(pages)) if own - num_recent < c <= own]
        others = sorted((c for c in range(own + 1) if c not in recent), key=lambda c: (-pages[c], c))
        kept[b] = padded(recent + others[: num_pages - len(recent)], num_pages)
    return kept


@pytest.mark.parametrize(
    "q_len, q_offset, kv_len, head_reduction",
    [
        (1, None, 50, "sum"),
        (3, None, 48, "max"),
        (3, (20, 41), 50, "sum"),
        (1, (20, 41), 50, "max"),
        (1, 2, 50, "sum"),
    ],
    ids=str,
)
def test_delta_is_its_definition(q_len, q_offset, kv_len, head_reduction):
    query, key = make_inputs(q_len, kv_len, batch=2)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    positions = np.broadcast_to(kv_len - q_len if q_offset is None else q_offset, (2,))[:, None] + np.arange(q_len)
    options = dict(page_size=4, num_pages=6, num_recent=2, head_reduction=head_reduction)
    found = jax.jit(functools.partial(delta_pages, **options))(query, key, q_offset=offset)
    np.testing.assert_array_equal(found, delta_definition(query, key, positions, **options))


def test_delta_gives_ties_to_the_lower_page():
    query, key = make_inputs(1, 64)
    np.testing.assert_array_equal(delta_pages(query, 0 * key, page_size=8, num_pages=4, num_recent=2)[0], [0, 1, 6, 7])


def test_delta_takes_the_lse_of_a_dense_layer():
    query, key = make_inputs(1, 64)
    pages = jax.jit(functools.partial(delta_pages, page_size=8, num_pages=4, num_recent=2))
    logits = np.einsum("bihd,bjhd->bhij", query, np.repeat(key, 2, axis=2)) / 4
    lse = np.logaddexp.reduce(logits, axis=-1).swapaxes(1, 2)
    np.testing.assert_array_equal(pages(query, key, lse), pages(query, key))
    # One head that counts for nothing.
    others = delta_definition(
        query[:, :, 2:], key[:, :, 1:], np.array([[63]]), page_size=8, num_pages=4, num_recent=2, head_reduction="sum"
    )
    np.testing.assert_array_equal(pages(query, key, lse + np.array([99.0, 99, 0, 0], np.float32)), others)


def test_gather_tokens():
    x = jnp.arange(2 * 5 * 3 * 2, dtype=jnp.float32).reshape(2, 5, 3, 2)
    shared = np.array([[0, 4, -1], [3, 1, 9]])
    found = np.asarray(gather_tokens(x, jnp.asarray(shared)))
    per_head = np.asarray(gather_tokens(x, jnp.asarray(shared)[:, None].repeat(3, 1).at[0, 1, 0].set(2)))
    for b, i, h in np.ndindex(2, 3, 3):
        j = shared[b, i]
        np.testing.assert_array_equal(found[b, i, h], x[b, j, h] if 0 <= j < 5 else 0)
        j = 2 if (b, i, h) == (0, 0, 1) else j
        np.testing.assert_array_equal(per_head[b, i, h], x[b, j, h] if 0 <= j < 5 else 0)
    gradient = jax.grad(lambda x: gather_tokens(x, jnp.asarray(shared)).sum())(x)
    np.testing.assert_array_equal(gradient[:, :, 0, 0], [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]])
    assert gather_tokens(x[:, :0], jnp.asarray(shared)).shape == (2, 3, 3, 2)


def test_attention_in_place_and_in_the_evicted_cache():
    """Two prompts of different lengths, then two decoding steps after eviction."""
    lengths, capacity = np.array([9, 30]), 12
    query, key = make_inputs(4, 30, batch=2)
    value = key[..., ::-1] + 1
    keep = jax.jit(functools.partial(snapkv_keep, capacity=capacity, window=4))
    ids = keep(query, key, q_offset=jnp.asarray(lengths - 4))
    kept = np.zeros((2, 2, 1, 30), bool)
    for b, n, i in np.argwhere(np.asarray(ids) >= 0):
        kept[b, n, 0, ids[b, n, i]] = True
    num_kept = (ids[:, 0] >= 0).sum(axis=-1)
    np.testing.assert_array_equal(num_kept, [9, 12])

    new_query, new_key = make_inputs(2, 2, batch=2, seed=1)
    small_key, small_value = (jnp.pad(gather_tokens(x, ids), [(0, 0), (0, 2), (0, 0), (0, 0)]) for x in (key, value))
    for b in range(2):
        slots = slice(int(num_kept[b]), int(num_kept[b]) + 2)
        small_key = small_key.at[b, slots].set(new_key[b])
        small_value = small_value.at[b, slots].set(new_key[b])
    evicted = sa.block_sparse_attention(
        new_query,
        small_key,
        small_value,
        Dense(8)(new_query, small_key),
        is_causal=True,
        q_offset=num_kept,
        implementation="xla",
    )

    # The definition: the kept tokens of the prompt, and the new ones up to the query.
    mask = np.concatenate([np.repeat(kept, 2, axis=1).repeat(2, axis=2), np.zeros((2, 4, 2, 2), bool)], axis=-1)
    mask[:, :, 0, 30] = mask[:, :, 1, 30:] = True
    whole_key, whole_value = jnp.concatenate([key, new_key], axis=1), jnp.concatenate([value, new_key], axis=1)
    wanted = oracle.attention(mask, new_query, whole_key, whole_value)[0]
    np.testing.assert_allclose(evicted, wanted, atol=1e-5)

    new_ids = jnp.broadcast_to(jnp.asarray([30, 31]), (2, 2, 2))
    selection = BlockSelection(jnp.concatenate([ids, new_ids], axis=-1)[:, :, None], q_block_size=2, kv_block_size=1)
    in_place = sa.block_sparse_attention(new_query, whole_key, whole_value, selection, is_causal=True, implementation="xla")
    np.testing.assert_allclose(in_place, wanted, atol=1e-5)


QUERY, KEY = make_inputs(4, 16)


@pytest.mark.parametrize(
    "policy, options, message",
    [
        (snapkv_keep, dict(capacity=3, window=4), "`capacity` is 3; it must be an int of at least 4"),
        (snapkv_keep, dict(capacity=8, window=0), "`window` is 0"),
        (snapkv_keep, dict(capacity=8, window=5), "`query` has 4 queries; `window` is 5"),
        (snapkv_keep, dict(capacity=8, window=4, pooling="min"), "`pooling` is 'min'"),
        (snapkv_keep, dict(capacity=8, window=4, kernel_size=4), "`kernel_size` is 4; it must be odd"),
        (snapkv_keep, dict(capacity=8, window=4, q_offset=0.5), "`q_offset`"),
        (zipvl_keep, dict(threshold=1.5), "`threshold` is 1.5"),
        (zipvl_keep, dict(threshold=0.5, max_kept=0), "`max_kept` is 0"),
        (zipvl_keep, dict(threshold=0.5, normalize=1), "`normalize` is 1"),
        (zipvl_keep, dict(threshold=0.5, positions=jnp.zeros(3, int)), r"`positions` has shape \(3,\)"),
        (zipvl_keep, dict(threshold=0.5, positions=jnp.zeros(4)), "`positions` has dtype float32"),
        (delta_pages, dict(page_size=0), "`page_size` is 0"),
        (delta_pages, dict(num_pages=7), "`num_pages` is 7; it must be an int of at least 8"),
        (delta_pages, dict(num_recent=0), "`num_recent` is 0"),
        (delta_pages, dict(head_reduction="mean"), "`head_reduction` is 'mean'"),
        (delta_pages, dict(lse=jnp.zeros((1, 4, 2))), "`lse` has shape"),
        (delta_pages, dict(query=QUERY[:, :0]), "`query` has no queries"),
        (delta_pages, dict(key=KEY[0]), "`key` has shape"),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x)[:40],
)
def test_policies_refuse(policy, options, message):
    arguments = dict(query=QUERY, key=KEY) | options
    with pytest.raises(ValueError, match=message):
        policy(arguments.pop("query"), arguments.pop("key"), **arguments)


@pytest.mark.parametrize(
    "x, ids, message",
    [
        (KEY[0], jnp.zeros((1, 3), int), "`x` has shape"),
        (KEY, jnp.zeros((1, 3)), "`ids` has dtype float32"),
        (KEY, jnp.zeros((2, 3), int), r"`ids` has shape \(2, 3\).*\[1, num_kept\] or \[1, 2, num_kept\]"),
        (KEY, jnp.zeros((1, 4, 3), int), "`ids` has shape"),
    ],
)  # fmt: skip
def test_gather_refuses(x, ids, message):
    with pytest.raises(ValueError, match=message):
        gather_tokens(x, ids)
