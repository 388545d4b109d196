"""What block selection by the Pallas kernels loads, stores and multiplies: `benchmarks.selection_model` for `mosaic`.

Three parts run one after another: the kernel of scores, XLA's passes over these, and the kernel of thresholds. The passes over
units that XLA arranges before a call are left out.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from benchmarks.devices import EXPS_PER_CLOCK, SHARED_BYTES_PER_CLOCK, Device
from benchmarks.selection_model import ELEMENT_BYTES, INDEX_BYTES, Selection
from sparse_attn_jax.implementations.mosaic import block_scores, kth_largest, scoring, scoring_layout
from sparse_attn_jax.implementations.mosaic.scoring_layout import COLUMNS, STEP_UNITS
from sparse_attn_jax.selection import num_blocks

SCORE_BYTES = 4
# Of all scores of a chunk: XLA reads them for their ranks, writes these, and reads them for the marks of the chosen blocks.
SCORE_PASSES = 3
# A comparison and an addition for each bit of a threshold, and what an SM does of either in a clock (the CUDA C++ programming
# guide's "Arithmetic Instructions", 32-bit integers).
COUNT_OPERATIONS = 2 * kth_largest.BITS
INTEGERS_PER_CLOCK = 64


@dataclasses.dataclass(frozen=True)
class ScoreCounts:
    """Of the kernel of scores, all thread blocks of a call.

    Attributes:
      steps: of 64 units that thread blocks walk.
      products: steps by warpgroups and parts: 64 x 128 logits each.
      operands: bytes that products read in shared memory.
      loaded: bytes of queries, positions, units and their tables.
      stored: bytes of scores.
    """

    steps: int
    products: int
    operands: int
    loaded: int
    stored: int


def geometry_of(selection: Selection) -> scoring_layout.ScoringGeometry:
    p = selection.problem
    sizes = dict(batch=selection.batch, q_len=selection.q_len, num_q_heads=p.num_q_heads)
    return scoring.geometry_of(p, **sizes, plan=plan_of(selection))


def plan_of(selection: Selection) -> scoring_layout.UnitSteps:
    return scoring_layout.unit_steps(selection.problem, selection.coarse.count)


def counts_of(selection: Selection) -> ScoreCounts:
    p, g, plan = selection.problem, geometry_of(selection), plan_of(selection)
    config = block_scores.choose_config(g)
    tokens = config.warpgroups * g.tile_tokens
    positions = p.kv_len - selection.q_len + np.arange(num_blocks(selection.q_len, tokens) * tokens)
    positions = np.minimum(positions, p.kv_len - 1).reshape(1, -1, tokens)
    walks = scoring_layout.walks(g, jnp.asarray(plan.table), p, jnp.asarray(positions, jnp.int32))
    first, end, groups = np.moveaxis(np.asarray(walks, np.int64)[0], -1, 0)
    denominators, scored = int((end - first).sum()), int(groups.sum()) * g.width
    steps = denominators + scored
    # 64 queries at a time with the units of a denominator, but all 128 with those of blocks.
    operand_rows = denominators * 2 * (COLUMNS // 2 + STEP_UNITS) + scored * (COLUMNS + STEP_UNITS)
    lists = g.batch * g.num_lists
    row_bytes = g.head_columns * ELEMENT_BYTES
    tile_bytes = g.num_parts * COLUMNS * row_bytes + COLUMNS * INDEX_BYTES
    step_bytes = STEP_UNITS * (row_bytes + 3 * INDEX_BYTES)
    return ScoreCounts(
        steps=lists * steps,
        products=lists * steps * config.warpgroups * g.num_parts,
        operands=lists * operand_rows * config.warpgroups * g.num_parts * row_bytes,
        loaded=lists * (len(groups) * config.warpgroups * tile_bytes + steps * step_bytes),
        stored=lists * int(groups.sum()) * STEP_UNITS * tokens * SCORE_BYTES,
    )


def limits_of(selection: Selection, device: Device) -> dict[str, float]:
    """Seconds that each part of the device would need for the kernel of scores, if it were the only limit."""
    counts, g = counts_of(selection), geometry_of(selection)
    logits = counts.products * STEP_UNITS * COLUMNS
    row_bytes = g.head_columns * ELEMENT_BYTES
    units = selection.batch * selection.problem.num_kv_heads * (selection.fine.count + selection.coarse.count)
    queries = selection.batch * selection.q_len * selection.problem.num_q_heads
    hbm = (units + queries) * row_bytes + counts.stored
    return dict(
        tensor=2 * logits * g.head_columns / device.flops["wgmma"],
        exp=logits / (device.sms * device.clock * EXPS_PER_CLOCK),
        shared=(counts.operands + counts.loaded) / (device.sms * device.clock * SHARED_BYTES_PER_CLOCK),
        memory=(counts.loaded + counts.stored) / device.l2_bytes + hbm / device.hbm_bytes,
    )


def seconds_of(selection: Selection, device: Device) -> tuple[dict[str, float], float]:
    """The limits of the kernel of scores, and the time of what follows it."""
    return limits_of(selection, device), list_seconds(selection, device)


def list_seconds(selection: Selection, device: Device) -> float:
    """Of what makes lists of scores: thresholds, whose ranks registers hold, and the passes of XLA through HBM."""
    lists = selection.batch * selection.num_lists
    scores = lists * selection.num_blocks * selection.q_len
    indices = lists * selection.q_len * selection.problem.top_k * INDEX_BYTES
    counting = scores * COUNT_OPERATIONS / (device.sms * device.clock * INTEGERS_PER_CLOCK)
    reads = 1 if selection.num_blocks <= kth_largest.MAX_HELD_ROWS else kth_largest.BITS
    thresholds = max(counting, reads * scores * SCORE_BYTES / device.hbm_bytes)
    return thresholds + (SCORE_PASSES * scores * SCORE_BYTES + indices) / device.hbm_bytes
