"""Time against length, a line per contender and a panel per pass."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Outcome
from benchmarks.report import MODE_LABELS, timed_rows


def why_not() -> str | None:
    return None if importlib.util.find_spec("matplotlib") else "--plot needs matplotlib: pip install matplotlib"


def write_plot(path: str, sections: Sequence[tuple[str, Sequence[Outcome]]], headline: str) -> None:
    """A PNG file with one row of panels for each section that timed anything."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = [(title, series_of(outcomes)) for title, outcomes in sections]
    panels = [(title, mode, lines) for title, modes in sections for mode, lines in modes.items()]
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(5.5 * max(1, len(panels)), 4.5), squeeze=False)
    for axis, (title, mode, lines) in zip(axes[0], panels):
        draw_panel(axis, f"{title}\n{MODE_LABELS[mode]}", lines)
    figure.suptitle(headline, fontsize=8)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def series_of(outcomes: Sequence[Outcome]) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """By pass and contender: (length, median, p10, p90)."""
    series: dict[str, dict[str, list]] = {}
    for outcome in outcomes:
        for (name, mode), row in timed_rows(outcome).items():
            point = (row.q_len, row.median_ms, row.p10_ms, row.p90_ms)
            series.setdefault(mode, {}).setdefault(name, []).append(point)
    return series


def draw_panel(axis, title: str, lines: dict[str, list[tuple[int, float, float, float]]]) -> None:
    for name, points in lines.items():
        lengths, medians, low, high = zip(*sorted(points))
        (line,) = axis.plot(lengths, medians, marker="o", label=name)
        axis.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("query tokens")
    axis.set_ylabel("ms")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
