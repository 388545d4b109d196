"""Bi-level routing: the regions of the definition, and attention over them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.bi_level_routing import BiLevelRouting
from sparse_attn_jax.testing import oracle, selection_oracle
from sparse_attn_jax.testing.methods import bi_level_routing as definition


def make_inputs(shape, num_q_heads=4, num_kv_heads=2):
    length = math.prod(shape)
    return normal(0, 2, length, num_q_heads, 8), normal(1, 2, length, num_kv_heads, 8), normal(2, 2, length, num_kv_heads, 5)


def select(selector, query, key):
    @compile_fast
    def run(query, key):
        permutation = selector.permutation(query, key)
        return selector(permutation.apply(query), permutation.apply(key), permutation=permutation)

    return run(query, key)


CASES = {
    "divides": ((9, 12), 3, 2),
    "last regions are smaller": ((10, 11), 3, 4),
    "fewer regions": ((8, 9), 7, 10),
    "line": ((20,), 7, 3),
    "video": ((3, 4, 5), 2, 3),
    "one token a region": ((4, 4), 4, 5),
}


@pytest.mark.parametrize("name, num_q_heads", [*((name, 6) for name in CASES), ("divides", 2)])
def test_regions_are_those_of_the_definition(name, num_q_heads):
    shape, num_regions, top_k = CASES[name]
    selector = BiLevelRouting(shape, num_regions, top_k)
    query, key, _ = make_inputs(shape, num_q_heads)
    selection = select(selector, query, key)
    region = definition.regions(shape, num_regions)
    scores = definition.scores(query, key, region)
    wanted = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :top_k], axis=-1)
    assert selection.indices.shape == wanted.shape and selection.indices.dtype == jnp.int32
    selection_oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)
    size = math.prod(-(-length // num_regions) for length in shape)
    assert selection.q_block_size == selection.kv_block_size == size
    assert (selection.predicate is None) == (size * (region.max() + 1) == math.prod(shape))


def test_lower_region_wins_a_tie_and_nan_is_not_chosen():
    query, key, _ = make_inputs((4, 8))
    selector = BiLevelRouting((4, 8), 2, 3)
    np.testing.assert_array_equal(select(selector, query, jnp.ones_like(key)).indices[0, 0], [[0, 1, 2]] * 4)
    with_nan = select(selector, query, key.at[:, 0].set(jnp.nan)).indices
    np.testing.assert_array_equal(with_nan, np.broadcast_to([1, 2, 3], with_nan.shape))


def test_all_regions_are_every_block_in_one_list():
    query, key, _ = make_inputs((5, 6))
    np.testing.assert_array_equal(
        select(BiLevelRouting((5, 6), 2, 4), query, key).indices, np.ones((2, 1, 4, 1)) * np.arange(4)
    )


def test_attention_and_gradients_are_those_of_the_definition():
    shape = (5, 8)
    selector = BiLevelRouting(shape, 3, 2)
    query, key, value = make_inputs(shape)
    d_out = normal(3, 2, math.prod(shape), 4, 5)

    @compile_fast
    def run(*operands):
        out, pull_back = jax.vjp(lambda *operands: sa.sparse_attention(*operands, selector), *operands)
        return out, *pull_back(d_out)

    out, _, *gradients = oracle.attention(definition.mask(query, key, shape, 3, 2), query, key, value, d_out=d_out)
    for x, y in zip(run(query, key, value), (out, *gradients[:3]), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_selection_of_half_precision_is_that_of_its_values():
    query, key, _ = (x.astype(jnp.bfloat16) for x in make_inputs((9, 12)))
    selection = select(BiLevelRouting((9, 12), 3, 2), query, key)
    scores = definition.scores(query, key, definition.regions((9, 12), 3))
    wanted = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :2], axis=-1)
    selection_oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)


BAD_FIELDS = {
    "shape": (r"`shape` is \[9, 12\]", dict(shape=[9, 12])),
    "regions": ("`num_regions` is 0", dict(num_regions=0)),
    "many regions": (r"`num_regions` is 10; the lengths of \(9, 12\) must be at least that", dict(num_regions=10)),
    "top_k": ("`top_k` is 0", dict(top_k=0)),
    "large top_k": ("`top_k` is 50; there are 49 regions", dict(top_k=50)),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(name):
    message, fields = BAD_FIELDS[name]
    with pytest.raises(ValueError, match=message):
        BiLevelRouting(**(dict(shape=(9, 12)) | fields))


QUERY, KEY, VALUE = make_inputs((9, 12))
SELECTOR = BiLevelRouting((9, 12))
BAD_CALLS = {
    "causal": ("`is_causal` is True", lambda: sa.sparse_attention(QUERY, KEY, VALUE, SELECTOR, is_causal=True)),
    "offset": ("`q_offset` is 3", lambda: sa.sparse_attention(QUERY, KEY, VALUE, SELECTOR, q_offset=3)),
    "tokens": ("`permutation` is None", lambda: SELECTOR(QUERY, KEY)),
    "length": ("`key` is .* of length 108", lambda: sa.sparse_attention(QUERY, KEY[:, 1:], VALUE[:, 1:], SELECTOR)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_selector_is_frozen_hashable_and_not_causal_safe():
    assert not SELECTOR.causal_safe and hash(SELECTOR) == hash(dataclasses.replace(SELECTOR))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SELECTOR.top_k = 1
