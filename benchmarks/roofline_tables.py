"""The kernels that `benchmarks.roofline` compares, the goals beside them, and its tables.

Every predicted figure stands in a column that says so, and no measured one does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

from benchmarks import plan_model, schedules, selection_model
from benchmarks.devices import A100, H100, Device
from benchmarks.prediction import Prediction, delta_seconds, predict
from benchmarks.report import format_table
from benchmarks.schedules import Schedule
from benchmarks.selection_model import Selection
from benchmarks.tile_lists import Lists, sample_lists, tiles_of, visible_pairs
from benchmarks.workloads import sized_case
from sparse_attn_jax import jax_compat
from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.selectors import InfLLMV2
from sparse_attn_jax.testing.cases import Case

GENERATORS = ("random", "realistic")
TILE_TOKENS = (1, 2, 4, 8, 16)

FORWARD_GOAL = 1.75  # times as fast as InfLLM-v2's forward
TRAINING_GOAL = 1.6  # times as fast as its forward and backward together
SELECTION_GOAL = 0.25  # of the forward's time
BLOCK_GOAL = 400  # useful TFLOP/s of query-block selection on an H100
DENSITY = 0.1  # of the blocks that query-block selection could list


@dataclasses.dataclass(frozen=True)
class Published:
    """Milliseconds on an H100, from the README of github.com/OpenBMB/infllmv2_cuda_impl."""

    forward: float
    backward: float

    @property
    def training(self) -> float:
        return self.forward + self.backward


INFLLM_V2 = {32768: Published(133.60, 330.04), 65536: Published(142.31, 381.55), 131072: Published(158.42, 468.90)}


def token_case(q_len: int, batch: int) -> Case:
    """A row of that README's table: a list per token and KV head."""
    sizes = dict(num_q_heads=32, num_kv_heads=2, head_dim=128, q_block_size=1, kv_block_size=64, num_slots=64)
    return sized_case(seed=0, batch=batch, q_len=q_len, kv_len=None, is_causal=True, dtype="bfloat16", **sizes)


def block_case(block_size: int) -> Case:
    """A list per block of queries and head."""
    sizes = dict(num_q_heads=32, num_kv_heads=32, head_dim=128, q_block_size=block_size, kv_block_size=block_size)
    return sized_case(seed=0, batch=1, q_len=65536, kv_len=None, is_causal=True, dtype="bfloat16", **sizes)


TOKEN_CASES = {"32k": token_case(32768, 8), "64k": token_case(65536, 4), "128k": token_case(131072, 2)}
BLOCK_CASES = {"blocks64": block_case(64), "blocks128": block_case(128)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A column of the tables.

    Attributes:
      is_lean: as if its instructions were so few that they never limit.
    """

    label: str
    make: Callable[[Case, int], Schedule]
    device: Device
    is_lean: bool = False

    def schedule(self, case: Case, tokens: int) -> Schedule:
        made = self.make(case, tokens)
        return dataclasses.replace(made, instructions=None) if self.is_lean else made


FORWARD = {
    "forward": Kernel("SM80", schedules.sm80_forward, H100),
    "forward lean": Kernel("SM80 lean", schedules.sm80_forward, H100, is_lean=True),
    "forward SM90": Kernel("SM90", schedules.sm90_forward, H100),
    "forward A100": Kernel("A100, SM80", schedules.sm80_forward, A100),
    "forward lean A100": Kernel("A100, SM80 lean", schedules.sm80_forward, A100, is_lean=True),
}
BACKWARD = {
    "dQ": Kernel("dQ", schedules.sm80_query_gradient, H100),
    "dQ lean": Kernel("dQ lean", schedules.sm80_query_gradient, H100, is_lean=True),
    "dK dV": Kernel("dK dV", schedules.sm80_key_gradient, H100),
    "dK dV lean": Kernel("dK dV lean", schedules.sm80_key_gradient, H100, is_lean=True),
    "dQ SM90": Kernel("SM90 dQ", schedules.sm90_query_gradient, H100),
    "dK dV SM90": Kernel("SM90 dK dV", schedules.sm90_key_gradient, H100),
    "dQ A100": Kernel("A100, dQ", schedules.sm80_query_gradient, A100),
    "dK dV A100": Kernel("A100, dK dV", schedules.sm80_key_gradient, A100),
}
# Marks of the kernels that the goals are compared with.
GOAL_MARKS = {"": "SM80", " lean": "SM80 lean", " SM90": "SM90"}
if jax_compat.HAS_MOSAIC_GPU:
    from benchmarks import mosaic_schedules

    FORWARD["forward Pallas"] = Kernel("Pallas", mosaic_schedules.forward, H100)
    BACKWARD["dQ Pallas"] = Kernel("Pallas dQ", mosaic_schedules.query_gradient, H100)
    BACKWARD["dK dV Pallas"] = Kernel("Pallas dK dV", mosaic_schedules.key_gradient, H100)
    FORWARD["forward Pallas A100"] = Kernel("A100, Pallas", mosaic_schedules.ampere_forward_pass, A100)
    BACKWARD["dQ Pallas A100"] = Kernel("A100, Pallas dQ", mosaic_schedules.ampere_query_gradient, A100)
    BACKWARD["dK dV Pallas A100"] = Kernel("A100, Pallas dK dV", mosaic_schedules.ampere_key_gradient, A100)
    GOAL_MARKS[" Pallas"] = "Pallas"
KERNELS = FORWARD | BACKWARD


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel with one tile size, for one case and kind of lists.

    Attributes:
      kernel: a name in `KERNELS`.
      union: blocks that a tile walks, on average.
      prediction: `None` if the kernel does not fit on an SM.
      useful_flops: of the forward pass, visible pairs only.
    """

    case: Case
    lists: str
    kernel: str
    schedule: Schedule
    union: float
    prediction: Prediction | None
    useful_flops: float

    @property
    def ms(self) -> float:
        return 1e3 * self.prediction.seconds if self.prediction else math.inf

    @property
    def useful_tflops(self) -> float:
        return 1e-9 * self.useful_flops / self.ms


def entries_of(case: Case, name: str, lists: Lists, kernels: Sequence[str], tile_tokens: Sequence[int]) -> Iterator[Entry]:
    useful_flops = 4 * case.head_dim * visible_pairs(lists)
    for tokens in tile_tokens:
        union = float(tiles_of(lists, tokens).blocks.mean())
        for kernel in kernels:
            schedule = KERNELS[kernel].schedule(case, tokens)
            prediction = predict(schedule, lists, KERNELS[kernel].device)
            yield Entry(case, name, kernel, schedule, union, prediction, useful_flops)


def best(entries: Sequence[Entry], kernel: str, case: Case, lists: str) -> Entry:
    """With the tile size that is predicted fastest."""
    found = [x for x in entries if (x.kernel, x.case, x.lists) == (kernel, case, lists)]
    return min(found, key=lambda entry: entry.ms)


# ---- Tables.


def section(title: str, header: list[str], cells: list[list[str]]) -> str:
    return f"### {title}\n\n{format_table(header, cells)}"


def check_section() -> str:
    """InfLLM-v2's own schedule: predicted beside published."""
    header = ["tokens x batch", "K/V loaded, TB", "predicted tensor ms", "predicted shared ms", "predicted L2 ms"]
    header += ["predicted HBM ms", "predicted ms", "published ms", "predicted / published"]
    cells = []
    for case in TOKEN_CASES.values():
        published = INFLLM_V2[case.q_len].forward
        found = predict(schedules.infllm_v2_forward(case), sample_lists(case, "random"), H100)
        parts = [f"{1e3 * x:.1f}" for x in (found.tensor, found.shared, found.l2, found.hbm, found.seconds)]
        loaded = f"{found.counts.loaded / 1e12:.3f}"
        ratio = f"{1e3 * found.seconds / published:.2f}"
        cells.append([f"{case.q_len:,} x {case.batch}", loaded, *parts, f"{published:.2f}", ratio])
    return section("The check: InfLLM-v2's forward on an H100", header, cells)


def tile_section(title: str, entries: Sequence[Entry], kernels: Sequence[str]) -> str:
    """By lists and tile size, for one case: what limits, and the best of each column in bold."""
    header = ["lists", "tokens", "blocks walked", *(f"predicted: {KERNELS[kernel].label}" for kernel in kernels)]
    cells = []
    for lists, tokens in dict.fromkeys((x.lists, x.schedule.tokens) for x in entries):
        row = {x.kernel: x for x in entries if (x.lists, x.schedule.tokens) == (lists, tokens)}
        line = [lists, str(tokens), f"{row[kernels[0]].union:.1f}"]
        for kernel in kernels:
            entry = row[kernel]
            text = f"{entry.ms:.3g} {entry.prediction.limit}" if entry.prediction else "does not fit"
            is_best = entry is best(entries, kernel, entry.case, lists)
            line.append(f"**{text}**" if is_best else text)
        cells.append(line)
    return section(title, header, cells)


def goal_sections(entries: Sequence[Entry]) -> str:
    """The goals, and our kernels with their best tiles."""

    def cell(parts: Sequence[Entry], goal: float, extra_ms: float = 0) -> str:
        total = sum(entry.ms for entry in parts) + extra_ms
        tokens = ", ".join(str(entry.schedule.tokens) for entry in parts)
        return f"{total:.1f} ({tokens})" + (" *" if total <= goal else "")

    forward, training = [], []
    for case in TOKEN_CASES.values():
        published = INFLLM_V2[case.q_len]
        for lists in GENERATORS:
            find = functools.partial(best, entries, case=case, lists=lists)
            goal = published.forward / FORWARD_GOAL
            line = [f"{case.q_len:,}", lists, f"{published.forward:.1f}", f"{goal:.1f}"]
            forward.append(line + [cell([find(f"forward{mark}")], goal) for mark in GOAL_MARKS])
            goal = published.training / TRAINING_GOAL
            line = [f"{case.q_len:,}", lists, f"{published.training:.1f}", f"{goal:.1f}"]
            passes = [[find(name + mark) for name in ("forward", "dQ", "dK dV")] for mark in GOAL_MARKS]
            extra_ms = 1e3 * delta_seconds(case, H100)
            training.append(line + [cell(parts, goal, extra_ms) for parts in passes])
    header = ["tokens", "lists", "published ms, InfLLM-v2", "goal ms"]
    labels = [f"predicted ms: {label}" for label in GOAL_MARKS.values()]
    marks = "tokens per tile in brackets, * meets the goal"
    titles = (
        f"Forward on an H100; goal: {FORWARD_GOAL}x InfLLM-v2 ({marks})",
        f"Forward and backward on an H100; goal: {TRAINING_GOAL}x InfLLM-v2 ({marks}: forward, dQ, dK dV)",
    )
    return f"{section(titles[0], header + labels, forward)}\n\n{section(titles[1], header + labels, training)}"


@dataclasses.dataclass(frozen=True)
class SelectionKernel:
    """Kernels of selection, and the forward that follows them.

    Attributes:
      seconds_of: of a selection on a device, the limits of the scores, and the time of making lists after it.
    """

    label: str
    device: Device
    arch: int
    forward: str
    seconds_of: Callable[[Selection, Device], tuple[dict[str, float], float]]


def cuda_seconds(selection: Selection, device: Device) -> tuple[dict[str, float], float]:
    """Lists are made as scores come, which the model leaves out."""
    return selection_model.limits_of(selection, device), 0.0


SELECTION_KERNELS = [SelectionKernel("SM90, H100 SXM", H100, 90, "forward SM90", cuda_seconds)]
if jax_compat.HAS_MOSAIC_GPU:
    from benchmarks import mosaic_selection_model

    SELECTION_KERNELS.append(SelectionKernel("Pallas, H100 SXM", H100, 90, "forward Pallas", mosaic_selection_model.seconds_of))
SELECTION_KERNELS.append(SelectionKernel("SM80, A100 SXM 80GB", A100, 80, "forward A100", cuda_seconds))


def selection_of(case: Case, arch: int) -> Selection:
    """By InfLLM-v2's selector, as many blocks as the case's lists have, with the kernel of SM80 or SM90."""
    selector, platform = InfLLMV2(top_k=case.num_slots), dict(platform="gpu", compute_capability=None)
    options = {x.name: getattr(selector, x.name) for x in dataclasses.fields(ScoringProblem) if hasattr(selector, x.name)}
    sizes = dict(num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, kv_len=case.kv_len)
    types = dict(dtype=case.dtype, unit_dtype=case.dtype)
    options |= dict(scale=case.head_dim**-0.5, is_causal=case.is_causal)
    return Selection(ScoringProblem(**sizes, **types, **platform, **options), case.batch, case.q_len, arch=arch)


def selection_section(entries: Sequence[Entry]) -> str:
    """What comes before attention: the lists, and the plan of the forward's best tiles with its inverse."""
    header = ["kernels", "tokens x batch", *(f"predicted {name} ms" for name in ("tensor", "exp", "shared", "memory"))]
    header += ["predicted ms of lists", "predicted selection ms, at least", "goal: a quarter of the predicted forward"]
    header += ["predicted plan ms"]
    cells = []
    for kernel in SELECTION_KERNELS:
        for case in TOKEN_CASES.values():
            limits, lists = kernel.seconds_of(selection_of(case, kernel.arch), kernel.device)
            forward = best(entries, kernel.forward, case, "realistic")
            tokens, tiles = forward.schedule.tokens, case.q_len // forward.schedule.tokens
            pairs = case.batch * case.num_kv_heads
            plan = plan_model.Plan(case, tokens, round(forward.union * tiles), pairs)
            total = max(limits.values()) + lists
            figures = [f"{1e3 * seconds:.1f}" if seconds else "" for seconds in (*limits.values(), lists, total)]
            figures += [f"{SELECTION_GOAL * forward.ms:.1f}", f"{1e3 * plan_model.seconds_of(plan, kernel.device):.2f}"]
            cells.append([kernel.label, f"{case.q_len:,} x {case.batch}", *figures])
    return section("Selection and plans, realistic lists", header, cells)


def block_section(entries: Sequence[Entry]) -> str:
    """Query-block selection: useful speed."""
    header = ["kernel", "tokens", "predicted ms", "predicted limit", "predicted useful TFLOP/s"]
    cells = []
    for entry in entries:
        figures = [f"{entry.ms:.2f}", entry.prediction.limit, f"{entry.useful_tflops:.0f}"]
        cells.append([KERNELS[entry.kernel].label, str(entry.schedule.tokens), *figures])
    case = entries[0].case
    blocks = f"A list per {case.q_block_size} queries, {DENSITY:.0%} of the blocks of {case.kv_block_size} keys"
    return section(f"{blocks}, {case.q_len:,} tokens; goal: {BLOCK_GOAL} TFLOP/s on an H100", header, cells)
