"""The nnx module: equal to the linen one, decoding, training under transformations, checkpoints, sharding and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import sparse_attn_jax as sa

LENGTH, MAX_LEN, FEATURES = 95, 96, 32
INFLLM = sa.selectors.InfLLMV2(
    top_k=3,
    block_size=16,
    kernel_size=8,
    kernel_stride=4,
    num_local_blocks=1,
    coarse_kernel_size=16,
    coarse_kernel_stride=8,
)
WINDOW = sa.selectors.SlidingWindow(window=21, num_sinks=3, block_size=16)
DENSE = sa.selectors.Dense(block_size=16)
OPTIONS = dict(num_kv_heads=2, head_dim=8, is_causal=True, rotary_theta=100.0)

# Compiling takes most of the time here, so programs are not optimised.
compile_fast = functools.partial(jax.jit, compiler_options=dict(xla_backend_optimization_level=0))


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def make_module(seed=0, **options):
    """Weights that are all random, biases too, so that none of them can be mixed up."""
    init = nnx.initializers.normal(0.3)
    inits = dict(kernel_init=init, bias_init=init, rngs=nnx.Rngs(seed))
    return sa.flax.nnx.SparseSelfAttention(4, FEATURES, **(OPTIONS | inits | options))


@compile_fast
def forward(graphdef, state, inputs, segment_ids=None):
    """(out, state) of the module in parts: they are shared between tests, and `nnx.jit` takes no compiler options."""
    module = nnx.merge(graphdef, state)
    out = module(inputs, segment_ids=segment_ids)
    return out, nnx.state(module)


def run(module, inputs, segment_ids=None):
    out, state = forward(*nnx.split(module), inputs, segment_ids)
    nnx.update(module, state)
    return out


def linen_params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


CONFIGURATIONS = dict(
    infllm=dict(selector=INFLLM, value_head_dim=6, out_features=5),
    window=dict(selector=WINDOW, is_causal=False, rotary_theta=None, scale=0.5, logits_soft_cap=2.0),
    none=dict(local_window_size=((40, 30, 20, 90), None), num_sinks=(1, 2, 3, 4), use_bias=False),
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_the_linen_module_with_the_same_weights(name):
    inputs, segment_ids = random(2, LENGTH, FEATURES), jnp.broadcast_to(jnp.arange(LENGTH) // 40, (2, LENGTH))
    options = OPTIONS | CONFIGURATIONS[name]
    module, linen = make_module(**options), sa.flax.linen.SparseSelfAttention(4, **options)
    params = linen_params(module)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    segment_ids = segment_ids if name == "none" else None
    expected = compile_fast(linen.apply)(dict(params=params), inputs, segment_ids=segment_ids)
    np.testing.assert_allclose(run(module, inputs, segment_ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selector", [INFLLM, WINDOW, DENSE], ids=["infllm", "window", "dense"])
def test_prefill_and_steps_equal_the_full_pass(selector):
    inputs, module = random(2, LENGTH, FEATURES), make_module(selector=selector)
    full = run(module, inputs)
    module.decode = True
    module.init_cache(2, MAX_LEN)
    assert all(isinstance(getattr(module, name), nnx.Cache) for name in ("cached_key", "cached_value", "cache_index"))
    outs = [run(module, inputs[:, :47])] + [run(module, inputs[:, i : i + 1]) for i in range(47, LENGTH)]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), full, rtol=1e-5, atol=1e-5)
    assert module.cache_index[...] == LENGTH
    if selector is INFLLM:
        compressed, coarse = INFLLM.compress(module.cached_key[:, :LENGTH])
        np.testing.assert_allclose(module.cached_compressed_key[:, : compressed.shape[1]], compressed, atol=1e-6)
        np.testing.assert_allclose(module.cached_coarse_key[:, : coarse.shape[1]], coarse, atol=1e-6)
    # One more fills the cache, the next has no room.
    assert jnp.isfinite(run(module, inputs[:, :1])).all()
    assert jnp.isnan(run(module, inputs[:, :1])).all() and module.cache_index[...] == MAX_LEN
    # A new cache starts over, and a call may decide for itself.
    module.init_cache(2, MAX_LEN)
    np.testing.assert_allclose(run(module, inputs[:, :47]), full[:, :47], rtol=1e-5, atol=1e-5)
    module.decode = False
    np.testing.assert_array_equal(run(module, inputs), full)


def test_decode_under_nnx_jit_and_call_argument():
    module, inputs = make_module(selector=DENSE), random(1, 8, FEATURES)
    whole = nnx.jit(lambda module, x: module(x, decode=False))
    step = nnx.jit(lambda module, x: module(x, decode=True))
    full = whole(module, inputs)
    module.init_cache(1, 8)
    outs = [step(module, inputs[:, :6]), step(module, inputs[:, 6:7]), step(module, inputs[:, 7:])]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), full, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole(module, inputs), full)


def test_selection_can_be_sown():
    module, inputs = make_module(selector=INFLLM), random(1, 32, FEATURES)
    graphdef, state = nnx.split(module)
    call = lambda state, x: nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(x, sow_selection=True)
    _, sown = jax.eval_shape(call, state, inputs)
    (selection,) = jax.tree.leaves(sown, is_leaf=lambda x: isinstance(x, sa.BlockSelection))
    assert selection.indices.shape == (1, 2, 32, 3)


class Layer(nnx.Module):
    def __init__(self, selector, rngs):
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = sa.flax.nnx.SparseSelfAttention(4, FEATURES, selector=selector, **OPTIONS, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(self.norm(x))


class Model(nnx.Module):
    """A model over tokens; two layers under remat and scan."""

    def __init__(self, selector, rngs):
        self.embed = nnx.Embed(17, FEATURES, rngs=rngs)
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(functools.partial(Layer, selector)))(rngs)
        self.head = nnx.Linear(FEATURES, 17, rngs=rngs)

    def __call__(self, tokens):
        scan = nnx.scan(nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(scan(self.embed(tokens), self.layers))

    def one_after_another(self, tokens):
        x = self.embed(tokens)
        graphdef, state = nnx.split(self.layers)
        for i in range(2):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))(x)  # noqa: B023
        return self.head(x)


TOKENS = jax.random.randint(jax.random.key(3), (2, 80), 0, 17)


def next_token_loss(model, tokens, call=Model.__call__):
    logits = call(model, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def test_donated_training_step_under_remat_and_scan():
    model = Model(INFLLM, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def train_step(model, optimizer, tokens):
        loss, grads = nnx.value_and_grad(next_token_loss)(model, tokens)
        optimizer.update(model, grads)
        return loss, grads

    first, losses = jax.tree.leaves(nnx.state(model, nnx.Param)), []
    for _ in range(8):
        loss, grads = train_step(model, optimizer, TOKENS)
        losses.append(float(loss))
        assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert all(x.is_deleted() for x in first)
    assert losses[-1] < 0.7 * losses[0] and losses == sorted(losses, reverse=True)


def test_scan_and_remat_change_nothing():
    graphdef, state = nnx.split(Model(DENSE, nnx.Rngs(0)))

    @compile_fast
    def both(state):
        losses = [
            jax.value_and_grad(lambda state: next_token_loss(nnx.merge(graphdef, state), TOKENS, call))(state)  # noqa: B023
            for call in (Model.__call__, Model.one_after_another)
        ]
        return losses

    (loss, grads), (expected_loss, expected) = both(state)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_checkpoint_loads_into_new_objects(tmp_path):
    inputs, module = random(2, LENGTH, FEATURES), make_module(selector=INFLLM)
    expected = run(module, inputs)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    fresh = make_module(seed=9, selector=INFLLM)
    template = nnx.to_pure_dict(nnx.state(fresh, nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        loaded = checkpointer.restore(tmp_path / "step", template)
    state = nnx.state(fresh, nnx.Param)
    nnx.replace_by_pure_dict(state, loaded)
    nnx.update(fresh, state)
    np.testing.assert_array_equal(run(fresh, inputs), expected)


def test_sharding_annotations_survive():
    partition = lambda names: nnx.with_partitioning(nnx.initializers.normal(), names)
    by_init = dict(
        kernel_init=partition((None, "heads", None)),
        bias_init=partition(("heads", None)),
        out_kernel_init=partition(("heads", None, None)),
        out_bias_init=nnx.initializers.zeros_init(),
    )
    by_metadata = dict(
        kernel_metadata=dict(out_sharding=(None, "heads", None)),
        bias_metadata=dict(out_sharding=("heads", None)),
        out_kernel_metadata=dict(out_sharding=("heads", None, None)),
        out_bias_metadata={},
    )
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    for options in (by_metadata, by_init):
        with jax.set_mesh(mesh):
            module = make_module(selector=INFLLM, **options)
        spec = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
        for name in ("query", "key", "value"):
            assert spec[name] == dict(kernel=PartitionSpec(None, "heads", None), bias=PartitionSpec("heads", None))
        assert spec["out"]["kernel"] == PartitionSpec("heads", None, None)
        assert spec["out"]["bias"] in (None, PartitionSpec())
        assert module.out.kernel.shape == (4, 8, FEATURES)


def test_dtype_of_computation_and_of_parameters():
    module, inputs = make_module(selector=INFLLM, dtype=jnp.bfloat16), random(2, 40, FEATURES)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(module, nnx.Param))} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(module, inputs).dtype == jnp.bfloat16
    module.init_cache(2, 40)
    assert module.cached_key.dtype == module.cached_compressed_key.dtype == jnp.bfloat16
    assert make_module(param_dtype=jnp.float16).query.kernel.dtype == jnp.float16
    module = make_module()
    module.init_cache(2, 40)
    assert module.cached_key.dtype == jnp.float32 and module.cached_compressed_key is None
    module.init_cache(2, 40, dtype=jnp.float16)
    assert module.cached_value.dtype == jnp.float16


BAD_ARGUMENTS = [
    (dict(num_kv_heads=3), "`num_kv_heads` is 3"),
    (dict(head_dim=7), "`head_dim` is 7"),
    (dict(is_causal=None), "`is_causal` is None"),
    (dict(selector="dense"), "`selector` is 'dense'"),
    (dict(rotary_theta=-1.0), "`rotary_theta` is -1.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_bad_argument(change, message):
    with pytest.raises(ValueError, match=message):
        make_module(**change)


def test_bad_calls():
    inputs, module = random(2, 8, FEATURES), make_module(selector=INFLLM)

    def call(message, x, module=module, **options):
        with pytest.raises(ValueError, match=message):
            module(x, **options)

    call("`inputs` is float32", inputs[0])
    call("`inputs` is float32.*32 features", inputs[..., :31])
    call("`segment_ids`", inputs, segment_ids=jnp.zeros((2, 7), jnp.int32))
    call("`init_cache", inputs, decode=True)
    module.init_cache(2, 8)
    call("`segment_ids`", inputs, segment_ids=jnp.zeros((2, 8), jnp.int32), decode=True)
    call("`cached_key`", inputs[:1], decode=True)
    call("`cached_key`", random(2, 9, FEATURES), decode=True)
    module.init_cache(2, 8, dtype=jnp.float16)
    call("`cached_key`", inputs, decode=True)
    with pytest.raises(ValueError, match="`is_causal` is False"):
        make_module(is_causal=False).init_cache(2, 8)
    with pytest.raises(ValueError, match="`selector`.*causal_safe"):
        make_module(selector=lambda query, key, **options: DENSE(query, key, **options)).init_cache(2, 8)
