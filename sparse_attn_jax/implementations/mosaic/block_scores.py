"""Scores of blocks, for Hopper: products with units, softmax, reduction over heads and pooling in one Pallas kernel.

Columns of a product are queries, and its rows units of different blocks. So the heads of a token are reduced by adding slices
of registers, and the units of a block by going on with the next product: no score of a unit leaves a thread.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_attn_jax.implementations.mosaic import ring, steps
from sparse_attn_jax.implementations.mosaic.geometry import SLICE_ROWS
from sparse_attn_jax.implementations.mosaic.scoring_layout import COLUMNS, FIRST, LAST, SHARED, STEP_UNITS, ScoringGeometry


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How the kernel is run.

    Attributes:
      warpgroups: that multiply, with a tile of queries each.
      stages: steps of 64 units that shared memory holds.
    """

    warpgroups: int
    stages: int


def choose_config(g: ScoringGeometry) -> ScoringConfig:
    """As many warpgroups as have room and tiles, then stages; else an error, as of `steps.largest`."""
    warpgroups = 2 if g.num_tiles > 1 and least_bytes(g, 2) <= steps.MAX_SHARED_BYTES else 1
    make = lambda stages: ScoringConfig(warpgroups, stages)
    return steps.largest(make, range(2, 5), lambda config: _memory(g, config))


def least_bytes(g: ScoringGeometry, warpgroups: int = 1) -> int:
    """Shared memory that the kernel needs at least."""
    return steps.shared_bytes(_memory(g, ScoringConfig(warpgroups, 2)))


def score_tiles(g: ScoringGeometry, config: ScoringConfig, inputs: dict[str, jax.Array]) -> jax.Array:
    """Scores of blocks: float32 [batch, num_lists, num_block_groups * 64, tokens of all tiles].

    Those of groups of 64 that are not walked are not written. A block without a visible unit has -inf.

    Args:
      g: the call.
      config: how to run it.
      inputs: query, units, positions, walks as `scoring_layout` makes them, and the table of its steps.
    """

    def block_scores(inputs, scores, memory):
        _kernel(g, config, inputs, scores, memory)

    num_items = inputs["walks"].shape[1]
    tokens = num_items * config.warpgroups * g.tile_tokens
    return plgpu.kernel(
        block_scores,
        out_type=jax.ShapeDtypeStruct((g.batch, g.num_lists, g.num_block_groups * STEP_UNITS, tokens), jnp.float32),
        **steps.blocks_of_grid(g.batch, g.num_lists, num_items),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict(memory=_memory(g, config)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(inputs)


def _memory(g: ScoringGeometry, config: ScoringConfig) -> dict:
    dtype = jnp.dtype(g.dtype)
    barriers = lambda arrivals, number: plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    return dict(
        query=steps.smem((config.warpgroups, g.num_parts * COLUMNS, g.head_columns), dtype),
        positions=plgpu.SMEM((config.warpgroups, COLUMNS), jnp.int32),
        lse=plgpu.SMEM((config.warpgroups, g.num_parts * COLUMNS), jnp.float32),
        scores=plgpu.SMEM((config.warpgroups, STEP_UNITS, g.tile_tokens), jnp.float32),
        query_ready=barriers(2, config.warpgroups),
        units=steps.smem((config.stages, STEP_UNITS, g.head_columns), dtype),
        table=plgpu.SMEM((config.stages, 3, STEP_UNITS), jnp.int32),
        ready=barriers(2, config.stages),
        free=barriers(config.warpgroups, config.stages),
    )


def _kernel(g, config, inputs, scores, memory):
    batch, list_index, place = steps.place_of()
    warpgroup = lax.axis_index("warpgroup")
    # The last queries see most, and start first.
    item = inputs["walks"].shape[1] - 1 - place
    first_step, end_step, num_groups = (steps.part_of(inputs["walks"], batch).at[item][i] for i in range(3))
    num_denominators = end_step - first_step

    @pl.when(warpgroup < config.warpgroups)
    def compute():
        steps.take_registers(config.warpgroups)
        tile = item * config.warpgroups + warpgroup
        own = {name: memory[name].at[warpgroup] for name in ("query", "positions", "lse", "scores", "query_ready")}
        plgpu.copy_gmem_to_smem(inputs["query"].at[batch, list_index, tile], own["query"], own["query_ready"])
        plgpu.copy_gmem_to_smem(steps.part_of(inputs["positions"], batch).at[tile], own["positions"], own["query_ready"])
        plgpu.barrier_wait(own["query_ready"])
        _store_lse(g, config, memory, own, num_denominators)
        position = steps.over_rows(steps.load_columns(own["positions"].at[pl.ds(0, g.tile_tokens)]))

        @pl.loop(0, num_groups)
        def score_group(group):
            first = num_denominators + group * g.width
            pool_step = functools.partial(_pool_step, g, config, memory, own, position)
            pooled = steps.full_matrix((STEP_UNITS, g.tile_tokens), -jnp.inf)
            pooled = lax.fori_loop(first, first + g.width, pool_step, pooled)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the scores of the group before
            own["scores"][...] = pooled
            plgpu.commit_smem()
            blocks, tokens = pl.ds(group * STEP_UNITS, STEP_UNITS), pl.ds(tile * g.tile_tokens, g.tile_tokens)
            plgpu.copy_smem_to_gmem(own["scores"], scores.at[batch, list_index, blocks, tokens])

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == config.warpgroups)
    def fetch():
        steps.give_registers(config.warpgroups)
        units = steps.part_of(inputs["units"], batch, list_index // g.lists_per_kv_head)

        @pl.loop(0, num_denominators + num_groups * g.width)
        def fetch_step(i):
            slot = lax.rem(i, jnp.int32(config.stages))
            step = jnp.where(i < num_denominators, first_step, g.num_denominators - num_denominators) + i
            ring.wait_for_room(memory["free"].at[slot], i, config.stages)
            plgpu.copy_gmem_to_smem(units.at[step], memory["units"].at[slot], memory["ready"].at[slot])
            plgpu.copy_gmem_to_smem(inputs["table"].at[step], memory["table"].at[slot], memory["ready"].at[slot])


def _store_lse(g, config, memory, own, num_denominators):
    """The softmax denominator of each column, as a logarithm to the base 2; 0 if it sees no unit."""
    slices = [pl.ds(row, SLICE_ROWS) for row in range(0, g.num_parts * COLUMNS, SLICE_ROWS)]
    positions = [steps.load_rows(own["positions"].at[rows]) for rows in slices[: COLUMNS // SLICE_ROWS]]

    def add_step(i, carry):
        slot = lax.rem(i, jnp.int32(config.stages))
        plgpu.barrier_wait(memory["ready"].at[slot])
        first, last = (steps.over_rows(steps.load_columns(memory["table"].at[slot, row])) for row in (FIRST, LAST))
        totals = []
        for rows, (row_max, row_sum) in zip(slices, carry, strict=True):
            position = steps.over_columns(positions[len(totals) % len(positions)], STEP_UNITS)
            units = memory["units"].at[slot].transpose((1, 0))
            logits = steps.product(own["query"].at[rows], units, (SLICE_ROWS, STEP_UNITS)) * (g.scale * steps.LOG2_E)
            logits = jnp.where((first <= position) & (position <= last), logits, -jnp.inf)
            new_max = jnp.maximum(row_max, logits.max(axis=1))
            shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)
            weights = jnp.exp2(logits - steps.over_columns(shift, STEP_UNITS))
            totals.append((new_max, row_sum * jnp.exp2(row_max - shift) + weights.sum(axis=1)))
        plgpu.commit_smem()  # the copy that overwrites what was loaded comes after
        plgpu.barrier_arrive(memory["free"].at[slot])
        return totals

    nothing = [(steps.full_rows(-jnp.inf), steps.full_rows(0.0)) for _ in slices]
    for rows, (row_max, row_sum) in zip(slices, lax.fori_loop(0, num_denominators, add_step, nothing), strict=True):
        own["lse"][rows] = jnp.where(row_sum == 0.0, 0.0, row_max + jnp.log(row_sum) * steps.LOG2_E)
    plgpu.commit_smem()  # other threads read them


def _pool_step(g, config, memory, own, position, i, pooled):
    """`pooled` [64, tokens], with one more unit of each of 64 blocks."""
    slot = lax.rem(i, jnp.int32(config.stages))
    plgpu.barrier_wait(memory["ready"].at[slot])
    score = None
    for part in range(g.num_parts):
        columns = pl.ds(part * COLUMNS, COLUMNS)
        query = own["query"].at[columns].transpose((1, 0))
        logits = steps.product(memory["units"].at[slot], query, (STEP_UNITS, COLUMNS)) * (g.scale * steps.LOG2_E)
        probs = jnp.exp2(logits - steps.over_rows(steps.load_columns(own["lse"].at[columns])))
        for head in range(g.heads_of(part)):
            of_head = probs[:, head * g.tile_tokens : (head + 1) * g.tile_tokens]
            if score is None:
                score = of_head
            else:
                score = jnp.maximum(score, of_head) if g.group_reduction == "max" else score + of_head
    if g.group_reduction == "mean":
        score *= 1 / g.list_heads
    first, last = (_over_columns(memory["table"].at[slot, row], g.tile_tokens) for row in (FIRST, LAST))
    is_seen = (first <= position) & (position <= last)
    if g.pooling == "max":
        result = jnp.maximum(pooled, jnp.where(is_seen, score, -jnp.inf))
    else:
        weight = _over_columns(memory["table"].at[slot, SHARED], g.tile_tokens).astype(jnp.float32) * (1 / g.kernel_stride)
        result = jnp.where(is_seen, jnp.where(pooled == -jnp.inf, 0.0, pooled) + score * weight, pooled)
    plgpu.commit_smem()  # the copy that overwrites what was loaded comes after
    plgpu.barrier_arrive(memory["free"].at[slot])
    return result


def _over_columns(ref, columns: int) -> jax.Array:
    return steps.over_columns(steps.load_rows(ref), columns)
