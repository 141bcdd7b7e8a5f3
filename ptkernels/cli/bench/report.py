"""The table a run prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ptkernels.cli.console import print_table

from .results import ModelRun, Note, Results, Row

HEADER = (
    "case",
    "dtype",
    "direction",
    "kernel",
    "best peer",
    "ours ms",
    "peer ms",
    "ratio",
    "% of limit",
    "error/bound",
)
FIRST_NUMBER = 5


def number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else format(seconds * 1e3, ".3f" if seconds < 0.1 else ".1f")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, in the order of ``HEADER``."""
    margin = row.error / row.error_bound if row.error is not None and row.error_bound else None
    return (
        row.case,
        row.dtype,
        row.direction,
        row.kernel,
        row.best_peer or "-",
        milliseconds(row.seconds) if row.seconds is not None else "failed",
        milliseconds(row.peers[row.best_peer]) if row.best_peer else "-",
        number(row.ratio, ".2f"),
        number(None if row.limit_fraction is None else row.limit_fraction * 100, ".1f"),
        number(margin, ".2f"),
    )


def machine_lines(results: Results) -> list[str]:
    """The machine, the software and the measured limits, one line each."""
    machine = results.machine
    isa, versions = machine["isa"], machine["versions"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"ISA {isa['active']} (detected {isa['detected']}{', emulated' if isa['emulated'] else ''})",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit {results.commit or 'unknown'}",
    ]
    if machine["load"] > 0.5:
        lines.append(f"other programs were running (load {machine['load']:.1f}): these times are not to be relied on")
    limits = machine["limits"]
    peaks = [f"{name} {rate(peak, 'FLOP/s')}" for name, peak in limits["peak_flops"].items()]
    lines.append(f"limits: {', '.join(peaks)}; read {rate(limits['read_bandwidth'], 'B/s')}")
    return lines


def mean_lines(rows: Sequence[Row]) -> list[str]:
    """Geometric mean and least of the ratios to the best peer, per dtype and direction."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            ratios.setdefault((row.dtype, row.direction), []).append(row.ratio)
    return [
        f"{dtype} {direction}: {statistics.geometric_mean(values):.2f} times the best peer's speed "
        f"(geometric mean of {len(values)}; least {min(values):.2f})"
        for (dtype, direction), values in ratios.items()
    ]


def rate(value: float | None, unit: str) -> str:
    """A rate with a readable prefix: ``rate(4.3e11, "FLOP/s")`` is ``430 GFLOP/s``."""
    if value is None:
        return "unknown"
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def model_lines(model: ModelRun) -> list[str]:
    """The pretrained-model section in words."""
    times = ", ".join(f"{name} {milliseconds(seconds)} ms" for name, seconds in model.seconds.items())
    return [
        f"{model.name}, {model.dtype}: {model.sentences} English and Vietnamese sentences, {model.tokens} tokens",
        f"  all of them: {times}",
        f"  embeddings: error {model.error:.3g}, bound {model.error_bound:.3g} (plain torch {model.plain_error:.3g})",
        f"  nearest neighbours changed: {model.neighbours_changed} of {model.sentences}",
    ]


def print_report(results: Results) -> None:
    """Print the tables, the pretrained-model section, the notes and the machine."""
    for op in dict.fromkeys(row.op for row in results.rows):
        rows = [cells(row) for row in results.rows if row.op == op]
        print_table(op, HEADER, rows, FIRST_NUMBER)
        print("\n".join(mean_lines([row for row in results.rows if row.op == op])))
    if results.model is not None:
        print("\n".join(model_lines(results.model)))
    print()
    for line in note_lines(results.notes):
        print(line)
    print("\n".join(machine_lines(results)))


def note_lines(notes: Sequence[Note]) -> list[str]:
    """One line per distinct remark, with the cases it holds for."""
    grouped: dict[tuple[bool, str | None, str], list[str]] = {}
    for note in notes:
        grouped.setdefault((note.failure, note.contender, note.text), []).append(note.case)
    lines = []
    for (failure, contender, text), cases in sorted(grouped.items(), key=lambda item: not item[0][0]):
        subject = "" if contender is None else f"{contender}: "
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        lines.append(f"{'FAILED' if failure else 'note'}: {subject}{text} ({where})")
    return lines
