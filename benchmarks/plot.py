"""One figure of a run: a row of panels per section, a panel per pass; lines over lengths, or bars where there is one length."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Outcome, Row
from benchmarks.report import MODE_LABELS, timed_rows

PANEL_INCHES = (6.0, 3.6)


def why_not() -> str | None:
    return None if importlib.util.find_spec("matplotlib") else "--plot needs matplotlib: pip install matplotlib"


def write_plot(path: str, sections: Sequence[tuple[str, Sequence[Outcome]]], headline: str) -> None:
    """A PNG file with a row of panels for each section that timed anything."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = [(title, panels_of(outcomes)) for title, outcomes in sections]
    grid = [(title, panels) for title, panels in grid if panels]
    num_columns = max((len(panels) for _, panels in grid), default=1)
    size = (PANEL_INCHES[0] * num_columns, PANEL_INCHES[1] * max(1, len(grid)))
    figure, axes = pyplot.subplots(max(1, len(grid)), num_columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for line_of_axes, (title, panels) in zip(axes, grid):
        for axis, (mode, rows) in zip(line_of_axes, panels.items()):
            axis.set_visible(True)
            axis.set_title(f"{title}\n{MODE_LABELS[mode]}", fontsize=9)
            draw = draw_lines if len({row.q_len for _, row in rows}) > 1 else draw_bars
            draw(axis, rows)
            axis.grid(alpha=0.3)
    figure.suptitle(headline, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def panels_of(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[str, Row]]]:
    """By pass: every timed row with its label."""
    panels: dict[str, list] = {}
    for outcome in outcomes:
        selector = outcome.workload.selector
        blocks = "" if selector is None else f", {selector.top_k} blocks"
        for (name, mode), row in timed_rows(outcome).items():
            panels.setdefault(mode, []).append((name + blocks, row))
    return panels


def draw_lines(axis, rows: Sequence[tuple[str, Row]]) -> None:
    for label in dict.fromkeys(label for label, _ in rows):
        own = sorted((row.q_len, row.median_ms, row.p10_ms, row.p90_ms) for other, row in rows if other == label)
        lengths, medians, low, high = zip(*own)
        (line,) = axis.plot(lengths, medians, marker="o", label=label)
        axis.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("query tokens")
    axis.set_ylabel("ms, median; band: 10th to 90th percentile")
    axis.legend(fontsize=8)


def draw_bars(axis, rows: Sequence[tuple[str, Row]]) -> None:
    labels = [label for label, _ in rows]
    medians = [row.median_ms for _, row in rows]
    spread = [[row.median_ms - row.p10_ms for _, row in rows], [row.p90_ms - row.median_ms for _, row in rows]]
    colors = [f"C{list(dict.fromkeys(labels)).index(label)}" for label in labels]
    bars = axis.barh(range(len(rows)), medians, xerr=spread, color=colors, alpha=0.8, error_kw=dict(lw=1, capsize=3))
    axis.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=12, fontsize=8)
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(f"ms at {rows[0][1].q_len:,} query tokens, median; whisker: 10th to 90th percentile", fontsize=8)
