"""What a mutant is put through. Calls are compiled when they are first wanted, and then run on one mutant after the other."""

import os
import sys
from unittest import mock

from sparse_attn_jax.implementations.cuda import library

sys.path.append(str(library.host_sim.ROOT / "tests"))

from tools.mutants import attention_checks, bounds_checks, paged_checks, plan_checks, selection_checks  # noqa: E402

# By the source that starts the kernels.
MAKERS = {
    "common/bounds.cu": bounds_checks.all_checks,
    "common/paged.cu": paged_checks.all_checks,
    "common/plan.cu": plan_checks.all_checks,
    "sm80/launchers.cu": attention_checks.all_checks,
    "sm80/paged.cu": paged_checks.all_checks,
    "sm80/selection.cu": selection_checks.all_checks,
    "sm90/launchers.cu": attention_checks.all_checks,
    "sm90/launchers_float16.cu": dict,  # none is compiled
    "sm90/paged.cu": paged_checks.all_checks,
    "sm90/selection.cu": selection_checks.all_checks,
}


class Checks:
    """All checks, by the source that starts the kernels and their name there."""

    def __init__(self):
        self.makers = {kernels: all_checks() for kernels, all_checks in MAKERS.items()}
        self.made = {}

    def names(self, kernels: list[str]) -> list[tuple[str, str]]:
        return [(source, name) for source in kernels for name in self.makers[source]]

    def run(self, kernels: str, name: str) -> None:
        """Raises what the check raises."""
        if (kernels, name) not in self.made:
            folder = kernels.split("/")[0]
            with mock.patch.dict(os.environ, {library.ARCH: folder} if folder.startswith("sm") else {}):
                self.made[kernels, name] = self.makers[kernels][name]()
        self.made[kernels, name]()
