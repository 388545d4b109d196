"""The op under JAX's transformations: jit, grad, vmap, checkpoint, scan and shard_map; and what it compiles to."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sparse_attn_jax as sa
from sparse_attn_jax.testing import compare
from sparse_attn_jax.testing.cases import Case, case_named
from sparse_attn_jax.testing.inputs import DilatedPredicate, make_inputs, random_indices

OPTIONS = dict(is_causal=True, local_window_size=(30, None), num_sinks=2)
COLLECTIVES = r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)\b"

# float32 sums in another order, on results of size 1.
ATOL = 3e-6


def make_operands(batch=2, length=48, num_q_heads=4, num_kv_heads=2, head_dim=16, layers=()):
    rng = np.random.default_rng(batch)
    heads = dict(query=num_q_heads, key=num_kv_heads, value=num_kv_heads)
    return {
        name: jnp.asarray(rng.standard_normal((*layers, batch, length, count, head_dim)), jnp.float32)
        for name, count in heads.items()
    }


def make_selection(batch=2, heads=2, length=48, q_block_size=1, seed=0):
    sizes = dict(batch=batch, heads=heads, q_len=length, kv_len=length, q_block_size=q_block_size, kv_block_size=16)
    indices = random_indices(**sizes, num_slots=2, is_causal=True, seed=seed)
    return sa.BlockSelection(jnp.asarray(indices), q_block_size=q_block_size, kv_block_size=16)


def attend(operands, selection):
    return sa.block_sparse_attention(**operands, selection=selection, **OPTIONS)


def loss(operands, selection):
    """A scalar that out and lse both reach, through something not linear."""
    out, lse = sa.block_sparse_attention(**operands, selection=selection, return_residual=True, **OPTIONS)
    return (out**2).sum() + jnp.sin(lse).sum()


value_and_gradients = jax.value_and_grad(loss)


def assert_trees_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=ATOL, rtol=1e-5)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# --- jit, grad ---


@pytest.mark.parametrize("q_block_size", [1, 16])
def test_jit_gives_what_eager_gives(q_block_size):
    operands, selection = make_operands(), make_selection(q_block_size=q_block_size)
    assert_trees_close(jax.jit(value_and_gradients)(operands, selection), value_and_gradients(operands, selection))


def test_selection_is_an_argument_and_compiles_once():
    traces = []

    @jax.jit
    def call(operands, selection):
        traces.append(selection)
        return attend(operands, selection)

    operands = make_operands()
    outs = [call(operands, make_selection(seed=seed)) for seed in range(3)]
    assert len(traces) == 1 and not np.allclose(outs[0], outs[1])


def test_indices_and_predicates_have_no_gradient():
    operands, selection = make_operands(), make_selection()
    selection = dataclasses.replace(selection, predicate=DilatedPredicate(jnp.arange(4), stride=2))
    gradients, d_selection = jax.grad(loss, argnums=(0, 1), allow_int=True)(operands, selection)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))
    assert {x.dtype for x in jax.tree.leaves(d_selection)} == {jax.dtypes.float0}


def test_plan_is_an_argument_without_gradient():
    operands, selection = make_operands(), make_selection()
    plan = sa.plan_attention(selection, q_len=48, kv_len=48, num_q_heads=4, num_kv_heads=2)
    gradients, d_plan = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(operands, plan)
    assert_trees_close(gradients, jax.grad(loss)(operands, selection))
    assert {x.dtype for x in jax.tree.leaves(d_plan)} == {jax.dtypes.float0}


def test_gradient_of_one_operand_alone():
    operands, selection = make_operands(), make_selection()
    together = jax.grad(loss)(operands, selection)
    for name in operands:
        alone = jax.grad(lambda x, name=name: loss(operands | {name: x}, selection))(operands[name])
        np.testing.assert_allclose(alone, together[name], atol=ATOL)


# --- vmap ---


@functools.cache
def mapped_examples():
    """Three sets of operands, three selections, and the value and gradients of every pair of them."""
    operands = [jax.tree.map(lambda x, factor=factor: x * factor, make_operands()) for factor in (0.5, 1.0, 1.5)]
    selections = [make_selection(seed=seed) for seed in range(3)]
    call = jax.jit(value_and_gradients)
    return operands, selections, [[call(x, selection) for selection in selections] for x in operands]


def test_vmap_over_data():
    operands, selections, expected = mapped_examples()
    mapped = jax.jit(jax.vmap(value_and_gradients, in_axes=(0, None)))(stack(operands), selections[0])
    assert_trees_close(mapped, stack([row[0] for row in expected]))


def test_vmap_over_indices():
    operands, selections, expected = mapped_examples()
    mapped = jax.jit(jax.vmap(value_and_gradients, in_axes=(None, 0)))(operands[1], stack(selections))
    assert_trees_close(mapped, stack(expected[1]))


def test_vmap_over_data_and_indices():
    operands, selections, expected = mapped_examples()
    mapped = jax.jit(jax.vmap(value_and_gradients))(stack(operands), stack(selections))
    assert_trees_close(mapped, stack([expected[i][i] for i in range(3)]))


def test_vmap_of_vmap():
    operands, selections, expected = mapped_examples()
    inner = jax.vmap(attend, in_axes=(None, 0))
    mapped = jax.jit(jax.vmap(inner, in_axes=(0, None)))(stack(operands), stack(selections))
    assert mapped.shape == (3, 3, 2, 48, 4, 16)
    np.testing.assert_allclose(mapped[2, 1], attend(operands[2], selections[1]), atol=ATOL)


def test_grad_of_vmap_sums_over_what_is_shared():
    operands, selections, expected = mapped_examples()
    mapped_loss = lambda x, selections: jax.vmap(loss, in_axes=(None, 0))(x, selections).sum()
    gradients = jax.jit(jax.grad(mapped_loss))(operands[1], stack(selections))
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(gradients for _, gradients in expected[1]))
    assert_trees_close(gradients, summed)


def test_vmap_over_an_inner_axis():
    operands, selection = make_operands(), make_selection()
    moved = {name: jnp.stack([x, 2 * x], axis=2) for name, x in operands.items()}
    mapped = jax.vmap(attend, in_axes=(2, None), out_axes=1)(moved, selection)
    np.testing.assert_allclose(mapped[:, 0], attend(operands, selection), atol=ATOL)


def test_vmap_over_options():
    operands, selection = make_operands(), make_selection()
    call = lambda offset, window: sa.block_sparse_attention(
        **operands, selection=selection, is_causal=True, q_offset=offset, local_window_size=(window, None)
    )
    offsets, windows = jnp.array([0, -7, 3]), jnp.array([[5, 1, 40, 9], [0, 0, 0, 0], [48, 3, 7, 20]])
    mapped = jax.jit(jax.vmap(call))(offsets, windows)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], call(offsets[i], windows[i]), atol=ATOL)


# --- checkpoint, scan ---


@pytest.mark.parametrize("policy", [None, "dots_saveable", "nothing_saveable"])
def test_checkpoint_changes_nothing(policy):
    operands, selection = make_operands(), make_selection()
    policy = policy and getattr(jax.checkpoint_policies, policy)
    remat = jax.checkpoint(loss, policy=policy)
    assert_trees_close(jax.jit(jax.value_and_grad(remat))(operands, selection), value_and_gradients(operands, selection))


@pytest.mark.parametrize("is_rematerialized", [False, True])
@pytest.mark.parametrize("shares_selection", [False, True])
def test_scan_over_layers_equals_a_loop(is_rematerialized, shares_selection):
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 16, 16)), jnp.float32) / 4
    x = make_operands()["query"][:, :, :2]
    selections = [make_selection(seed=0 if shares_selection else layer) for layer in range(3)]

    def layer(x, weights, selection):
        query, key, value = jnp.einsum("bthd,nde->nbthe", x, weights)
        return x + sa.block_sparse_attention(query, key, value, selection, is_causal=True)

    def unrolled(weights, x):
        for w, selection in zip(weights, selections):
            x = layer(x, w, selection)
        return (x**2).sum()

    def scanned(weights, x):
        step = jax.checkpoint(layer) if is_rematerialized else layer
        if shares_selection:
            x, _ = jax.lax.scan(lambda x, w: (step(x, w, selections[0]), None), x, weights)
        else:
            x, _ = jax.lax.scan(lambda x, inputs: (step(x, *inputs), None), x, (weights, stack(selections)))
        return (x**2).sum()

    expected = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1)))(weights, x)
    actual = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(weights, x)
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max() * 10)


# --- shard_map ---


SHARDED = {
    "batch": Case(name="sharded_batch", special="a row per device", batch=8, q_len=40, kv_len=40),
    "heads": Case(name="sharded_heads", special="a KV head per device", num_q_heads=16, num_kv_heads=8, q_len=40, kv_len=40),
    "heads_blocks": Case(name="sharded_blocks", special="lists per block", num_q_heads=16, num_kv_heads=8, q_block_size=16),
}


def sharded_call(inputs, over_heads: bool):
    """out, lse and gradients through a `shard_map` over eight devices, compiled, and its arguments on those devices."""
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec(None, None, "shard") if over_heads else PartitionSpec("shard")
    list_spec = PartitionSpec(None, "shard") if over_heads else PartitionSpec("shard")
    bias_spec = list_spec

    def attend(query, key, value, key_bias, indices):
        selection = dataclasses.replace(inputs.selection, indices=indices)
        return sa.block_sparse_attention(
            query, key, value, selection, key_bias=key_bias, is_causal=True, return_residual=True, implementation="xla"
        )

    specs = (spec, spec, spec, bias_spec, list_spec)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(spec, spec))

    @jax.jit
    def call(query, key, value, key_bias, indices, d_out, d_lse):
        results, pull_back = jax.vjp(lambda *operands: sharded(*operands, indices), query, key, value, key_bias)
        return *results, *pull_back((d_out, d_lse))

    arguments = (*inputs.operands.values(), inputs.selection.indices, inputs.d_out, inputs.d_lse)
    specs = (*specs, spec, spec)
    arguments = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    return call.lower(*arguments).compile(), arguments


@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_needs_no_collective(name):
    assert jax.device_count() == 8
    inputs = make_inputs(dataclasses.replace(SHARDED[name], has_key_bias=True, has_lse_gradient=True))
    compiled, arguments = sharded_call(inputs, over_heads=name != "batch")
    assert re.findall(COLLECTIVES, compiled.as_text()) == []
    results = dict(zip(compare.RESULT_NAMES, compiled(*arguments), strict=True))
    assert all(len(x.sharding.device_set) == 8 for x in results.values())
    compare.assert_results_match(jax.device_get(results), inputs)


def test_shard_map_with_one_selection_for_all_devices():
    """Gradients of sharded operands need no collective although the lists are replicated."""
    inputs = make_inputs(dataclasses.replace(SHARDED["batch"], selection_batch=1))
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("shard")

    def shard(query, key, value):
        return sa.block_sparse_attention(query, key, value, inputs.selection, is_causal=True, return_residual=True)

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(spec, spec, spec), out_specs=(spec, spec))
    operands = jax.device_put(inputs.operands, NamedSharding(mesh, spec))
    cotangents = jax.device_put((inputs.d_out, inputs.d_lse), NamedSharding(mesh, spec))
    run = compare.forward_and_backward(sharded_by_name(sharded))
    compiled = run.lower(operands, *cotangents).compile()
    assert re.findall(COLLECTIVES, compiled.as_text()) == []
    compare.assert_results_match(jax.device_get(compiled(operands, *cotangents)), inputs)


def test_shard_map_over_queries_sums_the_gradient_of_shared_keys():
    """Context parallelism: each device has some of the queries, and all keys."""
    operands, selection = make_operands(batch=1), make_selection(batch=1)
    mesh = jax.make_mesh((4,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    some, every = PartitionSpec(None, "shard"), PartitionSpec()

    def shard(query, key, value, indices):
        lists = dataclasses.replace(selection, indices=indices)
        q_offset = jax.lax.axis_index("shard") * query.shape[1]
        return sa.block_sparse_attention(query, key, value, lists, q_offset=q_offset, **OPTIONS)

    specs = (some, every, every, PartitionSpec(None, None, "shard"))
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=some)

    def sharded_loss(operands):
        query, key, value = (operands[name] for name in ("query", "key", "value"))
        return (sharded(query, key, value, selection.indices) ** 2).sum()

    def whole_loss(operands):
        return (attend(operands, selection) ** 2).sum()

    actual, expected = (jax.jit(jax.value_and_grad(f))(operands) for f in (sharded_loss, whole_loss))
    assert_trees_close(actual, expected)


def sharded_by_name(sharded):
    """`shard_map` takes positional arguments only."""
    return lambda query, key, value: sharded(query, key, value)


def test_collectives_are_noticed():
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("shard")
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "shard"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    assert re.findall(COLLECTIVES, total.lower(jnp.ones(8)).compile().as_text())


# --- what it compiles to ---


def compiled_gradients(length, *, q_block_size=1, function=None, **options):
    """Forward and backward for abstract arguments: 8 query heads, 2 KV heads, 8 blocks of 32 keys per list."""
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    operands = dict(query=array(1, length, 8, 32), key=array(1, length, 2, 32), value=array(1, length, 2, 32))
    indices = array(1, 2, -(-length // q_block_size), 8, dtype=jnp.int32)

    def loss(operands, indices):
        selection = sa.BlockSelection(indices, q_block_size=q_block_size, kv_block_size=32)
        return sa.block_sparse_attention(**operands, selection=selection, **options).sum()

    return jax.jit(jax.value_and_grad(loss if function is None else function)).lower(operands, indices).compile()


def largest_buffer(compiled) -> int:
    """Elements of the largest array in the compiled text."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("q_block_size", [1, 32])
@pytest.mark.parametrize(
    "options", [dict(is_causal=True), dict(local_window_size=(100, 100), num_sinks=4)], ids=["causal", "window"]
)
def test_no_buffer_grows_with_the_square_of_the_length(q_block_size, options):
    length = 8192
    largest = largest_buffer(compiled_gradients(length, q_block_size=q_block_size, **options))
    # The inputs have length * 256 elements; all scores would be length**2 * 8, all gathered keys length * 2 * 8 * 32 * 32.
    assert length * 256 <= largest <= length * 256 * 2


def test_a_square_buffer_is_noticed():
    def dense_loss(operands, indices):
        return jax.nn.dot_product_attention(**operands, is_causal=True, implementation="xla").sum()

    assert largest_buffer(compiled_gradients(1024, function=dense_loss)) >= 1024**2


@pytest.mark.parametrize("q_block_size", [1, 32])
def test_memory_is_linear_in_length(q_block_size):
    lengths = (8192, 16384, 32768)
    temporaries = [
        compiled_gradients(length, q_block_size=q_block_size, is_causal=True).memory_analysis().temp_size_in_bytes
        for length in lengths
    ]
    assert temporaries[0] > 0
    assert temporaries[1] <= 2.1 * temporaries[0] and temporaries[2] <= 2.1 * temporaries[1], temporaries


def test_inputs_of_16_bits_stay_so_in_gradients():
    inputs = make_inputs(case_named("group2_bf16"))
    gradients = jax.grad(lambda operands: attend(operands, inputs.selection).astype(jnp.float32).sum())(inputs.operands)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
