"""The figure of docs/performance.md: predicted limits by length, with InfLLM-v2's published times and the goals."""

from collections.abc import Sequence

from benchmarks.roofline_tables import FORWARD_GOAL, GENERATORS, INFLLM_V2, KERNELS, TOKEN_CASES, Entry, best

COLUMNS = ("forward", "forward lean", "forward SM90")
COLORS = dict(tensor="C0", exp="C4", issue="C1", shared="C2", memory="C3")


def write_plot(path: str, entries: Sequence[Entry]) -> None:
    """A PNG file: for each length and kernel a bar up to the predicted time, with a tick at each limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GENERATORS), figsize=(13, 5), sharey=True)
    for axis, lists in zip(axes, GENERATORS):
        draw_lists(axis, entries, lists)
        axis.set_title(f"{lists} lists")
    axes[0].set_ylim(0, 1.1 * axes[0].get_ylim()[1])  # room for the lengths
    axes[0].set_ylabel("ms, forward on an H100")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9)
    title = "Predicted: bars, ticks (the limits), and in brackets the tokens per tile. Published: diamonds."
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_lists(axis, entries: Sequence[Entry], lists: str) -> None:
    places, names = [], []
    for group, case in enumerate(TOKEN_CASES.values()):
        published = INFLLM_V2[case.q_len]
        left = group * (len(COLUMNS) + 1)
        for place, kernel in enumerate(COLUMNS, left):
            entry = best(entries, kernel, case, lists)
            axis.bar(place, entry.ms, width=0.8, color="0.85")
            for limit, color in COLORS.items():
                if limit in entry.prediction.limits:
                    ms = 1e3 * entry.prediction.limits[limit]
                    label = f"predicted: {limit}" if place == 0 else None
                    axis.hlines(ms, place - 0.4, place + 0.4, color=color, lw=2.5, label=label)
            places.append(place)
            names.append(f"{KERNELS[kernel].label} ({entry.schedule.tokens})")
        middle, right = left + (len(COLUMNS) - 1) / 2, left + len(COLUMNS) - 0.5
        axis.plot(middle, published.forward, "kD", label=None if group else "published: InfLLM-v2")
        goal = published.forward / FORWARD_GOAL
        axis.hlines(goal, left - 0.5, right, color="k", ls="--", lw=1, label=None if group else "goal")
        axis.text(
            middle, 0.97, f"{case.q_len:,} tokens", transform=axis.get_xaxis_transform(), ha="center", va="top", fontsize=9
        )
    axis.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
