"""`block_mass` against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs

from sparse_attn_jax.block_mass import block_mass
from sparse_attn_jax.query_rows import reduce_rows


def probabilities(query, key, positions=None, lse=None, scale=None) -> np.ndarray:
    """float64 [batch, num_q_heads, q_len, kv_len]; causal if there are positions, [batch, q_len]."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = key.repeat(query.shape[2] // key.shape[2], axis=2)
    logits = np.einsum("bihd,bjhd->bhij", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if positions is not None:
        logits = np.where(np.arange(key.shape[1]) <= positions[:, None, :, None], logits, -np.inf)
    lse = np.logaddexp.reduce(logits, axis=-1) if lse is None else np.asarray(lse, np.float64).swapaxes(1, 2)
    return np.exp(logits - np.where(np.isneginf(lse), np.inf, lse)[..., None])


def reduce_definition(p, *, block_size, q_block_size, reduction, group=None, group_size=1) -> np.ndarray:
    """Keys first, then the heads of a group, then queries."""
    reduce = getattr(np, reduction)
    p = np.stack([reduce(p[..., j : j + block_size], axis=-1) for j in range(0, p.shape[-1], block_size)], axis=-1)
    if group is not None:
        p = getattr(np, group)(p.reshape(p.shape[0], -1, group_size, *p.shape[2:]), axis=2)
    return np.stack([reduce(p[:, :, i : i + q_block_size], axis=2) for i in range(0, p.shape[2], q_block_size)], axis=2)


def positions_of(q_offset, batch, q_len):
    return np.broadcast_to(q_offset, (batch,))[:, None] + np.arange(q_len)


CASES = {
    "page mass": dict(sizes=(1, 37, 4, 2), block_size=8, group_reduction="sum", is_causal=True),
    "tiles": dict(sizes=(19, 37, 4, 2), block_size=8, q_block_size=8, reduction="max", is_causal=True),
    "not causal": dict(sizes=(19, 37, 3, 1), block_size=8, q_block_size=5),
    "group mean, one head each": dict(sizes=(9, 9, 2, 2), block_size=4, group_reduction="mean"),
    "max of sums": dict(sizes=(9, 9, 6, 2), block_size=4, q_block_size=3, group_reduction="max"),
    "longer rows than queries": dict(sizes=(5, 9, 2, 2), block_size=16, q_block_size=16),
    "tokens": dict(sizes=(9, 9, 2, 1), block_size=1, q_block_size=9, scale=0.3, is_causal=True),
    "offset": dict(sizes=(9, 30, 2, 1), block_size=8, is_causal=True, q_offset=3),
    "offsets": dict(sizes=(9, 30, 2, 1), block_size=8, is_causal=True, q_offset=(-4, 40)),
}


@pytest.mark.parametrize("name", CASES)
def test_block_mass_is_its_definition(name):
    options = dict(CASES[name])
    q_len, kv_len, num_q_heads, num_kv_heads = options.pop("sizes")
    q_offset = options.pop("q_offset", None)
    query, key = make_inputs(q_len, kv_len, num_q_heads, num_kv_heads, head_dim=8, batch=2)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    found = block_mass(query, key, q_offset=offset, **options)
    positions = positions_of(kv_len - q_len if q_offset is None else q_offset, 2, q_len)
    p = probabilities(query, key, positions if options.get("is_causal") else None, scale=options.get("scale"))
    sizes = dict(block_size=options["block_size"], q_block_size=options.get("q_block_size", 1))
    group = dict(group=options.get("group_reduction"), group_size=num_q_heads // num_kv_heads)
    wanted = reduce_definition(p, **sizes, reduction=options.get("reduction", "sum"), **group)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("queries_at_a_time", [1, 2, 3, 5, 6, 13, 100])
def test_rows_are_reduced_whatever_the_chunks(queries_at_a_time, reduction):
    values = np.random.default_rng(0).random((2, 3, 21, 4), np.float32)
    asked = []

    def values_of(ids):
        asked.append(len(ids))
        return jnp.take(jnp.asarray(values), ids, axis=2, mode="clip")

    sizes = dict(q_len=21, q_block_size=6, reduction=reduction)
    found = reduce_rows(values_of, **sizes, values_per_query=10, max_values=10 * queries_at_a_time + 9)
    reduce = getattr(np, reduction)
    wanted = np.stack([reduce(values[:, :, i : i + 6], axis=2) for i in range(0, 21, 6)], axis=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert set(asked) == {{1: 1, 2: 2, 3: 3, 5: 3, 6: 6, 13: 12, 100: 24}[queries_at_a_time]}


def test_less_than_one_query_at_a_time_is_one():
    values = jnp.arange(6, dtype=jnp.float32).reshape(1, 1, 6, 1)
    found = reduce_rows(
        lambda ids: values[:, :, ids], q_len=6, q_block_size=2, reduction="sum", values_per_query=10, max_values=1
    )
    np.testing.assert_array_equal(found[0, 0, :, 0], [1, 5, 9])


def test_mass_of_a_known_lse():
    query, key = make_inputs(20, 33)
    lse = np.random.default_rng(0).normal(size=(1, 20, 4)).astype(np.float32)
    found = block_mass(query, key, jnp.asarray(lse), block_size=8, is_causal=True)
    p = probabilities(query, key, positions_of(13, 1, 20), lse)
    wanted = reduce_definition(p, block_size=8, q_block_size=1, reduction="sum")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_query_that_sees_nothing_has_no_mass():
    query, key = make_inputs(4, 16)
    lse = jnp.zeros((1, 4, 4)).at[:, 1].set(-jnp.inf)
    found = np.asarray(block_mass(query, key, lse, block_size=8))
    assert (found[:, :, 1] == 0).all() and (found[:, :, [0, 2, 3]] > 0).all()
    assert (np.asarray(block_mass(query, key, block_size=8, is_causal=True, q_offset=-8)) == 0).all()


def test_what_is_invisible_may_be_nan():
    query, key = make_inputs(4, 16)
    clean = block_mass(query, key, block_size=8, is_causal=True, q_offset=5)
    poisoned = block_mass(query, key.at[:, 9:].set(jnp.nan), block_size=8, is_causal=True, q_offset=5)
    np.testing.assert_array_equal(poisoned, clean)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_inputs_are_multiplied_exactly(dtype):
    query, key = (x.astype(dtype) for x in make_inputs(9, 30))
    found = block_mass(query, key, block_size=8, is_causal=True)
    assert found.dtype == jnp.float32
    p = probabilities(query, key, positions_of(21, 1, 9))
    np.testing.assert_allclose(found, reduce_definition(p, block_size=8, q_block_size=1, reduction="sum"), atol=2e-6)


def test_carries_no_gradient_and_maps_over_a_batch():
    query, key = make_inputs(5, 9, batch=3)
    total = lambda query: block_mass(query, key, block_size=4).sum()
    assert (np.asarray(jax.grad(total)(query)) == 0).all()
    mapped = jax.vmap(lambda q, k: block_mass(q[None], k[None], block_size=4)[0])(query, key)
    np.testing.assert_allclose(mapped, block_mass(query, key, block_size=4), rtol=1e-6)


@pytest.mark.parametrize("q_len, kv_len, shape", [(0, 9, (1, 2, 0, 3)), (5, 0, (1, 2, 3, 0))])
def test_empty_arrays(q_len, kv_len, shape):
    query, key = make_inputs(q_len, kv_len)
    assert block_mass(query, key, block_size=4, q_block_size=2, group_reduction="sum").shape == shape


QUERY, KEY = make_inputs(4, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=0), "`block_size` is 0"),
        (dict(q_block_size=0), "`q_block_size` is 0"),
        (dict(reduction="mean"), "`reduction` is 'mean'; it must be one of 'sum', 'max'"),
        (dict(group_reduction="all"), "`group_reduction` is 'all'"),
        (dict(is_causal=1), "`is_causal` is 1"),
        (dict(q_offset=0.5), "`q_offset`"),
        (dict(scale="auto"), "`scale`"),
        (dict(lse=jnp.zeros((1, 4, 2))), r"`lse` has shape \(1, 4, 2\).*must be \(1, 4, 4\)"),
        (dict(lse=jnp.zeros((1, 4, 4), int)), "`lse` has dtype int32"),
        (dict(lse=jnp.zeros((4, 4))), "`lse` has shape"),
        (dict(key=KEY[0]), "`key` has shape"),
        (dict(query=QUERY[..., :3]), "`query` has head_dim 3"),
    ],
    ids=str,
)
def test_block_mass_refuses(options, message):
    arguments = dict(query=QUERY, key=KEY) | options
    with pytest.raises(ValueError, match=message):
        functools.partial(block_mass, arguments.pop("query"), arguments.pop("key"))(**arguments)
