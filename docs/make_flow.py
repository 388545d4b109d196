"""Draws docs/flow.svg: the four steps on a small causal example. Run it from anywhere: `python docs/make_flow.py`."""

import pathlib

import numpy as np

CELL, NUM_TOKENS, NUM_BLOCKS, TOP_K = 13, 12, 6, 3
DARK, LIGHT, GRID, TEXT = "#1f5f8b", "#9cc5e0", "#c9c9c9", "#444444"
BLOCK_SIZE = NUM_TOKENS // NUM_BLOCKS


def square(x: float, y: float, color: str, width: float = CELL) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{CELL}" fill="{color}" stroke="{GRID}" stroke-width="0.6"/>'
    )


def label(x: float, y: float, text: str, size: int = 12, weight: str = "normal") -> str:
    style = f'font-family="sans-serif" font-size="{size}" font-weight="{weight}" fill="{TEXT}" text-anchor="middle"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'


def shade(value: float) -> str:
    low, high = np.array([255, 255, 255]), np.array([31, 95, 139])
    red, green, blue = (low + (high - low) * value).astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def arrow(x: float, y: float) -> str:
    line = f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" stroke="{TEXT}" stroke-width="1.6"/>'
    return line + f'<path d="M{x + 22} {y - 4} l8 4 l-8 4 z" fill="{TEXT}"/>'


def panel(x: float, title: str, caption: str, cells: list[str], width: float) -> list[str]:
    return [label(x + width / 2, 22, title, 14, "bold"), label(x + width / 2, 222, caption, 11), *cells]


def score_cells(x: float, scores: np.ndarray, width: float) -> list[str]:
    rows, columns = scores.shape
    return [
        square(x + j * width, 40 + i * CELL, "#f3f3f3" if np.isnan(scores[i, j]) else shade(scores[i, j]), width)
        for i in range(rows)
        for j in range(columns)
    ]


def select(scores: np.ndarray) -> np.ndarray:
    """First and own block forced, the best others: bool [tokens, blocks]."""
    chosen = np.zeros(scores.shape, bool)
    for token, row in enumerate(scores):
        own = token // BLOCK_SIZE
        rank = np.where(np.isnan(row), -1, row)
        rank[[0, own]] = 2
        chosen[token, np.argsort(-rank, kind="stable")[: min(TOP_K, own + 1)]] = True
    return chosen


def attended_cells(x: float, chosen: np.ndarray) -> list[str]:
    cells = []
    for i in range(NUM_TOKENS):
        for j in range(NUM_TOKENS):
            seen = j <= i and chosen[i, j // BLOCK_SIZE]
            cells.append(square(x + j * CELL, 40 + i * CELL, DARK if seen else "#ffffff"))
    return cells


def draw() -> str:
    rng = np.random.default_rng(3)
    blocks, tokens = np.arange(NUM_BLOCKS), np.arange(NUM_TOKENS)
    scores = rng.random((NUM_TOKENS, NUM_BLOCKS)) ** 1.6
    scores[blocks[None] > tokens[:, None] // BLOCK_SIZE] = np.nan
    chosen = select(scores)
    wide = CELL * BLOCK_SIZE
    full = NUM_TOKENS * CELL
    parts = []
    keys = [square(20, 40 + i * CELL, LIGHT, 60) for i in tokens]
    parts += panel(10, "compress", "keys → units", keys, 80)
    parts += [arrow(94, 40 + full / 2)]
    parts += panel(134, "score, reduce", "query × block", score_cells(134, scores, wide), full)
    parts += [arrow(300, 40 + full / 2)]
    marks = [square(340 + j * wide, 40 + i * CELL, LIGHT if chosen[i, j] else "#ffffff", wide) for i in tokens for j in blocks]
    parts += panel(340, "select", f"top {TOP_K}, first and own forced", marks, full)
    parts += [arrow(506, 40 + full / 2)]
    parts += panel(546, "attend", "only selected blocks", attended_cells(546, chosen), full)
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 236" width="720">\n{body}\n</svg>\n'


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("flow.svg").write_text(draw())
