"""Tables, summaries and the JSON file."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from benchmarks.contenders import FORWARD, FORWARD_BACKWARD
from benchmarks.measure import TIMED, Outcome, Row
from benchmarks.workloads import Workload

SCHEMA = 1
MODE_LABELS = {FORWARD: "forward", FORWARD_BACKWARD: "forward+backward"}
LEGEND = """\
ms: median, 10th and 90th percentile of the interleaved rounds. TFLOP/s: useful work, 2 (D + Dv) per visible (query, key) pair
and query head of the function that the contender computes (the selected pairs; a dense baseline's are all), x 3.5 for
forward+backward. % matmul: of a square matmul timed in the same rounds. x NAME: how many times faster than that baseline.
peak: temporaries and results; from XLA's analysis for JAX, the measured rise for torch."""


def describe(workload: Workload) -> str:
    """One line on sizes and selection."""
    case = workload.case
    lengths = f"{case.q_len:,} tokens" if case.q_len == case.kv_len else f"{case.q_len:,} queries, {case.kv_len:,} keys"
    heads = f"{case.num_q_heads} query / {case.num_kv_heads} KV heads, D={case.head_dim}"
    if workload.selector is not None:
        selector = workload.selector
        forced = f"{selector.num_sink_blocks} sink, {selector.num_local_blocks} local"
        lists = f"InfLLMV2, {selector.top_k} blocks of {selector.block_size} per token ({forced}), {workload.generator} data"
    else:
        per = "token" if case.q_block_size == 1 else f"{case.q_block_size} queries"
        lists = f"{case.num_slots} blocks of {case.kv_block_size} per {per}, {case.indices}"
    mask = "causal" if case.is_causal else "not causal"
    return f"{case.name}: batch {case.batch}, {lengths}, {heads}, {case.dtype}, {mask}; {lists}"


def format_outcome(outcome: Outcome, matmul_size: int) -> str:
    """The table of one workload under its description."""
    matmul = f"; matmul {matmul_size}^3 at {outcome.matmul_tflops:.3g} TFLOP/s" if outcome.matmul_tflops else ""
    checked = f"; checked: {outcome.checked}" if outcome.checked else ""
    title = f"{describe(outcome.workload)}; density {outcome.density:.3f}{matmul}{checked}"
    return f"{title}\n\n{format_table(*table_of(outcome.rows))}"


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells as text."""
    baselines = list(dict.fromkeys(name for row in rows for name in row.ratios))
    header = ["contender", "pass", "ms", "p10", "p90", "TFLOP/s", "% matmul"]
    header += [f"x {name}" for name in baselines] + ["peak MiB", "note"]
    cells = []
    for row in rows:
        ratios = [number(row.ratios.get(name), ".2f") for name in baselines]
        times = [number(x, ".2f") for x in (row.median_ms, row.p10_ms, row.p90_ms)]
        rates = [number(row.useful_tflops, ".4f"), number(row.percent_of_matmul, ".1f")]
        peak = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20
        note = "" if row.reason is None else row.reason.split(". ")[0]
        note = note if row.status == TIMED else f"{row.status}: {note}"
        cells.append([row.contender, MODE_LABELS[row.mode], *times, *rates, *ratios, number(peak, ".1f"), note])
    return header, cells


def number(x: float | None, style: str) -> str:
    return "n/a" if x is None else format(x, style)


def format_table(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table with aligned columns: text to the left, numbers to the right."""
    is_text = [name in ("contender", "pass", "note") for name in header]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]

    def line(values):
        padded = [x.ljust(width) if left else x.rjust(width) for x, width, left in zip(values, widths, is_text)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width) if left else "-" * (width - 1) + ":" for width, left in zip(widths, is_text)]
    return "\n".join([line(header), line(rule), *map(line, cells)])


def summarize(outcomes: Sequence[Outcome]) -> list[str]:
    """What compares lines with each other: passes, lengths, selection with attention."""
    return [*compare_passes(outcomes), *compare_selection(outcomes), *compare_lengths(outcomes)]


def timed_rows(outcome: Outcome) -> dict[tuple[str, str], Row]:
    return {(row.contender, row.mode): row for row in outcome.rows if row.status == TIMED}


def compare_passes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        rows = timed_rows(outcome)
        for (name, mode), row in rows.items():
            if mode == FORWARD_BACKWARD and (name, FORWARD) in rows:
                ratio = row.median_ms / rows[name, FORWARD].median_ms
                yield f"{row.case}: {name} forward+backward takes {ratio:.2f}x its forward"


def compare_selection(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        rows = [row for row in outcome.rows if row.status == TIMED and row.mode == FORWARD]
        selections = [row for row in rows if row.op == "selection"]
        attentions = [row for row in rows if row.kind == "implementation"]
        for selection, attention in itertools.product(selections, attentions):
            ratio = selection.median_ms / attention.median_ms
            top_k = outcome.workload.selector.top_k
            what = f"{selection.contender}, {top_k} blocks,"
            yield f"{selection.case}: {what} takes {ratio:.2f}x the {attention.contender} attention it selects for"


def compare_lengths(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Growth of time per doubling, between neighbouring lengths; only sweeps of explicit sizes."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for outcome in outcomes:
        if outcome.workload.case.special == "explicit sizes":
            for key, row in timed_rows(outcome).items():
                series.setdefault(key, {})[row.q_len] = row.median_ms
    for (name, mode), times in series.items():
        growths = [growth_per_doubling(times, *pair) for pair in itertools.pairwise(sorted(times))]
        if growths:
            steps = ", ".join(f"{growth:.2f}x" for growth in growths)
            lengths = ", ".join(f"{length:,}" for length in sorted(times))
            yield f"{name} {MODE_LABELS[mode]} grows per doubling by {steps} over {lengths} tokens (most: {max(growths):.2f}x)"


def growth_per_doubling(times: dict[int, float], shorter: int, longer: int) -> float:
    return (times[longer] / times[shorter]) ** (1 / math.log2(longer / shorter))


def as_data(machine: dict, seed: int, sections: Sequence[tuple[str, Sequence[Outcome]]], memory: Sequence[dict]) -> dict:
    """The content of the JSON file."""

    def outcome_data(outcome):
        rows = [dataclasses.asdict(row) for row in outcome.rows]
        selector = outcome.workload.selector
        selector = None if selector is None else dataclasses.asdict(selector)
        case = dataclasses.asdict(outcome.workload.case)
        speeds = dict(density=outcome.density, matmul_tflops=outcome.matmul_tflops)
        return dict(case=case, selector=selector, **speeds, checked=outcome.checked, rows=rows)

    data = [
        dict(title=title, summaries=summarize(outcomes), workloads=[outcome_data(outcome) for outcome in outcomes])
        for title, outcomes in sections
    ]
    return dict(schema=SCHEMA, machine=machine, seed=seed, sections=data, memory=list(memory))
