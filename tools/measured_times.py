"""Takes what the benchmarks measured of our own implementations into `sparse_attn_jax/measured.json`, which the dispatch reads.

    python -m tools.measured_times benchmarks/results/DEVICE.json ...

Of attention it takes forward and backward together. A case replaces the same case of an earlier run on the same kind of device.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from sparse_attn_jax import dispatch, measured

TABLE = Path(measured.__file__).with_name(measured.FILE)
MODES = dict(attention="forward_backward", selection="forward")


def rows_of(results: dict) -> Iterator[dict]:
    """The rows that a file of results has to give: of cases that two implementations or more were timed on."""
    for section in results["sections"]:
        for workload in section["workloads"]:
            case, selector = workload["case"], workload["selector"] or {}
            for op, mode in MODES.items():
                times = {
                    # A selector's contender is named as "InfLLMV2 cuda".
                    row["contender"].split()[-1]: row["median_ms"]
                    for row in workload["rows"]
                    if (row["op"], row["mode"], row["status"]) == (op, mode, "timed") and row["kind"] != "baseline"
                }
                times = {name: time for name, time in times.items() if name in dispatch.IMPLEMENTATIONS}
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
