"""A figure per method: what it sees, and the attention that it keeps for what it reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLORS = dict(text="#1b6ca8", needle="#d1603d", stride="#8e6bb0", drift="#e9a83b", field="#4a9c6d")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 80}
PICTURE_SIZE = 256


def draw_method(path: Path, name: str, rows: Sequence[Any], seen: np.ndarray | None) -> None:
    """Left, the keys that each query of one head sees; right, mass kept against density, beside the best blocks."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.2), width_ratios=(1, 1.4), layout="constrained")
        if seen is None:
            left.set_visible(False)
        else:
            draw_seen(left, seen[-1])
        for pattern, color in COLORS.items():
            own = sorted((row.recall for row in rows if row.pattern == pattern), key=lambda recall: recall.density)
            density = [recall.density for recall in own]
            right.plot(
                density, [recall.mass for recall in own], "o-", color=color, label=pattern if own else None, markersize=4
            )
            right.plot(density, [recall.best_mass for recall in own], ":", color=color, linewidth=1)
        right.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="keys read, of those visible", ylabel="attention kept")
        right.set_title(f"{name} (dotted: the best blocks)")
        right.grid(alpha=0.3)
        right.legend(frameon=False, loc="lower right")
        figure.savefig(path)
        plt.close(figure)


def draw_seen(axes: Any, seen: np.ndarray) -> None:
    """The share of seen keys in each of up to 256 x 256 squares."""
    size = -(-len(seen) // PICTURE_SIZE)
    padded = np.pad(seen.astype(float), [(0, -len(seen) % size)] * 2)
    side = len(padded) // size
    axes.imshow(padded.reshape(side, size, side, size).mean(axis=(1, 3)), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[], title="one head")
    for spine in axes.spines.values():
        spine.set_visible(True)
