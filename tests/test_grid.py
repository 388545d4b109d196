"""Grid and grid_attention against their definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs, visible_mask

import sparse_attn_jax as sa
from sparse_attn_jax.grid_attention import grid_attention
from sparse_attn_jax.selectors.grid import Grid
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import grid as definition
from sparse_attn_jax.testing.methods import probe

SMALL = Grid(strides=(3, 5), num_local=4, num_sinks=2, block_size=8, num_probe=9)


def choose(selector, query, key, positions):
    names = ("strides", "num_local", "num_sinks", "num_probe")
    return definition.choose(query, key, positions, **{name: getattr(selector, name) for name in names})


def expected_mask(selector, query, key, positions):
    chosen = choose(selector, query, key, positions)
    sizes = dict(num_local=selector.num_local, num_sinks=selector.num_sinks)
    return definition.token_mask(chosen, positions, key.shape[1], **sizes)


def planted(stride, phase, length=96):
    """A query and a key whose attention is on the keys of a grid, and a strong first key."""
    query, key = make_inputs(length, length, num_q_heads=1, num_kv_heads=1)
    on_grid = (jnp.arange(length) % stride == phase) | (jnp.arange(length) == 0)
    return query.at[..., 0].set(8.0), key.at[..., 0].set(jnp.where(on_grid, 3.0, 0.0)[None, :, None])


CASES = {
    "offset": (SMALL, (43, 75), (21, 32)),
    "offset-by-row": (SMALL, (43, 75), (0, 37)),
    "past-the-keys": (SMALL, (43, 75), (60, 90)),
    "before-the-keys": (SMALL, (43, 75), (-20, -50)),
    "one-query-and-less-than-a-block": (SMALL, (1, 5), None),
    "block-plus-1": (SMALL, (9, 9), None),
    "long-strides": (Grid((24, 31), num_local=1, num_sinks=0, block_size=4, num_probe=9), (43, 75), None),
    "one-stride": (Grid((1,), num_local=2, num_sinks=1, block_size=8, num_probe=9), (9, 9), None),
}


@pytest.mark.parametrize("is_permuted", [False, True], ids=["in-order", "permuted"])
@pytest.mark.parametrize("name", CASES)
def test_grid_is_its_definition(name, is_permuted):
    selector, (q_len, kv_len), q_offset = CASES[name]
    query, key = make_inputs(q_len, kv_len, num_q_heads=3, num_kv_heads=1, batch=2)
    positions = probe.absolute_positions(q_offset, 2, q_len, kv_len)
    q_offset = q_offset and jnp.asarray(q_offset)
    wanted = expected_mask(selector, query, key, positions)
    if is_permuted:
        order, selection = selector.select_permuted(query, key, q_offset=q_offset)
        np.testing.assert_array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(kv_len), order.shape))
        wanted = np.take_along_axis(wanted, np.asarray(order)[:, :, None], axis=-1)
    else:
        selection = selector(query, key, is_causal=True, q_offset=q_offset)
    found = visible_mask(selection, query, key, is_causal=not is_permuted, q_offset=q_offset)
    np.testing.assert_array_equal(found, wanted)
    if name == "long-strides":
        assert selection.indices.shape[-1] == (1 + 2 if is_permuted else 4 + 2)


@pytest.mark.parametrize("stride, phase", [(3, 2), (5, 0), (6, 1), (12, 7)])
def test_grid_finds_the_grid_that_is_there(stride, phase):
    query, key = planted(stride, phase)
    selector = dataclasses.replace(SMALL, strides=(3, 4, 5, 6, 10, 12))
    predicate = selector(query, key, is_causal=True).predicate
    assert (int(predicate.stride[0, 0]), int(predicate.phase[0, 0])) == (stride, phase)


def test_permuted_grid_reads_a_fraction_of_the_blocks():
    query, key = planted(6, 1)
    selector = Grid((6,), num_local=3, num_sinks=4, block_size=4, num_probe=16)
    _, selection = selector.select_permuted(query, key)
    assert selection.indices.shape[-1] == 4 + 3 + 2
    listed = np.asarray(selection.indices)[0, 0] >= 0
    assert (listed.sum(axis=-1) <= np.arange(24) / 6 + 1 + 3 + 2).all()


def test_grid_attention_is_as_defined_with_its_gradients():
    query, key = make_inputs(43, 75, num_q_heads=6, num_kv_heads=2, batch=2)
    value = key[..., ::-1]
    weights = jnp.cos(jnp.arange(43.0))[None, :, None, None]

    def attend(*operands):
        out, lse = grid_attention(*operands, SMALL, q_offset=jnp.asarray([0, 30]), return_residual=True)
        return (out * weights).sum(), (out, lse)

    with pytest.warns(UserWarning, match="Grid is not causal-safe"):
        grads, (out, lse) = jax.jit(jax.grad(attend, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    mask = expected_mask(SMALL, query, key, probe.absolute_positions((0, 30), 2, 43, 75))
    wanted = oracle.attention(mask, query, key, value, d_out=np.asarray(weights))
    for name, found, reference in zip(("out", "lse", "query", "key", "value"), (out, lse, *grads), wanted[:5], strict=True):
        np.testing.assert_allclose(found, reference, atol=2e-5, err_msg=name)


def test_grid_ignores_keys_that_no_query_sees():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    options = dict(is_causal=True, q_offset=jnp.asarray([20, 20]))
    poisoned = SMALL(query, key.at[:, 63:].set(jnp.nan), **options)
    jax.tree.map(np.testing.assert_array_equal, poisoned, SMALL(query, key, **options))


def test_grid_under_jit_and_vmap_is_itself():
    query, key = make_inputs(43, 75, num_q_heads=3, num_kv_heads=1, batch=2)
    offsets = jnp.asarray([0, 37])
    selection = SMALL(query, key, is_causal=True, q_offset=offsets)
    select = lambda q, k, offset: SMALL(q[None], k[None], is_causal=True, q_offset=offset)
    mapped = jax.jit(jax.vmap(select))(query, key, offsets)
    jax.tree.map(lambda found, wanted: np.testing.assert_array_equal(found[:, 0], wanted), mapped, selection)


def test_grid_is_frozen_hashable_and_not_causal_safe():
    assert hash(SMALL) == hash(dataclasses.replace(SMALL)) and not SMALL.causal_safe
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.block_size = 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(strides=()), r"`strides` is \(\); it must be a tuple of at least one int"),
        (dict(strides=[4]), r"`strides` is \[4\]"),
        (dict(strides=(4, 0)), r"`strides\[1\]` is 0; it must be an int of at least 1"),
        (dict(num_local=0), "`num_local` is 0; it must be an int of at least 1"),
        (dict(num_sinks=-1), "`num_sinks` is -1"),
        (dict(block_size=0), "`block_size` is 0"),
        (dict(num_probe=0), "`num_probe` is 0"),
        (dict(scale="auto"), "`scale` is 'auto'"),
    ],
    ids=str,
)
def test_grid_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Grid(**(dict(strides=(4,)) | options))


QUERY, KEY = make_inputs(4, 12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(is_causal=False), "`is_causal` is False; Grid is defined for causal attention only"),
        (dict(key=KEY[0]), "`key` has shape"),
        (dict(query=QUERY[:, :, :3]), "`query` has 3 heads"),
        (dict(q_offset=0.5), "`q_offset` is 0.5"),
    ],
    ids=["not-causal", "key-rank", "heads", "offset"],
)
def test_grid_refuses_calls(options, message):
    with pytest.raises(ValueError, match=message):
        SMALL(**(dict(query=QUERY, key=KEY, is_causal=True) | options))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((QUERY, KEY, KEY, sa.selectors.Dense()), "`selector` is Dense"),
        ((QUERY, KEY, KEY[:, :5], SMALL), "`value`"),
        ((QUERY[:, :, :3], KEY, KEY, SMALL), "`query`"),
    ],
    ids=["selector", "value", "heads"],
)
def test_grid_attention_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_attention(*arguments)
