"""The linen and nnx modules of native sparse attention: what they compute, that they are equal, training and bad input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_calls import compile_fast, normal
from flax import nnx
from jax.sharding import PartitionSpec

from sparse_attn_jax.flax.linen import NativeSparseAttention
from sparse_attn_jax.flax.nnx import NativeSparseAttention as NnxNativeSparseAttention
from sparse_attn_jax.testing.methods import nsa as definition

LENGTH, FEATURES = 43, 24
OPTIONS = dict(
    num_kv_heads=2, head_dim=8, value_head_dim=6, out_features=5, kernel_size=4, kernel_stride=2, block_size=8, top_k=3,
    num_local_blocks=1, window_size=7, compression_features=10, rotary_theta=10.0, scale=0.5,
)  # fmt: skip
INPUTS = normal(0, 2, LENGTH, FEATURES)
Attention = functools.partial(NativeSparseAttention, 4, **OPTIONS)


@functools.cache
def random_params():
    """Parameters that are all random, biases too, so that none of them can be mixed up."""
    shapes = jax.eval_shape(Attention().init, jax.random.key(0), INPUTS)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.5 * normal(i, *x.shape) for i, x in enumerate(leaves)])


def test_shapes_of_the_parameters():
    shapes = jax.tree.map(jnp.shape, random_params())
    projection = lambda heads, dim: dict(kernel=(FEATURES, heads, dim), bias=(heads, dim))
    compression = lambda dim: dict(
        position_embedding=(4, 2, dim),
        hidden=dict(kernel=(4 * dim, 10), bias=(10,)),
        out=dict(kernel=(10, dim), bias=(dim,)),
    )
    keys, values = (
        {f"{prefix}{name}": projection(2, dim) for prefix in ("", "compressed_", "window_")}
        for name, dim in (("key", 8), ("value", 6))
    )
    assert shapes == dict(
        query=projection(4, 8), gate=projection(4, 3), **keys, **values, key_compression=compression(8),
        value_compression=compression(6), out=dict(kernel=(4, 6, 5), bias=(5,)),
    )  # fmt: skip


def by_hand(params, inputs):
    """The module in NumPy, with rotary angles written as complex numbers."""
    params, inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, inputs))

    def rotate(x, positions):
        angle = np.asarray(positions)[:, None, None] * 10.0 ** (-np.arange(4) / 4)
        turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def project(name):
        return np.einsum("blf,fhd->blhd", inputs, params[name]["kernel"]) + params[name]["bias"]

    def compress(x, p):
        units = []
        for start in range(0, LENGTH - 3, 2):
            tokens = x[:, start : start + 4] + p["position_embedding"]  # [batch, 4, heads, dim]
            flat = np.concatenate([tokens[:, i] for i in range(4)], axis=-1)
            hidden = np.asarray(nn.gelu(jnp.asarray(flat @ p["hidden"]["kernel"] + p["hidden"]["bias"])))
            units.append(hidden @ p["out"]["kernel"] + p["out"]["bias"])
        return np.stack(units, axis=1)

    positions = np.arange(LENGTH)
    units = compress(project("compressed_key"), params["key_compression"])
    branches = dict(
        compressed=(
            rotate(units, 2 * np.arange(units.shape[1])),
            compress(project("compressed_value"), params["value_compression"]),
        ),
        selected=(rotate(project("key"), positions), project("value")),
        window=(rotate(project("window_key"), positions), project("window_value")),
    )
    gates = 1 / (1 + np.exp(-project("gate")))
    gates = {name: gates[..., i] for i, name in enumerate(("compressed", "selected", "window"))}
    # The oracles scale by 8 ** -0.5.
    query = rotate(project("query"), positions) * 0.5 * 8**0.5
    masks = definition.branch_masks(
        query, branches["compressed"][0], np.broadcast_to(positions, (2, LENGTH)), kv_len=LENGTH, window_size=7, kernel=(4, 2),
        block_size=8, top_k=3, num_sink_blocks=1, num_local_blocks=1,
    )  # fmt: skip
    out, *_ = definition.attention(query, branches, gates, masks, 0.0)
    return np.einsum("blhd,hdf->blf", out, params["out"]["kernel"]) + params["out"]["bias"]


@functools.cache
def run_linen():
    """(out, gradients of the sum of its squares by all parameters)."""

    def loss(params):
        out = Attention().apply(dict(params=params), INPUTS)
        return (out**2).sum(), out

    gradients, out = compile_fast(jax.grad(loss, has_aux=True))(random_params())
    return out, gradients


def test_linen_module_is_the_method_by_hand():
    out, _ = run_linen()
    assert out.shape == (2, LENGTH, 5)
    np.testing.assert_allclose(out, by_hand(random_params(), INPUTS), atol=2e-4)


def test_every_parameter_learns():
    _, gradients = run_linen()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all()
        assert jnp.abs(gradient).max() > 1e-4, jax.tree_util.keystr(path)


def test_nnx_module_is_the_linen_one():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxNativeSparseAttention(4, FEATURES, **OPTIONS, rngs=nnx.Rngs(0))))
    state = nnx.filter_state(state, nnx.Param)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, random_params())
    nnx.replace_by_pure_dict(state, random_params())
    out = compile_fast(lambda state, x: nnx.merge(graphdef, state)(x))(state, INPUTS)
    np.testing.assert_allclose(out, run_linen()[0], atol=1e-5)


def test_dtypes_and_defaults():
    inputs, options = jnp.zeros((1, 70, 32)), dict(dtype=jnp.bfloat16, param_dtype=jnp.float16, use_bias=False)
    out, variables = jax.eval_shape(NativeSparseAttention(4, **options).init_with_output, jax.random.key(0), inputs)
    same = jax.eval_shape(lambda x: NnxNativeSparseAttention(4, 32, **options, rngs=nnx.Rngs(0))(x), inputs)
    assert out.dtype == same.dtype == jnp.bfloat16 and out.shape == same.shape == (1, 70, 32)
    params = variables["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    assert params["key_compression"]["hidden"]["kernel"].shape == (32 * 8, 8)
    assert set(params["out"]) == set(params["key_compression"]["hidden"]) == {"kernel"}


def test_sequence_shorter_than_a_unit():
    params = dict(params=random_params())
    assert jax.eval_shape(Attention().apply, params, INPUTS[:, :3]).shape == (2, 3, 5)


def test_sharding_annotations_survive():
    partition = lambda names: nn.with_partitioning(nn.initializers.lecun_normal(), names)
    module = Attention(kernel_init=partition((None, "heads", None)), out_kernel_init=partition(("heads", None, None)))
    boxed = jax.eval_shape(module.init, jax.random.key(0), INPUTS)
    spec = nn.get_partition_spec(boxed)["params"]
    for name in ("query", "gate", "compressed_key", "window_value"):
        assert spec[name]["kernel"] == PartitionSpec(None, "heads", None)
    assert spec["out"]["kernel"] == PartitionSpec("heads", None, None)
    assert spec["key_compression"]["hidden"]["kernel"] == PartitionSpec()


BAD = [
    (dict(num_kv_heads=3), "`num_kv_heads` is 3"),
    (dict(head_dim=7), "`head_dim` is 7"),
    (dict(top_k=1), "`top_k` is 1"),
    (dict(kernel_stride=0), "`kernel_stride` is 0"),
    (dict(block_size=-8), "`block_size` is -8"),
    (dict(window_size=0), "`window_size` is 0"),
    (dict(compression_features=0), "`compression_features` is 0"),
    (dict(rotary_theta=-1.0), "`rotary_theta` is -1.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_argument(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Attention(**change).init, jax.random.key(0), INPUTS)
    with pytest.raises(ValueError, match=message):
        NnxNativeSparseAttention(4, FEATURES, **(OPTIONS | change), rngs=nnx.Rngs(0))


def test_bad_calls():
    module = Attention()
    for inputs, message in ((INPUTS[0], "`inputs` is float32"), (INPUTS.astype(int), "`inputs` is int32")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), inputs)
    with pytest.raises(NotImplementedError, match="mosaic"):
        jax.eval_shape(Attention(implementation="mosaic").init, jax.random.key(0), INPUTS)
