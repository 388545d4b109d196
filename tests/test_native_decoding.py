"""Decoding by the linen and nnx modules of native sparse attention: in pieces they compute what one call on the whole does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal
from flax import nnx

from sparse_attn_jax.flax.linen import NativeSparseAttention
from sparse_attn_jax.flax.native import append_native
from sparse_attn_jax.flax.nnx import NativeSparseAttention as NnxNativeSparseAttention
from sparse_attn_jax.scoring_problem import num_units

# Sizes that do not divide each other: units, blocks and window begin and end at different tokens.
KERNEL = (5, 3)
OPTIONS = dict(
    num_kv_heads=2, head_dim=8, value_head_dim=6, out_features=5, kernel_size=KERNEL[0], kernel_stride=KERNEL[1], block_size=8,
    top_k=3, num_local_blocks=1, window_size=7, compression_features=10, rotary_theta=10.0, scale=0.5,
)  # fmt: skip
FEATURES, MAX_LEN = 24, 44
INPUTS = normal(0, 2, MAX_LEN, FEATURES)
TOKENS = (
    "cached_key", "cached_value", "cached_window_key", "cached_window_value", "cached_uncompressed_key",
    "cached_uncompressed_value",
)  # fmt: skip
UNITS = ("cached_compressed_key", "cached_compressed_value")
Attention = functools.partial(NativeSparseAttention, 4, **OPTIONS)

# Pieces are of these lengths or of one token, so that few programs are compiled.
PROMPT, SEVERAL = 19, 11


@functools.cache
def random_params():
    """Parameters that are all random, biases too, so that none of them can be mixed up."""
    shapes = jax.eval_shape(Attention().init, jax.random.key(0), INPUTS)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.5 * normal(i, *x.shape) for i, x in enumerate(leaves)])


@functools.cache
def whole():
    """The outputs of one call on all tokens, without a cache."""
    return compile_fast(Attention().apply)(dict(params=random_params()), INPUTS)


def init_cache(inputs, **options):
    return Attention(decode=True, **options).init(jax.random.key(0), inputs)["cache"]


def empty_cache(max_len=MAX_LEN, **options):
    """What `init_cache` makes, without the time that it takes to compile."""
    shapes = jax.eval_shape(functools.partial(init_cache, **options), INPUTS[:, :max_len])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_new_cache_is_empty():
    cache = compile_fast(init_cache)(INPUTS[:, :4])
    jax.tree.map(np.testing.assert_array_equal, cache, empty_cache(4))


@functools.cache
def compiled_step(**options):
    def step(params, cache, tokens):
        out, state = Attention(decode=True, **options).apply(dict(params=params, cache=cache), tokens, mutable=["cache"])
        return out, state["cache"]

    return compile_fast(step, donate_argnums=1)


def decode(cache, inputs, lengths, **options):
    """Feeds inputs to the linen module in pieces of these lengths: (outputs, cache)."""
    outs, start = [], 0
    for length in lengths:
        out, cache = compiled_step(**options)(random_params(), cache, inputs[:, start : start + length])
        outs.append(out)
        start += length
    assert start == inputs.shape[1]
    return jnp.concatenate(outs, axis=1), cache


def copy(cache):
    """What a step may be given: it destroys its argument."""
    return jax.tree.map(jnp.copy, cache)


@functools.cache
def _after_prompt():
    return decode(empty_cache(), INPUTS[:, :PROMPT], [PROMPT])


def after_prompt():
    """(outputs, cache) after one call with the first PROMPT tokens."""
    out, cache = _after_prompt()
    return out, copy(cache)


def poison(cache, length):
    """Garbage in all that a cache of this many tokens does not hold."""
    poisoned = {name: np.array(x) for name, x in cache.items()}
    for name in (*TOKENS, *UNITS):
        poisoned[name][:, filled(name, length) :] = 1e3
    return jax.tree.map(jnp.asarray, poisoned)


def filled(name, length):
    """How much of a cached array counts when this many tokens are stored."""
    return length if name in TOKENS else num_units(length, *KERNEL)


def assert_same_cache(cache, other, **tolerance):
    """Equal in all that counts: tokens up to the index and their complete units."""
    length = int(cache["cache_index"])
    assert cache["cache_index"] == other["cache_index"] and cache.keys() == other.keys() == {"cache_index", *TOKENS, *UNITS}
    for name in (*TOKENS, *UNITS):
        count = filled(name, length)
        np.testing.assert_allclose(cache[name][:, :count], other[name][:, :count], err_msg=name, **tolerance)


CLOSE = dict(rtol=1e-4, atol=1e-4)


def test_prompt_then_token_by_token_is_the_whole():
    prompt, cache = after_prompt()
    steps, _ = decode(cache, INPUTS[:, PROMPT:], [1] * (MAX_LEN - PROMPT))
    np.testing.assert_allclose(jnp.concatenate([prompt, steps], axis=1), whole(), **CLOSE)


@pytest.mark.parametrize("lengths", [[1] * 25, [PROMPT, SEVERAL], [1, SEVERAL, SEVERAL], [PROMPT, 1, 1, SEVERAL, SEVERAL]])
def test_any_pieces_are_the_whole_and_leave_the_same_cache(lengths):
    length = sum(lengths)
    out, cache = decode(empty_cache(), INPUTS[:, :length], lengths)
    np.testing.assert_allclose(out, whole()[:, :length], **CLOSE)
    # Whatever the pieces, token by token from the prompt leaves the same.
    _, expected = decode(after_prompt()[1], INPUTS[:, PROMPT:length], [1] * (length - PROMPT))
    assert_same_cache(cache, expected, **CLOSE)


def test_nothing_beyond_the_index_counts():
    outs, (_, cache) = [], after_prompt()
    for length in range(PROMPT, MAX_LEN):
        out, cache = decode(poison(cache, length), INPUTS[:, length : length + 1], [1])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole()[:, PROMPT:], **CLOSE)
    several = slice(PROMPT, PROMPT + SEVERAL)
    out, _ = decode(poison(after_prompt()[1], PROMPT), INPUTS[:, several], [SEVERAL])
    np.testing.assert_allclose(out, whole()[:, several], **CLOSE)


def test_smaller_index_takes_tokens_back():
    wrong, (_, cache) = normal(1, 2, SEVERAL + 1, FEATURES), after_prompt()
    _, cache = decode(cache, wrong, [SEVERAL, 1])
    for back in (PROMPT, PROMPT - 1, PROMPT - 4):
        again = copy(cache) | dict(cache_index=jnp.int32(back))
        out, _ = decode(again, INPUTS[:, back : back + SEVERAL + 2], [SEVERAL, 1, 1])
        np.testing.assert_allclose(out, whole()[:, back : back + SEVERAL + 2], **CLOSE)


def test_tokens_beyond_the_cache_are_nan_and_change_nothing():
    _, cache = decode(after_prompt()[1], INPUTS[:, PROMPT:-3], [SEVERAL, SEVERAL])
    out, cache = decode(cache, jnp.concatenate([INPUTS[:, -3:], INPUTS[:, :8]], axis=1), [SEVERAL])
    np.testing.assert_allclose(out[:, :3], whole()[:, -3:], **CLOSE)
    assert jnp.isnan(out[:, 3:]).all() and cache["cache_index"] == MAX_LEN
    before = copy(cache)
    out, cache = decode(cache, INPUTS[:, :1], [1])
    assert jnp.isnan(out).all()
    assert_same_cache(cache, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("max_len", "num_units", "lengths"), [(4, 0, [1] * 4), (8, 2, [8])])
def test_fewer_units_than_tokens_could_complete(max_len, num_units, lengths):
    out, cache = decode(empty_cache(max_len), INPUTS[:, :max_len], lengths)
    assert cache["cached_compressed_key"].shape[1] == num_units
    np.testing.assert_allclose(out, whole()[:, :max_len], **CLOSE)


def test_cache_is_updated_in_place():
    _, cache = after_prompt()
    decode(cache, INPUTS[:, :1], [1])
    assert all(x.is_deleted() for x in cache.values())


@pytest.mark.parametrize(("num_new", "num_read"), [(1, 5), (3, 5), (4, 8), (9, 11)])
def test_step_compresses_only_what_new_tokens_complete(num_new, num_read):
    read = []

    def record(tokens):
        read.append(tokens.shape[1])
        return jnp.zeros((2, num_units(tokens.shape[1], *KERNEL), *tokens.shape[2:]))

    def append(cache, inputs):
        config = Attention()._config(FEATURES)
        projected = {name: jnp.zeros((2, num_new, *sizes)) for name, sizes in config.projections().items()}
        return append_native(config, cache, projected, dict.fromkeys(config.compressions(), record))

    cache = empty_cache()
    assert jax.tree.map(jnp.shape, jax.eval_shape(append, cache, INPUTS)) == jax.tree.map(jnp.shape, cache)
    assert read == [num_read] * 2


def make_nnx(**options):
    """The module with the parameters of the linen one."""
    make = lambda: NnxNativeSparseAttention(4, FEATURES, **OPTIONS, **options, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(nnx.eval_shape(make))
    cast = lambda x: x.astype(options.get("param_dtype", x.dtype))
    nnx.replace_by_pure_dict(state, jax.tree.map(cast, random_params()))
    return nnx.merge(graphdef, state)


def test_nnx_module_decodes_as_the_linen_one():
    module = make_nnx()
    module.init_cache(2, MAX_LEN)
    assert all(isinstance(getattr(module, name), nnx.Cache) for name in ("cache_index", *TOKENS, *UNITS))

    @functools.partial(compile_fast, donate_argnums=0)
    def run(state, tokens):
        module = nnx.merge(graphdef, params, state)
        return module(tokens, decode=True), nnx.state(module, nnx.Cache)

    graphdef, params, state = nnx.split(module, nnx.Param, nnx.Cache)
    outs = []
    for i in range(MAX_LEN):
        out, state = run(state, INPUTS[:, i : i + 1])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole(), **CLOSE)
    nnx.update(module, state)
    cache = {name: jnp.copy(getattr(module, name)[...]) for name in ("cache_index", *TOKENS, *UNITS)}
    assert_same_cache(cache, decode(after_prompt()[1], INPUTS[:, PROMPT:], [1] * (MAX_LEN - PROMPT))[1], **CLOSE)
    assert jnp.isnan(run(state, INPUTS[:, :1])[0]).all()
    # A new cache starts over.
    module.init_cache(2, MAX_LEN)
    out, _ = run(nnx.state(module, nnx.Cache), INPUTS[:, :1])
    np.testing.assert_allclose(out, whole()[:, :1], **CLOSE)


def test_computation_in_bfloat16():
    options = dict(dtype=jnp.bfloat16)
    cache = empty_cache(**options)
    assert {str(x.dtype) for x in cache.values()} == {"bfloat16", "int32"}
    full = compile_fast(Attention(**options).apply)(dict(params=random_params()), INPUTS[:, :25])
    out, _ = decode(cache, INPUTS[:, :25], [1] * 25, **options)
    assert out.dtype == full.dtype == jnp.bfloat16
    out, full = out.astype(jnp.float32), full.astype(jnp.float32)
    np.testing.assert_allclose(out, full, rtol=0.02, atol=0.02 * float(jnp.abs(full).max()))


def test_dtypes_of_the_nnx_cache():
    for options, given, expected in (
        (dict(dtype=jnp.bfloat16), None, jnp.bfloat16),
        (dict(param_dtype=jnp.float16), None, jnp.float16),
        (dict(), jnp.bfloat16, jnp.bfloat16),
    ):
        module = make_nnx(**options)
        assert module.cached_key is None
        module.init_cache(3, 20, dtype=given)
        for name in (*TOKENS, *UNITS):
            assert getattr(module, name).dtype == expected
        assert module.cached_window_value.shape == (3, 20, 2, 6) and module.cached_compressed_key.shape == (3, 6, 2, 8)
        assert module.cache_index.shape == () and module.cache_index.dtype == jnp.int32


def test_bad_calls_to_decode():
    def step(message, inputs=INPUTS, cache=None, **options):
        cache = jax.eval_shape(empty_cache) if cache is None else cache
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                functools.partial(Attention(decode=True, **options).apply, mutable=["cache"]),
                dict(params=random_params(), cache=cache), inputs,
            )  # fmt: skip

    step("`cache` is empty", cache={})
    step("`cached_key`", jnp.zeros((2, MAX_LEN + 1, FEATURES)))
    step("`cached_key`", INPUTS[:1])
    step("`cached_key`", dtype=jnp.bfloat16)


def test_bad_calls_to_decode_with_nnx():
    module = make_nnx(decode=True)
    with pytest.raises(ValueError, match="init_cache"):
        module(INPUTS)
    module.init_cache(2, 8)
    with pytest.raises(ValueError, match="`cached_key`.*max_len >= 9"):
        module(INPUTS[:, :9])
    assert nnx.eval_shape(lambda: module(INPUTS, decode=False)).shape == (2, MAX_LEN, 5)
