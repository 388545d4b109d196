"""`HeadMix` against its definition, and attention with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from static_patterns import assert_no_list_repeats, assert_same_in_chunks, select, shapes_of

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.head_mix import HeadMix
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.inputs import Inputs
from sparse_attn_jax.testing.methods import head_mix as definition

KINDS = (1, -1, 0, -1, 1, -1)
SINKS, LOCAL = (0, 1, 0, 0, 0, 2), (0, 1, 0, 3, 0, 40)
STREAMS = (-1,) * 6


def make_mask(q_len, kv_len, kinds=KINDS, batch=2, block_size=8):
    rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
    mask = np.random.default_rng(0).random((batch, kinds.count(1), rows, columns)) < 0.5
    return jnp.asarray(mask) if 1 in kinds else None


def assert_is_definition(selector, q_len=43, kv_len=75, *, is_causal=True, q_offset=None, wanted=None):
    """`wanted`: arguments of the definition in place of the selector's."""
    heads, block_size = len(selector.head_mask_type), selector.block_size
    block_mask = make_mask(q_len, kv_len, selector.head_mask_type, block_size=block_size)
    options = dict(is_causal=is_causal, q_offset=q_offset, num_q_heads=heads, batch=2)
    selection, found = select(
        selector, q_len, kv_len, **options, more={} if block_mask is None else dict(block_mask=block_mask)
    )
    assert_no_list_repeats(selection, kv_len)
    if is_causal and 1 not in selector.head_mask_type and q_offset is None:
        rows = np.arange(selection.indices.shape[2])[:, None]
        assert (np.asarray(selection.indices) * block_size < kv_len - q_len + (rows + 1) * block_size).all(), "future blocks"
    arguments = dict(
        kinds=selector.head_mask_type,
        sinks=np.broadcast_to(selector.num_sinks, heads),
        local=np.broadcast_to(selector.num_local, heads),
        unit=selector.unit,
        offsets=np.broadcast_to(kv_len - q_len if q_offset is None else q_offset, (2,)),
    )
    sizes = dict(q_len=q_len, kv_len=kv_len, block_size=block_size, is_causal=is_causal, block_mask=block_mask)
    np.testing.assert_array_equal(found, definition.mask(**(arguments | (wanted or {})), **sizes))
    return selection


@pytest.mark.parametrize("q_offset", [None, 21, -5, -19, (0, 37)], ids=str)
@pytest.mark.parametrize("kinds", [KINDS, STREAMS], ids=["mix", "streams"])
@pytest.mark.parametrize("unit", ["block", "token"])
def test_causal_mask_is_the_definition(unit, kinds, q_offset):
    local = tuple(max(x, 1) for x in LOCAL) if kinds == STREAMS else LOCAL
    q_offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    selector = HeadMix(kinds, SINKS if unit == "block" else (0, 5, 0, 0, 0, 17), local, unit, 8)
    assert_is_definition(selector, q_offset=q_offset)


@pytest.mark.parametrize("kinds", [KINDS, STREAMS], ids=["mix", "streams"])
def test_full_mask_streams_to_the_last_blocks(kinds):
    assert_is_definition(HeadMix(kinds, 1, 3, "block", 8), is_causal=False)


@pytest.mark.parametrize("unit", ["block", "token"])
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (7, 7), (9, 8), (1, 40), (20, 24)], ids=str)
def test_edge_sizes(q_len, kv_len, unit):
    assert_is_definition(HeadMix(KINDS, SINKS, LOCAL, unit, 8), q_len, kv_len)


def test_defaults_of_the_original_benchmarks():
    assert_is_definition(HeadMix((-1,) * 2, 1, 3), 600, 600)
    assert_is_definition(HeadMix((-1,) * 2, 64, 256, "token"), 600, 600)


@pytest.mark.parametrize(
    "wanted", [dict(local=(0, 2, 0, 3, 0, 40)), dict(sinks=(0, 0, 0, 0, 0, 2)), dict(unit="token")], ids=str
)
def test_check_notices_another_pattern(wanted):
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_is_definition(HeadMix(KINDS, SINKS, LOCAL, "block", 8), wanted=wanted)


def test_heads_that_are_alike_share_lists():
    for kinds, sinks, heads, slots in (
        (STREAMS, 1, 1, 1 + 2),
        ((0,) * 6, 0, 1, 10),
        ((0, 0, 0, -1, -1, -1), 1, 2, 10),
        (STREAMS, (1, 1, 1, 2, 2, 2), 2, 2 + 2),
        (STREAMS, (1, 1, 2, 2, 2, 2), 6, 2 + 2),
        (STREAMS, 50, 1, 10),
    ):
        selection = assert_is_definition(HeadMix(kinds, sinks, 2, block_size=8), 80, 80)
        assert selection.indices.shape == (1, heads, 10, slots)


def test_streaming_by_tokens_is_the_same_in_chunks_and_decoding():
    selector = HeadMix((0, -1, -1, -1), 5, (1, 1, 20, 300), "token", 16)
    assert_same_in_chunks(selector, 100, (0, 1, 49, 99))


def test_streaming_by_blocks_is_the_same_in_chunks_of_whole_blocks():
    assert_same_in_chunks(HeadMix((0, -1, -1, -1), 1, (1, 1, 2, 9), block_size=16), 100, (0, 16, 80))


@pytest.mark.parametrize("unit", ["block", "token"])
def test_streaming_of_all_keys_is_dense(unit):
    _, mask = select(HeadMix((-1,) * 4, 0, 50, unit, 16), 50, 50)
    np.testing.assert_array_equal(mask, np.tri(50, dtype=bool)[None, None].repeat(4, axis=1))


def test_streaming_by_tokens_runs_on_every_implementation():
    query, key = shapes_of(64, 64)
    for num_local in (3, (3, 1, 4, 1)):
        selection, _ = select(HeadMix((-1, 0, -1, 0), 2, num_local, "token", 16), 64, 64)
        explanation = sa.explain(query, key, key, selection, is_causal=True)
        assert not any("predicate" in reason for reasons in explanation.reasons.values() for reason in reasons)


def test_attention_and_gradients_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    draw = lambda heads, length: jnp.asarray(rng.standard_normal((2, length, heads, 16)), jnp.float32)
    operands = dict(query=draw(6, 43), key=draw(2, 75), value=draw(2, 75))
    selector, block_mask = HeadMix(KINDS, SINKS, LOCAL, "token", 8), make_mask(43, 75)
    selection, _ = select(selector, 43, 75, num_q_heads=6, batch=2, more=dict(block_mask=block_mask))
    inputs = Inputs(operands, selection, dict(is_causal=True), draw(6, 43), jnp.zeros((2, 43, 6)))
    attend = functools.partial(sa.block_sparse_attention, selection=selection, is_causal=True, return_residual=True)
    mask = definition.mask(
        KINDS,
        SINKS,
        LOCAL,
        unit="token",
        block_size=8,
        offsets=(32, 32),
        q_len=43,
        kv_len=75,
        is_causal=True,
        block_mask=block_mask,
    )
    compare.assert_results_match(compare.results_of(attend, inputs), inputs, mask)


def test_jit_and_vmap_change_nothing():
    query, key = (jnp.zeros((3, length, heads, 16)) for length, heads in ((40, 6), (60, 2)))
    selector, block_mask, offsets = HeadMix(KINDS, SINKS, LOCAL, "token", 8), make_mask(40, 60, batch=3), jnp.array([0, 13, 20])

    @jax.jit
    def choose(query, key, q_offset, block_mask):
        return selector(query, key, is_causal=True, q_offset=q_offset, block_mask=block_mask)

    together = choose(query, key, offsets, block_mask)
    one_by_one = jax.jit(jax.vmap(choose))(query[:, None], key[:, None], offsets, block_mask[:, None])
    np.testing.assert_array_equal(one_by_one.indices[:, 0], together.indices)
    np.testing.assert_array_equal(one_by_one.predicate.left, jnp.broadcast_to(together.predicate.left, (3, 6)))


QUERY, KEY = shapes_of(16, 24, 3, 1)
MASK = jnp.ones((1, 1, 2, 3), bool)
mixed = HeadMix((0, -1, 1), 1, 2, block_size=8)
BAD = {
    "types-list": (r"`head_mask_type` is \[0\]", lambda: HeadMix([0], 1, 1)),
    "types-empty": (r"`head_mask_type` is \(\)", lambda: HeadMix((), 1, 1)),
    "type": (r"`head_mask_type\[1\]` is 2; it must be one of 0, -1, 1", lambda: HeadMix((0, 2), 1, 1)),
    "sinks": ("`num_sinks` is -1", lambda: HeadMix((-1,), -1, 1)),
    "sinks-count": ("`num_sinks` has 2 entries; `head_mask_type` has 1", lambda: HeadMix((-1,), (1, 1), 1)),
    "local": ("`num_local` is 0; it must be an int of at least 1", lambda: HeadMix((-1,), 1, 0)),
    "local-entry": (r"`num_local\[1\]` is 0; it must be an int of at least 1", lambda: HeadMix((0, -1), 1, (0, 0))),
    "unit": ("`unit` is 'tokens'", lambda: HeadMix((-1,), 1, 1, "tokens")),
    "block": ("`block_size` is 0", lambda: HeadMix((-1,), 1, 1, block_size=0)),
    "heads": ("`query` has 3 heads; `head_mask_type` is for 2", lambda: HeadMix((0, 0), 1, 1)(QUERY, KEY)),
    "token-full": ("`is_causal` is False", lambda: HeadMix((-1,) * 3, 1, 1, "token")(QUERY, KEY)),
    "mask-missing": ("`block_mask` is None; 1 heads have one", lambda: mixed(QUERY, KEY)),
    "mask-unwanted": ("`block_mask` is an array", lambda: HeadMix((0,) * 3, 1, 1)(QUERY, KEY, block_mask=MASK)),
    "mask-dtype": (r"`block_mask` is int32\[1, 1, 2, 3\]", lambda: mixed(QUERY, KEY, block_mask=MASK.astype(jnp.int32))),
    "mask-grid": (r"`block_mask` is bool\[1, 1, 2, 2\]; .* 1, 2, 3\]", lambda: mixed(QUERY, KEY, block_mask=MASK[..., 1:])),
    "mask-rank": ("`block_mask` is bool", lambda: mixed(QUERY, KEY, block_mask=MASK[0])),
    "mask-batch": ("`block_mask` has batch size 2; it must be 1 or 1", lambda: mixed(QUERY, KEY, block_mask=MASK.repeat(2, 0))),
    "q-offset": ("`q_offset`", lambda: HeadMix((0,) * 3, 1, 1)(QUERY, KEY, q_offset=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
