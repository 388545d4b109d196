"""Native sparse attention: its selector, and all three branches with their gradients, against the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, fast, normal
from selector_checks import assert_chunks_see_what_the_whole_sees, assert_later_tokens_change_nothing, make_inputs, select_mask

import sparse_attn_jax as sa
from sparse_attn_jax.native_sparse_attention import BRANCHES, native_sparse_attention
from sparse_attn_jax.scoring_problem import unit_overlap
from sparse_attn_jax.selectors.nsa import NSA
from sparse_attn_jax.testing import selection_oracle
from sparse_attn_jax.testing.methods import nsa as definition

SIZES = dict(top_k=3, block_size=8, kernel_size=4, kernel_stride=2, num_sink_blocks=1, num_local_blocks=1)
SMALL = NSA(**SIZES)
SELECTION = {name: SIZES[name] for name in ("top_k", "block_size", "num_sink_blocks", "num_local_blocks")}


@pytest.mark.parametrize("num_q_heads, q_offset", [(2, None), (6, (-5, 30))], ids=str)
def test_selects_the_blocks_of_the_definition(num_q_heads, q_offset):
    query, key = make_inputs(43, 75, num_q_heads, batch=2)
    offset = None if q_offset is None else jnp.asarray(q_offset)
    selection = fast(SMALL)(query, key, is_causal=True, q_offset=offset)
    assert (selection.q_block_size, selection.kv_block_size) == (1, 8) and selection.indices.shape == (2, 2, 43, 3)
    positions = np.broadcast_to(32 if q_offset is None else q_offset, (2,))[:, None] + np.arange(43)
    units = selection_oracle.compress(key, 4, 2)
    wanted, scores = definition.selected_blocks(query, units, positions, kv_len=75, kernel=(4, 2), **SELECTION)
    selection_oracle.assert_same_up_to_rounding(np.asarray(selection.indices), wanted, scores)


def test_selects_by_units_that_are_given():
    query, key = make_inputs(43, 75)
    units = normal(5, *sa.compress_keys(key, 4, 2).shape)
    select = compile_fast(lambda query, units: SMALL.select(query, units, kv_len=75, is_causal=True).indices)
    positions = 32 + np.arange(43)[None]
    wanted, scores = definition.selected_blocks(query, units, positions, kv_len=75, kernel=(4, 2), **SELECTION)
    selection_oracle.assert_same_up_to_rounding(np.asarray(select(query, units)), wanted, scores)


def test_units_count_by_what_they_share_with_a_block():
    unit_ids, overlap = unit_overlap(100, 320, NSA())
    np.testing.assert_array_equal(unit_ids[3], [11, 12, 13, 14, 15])
    np.testing.assert_array_equal(overlap[3] / NSA().kernel_stride, [1, 2, 2, 2, 1])


def test_as_many_blocks_as_there_are_is_causal_attention():
    query, key = make_inputs(43, 75)
    found = select_mask(fast(dataclasses.replace(SMALL, top_k=10)), query, key, is_causal=True)
    np.testing.assert_array_equal(found[0, 0], np.arange(75) <= 32 + np.arange(43)[:, None])


def test_nothing_after_a_query_is_looked_at():
    assert_later_tokens_change_nothing(fast(SMALL), lasts=(0, 7, 62, 143))


def test_chunked_prefill_sees_what_prefill_sees():
    assert_chunks_see_what_the_whole_sees(fast(SMALL), starts=(0, 50))


# ---- all branches


def make_branches(q_len=43, kv_len=75, batch=2, num_q_heads=4, value_dim=6):
    """Query, and by branch key and value, and gates."""
    query = 3 * normal(0, batch, q_len, num_q_heads, 16)
    num_units = max((kv_len - 4) // 2 + 1, 0)
    lengths = dict(compressed=num_units, selected=kv_len, window=kv_len)
    branches = {
        name: (normal(i, batch, length, 2, 16), normal(i + 10, batch, length, 2, value_dim))
        for i, (name, length) in enumerate(lengths.items(), 1)
    }
    gates = {name: jax.nn.sigmoid(normal(i + 20, batch, q_len, num_q_heads)) for i, name in enumerate(BRANCHES)}
    return query, branches, gates


def call(query, branches, gates, **options):
    (compressed_key, compressed_value), (key, value), (window_key, window_value) = (branches[name] for name in BRANCHES)
    return native_sparse_attention(
        query, key, value, [gates[name] for name in BRANCHES], window_size=7, compressed_key=compressed_key,
        compressed_value=compressed_value, window_key=window_key, window_value=window_value, **SIZES | options
    )  # fmt: skip


# Negative, so that blocks selected by another scale would be other ones.
SCALE = -0.3


def test_branches_and_gradients_are_those_of_the_definition():
    query, branches, gates = make_branches()
    d_out = np.asarray(normal(30, 2, 43, 4, 6))
    offsets = np.array([-5, 30])
    # The oracles scale by 16 ** -0.5.
    scaled = np.asarray(query) * SCALE * 4
    sizes = dict(kv_len=75, window_size=7, kernel=(4, 2), **SELECTION)
    masks = definition.branch_masks(scaled, branches["compressed"][0], offsets[:, None] + np.arange(43), **sizes)
    out, d_query, d_branches = definition.attention(scaled, branches, gates, masks, d_out)

    def loss(query, branches, gates):
        found = call(query, branches, gates, q_offset=jnp.asarray(offsets), scale=SCALE)
        return (found * d_out).sum(), found

    gradient = compile_fast(jax.grad(loss, (0, 1, 2), has_aux=True))
    (found_d_query, found_d_branches, d_gates), found = gradient(query, branches, gates)
    np.testing.assert_allclose(found, out, atol=1e-5)
    np.testing.assert_allclose(found_d_query, d_query * SCALE * 4, atol=2e-4)
    for name, (d_key, d_value, d_gate) in d_branches.items():
        np.testing.assert_allclose(found_d_branches[name][0], d_key, atol=5e-4)
        np.testing.assert_allclose(found_d_branches[name][1], d_value, atol=5e-5)
        np.testing.assert_allclose(d_gates[name], d_gate, atol=5e-5)
        assert np.abs(d_key).max() > 0.1
    # The first queries stand before all keys; the next three see no unit yet, and their compressed branch is 0.
    assert (found[0, :5] == 0).all() and np.abs(found[0, 5]).max() > 0
    assert (d_gates["compressed"][0, :8] == 0).all() and (d_gates["window"][0, 5:8] != 0).all()


@pytest.mark.parametrize("change", ["unit sees one more", "window of one more", "one block less", "gates in another order"])
def test_definition_tells_mistakes(change):
    query, branches, gates = make_branches()
    positions = 32 + np.broadcast_to(np.arange(43), (2, 43))
    sizes = dict(kv_len=75, window_size=7, kernel=(4, 2), **SELECTION)
    right = definition.branch_masks(query, branches["compressed"][0], positions, **sizes)
    wrong, swapped = dict(right), gates
    if change == "unit sees one more":
        wrong["compressed"] = np.broadcast_to(definition.unit_mask(positions + 1, 36, (4, 2)), right["compressed"].shape)
    elif change == "gates in another order":
        swapped = dict(gates, selected=gates["window"], window=gates["selected"])
    else:
        sizes |= dict(window_size=8) if change == "window of one more" else dict(top_k=2)
        wrong = definition.branch_masks(query, branches["compressed"][0], positions, **sizes)
    outs = [definition.attention(query, branches, g, masks, 0.0)[0] for g, masks in ((gates, right), (swapped, wrong))]
    assert np.abs(outs[0] - outs[1]).max() > 1e-2


def test_defaults_are_means_and_shared_keys_and_later_tokens_change_nothing():
    query, branches, gates = make_branches(75, 75)
    key, value = (np.asarray(x) for x in branches["selected"])

    @compile_fast
    def run(query, key, value):
        return native_sparse_attention(query, key, value, [gates[name] for name in BRANCHES], window_size=7, **SIZES)

    whole = np.asarray(run(query, key, value))
    same = dict.fromkeys(BRANCHES, (key, value)) | dict(compressed=[selection_oracle.compress(x, 4, 2) for x in (key, value)])
    sizes = dict(kv_len=75, window_size=7, kernel=(4, 2), **SELECTION)
    masks = definition.branch_masks(query, same["compressed"][0], np.broadcast_to(np.arange(75), (2, 75)), **sizes)
    np.testing.assert_allclose(whole, definition.attention(query, same, gates, masks, 0.0)[0], atol=1e-5)
    for last in (0, 3, 40, 63):
        change = lambda x: np.where((np.arange(75) > last)[:, None, None], -50 * np.asarray(x), x)  # noqa: B023
        found = np.asarray(run(change(query), change(key), change(value)))
        np.testing.assert_array_equal(found[:, : last + 1], whole[:, : last + 1])


def test_sequence_shorter_than_a_unit():
    query, branches, gates = make_branches(3, 3)
    out = compile_fast(call)(query, branches, gates)
    i, j = np.ogrid[:3, :3]
    masks = dict(compressed=np.zeros((2, 4, 3, 0), bool), selected=np.broadcast_to(j <= i, (2, 4, 3, 3)))
    wanted, *_ = definition.attention(
        query, {name: branches[name] for name in BRANCHES[1:]}, gates, masks | dict(window=masks["selected"]), 0.0
    )
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_sixteen_bits_and_no_queries():
    query, branches, gates = make_branches()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (query, branches))
    assert jax.eval_shape(call, *half, gates).dtype == jnp.bfloat16
    few = {name: gate[:, :0] for name, gate in gates.items()}
    assert jax.eval_shape(call, query[:, :0], branches, few).shape == (2, 0, 4, 6)


def test_named_implementation_is_that_of_every_branch():
    with pytest.raises(NotImplementedError, match="mosaic"):
        jax.eval_shape(functools.partial(call, implementation="mosaic"), *make_branches())


QUERY, KEY = make_inputs(4, 20)
GATES = [jnp.ones((1, 4, 4))] * 3


def attend(gates=GATES, query=QUERY, key=KEY, value=KEY, **options):
    jax.eval_shape(lambda: native_sparse_attention(query, key, value, gates, **SIZES | dict(window_size=4) | options))


BAD_CALLS = {
    "top-k": ("`top_k` is 2; num_sink_blocks=1 and num_local_blocks=2", lambda: NSA(top_k=2)),
    "block-size": ("`block_size` is 0", lambda: NSA(block_size=0)),
    "kernel-size": ("`kernel_size` is 0", lambda: NSA(kernel_size=0)),
    "pooling": ("`pooling` is 'sum'", lambda: NSA(pooling="sum")),
    "group-reduction": ("`group_reduction` is 'min'", lambda: NSA(group_reduction="min")),
    "scale": ("`scale` is 'x'", lambda: NSA(scale="x")),
    "key": ("`key` has shape", lambda: SMALL(QUERY, KEY[0])),
    "is-causal": ("`is_causal` is 1", lambda: SMALL(QUERY, KEY, is_causal=1)),
    "units": ("`compressed` has 20 units", lambda: SMALL.select(QUERY, KEY, kv_len=20, is_causal=True)),
    "op-key": ("`key` is float32.*of head_dim 16", lambda: attend(key=KEY[..., :3])),
    "op-gates": ("`gates` is a sequence of 2; it must be a sequence of 3 arrays", lambda: attend(gates=GATES[:2])),
    "op-gates-array": (r"`gates` is float32\[1, 4, 4\]; it must be a sequence", lambda: attend(gates=GATES[0])),
    "op-gate": (r"`gates\[1\]` is float32\[1, 4\]", lambda: attend(gates=[GATES[0], GATES[0][..., 0], GATES[0]])),
    "op-gate-dtype": (r"`gates\[0\]` is int32", lambda: attend(gates=[x.astype(int) for x in GATES])),
    "op-window-size": ("`window_size` is 0", lambda: attend(window_size=0)),
    "op-window-key": ("`window_key` is float32.*as `key`", lambda: attend(window_key=KEY[:, :3])),
    "op-window-value": ("`window_value` is bfloat16.*as `value`", lambda: attend(window_value=KEY.astype(jnp.bfloat16))),
    "op-units": ("`compressed_key` is float32.*the complete units of 20 tokens", lambda: attend(compressed_key=KEY)),
    "op-unit-values": ("`compressed_value` is 3", lambda: attend(compressed_value=3)),
    "op-top-k": ("`top_k` is 1", lambda: attend(top_k=1)),
    "op-offset": ("`q_offset` is 0.5", lambda: attend(q_offset=0.5)),
    "op-scale": ("`scale` is 'x'", lambda: attend(scale="x")),
    "op-implementation": ("`implementation` is 'fast'", lambda: attend(implementation="fast")),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_by_name(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
