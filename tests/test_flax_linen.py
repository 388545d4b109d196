"""The linen module: what it computes, decoding, training under transformations, checkpoints, sharding and bad input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import PartitionSpec

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.moba import MoBA
from sparse_attn_jax.selectors.nsa import NSA

MAX_LEN, FEATURES, HEADS = 96, 32, dict(num_heads=4, num_kv_heads=2, head_dim=8)
# Units of 8 tokens every 4, and of 16 every 8: lengths of every kind cross their ends.
INFLLM = sa.selectors.InfLLMV2(
    top_k=3,
    block_size=16,
    kernel_size=8,
    kernel_stride=4,
    num_local_blocks=1,
    coarse_kernel_size=16,
    coarse_kernel_stride=8,
)
EXACT = sa.selectors.InfLLMV2(
    top_k=3, block_size=16, kernel_size=6, kernel_stride=5, num_local_blocks=1, coarse_lse=False, group_reduction=None
)
MOBA = MoBA(top_k=2, block_size=16, kv_block_size=8)
NATIVE = NSA(top_k=3, block_size=16, kernel_size=8, kernel_stride=4, num_local_blocks=1)
WINDOW = sa.selectors.SlidingWindow(window=21, num_sinks=3, block_size=16)
DENSE = sa.selectors.Dense(block_size=16)

Attention = functools.partial(sa.flax.linen.SparseSelfAttention, **HEADS, is_causal=True, rotary_theta=100.0)


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def random_params(module, inputs, seed=1):
    """Parameters that are all random, biases too, so that none of them can be mixed up."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])


# Compiling takes most of the time here, so programs are shared between tests and not optimised.
compile_fast = functools.partial(jax.jit, compiler_options=dict(xla_backend_optimization_level=0))


@functools.cache
def compiled(module):
    def run(params, inputs, segment_ids):
        options = dict(segment_ids=segment_ids, sow_selection=True, mutable=["intermediates"])
        out, state = module.apply(dict(params=params), inputs, **options)
        return out, state["intermediates"]["selection"][0]

    return compile_fast(run)


def apply(module, params, inputs, segment_ids=None):
    """(out, selection)."""
    return compiled(module)(params, inputs, segment_ids)


def empty_cache(module, batch, max_len=MAX_LEN):
    inputs = jax.ShapeDtypeStruct((batch, max_len, FEATURES), jnp.float32)
    shapes = jax.eval_shape(module.clone(decode=True).init, jax.random.key(0), inputs)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])


@functools.cache
def compiled_step(module):
    def step(params, cache, tokens):
        mutable = ["cache", "intermediates"]
        variables = dict(params=params, cache=cache)
        out, state = module.clone(decode=True).apply(variables, tokens, sow_selection=True, mutable=mutable)
        return state["cache"], out, state["intermediates"]["selection"][0]

    return compile_fast(step)


def make_step(module, params):
    """One call in decode mode: (cache, tokens) -> (cache, out, selection)."""
    return functools.partial(compiled_step(module), params)


def decode_in(step, cache, inputs, lengths):
    """Feeds `inputs` in pieces of these lengths: (cache, outputs, block mask if the lists are per token)."""
    outs, masks, start = [], [], 0
    for length in lengths:
        cache, out, selection = step(cache, inputs[:, start : start + length])
        outs.append(out)
        masks.append(selection.to_block_mask(MAX_LEN))
        start += length
    assert start == inputs.shape[1]
    return cache, jnp.concatenate(outs, axis=1), jnp.concatenate(masks, axis=2)


WINDOWS = dict(local_window_size=((40, 30, 20, 90), None), num_sinks=(1, 2, 3, 4))
CONFIGURATIONS = dict(
    infllm=dict(selector=INFLLM, is_causal=True, rotary_theta=10.0, value_head_dim=6, out_features=5),
    window=dict(selector=WINDOW, scale=0.5, logits_soft_cap=2.0),
    none=dict(is_causal=True, segment_ids=jnp.broadcast_to(jnp.arange(95) // 40, (2, 95)), **WINDOWS),
)


def project(params, inputs, rotary_theta=None):
    """Query, key and value by hand, with rotary angles written as complex numbers."""
    arrays = [
        jnp.einsum("blf,fhd->blhd", inputs, p["kernel"]) + p["bias"] for p in (params[n] for n in ("query", "key", "value"))
    ]
    if rotary_theta is not None:
        for i, x in enumerate(arrays[:2]):
            angle = np.arange(x.shape[1])[:, None, None] * rotary_theta ** (-np.arange(4) / 4)
            turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle).astype(np.complex64)
            arrays[i] = jnp.concatenate([turned.real, turned.imag], axis=-1)
    return arrays


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_module_is_projections_around_the_op(name):
    options = dict(CONFIGURATIONS[name])
    inputs, segment_ids = random(2, 95, FEATURES), options.pop("segment_ids", None)
    module = Attention(**(dict(is_causal=False, rotary_theta=None) | options))
    params = random_params(module, inputs)
    out, found = apply(module, params, inputs, segment_ids)

    @compile_fast
    def reference(params, inputs):
        rotary_theta, selector = options.pop("rotary_theta", None), options.pop("selector", sa.selectors.Dense())
        options.pop("value_head_dim", None), options.pop("out_features", None)
        if "num_sinks" in options:
            options.update(num_sinks=jnp.arange(1, 5), local_window_size=(jnp.array([40, 30, 20, 90]), None))
        query, key, value = project(params, inputs, rotary_theta)
        segments = dict(query_segment_ids=segment_ids, key_value_segment_ids=segment_ids)
        out = sa.sparse_attention(query, key, value, selector, **segments, **options)
        selection = selector(query, key, is_causal=options.get("is_causal", False))
        return jnp.einsum("blhd,hdf->blf", out, params["out"]["kernel"]) + params["out"]["bias"], selection

    expected, selection = reference(params, inputs)
    assert out.shape == (2, 95, CONFIGURATIONS[name].get("out_features", FEATURES))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=3e-5)
    np.testing.assert_array_equal(found.indices, selection.indices)


def test_segments_do_not_see_each_other():
    inputs, segment_ids = random(2, 40, FEATURES), jnp.broadcast_to(jnp.arange(40) // 20, (2, 40))
    module = Attention(selector=DENSE)
    params = random_params(module, inputs)
    together, _ = apply(module, params, inputs, segment_ids)
    # Rotary angles are of distances, so the second segment does not know where it stands.
    apart = jnp.concatenate([apply(module, params, part)[0] for part in (inputs[:, :20], inputs[:, 20:])], axis=1)
    np.testing.assert_allclose(together, apart, atol=2e-5)


def test_implementation_reaches_the_op():
    inputs = random(1, 20, FEATURES)
    with pytest.raises(NotImplementedError, match="mosaic"):
        jax.eval_shape(Attention(implementation="mosaic").init, jax.random.key(0), inputs)


def test_rotary_dot_products_depend_on_distance_only():
    from sparse_attn_jax.flax.rotary import apply_rotary

    query, key = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)
    at = lambda x, position: apply_rotary(x, jnp.array([position]), 10.0)
    dot = lambda q, k: jnp.vdot(at(query, q), at(key, k))
    np.testing.assert_allclose(dot(9, 4), dot(105, 100), rtol=1e-4)
    np.testing.assert_allclose(dot(0, 0), jnp.vdot(query, key), rtol=1e-6)
    assert abs(dot(9, 4) - dot(9, 5)) > 1e-3
    # Feature 0 pairs with feature 4 and turns by one radian per position.
    np.testing.assert_allclose(
        at(jnp.eye(8)[0][None, None, None], 1)[0, 0, 0, jnp.array([0, 4])], [np.cos(1), np.sin(1)], rtol=1e-6
    )


SELECTORS = dict(infllm=INFLLM, exact=EXACT, moba=MOBA, nsa=NATIVE, window=WINDOW, dense=DENSE)


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
def test_prefill_and_steps_equal_the_full_pass(selector):
    inputs = random(2, 95, FEATURES)
    module = Attention(selector=selector)
    params = random_params(module, inputs)
    full, selection = apply(module, params, inputs)
    step = make_step(module, params)
    # Prefill to a length that is 15 mod 16, then one at a time; and several at a time, fewer and more than a unit's stride.
    schedules = ([47] + 48 * [1], 9 * [3] + 4 * [17])[: 2 if selector in (INFLLM, EXACT) else 1]
    for lengths in schedules if selector not in (MOBA, NATIVE) else [19 * [5]]:
        cache, outs, blocks = decode_in(step, empty_cache(module, 2), inputs, lengths)
        np.testing.assert_allclose(outs, full, rtol=1e-5, atol=1e-5)
        assert cache["cache_index"] == 95 and not cache["cached_key"][:, 95:].any()
        if selector in (WINDOW, DENSE):
            continue
        np.testing.assert_array_equal(blocks, selection.to_block_mask(MAX_LEN))
        for name, sizes in zip(("cached_compressed_key", "cached_coarse_key"), selector.unit_sizes()):
            units = sa.compress_keys(cache["cached_key"][:, :95], *sizes)
            np.testing.assert_allclose(cache[name][:, : units.shape[1]], units, atol=1e-6)


def test_wrong_cache_index_or_stale_units_would_show():
    inputs = random(2, 95, FEATURES)
    module = Attention(selector=INFLLM)
    params = random_params(module, inputs)
    step = make_step(module, params)
    cache, *_ = step(empty_cache(module, 2), inputs[:, :47])
    right, *_ = decode_in(step, cache, inputs[:, 47:60], 13 * [1])[1:]
    for change in (
        dict(cache_index=cache["cache_index"] - 1),
        dict(cache_index=cache["cache_index"] + 1),
        dict(cached_compressed_key=cache["cached_compressed_key"][:, ::-1]),
        dict(cached_value=jnp.roll(cache["cached_value"], 1, axis=1)),
    ):
        wrong, *_ = decode_in(step, cache | change, inputs[:, 47:60], 13 * [1])[1:]
        assert jnp.abs(wrong - right).max() > 1e-3


def test_step_does_not_compress_the_whole_cache():
    from sparse_attn_jax.flax.decode_cache import append_tokens

    def flops(max_len):
        tokens = random(1, 1, 2, 8)
        append = jax.jit(lambda cache, key, value: append_tokens(cache, INFLLM, key, value), donate_argnums=0)
        cache = empty_cache(Attention(selector=INFLLM), 1, max_len)
        return append.lower(cache, tokens, tokens).compile().cost_analysis()["flops"]

    assert flops(4096) == flops(128)


def test_tokens_beyond_the_cache_are_nan_and_change_nothing():
    inputs = random(2, 99, FEATURES)
    module = Attention(selector=INFLLM)
    params = random_params(module, inputs)
    step = make_step(module, params)
    full, _ = apply(module, params, inputs[:, :95])
    cache, *_ = decode_in(step, empty_cache(module, 2), inputs[:, :81], [47, 17, 17])
    cache, out, _ = step(cache, inputs[:, 81:98])
    np.testing.assert_allclose(out[:, :14], full[:, 81:], rtol=1e-5, atol=1e-5)
    assert jnp.isfinite(out[:, 14]).all() and jnp.isnan(out[:, 15:]).all() and cache["cache_index"] == 96
    after, out, _ = step(cache, inputs[:, 98:99])
    assert jnp.isnan(out).all()
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_cache_shorter_than_a_unit():
    inputs = random(1, 5, FEATURES)
    module = Attention(selector=INFLLM)
    params = random_params(module, inputs)
    cache, out, _ = make_step(module, params)(empty_cache(module, 1, max_len=5), inputs)
    assert cache["cached_compressed_key"].shape[1] == 0
    np.testing.assert_allclose(out, apply(module, params, inputs)[0], atol=1e-5)


class Layer(nn.Module):
    """Attention with a residual connection, as `nn.scan` wants its body."""

    selector: object
    decode: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        return x + Attention(selector=self.selector, decode=self.decode)(nn.LayerNorm()(x)), None


class Scanned(nn.Module):
    """A model over tokens with two layers under remat and scan, or one after another."""

    selector: object
    scan: bool = True
    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(17, FEATURES)(tokens)
        if self.scan:
            axes = dict(params=0, cache=0)
            layers = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs=dict(params=True), length=2)
            x, _ = layers(self.selector, self.decode, name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = Layer(self.selector, self.decode, name=f"layer_{i}")(x)
        return nn.Dense(17)(x)


def next_token_loss(model, params, tokens):
    logits = model.apply(dict(params=params), tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


TOKENS = jax.random.randint(jax.random.key(3), (2, 80), 0, 17)


def test_donated_training_step_under_remat_and_scan():
    model, optimizer = Scanned(INFLLM), optax.adam(1e-2)

    @functools.partial(compile_fast, donate_argnums=(0, 1))
    def train_step(params, state, tokens):
        loss, grads = jax.value_and_grad(functools.partial(next_token_loss, model))(params, tokens)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, grads

    params = compile_fast(model.init)(jax.random.key(0), TOKENS)["params"]
    state, first, losses = optimizer.init(params), params, []
    for _ in range(8):
        params, state, loss, grads = train_step(params, state, TOKENS)
        losses.append(float(loss))
        assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    assert losses[-1] < 0.7 * losses[0] and losses == sorted(losses, reverse=True)


def test_scan_and_remat_change_nothing():
    scanned, unrolled = Scanned(DENSE), Scanned(DENSE, scan=False)
    params = compile_fast(scanned.init)(jax.random.key(0), TOKENS)["params"]
    layers = params.pop("layers")
    flat = params | {f"layer_{i}": jax.tree.map(lambda x: x[i], layers) for i in range(2)}  # noqa: B023
    grad = lambda model: compile_fast(jax.value_and_grad(functools.partial(next_token_loss, model)))
    loss, grads = grad(scanned)(params | dict(layers=layers), TOKENS)
    expected_loss, expected = grad(unrolled)(flat, TOKENS)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for i in range(2):
        pairs = jax.tree.map(lambda x, y: (x[i], y), grads["layers"], expected[f"layer_{i}"])  # noqa: B023
        for x, y in jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple)):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_decode_of_scanned_layers():
    model = Scanned(DENSE, decode=True)
    variables = compile_fast(model.init)(jax.random.key(0), jnp.zeros((2, MAX_LEN), jnp.int32))
    params, cache = dict(params=variables["params"]), variables["cache"]
    step = compile_fast(functools.partial(model.apply, mutable=["cache"]))
    outs = []
    for tokens in (TOKENS[:, :70], TOKENS[:, 70:71], TOKENS[:, 71:72]):
        out, state = step(params | dict(cache=cache), tokens)
        cache = state["cache"]
        outs.append(out)
    full = compile_fast(Scanned(DENSE).apply)(params, TOKENS[:, :72])
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), full, atol=1e-5)


def test_checkpoint_loads_into_new_objects(tmp_path):
    inputs = random(2, 95, FEATURES)
    params = random_params(Attention(selector=INFLLM), inputs)
    (tmp_path / "params").write_bytes(serialization.to_bytes(params))
    expected, _ = apply(Attention(selector=INFLLM), params, inputs)
    fresh = Attention(selector=INFLLM)
    template = random_params(fresh, inputs, seed=9)
    loaded = serialization.from_bytes(template, (tmp_path / "params").read_bytes())
    np.testing.assert_array_equal(apply(fresh, loaded, inputs)[0], expected)


@pytest.mark.parametrize("partition", [nn.with_partitioning, nn.with_logical_partitioning])
def test_sharding_annotations_survive(partition):
    module = Attention(
        selector=INFLLM,
        kernel_init=partition(nn.initializers.lecun_normal(), (None, "heads", None)),
        bias_init=partition(nn.initializers.zeros_init(), ("heads", None)),
        out_kernel_init=partition(nn.initializers.lecun_normal(), ("heads", None, None)),
        out_bias_init=nn.initializers.zeros_init(),
    )
    inputs = random(2, 33, FEATURES)
    boxed = jax.eval_shape(module.init, jax.random.key(0), inputs)
    spec = nn.get_partition_spec(boxed)["params"]
    for name in ("query", "key", "value"):
        assert spec[name] == dict(kernel=PartitionSpec(None, "heads", None), bias=PartitionSpec("heads", None))
    assert spec["out"] == dict(kernel=PartitionSpec("heads", None, None), bias=PartitionSpec())
    assert boxed["params"]["out"]["kernel"].unbox().shape == (4, 8, FEATURES)
    assert jax.eval_shape(module.apply, boxed, inputs).shape == inputs.shape


def test_dtype_of_computation_and_of_parameters():
    inputs = random(2, 40, FEATURES)
    module = Attention(dtype=jnp.bfloat16)  # dense, so that rounding does not choose other blocks
    params = random_params(module, inputs)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out, _ = apply(module, params, inputs)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), apply(Attention(), params, inputs)[0], atol=0.1)
    assert {x.dtype for x in jax.tree.leaves(random_params(Attention(param_dtype=jnp.float16), inputs))} == {
        jnp.dtype("float16")
    }
    module = Attention(selector=INFLLM, dtype=jnp.bfloat16)
    step = functools.partial(module.clone(decode=True).apply, mutable=["cache"])
    out, state = jax.eval_shape(step, dict(params=params, cache=empty_cache(module, 2)), inputs)
    cache = state["cache"]
    assert out.dtype == cache["cached_key"].dtype == cache["cached_compressed_key"].dtype == jnp.bfloat16


BAD_ATTRIBUTES = [
    (dict(num_heads=0), "`num_heads` is 0"),
    (dict(num_kv_heads=3), "`num_kv_heads` is 3"),
    (dict(num_heads=5, num_kv_heads=5, head_dim=None), "`num_heads` is 5"),
    (dict(head_dim=-1), "`head_dim` is -1"),
    (dict(head_dim=7), "`head_dim` is 7"),
    (dict(value_head_dim=0), "`value_head_dim` is 0"),
    (dict(out_features=2.0), "`out_features` is 2.0"),
    (dict(rotary_theta=0.0), "`rotary_theta` is 0.0"),
    (dict(rotary_theta=True), "`rotary_theta` is True"),
    (dict(is_causal=1), "`is_causal` is 1"),
    (dict(selector=3), "`selector` is 3"),
    (dict(local_window_size=(1, -1)), "`local_window_size right` is -1"),
    (dict(local_window_size=((1.5,) * 4, 0)), "`local_window_size left`"),
    (dict(num_sinks=(1, 2), local_window_size=3), "`num_sinks`"),
    (dict(logits_soft_cap=0.0), "`logits_soft_cap` is 0.0"),
    (dict(implementation="fast"), "fast"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ATTRIBUTES, ids=[message for _, message in BAD_ATTRIBUTES])
def test_bad_attribute(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Attention(**change).init, jax.random.key(0), jnp.zeros((1, 20, FEATURES)))


BAD_INPUTS = [
    (jnp.zeros((20, FEATURES)), None, "`inputs` is float32"),
    (jnp.zeros((1, 20, FEATURES), jnp.int32), None, "`inputs` is int32"),
    (jnp.zeros((1, 20, FEATURES)), jnp.zeros((1, 19), jnp.int32), "`segment_ids` is int32"),
    (jnp.zeros((1, 20, FEATURES)), jnp.zeros((1, 20)), "`segment_ids` is float32"),
]


@pytest.mark.parametrize(("inputs", "segment_ids", "message"), BAD_INPUTS, ids=[message for *_, message in BAD_INPUTS])
def test_bad_input(inputs, segment_ids, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(Attention().init, jax.random.key(0), segment_ids=segment_ids), inputs)


def test_bad_decoding():
    inputs = random(2, 8, FEATURES)
    module = Attention(selector=INFLLM)
    variables = dict(params=random_params(module, inputs), cache=empty_cache(module, 2, max_len=8))

    def decode(message, inputs=inputs, cache=variables["cache"], segment_ids=None, **change):
        with pytest.raises(ValueError, match=message):
            module.clone(decode=True, **change).apply(
                variables | dict(cache=cache), inputs, segment_ids=segment_ids, mutable=["cache"]
            )

    decode("`segment_ids`", segment_ids=jnp.zeros((2, 8), jnp.int32))
    decode("`is_causal` is False", is_causal=False)
    decode("`selector`.*causal_safe", selector=lambda query, key, **options: DENSE(query, key, **options))
    decode("`cache` is empty", cache={})
    decode("`cached_key`", inputs=random(2, 9, FEATURES))
    decode("`cached_key`", inputs=random(1, 8, FEATURES))
    decode("`cached_key`", dtype=jnp.bfloat16)


def test_flax_is_imported_at_first_use():
    assert "flax" in dir(sa)
    with pytest.raises(AttributeError, match="flex"):
        _ = sa.flex
