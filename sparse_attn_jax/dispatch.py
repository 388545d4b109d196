"""Which implementation runs a problem, and why not the others. The only module that names implementations."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import ModuleType

from absl import logging

from sparse_attn_jax import measured
from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.implementations import cuda, mosaic, xla
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.problems import AnyProblem
from sparse_attn_jax.scoring_problem import ScoringProblem

# In order of preference, where nothing was measured.
IMPLEMENTATIONS: Mapping[str, ModuleType] = {"mosaic": mosaic, "cuda": cuda, "xla": xla}

# For Ampere both have kernels of the same structure. Those of `cuda` have more head_dims, and their simulation runs the very
# copies and waits that are compiled.
AMPERE_ORDER = ("cuda", "mosaic", "xla")

# The names of the library's own custom calls. An exported program depends on them, which `jax.export.export` wants to be told:
# disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALL_TARGETS].
CUSTOM_CALL_TARGETS: tuple[str, ...] = cuda.CUSTOM_CALL_TARGETS

# What a call is named, and the function of an implementation that gives the reasons against it.
CALLS = {
    Problem: ("attention (forward and backward)", "supports"),
    ScoringProblem: ("selection", "supports_scoring"),
    PagedProblem: ("paged attention", "supports_paged"),
    ExtremaProblem: ("extrema of blocks", "supports_extrema"),
    BoundProblem: ("selection by bounds", "supports_bounds"),
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why an implementation was chosen.

    Attributes:
      implementation: the name that runs the problem, forward and backward; `None` if none of those asked for can.
      reasons: for each implementation asked for, in order of preference, the reasons against it; empty if it can run.
      problem: what was asked: one of the kinds that `CALLS` has.
    """

    implementation: str | None
    reasons: Mapping[str, tuple[str, ...]]
    problem: AnyProblem

    def __str__(self) -> str:
        what, _ = CALLS[type(self.problem)]
        lines = [f"{what} runs on: {self.implementation or 'none'}"]
        for name, reasons in self.reasons.items():
            lines += [f"not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def get(name: str) -> ModuleType:
    return IMPLEMENTATIONS[name]


def reasons_against(name: str, problem: AnyProblem) -> tuple[str, ...]:
    """An implementation's reasons against `problem`; empty if it can run it."""
    _, supports = CALLS[type(problem)]
    return getattr(get(name), supports)(problem)


def default_order(problem: AnyProblem) -> tuple[str, ...]:
    """The order of preference for a problem, where nothing was measured."""
    return AMPERE_ORDER if problem.compute_capability == "8.0" else tuple(IMPLEMENTATIONS)


def requested_names(implementation: str | Sequence[str] | None, problem: AnyProblem | None = None) -> tuple[str, ...]:
    """The implementations to consider, in order: as given, or the fastest first as far as they were measured on the device."""
    if implementation is None:
        return tuple(IMPLEMENTATIONS) if problem is None else measured.fastest_first(default_order(problem), problem)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names or ("",):
        if name not in IMPLEMENTATIONS:
            known = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(f"`implementation` is {implementation!r}; it must be one of {known}, a sequence of them or None.")
    return names


def explain(problem: AnyProblem, implementation: str | Sequence[str] | None) -> Explanation:
    names = requested_names(implementation, problem)
    reasons = {name: reasons_against(name, problem) for name in names}
    chosen = next((name for name in names if not reasons[name]), None)
    return Explanation(chosen, reasons, problem)


def choose(problem: AnyProblem, implementation: str | Sequence[str] | None) -> str:
    """The first implementation asked for that can run `problem`, forward and backward. Those after it are not asked.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: none of those asked for can; with every reason.
    """
    reasons: dict[str, tuple[str, ...]] = {}
    for name in requested_names(implementation, problem):
        reasons[name] = reasons_against(name, problem)
        if not reasons[name]:
            if implementation is None:
                _log_once(str(Explanation(name, reasons, problem)))
            return name
    text = "; ".join(f"{name}: {reason}" for name, rs in reasons.items() for reason in rs)
    raise NotImplementedError(f"`implementation` is {implementation!r}, which cannot run this call. {text}. {problem}")


@functools.cache
def _log_once(text: str) -> None:
    logging.info("sparse_attn_jax: %s", text)
