"""Times a step of decoding over keys and values in pages, one layer: all blocks, and those that Quest selects.

    python -m benchmarks.decode --kv_len=8192,32768 --budgets=16,64
    python -m benchmarks.decode --implementations=cuda --dtype=bfloat16 --batch=16 --num_q_heads=32 --num_kv_heads=8 \\
        --head_dim=128 --kv_len=131072 --budgets=64,256 --json=decode.json

Every sequence has one new token, and pages in any order. Baselines are `jax.nn.dot_product_attention` over keys that lie
together. All are first checked against the definition in float64, on one sequence and KV head: what is wrong or fails is not
timed, and the exit status is 1. The others are timed in turn, round after round, on random data. --json is written anew after
each length.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import sparse_attn_jax as sa
from benchmarks import files, machine, progress, report, timing
from benchmarks.checks import BASELINE_TOLERANCE
from benchmarks.contenders import kernels_of
from benchmarks.measure import BUGS, TIMED, WRONG, note_failure, note_late_failure
from benchmarks.selection_check import TIE_TOLERANCE
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.methods import quest as definition
from sparse_attn_jax.testing.selection_oracle import assert_same_up_to_rounding

FLAGS = flags.FLAGS
# By name: the implementation of `jax.nn.dot_product_attention`. Ratios are to the first.
BASELINES = {"dense-xla": "xla", "dense-cudnn": "cudnn"}
LEGEND = """\
ms: median, 10th and 90th percentile of the interleaved rounds. MiB read: keys and values, and the extrema that a selection
reads. GB/s: of these. x dense-xla: how many times faster than dense attention over keys that lie together."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A step of decoding: every sequence has `kv_len` tokens, its new one included."""

    batch: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    block_size: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def num_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)


@dataclasses.dataclass
class Row:
    """One contender: a line of the table and an entry of the JSON file."""

    kv_len: int
    contender: str
    budget: int | None  # blocks
    bytes_read: int
    status: str = TIMED
    reason: str | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    repeats: int = 0
    gb_per_s: float | None = None
    ratio: float | None = None  # the time of dense-xla / own


class Step:
    """The arrays of a step, and what its results have to be."""

    def __init__(self, sizes: Sizes, seed: int):
        self.sizes = sizes
        rng = np.random.default_rng(seed)
        max_pages = -(-sizes.kv_len // sizes.page_size)
        tables = rng.permutation(sizes.batch * max_pages).reshape(sizes.batch, max_pages)
        self.block_tables = jnp.asarray(tables, jnp.int32)
        pages = (tables.size, sizes.page_size, sizes.num_kv_heads, sizes.head_dim)
        keys = jax.random.split(jax.random.key(seed))  # on the device, as these are gigabytes
        self.key_pages, self.value_pages = (jax.random.normal(key, pages, sizes.dtype) for key in keys)
        query = rng.standard_normal((sizes.batch, 1, sizes.num_q_heads, sizes.head_dim))
        self.query = jnp.asarray(query, sizes.dtype)
        self.seq_lens = jnp.full((sizes.batch,), sizes.kv_len, jnp.int32)

    @property
    def pages(self) -> tuple[jax.Array, ...]:
        return self.key_pages, self.value_pages, self.block_tables, self.seq_lens

    def contiguous(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [batch, kv_len, num_kv_heads, head_dim]."""
        join = jax.jit(lambda x: x[self.block_tables].reshape(self.sizes.batch, -1, *x.shape[2:])[:, : self.sizes.kv_len])
        return join(self.key_pages), join(self.value_pages)

    def metadata(self) -> sa.QuestMetadata:
        """Of all complete blocks."""
        sizes = self.sizes
        shape = dict(batch=sizes.batch, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, dtype=sizes.dtype)
        empty = sa.QuestMetadata.create(max_len=sizes.kv_len, block_size=sizes.block_size, **shape)
        return jax.jit(sa.QuestMetadata.build)(empty, self.key_pages, self.seq_lens, block_tables=self.block_tables)

    def checked_part(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value of the first sequence and KV head, with a batch of one."""
        group = self.sizes.num_q_heads // self.sizes.num_kv_heads
        key, value = (np.asarray(x[self.block_tables[0], :, :1], np.float64) for x in (self.key_pages, self.value_pages))
        key, value = (x.reshape(1, -1, 1, self.sizes.head_dim)[:, : self.sizes.kv_len] for x in (key, value))
        return np.asarray(self.query[:1, :, :group], np.float64), key, value

    def assert_attends(self, out: jax.Array, lists: jax.Array | None) -> None:
        """Raises `AssertionError` unless `out` is attention over the listed blocks; `None` is all."""
        query, key, value = self.checked_part()
        block = np.arange(self.sizes.kv_len) // self.sizes.block_size
        seen = np.ones(block.shape, bool) if lists is None else np.isin(block, np.asarray(lists[0, 0, 0]))
        wanted = oracle.attention(np.broadcast_to(seen, (1, query.shape[2], 1, len(seen))), query, key, value)[0]
        found = np.asarray(out[:1, :, : query.shape[2]], np.float64)
        tolerance = BASELINE_TOLERANCE[self.sizes.dtype]
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())

    def assert_selects(self, lists: jax.Array, selector: sa.selectors.Quest) -> None:
        query, key, _ = self.checked_part()
        options = dict(top_k=selector.top_k, block_size=selector.block_size, num_sinks=selector.num_sink_blocks)
        wanted, scores = definition.select_all(query, key, np.array([self.sizes.kv_len - 1]), **options)
        assert_same_up_to_rounding(np.asarray(lists[:1, :1]), wanted, scores, TIE_TOLERANCE[self.sizes.dtype])


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
      row: its line, not filled in yet.
      run: makes the result of `arguments`.
      arguments: arrays.
      check: raises `AssertionError` if the result is wrong.
      cuda_arch: the CUDA kernels that it is compiled with; "" for the newest that run.
    """

    row: Row
    run: Callable[..., Any]
    arguments: tuple
    check: Callable[[Any], None]
    cuda_arch: str = ""


def contenders_of(step: Step, implementations: Sequence[tuple[str, str]], budgets: Sequence[int]) -> list[Contender]:
    """The baselines, and each implementation, a pair of name and `cuda_arch`, with each budget."""
    sizes = step.sizes
    all_bytes = sizes.batch * sizes.kv_len * sizes.token_bytes
    is_dense = lambda out: step.assert_attends(out, None)
    contiguous, metadata = step.contiguous(), step.metadata()
    found = []
    for name, implementation in BASELINES.items():
        attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        found.append(Contender(Row(sizes.kv_len, name, None, all_bytes), attend, (step.query, *contiguous), is_dense))
    for name, arch in implementations:
        title = f"{name} {arch}".rstrip()

        def attend(query, *arrays, name=name):
            block_size = None if arrays[-1] is None else sizes.block_size
            return sa.paged_block_sparse_attention(query, *arrays, selection_block_size=block_size, implementation=name)

        row = Row(sizes.kv_len, f"{title}, all blocks", None, all_bytes)
        found.append(Contender(row, attend, (step.query, *step.pages, None), is_dense, arch))
        for budget in budgets:
            selector = sa.selectors.Quest(top_k=budget, block_size=sizes.block_size)

            def select(query, metadata, selector=selector, name=name):
                return selector.select(query, metadata, seq_lens=step.seq_lens, implementation=name)

            def decode(query, metadata, *pages, select=select, attend=attend):
                lists = select(query, metadata)
                return attend(query, *pages, lists), lists

            # All attend to the same.
            lists = selector.select(step.query, metadata, seq_lens=step.seq_lens, implementation="xla")
            of_blocks = sizes.batch * min(budget, sizes.num_blocks) * sizes.block_size * sizes.token_bytes
            of_extrema = sizes.batch * sizes.num_blocks * sizes.token_bytes
            is_of_lists = lambda out, lists=lists: step.assert_attends(out, lists)
            is_selection = lambda lists, selector=selector: step.assert_selects(lists, selector)
            is_both = lambda found: step.assert_attends(*found)
            lines = (
                ("attention", of_blocks, attend, (step.query, *step.pages, lists), is_of_lists),
                ("selection", of_extrema, select, (step.query, metadata), is_selection),
                ("both", of_blocks + of_extrema, decode, (step.query, metadata, *step.pages), is_both),
            )
            for what, num_bytes, run, arguments, check in lines:
                row = Row(sizes.kv_len, f"{title}, {what}", budget, num_bytes)
                found.append(Contender(row, run, arguments, check, arch))
    return found


def is_ours(row: Row) -> bool:
    return row.contender not in BASELINES


def prepare(contender: Contender) -> timing.Call | None:
    """Compiles and checks it, and returns what to time; `None` if the row says why there is nothing."""
    row = contender.row
    progress.say(f"{row.kv_len} tokens: compiling and checking {row.contender}, {row.budget or 'all'} blocks")
    try:
        with kernels_of(contender.cuda_arch):
            compiled = jax.jit(contender.run).lower(*contender.arguments).compile()
        result = compiled(*contender.arguments)
        try:
            contender.check(result)
        except AssertionError as error:
            row.status, row.reason = WRONG, " ".join(str(error).split())[:200]
            return None
    except Exception as error:
        note_failure(row, error, is_ours=is_ours(row))
        return None
    return timing.Enqueued(lambda: compiled(*contender.arguments), jax.block_until_ready)


def measure(contenders: Sequence[Contender], *, repeats: int, seconds: float) -> list[Row]:
    """Times all that are right, in turn, and fills in their rows."""
    rows = [contender.row for contender in contenders]
    calls: dict[int, timing.Call | None] = {}
    # What fails of ours may leave the device unusable: by then the baselines are checked, and timed once.
    for turns, chosen in ((1, [i for i, row in enumerate(rows) if not is_ours(row)]), (repeats, range(len(rows)))):
        calls |= {i: prepare(contenders[i]) for i in chosen if i not in calls}
        time_rows({i: call for i, call in calls.items() if call}, rows, repeats=turns, seconds=seconds)
    for row in rows:
        if row.median_ms:
            row.gb_per_s = row.bytes_read / row.median_ms * 1e-6
            row.ratio = rows[0].median_ms / row.median_ms if rows[0].median_ms else None
    return rows


def time_rows(calls: dict[int, timing.Call], rows: Sequence[Row], *, repeats: int, seconds: float) -> None:
    """Times the calls of those rows, and fills them in."""

    def on_failure(i, error):
        note_late_failure(rows[i], error, is_ours=is_ours(rows[i]))

    times = timing.time_interleaved(calls, repeats=repeats, seconds=seconds, on_failure=on_failure)
    for i, samples in times.items():
        if rows[i].status == TIMED and rows[i].reason is None:
            vars(rows[i]).update(timing.percentiles_ms(samples), repeats=len(samples))


def format_rows(rows: Sequence[Row]) -> str:
    header = ["contender", "blocks", "ms", "p10", "p90", "MiB read", "GB/s", "x dense-xla", "note"]
    cells = []
    for row in rows:
        times = [report.number(x, ".3f") for x in (row.median_ms, row.p10_ms, row.p90_ms)]
        rates = [report.number(row.gb_per_s, ".1f"), report.number(row.ratio, ".2f")]
        note = row.reason or ""
        note = note if row.status == TIMED else f"{row.status}: {note}"
        blocks = "all" if row.budget is None else str(row.budget)
        cells.append([row.contender, blocks, *times, f"{row.bytes_read / 2**20:.1f}", *rates, note])
    return report.format_table(header, cells)


def main(argv: list[str]) -> int:
    """The exit status: 1 if a contender was wrong or failed, or nothing of ours could be timed."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if FLAGS.num_q_heads % FLAGS.num_kv_heads:
        raise app.UsageError(f"--num_kv_heads={FLAGS.num_kv_heads} must divide --num_q_heads={FLAGS.num_q_heads}.")
    described = machine.describe()
    print(f"{machine.headline(described, FLAGS.seed)}\n\n{LEGEND}", flush=True)
    archs = {"cuda": FLAGS.cuda_arch or [""]}
    implementations = [(name, arch) for name in FLAGS.implementations for arch in archs.get(name, [""])]
    names = ("batch", "num_q_heads", "num_kv_heads", "head_dim", "page_size", "block_size", "dtype")
    settings = {name: FLAGS[name].value for name in (*names, "seed")}
    rows = []
    for kv_len in FLAGS.kv_len:
        sizes = Sizes(kv_len=int(kv_len), **{name: FLAGS[name].value for name in names})
        step = Step(sizes, FLAGS.seed)
        of_length = measure(
            contenders_of(step, implementations, [int(x) for x in FLAGS.budgets]),
            repeats=FLAGS.repeats,
            seconds=FLAGS.time_limit,
        )
        print(f"\n{sizes}\n\n{format_rows(of_length)}", flush=True)
        rows += of_length
        if FLAGS.json:
            data = dict(machine=described, settings=settings, rows=[dataclasses.asdict(row) for row in rows])
            files.write_json(FLAGS.json, data)
    was_timed = any(is_ours(row) and row.status == TIMED for row in rows)
    return int(any(row.status in BUGS for row in rows) or not was_timed)


def define_flags() -> None:
    """Where this is the program: others define flags of the same names."""
    flags.DEFINE_list("implementations", ["xla"], "Of xla, cuda and mosaic.")
    flags.DEFINE_list("cuda_arch", [], "Of sm80, sm90: cuda is timed with the kernels of each; default: the newest.")
    flags.DEFINE_list("kv_len", ["8192"], "Tokens of every sequence.")
    flags.DEFINE_list("budgets", ["16", "64"], "Blocks that Quest selects.")
    flags.DEFINE_integer("batch", 4, "Sequences.", lower_bound=1)
    flags.DEFINE_integer("num_q_heads", 8, "Query heads.", lower_bound=1)
    flags.DEFINE_integer("num_kv_heads", 2, "Key and value heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 64, "Elements per head.", lower_bound=1)
    flags.DEFINE_integer("page_size", 16, "Tokens of a page.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens of a block: a multiple or a divisor of a page's.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of query, key and value.")
    flags.DEFINE_integer("repeats", 20, "Rounds of timing.", lower_bound=1)
    flags.DEFINE_float("time_limit", 60.0, "Seconds per length after which no round starts, once there are three.")
    flags.DEFINE_integer("seed", 0, "Of all data.")
    flags.DEFINE_string("json", None, "Write every figure to this file.")


if __name__ == "__main__":
    define_flags()
    logging.use_absl_handler()
    app.run(lambda argv: sys.exit(main(argv)))
