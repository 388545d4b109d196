"""Block-sparse flash attention, forward, as a Pallas kernel for Hopper.

From FlashAttention-3 it has the split of warpgroups: one brings keys and values into a ring in shared memory, the others
multiply. One's softmax may run beside the other's products; nothing orders them, and each waits for its own products.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.arguments import AXES, attention_arguments
from sparse_attn_jax.entry_point import EntryPoint, Result
from sparse_attn_jax.implementations.mosaic import layout, prepare, ring, steps
from sparse_attn_jax.implementations.mosaic.geometry import CHUNK_KEYS, SLICE_ROWS, Geometry
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the kernel is run.

    Attributes:
      warpgroups: that multiply, with a slice of the same tile each; the slices of a tile are a multiple.
      stages: chunks of keys, and of values, that shared memory holds.
      interpreted: the kernel is not compiled, but simulated on a CPU.
    """

    warpgroups: int
    stages: int
    interpreted: bool = False


def choose_config(g: Geometry, interpreted: bool = False) -> ForwardConfig:
    config = lambda stages: ForwardConfig(1 if g.slices_per_tile % 2 else 2, stages, interpreted)
    return steps.largest(config, range(1, 4), lambda config: memory_of(g, config))


def _run(arrays, outputs, attributes):
    """One device's part of a call."""
    del outputs
    g, inputs, _ = prepare.kernel_inputs(arrays, attributes)
    out, lse = attend_slices(g, choose_config(g, attributes["interpreted"]), inputs)
    return layout.from_slices(g, out)[..., : g.value_head_dim], layout.from_slices(g, lse)


FORWARD = EntryPoint(_run, tuple(AXES.values()), (Result("out", "bshf"), Result("lse", "bsh", "float32")))


def forward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the visible keys of its selected blocks.

    Returns:
      out [batch, q_len, num_q_heads, value_head_dim] in the query's dtype, and the natural-log lse [batch, q_len, num_q_heads],
      float32. A row that sees nothing has out 0 and lse -inf.
    """
    attributes = prepare.call_attributes(problem, plan)
    return FORWARD(*attention_arguments(problem, operands, plan, mask), **attributes)


def results_of(g: Geometry) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes: `attend_slices` returns it."""
    slices = (g.batch, g.num_kv_heads, g.num_slices, SLICE_ROWS)
    out = jax.ShapeDtypeStruct((*slices, g.value_columns), jnp.dtype(g.dtype))
    return dict(out=out, lse=jax.ShapeDtypeStruct(slices, jnp.float32))


def attend_slices(g: Geometry, config: ForwardConfig, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """out [batch, num_kv_heads, num_slices, 64, value_columns] and lse [batch, num_kv_heads, num_slices, 64], float32.

    Args:
      g: the call.
      config: how to run it.
      inputs: arrays as `layout` makes them: query, key, value, bias, rows, ids, spans; columns and words if there are any.
    """

    def attention_forward(inputs, outputs, memory):
        _kernel(g, config, inputs, outputs, memory)

    results = plgpu.kernel(
        attention_forward,
        out_type=results_of(g),
        **steps.blocks_of_grid(g.batch, g.num_kv_heads, g.num_slices // config.warpgroups),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict(memory=memory_of(g, config)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(inputs)
    return results["out"], results["lse"]


def memory_of(g: Geometry, config: ForwardConfig) -> dict:
    """Shared memory of a thread block, by name."""
    dtype = jnp.dtype(g.dtype)
    memory = dict(
        query=steps.smem((config.warpgroups, SLICE_ROWS, g.key_columns), dtype),
        rows=plgpu.SMEM((config.warpgroups, len(g.row_names), SLICE_ROWS), jnp.int32),
        lse=plgpu.SMEM((config.warpgroups, SLICE_ROWS), jnp.float32),
        query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.warpgroups),
        **ring.memory(g, config.stages, config.warpgroups),
    )
    if g.value_columns != g.key_columns:
        memory["out"] = steps.smem((config.warpgroups, SLICE_ROWS, g.value_columns), dtype)
    if config.interpreted:
        memory["probs"] = steps.smem((config.warpgroups, SLICE_ROWS, CHUNK_KEYS), dtype)
    return memory


def _kernel(g, config, inputs, outputs, memory):
    batch, head, place = steps.place_of()
    warpgroup = lax.axis_index("warpgroup")
    # The last tiles are the longest under causality, and start first.
    item = g.num_slices // config.warpgroups - 1 - place
    tile = item // (g.slices_per_tile // config.warpgroups)
    ids, words, spans = steps.list_of(g, inputs, batch, head, tile)

    @pl.when(warpgroup < config.warpgroups)
    def compute():
        steps.take_registers(config.warpgroups)
        slice_index = item * config.warpgroups + warpgroup
        own = {name: memory[name].at[warpgroup] for name in ("query", "rows", "lse", "query_ready")}
        # The query has been read when the output is written.
        own["out"] = memory["out"].at[warpgroup] if "out" in memory else own["query"]
        probs = memory["probs"].at[warpgroup] if config.interpreted else None
        plgpu.copy_gmem_to_smem(inputs["query"].at[batch, head, slice_index], own["query"], own["query_ready"])
        rows_of_slice = steps.part_of(inputs["rows"], batch, head).at[slice_index]
        plgpu.copy_gmem_to_smem(rows_of_slice, own["rows"], own["query_ready"])
        plgpu.barrier_wait(own["query_ready"])
        rows = {name: steps.load_rows(own["rows"].at[i]) for i, name in enumerate(g.row_names)}

        def attend_chunk(is_full, step, carry):
            row_max, row_sum, acc = carry
            slot = lax.rem(step, jnp.int32(config.stages))
            # Read before the product and used after it.
            pieces = [] if is_full else steps.pieces_of(g, ids, words, spans[0], step)
            plgpu.barrier_wait(memory["key_ready"].at[slot])
            scores = steps.product(own["query"], memory["key"].at[slot].transpose((1, 0)), (SLICE_ROWS, CHUNK_KEYS))
            logits, _ = steps.logits_of(g, scores)
            reads_tables = g.has_key_bias or not is_full
            if reads_tables:  # the bias is NaN for keys that have something that is no number, even where it is no option
                logits += steps.over_rows(steps.load_columns(memory["bias"].at[slot]))
            if not is_full:
                columns = {name: steps.load_columns(memory["columns"].at[slot, i]) for i, name in enumerate(g.column_names)}
                logits = jnp.where(steps.visible(g, rows, columns, pieces, g.piece_keys), logits, -jnp.inf)
            if reads_tables:
                plgpu.commit_smem()  # the copy that overwrites what was loaded comes after
            plgpu.barrier_arrive(memory["key_free"].at[slot])

            new_max = jnp.maximum(row_max, logits.max(axis=1))
            shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)
            weights = jnp.exp2(logits - steps.over_columns(shift, CHUNK_KEYS))
            rescale = jnp.exp2(row_max - shift)
            row_sum = row_sum * rescale + weights.sum(axis=1)
            acc *= steps.over_columns(rescale, g.value_columns)
            weights = weights.astype(g.dtype)
            if config.interpreted:  # the interpreter takes operands from shared memory only
                probs[...] = weights
                plgpu.commit_smem()
                weights = probs

            plgpu.barrier_wait(memory["value_ready"].at[slot])
            acc = steps.add_product(acc, weights, memory["value"].at[slot], interpreted=config.interpreted)
            plgpu.barrier_arrive(memory["value_free"].at[slot])
            return new_max, row_sum, acc

        carry = steps.full_rows(-jnp.inf), steps.full_rows(0.0), steps.full_matrix((SLICE_ROWS, g.value_columns), 0.0)
        row_max, row_sum, acc = steps.over_chunks(g, spans, attend_chunk, carry)

        safe_sum = jnp.where(row_sum == 0.0, 1.0, row_sum)
        own["out"][...] = (acc / steps.over_columns(safe_sum, g.value_columns)).astype(g.dtype)
        own["lse"][...] = row_max * math.log(2) + jnp.log(row_sum)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["out"], outputs["out"].at[batch, head, slice_index])
        plgpu.copy_smem_to_gmem(own["lse"], outputs["lse"].at[batch, head, slice_index])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == config.warpgroups)
    def fetch():
        steps.give_registers(config.warpgroups)
        ring.fetch_chunks(g, config.stages, inputs, memory, batch, head, ids, spans)
