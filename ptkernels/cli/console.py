"""Progress and tables: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    def advance(self) -> None: ...

    def describe(self, text: str) -> None: ...


class _PlainProgress:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0

    def advance(self) -> None:
        self._done += 1

    def describe(self, text: str) -> None:
        print(f"{self._title} [{self._done + 1}/{self._total}] {text}", file=sys.stderr)


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """A progress bar on standard error; without rich, one line per step."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ModuleNotFoundError:
        yield _PlainProgress(title, total)
        return
    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, title=title)

        class Rich:
            def advance(self) -> None:
                bar.advance(task)

            def describe(self, text: str) -> None:
                bar.update(task, description=text)

        yield Rich()


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int | None = None
) -> None:
    """Print rows of text; columns from ``numbers_from`` on are right-aligned."""
    first_number = len(header) if numbers_from is None else numbers_from
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        _print_plain(title, header, rows, first_number)
        return
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index >= first_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width to fit into: folding there would only tear the columns.
        console = Console(width=240)
    console.print(table)


def _print_plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], first_number: int) -> None:
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    print(title)
    for row in (header, *rows):
        cells = (
            cell.rjust(width) if index >= first_number else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
