"""The Pallas kernels with configurations other than those that they choose: contenders of a sweep."""

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.contenders import Implementation, Prepared
from benchmarks.mosaic_schedules import geometry_of
from benchmarks.schedules import group_size
from benchmarks.workloads import Workload
from sparse_attn_jax import entry_point, jax_compat
from sparse_attn_jax.implementations import mosaic
from sparse_attn_jax.implementations.mosaic import (
    ampere_backward,
    ampere_forward,
    ampere_ring,
    attention_backward,
    attention_forward,
    steps,
)
from sparse_attn_jax.implementations.mosaic.geometry import Geometry
from sparse_attn_jax.testing.cases import Case
from sparse_attn_jax.testing.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Where a kernel's configuration comes from, by names of its module, what to vary, and how much shared memory there is."""

    module: ModuleType
    choose: str
    memory_of: str
    sizes: dict[str, tuple[int, ...]]
    max_bytes: int = steps.MAX_SHARED_BYTES

    def configs(self, g: Geometry) -> Iterator[Any]:
        """All that fit, but the one that the kernel chooses."""
        chosen = getattr(self.module, self.choose)(g)
        configs = [chosen]
        for name, values in self.sizes.items():
            configs = [dataclasses.replace(config, **{name: value}) for config in configs for value in values]
        for config in configs:
            memory = getattr(self.module, self.memory_of)(g, config)
            if config != chosen and is_possible(g, config) and steps.shared_bytes(memory) <= self.max_bytes:
                yield config


HOPPER_KERNELS = {
    "forward": Kernel(attention_forward, "choose_config", "memory_of", dict(warpgroups=(1, 2), stages=(1, 2, 3, 4))),
    "dQ": Kernel(attention_backward, "choose_query_config", "query_memory_of", dict(warpgroups=(1, 2), stages=(1, 2, 3))),
    "dK dV": Kernel(attention_backward, "choose_key_config", "key_memory_of", dict(keys=(16, 32, 64), stages=(2, 4, 6))),
}
STAGES, BYTES = dict(stages=ampere_ring.STAGES), ampere_ring.MAX_SHARED_BYTES
AMPERE_KERNELS = {
    "forward": Kernel(ampere_forward, "choose_config", "memory_of", STAGES, BYTES),
    "dQ": Kernel(ampere_backward, "choose_query_config", "query_memory_of", STAGES, BYTES),
    "dK dV": Kernel(ampere_backward, "choose_key_config", "key_memory_of", dict(keys=(16, 32, 64)) | STAGES, BYTES),
}


def is_possible(g: Geometry, config: Any) -> bool:
    """Whether the slices of a tile are a multiple of the warpgroups, and the keys of a block a multiple of those of a CTA."""
    return g.slices_per_tile % getattr(config, "warpgroups", 1) == 0 and g.kv_block_size % getattr(config, "keys", 1) == 0


@dataclasses.dataclass(frozen=True)
class Configured:
    """`mosaic` with another configuration of one kernel.

    Attributes:
      title: the kernel's, in the tables.
      kernel: which one.
      config: of that kernel.
    """

    title: str
    kernel: Kernel
    config: Any
    kind = "implementation"
    computes = "selected"

    @property
    def name(self) -> str:
        sizes = (f"{name} {getattr(self.config, name)}" for name in self.kernel.sizes)
        return f"mosaic {self.title}: {', '.join(sizes)}"

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        choose = lambda g, interpreted=False: dataclasses.replace(self.config, interpreted=interpreted)
        try:
            entry_point.forget_calls()
            with mock.patch.object(self.kernel.module, self.kernel.choose, choose):
                return Implementation("mosaic").prepare(workload, made, mode)
        finally:
            entry_point.forget_calls()


def contenders_for(case: Case) -> tuple[Configured, ...]:
    """One for every configuration that fits and is not chosen, of the plan that the implementation builds for this device."""
    is_ampere = jax_compat.lowering_compute_capability() == mosaic.AMPERE
    kernels, rows = (AMPERE_KERNELS, mosaic.AMPERE_TILE_ROWS) if is_ampere else (HOPPER_KERNELS, mosaic.TILE_ROWS)
    g = geometry_of(case, mosaic.tile_size(case.q_block_size, group_size(case), case.q_len, rows))
    return tuple(Configured(title, kernel, config) for title, kernel in kernels.items() for config in kernel.configs(g))
