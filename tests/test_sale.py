"""SALE against its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs

from sparse_attn_jax import query_rows
from sparse_attn_jax.selectors import sale
from sparse_attn_jax.selectors.sale import SALE
from sparse_attn_jax.testing.methods import sale as definition
from sparse_attn_jax.testing.methods.probe import absolute_positions

SMALL = SALE(threshold=0.7, q_block_size=8, kv_block_size=4, num_local=10, dense_len=0)
CASES = {
    "defaults but for sizes": (SMALL, None, (70, 70, 4, 2)),
    "coarser steps": (dataclasses.replace(SMALL, bits=2), None, (43, 70, 2, 2)),
    "finer steps": (dataclasses.replace(SMALL, bits=8, threshold=0.6), None, (43, 70, 3, 1)),
    "no sink, odd offset": (dataclasses.replace(SMALL, num_sink_blocks=0), 21, (43, 75, 2, 1)),
    "sinks meet the window": (
        dataclasses.replace(SMALL, num_sink_blocks=4, num_local=30, threshold=0.37),
        None,
        (51, 51, 2, 1),
    ),
    "window below a row": (dataclasses.replace(SMALL, num_local=1), None, (43, 43, 2, 1)),
    "offsets": (SMALL, (-9, 45), (43, 75, 2, 1)),
    "per head": (dataclasses.replace(SMALL, threshold=(0.0, 0.1, 1.0, 0.5), scale=0.4), None, (43, 75, 4, 2)),
    "blocks of any size": (
        SALE(threshold=0.3, q_block_size=5, kv_block_size=7, num_local=3, dense_len=0),
        None,
        (33, 40, 2, 1),
    ),
    "one query": (SMALL, None, (1, 30, 2, 1)),
}


def shifted_inputs(*sizes, **options):
    """Means that are far from 0, which is what centring is for."""
    query, key = make_inputs(*sizes, **options)
    return query / 2 + 1.0, key + 2.0


@pytest.mark.parametrize("name", CASES)
def test_sale_is_its_definition(name):
    selector, q_offset, sizes = CASES[name]
    query, key = shifted_inputs(*sizes, batch=2)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    selection = selector(query, key, is_causal=True, q_offset=offset)
    options = {field.name: getattr(selector, field.name) for field in dataclasses.fields(SALE)}
    options |= dict(threshold=np.broadcast_to(selector.threshold, sizes[2:3]))
    del options["dense_len"]
    margin = definition.margins(query, key, absolute_positions(q_offset, 2, *sizes[:2]), **options)
    # A score that float32 rounds the other way than float64 moves by a step; so near the threshold nothing is said.
    is_clear = np.abs(margin) > 1e-4
    assert is_clear.mean() > 0.99
    if name not in ("one query", "per head"):
        assert 0.02 < (margin[np.isfinite(margin)] > 0).mean() < 0.98, "the definition keeps all or nothing"
    found = np.asarray(selection.to_block_mask(sizes[1]))
    np.testing.assert_array_equal(found[is_clear], margin[is_clear] > 0)
    assert (selection.q_block_size, selection.kv_block_size) == (selector.q_block_size, selector.kv_block_size)


@pytest.mark.parametrize("queries_at_a_time", [3, 20])
def test_chunks_change_nothing(queries_at_a_time, monkeypatch):
    query, key = shifted_inputs(43, 70, 2, 1)
    whole = SMALL(query, key, is_causal=True).indices
    reduce_rows = query_rows.reduce_rows
    in_chunks = lambda *a, **b: reduce_rows(*a, **b, max_values=queries_at_a_time * b["values_per_query"])
    monkeypatch.setattr(sale, "reduce_rows", in_chunks)
    # Not the function that is compiled already.
    select = jax.jit(lambda query, key: sale._select.__wrapped__(SMALL, query, key, None).indices)
    np.testing.assert_array_equal(select(query, key), whole)


def test_rounding_has_the_range_of_its_bits():
    x, _ = make_inputs(50, 1)
    x = x.at[0, 3].set(0)
    for bits in (2, 4, 8):
        codes, steps = sale.quantize(x, bits)
        assert codes.dtype == jnp.int8 and int(jnp.abs(codes).max()) == 2 ** (bits - 1) - 1
        np.testing.assert_allclose(
            codes * steps[..., None], definition.round_to_bits(np.asarray(x, np.float64), bits), atol=1e-5
        )


def test_short_sequences_are_dense():
    query, key = make_inputs(4, 32)
    assert SALE(dense_len=32)(query, key, is_causal=True).indices.shape == (1, 1, 1, 1)
    assert SALE(dense_len=31)(query, key, is_causal=True).indices.shape == (1, 4, 1, 1)
    assert SALE()(query[:, :0], key, is_causal=True).indices.shape == (1, 1, 1, 1)


def test_it_is_frozen_and_hashable_and_not_causal_safe():
    assert hash(SMALL) == hash(dataclasses.replace(SMALL)) and not SMALL.causal_safe


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(threshold=1.5), "`threshold` is 1.5"),
        (dict(threshold=(0.1, -1)), r"`threshold\[1\]` is -1"),
        (dict(bits=1), "`bits` is 1"),
        (dict(bits=9), "`bits` is 9"),
        (dict(q_block_size=0), "`q_block_size` is 0"),
        (dict(kv_block_size=0), "`kv_block_size` is 0"),
        (dict(num_local=0), "`num_local` is 0"),
        (dict(num_sink_blocks=-1), "`num_sink_blocks` is -1"),
        (dict(dense_len=-1), "`dense_len` is -1"),
        (dict(scale="a"), "`scale` is 'a'"),
    ],
)
def test_sale_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SALE(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "`is_causal` is False; SALE is defined for causal attention only"),
        (dict(is_causal=True, q_offset=0.5), "`q_offset`"),
    ],
)
def test_sale_refuses_calls(options, message):
    with pytest.raises(ValueError, match=message):
        SMALL(*make_inputs(4, 4), **options)
    with pytest.raises(ValueError, match="`threshold` has 3 entries; the call has 4 query heads"):
        dataclasses.replace(SMALL, threshold=(0.1,) * 3)(*make_inputs(4, 4), is_causal=True)
