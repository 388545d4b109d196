"""Prepares, checks and times all contenders on one workload, or on several in the same rounds."""

import dataclasses
import traceback
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import progress, timing
from benchmarks.checks import Checker
from benchmarks.contenders import FORWARD, Contender, Prepared
from benchmarks.workloads import Workload, count_pairs, forward_flops
from sparse_attn_jax.testing.inputs import Inputs

MATMUL = "matmul"
# Of the forward pass's products: the backward recomputes one, and has two for each.
FORWARD_BACKWARD_FLOPS = 3.5

# FAILED: with an error other than a refusal, of ours a bug to see.
TIMED, UNAVAILABLE, WRONG, FAILED = "timed", "cannot run", "WRONG", "failed"
BUGS = (WRONG, FAILED)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to time.

    Attributes:
      repeats: rounds of the interleaved timing.
      seconds: after this long, for each workload timed together, no further round starts, once there are three.
      seed: of the sampled queries.
      matmul_size: edge of the square product that speeds are compared with.
    """

    repeats: int = 20
    seconds: float = 60.0
    seed: int = 0
    matmul_size: int = 2048


@dataclasses.dataclass
class Row:
    """One contender in one mode on one workload: a line of the table and an entry of the JSON file."""

    case: str
    q_len: int
    kv_len: int
    op: str  # "attention" or "selection"
    mode: str
    contender: str
    kind: str
    status: str = TIMED
    reason: str | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    repeats: int = 0
    useful_tflops: float | None = None
    percent_of_matmul: float | None = None
    peak_memory_bytes: int | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)  # baseline's time / own, by baseline


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one workload gave: the lines, the speed of the matmul timed among them, and what was checked if that is not all."""

    workload: Workload
    rows: list[Row]
    matmul_tflops: float | None
    density: float
    checked: str | None = None


def measure(
    workloads: Sequence[Workload], contenders: Sequence[Contender], modes: Sequence[str], settings: Settings
) -> list[Outcome]:
    """Checks every contender in every mode and times those that are right, all workloads in the same rounds.

    Raises:
      ValueError: float64 workloads together with others; they need different settings of JAX.
    """
    uses_x64 = {workload.case.dtype == "float64" for workload in workloads}
    if len(uses_x64) > 1:
        raise ValueError("`workloads` has float64 and other dtypes; measure them one by one.")
    with jax.enable_x64(uses_x64.pop()):
        started = [Started(workload, contenders, settings.seed) for workload in workloads]
        baselines, ours = ([x for x in contenders if (x.kind == "baseline") == is_baseline] for is_baseline in (True, False))
        # What fails of ours may leave the device unusable: by then the baselines are checked, and timed once.
        for one in started:
            one.check(baselines, modes)
        matmul_seconds = time_rows(started, dataclasses.replace(settings, repeats=1))
        for one in started:
            one.check(ours, modes)
        matmul_seconds = time_rows(started, settings) or matmul_seconds
        matmul_tflops = 2e-12 * settings.matmul_size**3 / matmul_seconds if matmul_seconds else None
        return [one.finish(contenders, modes, matmul_tflops) for one in started]


class Started:
    """A workload, with what is known of it so far."""

    def __init__(self, workload: Workload, contenders: Sequence[Contender], seed: int):
        progress.say(f"{workload.case.name}: making inputs")
        self.workload, self.made = workload, workload.make_inputs()
        self.checker = Checker(self.workload, self.made, seed)
        if (checked := self.checker.part.title) is not None:
            progress.say(f"{workload.case.name}: so large that of all results only {checked} is checked")
        self.density = float(self.made.selection.density(workload.case.kv_len))
        kinds = {contender.computes for contender in contenders} - {"selection"}
        self.pairs = {kind: count_pairs(self.made, kind) for kind in kinds}
        # By contender and mode: the line, and what to time.
        self.lines: dict[tuple[str, str], tuple[Row, Prepared | None]] = {}

    def check(self, contenders: Sequence[Contender], modes: Sequence[str]) -> None:
        """Adds a line per contender and mode, not timed yet."""
        for contender, mode in entries(contenders, modes):
            progress.say(f"{self.workload.case.name}: compiling and checking {contender.name} {mode}")
            self.lines[contender.name, mode] = prepare_row(self.workload, self.made, self.checker, contender, mode)

    def finish(self, contenders: Sequence[Contender], modes: Sequence[str], matmul_tflops: float | None) -> Outcome:
        """The lines in their order."""
        rows = [self.lines[contender.name, mode][0] for contender, mode in entries(contenders, modes)]
        add_rates(rows, contenders, self.made, self.pairs, matmul_tflops)
        return Outcome(self.workload, rows, matmul_tflops, self.density, self.checker.part.title)


def entries(contenders: Sequence[Contender], modes: Sequence[str]) -> Iterator[tuple[Contender, str]]:
    """A selector has no backward pass."""
    for mode in modes:
        for contender in contenders:
            if contender.computes != "selection" or mode == FORWARD:
                yield contender, mode


def prepare_row(
    workload: Workload, made: Inputs, checker: Checker, contender: Contender, mode: str
) -> tuple[Row, Prepared | None]:
    """The line, not timed yet, and what to time; without it the line says why."""
    case = workload.case
    op = "selection" if contender.computes == "selection" else "attention"
    row = Row(case.name, case.q_len, case.kv_len, op, mode, contender.name, contender.kind)
    try:
        prepared = contender.prepare(workload, made, mode)
        error = checker.error_of(contender, prepared, mode)
    except Exception as error:
        note_failure(row, error, is_ours=contender.kind != "baseline")
        return row, None
    if error is not None:
        row.status, row.reason = WRONG, error
        progress.say(f"WRONG, not timed: {case.name}: {contender.name} {mode}: {error}")
        return row, None
    row.peak_memory_bytes = prepared.memory_bytes
    return row, prepared


def note_failure(row, error: Exception, *, is_ours: bool) -> None:
    """Says in a row why it has no times. A refusal is none of our bugs, and the failures of other packages are theirs."""
    row.reason = first_line(error)
    if isinstance(error, NotImplementedError) or not is_ours:
        row.status = UNAVAILABLE
    else:
        row.status = FAILED
        progress.say("".join(traceback.format_exception(error)))


def first_line(error: Exception) -> str:
    text = traceback.format_exception_only(error)[0].strip().split(": ", 1)[-1].strip()
    return text.splitlines()[0]


def time_rows(started: Sequence[Started], settings: Settings) -> float | None:
    """Fills in the times, and returns the matmul's median; `None` if there is nothing to time."""
    timed = {
        f"{number}. {row.case}, {row.contender} {row.mode}": (row, prepared.call)
        for number, one in enumerate(started, 1)
        for row, prepared in one.lines.values()
        if row.status == TIMED
    }
    if not timed:
        return None

    def on_failure(name, error):
        if name != MATMUL:
            row, _ = timed[name]
            note_late_failure(row, error, is_ours=row.kind != "baseline")

    calls = {name: call for name, (_, call) in timed.items()}
    try:
        calls[MATMUL] = make_matmul(settings.matmul_size, started[0].made.dtype)
    except Exception as error:
        progress.say(f"no matmul to compare with: {first_line(error)}")
    budget = dict(repeats=settings.repeats, seconds=settings.seconds * len(started))
    times = timing.time_interleaved(calls, **budget, on_failure=on_failure)
    for name, (row, _) in timed.items():
        if row.status == TIMED and row.reason is None:
            vars(row).update(timing.percentiles_ms(times[name]), repeats=len(times[name]))
    return float(np.median(times[MATMUL])) if times.get(MATMUL) else None


def note_late_failure(row, error: Exception, *, is_ours: bool) -> None:
    """As `note_failure`, for a call that ran before: a baseline that was timed keeps that time."""
    if row.median_ms is None:
        note_failure(row, error, is_ours=is_ours)
    else:
        row.reason = f"timed before the others; with them: {first_line(error)}"


def make_matmul(size: int, dtype: str) -> timing.Call:
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    return timing.Enqueued(lambda: multiply(x, x), jax.block_until_ready)


def add_rates(
    rows: list[Row],
    contenders: Sequence[Contender],
    made: Inputs,
    pairs: dict[str, int],
    matmul_tflops: float | None,
) -> None:
    """Useful speed, of the `pairs` that the contender's own function has, and ratios to the baselines."""
    computes = {contender.name: contender.computes for contender in contenders}
    times = {(row.contender, row.mode): row.median_ms for row in rows if row.kind == "baseline" and row.status == TIMED}
    for row in rows:
        if row.status != TIMED or row.op == "selection":
            continue
        flops = forward_flops(made, pairs[computes[row.contender]])
        flops *= 1.0 if row.mode == FORWARD else FORWARD_BACKWARD_FLOPS
        row.useful_tflops = flops / row.median_ms * 1e-9
        row.percent_of_matmul = None if matmul_tflops is None else 100 * row.useful_tflops / matmul_tflops
        row.ratios = {name: time / row.median_ms for (name, mode), time in times.items() if mode == row.mode}
