"""Neighborhood attention: the mask of the definition in raster order and in tiles, short lists, attention over them."""

import dataclasses
import itertools
import math
import tracemalloc

import grid_masks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.neighborhood import NeighborhoodAttention, NeighborhoodPredicate
from sparse_attn_jax.selectors.neighborhood_lists import AxisPattern, raster_lists, tile_axis
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import neighborhood as definition


def patterns_of(shape, window, stride, dilation, causal):
    return tuple(itertools.starmap(AxisPattern, zip(shape, window, stride, dilation, causal, strict=True)))


def random_cases(count, num_dims, longest, seed):
    """Legal neighborhoods of all kinds."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        shape = rng.integers(1, longest + 1, num_dims)
        dilation = [int(rng.integers(1, length + 1)) if rng.random() < 0.4 else 1 for length in shape]
        window = [int(rng.integers(1, length // step + 1)) for length, step in zip(shape, dilation)]
        stride = [int(rng.integers(1, size + 1)) if rng.random() < 0.6 else 1 for size in window]
        causal = [bool(rng.random() < 0.4) for _ in shape]
        yield tuple(map(int, shape)), tuple(window), tuple(stride), tuple(dilation), tuple(causal)


def touched_blocks(mask, block):
    """bool [query blocks, key blocks] of a token mask: where any query of the one sees any key of the other."""
    padding = -len(mask) % block
    mask = np.pad(mask, [(0, padding), (0, padding)])
    return mask.reshape(len(mask) // block, block, -1, block).any(axis=(1, 3))


def assert_lists(lists, wanted):
    """Lists of block ids mean the block mask `wanted`; each ascends, -1 last, without repeats."""
    found = np.zeros_like(wanted)
    for row, ids in enumerate(lists):
        kept = ids[ids >= 0]
        assert (np.diff(kept) > 0).all() and (ids[len(kept) :] == -1).all()
        found[row, kept] = True
    np.testing.assert_array_equal(found, wanted)


# ---- along one dimension, and in raster order: NumPy only


def test_predicate_is_the_definition_for_every_short_line():
    """All windows, strides, dilations and both kinds of causality up to a length of 9."""
    for length in range(1, 10):
        i, j = np.ogrid[:length, :length]
        for dilation in range(1, length + 1):
            for window, causal in itertools.product(range(1, length // dilation + 1), (False, True)):
                for stride in range(1, window + 1):
                    along = length, window, stride, dilation, causal
                    found = NeighborhoodPredicate((AxisPattern(*along),))(0, 0, i, j)
                    np.testing.assert_array_equal(found, definition.mask_along(*along), err_msg=str(along))
                    assert found.any(axis=1).all()


@pytest.mark.parametrize("num_dims, longest", [(2, 9), (3, 5)])
def test_predicate_is_the_definition_on_grids(num_dims, longest):
    for case in random_cases(40, num_dims, longest, seed=num_dims):
        i, j = np.ogrid[: math.prod(case[0]), : math.prod(case[0])]
        found = NeighborhoodPredicate(patterns_of(*case))(0, 0, i, j)
        np.testing.assert_array_equal(found, definition.mask(*case), err_msg=str(case))


@pytest.mark.parametrize("num_dims, longest", [(1, 60), (2, 14), (3, 7)])
def test_raster_lists_hold_the_blocks_with_a_visible_key_and_no_others(num_dims, longest):
    for case in random_cases(60, num_dims, longest, seed=num_dims):
        mask = definition.mask(*case)
        for block in (1, 4, 7, 16):
            assert_lists(raster_lists(patterns_of(*case), block), touched_blocks(mask, block))


def test_raster_lists_by_many_chunks(monkeypatch):
    case = (5, 6, 7), (3, 2, 3), (1, 1, 1), (1, 2, 2), (False, False, True)
    monkeypatch.setattr("sparse_attn_jax.selectors.neighborhood_lists.CHUNK_ENTRIES", 1)
    assert_lists(raster_lists(patterns_of(*case), 8), touched_blocks(definition.mask(*case), 8))


def test_tiles_of_a_line_are_those_with_a_visible_key_and_full_if_all_are():
    for case in random_cases(300, 1, 24, seed=5):
        ((length,), (window,), (stride,), (dilation,), (causal,)) = case
        mask = definition.mask(*case)
        for tile in (1, 2, 3, 5, 30):
            per_class = math.ceil(math.ceil(length / dilation) / tile)
            x = np.arange(length)
            of_token = x % dilation * per_class + x // dilation // tile
            wanted = np.zeros((per_class * dilation,) * 2, bool)
            np.logical_or.at(wanted, (of_token[:, None], of_token), mask)
            lists, is_full = tile_axis(AxisPattern(length, window, stride, dilation, causal), tile)
            assert_lists(lists, wanted)
            assert is_full == (mask == wanted[of_token[:, None], of_token]).all(), (case, tile)


@pytest.mark.parametrize("is_tiled", [False, True], ids=["raster", "tiles"])
@pytest.mark.parametrize(
    "shape, window, dilation",
    [
        ((30, 48, 80), (18, 24, 24), 1),
        ((30, 48, 80), (30, 48, 80), 1),
        ((30, 48, 80), (6, 8, 8), (1, 2, 3)),
        ((2**19,), 257, 2),
    ],
    ids=["window", "all", "dilated", "line"],
)
def test_lists_of_a_long_video_are_made_in_little_memory(shape, window, dilation, is_tiled):
    tile_shape = {1: 64, 3: (2, 4, 8)}[len(shape)] if is_tiled else None
    selector = NeighborhoodAttention(shape, window, dilation=dilation, tile_shape=tile_shape)

    def select():
        query = jnp.zeros((1, math.prod(shape), 1, 8), jnp.bfloat16)
        permutation = selector.permutation(query, query)
        query = permutation.apply(query) if is_tiled else query
        return selector(query, query, permutation=permutation)

    tracemalloc.start()
    jax.eval_shape(select)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28, peak / 2**20


# ---- the selector


def selected_mask(selector):
    return grid_masks.selected_mask(selector, math.prod(selector.shape))


CASES = {
    "line": ((43,), (7,), (1,), (1,), (False,)),
    "dilated line": ((43,), (6,), (4,), (3,), (False,)),
    "causal line": ((43,), (9,), (4,), (1,), (True,)),
    "picture": ((9, 14), (3, 6), (1, 1), (1, 1), (False, False)),
    "strided picture": ((12, 10), (5, 4), (3, 4), (2, 1), (False, False)),
    "half causal picture": ((8, 9), (4, 3), (2, 1), (1, 2), (True, False)),
    "video": ((4, 6, 7), (3, 2, 5), (1, 2, 2), (1, 3, 1), (True, False, False)),
}
TILES = {1: 5, 2: (4, 3), 3: (2, 1, 4)}


def selector_of(name, **options):
    shape, window, stride, dilation, causal = CASES[name]
    return NeighborhoodAttention(shape, window, stride, dilation, causal, **options)


@pytest.mark.parametrize("name", CASES)
def test_selector_means_the_definition_in_raster_order_and_in_tiles(name):
    wanted = definition.mask(*CASES[name])
    raster, found = selected_mask(selector_of(name, block_size=16))
    assert (raster.q_block_size, raster.kv_block_size) == (16, 16) and raster.indices.dtype == jnp.int32
    np.testing.assert_array_equal(found[0], wanted)
    tiled, found = selected_mask(selector_of(name, tile_shape=TILES[len(CASES[name][0])]))
    assert tiled.q_block_size == tiled.kv_block_size == np.prod(TILES[len(CASES[name][0])])
    np.testing.assert_array_equal(found[0], wanted)


def test_a_window_of_all_is_dense():
    for selector in (NeighborhoodAttention((5, 7), (5, 7)), NeighborhoodAttention((5, 7), (5, 7), (2, 3), tile_shape=(2, 3))):
        assert selected_mask(selector)[1].all()
    assert selected_mask(NeighborhoodAttention((20,), 20, block_size=8))[0].predicate is None


def test_stride_of_a_window_that_divides_is_block_diagonal():
    """Windows that do not overlap, as of HiLo's Hi-Fi heads and of Swin; in tiles no predicate is needed."""
    selector = NeighborhoodAttention((6, 8), (3, 4), stride=(3, 4), tile_shape=(3, 4))
    window = np.add.outer(np.arange(6) // 3 * 2, np.arange(8) // 4).reshape(-1)
    selection, found = selected_mask(selector)
    np.testing.assert_array_equal(found[0], window[:, None] == window)
    assert selection.predicate is None
    np.testing.assert_array_equal(selection.indices[0, 0], np.arange(4)[:, None])
    np.testing.assert_array_equal(selected_mask(dataclasses.replace(selector, tile_shape=None))[1], found)


@pytest.mark.parametrize(
    "selector, is_full",
    [
        (NeighborhoodAttention((16, 16), (12, 12), (4, 4), tile_shape=(4, 4)), True),
        (NeighborhoodAttention((16, 16), (12, 12), (4, 4), tile_shape=(2, 2)), True),
        (NeighborhoodAttention((16, 16), (6, 6), (2, 2), dilation=2, tile_shape=(2, 2)), True),
        (NeighborhoodAttention((16, 16), (12, 12), (4, 4), tile_shape=(4, 8)), False),
        (NeighborhoodAttention((16, 16), (12, 12), (4, 2), tile_shape=(4, 4)), False),
        (NeighborhoodAttention((16, 16), (12, 10), (4, 4), tile_shape=(4, 4)), False),
        (NeighborhoodAttention((16, 18), (12, 12), (4, 4), tile_shape=(4, 4)), False),
        (NeighborhoodAttention((16, 17), (6, 6), (2, 2), dilation=2, tile_shape=(2, 2)), False),
        (NeighborhoodAttention((16, 16), (12, 12), (4, 4), causal_dims=(True, False), tile_shape=(4, 4)), False),
        (NeighborhoodAttention((48,), 48, 16, tile_shape=16), True),
        (NeighborhoodAttention((50,), 16, 16, block_size=16), False),
        (NeighborhoodAttention((48,), 16, 16, block_size=16), True),
        (NeighborhoodAttention((50,), 50, 3, block_size=16), True),
    ],
    ids=str,
)
def test_a_predicate_is_left_out_exactly_if_tiles_say_it_all(selector, is_full):
    selection, found = selected_mask(selector)
    assert (selection.predicate is None) == is_full
    num_dims = len(selector.shape)
    names = ("window_size", "stride", "dilation", "causal_dims")
    options = (tuple(np.broadcast_to(getattr(selector, name), num_dims)) for name in names)
    np.testing.assert_array_equal(found[0], definition.mask(selector.shape, *options))


def test_kernels_take_full_tiles():
    """Of 256 tokens too, which are two blocks of keys."""
    selector = NeighborhoodAttention((32, 32), (16, 16), (16, 16), tile_shape=(16, 16))
    query = jnp.zeros((1, 1024, 2, 64), jnp.bfloat16)
    selection = selector(query, query, permutation=selector.permutation(query, query))
    assert (selection.q_block_size, selection.kv_block_size) == (256, 128)
    np.testing.assert_array_equal(selection.indices[0, 0], [[0, 1], [2, 3], [4, 5], [6, 7]])
    reasons = sa.explain(query, query, query, selection).reasons["mosaic"]
    assert not any("predicate" in reason or "block_size" in reason for reason in reasons)


def test_a_line_is_tiled_already():
    query = jnp.zeros((1, 43, 1, 8))
    assert NeighborhoodAttention((43,), 8, tile_shape=4).permutation(query, query) is None
    assert NeighborhoodAttention((43,), 8, dilation=2, tile_shape=4).permutation(query, query) is not None
    assert NeighborhoodAttention((43, 1), (8, 1)).permutation(query, query) is None


# ---- attention

SHAPE = (6, 7)
QUERY, KEY, VALUE, D_OUT = normal(0, 2, 42, 4, 8), normal(1, 2, 42, 2, 8), normal(2, 2, 42, 2, 5), normal(3, 2, 42, 4, 5)


@pytest.mark.parametrize("tile_shape", [None, (2, 4)], ids=["raster", "tiles"])
def test_attention_and_gradients_are_those_of_the_definition(tile_shape):
    selector = NeighborhoodAttention(SHAPE, (3, 4), (1, 2), (2, 1), tile_shape=tile_shape, block_size=8)

    @compile_fast
    def run(*operands):
        attend = lambda *operands: sa.sparse_attention(*operands, selector)
        out, pull_back = jax.vjp(attend, *operands)
        return out, *pull_back(D_OUT)

    found = run(QUERY, KEY, VALUE)
    mask = definition.mask(SHAPE, (3, 4), (1, 2), (2, 1))
    out, _, *gradients = oracle.attention(mask, QUERY, KEY, VALUE, d_out=D_OUT)
    for x, y in zip(found, (out, *gradients[:3]), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_text_that_all_see_is_a_second_call():
    selector = NeighborhoodAttention(SHAPE, 3, tile_shape=(3, 2))
    text_key, text_value = normal(4, 2, 5, 2, 8), normal(5, 2, 5, 2, 5)

    @compile_fast
    def run():
        near, near_lse = sa.sparse_attention(QUERY, KEY, VALUE, selector, return_residual=True)
        text, text_lse = sa.sparse_attention(QUERY, text_key, text_value, sa.selectors.Dense(), return_residual=True)
        return sa.merge_attention([near, text], [near_lse, text_lse])

    mask = np.pad(definition.mask(SHAPE, (3, 3)), [(0, 0), (0, 5)], constant_values=True)
    key, value = (np.concatenate(pair, axis=1) for pair in ((KEY, text_key), (VALUE, text_value)))
    out, lse, *_ = oracle.attention(mask, QUERY, key, value)
    for x, y in zip(run(), (out, lse), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


# ---- refusals

BAD_FIELDS = {
    "shape": (r"`shape` is 6", dict(shape=6)),
    "length": (r"`shape\[1\]` is 0; it must be an int of at least 1", dict(shape=(6, 0))),
    "window": ("`window_size` is 0", dict(window_size=0)),
    "window rank": (r"`window_size` is \(3,\); of 2 dimensions it must be an int or 2 ints", dict(window_size=(3,))),
    "long window": (
        "`window_size` is 7; in dimension 0 with dilation 1 it spans 7 tokens, and must fit in 6",
        dict(window_size=7),
    ),
    "dilation": ("in dimension 1 with dilation 3 it spans 9 tokens, and must fit in 7", dict(dilation=(2, 3))),
    "dilation 0": (r"`dilation\[0\]` is 0", dict(dilation=(0, 1))),
    "stride": ("`stride` is 4; in dimension 0 it must be at most the window, 3", dict(stride=4)),
    "stride 0": ("`stride` is 0", dict(stride=0)),
    "causal": ("`causal_dims` is 1; it must be True or False", dict(causal_dims=1)),
    "causal rank": ("`causal_dims` is .* a bool or 2 bools", dict(causal_dims=(True,))),
    "tile rank": (r"`tile_shape` is \(2, 2, 2\); of 2 dimensions", dict(tile_shape=(2, 2, 2))),
    "tile": (r"`tile_shape\[0\]` is 0", dict(tile_shape=(0, 2))),
    "block": ("`block_size` is 0", dict(block_size=0)),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(name):
    message, fields = BAD_FIELDS[name]
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(**(dict(shape=SHAPE, window_size=3) | fields))


RASTER = NeighborhoodAttention(SHAPE, 3)
TILED = NeighborhoodAttention(SHAPE, 3, tile_shape=2)
BAD_CALLS = {
    "causal": ("`is_causal` is True; .* use `causal_dims`", lambda: RASTER(QUERY, KEY, is_causal=True)),
    "causal tiles": ("`is_causal` is True", lambda: sa.sparse_attention(QUERY, KEY, VALUE, TILED, is_causal=True)),
    "offset": ("`q_offset` is 1", lambda: RASTER(QUERY, KEY, q_offset=1)),
    "queries": ("`query` has 41 tokens; the grid has 42", lambda: RASTER(QUERY[:, 1:], KEY)),
    "keys": ("`key` has 41 tokens", lambda: RASTER(QUERY, KEY[:, 1:])),
    "length": ("`query` is .* of length 42", lambda: sa.sparse_attention(QUERY[:, 1:], KEY, VALUE, TILED)),
    "raster tokens": ("`permutation` is None; .* call `sparse_attention`", lambda: TILED(QUERY, KEY)),
    "tiled tokens": (
        "`permutation` is given; for this selector it must be None",
        lambda: RASTER(QUERY, KEY, permutation=TILED.permutation(QUERY, KEY)),
    ),
    "other tiles": (
        "of 42 tokens to 72; it must be that of the selector, of 42 tokens to 48",
        lambda: TILED(QUERY, KEY, permutation=dataclasses.replace(TILED, tile_shape=6).permutation(QUERY, KEY)),
    ),
    "not permuted": ("`query` has 42 tokens; the grid has 42, in this order 48", lambda: TILED(
        QUERY, KEY, permutation=TILED.permutation(QUERY, KEY))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_selector_is_frozen_and_hashable():
    assert TILED.causal_safe and hash(TILED) == hash(dataclasses.replace(TILED)) and TILED == dataclasses.replace(TILED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TILED.block_size = 1
