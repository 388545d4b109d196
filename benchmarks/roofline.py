"""Predicts the speed of the attention kernels from what they load, store and multiply, without a GPU.

The model, its ceilings and how it is checked: docs/performance.md, whose tables this command writes.

Examples:

    # All tables, the document and its figure: about a minute.
    python -m benchmarks.roofline --docs=docs/performance.md --plot=docs/performance.png --json=roofline.json

    # One length of the table.
    python -m benchmarks.roofline --case=128k

    # A case of sparse_attn_jax.testing.cases, with its own lists.
    python -m benchmarks.roofline --case=group16_bf16_d128
"""

import dataclasses
import json
from pathlib import Path

from absl import app, flags, logging

from benchmarks import plot, roofline_plot
from benchmarks.progress import Progress
from benchmarks.roofline_tables import (
    BACKWARD,
    BLOCK_CASES,
    DENSITY,
    FORWARD,
    GENERATORS,
    KERNELS,
    TILE_TOKENS,
    TOKEN_CASES,
    Entry,
    block_section,
    check_section,
    entries_of,
    goal_sections,
    selection_section,
    tile_section,
)
from benchmarks.tile_lists import lists_of_case, lists_of_density, sample_lists
from sparse_attn_jax.testing.cases import CASES, case_named

# What the document's tables stand between.
BEGIN, END = "<!-- begin: written by python -m benchmarks.roofline -->", "<!-- end -->"

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Where this is the program: others define flags of the same names."""
    flags.DEFINE_string(
        "case",
        None,
        f"One of {', '.join([*TOKEN_CASES, *BLOCK_CASES])}, or a case of sparse_attn_jax.testing.cases; default: all.",
    )
    flags.DEFINE_string("json", None, "Write every predicted figure to this file.")
    flags.DEFINE_string("plot", None, "Write the predicted limits by length to this PNG file (needs matplotlib).")
    flags.DEFINE_string("docs", None, "Rewrite the tables of this Markdown file.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_flags()
    if FLAGS.case:
        entries, text = predict_case(FLAGS.case)
        print(text)
    else:
        entries, text = predict_all()
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps([entry_data(entry) for entry in entries], indent=1) + "\n")
    if FLAGS.plot:
        roofline_plot.write_plot(FLAGS.plot, entries)
    if FLAGS.docs:
        path = Path(FLAGS.docs)
        path.write_text(with_tables(path.read_text(), text))


def check_flags() -> None:
    known = [*TOKEN_CASES, *BLOCK_CASES, *(case.name for case in CASES)]
    if FLAGS.case and FLAGS.case not in known:
        raise app.UsageError(f"--case={FLAGS.case} is not known; known are {', '.join(known)}.")
    if FLAGS.case and (FLAGS.docs or FLAGS.plot):
        raise app.UsageError("--docs and --plot show all cases; leave out --case.")
    if FLAGS.plot and (reason := plot.why_not()):
        raise app.UsageError(reason)


def predict_all() -> tuple[list[Entry], str]:
    """Prints each table when it is there."""
    entries: list[Entry] = []
    texts: list[str] = []

    def add(text):
        texts.append(text)
        print(f"{text}\n", flush=True)

    progress = Progress(len(TOKEN_CASES) + len(BLOCK_CASES) + 1, "predicting")
    add(check_section())
    progress.step("InfLLM-v2's schedule")
    for name in (*TOKEN_CASES, *BLOCK_CASES):
        found, text = predict_case(name)
        entries += found
        add(text)
        progress.step(name)
    progress.close()
    add(goal_sections(entries))
    add(selection_section(entries))
    return entries, "\n\n".join(texts)


def predict_case(name: str) -> tuple[list[Entry], str]:
    """A case's predictions, and its tables."""
    if name in BLOCK_CASES:
        case = BLOCK_CASES[name]
        lists = lists_of_density(case, DENSITY)
        # A tile is a part of a query block, whole, or two of them.
        entries = list(entries_of(case, "random", lists, tuple(FORWARD), (64, 128)))
        return entries, block_section(entries)
    if name in TOKEN_CASES:
        case, tile_tokens = TOKEN_CASES[name], TILE_TOKENS
        lists = {generator: sample_lists(case, generator) for generator in GENERATORS}
    else:
        case = case_named(name)
        tile_tokens = tuple(tokens for tokens in TILE_TOKENS if tokens <= case.q_len)
        lists = {case.indices: lists_of_case(case)}
    entries = [x for kind in lists for x in entries_of(case, kind, lists[kind], KERNELS, tile_tokens)]
    title = f"{case.q_len:,} tokens x {case.batch}: {{}}, predicted milliseconds and limit by tokens per tile"
    tables = [tile_section(title.format(what), entries, tuple(names)) for what, names in PASSES.items()]
    return entries, "\n\n".join(tables)


PASSES = {"forward": FORWARD, "backward": BACKWARD}


def with_tables(document: str, tables: str) -> str:
    """The document with new text between its two marks."""
    before, rest = document.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def entry_data(entry: Entry) -> dict:
    found = entry.prediction
    sizes = {name: getattr(entry.case, name) for name in ("q_len", "kv_len", "batch", "q_block_size", "kv_block_size")}
    schedule = {name: getattr(entry.schedule, name) for name in ("tokens", "rows", "keys", "warps", "shared_bytes")}
    names = dict(kernel=entry.kernel, device=KERNELS[entry.kernel].device.name, lists=entry.lists)
    data = dict(**names, **sizes, **schedule, blocks_walked=entry.union)
    if found is None:
        return data | dict(predicted=None)
    limits = {f"{name}_ms": 1e3 * float(seconds) for name, seconds in found.limits.items()}
    counts = {name: float(value) for name, value in dataclasses.asdict(found.counts).items()}
    return data | dict(predicted=dict(ms=entry.ms, limit=found.limit, ctas_per_sm=found.ctas_per_sm, **limits, **counts))


if __name__ == "__main__":
    # JAX and matplotlib log what they look for.
    logging.set_verbosity(logging.WARNING)
    define_flags()
    app.run(main)
