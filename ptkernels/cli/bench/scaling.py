"""Time attention at lengths that double, with several numbers of threads, beside PyTorch's fused attention."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptkernels import _registry
from ptkernels._registry import BenchCase, OpSpec
from ptkernels.cli.files import write_atomically
from ptkernels.ops.attention.spec import doubling_cases

from . import limits
from .report import print_report
from .results import Results
from .runner import FULL, Runner, Selection


@dataclass(frozen=True)
class _Doubling(Selection):
    longest: int = 0

    def cases(self, spec: OpSpec) -> list[BenchCase]:
        return [case for case in doubling_cases(self.longest) if self._takes(case)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--longest", type=int, default=4096, metavar="N", help="largest length (default: 4096)")
    parser.add_argument(
        "--thread-counts", type=int, nargs="+", metavar="N", help="default: 1 and as many as torch has by itself"
    )


def measure(results: Results, selection: Selection, thread_counts: Sequence[int], longest: int) -> None:
    """Add a row for every length, dtype, direction and number of threads, checked as those of ``bench`` are."""
    spec, before = _registry.get("attention"), torch.get_num_threads()
    peers = ("torch-sdpa",) if selection.peers is None else selection.peers
    doubling = _Doubling((), ("doubling",), selection.dtypes, selection.directions, peers, longest)
    try:
        for threads in thread_counts:
            torch.set_num_threads(threads)
            first = len(results.rows)
            Runner([spec], doubling, FULL, False, limits.measure(threads), threads, results).run()
            for row in results.rows[first:]:
                row.shape = {**row.shape, "threads": threads}
    finally:
        torch.set_num_threads(before)


def run(arguments: argparse.Namespace, results: Results, selection: Selection) -> int:
    """Measure, print, and write what was asked for; 0 when every case passed its check."""
    counts = arguments.thread_counts or sorted({1, torch.get_num_threads()})
    measure(results, selection, counts, arguments.longest)
    if arguments.json:
        write_atomically(arguments.json, results.to_json())
    if arguments.html:
        from .html import report_page

        write_atomically(arguments.html, report_page(results))
    print_report(results)
    return 1 if results.failures() else 0
