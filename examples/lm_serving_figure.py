"""The figure of serving: speed, what is read and how often the model's choice stays the same, and who was served when."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from lm_serving import Stay

_COLORS = {"dense": "#d1603d", "quest": "#1b6ca8"}
_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110}


def draw_serving(path: pathlib.Path, runs: Sequence[Mapping[str, Any]], stays: Sequence[Stay], lengths: Sequence[int]) -> None:
    """Draws the runs, dense first, and the slots of one of them.

    Args:
      path: of the PNG.
      runs: as in the summary, with budget, tokens_per_second, fraction_read and agreement.
      stays: who was in which slot.
      lengths: bytes of each request, prompt and continuation.
    """
    with plt.rc_context(_STYLE):
        figure, (speed, quality, slots) = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1, 1, 1.5), layout="constrained")
        colors = [_COLORS["dense" if run["budget"] is None else "quest"] for run in runs]
        names = ["dense" if run["budget"] is None else str(run["budget"]) for run in runs]
        speed.bar(names, [run["tokens_per_second"] for run in runs], color=colors)
        speed.set(title="Speed of decoding", ylabel="tokens per second", xlabel="budget of Quest (tokens)")
        x, y = ([100 * run[name] for run in runs] for name in ("fraction_read", "agreement"))
        quality.plot(x[1:], y[1:], color=_COLORS["quest"], linewidth=1)
        quality.scatter(x, y, color=colors, zorder=3)
        for name, *place in zip(names, x, y):
            quality.annotate(name, place, xytext=(4, -14), textcoords="offset points")
        quality.set(title="What is read, and what comes of it", xlabel="keys and values read, metadata too (% of dense)")
        quality.set(ylabel="same byte as dense attention (%)", xlim=(0, 108))
        longest = max(lengths)
        for stay in stays:
            width = stay.last_step - stay.first_step
            shade = 0.25 + 0.6 * lengths[stay.request] / longest
            slots.barh(stay.slot, width, left=stay.first_step, color=_COLORS["quest"], alpha=shade, edgecolor="white")
            label = f"{lengths[stay.request]:,}"
            slots.text(stay.first_step + width / 2, stay.slot, label, ha="center", va="center", fontsize=9, color="white")
        slots.set(title="Requests in the batch, with their bytes", xlabel="step", ylabel="slot")
        slots.set_yticks(sorted({stay.slot for stay in stays}))
        for axes in (speed, quality):
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
        figure.savefig(path)
        plt.close(figure)
