"""How much attention each selector keeps, beside the best choice of as many keys: tables and figures of docs/methods.md.

    python -m benchmarks.recall --docs=docs/methods.md              # some minutes on two CPU cores
    python -m benchmarks.recall --methods=InfLLMV2,Quest --patterns=needle,drift --json=recall.json

Every method runs with several budgets on queries and keys of four made patterns and of a small language model's layers on
held-out text (`--checkpoint` keeps the model; it is trained if there is none).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from benchmarks import recall_docs, recall_figures
from benchmarks.machine import describe as describe_machine
from benchmarks.progress import Progress
from benchmarks.recall_inputs import Pattern, Sizes, make_patterns, text_pattern
from benchmarks.recall_measure import Recall, attend_densely, keys_seen, measure
from benchmarks.recall_methods import METHODS, Method

PATTERNS = ("text", "needle", "stride", "drift", "field")

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with one budget on one pattern."""

    method: str
    budget: str
    pattern: str
    recall: Recall


def run(methods: Sequence[Method], patterns: Sequence[Pattern]) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row per method, budget and pattern that go together, and a picture per method of what its middle budget sees."""
    rows, pictures = [], {}
    todo = [(pattern, method) for pattern in patterns for method in methods if method.takes(pattern)]
    bar = Progress(sum(len(method.budgets) for _, method in todo), "recall")
    for pattern in patterns:
        dense = attend_densely(pattern)
        for _, method in (pair for pair in todo if pair[0] is pattern):
            budgets = list(method.budgets)
            for budget in budgets:
                bar.step(f"{method.name} {budget} on {pattern.name}")
                attend, sizes = method.prepare(pattern, budget)
                recall = measure(pattern, dense, attend, *sizes, method.counted(pattern))
                rows.append(Row(method.name, budget, pattern.name, recall))
                # The last pattern that a method takes is not the one that shows most.
                if budget == budgets[len(budgets) // 2] and pattern.name in ("drift", "field"):
                    pictures[method.name] = keys_seen(pattern, attend)
    bar.close()
    return rows, pictures


def chosen_patterns(names: Sequence[str]) -> list[Pattern]:
    sizes = Sizes(length=FLAGS.length)
    made = [pattern for pattern in make_patterns(sizes, FLAGS.seed) if pattern.name in names]
    if "text" not in names:
        return made
    return [text_pattern(Path(FLAGS.checkpoint), steps=FLAGS.steps, length=FLAGS.length), *made]


def check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise app.UsageError(f"--{flag} has {unknown}; known are {', '.join(known)}.")


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    logging.set_verbosity(logging.WARNING)
    check_names("methods", FLAGS.methods, [method.name for method in METHODS])
    check_names("patterns", FLAGS.patterns, PATTERNS)
    methods = [method for method in METHODS if not FLAGS.methods or method.name in FLAGS.methods]
    rows, pictures = run(methods, chosen_patterns(FLAGS.patterns))
    machine = describe_machine()
    if FLAGS.json:
        data = dict(machine=machine, length=FLAGS.length, seed=FLAGS.seed, rows=[dataclasses.asdict(row) for row in rows])
        Path(FLAGS.json).write_text(json.dumps(data, indent=1) + "\n")
    if FLAGS.docs:
        docs = Path(FLAGS.docs)
        figures = docs.parent / docs.stem
        figures.mkdir(exist_ok=True)
        for method in methods:
            own = [row for row in rows if row.method == method.name]
            recall_figures.draw_method(figures / f"{method.name}.png", method.name, own, pictures.get(method.name))
        docs.write_text(recall_docs.with_tables(docs.read_text(), rows, figures.name))
    else:
        print(recall_docs.format_rows(rows))


if __name__ == "__main__":
    flags.DEFINE_list("methods", [], "Names of methods; all if empty.")
    flags.DEFINE_list("patterns", list(PATTERNS), "Names of patterns.")
    flags.DEFINE_integer("length", 2048, "Tokens of the patterns.", lower_bound=128)
    flags.DEFINE_integer("seed", 0, "Of the made patterns.")
    flags.DEFINE_string("checkpoint", "demo_out/dense_lm.msgpack", "Of the language model.")
    flags.DEFINE_integer("steps", 400, "Of the language model's training, if it has to be trained.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for the results.")
    flags.DEFINE_string("docs", None, "Markdown file whose tables and figures are to be written anew.")
    app.run(main)
