"""The tables of docs/methods.md. The text between them is written by hand."""

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.report import format_table

HEADER = ["budget", "pattern", "density", "mass kept", "best blocks", "output error"]
# A method's place in the document.
SECTION = re.compile(r"(<!-- recall: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def cells(row: Any) -> list[str]:
    recall = row.recall
    shares = (recall.density, recall.mass, recall.best_mass)
    return [row.budget, row.pattern, *(f"{100 * share:.1f}%" for share in shares), f"{recall.error:.3f}"]


def format_rows(rows: Sequence[Any]) -> str:
    """All rows, with the name of the method."""
    return format_table(["method", *HEADER], [[row.method, *cells(row)] for row in rows])


def with_tables(text: str, rows: Sequence[Any], figures: str) -> str:
    """The document with the figure and the table of every method that `rows` has.

    Raises:
      ValueError: a method has no place in the document.
    """
    by_method: dict[str, list[Any]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    if missing := sorted(set(by_method) - {name for _, name, _ in SECTION.findall(text)}):
        raise ValueError(f"The document has no `<!-- recall: NAME -->` for {', '.join(missing)}.")

    def write(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in by_method:
            return match.group()
        table = format_table(HEADER, [cells(row) for row in by_method[name]])
        return f"{start}![{name}]({figures}/{name}.png)\n\n{table}\n{end}"

    return SECTION.sub(write, text)
