"""What is measured together: sections of workloads, and the preset behind docs/measured.md."""

import dataclasses

import sparse_attn_jax as sa
from benchmarks.contenders import FORWARD, FORWARD_BACKWARD, Contender, DenseJax, Implementation, Selector
from benchmarks.mgpu_contender import DensePallas
from benchmarks.torch_contenders import TorchFlex, TorchSdpa
from benchmarks.workloads import Workload, sized_case

BASELINES = ("dense-xla", "dense-cudnn", "dense-mgpu", "torch-flex", "torch-sdpa")
BOTH_PASSES = (FORWARD, FORWARD_BACKWARD)


@dataclasses.dataclass(frozen=True)
class Section:
    """Workloads with the same contenders.

    Attributes:
      is_sweep: time all workloads in the same rounds, which makes ratios between them fair.
    """

    title: str
    workloads: tuple[Workload, ...]
    contenders: tuple[Contender, ...]
    modes: tuple[str, ...]
    goal: str = ""
    is_sweep: bool = False


def make_contenders(op: str, implementations, baselines, dense_max_len: int, cuda_archs=()) -> tuple[Contender, ...]:
    """The contenders of those names; baselines only where attention is measured."""
    made: list[Contender] = []
    if op in ("selection", "both"):
        made += map(Selector, implementations)
    if op in ("attention", "both"):
        for name in implementations:
            made += (Implementation(name, arch) for arch in (cuda_archs if name == "cuda" and cuda_archs else ("",)))
        made += (make_baseline(name, dense_max_len) for name in baselines)
    return tuple(made)


def make_baseline(name: str, dense_max_len: int) -> Contender:
    if name == "torch-flex":
        return TorchFlex()
    if name == "torch-sdpa":
        return TorchSdpa(dense_max_len)
    if name == "dense-mgpu":
        return DensePallas(dense_max_len)
    return DenseJax(name, name.removeprefix("dense-"), dense_max_len)


def readme_sections(seed: int, implementations, dense_max_len: int) -> list[Section]:
    """The table of docs/measured.md, for two CPU cores: about thirteen minutes."""
    common = dict(batch=1, head_dim=64, kv_len=None, kv_block_size=64, is_causal=True, dtype="float32", seed=seed)
    grouped = dict(num_q_heads=8, num_kv_heads=2, q_block_size=1, **common)
    blocks = sized_case(q_len=8192, num_q_heads=4, num_kv_heads=4, q_block_size=64, num_slots=8, indices="local", **common)
    lengths = (8192, 16384, 32768, 65536)
    tokens = [sized_case(q_len=length, num_slots=16, indices="realistic", **grouped) for length in lengths]
    default = sa.selectors.InfLLMV2()
    narrow = sa.selectors.InfLLMV2(top_k=16, num_local_blocks=2)
    selected = [
        Workload(sized_case(q_len=32768, num_slots=selector.top_k, **grouped), selector, "realistic")
        for selector in (narrow, default)
    ]

    def contenders(op, baselines):
        return make_contenders(op, implementations, baselines, dense_max_len)

    return [
        Section(
            "A list per block of queries",
            (Workload(blocks),),
            contenders("attention", ("torch-flex", "torch-sdpa")),
            BOTH_PASSES,
            "at least as fast as torch-flex, 5x faster than torch-sdpa; forward+backward at most 4x forward",
        ),
        Section(
            "Time against length, a list per token",
            tuple(map(Workload, tokens)),
            contenders("attention", ()),
            BOTH_PASSES,
            "grows at most 2.3x per doubling",
            is_sweep=True,
        ),
        Section(
            "Selection against the attention it selects for",
            tuple(selected),
            contenders("both", ()),
            (FORWARD,),
            "selection takes less than 2x the attention",
        ),
        Section(  # last: its gigabytes of logits disturb what comes after
            "A list per token",
            (Workload(tokens[0]),),
            contenders("attention", ("dense-xla",)),
            BOTH_PASSES,
            "faster than dense-xla from 8,192 tokens on",
        ),
    ]
