"""Block-sparse flash attention, forward, as a Pallas kernel for Ampere.

The structure is FlashAttention-2's: a thread block is one warpgroup with a slice of 64 rows. It multiplies one chunk of keys and
values while the next is copied into shared memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax import jax_compat
from sparse_attn_jax.arguments import AXES, attention_arguments
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.mosaic import ampere_steps, layout, prepare, steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, SWIZZLE_COLUMNS, Geometry
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask

# Chunks that shared memory holds: one to multiply, one that is copied.
STAGES = 2


def _run(arrays, outputs, attributes):
    """One device's part of a call."""
    del outputs
    g, inputs = prepare.kernel_inputs(arrays, attributes)
    out, lse = attend_slices(g, inputs, interpreted=attributes["interpreted"])
    return layout.from_slices(g, out)[..., : g.value_head_dim], layout.from_slices(g, lse)


FORWARD = EntryPoint(_run, tuple(AXES.values()), (Result("out", "bshf"), Result("lse", "bsh", "float32")))


def forward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, jax.Array]:
    """As `attention_forward.forward`."""
    attributes = prepare.call_attributes(problem, plan)
    return FORWARD(*attention_arguments(problem, operands, plan, mask), **attributes)


def attend_slices(g: Geometry, inputs: dict[str, jax.Array], *, interpreted: bool) -> tuple[jax.Array, jax.Array]:
    """As `attention_forward.attend_slices`."""

    def attention_forward(inputs, outputs, memory):
        _kernel(g, inputs, outputs, memory, interpreted)

    slices = (g.batch, g.num_kv_heads, g.num_slices, SLICE_ROWS)
    results = plgpu.kernel(
        attention_forward,
        out_type=dict(
            out=jax.ShapeDtypeStruct((*slices, g.value_columns), jnp.dtype(g.dtype)),
            lse=jax.ShapeDtypeStruct(slices, jnp.float32),
        ),
        grid=(g.num_slices, g.num_kv_heads, g.batch),
        grid_names=("item", "head", "batch"),
        scratch_types=dict(memory=memory_of(g, interpreted)),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(with_margins(g, inputs))
    return results["out"], results["lse"]


def memory_of(g: Geometry, interpreted: bool) -> dict:
    """Shared memory of a thread block, by name."""
    keys = lambda columns: steps.smem((STAGES, CHUNK_KEYS, columns), jnp.dtype(g.dtype), swizzle_of(g, columns))
    query = steps.smem((SLICE_ROWS, g.key_columns), jnp.dtype(g.dtype))
    memory = dict(query=query, key=keys(g.key_columns), value=keys(g.value_columns))
    if interpreted:
        memory["query_ready"] = plgpu.Barrier(num_arrivals=1)
        memory["ready"] = plgpu.Barrier(num_arrivals=2 * g.blocks_per_chunk, num_barriers=STAGES)
    return memory


def swizzle_of(g: Geometry, columns: int) -> int:
    """In bytes: so wide that a piece has boxes of 8 keys for each of the four warps that copy it."""
    boxes = g.piece_keys // 8 * (columns // SWIZZLE_COLUMNS)
    return 64 if boxes % 4 else 128


def with_margins(g: Geometry, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Tables of keys with so many entries more at both ends that `load_of_keys` may read beyond them."""
    margin = CHUNK_KEYS - g.piece_keys
    last = {"bias": margin + g.kv_block_size, "columns": margin}  # the block that does not exist, if columns have none yet
    pad = lambda x, end: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(margin, end)])
    return inputs | {name: pad(inputs[name], end) for name, end in last.items() if name in inputs}


def load_of_keys(g: Geometry, ref, pieces: list[steps.Piece]) -> jax.Array:
    """A value per key of a chunk: the table as it lies around each piece, of which the piece's own keys count."""
    margin = CHUNK_KEYS - g.piece_keys
    parts = [
        steps.load_columns(ref.at[pl.ds(p.first_key + (margin - i * g.piece_keys), CHUNK_KEYS)]) for i, p in enumerate(pieces)
    ]
    if len(parts) == 1:
        return parts[0]
    piece = plgpu.broadcasted_iota(jnp.int32, (CHUNK_KEYS,), 0, layout=steps.COLUMN) // g.piece_keys
    return functools.reduce(lambda x, i: jnp.where(piece == i, parts[i], x), range(1, len(parts)), parts[0])


def _kernel(g, inputs, outputs, memory, interpreted):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # The last tiles are the longest under causality, and start first.
    item = g.num_slices - 1 - lax.axis_index("item")
    ids, words, spans = steps.list_of(g, inputs, batch, head, item // g.slices_per_tile)
    key, value, bias = (steps.part_of(inputs[name], batch, head) for name in ("key", "value", "bias"))
    copy = functools.partial(ampere_steps.start_copy, interpreted=interpreted)
    finish_copies = functools.partial(ampere_steps.finish_copies, interpreted=interpreted)
    add_product = functools.partial(ampere_steps.add_product, interpreted=interpreted)
    num_steps = spans[1] * g.chunks_per_block

    def fetch(step):
        @pl.when(step < num_steps)
        def fetch_chunk():
            slot = lax.rem(step, jnp.int32(STAGES))
            ready = memory["ready"].at[slot] if interpreted else None
            for i, piece in enumerate(steps.pieces_of(g, ids, None, spans[0], step)):
                place = pl.ds(i * g.piece_keys, g.piece_keys)
                # Instead of keys that do not exist, others that do, which nobody sees there.
                keys = pl.ds(jnp.minimum(piece.first_key, g.padded_kv_len - g.piece_keys), g.piece_keys)
                copy(key.at[keys], memory["key"].at[slot, place], ready)
                copy(value.at[keys], memory["value"].at[slot, place], ready)

    query_ready = memory["query_ready"] if interpreted else None
    copy(inputs["query"].at[batch, head, item], memory["query"], query_ready)
    fetch(jnp.int32(0))
    tables = steps.part_of(inputs["rows"], batch, head).at[item]
    rows = {name: steps.load_rows(tables.at[i]) for i, name in enumerate(g.row_names)}
    finish_copies(query_ready)

    def attend_chunk(is_full, step, carry):
        row_max, row_sum, acc = carry
        slot = lax.rem(step, jnp.int32(STAGES))
        finish_copies(memory["ready"].at[slot] if interpreted else None)
        fetch(step + 1)

        zeros = steps.full_matrix((SLICE_ROWS, CHUNK_KEYS), 0.0)
        query = ampere_steps.load_operand(memory["query"], interpreted=interpreted)
        scores = add_product(zeros, query, memory["key"].at[slot].transpose((1, 0)))
        logits, _ = steps.logits_of(g, scores)
        pieces = [] if is_full and not g.has_key_bias else steps.pieces_of(g, ids, None if is_full else words, spans[0], step)
        if pieces:
            logits += steps.over_rows(load_of_keys(g, bias, pieces))
        if not is_full:
            table = steps.part_of(inputs["columns"], batch) if g.column_names else None
            columns = {name: load_of_keys(g, table.at[i], pieces) for i, name in enumerate(g.column_names)}
            logits = jnp.where(steps.visible(g, rows, columns, pieces, g.piece_keys), logits, -jnp.inf)

        new_max = jnp.maximum(row_max, logits.max(axis=1))
        shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)
        weights = jnp.exp2(logits - steps.over_columns(shift, CHUNK_KEYS))
        rescale = jnp.exp2(row_max - shift)
        row_sum = row_sum * rescale + weights.sum(axis=1)
        acc *= steps.over_columns(rescale, g.value_columns)
        weights = ampere_steps.to_operand(weights, g.dtype, interpreted=interpreted)
        return new_max, row_sum, add_product(acc, weights, memory["value"].at[slot])

    carry = steps.full_rows(-jnp.inf), steps.full_rows(0.0), steps.full_matrix((SLICE_ROWS, g.value_columns), 0.0)
    row_max, row_sum, acc = steps.over_chunks(g, spans, attend_chunk, carry)

    safe_sum = jnp.where(row_sum == 0.0, 1.0, row_sum)
    out = (acc / steps.over_columns(safe_sum, g.value_columns)).astype(g.dtype)
    jax_compat.store_to_global(outputs["out"].at[batch, head, item], out)
    jax_compat.store_to_global(outputs["lse"].at[batch, head, item], row_max * math.log(2) + jnp.log(row_sum))
