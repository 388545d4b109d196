"""Block-sparse flash attention, backward, as Pallas kernels for Hopper.

The gradient of the queries walks the list of each query tile, as the forward does. That of keys and values walks, for each KV
block, the tiles that chose it. Each is written by one thread block: there are no atomics, and the results are deterministic.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax import jax_compat
from sparse_attn_jax.arguments import AXES, attention_arguments
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.mosaic import layout, prepare, ring, steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, Geometry
from sparse_attn_jax.planning import TilePlan, add_inverse
from sparse_attn_jax.problem import Operands, Problem, TokenMask
from sparse_attn_jax.splitting import split_lists

# What a thread block reads of each slice of query rows.
OF_SLICE = ("query", "d_out", "rows", "stats")
# Warpgroups that multiply in the kernel of keys and values.
KEY_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class QueryGradientConfig:
    """How the kernel of the queries' gradient is run; see `ForwardConfig`."""

    warpgroups: int
    stages: int
    interpreted: bool = False


@dataclasses.dataclass(frozen=True)
class KeyGradientConfig:
    """How the kernel of the gradients of keys and values is run.

    Attributes:
      keys: of a thread block.
      stages: slices of query rows that shared memory holds; a multiple of the warpgroups, which have every second each.
      interpreted: the kernel is not compiled, but simulated on a CPU.
    """

    keys: int
    stages: int
    interpreted: bool = False


def choose_query_config(g: Geometry, interpreted: bool = False) -> QueryGradientConfig:
    # Alone, a warpgroup has the registers that sums of more than 128 columns take.
    warpgroups = 1 if g.key_columns > 128 or g.slices_per_tile % 2 else 2
    config = lambda stages: QueryGradientConfig(warpgroups, stages, interpreted)
    return steps.largest(config, range(1, 4), lambda config: query_memory_of(g, config))


def choose_key_config(g: Geometry, interpreted: bool = False) -> KeyGradientConfig:
    # The sums of head_dim x keys are held in registers, beside scores, their gradients, and what options need.
    has_options = g.logits_soft_cap or g.has_key_bias or g.has_window or g.has_segments
    has_room = max(g.key_columns, g.value_columns) <= 128 and not has_options
    keys = min(g.kv_block_size, 64 if has_room else 32)
    config = lambda stages: KeyGradientConfig(keys, stages, interpreted)
    return steps.largest(
        config, range(KEY_WARPGROUPS, 2 * KEY_WARPGROUPS + 1, KEY_WARPGROUPS), lambda config: key_memory_of(g, config)
    )


def _run(differentiate, arrays, outputs, attributes):
    """One device's part of a call."""
    del outputs
    *arrays, d_out, lse, delta, offsets, tiles, slots, first_parts, first_partials = arrays
    g, inputs, is_full = prepare.kernel_inputs(arrays, attributes)
    interpreted, num_partials = attributes["interpreted"], attributes["num_partials"]
    inputs |= prepare.gradient_inputs(g, d_out, lse, delta)
    if g.has_membership:
        inputs["entry_words"] = inputs["words"].reshape(*inputs["words"].shape[:2], -1, g.num_words)
    inputs |= prepare.inverse_inputs(g, offsets, tiles, slots, first_parts, first_partials, num_partials)
    d_query, whole, partial = differentiate(g, inputs, is_full, num_partials, interpreted)
    if num_partials:
        summed = {name: sum_partials(g, x, inputs["ranges"]) for name, x in partial.items()}
        whole = {name: prepare.choose_summed(g, inputs["ranges"], summed[name], x) for name, x in whole.items()}
    d_key, d_value = (prepare.keys_of_chunks(g, whole[name]) for name in ("key", "value"))
    d_bias = (
        whole["bias"].reshape(*whole["bias"].shape[:2], -1)[..., : g.kv_len] if g.has_key_bias else jnp.zeros((0,), jnp.float32)
    )
    return layout.from_slices(g, d_query)[..., : g.head_dim], d_key[..., : g.head_dim], d_value[..., : g.value_head_dim], d_bias


def entry_point(differentiate) -> EntryPoint:
    """Of kernels that differentiate(g, inputs, is_full, num_partials, interpreted), as `_differentiate` does."""
    return EntryPoint(
        functools.partial(_run, differentiate),
        (
            *AXES.values(),
            *("bshf", "bsh", "bsh"),  # d_out, lse, delta
            *("Ppo", "Ppe", "Ppe"),  # the inverse: offsets, tiles, slots
            *("Ppo", "Ppa"),  # the parts of its lists: first_parts, first_partials
        ),
        (Result("d_query", "bshd"), Result("d_key", "btkd"), Result("d_value", "btkf"), Result("d_key_bias", "bkt", "float32")),
    )


def _differentiate(g, inputs, is_full, num_partials, interpreted):
    d_query = differentiate_queries(g, choose_query_config(g, interpreted), inputs)
    inputs = inputs | dict(runs=prepare.full_runs(g, is_full, inputs))
    return d_query, *differentiate_keys(g, choose_key_config(g, interpreted), inputs, num_partials)


BACKWARD = entry_point(_differentiate)


def backward(
    problem: Problem,
    operands: Operands,
    plan: TilePlan,
    mask: TokenMask,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    entry: EntryPoint = BACKWARD,
) -> Operands:
    """Gradients of the operands, each in its operand's shape and dtype, from the results of `forward` and their cotangents."""
    plan = add_inverse(plan)
    parts = split_lists(plan)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    bias = operands.key_bias
    d_query, d_key, d_value, d_bias = entry(
        *attention_arguments(problem, operands, plan, mask),
        d_out.astype(operands.query.dtype),
        lse,
        delta,
        plan.inverse_offsets,
        plan.inverse_tiles,
        plan.inverse_slots,
        parts.first,
        parts.first_partial,
        without=("d_key_bias",) if bias is None else (),
        num_partials=parts.max_partials,
        **prepare.call_attributes(problem, plan),
    )
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return dataclasses.replace(operands, query=d_query, key=d_key, value=d_value, key_bias=d_bias)


# --- queries ---


def differentiate_queries(g: Geometry, config: QueryGradientConfig, inputs: dict[str, jax.Array]) -> jax.Array:
    """The gradient of the query rows: [batch, num_kv_heads, num_slices, 64, key_columns].

    Args:
      g: the call.
      config: how to run it.
      inputs: those of the forward, and those of `prepare.gradient_inputs`.
    """

    def query_gradient(inputs, d_query, memory):
        _query_kernel(g, config, inputs, d_query, memory)

    return plgpu.kernel(
        query_gradient,
        out_type=jax.ShapeDtypeStruct((g.batch, g.num_kv_heads, g.num_slices, SLICE_ROWS, g.key_columns), jnp.dtype(g.dtype)),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, g.num_slices // config.warpgroups),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict(memory=query_memory_of(g, config)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(inputs)


def query_memory_of(g: Geometry, config: QueryGradientConfig) -> dict:
    """Shared memory of a thread block, by name."""
    dtype = jnp.dtype(g.dtype)
    return dict(
        query=steps.smem((config.warpgroups, SLICE_ROWS, g.key_columns), dtype),
        d_out=steps.smem((config.warpgroups, SLICE_ROWS, g.value_columns), dtype),
        rows=plgpu.SMEM((config.warpgroups, len(g.row_names), SLICE_ROWS), jnp.int32),
        stats=plgpu.SMEM((config.warpgroups, 2, SLICE_ROWS), jnp.float32),
        d_scores=steps.smem((config.warpgroups, SLICE_ROWS, CHUNK_KEYS), dtype),
        slice_ready=plgpu.Barrier(num_arrivals=len(OF_SLICE), num_barriers=config.warpgroups),
        **ring.memory(g, config.stages, config.warpgroups),
    )


def _query_kernel(g, config, inputs, d_query, memory):
    batch, head, place = steps.place_of()
    warpgroup = lax.axis_index("warpgroup")
    item = g.num_slices // config.warpgroups - 1 - place
    tile = item // (g.slices_per_tile // config.warpgroups)
    ids, words, spans = steps.list_of(g, inputs, batch, head, tile)

    @pl.when(warpgroup < config.warpgroups)
    def compute():
        steps.take_registers(config.warpgroups)
        slice_index = item * config.warpgroups + warpgroup
        own = {name: memory[name].at[warpgroup] for name in OF_SLICE}
        ready, d_scores = memory["slice_ready"].at[warpgroup], memory["d_scores"].at[warpgroup]
        for name in OF_SLICE:
            plgpu.copy_gmem_to_smem(steps.part_of(inputs[name], batch, head).at[slice_index], own[name], ready)
        plgpu.barrier_wait(ready)
        rows = {name: steps.load_rows(own["rows"].at[i]) for i, name in enumerate(g.row_names)}
        stats = lambda: [steps.load_rows(own["stats"].at[i]) for i in range(2)]

        def add_chunk(is_full, step, total):
            slot = lax.rem(step, jnp.int32(config.stages))
            pieces = [] if is_full else steps.pieces_of(g, ids, words, spans[0], step)

            def masked(*matrices):
                if is_full:
                    return matrices
                columns = {name: steps.load_columns(memory["columns"].at[slot, i]) for i, name in enumerate(g.column_names)}
                seen = steps.visible(g, rows, columns, pieces, g.piece_keys)
                return tuple(jnp.where(seen, x, 0.0) for x in matrices)

            plgpu.barrier_wait(memory["key_ready"].at[slot])
            plgpu.barrier_wait(memory["value_ready"].at[slot])
            key, value = memory["key"].at[slot], memory["value"].at[slot]
            bias = (lambda: steps.load_columns(memory["bias"].at[slot])) if g.has_key_bias or not is_full else None
            *_, gradient = steps.gradient_of_logits(g, steps.product, own, stats, key, value, bias, masked)
            plgpu.barrier_arrive(memory["value_free"].at[slot])
            d_scores[...] = gradient.astype(g.dtype)
            plgpu.commit_smem()
            total = steps.add_product(total, d_scores, key, interpreted=config.interpreted)
            plgpu.barrier_arrive(memory["key_free"].at[slot])
            return total

        total = steps.over_chunks(g, spans, add_chunk, steps.full_matrix((SLICE_ROWS, g.key_columns), 0.0))
        own["query"][...] = (total * g.scale).astype(g.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["query"], d_query.at[batch, head, slice_index])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == config.warpgroups)
    def fetch():
        steps.give_registers(config.warpgroups)
        ring.fetch_chunks(g, config.stages, inputs, memory, batch, head, ids, spans)


# --- keys and values ---


def differentiate_keys(
    g: Geometry, config: KeyGradientConfig, inputs: dict[str, jax.Array], num_partials: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Gradients of keys and values of the blocks whose lists have one part, and the sums of the parts of the others.

    Args:
      g: the call.
      config: how to run it.
      inputs: those of `differentiate_queries`, those of `prepare.inverse_inputs`, and runs, of `prepare.full_runs`.
      num_partials: how many sums there are.

    Returns:
      Two dictionaries with key and value [batch, num_kv_heads, chunks, columns, keys], the chunks those of all KV blocks and of
      all sums; and with bias [batch, num_kv_heads, chunks, keys], float32, if there is one. The first is in the dtype of the
      keys, the second float32. What belongs to the other of the two is not written.
    """
    chunks = g.kv_block_size // config.keys

    def key_gradient(inputs, outputs, memory):
        _key_kernel(g, config, inputs, outputs, memory)

    found = plgpu.kernel(
        key_gradient,
        out_type=key_results(g, config.keys, num_partials),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, inputs["parts"].shape[2] * chunks),
        num_threads=KEY_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(memory=key_memory_of(g, config)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(inputs)
    return found["whole"], found["partial"]


def key_results(g: Geometry, keys: int, num_partials: int) -> dict:
    """Shapes and dtypes of what `differentiate_keys` returns, for chunks of so many keys."""

    def results(count, dtype):
        shape = (g.batch, g.num_kv_heads, max(count, 1) * g.kv_block_size // keys)
        found = {x: jax.ShapeDtypeStruct((*shape, getattr(g, f"{x}_columns"), keys), dtype) for x in ("key", "value")}
        return found | (dict(bias=jax.ShapeDtypeStruct((*shape, keys), jnp.float32)) if g.has_key_bias else {})

    return dict(whole=results(g.num_kv_blocks, jnp.dtype(g.dtype)), partial=results(num_partials, jnp.float32))


def write_sums(outputs, name: str, place, whole_index, partial_index, total: jax.Array) -> None:
    """To the gradient if the list has one part, to the sums of parts else, or nowhere: as `place` says."""

    @pl.when(place == prepare.WHOLE)
    def write_gradient():
        ref = outputs["whole"][name]
        jax_compat.store_to_global(ref.at[whole_index], total.astype(ref.dtype))

    @pl.when(place >= 0)
    def write_partial():
        jax_compat.store_to_global(outputs["partial"][name].at[partial_index], total)


def key_memory_of(g: Geometry, config: KeyGradientConfig) -> dict:
    """Shared memory of a thread block, by name."""
    dtype = jnp.dtype(g.dtype)
    swizzle = 2 * config.keys
    memory = dict(
        key=steps.smem((config.keys, g.key_columns), dtype, swizzle),
        value=steps.smem((config.keys, g.value_columns), dtype, swizzle),
        bias=plgpu.SMEM((config.keys,), jnp.float32),
        query=steps.smem((config.stages, SLICE_ROWS, g.key_columns), dtype, swizzle),
        d_out=steps.smem((config.stages, SLICE_ROWS, g.value_columns), dtype, swizzle),
        rows=plgpu.SMEM((config.stages, len(g.row_names), SLICE_ROWS), jnp.int32),
        stats=plgpu.SMEM((config.stages, 2, SLICE_ROWS), jnp.float32),
        weights=steps.smem((KEY_WARPGROUPS, SLICE_ROWS, config.keys), dtype, swizzle),
        sums=plgpu.SMEM((max(g.key_columns, g.value_columns), config.keys), jnp.float32),
        keys_ready=plgpu.Barrier(num_arrivals=4 if g.column_names else 3),
        slice_ready=plgpu.Barrier(num_arrivals=len(OF_SLICE), num_barriers=config.stages),
        slice_free=plgpu.Barrier(num_barriers=config.stages),
        sums_ready=plgpu.Barrier(),
        sums_free=plgpu.Barrier(),
    )
    if g.column_names:
        memory["columns"] = plgpu.SMEM((len(g.column_names), config.keys), jnp.int32)
    return memory


def _key_kernel(g, config, inputs, outputs, memory):
    batch, head, item = steps.place_of()
    warpgroup = lax.axis_index("warpgroup")
    chunks = g.kv_block_size // config.keys
    chunk = lax.rem(item, jnp.int32(chunks))
    part = steps.part_of(inputs["parts"], batch, head).at[item // chunks]
    run = inputs["runs"].at[batch, head, item // chunks]
    block, start = part[0], part[1]
    # Loaded where they are needed: values that the warpgroups share stay in their registers.
    num_slices = lambda: (part[2] - start) * g.slices_per_tile
    num_full_slices = lambda: (run[1] - run[0]) * g.slices_per_tile
    tiles = steps.part_of(inputs["tiles"], batch, head)
    first_key = block * g.kv_block_size + chunk * config.keys

    def entry_of(index):
        """Of a slice: first come the entries of the full run, then the others, so that each kind is one loop."""
        first_full, end_full = run[0], run[1]
        entry = start + lax.div(index, jnp.int32(g.slices_per_tile))
        edge = entry - (end_full - first_full)
        return jnp.where(edge < start, entry + (first_full - start), jnp.where(edge < first_full, edge, entry))

    @pl.when(warpgroup < KEY_WARPGROUPS)
    def compute():
        steps.take_registers(KEY_WARPGROUPS)
        plgpu.barrier_wait(memory["keys_ready"])
        weights = memory["weights"].at[warpgroup]

        def add_slice(is_full, i, sums):
            index = i * KEY_WARPGROUPS + warpgroup
            slot = lax.rem(index, jnp.int32(config.stages))
            words, exists = [], np.True_
            if not is_full:
                exists = tiles[entry_of(index)] < g.num_tiles
            if g.has_membership and not is_full:
                entry = steps.part_of(inputs["entries"], batch, head)[entry_of(index)]
                of_entry = steps.part_of(inputs["entry_words"], batch, head).at[entry]
                words = [of_entry[i] for i in range(g.num_words)]
            piece = steps.Piece(exists, first_key, words)

            plgpu.barrier_wait(memory["slice_ready"].at[slot])
            own = {name: memory[name].at[slot] for name in OF_SLICE}
            # What is loaded late holds no registers before.
            stats = lambda: [steps.load_rows(own["stats"].at[i]) for i in range(2)]

            def masked(*matrices):
                if is_full:
                    return matrices
                columns = {name: steps.load_columns(memory["columns"].at[i]) for i, name in enumerate(g.column_names)}
                rows = {name: steps.load_rows(own["rows"].at[i]) for i, name in enumerate(g.row_names)}
                seen = steps.visible(g, rows, columns, [piece], config.keys) & exists
                return tuple(jnp.where(seen, x, 0.0) for x in matrices)

            bias = (lambda: steps.load_columns(memory["bias"])) if g.has_key_bias or not is_full else None
            found = steps.gradient_of_logits(g, steps.product, own, stats, memory["key"], memory["value"], bias, masked)
            probs, d_logits, d_scores = found
            weights[...] = probs.astype(g.dtype)
            plgpu.commit_smem()
            d_out, query = (own[name].transpose((1, 0)) for name in ("d_out", "query"))
            d_value = steps.add_product(sums["value"], d_out, weights, interpreted=config.interpreted)
            weights[...] = d_scores.astype(g.dtype)
            plgpu.commit_smem()
            d_key = steps.add_product(sums["key"], query, weights, interpreted=config.interpreted)
            plgpu.barrier_arrive(memory["slice_free"].at[slot])
            d_bias = dict(bias=sums["bias"] + d_logits) if g.has_key_bias else {}
            return dict(key=d_key, value=d_value) | d_bias

        sums = {name: steps.full_matrix((getattr(g, f"{name}_columns"), config.keys), 0.0) for name in ("key", "value")}
        if g.has_key_bias:
            sums["bias"] = steps.full_matrix((SLICE_ROWS, config.keys), 0.0)
        # Of so many slices, those that are this warpgroup's.
        own_slices = lambda count: lax.div(count - warpgroup + KEY_WARPGROUPS - 1, jnp.int32(KEY_WARPGROUPS))
        num_full = own_slices(num_full_slices())
        sums = lax.fori_loop(0, num_full, functools.partial(add_slice, True), sums)
        sums = lax.fori_loop(num_full, own_slices(num_slices()), functools.partial(add_slice, False), sums)
        sums["key"] *= g.scale
        place = part[3]

        for name in sums:
            places = ((batch, head, index * chunks + chunk) for index in (block, place))
            write = functools.partial(write_sums, outputs, name, place, *places)
            # The sum over rows passes through memory of which a thread block has one: one warpgroup sums, at the end.
            finish = (lambda total, write=write: write(total.sum(axis=0))) if name == "bias" else write
            _add_sums(memory, warpgroup, sums[name], finish)

    @pl.when(warpgroup == KEY_WARPGROUPS)
    def fetch():
        steps.give_registers(KEY_WARPGROUPS)
        keys = pl.ds(first_key, config.keys)
        for name in ("key", "value", "bias"):
            plgpu.copy_gmem_to_smem(steps.part_of(inputs[name], batch, head).at[keys], memory[name], memory["keys_ready"])
        if g.column_names:
            columns = steps.part_of(inputs["columns"], batch).at[:, keys]
            plgpu.copy_gmem_to_smem(columns, memory["columns"], memory["keys_ready"])

        @pl.loop(0, num_slices())
        def fetch_slice(index):
            slot = lax.rem(index, jnp.int32(config.stages))
            tile = jnp.minimum(tiles[entry_of(index)], g.num_tiles - 1)
            slice_index = tile * g.slices_per_tile + lax.rem(index, jnp.int32(g.slices_per_tile))

            ring.wait_for_room(memory["slice_free"].at[slot], index, config.stages)
            for name in OF_SLICE:
                source = steps.part_of(inputs[name], batch, head).at[slice_index]
                plgpu.copy_gmem_to_smem(source, memory[name].at[slot], memory["slice_ready"].at[slot])


def _add_sums(memory, warpgroup, own, then) -> None:
    """The second warpgroup gives its sums to the first, which calls `then` with the total."""
    shared = memory["sums"].at[pl.ds(0, own.shape[0])]

    @pl.when(warpgroup == 1)
    def give():
        shared[...] = own
        plgpu.barrier_arrive(memory["sums_ready"])
        plgpu.barrier_wait(memory["sums_free"])

    @pl.when(warpgroup == 0)
    def take():
        plgpu.barrier_wait(memory["sums_ready"])
        total = own + steps.load_matrix(shared)
        plgpu.barrier_arrive(memory["sums_free"])
        then(total)


def sum_partials(g: Geometry, partials: jax.Array, ranges: jax.Array) -> jax.Array:
    """The sums of the parts of each KV block's list: [batch, num_kv_heads, chunks, ...], float32, the chunks of all blocks.

    Args:
      g: the call.
      partials: [batch, num_kv_heads, chunks, columns, keys] or [batch, num_kv_heads, chunks, keys], float32, of all parts.
      ranges: int32 [plan batch, plan heads, num_kv_blocks, 2], the first of a block's partials, and their number.
    """
    shape, keys = partials.shape[3:], partials.shape[-1]
    chunks = g.kv_block_size // keys

    def sum_parts(partials, ranges, total):
        batch, head, item = steps.place_of()
        own = steps.part_of(ranges, batch, head).at[item // chunks]
        first, count = own[0], own[1]
        load = steps.load_matrix if len(shape) == 2 else steps.load_columns
        place = lambda i: partials.at[batch, head, (first + i) * chunks + lax.rem(item, jnp.int32(chunks))]

        @pl.when(count > 0)
        def write():
            found = lax.fori_loop(1, count, lambda i, total: total + load(place(i)), load(place(0)))
            jax_compat.store_to_global(total.at[batch, head, item], found)

    return plgpu.kernel(
        sum_parts,
        out_type=jax.ShapeDtypeStruct((g.batch, g.num_kv_heads, g.num_kv_blocks * chunks, *shape), jnp.float32),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, g.num_kv_blocks * chunks),
    )(partials, ranges)
