"""Two result files side by side, case by case."""

from __future__ import annotations

import argparse
import math

from ptkernels.cli.console import print_table
from ptkernels.cli.files import write_atomically

from . import results
from .report import milliseconds, number
from .results import Results, Row

HEADER = ("case", "dtype", "direction", "before ms", "after ms", "times faster", "ratio before", "ratio after")


def matched(before: Results, after: Results) -> list[tuple[Row, Row]]:
    """The rows that both runs timed."""
    earlier = {(row.op, row.case, row.dtype, row.direction): row for row in before.rows if row.seconds}
    keys = ((row, earlier.get((row.op, row.case, row.dtype, row.direction))) for row in after.rows if row.seconds)
    return [(old, row) for row, old in keys if old is not None]


def cells(before: Row, after: Row) -> tuple[str, ...]:
    assert before.seconds is not None
    assert after.seconds is not None
    return (
        after.case,
        after.dtype,
        after.direction,
        milliseconds(before.seconds),
        milliseconds(after.seconds),
        f"{before.seconds / after.seconds:.2f}",
        number(before.ratio, ".2f"),
        number(after.ratio, ".2f"),
    )


def run(arguments: argparse.Namespace) -> int:
    names = (arguments.before, arguments.after)
    before, after = map(results.load, names)
    pairs = matched(before, after)
    if not pairs:
        raise ValueError(f"compare: {names[0]} and {names[1]} have no timed case in common")
    rows = [cells(*pair) for pair in pairs]
    print_table(f"{names[0]} ({before.commit[:12]}) and {names[1]} ({after.commit[:12]})", HEADER, rows, 3)
    mean = math.exp(sum(math.log(float(old.seconds or 1) / float(new.seconds or 1)) for old, new in pairs) / len(pairs))
    print(f"geometric mean: {mean:.2f} times faster over {len(pairs)} cases")
    machines = [run.machine.get("cpu") for run in (before, after)]
    if machines[0] != machines[1]:
        print(f"different machines ({machines[0]}, {machines[1]}): compare the ratios, not the times")
    if arguments.html:
        from .html import comparison_page

        lines = ["  ".join(row) for row in (HEADER, *rows)]
        write_atomically(arguments.html, comparison_page(names, pairs, lines))
    return 0
