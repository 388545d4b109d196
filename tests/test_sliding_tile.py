"""Sliding tile attention: the definition for each head, text, and that odd windows are a neighborhood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal
from grid_masks import selected_mask

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.neighborhood import NeighborhoodAttention
from sparse_attn_jax.selectors.sliding_tile import SlidingTile
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import neighborhood
from sparse_attn_jax.testing.methods import sliding_tile as definition


@pytest.mark.parametrize(
    "shape, tile_shape, window",
    [
        ((12,), (3,), (3,)),
        ((14,), (3,), (2,)),
        ((8, 9), (2, 3), (3, 1)),
        ((8, 9), (2, 3), (2, 2)),
        ((7, 8), (2, 3), (4, 3)),
        ((4, 6, 4), (2, 2, 1), (1, 3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("text_len", [0, 13])
def test_matches_the_definition(shape, tile_shape, window, text_len):
    selection, found = selected_mask(SlidingTile(shape, tile_shape, window, text_len), np.prod(shape) + text_len)
    np.testing.assert_array_equal(found[0], definition.mask(shape, tile_shape, window, text_len))
    divides = not any(length % tile for length, tile in zip(shape, tile_shape))
    assert (selection.predicate is None) == divides
    assert selection.q_block_size == selection.kv_block_size == np.prod(tile_shape)
    ids = np.asarray(selection.indices[0, 0])
    for row in ids:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


@pytest.mark.parametrize("text_len", [0, 7])
def test_each_head_has_its_window(text_len):
    shape, tile_shape, windows = (4, 6), (1, 2), ((1, 1), (3, 3), (2, 1), (4, 3))
    for num_windows, num_q_heads, num_kv_heads in ((4, 4, 2), (2, 4, 2), (4, 4, 4)):
        selector = SlidingTile(shape, tile_shape, windows[:num_windows], text_len)
        selection, found = selected_mask(selector, 24 + text_len, num_q_heads, num_kv_heads)
        assert selection.indices.shape[1] == num_windows
        for head in range(num_q_heads):
            window = windows[head * num_windows // num_q_heads]
            np.testing.assert_array_equal(found[head], definition.mask(shape, tile_shape, window, text_len))


def test_heads_with_equal_windows_share_their_lists():
    selection, found = selected_mask(SlidingTile((4, 6), 2, ((1, 3),) * 4), 24, 4, 2)
    assert selection.indices.shape == (1, 1, 6, 3)
    np.testing.assert_array_equal(found, selected_mask(SlidingTile((4, 6), 2, (1, 3)), 24, 4, 2)[1])


@pytest.mark.parametrize("window, is_neighborhood", [((1, 3), True), ((3, 3), True), ((2, 3), False)], ids=str)
def test_odd_windows_are_a_neighborhood_with_stride_and_window_of_whole_tiles(window, is_neighborhood):
    """An even window of tiles begins and ends with a tile; one of as many tokens begins within one."""
    shape, tile_shape = (8, 12), (2, 4)
    tokens = tuple(w * t for w, t in zip(window, tile_shape))
    wanted = neighborhood.mask(shape, tokens, tile_shape)
    found = selected_mask(SlidingTile(shape, tile_shape, window), 96)[1][0]
    assert (found == wanted).all() == is_neighborhood
    assert found.sum(axis=1).max() == found.sum(axis=1).min() == np.prod(tokens)
    if is_neighborhood:
        query = jnp.zeros((1, 96, 1, 8))
        gna = NeighborhoodAttention(shape, tokens, tile_shape, tile_shape=tile_shape)
        lists = gna(query, query, permutation=gna.permutation(query, query))
        sta = SlidingTile(shape, tile_shape, window)
        np.testing.assert_array_equal(sta(query, query, permutation=sta.permutation(query, query)).indices, lists.indices)
        assert lists.predicate is None


def test_windows_of_all_tiles_are_dense():
    assert selected_mask(SlidingTile((5, 7), (2, 3), (3, 3), text_len=3), 38)[1].all()


@pytest.mark.parametrize("text_len", [0, 200])
def test_kernels_take_the_tiles_of_hunyuan_video(text_len):
    """30 x 48 x 80 tokens in tiles of 384, which are three blocks of keys. Text ends anywhere and needs no predicate."""
    selector = SlidingTile((30, 48, 80), (6, 8, 8), ((3, 3, 3), (5, 1, 3)), text_len)
    query = jax.ShapeDtypeStruct((1, 115200 + text_len, 2, 64), jnp.bfloat16)

    def select():
        permutation = selector.permutation(query, query)
        assert not permutation.has_padding
        return selector(query, query, permutation=permutation)

    selection = jax.eval_shape(select)
    assert (selection.q_block_size, selection.kv_block_size, selection.predicate) == (384, 128, None)
    slots = 900 + 2 if text_len else 27 * 3
    assert selection.indices.shape == (1, 2, 301 if text_len else 300, slots)
    reasons = sa.explain(query, query, query, selection).reasons["mosaic"]
    assert not any("predicate" in reason or "block_size" in reason for reason in reasons)


def test_split_tiles_keep_their_text():
    """Tiles of 192 tokens, three blocks of 64; the text begins with the block after them."""
    selector = SlidingTile((2, 384), (1, 192), (1, 1), text_len=70)
    query = jnp.zeros((1, 838, 1, 8))
    selection = selector(query, query, permutation=selector.permutation(query, query))
    lists = [set(np.asarray(row)) - {-1} for row in selection.indices[0, 0]]
    assert lists == [{3 * tile, 3 * tile + 1, 3 * tile + 2, 12, 13} for tile in range(4)] + [set(range(14))]


def test_attention_is_that_of_the_definition():
    selector = SlidingTile((5, 6), (2, 3), ((1, 1), (3, 1), (2, 2), (1, 2)), text_len=4)
    query, key, value, d_out = normal(0, 2, 34, 4, 8), normal(1, 2, 34, 2, 8), normal(2, 2, 34, 2, 5), normal(3, 2, 34, 4, 5)

    @compile_fast
    def run(*operands):
        out, pull_back = jax.vjp(lambda *operands: sa.sparse_attention(*operands, selector), *operands)
        return out, *pull_back(d_out)

    mask = np.stack([definition.mask((5, 6), (2, 3), window, 4) for window in selector.window_size])
    out, _, *gradients = oracle.attention(mask, query, key, value, d_out=d_out)
    for x, y in zip(run(query, key, value), (out, *gradients[:3]), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


BAD_FIELDS = {
    "shape": ("`shape` is 8", dict(shape=8)),
    "tile rank": ("`tile_shape` is .* an int or 2 ints", dict(tile_shape=(2,))),
    "tile": (r"`tile_shape\[1\]` is 0", dict(tile_shape=(2, 0))),
    "window type": ("`window_size` is 3; it must be a tuple of ints, or one such tuple per head", dict(window_size=3)),
    "window empty": (r"`window_size` is \(\)", dict(window_size=())),
    "window list": (r"`window_size` is \[3, 3\]", dict(window_size=[3, 3])),
    "window rank": (r"`window_size` is \(3,\); of 2 dimensions", dict(window_size=(3,))),
    "head rank": (r"`window_size` is \(3, 3, 3\); of 2 dimensions", dict(window_size=((3, 3), (3, 3, 3)))),
    "mixed": ("`window_size` is 3; it must be a tuple of ints for each head", dict(window_size=((3, 3), 3))),
    "window 0": (r"`window_size\[0\]` is 0", dict(window_size=(0, 3))),
    "window": (r"`window_size` is \(3, 4\); in dimension 1 it must be at most the 3 tiles there are", dict(window_size=(3, 4))),
    "text": ("`text_len` is -1", dict(text_len=-1)),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(name):
    message, fields = BAD_FIELDS[name]
    with pytest.raises(ValueError, match=message):
        SlidingTile(**(dict(shape=(8, 9), tile_shape=(2, 3), window_size=(3, 3)) | fields))


SELECTOR = SlidingTile((8, 9), (2, 3), ((3, 3),) * 2 + ((1, 3),), text_len=2)
QUERY = jnp.zeros((1, 74, 3, 8))
BAD_CALLS = {
    "causal": ("`is_causal` is True", lambda: sa.sparse_attention(QUERY, QUERY, QUERY, SELECTOR, is_causal=True)),
    "tokens": ("`permutation` is None", lambda: SELECTOR(QUERY, QUERY)),
    "length": (
        "`query` is .* of length 74",
        lambda: sa.sparse_attention(QUERY[:, 2:], QUERY[:, 2:], QUERY[:, 2:], SELECTOR),
    ),
    "heads": (
        "`window_size` has windows for 3 heads; the call has 1 or 2 of them",
        lambda: sa.sparse_attention(QUERY[:, :, :2], QUERY[:, :, :1], QUERY[:, :, :1], SELECTOR),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_selector_is_frozen_and_hashable():
    assert SELECTOR.causal_safe and hash(SELECTOR) == hash(dataclasses.replace(SELECTOR))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SELECTOR.text_len = 1
