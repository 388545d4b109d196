"""Times block-sparse attention, and the selection of blocks, side by side with other people's attention.

Every contender's result is first checked against the definition in float64 (where sizes are large on sampled queries, where
they are very large on those of one batch row and KV head, which the table then says); one that is wrong, or fails, is
reported, not timed, and the exit status is 1. The others are timed in turn, round after round, on random data; a sweep of
lengths is timed in the same rounds. A baseline that cannot run says why in the table. --json is written anew after each.

Baselines: dense-xla and dense-cudnn are jax.nn.dot_product_attention, dense-mgpu is JAX's own FlashAttention-3 in Pallas,
torch-sdpa is scaled_dot_product_attention (all four attend to everything that causality allows); torch-flex is compiled
flex_attention on the very same selection.

Examples:

    # The table of docs/measured.md.
    python -m benchmarks.run --preset=readme --json=readme.json

    # Blocks of queries, forward only, against flex_attention.
    python -m benchmarks.run --q_len=8192 --num_q_heads=4 --num_kv_heads=4 --q_block_size=64 --num_slots=8 \\
        --generator=local --mode=forward --baselines=torch-flex,torch-sdpa

    # How time grows with the length, as numbers and as a figure.
    python -m benchmarks.run --q_len=4096,8192,16384 --baselines=dense-xla --plot=growth.png

    # What choosing the blocks costs, beside the attention to them.
    python -m benchmarks.run --op=both --q_len=32768 --num_slots=96 --num_local_blocks=32 --mode=forward --baselines=

    # Named cases of sparse_attn_jax.testing.cases.
    python -m benchmarks.run --cases=group1,odd_prefix --repeats=3

Memory at long context, without running anything: python -m benchmarks.memory
"""

import sys
from collections.abc import Iterator

import jax
from absl import app, flags, logging

import sparse_attn_jax as sa
from benchmarks import files, machine, memory, plot, report
from benchmarks.contenders import FORWARD, FORWARD_BACKWARD
from benchmarks.measure import BUGS, TIMED, Outcome, Settings, measure
from benchmarks.presets import BASELINES, BOTH_PASSES, Section, make_contenders, readme_sections
from benchmarks.workloads import Workload, named_workload, sized_case
from sparse_attn_jax import jax_compat
from sparse_attn_jax.testing.cases import CASES

IMPLEMENTATIONS = ("xla", "mosaic", "cuda")
CUDA_ARCHS = ("sm80", "sm90")
# Edges of a matmul that is long enough to reach the speed of the device, by platform.
MATMUL_SIZES = dict(cpu=2048, gpu=8192)

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "preset", None, ["readme"], "A fixed set of workloads; sizes, op, mode, baselines, cuda_arch and cases are then not read."
)
flags.DEFINE_enum("op", "attention", ["attention", "selection", "both"], "What to time. `both`: attend to what was selected.")
flags.DEFINE_list("implementations", ["xla"], f"Our contenders, of {', '.join(IMPLEMENTATIONS)}.")
flags.DEFINE_list("cuda_arch", [], f"Of {', '.join(CUDA_ARCHS)}: cuda is timed with the kernels of each; default: the newest.")
flags.DEFINE_boolean("mosaic_configs", False, "Also mosaic with every configuration of its kernels that fits: a sweep.")
flags.DEFINE_list("baselines", list(BASELINES), f"Of {', '.join(BASELINES)}; empty for none.")
flags.DEFINE_list("cases", [], "Names of cases in sparse_attn_jax/testing/cases.py, in place of sizes.")
flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1)
flags.DEFINE_list("q_len", ["4096"], "Query tokens; several lengths are a sweep, which also prints the growth per doubling.")
flags.DEFINE_integer("kv_len", None, "Key tokens; as many as queries by default.", lower_bound=1)
flags.DEFINE_integer("num_q_heads", 8, "Query heads.", lower_bound=1)
flags.DEFINE_integer("num_kv_heads", 2, "Key and value heads.", lower_bound=1)
flags.DEFINE_integer("head_dim", 64, "Elements per head.", lower_bound=1)
flags.DEFINE_integer("q_block_size", 1, "Query tokens that share a list; 1 is a list per token.", lower_bound=1)
flags.DEFINE_integer("kv_block_size", 64, "Key tokens per block.", lower_bound=1)
flags.DEFINE_integer("num_slots", 16, "Blocks per list; the selector's top_k.", lower_bound=1)
flags.DEFINE_integer("num_sink_blocks", 1, "Leading blocks that the selector always keeps.", lower_bound=0)
flags.DEFINE_integer("num_local_blocks", 2, "Latest blocks that the selector always keeps.", lower_bound=1)
flags.DEFINE_boolean("causal", True, "Whether queries see only keys up to their own position.")
flags.DEFINE_enum("mode", "both", [FORWARD, FORWARD_BACKWARD, "both"], "Which passes to time.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16", "float64"], "Of query, key and value.")
flags.DEFINE_enum("generator", "realistic", ["random", "realistic", "local"], "How lists are drawn, or a selector's data.")
flags.DEFINE_integer("repeats", 20, "Rounds of timing.", lower_bound=1)
flags.DEFINE_float("time_limit", 60.0, "Seconds of timing per workload after which no round starts, once there are three.")
flags.DEFINE_integer("dense_max_len", 16384, "Dense baselines run up to this length (and only if they fit into memory).")
flags.DEFINE_integer(
    "matmul_size", None, f"Edge of the square matmul that speeds are compared with; default: {MATMUL_SIZES}.", lower_bound=1
)
flags.DEFINE_integer("seed", 0, "Of all data.")
flags.DEFINE_string("json", None, "Write every figure to this file.")
flags.DEFINE_string("plot", None, "Write time against length to this PNG file (needs matplotlib).")


@flags.multi_flags_validator(["implementations", "cuda_arch", "baselines", "cases", "q_len"], "")
def check_lists(values: dict[str, list[str]]) -> bool:
    known = dict(
        implementations=IMPLEMENTATIONS, cuda_arch=CUDA_ARCHS, baselines=BASELINES, cases=[case.name for case in CASES]
    )
    for flag, names in known.items():
        if unknown := sorted(set(values[flag]) - set(names)):
            raise flags.ValidationError(f"--{flag} has {unknown}; known are {', '.join(names)}.")
    if not values["q_len"] or not all(x.isdecimal() and int(x) > 0 for x in values["q_len"]):
        raise flags.ValidationError(f"--q_len is {values['q_len']}; it must be positive integers.")
    return True


def main(argv: list[str]) -> int:
    """The exit status: 1 if a contender was wrong or failed, or nothing could be timed."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_flags()
    machine_data = machine.describe()
    headline = machine.headline(machine_data, FLAGS.seed)
    print(f"{headline}\n\n{report.LEGEND}", flush=True)
    is_readme = FLAGS.preset == "readme"
    sections = readme_sections(FLAGS.seed, FLAGS.implementations, FLAGS.dense_max_len) if is_readme else [section_of_flags()]
    matmul_size = FLAGS.matmul_size or MATMUL_SIZES.get(jax.default_backend(), MATMUL_SIZES["cpu"])
    settings = Settings(FLAGS.repeats, FLAGS.time_limit, FLAGS.seed, matmul_size)
    results: list[tuple[str, list[Outcome]]] = []

    def write(found_memory=()):
        if FLAGS.json:
            files.write_json(FLAGS.json, report.as_data(machine_data, FLAGS.seed, results, found_memory))

    for section in sections:
        results.append((section.title, []))
        for outcome in run_section(section, settings):
            results[-1][1].append(outcome)
            write()
    write(report_memory() if is_readme else ())
    if FLAGS.plot:
        plot.write_plot(FLAGS.plot, results, headline)
    return exit_status([outcome for _, outcomes in results for outcome in outcomes])


def check_flags() -> None:
    """What can be wrong with flags that are right one by one, said before the long run."""
    if FLAGS.plot and (reason := plot.why_not()):
        raise app.UsageError(reason)
    if FLAGS.cuda_arch and "cuda" not in FLAGS.implementations:
        raise app.UsageError(f"--cuda_arch={','.join(FLAGS.cuda_arch)} needs cuda among --implementations.")
    if FLAGS.mosaic_configs and (FLAGS.op == "selection" or FLAGS.cases or not jax_compat.HAS_MOSAIC_GPU):
        raise app.UsageError("--mosaic_configs is of attention of explicit sizes, and needs JAX 0.11 or newer.")
    if FLAGS.op != "attention" and FLAGS.cases:
        raise app.UsageError("--cases come with their own lists; --op=selection and --op=both need explicit sizes.")
    if FLAGS.num_q_heads % FLAGS.num_kv_heads:
        raise app.UsageError(f"--num_kv_heads={FLAGS.num_kv_heads} must divide --num_q_heads={FLAGS.num_q_heads}.")


def section_of_flags() -> Section:
    contenders = make_contenders(FLAGS.op, FLAGS.implementations, FLAGS.baselines, FLAGS.dense_max_len, FLAGS.cuda_arch)
    modes = BOTH_PASSES if FLAGS.mode == "both" else (FLAGS.mode,)
    if FLAGS.op == "selection":
        modes = (FORWARD,)
    if FLAGS.cases:
        return Section("Named cases", tuple(named_workload(name, FLAGS.seed) for name in FLAGS.cases), contenders, modes)
    workloads = tuple(sized_workload(int(q_len)) for q_len in FLAGS.q_len)
    if FLAGS.mosaic_configs:
        from benchmarks.mosaic_configs import contenders_for  # needs JAX 0.11

        contenders += contenders_for(workloads[0].case)
    return Section(f"--op={FLAGS.op}", workloads, contenders, modes, is_sweep=True)


def sized_workload(q_len: int) -> Workload:
    names = (
        "batch",
        "kv_len",
        "num_q_heads",
        "num_kv_heads",
        "head_dim",
        "q_block_size",
        "kv_block_size",
        "num_slots",
        "dtype",
    )
    sizes = {name: FLAGS[name].value for name in names}
    case = sized_case(q_len=q_len, indices=FLAGS.generator, is_causal=FLAGS.causal, seed=FLAGS.seed, **sizes)
    if FLAGS.op == "attention":
        return Workload(case)
    selector = sa.selectors.InfLLMV2(
        top_k=FLAGS.num_slots,
        block_size=FLAGS.kv_block_size,
        num_sink_blocks=FLAGS.num_sink_blocks,
        num_local_blocks=FLAGS.num_local_blocks,
    )
    return Workload(case, selector, FLAGS.generator)


def run_section(section: Section, settings: Settings) -> Iterator[Outcome]:
    """Measures a section, printing each table as soon as it is there."""
    print(f"\n## {section.title}\n" + (f"Goal: {section.goal}.\n" if section.goal else ""), flush=True)
    outcomes = []
    for workloads in [section.workloads] if section.is_sweep else [(workload,) for workload in section.workloads]:
        for outcome in measure(workloads, section.contenders, section.modes, settings):
            outcomes.append(outcome)
            print(f"{report.format_outcome(outcome, settings.matmul_size)}\n", flush=True)
            yield outcome
    print("\n".join(f"- {line}" for line in report.summarize(outcomes)), flush=True)


def report_memory() -> list[dict[str, int]]:
    found = memory.analyze_all()
    print(f"\n## Memory\n{memory.__doc__.splitlines()[0]}\n\n{memory.format_memory(found)}", flush=True)
    return found


def exit_status(outcomes: list[Outcome]) -> int:
    rows = [row for outcome in outcomes for row in outcome.rows]
    for row in rows:
        if row.status in BUGS:
            print(f"{row.status}: {row.case}: {row.contender} {row.mode}: {row.reason}", file=sys.stderr)
    return int(any(row.status in BUGS for row in rows) or not any(row.status == TIMED for row in rows))


if __name__ == "__main__":
    # JAX and matplotlib log what they look for.
    logging.set_verbosity(logging.WARNING)
    app.run(main)
