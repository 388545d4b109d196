"""Block-sparse flash attention, backward, as Pallas kernels for Ampere.

They walk what those of `attention_backward` do, and write where they do; dK/dV looks at all masks. A thread block is one
warpgroup.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax import jax_compat
from sparse_attn_jax.implementations.mosaic import ampere_ring, ampere_steps, attention_backward, steps
from sparse_attn_jax.implementations.mosaic.geometry import SLICE_ROWS, Geometry

# What is copied of each slice of query rows; its tables go to registers.
OF_SLICE = ("query", "d_out")
# The sums over rows, of which each warp has some, pass through memory of the compiler.
KEY_PARAMS = plgpu.CompilerParams(approx_math=True)


@dataclasses.dataclass(frozen=True)
class QueryGradientConfig:
    """How the kernel of the queries' gradient is run; see `ampere_forward.ForwardConfig`."""

    stages: int
    interpreted: bool = False


@dataclasses.dataclass(frozen=True)
class KeyGradientConfig:
    """How the kernel of the gradients of keys and values is run.

    Attributes:
      keys: of a thread block.
      stages: slices of query rows that shared memory holds.
      interpreted: the kernel is not compiled, but simulated on a CPU.
    """

    keys: int
    stages: int
    interpreted: bool = False


def choose_query_config(g: Geometry, interpreted: bool = False) -> QueryGradientConfig:
    config = ampere_ring.most_stages(QueryGradientConfig, lambda config: query_memory_of(g, config))
    return dataclasses.replace(config, interpreted=interpreted)


def choose_key_config(g: Geometry, interpreted: bool = False) -> KeyGradientConfig:
    # The sums of head_dim x keys are held in registers, beside what options need.
    has_options = g.logits_soft_cap or g.has_key_bias or g.has_window or g.has_segments
    has_room = max(g.key_columns, g.value_columns) <= 64 and not has_options
    make = functools.partial(KeyGradientConfig, min(g.kv_block_size, 64 if has_room else 32))
    config = ampere_ring.most_stages(make, lambda config: key_memory_of(g, config), KEY_PARAMS.reduction_scratch_bytes)
    return dataclasses.replace(config, interpreted=interpreted)


def _differentiate(g, inputs, is_full, num_partials, interpreted):
    del is_full  # of which the gradients of keys make no loop without masks
    d_query = differentiate_queries(g, choose_query_config(g, interpreted), inputs)
    return d_query, *differentiate_keys(g, choose_key_config(g, interpreted), inputs, num_partials)


BACKWARD = attention_backward.entry_point(_differentiate)
backward = functools.partial(attention_backward.backward, entry=BACKWARD)


def _load_rows_of(g: Geometry, inputs, batch, head, slice_index) -> dict[str, jax.Array]:
    """Tables of the rows of a slice, by name."""
    tables = steps.part_of(inputs["rows"], batch, head).at[slice_index]
    return {name: steps.load_rows(tables.at[i]) for i, name in enumerate(g.row_names)}


def _copy_slice(inputs, memory, batch, head, slice_index, ready) -> None:
    for name in OF_SLICE:
        ampere_steps.start_copy(steps.part_of(inputs[name], batch, head).at[slice_index], memory[name], ready)


# --- queries ---


def differentiate_queries(g: Geometry, config: QueryGradientConfig, inputs: dict[str, jax.Array]) -> jax.Array:
    """As `attention_backward.differentiate_queries`."""

    def query_gradient(inputs, d_query, memory):
        _query_kernel(g, config, inputs, d_query, memory)

    return plgpu.kernel(
        query_gradient,
        out_type=jax.ShapeDtypeStruct((g.batch, g.num_kv_heads, g.num_slices, SLICE_ROWS, g.key_columns), jnp.dtype(g.dtype)),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, g.num_slices),
        scratch_types=dict(memory=query_memory_of(g, config)),
        compiler_params=ampere_steps.COMPILER_PARAMS,
    )(ampere_ring.with_margins(g, inputs))


def query_memory_of(g: Geometry, config: QueryGradientConfig) -> dict:
    """Shared memory of a thread block, by name."""
    rows = lambda columns: steps.smem((SLICE_ROWS, columns), jnp.dtype(g.dtype))
    memory = dict(query=rows(g.key_columns), d_out=rows(g.value_columns))
    if config.interpreted:
        memory["slice_ready"] = plgpu.Barrier(num_arrivals=len(OF_SLICE))
    return memory | ampere_ring.memory(g, config.stages, interpreted=config.interpreted)


def _query_kernel(g, config, inputs, d_query, memory):
    batch, head, place = steps.place_of()
    item = g.num_slices - 1 - place
    ids, words, spans = steps.list_of(g, inputs, batch, head, item // g.slices_per_tile)
    chunks = ampere_ring.chunks(g, config.stages, inputs, memory, batch, head, ids, spans)
    multiply = functools.partial(ampere_steps.product, interpreted=config.interpreted)

    _copy_slice(inputs, memory, batch, head, item, memory.get("slice_ready"))
    chunks.start()
    rows = _load_rows_of(g, inputs, batch, head, item)
    stats = [steps.load_rows(inputs["stats"].at[batch, head, item, i]) for i in range(2)]
    ampere_steps.finish_copies(memory.get("slice_ready"))

    def add_chunk(is_full, step, total):
        slot = chunks.next(step)
        pieces = steps.pieces_of(g, ids, None if is_full else words, spans[0], step)

        def masked(*matrices):
            if is_full:
                return matrices
            columns = ampere_ring.load_columns_of(g, inputs, batch, pieces)
            seen = steps.visible(g, rows, columns, pieces, g.piece_keys)
            return tuple(jnp.where(seen, x, 0.0) for x in matrices)

        key, value = memory["key"].at[slot], memory["value"].at[slot]
        table = steps.part_of(inputs["bias"], batch, head)
        bias = (lambda: ampere_ring.load_of_keys(g, table, pieces)) if g.has_key_bias or not is_full else None
        *_, gradient = steps.gradient_of_logits(g, multiply, memory, lambda: stats, key, value, bias, masked)
        gradient = ampere_steps.to_operand(gradient, g.dtype, interpreted=config.interpreted)
        return ampere_steps.add_product(total, gradient, key, interpreted=config.interpreted)

    total = steps.over_chunks(g, spans, add_chunk, steps.full_matrix((SLICE_ROWS, g.key_columns), 0.0))
    jax_compat.store_to_global(d_query.at[batch, head, item], (total * g.scale).astype(g.dtype))


# --- keys and values ---


def differentiate_keys(
    g: Geometry, config: KeyGradientConfig, inputs: dict[str, jax.Array], num_partials: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """As `attention_backward.differentiate_keys`."""

    def key_gradient(inputs, outputs, memory):
        _key_kernel(g, config, inputs, outputs, memory)

    found = plgpu.kernel(
        key_gradient,
        out_type=attention_backward.key_results(g, config.keys, num_partials),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, inputs["parts"].shape[2] * (g.kv_block_size // config.keys)),
        scratch_types=dict(memory=key_memory_of(g, config)),
        compiler_params=KEY_PARAMS,
    )(inputs)
    return found["whole"], found["partial"]


def key_memory_of(g: Geometry, config: KeyGradientConfig) -> dict:
    """Shared memory of a thread block, by name."""
    dtype, keys, stages = jnp.dtype(g.dtype), config.keys, config.stages
    of_keys = lambda columns: steps.smem((keys, columns), dtype, ampere_ring.swizzle_of(keys, columns))
    rows = lambda columns: steps.smem((stages, SLICE_ROWS, columns), dtype)
    memory = dict(
        key=of_keys(g.key_columns),
        value=of_keys(g.value_columns),
        query=rows(g.key_columns),
        d_out=rows(g.value_columns),
        weights=steps.smem((SLICE_ROWS, keys), dtype, 2 * keys),
    )
    if config.interpreted:
        memory["keys_ready"] = plgpu.Barrier(num_arrivals=2)
        memory["ready"] = plgpu.Barrier(num_arrivals=len(OF_SLICE), num_barriers=stages)
    return memory


def _key_kernel(g, config, inputs, outputs, memory):
    batch, head, item = steps.place_of()
    keys, chunks = config.keys, g.kv_block_size // config.keys
    chunk = lax.rem(item, jnp.int32(chunks))
    part = steps.part_of(inputs["parts"], batch, head).at[item // chunks]
    block, start, stop, place = (part[i] for i in range(4))
    tiles, entries = (steps.part_of(inputs[name], batch, head) for name in ("tiles", "entries"))
    first_key = block * g.kv_block_size + chunk * keys
    num_slices = (stop - start) * g.slices_per_tile
    multiply = functools.partial(ampere_steps.product, interpreted=config.interpreted)
    add_product = functools.partial(ampere_steps.add_product, interpreted=config.interpreted)

    def tile_of(index):
        """Of a slice of the list: its entry, whether there is a tile, and the slice's number."""
        entry = start + index // g.slices_per_tile
        tile = jnp.minimum(tiles[entry], g.num_tiles - 1)
        number = tile * g.slices_per_tile + lax.rem(index, jnp.int32(g.slices_per_tile))
        return entry, tiles[entry] < g.num_tiles, number

    in_slot = lambda slot: {name: memory[name].at[slot] for name in OF_SLICE}

    def copy_slice(index, slot, ready):
        _copy_slice(inputs, in_slot(slot), batch, head, tile_of(index)[-1], ready)

    slices = ampere_ring.Ring(config.stages, memory.get("ready"), num_slices, len(OF_SLICE), copy_slice)

    own_keys = pl.ds(first_key, keys)
    for name in ("key", "value"):
        source = steps.part_of(inputs[name], batch, head).at[own_keys]
        ampere_steps.start_copy(source, memory[name], memory.get("keys_ready"))
    slices.start()
    bias = steps.load_columns(steps.part_of(inputs["bias"], batch, head).at[own_keys])
    tables = steps.part_of(inputs["columns"], batch) if g.column_names else None
    columns = {name: steps.load_columns(tables.at[i, own_keys]) for i, name in enumerate(g.column_names)}
    ampere_steps.finish_copies(memory.get("keys_ready"))

    def add_slice(index, sums):
        entry, exists, slice_index = tile_of(index)
        words = []
        if g.has_membership:
            of_entry = steps.part_of(inputs["entry_words"], batch, head).at[entries[entry]]
            words = [of_entry[i] for i in range(g.num_words)]
        piece = steps.Piece(exists, first_key, words)
        own = in_slot(slices.next(index))
        stats = lambda: [steps.load_rows(inputs["stats"].at[batch, head, slice_index, i]) for i in range(2)]

        def masked(*matrices):
            rows = _load_rows_of(g, inputs, batch, head, slice_index)
            seen = steps.visible(g, rows, columns, [piece], keys) & exists
            return tuple(jnp.where(seen, x, 0.0) for x in matrices)

        found = steps.gradient_of_logits(g, multiply, own, stats, memory["key"], memory["value"], lambda: bias, masked)
        weights, d_logits, d_scores = found
        memory["weights"][...] = weights.astype(g.dtype)
        d_value = add_product(sums["value"], own["d_out"].transpose((1, 0)), memory["weights"])
        memory["weights"][...] = d_scores.astype(g.dtype)
        d_key = add_product(sums["key"], own["query"].transpose((1, 0)), memory["weights"])
        d_bias = dict(bias=sums["bias"] + d_logits.sum(axis=0)) if g.has_key_bias else {}
        return dict(key=d_key, value=d_value) | d_bias

    sums = {name: steps.full_matrix((getattr(g, f"{name}_columns"), keys), 0.0) for name in ("key", "value")}
    if g.has_key_bias:
        sums["bias"] = plgpu.layout_cast(jnp.zeros((keys,), jnp.float32), steps.COLUMN)
    sums = lax.fori_loop(0, num_slices, add_slice, sums)
    sums["key"] *= g.scale
    for name, total in sums.items():
        places = ((batch, head, index * chunks + chunk) for index in (block, place))
        attention_backward.write_sums(outputs, name, place, *places, total)
