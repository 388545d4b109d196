"""The figures of the demo: loss curves, the selected blocks over real text, and scaling with the length."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from lm_scaling import Measurement
from lm_training import TrainedModel
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

_COLORS = {"dense": "#d1603d", "sparse": "#1b6ca8"}
_SCALING_COLORS = ("#d1603d", "#e9a83b", "#1b6ca8")
# Future, not read, sink, local, chosen by score.
_BLOCK_COLORS = ("#e4e4e4", "#ffffff", "#8e6bb0", "#e9a83b", "#1b6ca8")
_BLOCK_LABELS = ("in the future", "not read", "first block (sink)", "local blocks", "chosen by its score")
_CAPTION = dict(verticalalignment="center", fontsize=11)
_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110}


def draw_loss_curves(path: pathlib.Path, models: Mapping[str, TrainedModel], tokens_per_step: int) -> None:
    """Training loss of both models over the bytes seen, and below how far they are apart."""
    with plt.rc_context(_STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
        smooth = {}
        for name, trained in models.items():
            read = np.arange(1, len(trained.losses) + 1) * tokens_per_step / 1e3
            smooth[name] = _moving_average(trained.losses)
            label = f"{name}: {trained.validation_bits_per_byte:.3f} held out, {trained.tokens_per_second:,.0f} tokens/s"
            # The two are so close that the first, wider, shows only around the second.
            width = 5 if name == "dense" else 1.5
            above.plot(read, trained.losses, color=_COLORS[name], alpha=0.15, linewidth=0.8)
            above.plot(read, smooth[name], color=_COLORS[name], linewidth=width, label=label)
        above.set(title="The same model with dense and with sparse attention", ylabel="training loss (bits per byte)")
        above.legend(frameon=False)
        below.axhspan(-3, 3, color="#eeeeee", label="±3 %")
        below.axhline(0, color="#888888", linewidth=0.8)
        below.plot(read, 100 * (smooth["sparse"] / smooth["dense"] - 1), color=_COLORS["sparse"])
        below.set(xlabel="text read (thousand bytes)", ylabel="sparse − dense\n(% of dense)", ylim=(-6, 6))
        below.legend(frameon=False, loc="upper right")
        for axes in (above, below):
            axes.grid(alpha=0.3)
        figure.savefig(path)
        plt.close(figure)


def _moving_average(losses: np.ndarray) -> np.ndarray:
    """Mean of up to the last twentieth of the losses."""
    width = max(1, len(losses) // 20)
    total = np.cumsum(np.concatenate([[0.0], losses]))
    end = np.arange(1, len(losses) + 1)
    first = np.maximum(end - width, 0)
    return (total[end] - total[first]) / (end - first)


def draw_scaling(path: pathlib.Path, measurements: Sequence[Measurement], sizes: str) -> None:
    """Time and peak memory of every contender against the length, both on logarithmic scales."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
        names = list(dict.fromkeys(m.contender for m in measurements))
        for name, color in zip(names, _SCALING_COLORS):
            own = [m for m in measurements if m.contender == name]
            timed = [m for m in own if m.seconds is not None]
            style = dict(color=color, marker="o", markersize=5, linewidth=2)
            left.plot([m.length for m in timed], [m.seconds for m in timed], **style)
            right.plot([m.length for m in own], [m.peak_bytes / 2**20 for m in own], **style, label=name)
        lengths = sorted({m.length for m in measurements})
        for axes in (left, right):
            axes.set(xscale="log", yscale="log", xlabel="length (tokens)")
            axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        left.set(title="Time, forward and backward", ylabel="seconds")
        right.set(title="Peak memory, forward and backward", ylabel="MiB, from the compiler")
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, title=sizes)
        figure.savefig(path)
        plt.close(figure)


def draw_selected_blocks(
    path: pathlib.Path, text: bytes, masks: Mapping[str, np.ndarray], *, block_size: int, num_local_blocks: int
) -> None:
    """What a few heads read: a map for each, and the text itself, a block a line, as the last byte sees it.

    Args:
      path: of the PNG.
      text: [length] bytes that were selected over.
      masks: bool [length, num_blocks] for each of four heads, by the name to show: which blocks each byte may read.
      block_size: bytes per block.
      num_local_blocks: most recent blocks that are always read.
    """
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(15, 8), layout="constrained")
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 2.1))
        for index, (name, mask) in enumerate(masks.items()):
            axes = figure.add_subplot(grid[index // 2, index % 2])
            _draw_map(axes, name, _classify(mask, block_size, num_local_blocks))
            axes.set(
                xlabel=f"block of {block_size} bytes that is read" if index >= 2 else "",
                ylabel="position of the reading byte" if index % 2 == 0 else "",
            )
        _draw_text(figure.add_subplot(grid[:, 2]), text, masks, block_size)
        handles = [Patch(facecolor=c, edgecolor="#999999", label=label) for c, label in zip(_BLOCK_COLORS, _BLOCK_LABELS)]
        figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False)
        figure.suptitle(
            f"Which blocks of {block_size} bytes each byte of a held-out text reads, in {len(masks)} heads", fontsize=14
        )
        figure.savefig(path)
        plt.close(figure)


def _classify(mask: np.ndarray, block_size: int, num_local_blocks: int) -> np.ndarray:
    """Index into the block colours for every (byte, block)."""
    own = np.arange(mask.shape[0])[:, None] // block_size
    block = np.arange(mask.shape[1])[None]
    kind = np.where(block == 0, 2, np.where(block > own - num_local_blocks, 3, 4))
    return np.where(block > own, 0, np.where(mask, kind, 1))


def _draw_map(axes: Axes, name: str, kinds: np.ndarray) -> None:
    # Fixed limits, because a short text may lack a kind.
    axes.imshow(kinds, aspect="auto", cmap=ListedColormap(_BLOCK_COLORS), vmin=0, vmax=4, interpolation="nearest")
    axes.set_title(name, fontsize=11)
    axes.set_xticks(np.arange(-0.5, kinds.shape[1], 1), minor=True)
    axes.grid(which="minor", axis="x", color="#dddddd", linewidth=0.4)
    axes.tick_params(which="minor", length=0)


def _draw_text(axes: Axes, text: bytes, masks: Mapping[str, np.ndarray], block_size: int) -> None:
    """The text, one block a line. Squares at the left of a line: the heads in which the last byte reads this block."""
    num_lines = -(-len(text) // block_size)
    font_size = min(11.0, 11.0 * 64 / block_size)
    for line in range(num_lines):
        reads = [mask[-1, line] for mask in masks.values()]
        for head, is_read in enumerate(reads):
            color = _COLORS["sparse"] if is_read else "#eeeeee"
            axes.add_patch(Rectangle((0.03 * head - 0.145, line - 0.35), 0.022, 0.7, color=color))
        shown = _printable(text[line * block_size : (line + 1) * block_size]).ljust(block_size)
        box = dict(facecolor=_COLORS["sparse"], alpha=0.4 * np.mean(reads), linewidth=0, pad=1.2)
        place = dict(verticalalignment="center", parse_math=False)
        axes.text(0.01, line, shown, family="monospace", fontsize=font_size, bbox=box, **place)
        axes.text(-0.16, line, str(line), horizontalalignment="right", color="#777777", fontsize=9, **place)
    for head, name in enumerate(masks):
        axes.text(0.03 * head - 0.135, -0.8, name, rotation=45, color="#777777", fontsize=9)
    axes.set(xlim=(-0.2, 1.0), ylim=(num_lines - 0.4, -4.5))
    axes.text(0.25, -2.8, "The same text, one block a line.\nSquares: heads in which the last byte reads it.", **_CAPTION)
    axes.axis("off")


def _printable(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "↵" if byte == 10 else "·" for byte in data)
