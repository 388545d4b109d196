"""The custom calls of the CUDA kernels, called directly: what they refuse, and the table of what is compiled."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.implementations.cuda import library

pytestmark = pytest.mark.kernels

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
    "out": (QUERY, "bfloat16"),
    "d_out": (QUERY, "bfloat16"),
    "lse": (QUERY[:3], "float32"),
    "d_lse": (QUERY[:3], "float32"),
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
    "delta": (QUERY[:3], "float32"),
    "partials": ((BATCH, NUM_KV_HEADS, NUM_PARTIALS, KV_BLOCK_SIZE, 2 * HEAD_DIM + 2), "float32"),
}
SCRATCH = {"num_taken": ((BATCH, NUM_KV_HEADS), "int32")}
CALLS = {
    library.ATTENTION_FORWARD: (INPUTS, {"out": (QUERY, "bfloat16"), "lse": (QUERY[:3], "float32")} | SCRATCH),
    library.ATTENTION_BACKWARD: (INPUTS | RESIDUALS, GRADIENTS | SCRATCH),
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


@pytest.fixture(autouse=True)
def variants(cuda_on_cpu) -> tuple[library.Variant, ...]:
    """What is compiled, for the simulator or for JAX's GPU; registers the calls."""
    return library.load(jax.default_backend())


def call(target: str, arguments: dict | None = None, results: dict | None = None, **attributes) -> list:
    """Calls with zeros, and with the sound call's arguments, results and attributes where none are given.

    Each KV block's list has one part.
    """
    arguments = CALLS[target][0] if arguments is None else arguments
    results = CALLS[target][1] if results is None else results
    shapes = [jax.ShapeDtypeStruct(*result) for result in results.values()]
    arrays = {name: jnp.zeros(*argument) for name, argument in arguments.items()}
    if arrays.get("inverse_parts", jnp.zeros(())).ndim > 0:
        arrays["inverse_parts"] += jnp.arange(arrays["inverse_parts"].shape[-1], dtype=arrays["inverse_parts"].dtype)
    return jax.block_until_ready(jax.ffi.ffi_call(target, shapes)(*arrays.values(), **(ATTRIBUTES | attributes)))


def changes_of(shape: tuple[int, ...], dtype: str) -> dict:
    """Arrays that differ from a sound one in one thing."""
    changed = {f"dimension {i} is longer": ((*shape[:i], shape[i] + 1, *shape[i + 1 :]), dtype) for i in range(len(shape))}
    changed["a dimension is missing"] = (shape[1:], dtype)
    changed["a dimension too many"] = ((*shape, 1), dtype)
    changed["a scalar"] = ((), dtype)
    changed["another dtype"] = (shape, "int16")
    return changed


@pytest.mark.parametrize("target", CALLS)
def test_sound_call(target):
    """What the other tests change, one thing at a time. Values are 0, and so are all results but the lse."""
    for (name, (shape, dtype)), result in zip(CALLS[target][1].items(), call(target), strict=True):
        assert result.shape == shape and result.dtype == dtype
        assert name in ("lse", "partials", *SCRATCH) or not np.any(np.asarray(result, np.float32)), name


@pytest.mark.parametrize("target, name", [(target, name) for target in CALLS for name in CALLS[target][0]])
def test_argument_of_wrong_shape_or_dtype(target, name):
    arguments = CALLS[target][0]
    changes = changes_of(*arguments[name])
    if name == "membership":
        changes.pop("dimension 4 is longer")  # more words than there are row groups
    for change, argument in changes.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call(target, arguments | {name: argument})
            pytest.fail(f"{name}: {change}")


@pytest.mark.parametrize("target, name", [(target, name) for target in CALLS for name in CALLS[target][1]])
def test_result_of_wrong_shape_or_dtype(target, name):
    results = CALLS[target][1]
    changes = changes_of(*results[name])
    if name == "partials":
        changes.pop("dimension 2 is longer")  # room for more
    for change, result in changes.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: {name} has"):
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


def with_variant(arrays: dict, head_dim: int, dtype: str, kv_block_size: int) -> dict:
    """The arrays of a sound call for another head_dim, dtype and size of KV blocks."""
    num_blocks = -(-KV_LEN // kv_block_size)

    def changed(name: str, shape: tuple[int, ...], old_dtype: str):
        if name in ("inverse_offsets", "inverse_parts"):
            return (*shape[:-1], num_blocks + 1), old_dtype
        if name == "first_partials":
            return (*shape[:-1], num_blocks), old_dtype
        if name == "partials":
            return (*shape[:-2], kv_block_size, 2 * head_dim + 2), old_dtype
        return tuple(head_dim if size == HEAD_DIM else size for size in shape), dtype if old_dtype == "bfloat16" else old_dtype

    return {name: changed(name, *array) for name, array in arrays.items()}


def call_variant(target: str, dtype: str, head_dim: int, kv_block_size: int, **attributes) -> list:
    arguments, results = (with_variant(x, head_dim, dtype, kv_block_size) for x in CALLS[target])
    return call(target, arguments, results, kv_block_size=np.int32(kv_block_size), **attributes)


@pytest.mark.parametrize("target", CALLS)
def test_every_variant_of_the_table_runs(variants, target):
    variants = [variant for variant in variants if variant.kernel == "attention"]
    keys = [(variant.arch, variant.dtype, variant.head_dim) for variant in variants]
    assert sorted(keys) == sorted(itertools.product((80, 90), ("bfloat16", "float16"), (64, 96, 128, 256)))
    for variant, (arch, dtype, head_dim) in zip(variants, keys):
        assert variant.kv_block_sizes == (16, 32, 64, 128)
        for kv_block_size in variant.kv_block_sizes:
            call_variant(target, dtype, head_dim, kv_block_size, arch=np.int32(arch))


@pytest.mark.parametrize("target", CALLS)
@pytest.mark.parametrize("variant", [("bfloat16", 72, 16), ("bfloat16", 64, 24), ("float32", 64, 16), ("float16", 0, 16)])
def test_variant_that_is_not_in_the_table(target, variant):
    with pytest.raises(jax.errors.JaxRuntimeError, match="head_dim|kv_block_size|query must be"):
        call_variant(target, *variant)
