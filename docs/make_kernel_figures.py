"""Draws the figures of docs/kernels.md, from one small causal selection: `python docs/make_kernel_figures.py`."""

import pathlib

import numpy as np
from make_flow import CELL, DARK, GRID, LIGHT, TEXT, arrow, label

NUM_TOKENS, NUM_BLOCKS, TILE = 12, 8, 4
NUM_TILES = NUM_TOKENS // TILE
ACCENT, PALE = "#d9782d", "#f6e0cf"
TOP = 46


def choose() -> np.ndarray:
    """bool [tokens, blocks]: the first block, the own one and two others."""
    rng = np.random.default_rng(5)
    chosen = np.zeros((NUM_TOKENS, NUM_BLOCKS), bool)
    for token in range(NUM_TOKENS):
        own = token * NUM_BLOCKS // NUM_TOKENS
        chosen[token, [0, own]] = True
        chosen[token, rng.permutation(own + 1)[:2]] = True
    return chosen


def box(x, y, width, height, fill, stroke=GRID, stroke_width=0.6) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{stroke_width}"/>'
    )


def text(x, y, words, size=11, color=TEXT, anchor="middle") -> str:
    style = f'font-family="sans-serif" font-size="{size}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'


def frame(x, y, columns, rows, color=ACCENT) -> str:
    return box(x, y, columns * CELL, rows * CELL, "none", color, 2)


def matrix(x: float, values: np.ndarray, colors: dict) -> list[str]:
    return [box(x + j * CELL, TOP + i * CELL, CELL, CELL, colors[values[i, j]]) for i, j in np.ndindex(values.shape)]


def svg(width: int, height: int, parts: list[str]) -> str:
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n{body}\n</svg>\n'


def draw_plan(chosen: np.ndarray) -> str:
    parts = [label(20 + NUM_BLOCKS * CELL / 2, 20, "lists", 13, "bold")]
    parts += matrix(20, chosen, {True: LIGHT, False: "#ffffff"})
    parts += [text(20 + (j + 0.5) * CELL, TOP - 5, j, 9) for j in range(NUM_BLOCKS)]
    parts += [frame(20, TOP + tile * TILE * CELL, NUM_BLOCKS, TILE) for tile in range(NUM_TILES)]
    parts += [arrow(138, TOP + NUM_TOKENS * CELL / 2)]
    parts += [label(270, 20, "plan: unions and bits", 13, "bold")]
    for tile in range(NUM_TILES):
        rows = chosen[tile * TILE : (tile + 1) * TILE]
        union = np.flatnonzero(rows.any(axis=0))
        y = TOP + tile * TILE * CELL
        parts += [text(190, y + 2.3 * CELL, f"tile {tile}")]
        for slot, block in enumerate(union):
            x = 216 + slot * CELL * 1.2
            parts += [text(x + CELL / 2, y + 0.75 * CELL - 6, block, 9, ACCENT)]
            parts += [
                box(x, y + (0.45 + 0.75 * i) * CELL, CELL, CELL * 0.75, DARK if row[block] else "#ffffff")
                for i, row in enumerate(rows)
            ]
    parts += [arrow(366, TOP + NUM_TOKENS * CELL / 2)]
    parts += [label(460, 20, "inverse: tiles of a block", 13, "bold")]
    for block in range(NUM_BLOCKS):
        tiles = [tile for tile in range(NUM_TILES) if chosen[tile * TILE : (tile + 1) * TILE, block].any()]
        y = TOP + block * CELL * 1.5
        parts += [text(424, y + 11, f"block {block}")]
        for slot, tile in enumerate(tiles):
            parts += [box(454 + slot * 20, y, 18, 15, PALE), text(463 + slot * 20, y + 11.5, tile, 10)]
    return svg(580, 216, parts)


def draw_tile_walk() -> str:
    step, chunks = 108, 4
    parts = [label(330, 18, "forward: one tile, two slices of 64 rows, a ring of three chunks", 13, "bold")]
    names = ("memory warpgroup", "warpgroup 0", "warpgroup 1")
    parts += [text(112, 52 + 52 * row, name, 11, TEXT, "end") for row, name in enumerate(names)]
    for i in range(chunks):
        x = 122 + (i * step * 0.5 if i < 3 else (i - 1.1) * step)
        parts += [
            box(x, 34, 26, 26, LIGHT),
            text(x + 13, 51, f"K{i}"),
            box(x + 26, 34, 26, 26, PALE),
            text(x + 39, 51, f"V{i}"),
        ]
    for warpgroup in range(2):
        y = 86 + 52 * warpgroup
        for i in range(chunks):
            x = 176 + i * step + warpgroup * step * 0.5
            for width, words, color in ((34, f"QK{i}", DARK), (40, "softmax", "#ffffff"), (34, f"PV{i}", ACCENT)):
                parts += [
                    box(x, y, width, 26, color),
                    text(x + width / 2, y + 17, words, 10, TEXT if color == "#ffffff" else "#ffffff"),
                ]
                x += width
    parts += [
        text(
            330,
            186,
            "A chunk goes into the slot that both warpgroups have read. While one has its softmax, the other can multiply.",
        )
    ]
    return svg(690, 200, parts)


def draw_query_gradient(chosen: np.ndarray) -> str:
    return draw_pass(
        chosen,
        tile=1,
        block=None,
        title="dQ: a tile walks its list",
        note="as the forward does: each block is read once, dQ stays in registers",
    )


def draw_key_gradient(chosen: np.ndarray) -> str:
    return draw_pass(
        chosen,
        tile=None,
        block=2,
        title="dK, dV: a block walks the tiles that chose it",
        note="a long list is cut in parts; a second kernel adds their sums",
    )


def draw_pass(chosen: np.ndarray, tile: int | None, block: int | None, title: str, note: str) -> str:
    x = 150
    parts = [label(205, 20, title, 13, "bold")]
    walked = np.zeros(chosen.shape, bool)
    if tile is not None:
        rows = slice(tile * TILE, (tile + 1) * TILE)
        walked[rows, chosen[rows].any(axis=0)] = True
        outline = frame(x, TOP + tile * TILE * CELL, NUM_BLOCKS, TILE)
    else:
        for i in range(NUM_TILES):
            rows = slice(i * TILE, (i + 1) * TILE)
            walked[rows, block] = chosen[rows, block].any()
        outline = frame(x + block * CELL, TOP, 1, NUM_TOKENS)
    colors = {0: "#ffffff", 1: LIGHT, 2: PALE, 3: DARK}
    parts += [*matrix(x, chosen + 2 * walked, colors), outline]
    parts += [text(x + (j + 0.5) * CELL, TOP - 5, j, 9) for j in range(NUM_BLOCKS)]
    parts += [text(x - 30, TOP + (i + 0.5) * TILE * CELL, f"tile {i}") for i in range(NUM_TILES)]
    if block is not None:
        cut = TOP + 2 * TILE * CELL
        parts += [
            f'<line x1="{x - 6}" y1="{cut}" x2="{x + NUM_BLOCKS * CELL + 6}" y2="{cut}" stroke="{ACCENT}" stroke-width="2.5"/>'
        ]
        parts += [
            text(x + 118, TOP + 50, "part 0", 11, ACCENT, "start"),
            text(x + 118, cut + 32, "part 1", 11, ACCENT, "start"),
        ]
    legend = ((DARK, "multiplied"), (PALE, "multiplied, then masked by its bit"), (LIGHT, "of others"))
    for i, (color, words) in enumerate(legend):
        parts += [box(310, TOP + 60 + 20 * i, CELL, CELL, color), text(330, TOP + 71 + 20 * i, words, 11, TEXT, "start")]
    return svg(540, 240, [*parts, text(205, 228, note)])


def main() -> None:
    folder, chosen = pathlib.Path(__file__).parent, choose()
    figures = dict(plan=draw_plan(chosen), tile_walk=draw_tile_walk())
    figures |= dict(query_gradient=draw_query_gradient(chosen), key_gradient=draw_key_gradient(chosen))
    for name, drawn in figures.items():
        (folder / f"{name}.svg").write_text(drawn)


if __name__ == "__main__":
    main()
