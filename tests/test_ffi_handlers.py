"""The custom calls of the CUDA kernels, called directly: what they refuse, and the table of what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.implementations.cuda import library

BATCH, Q_LEN, KV_LEN, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 24, 40, 4, 2, 64
KV_BLOCK_SIZE, TILE_SIZE = 16, 8
NUM_TILES, CAPACITY, NUM_BLOCKS, NUM_PARTIALS = 3, 2, 3, 5
QUERY, KEY = (BATCH, Q_LEN, NUM_Q_HEADS, HEAD_DIM), (BATCH, KV_LEN, NUM_KV_HEADS, HEAD_DIM)
LIST = (BATCH, NUM_KV_HEADS, NUM_TILES, CAPACITY)
INVERSE = (BATCH, NUM_KV_HEADS, NUM_TILES * CAPACITY)

# In the order of the call. Every option is there.
INPUTS = {
    "query": (QUERY, "bfloat16"),
    "key": (KEY, "bfloat16"),
    "value": (KEY, "bfloat16"),
    "key_bias": ((BATCH, NUM_KV_HEADS, KV_LEN), "float32"),
    "blocks": (LIST, "int32"),
    "counts": (LIST[:3], "int32"),
    "membership": ((*LIST, 1), "uint32"),
    "q_positions": ((BATCH, Q_LEN), "int32"),
    "kv_positions": ((BATCH, KV_LEN), "int32"),
    "q_segments": ((BATCH, Q_LEN), "int32"),
    "kv_segments": ((BATCH, KV_LEN), "int32"),
    "window_left": ((BATCH, NUM_Q_HEADS), "int32"),
    "window_right": ((BATCH, NUM_Q_HEADS), "int32"),
    "num_sinks": ((BATCH, NUM_Q_HEADS), "int32"),
}
RESIDUALS = {
    "d_out": (QUERY, "bfloat16"),
    "lse": (QUERY[:3], "float32"),
    "delta": (QUERY[:3], "float32"),
    "inverse_offsets": ((BATCH, NUM_KV_HEADS, NUM_BLOCKS + 1), "int32"),
    "inverse_tiles": (INVERSE, "int32"),
    "inverse_slots": (INVERSE, "int32"),
    "inverse_parts": ((BATCH, NUM_KV_HEADS, NUM_BLOCKS + 1), "int32"),
    "first_partials": ((BATCH, NUM_KV_HEADS, NUM_BLOCKS), "int32"),
}
GRADIENTS = {
    "d_query": (QUERY, "bfloat16"),
    "d_key": (KEY, "bfloat16"),
    "d_value": (KEY, "bfloat16"),
    "d_key_bias": ((BATCH, NUM_KV_HEADS, KV_LEN), "float32"),
    "partials": ((BATCH, NUM_KV_HEADS, NUM_PARTIALS, KV_BLOCK_SIZE, 2 * HEAD_DIM + 2), "float32"),
}
CALLS = {
    library.ATTENTION_FORWARD: (INPUTS, {"out": (QUERY, "bfloat16"), "lse": (QUERY[:3], "float32")}),
    library.ATTENTION_BACKWARD: (INPUTS | RESIDUALS, GRADIENTS),
}
ATTRIBUTES = dict(
    scale=np.float32(0.125),
    logits_soft_cap=np.float32(0),
    kv_block_size=np.int32(KV_BLOCK_SIZE),
    tile_size=np.int32(TILE_SIZE),
    row_group_tokens=np.int32(1),
    row_group_heads=np.int32(2),
    is_causal=False,
    seed=np.int64(0),
    arch=np.int32(80),
)


# Dimensions that may be longer: words of more row groups than there are, and room for more sums.
FREE = {("membership", 4), ("partials", 2)}


@pytest.fixture(autouse=True)
def variants(cuda_on_cpu):
    return library.load("cpu")


def call(target: str, arguments: dict | None = None, results: dict | None = None, **attributes) -> list:
    """Calls with zeros, and each KV block's list in one part; what is not given is as in the sound call."""
    arguments = CALLS[target][0] if arguments is None else arguments
    results = CALLS[target][1] if results is None else results
    shapes = [jax.ShapeDtypeStruct(*result) for result in results.values()]
    arrays = {name: jnp.zeros(*argument) for name, argument in arguments.items()}
    if "inverse_parts" in arrays and arrays["inverse_parts"].ndim:
        arrays["inverse_parts"] += jnp.arange(arrays["inverse_parts"].shape[-1], dtype=arrays["inverse_parts"].dtype)
    return jax.block_until_ready(jax.ffi.ffi_call(target, shapes)(*arrays.values(), **(ATTRIBUTES | attributes)))


def changes_of(name: str, shape: tuple[int, ...], dtype: str) -> dict:
    """Arrays that differ from a sound one in one thing."""
    axes = [i for i in range(len(shape)) if (name, i) not in FREE]
    changed = {f"dimension {i} is longer": ((*shape[:i], shape[i] + 1, *shape[i + 1 :]), dtype) for i in axes}
    changed["a dimension is missing"] = (shape[1:], dtype)
    changed["a dimension too many"] = ((*shape, 1), dtype)
    changed["a scalar"] = ((), dtype)
    changed["another dtype"] = (shape, "int16")
    return changed


@pytest.mark.parametrize("target", CALLS)
def test_sound_call(target):
    """What the other tests change, one thing at a time. Values are 0, and so are results."""
    for (name, (shape, dtype)), result in zip(CALLS[target][1].items(), call(target), strict=True):
        assert result.shape == shape and result.dtype == dtype
        # Nobody reads the sums of parts of blocks that have one.
        assert name in ("lse", "partials") or not np.any(np.asarray(result, np.float32)), name


@pytest.mark.parametrize("target, name", [(target, name) for target in CALLS for name in CALLS[target][0]])
def test_argument_of_wrong_shape_or_dtype(target, name):
    arguments = CALLS[target][0]
    for change, argument in changes_of(name, *arguments[name]).items():
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call(target, arguments | {name: argument})
            pytest.fail(f"{name}: {change}")


@pytest.mark.parametrize("target, name", [(target, name) for target in CALLS for name in CALLS[target][1]])
def test_result_of_wrong_shape_or_dtype(target, name):
    results = CALLS[target][1]
    for change, result in changes_of(name, *results[name]).items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: {name} (has|needs)"):
            call(target, results=results | {name: result})
            pytest.fail(f"{name}: {change}")


@pytest.mark.parametrize("target", CALLS)
def test_wrong_number_of_arguments_or_results(target):
    arguments, results = CALLS[target]
    extra = {"extra": ((1,), "int32")}
    for wrong in ({}, dict(list(arguments.items())[:-1]), arguments | extra):
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{len(wrong)} arguments and .* needed are {len(arguments)}"):
            call(target, arguments=wrong)
    for wrong in (dict(list(results.items())[:-1]), results | extra):
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{len(wrong)} results; needed are .* and {len(results)}\b"):
            call(target, results=wrong)


@pytest.mark.parametrize("target", CALLS)
@pytest.mark.parametrize("name", ["kv_block_size", "tile_size", "row_group_tokens", "row_group_heads"])
def test_attribute_out_of_range(target, name):
    for value in (-(2**31), -1, 0, 7, 2**31 - 1):
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call(target, **{name: np.int32(value)})
            pytest.fail(f"{name}: {value}")


@pytest.mark.parametrize("target", CALLS)
def test_attribute_of_wrong_dtype_or_unknown(target):
    # No value of another test: np.int64(80) == np.int32(80), and JAX would run what it compiled for that.
    for wrong in (dict(scale=np.float64(1)), dict(arch=np.int64(81)), dict(other=np.int32(1))):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Wrong scalar data type|Wrong number of attributes"):
            call(target, **wrong)


@pytest.mark.parametrize("target", CALLS)
def test_dimension_beyond_32_bits(target):
    """An array without elements may have one."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"key has shape \[0, 2147483648, 2, 64\]; .* at most 2147483647"):
        call(target, CALLS[target][0] | {"key": ((0, 2**31, 2, 64), "bfloat16")})


@pytest.mark.parametrize("target", CALLS)
def test_architecture_that_is_not_compiled_in(target):
    with pytest.raises(jax.errors.JaxRuntimeError, match="arch is 70, and kernels are compiled in for 80.*ARCHITECTURES"):
        call(target, arch=np.int32(70))


def array_of_variant(name: str, shape: tuple[int, ...], dtype: str, key: tuple[str, int, int]):
    """An array of the sound call as a call needs it for another dtype, head_dim and kv_block_size."""
    new_dtype, head_dim, kv_block_size = key
    num_blocks = -(-KV_LEN // max(kv_block_size, 1))
    if name in ("inverse_offsets", "inverse_parts", "first_partials"):
        shape = (*shape[:-1], num_blocks + (name != "first_partials"))
    elif name == "partials":
        shape = (*shape[:3], kv_block_size, 2 * head_dim + 2)
    else:
        shape = tuple(head_dim if size == HEAD_DIM else size for size in shape)
    return shape, new_dtype if dtype == "bfloat16" else dtype


def call_variant(target: str, *key, **attributes) -> list:
    arguments, results = ({n: array_of_variant(n, *array, key) for n, array in arrays.items()} for arrays in CALLS[target])
    return call(target, arguments, results, kv_block_size=np.int32(key[2]), **attributes)


@pytest.mark.parametrize("target", CALLS)
def test_every_variant_of_the_table_runs(variants, target):
    keys = [(variant.arch, variant.dtype, variant.head_dim) for variant in variants if variant.kernel == "attention"]
    assert len(set(keys)) == len(keys)
    assert set(keys) >= {(80, dtype, head_dim) for dtype in ("bfloat16", "float16") for head_dim in (64, 96, 128, 256)}
    for variant, (arch, dtype, head_dim) in zip(variants, keys):
        assert variant.kv_block_sizes == (16, 32, 64, 128)
        for kv_block_size in variant.kv_block_sizes:
            call_variant(target, dtype, head_dim, kv_block_size, arch=np.int32(arch))


@pytest.mark.parametrize("target", CALLS)
@pytest.mark.parametrize("key", [("bfloat16", 72, 16), ("bfloat16", 64, 24), ("float32", 64, 16), ("float16", 0, 16)])
def test_variant_that_is_not_in_the_table(target, key):
    with pytest.raises(jax.errors.JaxRuntimeError, match="head_dim|kv_block_size|query must be"):
        call_variant(target, *key)
