"""VerticalSlash, and what selectors share that look at the last queries, against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs, visible_mask

import sparse_attn_jax as sa
from sparse_attn_jax.selectors import probe as library_probe
from sparse_attn_jax.selectors.vertical_slash import VerticalSlash
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import probe
from sparse_attn_jax.testing.methods import vertical_slash as definition

SMALL = VerticalSlash(num_vertical=7, num_slash=6, num_forced_columns=2, num_forced_diagonals=3, num_probe=9, block_size=8)
BUDGETS = ("num_vertical", "num_slash", "num_forced_columns", "num_forced_diagonals", "num_probe")


def expected_keep(selector, query, key, positions):
    return definition.keep(query, key, positions, **{name: getattr(selector, name) for name in BUDGETS})


CASES = {
    "offset": (SMALL, (43, 75), (21, 21)),
    "offset-by-row": (SMALL, (43, 75), (0, 37)),
    "past-the-keys": (SMALL, (43, 75), (60, 90)),
    "before-the-keys": (SMALL, (43, 75), (-20, -50)),
    "one-query-and-less-than-a-block": (SMALL, (1, 5), None),
    "block-plus-1": (SMALL, (9, 9), None),
    "budgets-beyond-length": (VerticalSlash(block_size=8), (43, 75), None),
    "short-lists": (dataclasses.replace(SMALL, num_vertical=3, num_slash=4, block_size=4), (43, 75), None),
    "columns-alone": (dataclasses.replace(SMALL, num_slash=0, num_forced_columns=0, num_forced_diagonals=0), (43, 75), None),
}


@pytest.mark.parametrize("name", CASES)
def test_vertical_slash_is_its_definition(name):
    selector, (q_len, kv_len), q_offset = CASES[name]
    query, key = make_inputs(q_len, kv_len, num_q_heads=3, num_kv_heads=1, batch=2)
    positions = probe.absolute_positions(q_offset, 2, q_len, kv_len)
    q_offset = q_offset and jnp.asarray(q_offset)
    selection = selector(query, key, is_causal=True, q_offset=q_offset)
    columns, diagonals = expected_keep(selector, query, key, positions)
    np.testing.assert_array_equal(selection.predicate.column_keep, columns)
    np.testing.assert_array_equal(selection.predicate.diagonal_keep, diagonals)
    wanted = definition.token_mask(columns, diagonals, positions)
    found = visible_mask(selection, query, key, is_causal=True, q_offset=q_offset)
    np.testing.assert_array_equal(found, wanted)
    tiles = definition.tiles(wanted, selector.block_size)
    np.testing.assert_array_equal(selection.to_block_mask(kv_len), tiles)
    if name == "short-lists":
        assert selection.indices.shape[-1] == 1 + 1 + 3 + 2 < tiles.shape[-1]


def test_vertical_slash_without_a_predicate_sees_whole_tiles_and_all_that_the_original_does():
    query, key = make_inputs(72, 72, num_q_heads=4, num_kv_heads=2)
    exact = SMALL(query, key, is_causal=True)
    rounded = dataclasses.replace(SMALL, exact=False)(query, key, is_causal=True)
    assert rounded.predicate is None
    np.testing.assert_array_equal(rounded.indices, exact.indices)
    positions = np.arange(72)[None]
    keep = expected_keep(SMALL, query, key, positions)
    asked, ranges = definition.token_mask(*keep, positions), definition.kernel_mask(*keep, positions, 8)
    found = visible_mask(rounded, query, key, is_causal=True)
    assert (asked <= ranges).all() and (ranges <= found).all()
    assert asked.sum() < ranges.sum() < found.sum() < 4 * 72 * 73 / 2


def test_vertical_slash_attends_as_defined():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    value = key[..., ::-1]
    out = jax.jit(lambda *operands: sa.sparse_attention(*operands, SMALL, is_causal=True))(query, key, value)
    positions = probe.absolute_positions(None, 2, 43, 75)
    mask = definition.token_mask(*expected_keep(SMALL, query, key, positions), positions)
    np.testing.assert_allclose(out, oracle.attention(mask, query, key, value)[0], atol=1e-5)


def test_vertical_slash_grows_with_its_budgets():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    selectors = [CASES["short-lists"][0], SMALL, CASES["budgets-beyond-length"][0]]
    masks = [visible_mask(selector(query, key, is_causal=True), query, key, is_causal=True) for selector in selectors]
    assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all()
    np.testing.assert_array_equal(masks[2], np.broadcast_to(np.tri(43, 75, 32, dtype=bool), masks[2].shape))


def test_vertical_slash_ignores_keys_that_no_query_sees():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    options = dict(is_causal=True, q_offset=jnp.asarray([20, 20]))
    poisoned = SMALL(query, key.at[:, 63:].set(jnp.nan), **options)
    jax.tree.map(np.testing.assert_array_equal, poisoned, SMALL(query, key, **options))


def test_vertical_slash_under_jit_and_vmap_is_itself():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    offsets = jnp.asarray([0, 37])
    selection = SMALL(query, key, is_causal=True, q_offset=offsets)
    select = lambda q, k, offset: SMALL(q[None], k[None], is_causal=True, q_offset=offset)
    mapped = jax.jit(jax.vmap(select))(query, key, offsets)
    jax.tree.map(lambda found, wanted: np.testing.assert_array_equal(found[:, 0], wanted), mapped, selection)


@pytest.mark.parametrize("chunk_rows", [1, 4, 9])
def test_probe_is_its_definition_however_it_is_divided(chunk_rows, monkeypatch):
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    monkeypatch.setattr(library_probe, "CHUNK_ELEMENTS", chunk_rows * 2 * 3 * 75)
    columns, diagonals = library_probe.probe_mass(query, key, jnp.asarray([-4, 50]), num_probe=9, scale=0.7)
    positions = probe.absolute_positions((-4, 50), 2, 43, 75)
    weights, probed = probe.probe_attention(query, key, positions, 9, 0.7)
    np.testing.assert_allclose(columns, weights.sum(axis=2), atol=1e-5)
    np.testing.assert_allclose(diagonals, probe.sum_diagonals(weights, probed), atol=1e-5)


def test_vertical_slash_takes_16_bit_inputs_as_they_are():
    query, key = (x.astype(jnp.bfloat16) for x in make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2))
    selection = SMALL(query, key, is_causal=True)
    wanted = SMALL(query.astype(jnp.float32), key.astype(jnp.float32), is_causal=True)
    jax.tree.map(np.testing.assert_array_equal, selection, wanted)


def test_vertical_slash_is_frozen_hashable_and_not_causal_safe():
    assert hash(SMALL) == hash(dataclasses.replace(SMALL)) and not SMALL.causal_safe
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.block_size = 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_vertical=29), "`num_vertical` is 29; it must be an int of at least 30"),
        (dict(num_slash=99), "`num_slash` is 99; it must be an int of at least 100"),
        (dict(num_forced_columns=-1), "`num_forced_columns` is -1"),
        (dict(num_forced_diagonals=1.0), "`num_forced_diagonals` is 1.0"),
        (dict(num_probe=0), "`num_probe` is 0; it must be an int of at least 1"),
        (dict(exact=1), "`exact` is 1; it must be True or False"),
        (dict(block_size=0), "`block_size` is 0"),
        (dict(scale="auto"), "`scale` is 'auto'"),
    ],
    ids=str,
)
def test_vertical_slash_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        VerticalSlash(**options)


QUERY, KEY = make_inputs(4, 12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(is_causal=False), "`is_causal` is False; VerticalSlash is defined for causal attention only"),
        (dict(is_causal=1), "`is_causal` is 1"),
        (dict(key=KEY[0]), "`key` has shape"),
        (dict(query=QUERY[:, :, :3]), "`query` has 3 heads"),
        (dict(q_offset=0.5), "`q_offset` is 0.5"),
        (dict(q_offset=jnp.zeros(3, int)), "`q_offset` has shape"),
    ],
    ids=["not-causal", "is-causal", "key-rank", "heads", "offset-float", "offset-shape"],
)
def test_vertical_slash_refuses_calls(options, message):
    with pytest.raises(ValueError, match=message):
        SMALL(**(dict(query=QUERY, key=KEY, is_causal=True) | options))
