"""The parts of the benchmark that turn calls into figures."""

from __future__ import annotations

import time
from itertools import groupby

import pytest

from ptkernels.cli.bench.limits import Limits
from ptkernels.cli.bench.report import milliseconds, note_lines, rate
from ptkernels.cli.bench.results import Note, Row
from ptkernels.cli.bench.timing import MAX_ROUNDS, interleave


def test_contenders_alternate_and_medians_are_theirs() -> None:
    log: list[str] = []

    def sleeper(name: str, seconds: float) -> None:
        log.append(name)
        time.sleep(seconds)

    seconds = interleave(
        {"short": lambda: sleeper("short", 0.001), "long": lambda: sleeper("long", 0.004)}, budget=0.4, pause=0.0
    )
    assert seconds["short"] >= 0.001
    assert seconds["long"] >= 0.004
    blocks = [name for name, _ in groupby(log)]
    # Three rounds at least of two blocks each; neighbouring blocks of one contender merge where the order reverses.
    assert len(blocks) > MAX_ROUNDS // 3
    assert abs(blocks.count("short") - blocks.count("long")) <= 1


def test_a_contender_over_the_budget_is_still_measured() -> None:
    calls = 0

    def slow() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.6)

    seconds = interleave({"slow": slow}, budget=0.01)
    assert seconds["slow"] >= 0.6
    assert calls == 1


def test_no_contenders_take_no_time() -> None:
    assert interleave({}, 10.0) == {}


def test_limit_fraction_is_the_roofline() -> None:
    limits = Limits({"float32": 100.0, "bfloat16": None}, 10.0, {})
    assert limits.fraction("float32", seconds=4.0, flops=200.0, moved_bytes=10.0) == pytest.approx(0.5)
    assert limits.fraction("float32", seconds=4.0, flops=1.0, moved_bytes=10.0) == pytest.approx(0.25)
    assert limits.fraction("bfloat16", seconds=4.0, flops=1.0, moved_bytes=10.0) is None
    assert Limits({"float32": 100.0}, None, {}).fraction("float32", 4.0, 1.0, 1.0) is None


def test_ratio_is_taken_from_the_fastest_peer() -> None:
    row = Row("op", "case", {}, "float32", "forward", "cpu", "k", seconds=2.0, peers={"a": 5.0, "b": 3.0})
    row.settle()
    assert (row.best_peer, row.ratio) == ("b", 1.5)


def test_notes_are_grouped_with_failures_first() -> None:
    notes = [Note("a", "slow", "peer"), Note("b", "slow", "peer"), Note("c", "wrong", failure=True)]
    assert note_lines(notes) == ["FAILED: wrong (c)", "note: peer: slow (2 cases)"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (rate(4.34e11, "FLOP/s"), "434 GFLOP/s"),
        (rate(6.2e12, "FLOP/s"), "6.2 TFLOP/s"),
        (rate(None, "B/s"), "unknown"),
        (milliseconds(1.5e-5), "0.015"),
        (milliseconds(None), "-"),
    ],
)
def test_figures_read_well(text: str, expected: str) -> None:
    assert text == expected
