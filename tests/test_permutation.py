"""Permutations of tokens: tiles become blocks, what is permuted comes back, attention does not notice."""

import dataclasses
import itertools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal

import sparse_attn_jax as sa
from sparse_attn_jax.permutation import TokenPermutation, tile_tokens

TILINGS = {
    "1-D": ((7,), (4,), (1,)),
    "1-D dilated": ((11,), (2,), (3,)),
    "2-D": ((6, 8), (3, 4), (1, 1)),
    "2-D dilated": ((7, 9), (2, 3), (2, 1)),
    "3-D": ((3, 5, 4), (2, 2, 3), (1, 1, 1)),
    "3-D dilated": ((4, 6, 5), (1, 2, 2), (1, 3, 2)),
    "a tile larger than the grid": ((3, 2), (4, 4), (1, 1)),
}


def permuted_places(shape, tile, dilation):
    """By definition: (block, place in the block) of each token in raster order, and the numbers of tiles."""
    per_class = [math.ceil(math.ceil(length / step) / t) for length, t, step in zip(shape, tile, dilation)]
    num_tiles = [n * step for n, step in zip(per_class, dilation)]
    for token in itertools.product(*map(range, shape)):
        along = [divmod(x, step) for x, step in zip(token, dilation)]  # (index in its class, residue)
        tiles = [residue * n + index // t for (index, residue), n, t in zip(along, per_class, tile)]
        inside = [index % t for (index, _), t in zip(along, tile)]
        yield np.ravel_multi_index(tiles, num_tiles), np.ravel_multi_index(inside, tile), math.prod(num_tiles)


@pytest.mark.parametrize("name", TILINGS)
def test_a_tile_is_a_block(name):
    shape, tile, dilation = TILINGS[name]
    permutation = tile_tokens(shape, tile, dilation)
    places = list(permuted_places(shape, tile, dilation))
    wanted = np.full(places[0][2] * math.prod(tile), -1)
    for token, (block, inside, _) in enumerate(places):
        wanted[block * math.prod(tile) + inside] = token
    np.testing.assert_array_equal(permutation.order, wanted)
    assert permutation.length == math.prod(shape) and permutation.order.dtype == jnp.int32
    assert permutation.has_padding == (-1 in wanted)


def test_a_tiling_that_a_reader_can_follow():
    """Dilation 2 along the columns: even ones first; tiles of 1 x 2, so there is no padding."""
    np.testing.assert_array_equal(tile_tokens((2, 4), (1, 2), (1, 2)).order, [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(tile_tokens((2, 3), 2).order, [0, 1, 3, 4, 2, -1, 5, -1])


def random_orders(permuted_len, length, *leading, seed=0):
    """Orders with padding anywhere, of both kinds: -1 and beyond the last token."""
    rng = np.random.default_rng(seed)
    orders = np.where(np.arange(permuted_len) < length, np.arange(permuted_len), -1)
    orders[length + 1 :] = length + 5
    return jnp.asarray(rng.permuted(np.broadcast_to(orders, (*leading, permuted_len)), axis=-1), jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_order_along_any_axis(axis, dtype):
    order = np.asarray(random_orders(9, 6))
    permutation = TokenPermutation(jnp.asarray(order), length=6)
    x = (10 * jnp.moveaxis(normal(1, 6, 2, 3), 0, axis)).astype(dtype)
    found = np.moveaxis(np.asarray(permutation.apply(x, axis), np.float64), axis, 0)
    rows = np.moveaxis(np.asarray(x, np.float64), axis, 0)
    for place, token in enumerate(order):
        np.testing.assert_array_equal(found[place], rows[token] if 0 <= token < 6 else 0)
    np.testing.assert_array_equal(permutation.undo(permutation.apply(x, axis), axis), x)


@pytest.mark.parametrize("leading", [(1, 1), (2, 1), (1, 2), (2, 4)], ids=str)
def test_orders_by_batch_row_and_head(leading):
    permutation = TokenPermutation(random_orders(9, 6, *leading), length=6)
    orders = np.broadcast_to(np.asarray(permutation.order).repeat(4 // leading[1], axis=1), (2, 4, 9))
    x = normal(1, 2, 6, 4, 3)
    found = compile_fast(TokenPermutation.apply)(permutation, x)
    for b, place, h in np.ndindex(2, 9, 4):
        token = orders[b, h, place]
        np.testing.assert_array_equal(found[b, place, h], x[b, token, h] if 0 <= token < 6 else 0)
    np.testing.assert_array_equal(compile_fast(TokenPermutation.undo)(permutation, found), x)
    np.testing.assert_array_equal(
        permutation.inverse().inverse().order >= 0, (permutation.order >= 0) & (permutation.order < 6)
    )


@pytest.mark.parametrize("leading", [(), (2, 2)], ids=["one order", "orders by head"])
def test_gradients_go_the_other_way(leading):
    permutation = TokenPermutation(random_orders(9, 6, *leading), length=6)
    short, long = normal(1, 2, 6, 4, 3), normal(2, 2, 9, 4, 3)

    @compile_fast
    def pull_back(short, long):
        (d_short,) = jax.vjp(permutation.apply, short)[1](long)
        (d_long,) = jax.vjp(permutation.undo, long)[1](short)
        return d_short, d_long, permutation.undo(long), permutation.apply(short)

    d_short, d_long, undone, applied = pull_back(short, long)
    np.testing.assert_array_equal(d_short, undone)
    np.testing.assert_array_equal(d_long, applied)


def test_a_permutation_is_a_pytree():
    orders = random_orders(9, 6, 3, 1, 2)
    x = normal(1, 3, 1, 6, 2)
    together = jax.vmap(lambda order, x: TokenPermutation(order, length=6).apply(x))(orders, x)
    for i in range(3):
        np.testing.assert_array_equal(together[i], TokenPermutation(orders[i], length=6).apply(x[i]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), tile_tokens((6,), 4), tile_tokens((6,), 4))
    assert stacked.order.shape == (2, 8) and stacked.length == 6


PERMUTATION = tile_tokens((6,), 4)
BY_HEAD = TokenPermutation(random_orders(9, 6, 2, 2), length=6)
BAD = {
    "length": (
        r"`x` has shape \(2, 7, 1\); it must have 6 tokens along axis 1",
        lambda: PERMUTATION.apply(jnp.zeros((2, 7, 1))),
    ),
    "undo": ("it must have 8 tokens", lambda: PERMUTATION.undo(jnp.zeros((2, 6, 1)))),
    "axis": ("along axis 3", lambda: PERMUTATION.apply(jnp.zeros((2, 6, 1)), 3)),
    "head axis": ("`axis` is 2 .* orders differ", lambda: BY_HEAD.apply(jnp.zeros((2, 2, 6)), 2)),
    "no heads": ("orders differ, so `x` must be", lambda: BY_HEAD.apply(jnp.zeros((2, 6)))),
    "batch": ("needs batch size 2", lambda: BY_HEAD.apply(jnp.zeros((3, 6, 2)))),
    "heads": ("a multiple of 2 heads", lambda: BY_HEAD.apply(jnp.zeros((2, 6, 3)))),
    "order": (r"`order` has shape \(2, 9\)", lambda: TokenPermutation(BY_HEAD.order[0], length=6).apply(jnp.zeros((2, 6, 2)))),
    "shape": (r"`shape` is \[6\]; it must be a tuple of 1 to 3 ints", lambda: tile_tokens([6], 4)),
    "dims": ("`shape` is", lambda: tile_tokens((1, 2, 3, 4), 4)),
    "size": (r"`shape\[1\]` is 0", lambda: tile_tokens((6, 0), 4)),
    "too many": ("1125899906842624 tokens", lambda: tile_tokens((2**25, 2**25), 4)),
    "tile rank": ("`tile_shape` is .* an int or 1 ints", lambda: tile_tokens((6,), (2, 2))),
    "tile": ("`tile_shape` is 0", lambda: tile_tokens((6,), 0)),
    "dilation": (r"`dilation\[1\]` is 0", lambda: tile_tokens((6, 6), 2, (1, 0))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# ---- sparse_attention permutes, and undoes it


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Every key, in another order."""

    order: Any
    length: int = 21
    hides: bool = True
    causal_safe: bool = True

    def permutation(self, query, key):
        return TokenPermutation(self.order, length=self.length)

    def __call__(self, query, key, *, is_causal=False, permutation):
        assert query.shape[1] == key.shape[1] == permutation.permuted_len
        predicate = permutation.predicate(query.shape[2], is_causal=is_causal) if self.hides else None
        ids = jnp.arange(-(-key.shape[1] // 8), dtype=jnp.int32)[None, None, None]
        return sa.BlockSelection(ids, q_block_size=key.shape[1], kv_block_size=8, predicate=predicate)


QUERY, KEY, VALUE = normal(0, 2, 21, 4, 8), normal(1, 2, 21, 2, 8), normal(2, 2, 21, 2, 5)
BIAS = normal(3, 2, 2, 21)
SEGMENTS = jnp.asarray(np.arange(42).reshape(2, 21) // 9)
D_OUT, D_LSE = normal(4, 2, 21, 4, 5), normal(5, 2, 21, 4)


def attend(selector, query=QUERY, key=KEY, value=VALUE, key_bias=BIAS, **options):
    return sa.sparse_attention(query, key, value, selector, key_bias=key_bias, return_residual=True, **options)


def results(selector, **options):
    @compile_fast
    def run(*operands):
        found, pull_back = jax.vjp(lambda *operands: attend(selector, *operands, **options), *operands)
        return *found, *pull_back((D_OUT, D_LSE))

    return run(QUERY, KEY, VALUE, BIAS)


@pytest.mark.parametrize("leading, is_causal", [((), False), ((1, 4), True)], ids=["one order", "orders by query head"])
def test_attention_in_another_order_is_the_same(leading, is_causal):
    segments = {} if leading else dict(query_segment_ids=SEGMENTS, key_value_segment_ids=SEGMENTS)
    found = results(Shuffled(random_orders(26, 21, *leading)), is_causal=is_causal, **segments)
    wanted = results(sa.selectors.Dense(8), is_causal=is_causal, **segments)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_nothing_sees_padding_and_padding_sees_nothing():
    permutation = TokenPermutation(random_orders(26, 21, 2, 2), length=21)
    b, h, i, j = np.ogrid[:2, :4, :26, :26]
    for is_causal in (False, True):
        kept = permutation.predicate(4, is_causal=is_causal, predicate=lambda b, h, i, j: (i - j) % 2 == b)(b, h, i, j)
        orders = np.asarray(permutation.order).repeat(2, axis=1)
        q, kv = orders[..., :, None], orders[..., None, :]
        wanted = (q >= 0) & (q < 21) & (kv >= 0) & (kv < 21) & ((q - kv) % 2 == b) & ((kv <= q) | (not is_causal))
        np.testing.assert_array_equal(kept, wanted)


def test_a_key_that_nobody_sees_stays_unread():
    """Its value, in its place between others, is NaN."""
    key, value = (x.at[:, 5].set(jnp.nan) for x in (KEY, VALUE))
    segments = dict(query_segment_ids=SEGMENTS, key_value_segment_ids=SEGMENTS.at[:, 5].set(99))

    def loss(key, value):
        return (attend(Shuffled(ORDER), QUERY, key, value, is_causal=True, **segments)[0] ** 2).sum()

    for gradient in compile_fast(jax.grad(loss, (0, 1)))(key, value):
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[:, 5].any()


ORDER = random_orders(26, 21)
BAD_CALLS = {
    "window": ("`local_window_size` is 3; it must be None", ORDER, dict(local_window_size=3)),
    "sinks": ("`num_sinks` is 1; it must be 0", ORDER, dict(num_sinks=1)),
    "offset": ("`q_offset` is 2; it must be 0 or None", ORDER, dict(q_offset=2)),
    "offset array": ("`q_offset` is int32", ORDER, dict(q_offset=jnp.zeros((), jnp.int32))),
    "query length": (r"`query` is float32\[2, 20, 4, 8\]; it must be of length 21", ORDER, dict(query=QUERY[:, 1:])),
    "heads": ("orders .* of 1 or 2 or 4 heads", random_orders(26, 21, 2, 3), {}),
    "segments": (r"`query_segment_ids` is .*\[2, 26\]", ORDER, dict.fromkeys(
        ("query_segment_ids", "key_value_segment_ids"), jnp.zeros((2, 26), jnp.int32))),
    "segments by head": ("each head has its tokens in another order", random_orders(26, 21, 2, 2), dict.fromkeys(
        ("query_segment_ids", "key_value_segment_ids"), SEGMENTS)),
    "bias": (r"`key_bias` is float32\[2, 4, 21\]", ORDER, dict(key_bias=normal(0, 2, 4, 21))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_that_an_order_cannot_serve_are_refused(name):
    message, order, options = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        attend(Shuffled(order), **options)


def test_a_selection_has_to_hide_padding_and_later_tokens():
    with pytest.raises(ValueError, match="without a predicate, which has to hide the padding"):
        attend(Shuffled(ORDER, hides=False))
    reverse = Shuffled(jnp.arange(21, dtype=jnp.int32)[::-1], hides=False)
    with pytest.raises(ValueError, match="has to hide later tokens in the original order"):
        attend(reverse, is_causal=True)
    jax.eval_shape(lambda: attend(reverse))


def test_training_with_an_unsafe_order_warns():
    def trace(is_causal):
        loss = lambda query: attend(Shuffled(ORDER, causal_safe=False), query, is_causal=is_causal)[0].sum()
        return jax.eval_shape(jax.grad(loss), QUERY)

    with pytest.warns(UserWarning, match="Shuffled is not causal-safe"):
        trace(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(False)
