"""Everything that needs an NVIDIA GPU, in stages that can be run alone. Needs no network.

    python -m benchmarks.gpu_suite --out=gpu_results
    python -m benchmarks.gpu_suite --out=gpu_results --stage=build,conformance --archive=gpu_results.tar.gz

Stages, in the order of what is to be known first:

  build         compiles the CUDA kernels for this GPU, beside the package. Needs nvcc, CMake, Ninja and pybind11.
  conformance   the tests of the kernels, which elsewhere run in a simulator, on the GPU; but for those of random calls.
  tokens_32768  a size of InfLLM-v2's published times, with a list per token: times beside dense attention by cuDNN and
                flex_attention by torch, after a check of every result.
  blocks_all    the same with a list per block of queries, of all blocks.
  selection     the selection beside the attention to what it chose.
  decoding      a step of decoding from pages, dense and over the blocks that Quest selects.
  sanitizer_memcheck, sanitizer_racecheck, sanitizer_synccheck, sanitizer_initcheck
                two tests under compute-sanitizer: accesses out of bounds, races, barriers, memory that nobody wrote.
  blocks_SIZE_COUNT
                lists of a tenth and three quarters of all blocks, of 64 and of 128 tokens.
  tokens_65536, tokens_131072
                the other published sizes.
  configs_tokens, configs_blocks
                the Pallas kernels with every configuration that fits.
  random_calls  the tests that conformance leaves out.

`python -m tools.measured_times OUT/tokens_*.json OUT/blocks_*.json OUT/selection_*.json` then takes the times into the table by
which the dispatch prefers `mosaic` or `cuda`.

Each stage writes its output to OUT/STAGE.log. OUT/summary.json says how each went, also of stages run before; after each stage
--archive is written anew, one file with all others of OUT. A command that fails does not keep the others from being run, unless
it is one of `build`. The exit status is 1 if a stage failed now.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jaxlib.xla_client
from absl import app, flags

from benchmarks import files
from sparse_attn_jax import jax_compat
from tools.find_nvcc import candidates

ROOT = Path(__file__).absolute().parent.parent
BUILD = ROOT / "build" / "gpu"

FLAGS = flags.FLAGS
Command = Sequence[str | Path]


def build_commands(out: Path) -> list[Command]:
    capability = compute_capability()
    architecture = {"9.0": "90a"}.get(capability, capability.replace(".", ""))
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    return [
        [*configure, "-DSPARSE_ATTN_CUDA=ON", f"-DSPARSE_ATTN_CUDA_ARCHITECTURES={architecture}"],
        ["cmake", "--build", BUILD],
        ["cmake", "--install", BUILD, "--prefix", ROOT],
    ]


def compute_capability() -> str:
    return query_gpu("compute_cap")


def query_gpu(field: str) -> str:
    """What the driver says of the first GPU."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


# Without a GPU, JAX goes on with a CPU.
ON_A_GPU = [sys.executable, "-c", "import jax; assert jax.default_backend() == 'gpu', jax.devices()"]

# Tests of the simulator and the interpreter, those that need several devices, one that runs XLA on the simulator's device, and
# those of what is said where there is no GPU.
NOT_ON_A_GPU = (
    "not mutat and not shard and not simulator and not export and not library and not order_of_blocks and not selector_runs"
    " and not another_kind and not every_reason"
)
# Tests that run the kernels of 9.0.
NOT_ON_AMPERE = " and not sm90 and not several_lists and not every_variant_of_the_table"

# By compute capability.
PALLAS_TESTS = {"8.0": ["tests/test_mosaic_ampere.py"], "9.0": ["tests/test_mosaic.py", "tests/test_mosaic_selection.py"]}

SECONDS_PER_TEST = 120


def pytest_command(*arguments: str | Path) -> Command:
    """Names each test as it ends."""
    return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]


def that_run_here(tests: str) -> str:
    """An expression for pytest: of `tests` those that this GPU has kernels for."""
    return tests + ("" if compute_capability() == "9.0" else NOT_ON_AMPERE)


def kernel_tests(name: str, are_random: bool, out: Path) -> list[Command]:
    """Tests of the kernels: those of random calls, or the others."""
    # Of packed sequences only the kernels': XLA may round float32 factors to 10 bits on a GPU.
    tests = ["tests/test_ffi_handlers.py", "tests/test_varlen.py::test_cuda_kernels_match_oracle"]
    tests += [*sorted(ROOT.glob("tests/test_cuda_*on_cpu.py")), *PALLAS_TESTS.get(compute_capability(), [])]
    options = ["-n", "8", "--dist", "worksteal"] if importable("xdist") else []
    # A test of random calls compiles each of them.
    options += [f"--timeout={SECONDS_PER_TEST}"] if importable("pytest_timeout") and not are_random else []
    options += ["-k", that_run_here(NOT_ON_A_GPU), "-m", "hypothesis" if are_random else "not hypothesis"]
    return [pytest_command(*tests, *options, f"--junitxml={out / name}.xml")]


# By tool, the one whose findings the others depend on first: how its report ends if it found nothing.
SANITIZERS = dict(
    memcheck="ERROR SUMMARY: 0 errors",
    racecheck="RACECHECK SUMMARY: 0 hazards",
    synccheck="ERROR SUMMARY: 0 errors",
    initcheck="ERROR SUMMARY: 0 errors",
)


def sanitizer_report(tool: str, out: Path) -> Path:
    return out / f"sanitizer_{tool}.txt"


def sanitizer_commands(tool: str, out: Path) -> list[Command]:
    report = sanitizer_report(tool, out)
    report.unlink(missing_ok=True)  # that of an earlier run says nothing of this one
    sanitizer = next(candidates("compute-sanitizer"), "compute-sanitizer")
    # XLA asks for things that may fail. What it compiles takes longer than the sanitizer would wait.
    options = ["--error-exitcode", "3", "--target-processes", "application-only", "--launch-timeout", "0"]
    options += ["--log-file", report, "--tool", tool, *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    test = pytest_command("tests/test_cuda_on_cpu.py", "-k", that_run_here("matches_oracle and (everything or group2_bf16)"))
    return [[sanitizer, *options, *test]]


def sanitizer_complaint(tool: str, out: Path) -> str | None:
    """What is wrong although the commands passed: the tool may not have been there."""
    report = sanitizer_report(tool, out)
    said = report.read_text(errors="replace") if report.exists() else ""
    return None if SANITIZERS[tool] in said else f"{report.name} does not say {SANITIZERS[tool]!r}"


# As InfLLM-v2's published times: 262,144 tokens in all, 64 blocks of 64 keys for each.
PUBLISHED = ("--num_q_heads=32", "--num_kv_heads=2", "--head_dim=128", "--num_slots=64")
PUBLISHED_SIZES = {32768: 8, 65536: 4, 131072: 2}  # length: batch
MHA = ("--q_len=32768", "--num_q_heads=16", "--num_kv_heads=16", "--head_dim=128")


def benchmark_command(result: Path, *arguments: str) -> Command:
    command = [sys.executable, "-m", "benchmarks.run", "--dtype=bfloat16", "--time_limit=20", *arguments]
    return [*command, f"--json={result}"]


def all_kernels() -> list[str]:
    """Those of Pallas as well."""
    return ["--implementations=mosaic,cuda", *cuda_kernels()[1:]]


def cuda_kernels() -> list[str]:
    """A GPU of compute capability 9.0 runs the kernels of 8.0 too."""
    return ["--implementations=cuda", "--cuda_arch=sm90,sm80" if compute_capability() == "9.0" else "--cuda_arch=sm80"]


def token_commands(q_len: int, out: Path) -> list[Command]:
    """A list per token: correlated lists, which neighbours share in part, and independent ones."""
    sizes = [*PUBLISHED, f"--q_len={q_len}", f"--batch={PUBLISHED_SIZES[q_len]}", f"--dense_max_len={q_len}", *all_kernels()]
    runs = [("realistic", "--baselines=dense-cudnn,torch-flex"), ("random", "--baselines=")]
    made = lambda generator: out / f"tokens_{q_len}_{generator}.json"
    return [benchmark_command(made(lists), *sizes, f"--generator={lists}", others) for lists, others in runs]


# Blocks of how many tokens, and of how many a list has: a tenth and three quarters.
BLOCK_LISTS = [(block, round(32768 / block * share)) for block in (64, 128) for share in (0.1, 0.75)]


def block_commands(block: int, num_slots: int, name: str, out: Path, *others: str) -> list[Command]:
    """A list per block of queries, not causal."""
    sizes = [*MHA, "--nocausal", "--generator=random", "--dense_max_len=32768", "--baselines=dense-cudnn,dense-mgpu,torch-flex"]
    lists = [f"--q_block_size={block}", f"--kv_block_size={block}", f"--num_slots={num_slots}", "--time_limit=10"]
    return [benchmark_command(out / f"{name}.json", *sizes, *lists, *others, *all_kernels())]


def dense_commands(out: Path) -> list[Command]:
    """Lists of all blocks, beside what Mosaic GPU reaches: JAX's own attention, which takes float16."""
    return block_commands(128, 256, "blocks_all", out, "--dtype=float16")


def selection_commands(out: Path) -> list[Command]:
    """The selection, beside the attention to what it chose."""
    sizes = [*PUBLISHED, "--q_len=131072", "--batch=2", "--op=both", "--num_local_blocks=32", "--mode=forward", "--baselines="]
    return [benchmark_command(out / "selection_131072.json", *sizes, *all_kernels())]


def decoding_commands(out: Path) -> list[Command]:
    """A step of decoding from pages, of 32 and of 128 thousand tokens: dense, and over what Quest selects."""
    command = [sys.executable, "-m", "benchmarks.decode", "--implementations=xla,cuda", *cuda_kernels()[1:], "--dtype=bfloat16"]
    sizes = ["--batch=8", "--num_q_heads=32", "--num_kv_heads=8", "--head_dim=128", "--kv_len=32768,131072", "--budgets=64,256"]
    return [[*command, *sizes, f"--json={out / 'decoding.json'}"]]


CONFIG_SIZES = dict(
    tokens=[*PUBLISHED, "--q_len=32768", "--batch=2", "--generator=realistic"],
    blocks=[*MHA, "--generator=random", "--q_block_size=128", "--kv_block_size=128", "--num_slots=26"],
)


def config_commands(name: str, out: Path) -> list[Command]:
    """A sweep of the Pallas kernels' configurations, of one of both ways to select."""
    has_kernels = {"8.0": jax_compat.HAS_MOSAIC_GPU_FOR_AMPERE, "9.0": jax_compat.HAS_MOSAIC_GPU}
    if not has_kernels.get(compute_capability()):
        return []
    sweep = ["--implementations=mosaic", "--mosaic_configs", "--baselines=", "--mode=forward_backward"]
    rounds = ["--time_limit=5", "--repeats=10"]
    return [benchmark_command(out / f"configs_{name}.json", *sweep, *CONFIG_SIZES[name], *rounds)]


ENVIRONMENT = dict(JAX_PLATFORMS="cuda,cpu", PYTHONUNBUFFERED="1")


@functools.cache
def client_options() -> str:
    """The source of what reads JAX's environment variables: their names and values are not those of every version."""
    read = getattr(jaxlib.xla_client, "generate_pjrt_gpu_plugin_options", None)
    return "" if read is None else inspect.getsource(read)


def for_tests() -> dict[str, str]:
    """Each array is an allocation: an access beyond it is seen, and processes share the GPU. XLA tunes nothing of its own."""
    return dict(
        XLA_PYTHON_CLIENT_ALLOCATOR="platform",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip(),
        JAX_COMPILATION_CACHE_DIR=str(Path(tempfile.gettempdir()) / "sparse_attn_jax_compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def for_sanitizers() -> dict[str, str]:
    """An allocator that leaves the bounds of arrays to be seen."""
    return for_tests() | dict(XLA_PYTHON_CLIENT_ALLOCATOR="address" if "'address'" in client_options() else "platform")


def beside_torch() -> dict[str, str]:
    """JAX would take three quarters of the memory, of which torch needs as much."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if any(os.environ.get(name) for name in names):
        return {}
    return {next((name for name in names if f"'{name}'" in client_options()), names[-1]): ".45"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What can be run alone.

    Attributes:
      commands: makes them for a folder of results, on this GPU.
      environment: gives variables for them.
      complaint: says what is wrong with the results although all commands passed; or `None`.
    """

    commands: Callable[[Path], list[Command]]
    environment: Callable[[], dict[str, str]] = dict
    complaint: Callable[[Path], str | None] = lambda out: None


def make_stages() -> dict[str, Stage]:
    bind = functools.partial
    tokens = {f"tokens_{q_len}": Stage(bind(token_commands, q_len), beside_torch) for q_len in PUBLISHED_SIZES}
    names = {f"blocks_{block}_{num_slots}": (block, num_slots) for block, num_slots in BLOCK_LISTS}
    return dict(
        build=Stage(build_commands),
        conformance=Stage(bind(kernel_tests, "conformance", False), for_tests),
        tokens_32768=tokens.pop("tokens_32768"),
        blocks_all=Stage(dense_commands, beside_torch),
        selection=Stage(selection_commands),
        decoding=Stage(decoding_commands),
        **{
            f"sanitizer_{tool}": Stage(bind(sanitizer_commands, tool), for_sanitizers, bind(sanitizer_complaint, tool))
            for tool in SANITIZERS
        },
        **{name: Stage(bind(block_commands, *lists, name), beside_torch) for name, lists in names.items()},
        **tokens,
        **{f"configs_{name}": Stage(bind(config_commands, name)) for name in CONFIG_SIZES},
        random_calls=Stage(bind(kernel_tests, "random_calls", True), for_tests),
    )


STAGES = make_stages()

# What a command has to end by itself, once it is asked to.
SECONDS_TO_END = 10
# What a shell starts in the background ignores interrupts, and so would what it starts itself.
TO_BE_INTERRUPTED = ("env", "--default-signal=INT")


def importable(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


@functools.cache
def why_no_gpu() -> str | None:
    """Why JAX does not run on a GPU here, or `None`."""
    found = subprocess.run(ON_A_GPU, env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    return None if found.returncode == 0 else " ".join(["JAX has no GPU:", *found.stderr.strip().splitlines()[-1:]])


def run_stage(
    commands: list[Command], environment: dict[str, str], log: Path, time_limit: float, *, stops: bool = False
) -> list[str]:
    """Runs commands one after the other, into the log, and returns what failed. With `stops` nothing is run after that."""
    deadline = time.monotonic() + time_limit
    failed = []
    with open(log, "w") as output:
        print(f"with {environment}", file=output)
        for command in commands:
            text = " ".join(map(str, command))
            if time.monotonic() >= deadline or (failed and stops):
                failed.append(f"not run: {text}")
                continue
            print(f"$ {text}", file=output, flush=True)
            options = dict(cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            # A group of its own, which ends together; in this session, so that who ends that ends it too.
            words = [*TO_BE_INTERRUPTED, *map(str, command)]
            process = subprocess.Popen(words, env=os.environ | environment, process_group=0, **options)
            status = wait(process, deadline - time.monotonic())
            if status is None:
                failed.append(f"ended after {time_limit:g} s: {text}")
            elif status != 0:
                failed.append(f"exit status {status}: {text}")
    return failed


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status; or `None` if the process was ended, after it was asked to, which lets tests say what had passed."""
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=max(0.0, seconds))
        if status is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_TO_END)
    finally:  # also where this program is itself ended
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status


def run_one(name: str, out: Path) -> dict:
    start, stage, is_build = time.monotonic(), STAGES[name], name == "build"
    try:
        if not is_build and (reason := why_no_gpu()) is not None:
            failed = [reason]
        else:
            environment = ENVIRONMENT | stage.environment()
            failed = run_stage(stage.commands(out), environment, out / f"{name}.log", FLAGS.time_limit, stops=is_build)
            failed += filter(None, [stage.complaint(out)])
    except (OSError, subprocess.SubprocessError) as error:  # a program that is not there, or says no
        failed = [str(error)]
    return dict(result="; ".join(failed) or "passed", seconds=round(time.monotonic() - start, 1), **device())


def device() -> dict[str, str]:
    """The name and the compute capability of the GPU, if there is one."""
    try:
        return dict(device=query_gpu("name"), compute_capability=compute_capability())
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if unknown := sorted(set(FLAGS.stage) - set(STAGES)):
        raise app.UsageError(f"--stage has {unknown}; known are {', '.join(STAGES)}.")
    out = Path(FLAGS.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    summary = out / "summary.json"
    results = json.loads(summary.read_text()) if summary.exists() else {}
    stages = FLAGS.stage or list(STAGES)
    for stage in stages:
        print(f"{stage} ...", flush=True)
        results[stage] = run_one(stage, out)
        print(f"{stage}: {results[stage]['result']} ({results[stage]['seconds']} s)", flush=True)
        files.write_json(summary, results)
        if FLAGS.archive:
            files.write_archive(FLAGS.archive, out)
        if stage == "build" and results[stage]["result"] != "passed":
            return 1  # of what would be tested and timed
    return int(any(results[stage]["result"] != "passed" for stage in stages))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of the logs and the summary.", required=True)
    flags.DEFINE_list("stage", [], "Stages to run; all if empty.")
    flags.DEFINE_string("archive", None, "Write all files of --out to this one as well, a compressed tar file.")
    flags.DEFINE_integer("time_limit", 480, "Seconds after which a stage is ended.", lower_bound=1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it what it runs
    app.run(main)
