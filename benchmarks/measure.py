"""Prepares, checks and times all contenders on one workload, or on several in the same rounds."""

import dataclasses
import functools
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

TIMED, UNAVAILABLE, WRONG = "timed", "cannot run", "WRONG"


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
    """What one workload gave: the lines, and the speed of the matmul timed among them."""

    workload: Workload
    rows: list[Row]
    matmul_tflops: float | None
    density: float


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
        made = [make_inputs(workload) for workload in workloads]
        checked = [check(*pair, contenders, modes, settings.seed) for pair in zip(workloads, made)]
        matmul_seconds = time_rows(checked, made[0].dtype, settings)
        matmul_tflops = 2e-12 * settings.matmul_size**3 / matmul_seconds if matmul_seconds else None
        outcomes = []
        for workload, inputs, lines in zip(workloads, made, checked):
            rows = [row for row, _ in lines]
            add_rates(rows, contenders, inputs, matmul_tflops)
            density = float(inputs.selection.density(workload.case.kv_len))
            outcomes.append(Outcome(workload, rows, matmul_tflops, density))
        return outcomes


def make_inputs(workload: Workload) -> Inputs:
    progress.say(f"{workload.case.name}: making inputs")
    return workload.make_inputs()


def check(
    workload: Workload, made: Inputs, contenders: Sequence[Contender], modes: Sequence[str], seed: int
) -> list[tuple[Row, Prepared | None]]:
    """A line per contender and mode, not timed yet, and what to time."""
    checker = Checker(workload, made, seed)
    lines = []
    for contender, mode in entries(contenders, modes):
        progress.say(f"{workload.case.name}: compiling and checking {contender.name} {mode}")
        lines.append(prepare_row(workload, made, checker, contender, mode))
    return lines


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
    # The failures of other people's packages are theirs; a failure of ours other than a refusal is a bug to see.
    failures = (RuntimeError, ValueError, TypeError) if contender.kind == "baseline" else NotImplementedError
    try:
        prepared = contender.prepare(workload, made, mode)
    except failures as error:
        row.status, row.reason = UNAVAILABLE, first_line(error)
        return row, None
    error = checker.error_of(contender, prepared, mode)
    if error is not None:
        row.status, row.reason = WRONG, error
        progress.say(f"WRONG, not timed: {case.name}: {contender.name} {mode}: {error}")
        return row, None
    row.peak_memory_bytes = prepared.memory_bytes
    return row, prepared


def first_line(error: Exception) -> str:
    return traceback.format_exception_only(error)[0].strip().split(": ", 1)[-1].splitlines()[0]


def time_rows(checked: Sequence[list[tuple[Row, Prepared | None]]], dtype: str, settings: Settings) -> float | None:
    """Fills in the times, and returns the matmul's median; `None` if there is nothing to time."""
    timed = {
        f"{number}. {row.case}, {row.contender} {row.mode}": (row, prepared.call)
        for number, lines in enumerate(checked, 1)
        for row, prepared in lines
        if row.status == TIMED
    }
    if not timed:
        return None
    calls = {name: call for name, (_, call) in timed.items()} | {MATMUL: make_matmul(settings.matmul_size, dtype)}
    times = timing.time_interleaved(calls, repeats=settings.repeats, seconds=settings.seconds * len(checked))
    for name, (row, _) in timed.items():
        vars(row).update(timing.percentiles_ms(times[name]), repeats=len(times[name]))
    return float(np.median(times[MATMUL]))


def make_matmul(size: int, dtype: str):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype)
    multiply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(x, x))


def add_rates(rows: list[Row], contenders: Sequence[Contender], made: Inputs, matmul_tflops: float | None) -> None:
    """Useful speed, of the pairs that the contender's own function has, and ratios to the baselines."""
    computes = {contender.name: contender.computes for contender in contenders}
    pairs_of = functools.cache(functools.partial(count_pairs, made))
    times = {(row.contender, row.mode): row.median_ms for row in rows if row.kind == "baseline" and row.status == TIMED}
    for row in rows:
        if row.status != TIMED or row.op == "selection":
            continue
        flops = forward_flops(made, pairs_of(computes[row.contender]))
        flops *= 1.0 if row.mode == FORWARD else FORWARD_BACKWARD_FLOPS
        row.useful_tflops = flops / row.median_ms * 1e-9
        row.percent_of_matmul = 100 * row.useful_tflops / matmul_tflops
        row.ratios = {name: time / row.median_ms for (name, mode), time in times.items() if mode == row.mode}
