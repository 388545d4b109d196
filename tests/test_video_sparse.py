"""Video sparse attention: both branches and their gradients, by a dense definition."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal

import sparse_attn_jax as sa
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.video_sparse import video_sparse_attention


def cube_ids(shape, cube_shape):
    """int [tokens]: the cube of each token in raster order."""
    counts = [-(-length // side) for length, side in zip(shape, cube_shape)]
    tokens = itertools.product(*map(range, shape))
    return np.array([np.ravel_multi_index([x // s for x, s in zip(token, cube_shape)], counts) for token in tokens])


def coarse_logits(query, key, cube, scale):
    """float64 [batch, num_q_heads, cubes, cubes]."""
    cubes = range(cube.max() + 1)
    means = [np.stack([np.asarray(x, np.float64)[:, cube == c].mean(axis=1) for c in cubes], axis=1) for x in (query, key)]
    return np.einsum("bihd,bjhd->bhij", means[0], means[1].repeat(query.shape[2] // key.shape[2], axis=2)) * scale


def fine_mask(logits, cube, top_k):
    """bool [batch, num_q_heads, tokens, tokens]."""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    return (chosen[:, :, cube][:, :, :, None] == cube[:, None]).any(axis=-1)


def dense_definition(mask, cube, scale, query, key, value, gate):
    """The output by means of dense attention in JAX, for a given choice of cubes."""
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    pool = (cube == np.arange(cube.max() + 1)[:, None]) / np.bincount(cube)[:, None]

    def attend(mask, query, key, value):
        logits = jnp.where(mask, jnp.einsum("bihd,bjhd->bhij", query, key) * scale, -jnp.inf)
        return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(logits, axis=-1), value)

    means = (jnp.einsum("ct,bthd->bchd", pool, x) for x in (query, key, value))
    gate = gate[..., None] if gate.ndim == 3 else gate
    return attend(True, *means)[:, cube] * gate + attend(mask, query, key, value)


CASES = {
    "divides": ((4, 4, 6), (2, 2, 3), 3, (2, 96, 4), None),
    "smaller cubes at the ends": ((3, 5, 4), (2, 2, 3), 2, (2, 60, 4, 5), 0.7),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_definition(name):
    shape, cube_shape, top_k, gate_shape, scale = CASES[name]
    length = math.prod(shape)
    query, key, value = 2 * normal(0, 2, length, 4, 8), normal(1, 2, length, 2, 8), normal(2, 2, length, 2, 5)
    gate, d_out = normal(3, *gate_shape), normal(4, 2, length, 4, 5)
    cube, number = cube_ids(shape, cube_shape), 8**-0.5 if scale is None else scale
    mask = fine_mask(coarse_logits(query, key, cube, number), cube, top_k)

    def run(function):
        @compile_fast
        def forward_and_backward(*operands):
            out, pull_back = jax.vjp(function, *operands)
            return out, *pull_back(d_out)

        return forward_and_backward(query, key, value, gate)

    options = dict(shape=shape, cube_shape=cube_shape, top_k=top_k, scale=scale)
    found = run(functools.partial(video_sparse_attention, **options))
    wanted = run(functools.partial(dense_definition, mask, cube, number))
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=1e-4)


QUERY, KEY, VALUE = normal(0, 1, 60, 4, 8), normal(1, 1, 60, 2, 8), normal(2, 1, 60, 2, 8)
GATE = normal(3, 1, 60, 4)
attend = functools.partial(video_sparse_attention, shape=(3, 5, 4), cube_shape=(2, 2, 3), top_k=2)


def test_all_cubes_without_the_coarse_branch_are_dense():
    out = compile_fast(functools.partial(attend, top_k=12))(QUERY, KEY, VALUE, jnp.zeros((1, 1, 1)))
    np.testing.assert_allclose(out, oracle.attention(True, QUERY, KEY, VALUE)[0], atol=3e-5)


def test_lower_cube_wins_a_tie():
    """Equal keys: the first two cubes, half of the value's tokens of which are marked."""
    value = jnp.asarray(cube_ids((3, 5, 4), (2, 2, 3)) < 2, jnp.float32)[None, :, None, None] * jnp.ones((1, 60, 2, 8))
    out = compile_fast(attend)(QUERY, jnp.ones_like(KEY), value, jnp.zeros((1, 1, 1)))
    np.testing.assert_allclose(out, 1, atol=1e-6)


def test_half_precision_keeps_its_dtype_and_the_coarse_branch_its_precision():
    """With a gate of 1,000 a rounded mean or probability would be seen."""
    query, key, value = (x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE))
    out = compile_fast(attend)(query, key, value, jnp.full((1, 1, 1), 1000.0))
    cube = cube_ids((3, 5, 4), (2, 2, 3))
    logits = coarse_logits(query, key, cube, 8**-0.5)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    means = np.stack([np.asarray(value, np.float64)[:, cube == c].mean(axis=1) for c in range(12)], axis=1)
    coarse = np.einsum("bhij,bjhd->bihd", weights, means.repeat(2, axis=2))[:, cube]
    fine = oracle.attention(fine_mask(logits, cube, 2), query, key, value)[0]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), 1000 * coarse + fine, rtol=2**-8, atol=0.03)


@pytest.mark.parametrize("cube_shape, needs_segments", [((2, 4, 8), False), ((4, 8, 8), False), ((5, 4, 8), True)], ids=str)
def test_kernels_take_the_fine_branch(monkeypatch, cube_shape, needs_segments):
    """Cubes of 64 and 256 tokens, and padding: neither a predicate nor a size that they lack."""
    calls = []

    def explain(query, key, value, selection, **options):
        calls.append((selection, options, sa.explain(query, key, value, selection, **options).reasons["mosaic"]))
        return sa.block_sparse_attention(query, key, value, selection, **options)

    monkeypatch.setattr("sparse_attn_jax.video_sparse.block_sparse_attention", explain)
    query = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((1, 1024, 2), jnp.bfloat16)
    run = functools.partial(video_sparse_attention, shape=(8, 8, 16), cube_shape=cube_shape, top_k=2)
    assert jax.eval_shape(run, query, query, query, gate).shape == query.shape
    ((selection, options, reasons),) = calls
    assert selection.predicate is None and ("query_segment_ids" in options) == needs_segments
    if not needs_segments:
        assert not any("predicate" in reason or "block_size" in reason or "segment" in reason for reason in reasons)


BAD = {
    "shape": (r"`shape` is \[3, 5, 4\]", dict(shape=[3, 5, 4])),
    "length": (r"`query` is .* of length 48, the tokens of shape=\(3, 4, 4\)", dict(shape=(3, 4, 4))),
    "keys": ("`key` is .* of length 60", dict(key=KEY[:, 1:], value=VALUE[:, 1:])),
    "cube rank": ("`cube_shape` is .* an int or 3 ints", dict(cube_shape=(2, 2))),
    "cube": (r"`cube_shape\[0\]` is 0", dict(cube_shape=(0, 2, 2))),
    "top_k": ("`top_k` is 0", dict(top_k=0)),
    "large top_k": ("`top_k` is 13; it must be at most the 12 cubes", dict(top_k=13)),
    "gate shape": (r"`gate` is float32\[1, 60, 3\]; it must be an array \[1, 60, 4\]", dict(gate=GATE[..., :3])),
    "gate rank": (r"`gate` is float32\[60, 4\]", dict(gate=GATE[0])),
    "gate dtype": ("`gate` is int32", dict(gate=jnp.ones((1, 1, 1), jnp.int32))),
    "scale": ("`scale` is nan", dict(scale=float("nan"))),
    "query": (r"`query` is .*\[60, 4, 8\]", dict(query=QUERY[0])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    message, changes = BAD[name]
    operands = dict(query=QUERY, key=KEY, value=VALUE, gate=GATE)
    with pytest.raises(ValueError, match=message):
        attend(**(operands | changes))


def test_an_implementation_that_cannot_is_said():
    with pytest.raises(NotImplementedError, match="mosaic"):
        jax.eval_shape(functools.partial(attend, implementation="mosaic"), QUERY, KEY, VALUE, GATE)
