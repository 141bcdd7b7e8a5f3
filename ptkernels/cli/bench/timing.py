"""Interleaved timing: every contender runs in short alternating blocks, so drift of the machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Call = Callable[[], object]
Clock = Callable[[], float]

MIN_SAMPLE_SECONDS = 2e-4
"""Shorter calls are timed several at once, so that reading the clock stays far below 0.1 % of a sample."""
SHORT_CALL_SECONDS = 0.05
"""Below this a block starts with one untimed call: it wakes the contender's threads and refills the caches."""
LONG_CALL_SECONDS = 0.5
"""From here on the first call, already warmed by the check, is a sample like any other."""
MIN_ROUNDS, MAX_ROUNDS = 3, 25


@dataclass
class _Series:
    call: Call
    clock: Clock
    inner: int = 1
    per_block: int = 1
    estimate: float = 0.0
    samples: list[float] = field(default_factory=list)


def _time(call: Call, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _calibrate(call: Call, block_seconds: float, clock: Clock) -> _Series:
    estimate = _time(call, 1, clock)
    if estimate >= LONG_CALL_SECONDS:
        return _Series(call, clock, estimate=estimate, samples=[estimate])
    estimate = max(_time(call, 1, clock), 1e-9)
    if estimate < MIN_SAMPLE_SECONDS:
        # One call alone is dominated by its own variance; a second look gives the loop count.
        estimate = max(_time(call, 20, clock), 1e-9)
    inner = max(1, round(MIN_SAMPLE_SECONDS / estimate))
    per_block = max(1, min(1000, int(block_seconds / (estimate * inner))))
    return _Series(call, clock, inner, per_block, estimate)


def _run_block(series: _Series) -> None:
    if series.estimate < SHORT_CALL_SECONDS:
        series.call()
    for _ in range(series.per_block):
        series.samples.append(_time(series.call, series.inner, series.clock))


def interleave(
    calls: dict[str, Call], budget: float, clock: Clock = time.perf_counter, pause: float = 0.005
) -> dict[str, float]:
    """Median seconds per call of every contender.

    Args:
        calls: what each contender runs.
        budget: seconds to spend on all contenders together. Three blocks each are run as long as that takes no more
            than twice the budget, and one call in any case.
        clock: what samples are read from. ``time.process_time``, for calls of one thread, leaves out what other
            programs take of the processor.
        pause: seconds of sleep between blocks, in which the previous contender's idle threads stop spinning.

    Returns:
        The median over all samples per contender; a sample is one call, or the mean of a few very short ones.
    """
    if not calls:
        return {}
    start = time.perf_counter()
    block_seconds = budget / (len(calls) * 8)
    series = {name: _calibrate(call, block_seconds, clock) for name, call in calls.items()}
    order = list(series)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(MAX_ROUNDS):
            spent = time.perf_counter() - start
            limit = budget if round_index >= MIN_ROUNDS else 2 * budget
            if spent >= limit and all(one.samples for one in series.values()):
                break
            # The start rotates so that nobody always runs right after the same neighbour warmed or cooled the machine.
            shift = round_index % len(order)
            for name in _rotated(order, shift):
                time.sleep(pause)
                _run_block(series[name])
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(one.samples) for name, one in series.items()}


def _rotated(names: list[str], shift: int) -> Iterable[str]:
    # Every other round runs backwards: plain rotation would keep each contender behind the same predecessor.
    rotated = names[shift:] + names[:shift]
    return rotated if shift % 2 == 0 else reversed(rotated)
