"""Everything that needs an NVIDIA GPU, in stages that can be run alone. Needs no network.

    python -m benchmarks.gpu_suite --out=gpu_results
    python -m benchmarks.gpu_suite --out=gpu_results --stage=build,conformance

Stages:

  build        compiles the CUDA kernels for this GPU, beside the package. Needs nvcc, CMake, Ninja and pybind11.
  conformance  the tests of the kernels, which elsewhere run in a simulator, on the GPU.
  sanitizer    two of them under compute-sanitizer: accesses out of bounds, races, barriers, memory that nobody wrote.
  tokens_32768, tokens_65536, tokens_131072
               the sizes of InfLLM-v2's published times, with a list per token: times beside dense attention by cuDNN and
               flex_attention by torch, after a check of every result.
  blocks       the same with a list per block of queries.
  selection    the selection beside the attention to what it chose.
  decoding     a step of decoding from pages, dense and over the blocks that Quest selects.
  configs      the Pallas kernels with every configuration that fits; on compute capability 9.0.

`python -m tools.measured_times OUT/tokens_*.json OUT/blocks_*.json OUT/selection_*.json` then takes the times into the table by
which the dispatch prefers `mosaic` or `cuda`.

Each stage writes its output to OUT/STAGE.log. OUT/summary.json says how each went, also of stages run before. The exit status
is 1 if one of them failed now.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags

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

# Tests of the simulator and the interpreter, those that need several devices, and one that runs XLA on the simulator's device.
NOT_ON_A_GPU = (
    "not mutat and not shard and not simulator and not export and not library and not order_of_blocks and not selector_runs"
)


# By compute capability.
PALLAS_TESTS = {"8.0": ["tests/test_mosaic_ampere.py"], "9.0": ["tests/test_mosaic.py", "tests/test_mosaic_selection.py"]}


def pytest_command(*arguments: str | Path) -> Command:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def conformance_commands(out: Path) -> list[Command]:
    files = ["tests/test_ffi_handlers.py", "tests/test_varlen.py", *sorted(ROOT.glob("tests/test_cuda_*on_cpu.py"))]
    files += PALLAS_TESTS.get(compute_capability(), [])
    workers = ["-n", "8"] if importable("xdist") else []
    return [ON_A_GPU, pytest_command(*files, *workers, "-k", NOT_ON_A_GPU, f"--junitxml={out / 'conformance.xml'}")]


def sanitizer_commands(out: Path) -> list[Command]:
    sanitizer = next(candidates("compute-sanitizer"), "compute-sanitizer")
    test = pytest_command("tests/test_cuda_on_cpu.py", "-k", "matches_oracle and (everything or group2_bf16)")
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    sanitize = [sanitizer, "--error-exitcode", "3", "--target-processes", "all"]
    return [ON_A_GPU, *([*sanitize, "--tool", tool, *test] for tool in tools)]


# As InfLLM-v2's published times: 262,144 tokens in all, 64 blocks of 64 keys for each.
PUBLISHED = ("--num_q_heads=32", "--num_kv_heads=2", "--head_dim=128", "--num_slots=64")
PUBLISHED_SIZES = {32768: 8, 65536: 4, 131072: 2}  # length: batch
MHA = ("--q_len=32768", "--num_q_heads=16", "--num_kv_heads=16", "--head_dim=128")


def benchmark_command(result: Path, *arguments: str) -> Command:
    command = [sys.executable, "-m", "benchmarks.run", "--dtype=bfloat16", *arguments]
    return [*command, "--time_limit=20", f"--json={result}"]


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
    return [ON_A_GPU, *(benchmark_command(made(lists), *sizes, f"--generator={lists}", others) for lists, others in runs)]


def block_commands(out: Path) -> list[Command]:
    """A list per block of queries, of a tenth and three quarters of all blocks, and of all, not causal."""
    sizes = [*MHA, "--nocausal", "--generator=random", "--dense_max_len=32768", "--baselines=dense-cudnn,dense-mgpu,torch-flex"]
    commands = []
    for block in (64, 128):
        for share in (0.1, 0.75):
            slots = round(32768 / block * share)
            lists = [f"--q_block_size={block}", f"--kv_block_size={block}", f"--num_slots={slots}"]
            commands.append(benchmark_command(out / f"blocks_{block}_{slots}.json", *sizes, *lists, *all_kernels()))
    # What Mosaic GPU reaches: JAX's own attention takes float16.
    dense = ["--q_block_size=128", "--kv_block_size=128", "--num_slots=256", "--dtype=float16"]
    commands.append(benchmark_command(out / "blocks_all.json", *sizes, *dense, *all_kernels()))
    return [ON_A_GPU, *commands]


def selection_commands(out: Path) -> list[Command]:
    """The selection, beside the attention to what it chose."""
    sizes = [*PUBLISHED, "--q_len=131072", "--batch=2", "--op=both", "--num_local_blocks=32", "--mode=forward", "--baselines="]
    return [ON_A_GPU, benchmark_command(out / "selection_131072.json", *sizes, *all_kernels())]


def decoding_commands(out: Path) -> list[Command]:
    """A step of decoding from pages, of 32 and of 128 thousand tokens: dense, and over what Quest selects."""
    command = [sys.executable, "-m", "benchmarks.decode", "--implementations=xla,cuda", *cuda_kernels()[1:], "--dtype=bfloat16"]
    sizes = ["--batch=8", "--num_q_heads=32", "--num_kv_heads=8", "--head_dim=128", "--kv_len=32768,131072", "--budgets=64,256"]
    return [ON_A_GPU, [*command, *sizes, f"--json={out / 'decoding.json'}"]]


def config_commands(out: Path) -> list[Command]:
    """A sweep of the Pallas kernels' configurations, of both ways to select."""
    has_kernels = {"8.0": jax_compat.HAS_MOSAIC_GPU_FOR_AMPERE, "9.0": jax_compat.HAS_MOSAIC_GPU}
    if not has_kernels.get(compute_capability()):
        return [ON_A_GPU]
    sweep = ["--implementations=mosaic", "--mosaic_configs", "--baselines=", "--mode=forward_backward"]
    tokens = [*PUBLISHED, "--q_len=32768", "--batch=2", "--generator=realistic"]
    blocks = [*MHA, "--generator=random", "--q_block_size=128", "--kv_block_size=128", "--num_slots=26"]
    commands = [
        benchmark_command(out / f"configs_{name}.json", *sweep, *of) for name, of in dict(tokens=tokens, blocks=blocks).items()
    ]
    return [ON_A_GPU, *commands]


STAGES: dict[str, Callable[[Path], list[Command]]] = dict(
    build=build_commands,
    conformance=conformance_commands,
    sanitizer=sanitizer_commands,
    **{f"tokens_{q_len}": functools.partial(token_commands, q_len) for q_len in PUBLISHED_SIZES},
    blocks=block_commands,
    selection=selection_commands,
    decoding=decoding_commands,
    configs=config_commands,
)

# For tests, each array is an allocation: an access beyond it is seen, and processes share the GPU.
ENVIRONMENT = dict(JAX_PLATFORMS="cuda,cpu")
OF_TESTS = dict(XLA_PYTHON_CLIENT_ALLOCATOR="platform", XLA_PYTHON_CLIENT_PREALLOCATE="false")


def importable(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def run_stage(commands: list[Command], environment: dict[str, str], log: Path, time_limit: float) -> str:
    """Runs commands one after the other, into the log, and says how it went: "passed", or what happened."""
    deadline = time.monotonic() + time_limit
    with open(log, "w") as output:
        for command in commands:
            text = " ".join(map(str, command))
            print(f"$ {text}", file=output, flush=True)
            options = dict(cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            process = subprocess.Popen([*map(str, command)], env=os.environ | environment, **options)
            try:
                status = process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"ended after {time_limit:g} s: {text}"
            if status != 0:
                return f"exit status {status}: {text}"
    return "passed"


def run_one(stage: str, out: Path) -> dict:
    start = time.monotonic()
    try:
        environment = ENVIRONMENT | (OF_TESTS if stage in ("conformance", "sanitizer") else {})
        found = run_stage(STAGES[stage](out), environment, out / f"{stage}.log", FLAGS.time_limit)
    except (OSError, subprocess.CalledProcessError) as error:  # a program that is not there, or says no
        found = str(error)
    return dict(result=found, seconds=round(time.monotonic() - start, 1), **device())


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
        summary.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(results[stage]["result"] != "passed" for stage in stages))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of the logs and the summary.", required=True)
    flags.DEFINE_list("stage", [], "Stages to run; all if empty.")
    flags.DEFINE_integer("time_limit", 480, "Seconds after which a stage is ended.", lower_bound=1)
    app.run(main)
