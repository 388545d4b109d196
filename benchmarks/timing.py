"""Times several contenders in turn, so that a change of the machine's mood meets them all."""

import dataclasses
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.progress import Progress

# A sample shorter than this is made of several calls.
MIN_SAMPLE_SECONDS = 0.1
MIN_ROUNDS = 3
# A call shorter than this is made once more before each sample, untimed: it pays for what the contender before left behind,
# cold caches, threads that spin, and memory that XLA's threads give back only when they get new work (a second for 10 GiB).
SHORT_CALL_SECONDS = 1.0
SETTLE_SECONDS = 0.01

Call = Callable[[], Any]  # runs once, and returns when the result is there


@dataclasses.dataclass(frozen=True)
class Enqueued:
    """A call in two parts. On an accelerator those of a sample are started one after another, and waited for once.

    Attributes:
      start: returns what to wait for, perhaps before it is there.
      wait: until it, and all that was started before, is there.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]

    def __call__(self) -> None:
        self.wait(self.start())


def time_interleaved(
    calls: dict[Any, Call], *, repeats: int, seconds: float, on_failure: Callable[[Any, Exception], None] | None = None
) -> dict[Any, list[float]]:
    """Seconds per call of every contender, one sample in each round, after a warm-up. The order changes from round to round.

    Args:
      calls: by name.
      repeats: rounds.
      seconds: no round starts later than this, once there are three.
      on_failure: takes the name of a call that fails, which has no more turns, and the error. Default: raise it.
    """
    calls, samples = dict(calls), {name: [] for name in calls}

    def attempt(run, name, *arguments):
        try:
            return run(calls[name], *arguments)
        except Exception as error:
            if on_failure is None:
                raise
            del calls[name]
            on_failure(name, error)

    expected = {name: attempt(warm_up, name) for name in samples}
    order = random.Random(0)
    progress = Progress(repeats * len(calls), "timing")
    started = time.monotonic()
    for round_number in range(repeats):
        if round_number >= MIN_ROUNDS and time.monotonic() - started > seconds:
            break
        for name in order.sample(list(calls), len(calls)):
            if (found := attempt(sample, name, expected[name])) is not None:
                samples[name].append(found)
            progress.step(str(name))
    progress.close()
    return samples


def warm_up(call: Call) -> float:
    """Seconds that a call takes; the second call's where that is cheap."""
    first = time_calls(call, 1)
    return first if first > SHORT_CALL_SECONDS else time_calls(call, 1)


def sample(call: Call, expected: float) -> float:
    """Seconds per call; `expected`: about how many that will be."""
    time.sleep(SETTLE_SECONDS)
    if expected < SHORT_CALL_SECONDS:
        call()
    return time_calls(call, max(1, round(MIN_SAMPLE_SECONDS / expected)))


def time_calls(call: Call, count: int) -> float:
    """Seconds per call, over `count` calls one after another."""
    start = time.perf_counter()
    if isinstance(call, Enqueued) and jax.default_backend() != "cpu":
        # A wait for each would count the way there and back with the kernel. A CPU would run them beside each other.
        for _ in range(count):
            result = call.start()
        call.wait(result)
    else:
        for _ in range(count):
            call()
    return (time.perf_counter() - start) / count


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    median, p10, p90 = np.percentile(seconds, [50, 10, 90]) * 1e3
    return dict(median_ms=float(median), p10_ms=float(p10), p90_ms=float(p90))
