"""The committed report: how many mutants of each source there are, what became of them, and why the survivors are harmless."""

import hashlib
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

from sparse_attn_jax.implementations.cuda import host_sim
from tools.mutants import rules
from tools.mutants.build import CSRC, mutated_sources
from tools.mutants.rules import Mutant

REPORT = host_sim.ROOT / "docs" / "mutants.md"
REASONS = Path(__file__).parent / "reasons.toml"  # by mutant: why no test can tell it from the sources

SURVIVED = "survived"
VERDICTS = ("simulator", "wrong result", "crash", "timeout", "does not compile", SURVIVED)
NOT_TESTED = "not tested"

HEAD = """\
# Mutants of the CUDA kernels

`make mutants` breaks the kernels' sources one change at a time: each wait, fence, barrier and arrival removed, or a wait that
waits for less; each condition always true and always false, each operand of a guard dropped, each choice made always one way.
Each mutant is compiled for the simulator and put through calls like those of `tests/test_cuda*_on_cpu.py` and
`tests/test_varlen.py` (`tools/mutants/*checks.py`), until one of them notices. What follows is written by that command;
`make mutants ARGS=--check` tells whether it is about the present sources. A survivor either has its reason in
`tools/mutants/reasons.toml`, or is a missing test. `ARGS=--all` also tests what can be wrong in other ways (a statement less,
`<` for `<=`, no `%`, no factor), and writes no report.

"simulator" counts the mutants that the simulator itself reported: a race, an access out of bounds, a deadlock, a copy that was
not waited for. The last column is a digest of the source's list of mutants.
"""


# What the report is about. The rest, `make mutants ARGS=--all`, takes as long again.
REPORTED = (rules.SYNCHRONIZATION, rules.GUARD)


def all_mutants(kinds: Collection[str] = REPORTED) -> dict[str, list[Mutant]]:
    """By path."""
    found = {}
    for path in mutated_sources():
        name = str(path.relative_to(CSRC))
        found[name] = [mutant for mutant in rules.find_mutants(name, path.read_text()) if mutant.kind in kinds]
    return found


def digest_of(mutants: list[Mutant]) -> str:
    return hashlib.sha256("\n".join(mutant.id for mutant in mutants).encode()).hexdigest()[:12]


def read_reasons() -> dict[str, str]:
    return tomllib.loads(REASONS.read_text())


def report_text(mutants: Mapping[str, list[Mutant]], verdicts: Mapping[str, str | None], reasons: Mapping[str, str]) -> str:
    rows = [("source", "mutants", *VERDICTS, NOT_TESTED, "digest")]
    for path, of_path in mutants.items():
        found = [verdicts[mutant.id] for mutant in of_path]
        counts = (found.count(verdict) for verdict in (*VERDICTS, None))
        rows.append((path, len(found), *counts, f"`{digest_of(of_path)}`"))
    sums = [sum(column) for column in list(zip(*rows[1:]))[1:-1]]
    rows.append(("all", *sums, ""))
    lines = [HEAD, *table(rows), "", "## Survivors"]
    for path, of_path in mutants.items():
        survivors = [mutant for mutant in of_path if verdicts[mutant.id] == SURVIVED]
        for function in dict.fromkeys(mutant.function for mutant in survivors):
            lines += ["", f"### {path}, {function}"]
            for mutant in survivors:
                if mutant.function == function:
                    lines += ["", *survivor_lines(mutant, reasons.get(mutant.id, "**none**"))]
    return "\n".join(lines) + "\n"


def survivor_lines(mutant: Mutant, reason: str) -> list[str]:
    before, after = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    change = f"`{before}` removed" if after in ("", ";") else f"`{before}` becomes `{after}`"
    return [f"- `{mutant.id}`: {change} in", f"  `{mutant.line}`", f"  Reason: {reason}"]


def table(rows: list[tuple]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def survivors_in(report: str) -> dict[str, str]:
    """The reason of each survivor in a report's text, by mutant."""
    return dict(re.findall(r"^- `([^`]+)`: .*\n.*\n  Reason: (.*)$", report, re.MULTILINE))


def problems(report: str, mutants: Mapping[str, list[Mutant]], reasons: Mapping[str, str]) -> list[str]:
    """What keeps a report from being one about these mutants, with a reason for each survivor."""
    found = []
    digests = dict(re.findall(r"^\| (\S+/\S+) .*`(\w+)` +\|$", report, re.MULTILINE))
    untested = dict(re.findall(r"^\| (\S+/\S+) .* (\d+) +\| `\w+` +\|$", report, re.MULTILINE))
    for path in sorted(mutants.keys() | digests.keys()):
        if path not in mutants or digests.get(path) != digest_of(mutants[path]):
            found.append(f"the report is not about the present {path}; run `make mutants`")
        elif untested[path] != "0":
            found.append(f"{untested[path]} mutants of {path} are not tested; run `make mutants`")
    survivors = survivors_in(report)
    for name, reason in survivors.items():
        if reason == "**none**":
            found.append(f"{name} survived, and {REASONS.name} has no reason: write a test that notices it, or the reason")
    for name in sorted(reasons.keys() - survivors.keys()):
        found.append(f"{REASONS.name} has a reason for {name}, which is no survivor")
    return found
