"""Block-sparse flash attention, forward, as a Pallas kernel for Ampere.

The structure is FlashAttention-2's: a thread block is one warpgroup with a slice of 64 rows. It multiplies one chunk of keys
and values while the next are copied into shared memory.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax import jax_compat
from sparse_attn_jax.arguments import AXES, attention_arguments
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.mosaic import ampere_ring, ampere_steps, layout, prepare, steps
from sparse_attn_jax.implementations.mosaic.attention_forward import results_of
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, Geometry
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the kernel is run.

    Attributes:
      stages: chunks of keys and values that shared memory holds.
      interpreted: the kernel is not compiled, but simulated on a CPU.
    """

    stages: int
    interpreted: bool = False


def choose_config(g: Geometry, interpreted: bool = False) -> ForwardConfig:
    config = ampere_ring.most_stages(ForwardConfig, lambda config: memory_of(g, config))
    return dataclasses.replace(config, interpreted=interpreted)


def _run(arrays, outputs, attributes):
    """One device's part of a call."""
    del outputs
    g, inputs, _ = prepare.kernel_inputs(arrays, attributes)
    out, lse = attend_slices(g, choose_config(g, attributes["interpreted"]), inputs)
    return layout.from_slices(g, out)[..., : g.value_head_dim], layout.from_slices(g, lse)


FORWARD = EntryPoint(_run, tuple(AXES.values()), (Result("out", "bshf"), Result("lse", "bsh", "float32")))


def forward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, jax.Array]:
    """As `attention_forward.forward`."""
    attributes = prepare.call_attributes(problem, plan)
    return FORWARD(*attention_arguments(problem, operands, plan, mask), **attributes)


def attend_slices(g: Geometry, config: ForwardConfig, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """As `attention_forward.attend_slices`."""

    def attention_forward(inputs, outputs, memory):
        _kernel(g, config, inputs, outputs, memory)

    results = plgpu.kernel(
        attention_forward,
        out_type=results_of(g),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, g.num_slices),
        scratch_types=dict(memory=memory_of(g, config)),
        compiler_params=ampere_steps.COMPILER_PARAMS,
    )(ampere_ring.with_margins(g, inputs))
    return results["out"], results["lse"]


def memory_of(g: Geometry, config: ForwardConfig) -> dict:
    """Shared memory of a thread block, by name."""
    memory = dict(query=steps.smem((SLICE_ROWS, g.key_columns), jnp.dtype(g.dtype)))
    if config.interpreted:
        memory["query_ready"] = plgpu.Barrier()
    return memory | ampere_ring.memory(g, config.stages, interpreted=config.interpreted)


def _kernel(g, config, inputs, outputs, memory):
    batch, head, place = steps.place_of()
    # The last tiles are the longest under causality, and start first.
    item = g.num_slices - 1 - place
    ids, words, spans = steps.list_of(g, inputs, batch, head, item // g.slices_per_tile)
    chunks = ampere_ring.chunks(g, config.stages, inputs, memory, batch, head, ids, spans)
    multiply = functools.partial(ampere_steps.product, interpreted=config.interpreted)
    add_product = functools.partial(ampere_steps.add_product, interpreted=config.interpreted)

    ampere_steps.start_copy(inputs["query"].at[batch, head, item], memory["query"], memory.get("query_ready"))
    chunks.start()
    tables = steps.part_of(inputs["rows"], batch, head).at[item]
    rows = {name: steps.load_rows(tables.at[i]) for i, name in enumerate(g.row_names)}
    # The first chunk comes after it; but a list may be empty, and nothing is under way when a thread block ends.
    ampere_steps.finish_copies(memory.get("query_ready"))

    def attend_chunk(is_full, step, carry):
        row_max, row_sum, acc = carry
        slot = chunks.next(step)

        scores = multiply(memory["query"], memory["key"].at[slot].transpose((1, 0)), (SLICE_ROWS, CHUNK_KEYS))
        logits, _ = steps.logits_of(g, scores)
        pieces = steps.pieces_of(g, ids, None if is_full else words, spans[0], step)
        if g.has_key_bias or not is_full:
            bias = steps.part_of(inputs["bias"], batch, head)
            logits += steps.over_rows(ampere_ring.load_of_keys(g, bias, pieces))
        if not is_full:
            columns = ampere_ring.load_columns_of(g, inputs, batch, pieces)
            logits = jnp.where(steps.visible(g, rows, columns, pieces, g.piece_keys), logits, -jnp.inf)

        new_max = jnp.maximum(row_max, logits.max(axis=1))
        shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)
        weights = jnp.exp2(logits - steps.over_columns(shift, CHUNK_KEYS))
        rescale = jnp.exp2(row_max - shift)
        row_sum = row_sum * rescale + weights.sum(axis=1)
        acc *= steps.over_columns(rescale, g.value_columns)
        weights = ampere_steps.to_operand(weights, g.dtype, interpreted=config.interpreted)
        acc = add_product(acc, weights, memory["value"].at[slot])
        return new_max, row_sum, acc

    carry = steps.full_rows(-jnp.inf), steps.full_rows(0.0), steps.full_matrix((SLICE_ROWS, g.value_columns), 0.0)
    row_max, row_sum, acc = steps.over_chunks(g, spans, attend_chunk, carry)

    safe_sum = jnp.where(row_sum == 0.0, 1.0, row_sum)
    out = (acc / steps.over_columns(safe_sum, g.value_columns)).astype(g.dtype)
    jax_compat.store_to_global(outputs["out"].at[batch, head, item], out)
    jax_compat.store_to_global(outputs["lse"].at[batch, head, item], row_max * math.log(2) + jnp.log(row_sum))
