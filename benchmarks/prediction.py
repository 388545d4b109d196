"""The least time that a device needs for what a schedule makes it do. `docs/performance.md` explains the formulae."""

import dataclasses

from benchmarks.devices import (
    EXPS_PER_CLOCK,
    MAX_CTAS,
    MAX_THREADS,
    REGISTERS,
    RESERVED_SHARED_BYTES,
    SCHEDULERS,
    SHARED_BYTES_PER_CLOCK,
    Device,
)
from benchmarks.schedules import Counts, Schedule, Work, counts_of, row_pair_bytes, work_of
from benchmarks.tile_lists import Lists
from sparse_attn_jax.testing.cases import Case


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted times in seconds, one for each part of the device if it were the only limit.

    Attributes:
      tensor: matrix products.
      exp: exponentials.
      issue: instructions; `None` if their number is not known.
      shared: shared memory.
      l2: loads and stores.
      hbm: what L2 cannot keep, and each array once.
      longest: the CTA that walks most pieces, if it had an SM to itself.
      ctas_per_sm: how many fit.
    """

    tensor: float
    exp: float
    issue: float | None
    shared: float
    l2: float
    hbm: float
    longest: float
    ctas_per_sm: int
    counts: Counts

    @property
    def memory(self) -> float:
        """A load that misses L2 pays for both."""
        return self.l2 + self.hbm

    @property
    def limits(self) -> dict[str, float]:
        names = ("tensor", "exp", "issue", "shared", "memory", "longest")
        named = {name: getattr(self, name) for name in names}
        return {name: seconds for name, seconds in named.items() if seconds is not None}

    @property
    def seconds(self) -> float:
        return max(self.limits.values())

    @property
    def limit(self) -> str:
        """What takes the time."""
        return max(self.limits, key=self.limits.get)


def predict(schedule: Schedule, lists: Lists, device: Device) -> Prediction | None:
    """`None` if the schedule's CTAs do not fit on the device's SMs."""
    case = lists.case
    ctas_per_sm = occupancy(schedule, device)
    if ctas_per_sm == 0:
        return None
    work = work_of(schedule, lists, device.l2_capacity)
    counts = counts_of(schedule, case, work)

    def idle_factor(warps_per_cta: float) -> float:
        """Fewer than four warps at work on an SM leave tensor cores and schedulers idle."""
        return max(1.0, SCHEDULERS / (warps_per_cta * ctas_per_sm))

    steps_per_piece = schedule.walked // schedule.step
    computing = idle_factor(work.steps / (work.pieces * steps_per_piece) * schedule.unit_warps)
    issue = None
    if schedule.instructions is not None:
        step, rest = issued(schedule, case)
        issue = work.steps * step * computing + work.pieces * rest * idle_factor(schedule.warps)
        issue /= device.sms * SCHEDULERS * device.clock
    return Prediction(
        tensor=counts.flops / device.flops[schedule.tensor] * computing,
        exp=counts.exps / (device.sms * device.clock * EXPS_PER_CLOCK) * computing,
        issue=issue,
        shared=(counts.shared_loaded + counts.shared_stored) / (device.sms * device.clock * SHARED_BYTES_PER_CLOCK),
        l2=(counts.loaded + counts.stored) / device.l2_bytes,
        hbm=hbm_bytes(schedule, case, work, counts) / device.hbm_bytes,
        longest=work.longest * piece_seconds(schedule, case, device),
        ctas_per_sm=ctas_per_sm,
        counts=counts,
    )


def issued(schedule: Schedule, case: Case) -> tuple[float, float]:
    """Instructions by all warps of a unit for a step, and by all of a CTA for the rest of a piece."""
    found = schedule.instructions
    copies = schedule.walked * row_pair_bytes(case) / (32 * 16)
    return schedule.unit_warps * found.step, schedule.warps * found.piece + copies * found.copy


def hbm_bytes(schedule: Schedule, case: Case, work: Work, counts: Counts) -> float:
    """Owned rows and results once; of the walked side what misses, and at least each row once."""
    num_rows = case.kv_len * case.num_kv_heads if schedule.owns == "queries" else case.q_len * case.num_q_heads
    walked = max(work.missed, case.batch * num_rows) * row_pair_bytes(case)
    owned = counts.loaded - work.items * row_pair_bytes(case)
    return owned + walked + counts.stored


def piece_seconds(schedule: Schedule, case: Case, device: Device) -> float:
    """Of one piece in a CTA that has an SM to itself: multiplying, or issuing instructions."""
    used = min(schedule.warps, SCHEDULERS)
    flops = schedule.products * 2 * schedule.owned * schedule.walked * case.head_dim
    multiply = flops / (used * device.flops[schedule.tensor] / (device.sms * SCHEDULERS))
    if schedule.instructions is None:
        return multiply
    step, rest = issued(schedule, case)
    return max(multiply, (step * schedule.units * schedule.walked // schedule.step + rest) / (used * device.clock))


def occupancy(schedule: Schedule, device: Device) -> int:
    """CTAs that fit on an SM."""
    threads = schedule.threads
    return min(
        device.shared_bytes // (schedule.shared_bytes + RESERVED_SHARED_BYTES),
        REGISTERS // (threads * schedule.registers),
        MAX_THREADS // threads,
        MAX_CTAS,
    )


def delta_seconds(case: Case, device: Device) -> float:
    """Of sum(out * d_out) by row, before the backward kernels: it reads both arrays."""
    return case.batch * case.q_len * case.num_q_heads * row_pair_bytes(case) / device.hbm_bytes
