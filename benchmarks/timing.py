"""Times several contenders in turn, so that a change of the machine's mood meets them all."""

import time
from collections.abc import Callable

import numpy as np

from benchmarks.progress import Progress

# A sample shorter than this is made of several calls.
MIN_SAMPLE_SECONDS = 2e-3
LONG_CALL_SECONDS = 0.5
MIN_ROUNDS = 3
# The contender before is left time to end: its threads spin for a while, and gigabytes go back to the system in the background.
SETTLE_SECONDS = (0.01, 2.0)
SETTLE_SHARE = 0.2

Call = Callable[[], None]  # runs once, and returns when the result is there


def time_interleaved(calls: dict[str, Call], *, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every contender, one sample in each round, after a warm-up.

    Args:
      calls: by name.
      repeats: rounds.
      seconds: no round starts later than this, once there are three.
    """
    counts = {name: calls_per_sample(call) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    names = list(calls)
    progress = Progress(repeats * len(calls), "timing")
    started = time.monotonic()
    for round_number in range(repeats):
        if round_number >= MIN_ROUNDS and time.monotonic() - started > seconds:
            break
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(time_sample(calls[name], counts[name]))
            progress.step(name)
    progress.close()
    return samples


def calls_per_sample(call: Call) -> int:
    """Warms up, twice if that is cheap."""
    first = time_sample(call, 1)
    return 1 if first > LONG_CALL_SECONDS else max(1, round(MIN_SAMPLE_SECONDS / time_sample(call, 1)))


def time_sample(call: Call, count: int) -> float:
    """Seconds per call, over `count` calls one after another."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    seconds = time.perf_counter() - start
    time.sleep(min(max(SETTLE_SHARE * seconds, SETTLE_SECONDS[0]), SETTLE_SECONDS[1]))
    return seconds / count


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    median, p10, p90 = np.percentile(seconds, [50, 10, 90]) * 1e3
    return dict(median_ms=float(median), p10_ms=float(p10), p90_ms=float(p90))
