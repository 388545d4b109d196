"""PooledTopK and PooledCDF against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs, visible_mask

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.pooled import PooledCDF, PooledTopK, block_similarity
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import pooled as definition
from sparse_attn_jax.testing.methods.probe import absolute_positions


def to_array(q_offset):
    return jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset


def block_masks(selector, q_len, kv_len, is_causal, q_offset) -> tuple[np.ndarray, np.ndarray]:
    """What may be seen, and what is forced."""
    sizes = kv_len, selector.q_block_size, selector.kv_block_size
    visible, diagonal = definition.visible_and_diagonal(absolute_positions(q_offset, 2, q_len, kv_len), *sizes)
    if not is_causal:
        return np.ones_like(visible), np.zeros_like(visible)
    return visible, diagonal & selector.force_diagonal


def wanted_top_k(selector, query, key, is_causal, q_offset) -> np.ndarray:
    visible, diagonal = block_masks(selector, query.shape[1], key.shape[1], is_causal, q_offset)
    scores = definition.pooled_scores(query, key, selector.q_block_size, selector.kv_block_size)
    if selector.group_reduction is not None:
        scores = scores.reshape(2, key.shape[2], -1, *scores.shape[2:])
        scores = getattr(np, selector.group_reduction)(scores, axis=2)
    options = dict(top_k=selector.top_k, ratio=selector.ratio, visible_ratio=selector.visible_ratio)
    return definition.top_k_blocks(scores, visible, diagonal, **options)


def assert_lists_are(selection, wanted, kv_len) -> None:
    """The mask, and lists that ascend, -1 last, without repeats."""
    np.testing.assert_array_equal(np.asarray(selection.to_block_mask(kv_len)), wanted)
    ids = np.asarray(selection.indices)
    before, after = ids[..., :-1], ids[..., 1:]
    assert ((after == -1) | ((before >= 0) & (before < after))).all()


SMALL = dict(q_block_size=8, kv_block_size=8)
TOP_K = {
    "causal": (PooledTopK(top_k=3, **SMALL), True, None, (75, 75, 4, 2)),
    "not causal": (PooledTopK(top_k=3, **SMALL), False, None, (43, 75, 3, 1)),
    "not forced": (PooledTopK(top_k=2, **SMALL, force_diagonal=False), True, 0, (43, 75, 4, 2)),
    "odd offset, one block": (PooledTopK(top_k=1, **SMALL), True, 21, (43, 75, 4, 2)),
    "offsets": (PooledTopK(top_k=3, q_block_size=16, kv_block_size=8), True, (-9, 60), (43, 75, 4, 2)),
    "ratio": (PooledTopK(ratio=0.3, **SMALL), True, None, (80, 80, 2, 2)),
    "visible ratio": (PooledTopK(ratio=0.3, visible_ratio=True, q_block_size=5, kv_block_size=4), True, None, (43, 80, 2, 2)),
    "group sum": (PooledTopK(top_k=3, **SMALL, group_reduction="sum"), True, None, (43, 75, 6, 2)),
    "group max": (PooledTopK(top_k=3, **SMALL, group_reduction="max"), False, None, (43, 75, 6, 2)),
    "shorter than a block": (PooledTopK(top_k=3), True, None, (7, 9, 2, 1)),
    "one query, a block and one": (PooledTopK(top_k=1, **SMALL), True, None, (1, 9, 2, 1)),
    "more than there are": (PooledTopK(top_k=100, **SMALL), True, None, (15, 15, 2, 1)),
}


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_is_its_definition(name):
    selector, is_causal, q_offset, (q_len, kv_len, num_q_heads, num_kv_heads) = TOP_K[name]
    query, key = make_inputs(q_len, kv_len, num_q_heads, num_kv_heads, batch=2)
    selection = selector(query, key, is_causal=is_causal, q_offset=to_array(q_offset))
    assert_lists_are(selection, wanted_top_k(selector, query, key, is_causal, q_offset), kv_len)
    assert (selection.q_block_size, selection.kv_block_size) == (selector.q_block_size, selector.kv_block_size)


def test_top_k_lists_are_no_longer_than_needed():
    query, key = make_inputs(640, 640, 2, 1)
    for selector, slots in (
        (PooledTopK(top_k=4), 4),
        (PooledTopK(top_k=1), 2),  # an offset that is no multiple of the block would have two on the diagonal
        (PooledTopK(top_k=1, force_diagonal=False), 1),
        (PooledTopK(ratio=0.35, force_diagonal=False), 3),
        (PooledTopK(ratio=0.0, force_diagonal=False), 1),
    ):
        assert selector(query, key, is_causal=True).indices.shape == (1, 2, 10, slots)


def test_top_k_gives_ties_to_the_lower_block():
    query, key = make_inputs(16, 64)
    ids = PooledTopK(top_k=3, **SMALL)(query, 0 * key).indices
    np.testing.assert_array_equal(ids, np.broadcast_to(range(3), ids.shape))


def test_without_the_diagonal_a_query_may_see_nothing():
    query, key = make_inputs(64, 64)
    selector = PooledTopK(top_k=1, q_block_size=16, kv_block_size=8, force_diagonal=False)
    sees = lambda selector: visible_mask(selector(query, key, is_causal=True), query, key, is_causal=True).any(axis=-1)
    assert not sees(selector).all()
    assert sees(dataclasses.replace(selector, force_diagonal=True)).all()


def wanted_cdf(selector, query, key, is_causal, q_offset) -> np.ndarray:
    heads = query.shape[2]
    visible, diagonal = block_masks(selector, query.shape[1], key.shape[1], is_causal, q_offset)
    per_head = {name: np.broadcast_to(getattr(selector, name), (heads,)) for name in ("cdf", "similarity")}
    sizes = dict(q_block_size=selector.q_block_size, kv_block_size=selector.kv_block_size)
    mask = definition.cdf_blocks(query, key, visible, **per_head, **sizes, smooth_key=selector.smooth_key)
    sink = (np.arange(mask.shape[-1]) == 0) & selector.force_sink
    return (mask | diagonal | sink) & visible


def similar_inputs(q_len, kv_len, num_q_heads, num_kv_heads):
    """Blocks of 16 queries and of 8 keys whose tokens are more or less alike; the keys share a direction."""
    query, key = make_inputs(q_len, kv_len, num_q_heads, num_kv_heads, batch=2)
    rng = np.random.default_rng(0)

    def mix(x, block_size):
        shape = x.shape[0], -(-x.shape[1] // block_size), x.shape[2]
        means = rng.uniform(0.4, 3, (*shape, 1)) * rng.standard_normal((*shape, x.shape[3]))
        return jnp.asarray(x + means.repeat(block_size, axis=1)[:, : x.shape[1]], jnp.float32)

    return 0.6 * mix(query / 3, 16), mix(key, 8) + 0.7


BLOCKS = dict(q_block_size=16, kv_block_size=8)
CDF = {
    "causal": (PooledCDF(cdf=0.9, similarity=0.5, **BLOCKS), True, None, (75, 75, 4, 2)),
    "not causal": (PooledCDF(cdf=0.7, similarity=0.4, **BLOCKS), False, None, (43, 75, 3, 1)),
    "all similar": (PooledCDF(cdf=0.8, similarity=-1, **BLOCKS), True, 21, (43, 75, 2, 2)),
    "at least one": (PooledCDF(cdf=0.0, similarity=-1, **BLOCKS, force_diagonal=False), True, None, (43, 75, 2, 2)),
    "none similar": (PooledCDF(cdf=0.1, similarity=1, **BLOCKS), True, None, (43, 75, 2, 2)),
    "sink": (PooledCDF(cdf=0.3, similarity=0.5, force_sink=True, **BLOCKS), True, 21, (43, 75, 4, 2)),
    "not smooth": (PooledCDF(cdf=0.3, similarity=0.5, smooth_key=False, **BLOCKS), True, None, (43, 75, 4, 2)),
    "per head": (
        PooledCDF(cdf=(0.5, 0.8, 0.9, 0.98), similarity=(0.3, 0.5, 0.7, -1), **BLOCKS), True, (-3, 40), (43, 75, 4, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CDF)
def test_cdf_is_its_definition(name):
    selector, is_causal, q_offset, sizes = CDF[name]
    query, key = similar_inputs(*sizes)
    selection = selector(query, key, is_causal=is_causal, q_offset=to_array(q_offset))
    wanted = wanted_cdf(selector, query, key, is_causal, q_offset)
    assert_lists_are(selection, wanted, sizes[1])


def test_cases_of_cdf_are_neither_dense_nor_empty():
    """Else the definition would say nothing."""
    selector, _, _, sizes = CDF["causal"]
    query, key = similar_inputs(*sizes)
    wanted = wanted_cdf(selector, query, key, False, None)
    assert 0.3 < wanted.mean() < 0.9
    for x, block_size in ((query, 16), (key - key.mean(axis=1, keepdims=True), 8)):
        assert 0.1 < (definition.mean_cosine(x, block_size) > 0.5).mean() < 0.9
    assert (wanted != wanted_cdf(dataclasses.replace(selector, smooth_key=False), query, key, False, None)).any()


def test_cdf_by_ratio_counts_all_blocks_or_the_visible_ones():
    query, key = make_inputs(64, 64)
    for visible_ratio, counts in ((False, [4] * 8), (True, [1, 1, 1, 2, 2, 3, 3, 4])):
        selector = PooledCDF(
            ratio=0.5, similarity=-1, visible_ratio=visible_ratio, force_diagonal=False, q_block_size=8, kv_block_size=8
        )
        mask = np.asarray(selector(query, key, is_causal=True).to_block_mask(64))
        np.testing.assert_array_equal(mask.sum(axis=-1), np.broadcast_to(np.minimum(counts, range(1, 9)), (1, 4, 8)))
        visible, _ = definition.visible_and_diagonal(np.arange(64)[None], 64, 8, 8)
        scores = definition.pooled_scores(query, key, 8, 8)
        options = dict(ratio=0.5, visible_ratio=visible_ratio)
        np.testing.assert_array_equal(mask, definition.top_k_blocks(scores, visible, visible & False, **options))


def test_similarity_is_the_mean_cosine_of_pairs():
    x, _ = make_inputs(21, 1, 3, 1, head_dim=5)
    x = x.at[0, 3].set(0)
    np.testing.assert_allclose(block_similarity(x, 8).swapaxes(1, 2), definition.mean_cosine(x, 8), atol=1e-6)


def test_attention_to_the_selection_is_masked_softmax():
    query, key = make_inputs(20, 33)
    value = key[..., ::-1]
    selector = PooledTopK(top_k=3, **SMALL)
    out = sa.sparse_attention(query, key, value, selector, is_causal=True, implementation="xla")
    visible, diagonal = definition.visible_and_diagonal(13 + np.arange(20)[None], 33, 8, 8)
    blocks = definition.top_k_blocks(definition.pooled_scores(query, key, 8, 8), visible, diagonal, top_k=3)
    mask = definition.to_tokens(blocks, 20, 33, 8, 8) & (np.arange(33) <= 13 + np.arange(20)[:, None])
    np.testing.assert_allclose(out, oracle.attention(mask, query, key, value)[0], atol=1e-5)


@pytest.mark.parametrize("selector", [PooledTopK(top_k=2, **SMALL), PooledCDF(**SMALL)], ids=["top_k", "cdf"])
def test_they_are_frozen_hashable_and_carry_no_gradient(selector):
    assert hash(selector) == hash(dataclasses.replace(selector)) and not selector.causal_safe
    query, key = make_inputs(9, 20, batch=2)
    select = lambda q, k: selector(q[None], k[None]).indices[0]
    np.testing.assert_array_equal(jax.vmap(select)(query, key), selector(query, key).indices)
    assert selector(query[:, :0], key).indices.shape == (1, 1, 1, 3)
    gradient = jax.grad(lambda q: (selector(q, key).to_block_mask(20) * q.sum()).sum())(query)
    np.testing.assert_array_equal(gradient, np.full(query.shape, gradient[0, 0, 0, 0]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PooledTopK(), "`top_k` is None and `ratio` is None; give exactly one"),
        (lambda: PooledTopK(top_k=1, ratio=0.1), "`top_k` is 1 and `ratio` is 0.1"),
        (lambda: PooledTopK(top_k=0), "`top_k` is 0"),
        (lambda: PooledTopK(ratio=1.5), "`ratio` is 1.5"),
        (lambda: PooledTopK(top_k=1, q_block_size=0), "`q_block_size` is 0"),
        (lambda: PooledTopK(top_k=1, kv_block_size=0), "`kv_block_size` is 0"),
        (lambda: PooledTopK(top_k=1, force_diagonal=1), "`force_diagonal` is 1"),
        (lambda: PooledTopK(top_k=1, visible_ratio=1), "`visible_ratio` is 1"),
        (lambda: PooledTopK(top_k=1, group_reduction="all"), "`group_reduction` is 'all'"),
        (lambda: PooledCDF(cdf=1.1), "`cdf` is 1.1"),
        (lambda: PooledCDF(cdf=(0.5, -1)), r"`cdf\[1\]` is -1"),
        (lambda: PooledCDF(similarity=2), "`similarity` is 2; it must be a number in"),
        (lambda: PooledCDF(similarity=(0.5, "a")), r"`similarity` is \(0.5, 'a'\)"),
        (lambda: PooledCDF(ratio=-1), "`ratio` is -1"),
        (lambda: PooledCDF(force_sink=0), "`force_sink` is 0"),
        (lambda: PooledCDF(smooth_key=0), "`smooth_key` is 0"),
        (lambda: PooledCDF(scale="a"), "`scale` is 'a'"),
        (lambda: PooledCDF(cdf=(0.5,) * 3)(*make_inputs(4, 4)), "`cdf` has 3 entries; the call has 4 query heads"),
        (lambda: PooledCDF(similarity=(0.5,) * 3)(*make_inputs(4, 4)), "`similarity` has 3 entries"),
        (lambda: PooledCDF()(*make_inputs(4, 4), is_causal=1), "`is_causal` is 1"),
        (lambda: PooledTopK(top_k=1)(*make_inputs(4, 4), q_offset=0.5), "`q_offset`"),
    ],
)  # fmt: skip
def test_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
