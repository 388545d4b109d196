"""What XLA makes of the Pallas kernels for an H100 and an A100: registers, spills, shared memory and products, without a GPU.

`make pallas-table` writes docs/pallas_table.md; tests/test_compiled_pallas.py compares it with a new compilation.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
TABLE = ROOT / "docs" / "pallas_table.md"
COMPILED_BY = re.compile(r"Compiled by JAX ([0-9.]+)[.]")

# Bytes that a thread may store beside its registers: a pattern of programs, a kernel, and how many.
SPILL_BYTES = (
    # The sums of 64 rows x 256 columns take 128 of the 255 registers that a thread may have, and 4 products are under way.
    ("head_dim 256", "query_gradient", 768),
    ("head_dim 192", "query_gradient", 32),
    # Addresses and numbers of the walk: scores, sums and tables of rows take all of 240 registers, and what the loop with
    # masks needs has to outlast the one without.
    ("head_dim 128", "key_gradient", 64),
    ("training step", "key_gradient", 64),
    # Beside the bias, whose gradient is summed as a matrix, up to the end.
    ("head_dim 256", "key_gradient", 224),
    # An address.
    ("head_dim 256", "attention_forward", 16),
    # Tables of rows, which are in registers there while the list is walked.
    ("A100, head_dim 128", "query_gradient", 64),
    # The sums of 64 keys, and addresses.
    ("A100, head_dim 64, blocks of 64", "key_gradient", 64),
)
COLUMNS = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "barriers", "wgmma", "mma", "cp_async")


def plugin() -> Path | None:
    """Where `make pallas-plugin` has put the CUDA plugin of this JAX."""
    import jax

    folder = ROOT / "build" / "pallas_plugin" / jax.__version__
    return folder if folder.exists() else None


def compile_programs(names: Sequence[str] = ()) -> list[dict]:
    """What `tools.pallas_programs` says of each program, all of them if there is no name."""
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(plugin())]))
    command = [sys.executable, "-m", "tools.pallas_programs", *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()]


def spill_budget(program: str, kernel: str) -> int:
    return max((size for pattern, name, size in SPILL_BYTES if kernel == name and re.search(pattern, program)), default=0)


def table(found: list[dict], version: str) -> str:
    """The Markdown page."""
    head = ["program", "kernel", "registers", "spilled bytes", "stack bytes", "shared bytes", "barriers"]
    head += ["wgmma", "mma.sync", "cp.async"]
    lines = [
        "# What XLA makes of the Pallas kernels",
        "",
        "Whole programs, compiled for an H100, or an A100 where that is said, on a machine without one: registers of a thread,",
        "bytes that it spills, shared memory and its barriers of a thread block, and in the code matrix instructions, and",
        "copies that threads start. 168 registers are what each thread of three warpgroups of an H100 starts with; those that",
        "multiply take 240 then. `make pallas-table` writes this page; a test compares it.",
        "",
        f"Compiled by JAX {version}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * 2 + " ---: |" * (len(head) - 2),
    ]
    for line in found:
        for kernel, numbers in line["kernels"].items():
            cells = [line["program"], kernel, *(numbers[name] for name in COLUMNS)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "Memory of the programs, as XLA has planned it. The training step has 4 layers of 2,048 features, 16 query and 2 KV",
        "heads of dimension 128, selects 96 blocks of 64 per token, computes each layer again in the backward, and has AdamW's",
        "moments among its arguments and results.",
        "",
        "| program | temporaries MiB | arguments MiB | results MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for line in found:
        sizes = (f"{line['bytes'][name] / 2**20:.0f}" for name in ("temporaries", "arguments", "results"))
        lines.append(f"| {line['program']} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import jax

    if plugin() is None:
        sys.exit("pallas_table: there is no CUDA plugin of this JAX; `make pallas-plugin` brings it")
    TABLE.write_text(table(compile_programs(), jax.__version__))


if __name__ == "__main__":
    main()
