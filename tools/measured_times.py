"""Takes what the benchmarks measured of our own implementations into `sparse_attn_jax/measured.json`, which the dispatch reads.

    python -m tools.measured_times benchmarks/results/DEVICE.json ...

Of attention it takes forward and backward together. A case replaces the same case of an earlier run on the same kind of device.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparse_attn_jax import dispatch, measured

TABLE = Path(measured.__file__).with_name(measured.FILE)
MODES = dict(attention="forward_backward", selection="forward")
# A contender's name: a selector's, if it is one, an implementation's, and the CUDA kernels that it ran if they were asked for.
# What is named otherwise is none of an implementation as the dispatch runs it.
CONTENDER = re.compile(r"(?:InfLLMV2 )?(\w+)(?: sm(\d+))?")


def rows_of(results: dict) -> Iterator[dict]:
    """The rows that a file of results has to give: of cases that two implementations or more were timed on."""
    for section in results["sections"]:
        for workload in section["workloads"]:
            case, selector = workload["case"], workload["selector"] or {}
            for op, mode in MODES.items():
                times = times_of(row for row in workload["rows"] if (row["op"], row["mode"]) == (op, mode))
                if len(times) < 2:
                    continue
                yield dict(
                    op=op,
                    device_kind=results["machine"]["device"],
                    dtype=case["dtype"],
                    head_dim=case["head_dim"],
                    group_size=case["num_q_heads"] // case["num_kv_heads"],
                    kv_block_size=case["kv_block_size"] if op == "attention" else selector["block_size"],
                    per_token=op == "selection" or case["q_block_size"] == 1,
                    kv_len=case["kv_len"],
                    milliseconds=times,
                )


def times_of(rows: Iterable[dict]) -> dict[str, float]:
    """Milliseconds by implementation, of the newest of its kernels that can run: the dispatch would take no others."""
    newest = {}
    for row in rows:
        name = CONTENDER.fullmatch(row["contender"])
        if (
            name is None
            or name[1] not in dispatch.IMPLEMENTATIONS
            or row["kind"] == "baseline"
            or row["status"] == "cannot run"
        ):
            continue
        arch = int(name[2] or 0)
        if arch >= newest.get(name[1], (0, None))[0]:
            newest[name[1]] = arch, row
    return {name: row["median_ms"] for name, (_, row) in newest.items() if row["status"] == "timed"}


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Both, the new one where they are of the same case and length; in order."""
    identity = lambda row: tuple(str(row[field]) for field in measured.CASE) + (row["kv_len"],)
    merged = {identity(row): row for row in [*old, *new]}
    return [merged[key] for key in sorted(merged)]


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit(__doc__)
    rows = json.loads(TABLE.read_text())
    for path in paths:
        new = list(rows_of(json.loads(Path(path).read_text())))
        print(f"{path}: {len(new)} cases that two implementations or more were timed on")
        rows = merge(rows, new)
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
