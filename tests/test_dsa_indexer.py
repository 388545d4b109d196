"""DeepSeek sparse attention: what the indexer selects and what it learns from, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, fast, normal

import sparse_attn_jax as sa
from sparse_attn_jax import index_loss
from sparse_attn_jax.index_loss import index_kl_loss
from sparse_attn_jax.selectors import scored_rows
from sparse_attn_jax.selectors.dsa_indexer import DSAIndexer
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import dsa_indexer as definition

SMALL = DSAIndexer(top_k=9)
select = fast(SMALL)


def make_index(q_len, kv_len, batch=2, heads=3, dim=8):
    return normal(0, batch, q_len, heads, dim), normal(1, batch, kv_len, dim), normal(2, batch, q_len, heads)


def positions_of(q_len, kv_len, q_offset=None, batch=2):
    offset = np.broadcast_to(kv_len - q_len if q_offset is None else np.asarray(q_offset), (batch,))
    return offset[:, None] + np.arange(q_len)


@pytest.mark.parametrize("is_causal, q_offset", [(False, None), (True, None), (True, -3), (True, (5, 31))], ids=str)
def test_selects_the_tokens_of_the_definition(is_causal, q_offset):
    index = make_index(37, 50)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    selection = select(*index, is_causal=is_causal, q_offset=offset)
    assert (selection.q_block_size, selection.kv_block_size) == (1, 1)
    assert selection.indices.shape == (2, 1, 37, 9) and selection.indices.dtype == jnp.int32
    wanted = definition.token_mask(definition.scores(*index), positions_of(37, 50, q_offset), 9, is_causal)
    np.testing.assert_array_equal(selection.to_block_mask(50)[:, 0], wanted)


def test_steps_of_some_queries_change_nothing(monkeypatch):
    monkeypatch.setattr(scored_rows, "MAX_CHUNK", 16)  # the last of them ends with the last query
    index = make_index(37, 50)
    few = fast(DSAIndexer(top_k=8))(*index, is_causal=True)
    wanted = definition.token_mask(definition.scores(*index), positions_of(37, 50), 8)
    np.testing.assert_array_equal(few.to_block_mask(50)[:, 0], wanted)


def test_all_tokens_if_there_are_no_more():
    selection = fast(DSAIndexer())(*make_index(37, 50), is_causal=True)
    assert selection.indices.shape == (2, 1, 37, 50)
    np.testing.assert_array_equal(selection.to_block_mask(50)[:, 0], np.arange(50) <= positions_of(37, 50)[..., None])


def test_ties_go_to_the_lower_token():
    index_query, index_key, weights = make_index(37, 50)
    # relu makes all products 0.
    selection = select(jnp.abs(index_query), -jnp.abs(index_key), weights, is_causal=True)
    np.testing.assert_array_equal(selection.indices[0, 0, -1], np.arange(9))


def test_nothing_after_a_query_is_looked_at():
    arrays = make_index(37, 37)
    before = select(*arrays, is_causal=True).to_block_mask(37)
    for last in (0, 8, 9, 30):
        is_later = (np.arange(37) > last)[:, None]
        index_query, index_key, weights = (np.asarray(x) for x in arrays)
        changed = (
            np.where(is_later[..., None], 7, index_query),
            np.where(is_later, np.nan, index_key),
            np.where(is_later, 3, weights),
        )
        after = select(*changed, is_causal=True).to_block_mask(37)
        np.testing.assert_array_equal(after[:, :, : last + 1], before[:, :, : last + 1])


def test_one_query_at_a_time_selects_the_same():
    index_query, index_key, weights = make_index(37, 37)
    whole = select(index_query, index_key, weights, is_causal=True).indices
    for i in range(0, 37, 7):
        row = slice(i, i + 1)
        one = select(index_query[:, row], index_key, weights[:, row], is_causal=True, q_offset=jnp.int32(i)).indices
        np.testing.assert_array_equal(one[:, :, 0], whole[:, :, i])


def make_attention(q_len, kv_len, batch=2):
    """Query with large values, key and value with fewer heads, and the value's own dimension."""
    return 3 * normal(3, batch, q_len, 4, 16), normal(4, batch, kv_len, 2, 16), normal(5, batch, kv_len, 2, 6)


@compile_fast
def attend(query, key, value, selection):
    """(out, lse)."""
    return sa.block_sparse_attention(query, key, value, selection, is_causal=True, return_residual=True)


def test_attention_over_tokens_is_that_of_the_mask():
    index, (query, key, value) = make_index(37, 50), make_attention(37, 50)
    out, _ = attend(query, key, value, select(*index, is_causal=True))
    mask = definition.token_mask(definition.scores(*index), positions_of(37, 50), 9)
    mask = np.broadcast_to(mask[:, None], (2, 4, 37, 50))
    np.testing.assert_allclose(out, oracle.attention(mask, query, key, value)[0], atol=1e-5)


@pytest.mark.parametrize("stage", ["warm-up", "full", "sparse"])
def test_loss_and_gradients_are_those_of_the_definition(stage, monkeypatch):
    monkeypatch.setattr(index_loss, "CHUNK_ELEMENTS", 2 * 50 * 7 * 5)  # five queries at a time, or fewer
    index, (query, key, value) = make_index(37, 50), make_attention(37, 50)
    is_causal, offset = stage != "full", (-4, 10)
    options = dict(is_causal=is_causal, q_offset=jnp.array(offset))
    positions = positions_of(37, 50, offset)
    selection = select(*index, **options) if stage == "sparse" else None
    mask = np.arange(50) <= (positions[..., None] if is_causal else 50)
    if stage == "sparse":
        mask = definition.token_mask(definition.scores(*index), positions, 9)
    mask = np.broadcast_to(mask, (2, 37, 50))
    # A selection of its own and scale, so that both must be passed on.
    scale = 0.3
    lse = oracle.attention(np.broadcast_to(mask[:, None], (2, 4, 37, 50)), query, key, value, scale=scale)[1]
    target = definition.target(query, key, lse, mask, scale)
    wanted, d_scores = definition.divergence(target, definition.scores(*index), mask)
    weight = np.asarray(normal(6, 2, 37))

    def loss(index, query, key, lse):
        losses = index_kl_loss(*index, query, key, lse, selection=selection, scale=scale, **options)
        return (losses * weight).sum(), losses

    (_, losses), gradients = compile_fast(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
        index, query, key, jnp.asarray(lse, jnp.float32)
    )
    np.testing.assert_allclose(losses, wanted, atol=2e-5)
    assert losses.dtype == jnp.float32 and (wanted > 0.1).any()
    assert (wanted[0, :4] == 0).all() == is_causal  # those see nothing
    # The definition's gradients, by hand.
    index_query, index_key, weights = (np.asarray(x, np.float64) for x in index)
    d_scores = d_scores * weight[..., None]
    products = np.einsum("bthd,bsd->bths", index_query, index_key)
    d_products = d_scores[:, :, None] * weights[..., None] * (products > 0)
    expected = (
        np.einsum("bths,bsd->bthd", d_products, index_key),
        np.einsum("bths,bthd->bsd", d_products, index_query),
        np.einsum("bts,bths->bth", d_scores, np.maximum(products, 0)),
    )
    for x, y in zip(gradients[0], expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    for x in gradients[1:]:
        assert (x == 0).all()


def test_lse_of_the_library_and_lists_as_they_come():
    index, (query, key, value) = make_index(37, 50), make_attention(37, 50)
    selection = select(*index, is_causal=True)
    _, lse = attend(query, key, value, selection)
    # Not causal: the lists are so already, and what is out of range must be left out for itself.
    loss = compile_fast(lambda lse, x: index_kl_loss(*index, query, key, lse, selection=x))
    once, ids = loss(lse, selection), np.asarray(selection.indices)
    mask = np.asarray(selection.to_block_mask(50)[:, 0])
    wanted, _ = definition.divergence(definition.target(query, key, lse, mask), definition.scores(*index), mask)
    np.testing.assert_allclose(once, wanted, atol=2e-5)
    other = np.concatenate([ids[..., ::-1], ids[..., 2:], ids[..., :1] - 100, ids[..., :1] + 100], axis=-1)
    found = loss(lse, sa.BlockSelection(jnp.asarray(other), q_block_size=1, kv_block_size=1))
    np.testing.assert_allclose(found, once, atol=1e-5)
    # A head that saw nothing has no say.
    found = loss(lse.at[..., 1].set(-jnp.inf), selection)
    target = definition.target(query, key, lse.at[..., 1].set(jnp.inf), mask)
    np.testing.assert_allclose(found, definition.divergence(target, definition.scores(*index), mask)[0], atol=2e-5)


def test_an_indexer_that_agrees_has_no_loss():
    query, key = 2 * normal(3, 1, 20, 1, 8), normal(4, 1, 20, 1, 8)
    # relu(x) - relu(-x) is x.
    index_query = jnp.concatenate([query, -query], axis=2) / 8**0.5
    weights = jnp.broadcast_to(jnp.array([1.0, -1.0]), (1, 20, 2))
    lse = oracle.attention(np.tril(np.ones((20, 20), bool))[None, None], query, key, key)[1]
    attention = query, key, jnp.asarray(lse, jnp.float32)
    loss = compile_fast(lambda index_key: index_kl_loss(index_query, index_key, weights, *attention, is_causal=True))
    np.testing.assert_allclose(loss(key[:, :, 0]), 0, atol=1e-5)
    assert (loss(key[:, ::-1, 0])[:, 5:] > 0.01).all()


def test_memory_of_the_loss_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(index_loss, "CHUNK_ELEMENTS", 2**16)
    index, (query, key, _) = make_index(2048, 2048, 1), make_attention(2048, 2048, 1)
    loss = lambda *index: index_kl_loss(*index, query, key, jnp.zeros((1, 2048, 4)), is_causal=True).sum()
    compiled = compile_fast(jax.grad(loss, (0, 1, 2))).lower(*index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2048**2 / 4


def test_no_queries():
    index, (query, key, _) = make_index(0, 50), make_attention(0, 50)
    assert SMALL(*index, is_causal=True).indices.shape == (2, 1, 0, 9)
    assert index_kl_loss(*index, query, key, jnp.zeros((2, 0, 4))).shape == (2, 0)


INDEX, ATTENTION = make_index(4, 6), make_attention(4, 6)[:2]
LSE = jnp.zeros((2, 4, 4))


def index(*changed, **options):
    return SMALL(*changed, *INDEX[len(changed) :], **options)


def loss(*changed, **options):
    arguments = *INDEX, *ATTENTION, LSE
    return index_kl_loss(*changed, *arguments[len(changed) :], **options)


BAD_CALLS = {
    "top-k": ("`top_k` is 0", lambda: DSAIndexer(top_k=0)),
    "index-query": ("`index_query` has shape", lambda: index(INDEX[0][0])),
    "index-query-dtype": ("`index_query` has dtype int32", lambda: index(INDEX[0].astype(int))),
    "index-key": (r"`index_key` has shape \(2, 6, 7\).*index_dim 8", lambda: index(INDEX[0], INDEX[1][..., :7])),
    "index-key-rank": ("`index_key` has shape", lambda: index(INDEX[0], INDEX[1][..., None])),
    "weights": (r"`weights` has shape \(2, 4, 2\)", lambda: index(INDEX[0], INDEX[1], INDEX[2][..., :2])),
    "is-causal": ("`is_causal` is 1", lambda: index(is_causal=1)),
    "q-offset": ("`q_offset` has shape", lambda: index(q_offset=jnp.zeros(3, int))),
    "loss-index-query": ("`index_query` has shape", lambda: loss(INDEX[0][0])),
    "loss-query": ("`query` is float32.*q_len 4", lambda: loss(*INDEX, ATTENTION[0][:, :3])),
    "loss-heads": ("`query` has 3 heads", lambda: loss(*INDEX, ATTENTION[0][:, :, :3])),
    "loss-key": ("`key` is float32.*kv_len 6", lambda: loss(*INDEX, ATTENTION[0], ATTENTION[1][:, :5])),
    "loss-lse": ("`lse` is float32", lambda: loss(*INDEX, *ATTENTION, LSE[..., :3])),
    "loss-is-causal": ("`is_causal` is None", lambda: loss(is_causal=None)),
    "loss-scale": ("`scale` is 'x'", lambda: loss(scale="x")),
    "loss-offset": ("`q_offset` is 1.5", lambda: loss(q_offset=1.5)),
    "loss-selection": ("`selection` is 3", lambda: loss(selection=3)),
    "loss-blocks": (
        r"`selection` has query and KV blocks of \(1, 2\) tokens",
        lambda: loss(selection=sa.BlockSelection(jnp.zeros((1, 1, 4, 1), int), q_block_size=1, kv_block_size=2)),
    ),
    "loss-rows": (
        "`selection.indices` is int32",
        lambda: loss(selection=sa.BlockSelection(jnp.zeros((1, 1, 3, 1), int), q_block_size=1, kv_block_size=1)),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_by_name(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
