"""Check every operator against its float64 reference, then time it against its peers on shapes of real models.

``ptkernels bench scaling`` times attention at lengths that double, with several numbers of threads, and draws them.
``ptkernels bench compare BEFORE.json AFTER.json`` puts two result files side by side; ``ptkernels bench page FILE.json
FILE.html`` draws one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch

from ptkernels import _registry
from ptkernels._registry import OpSpec
from ptkernels.cli import machine
from ptkernels.cli.arguments import parse_dtype
from ptkernels.cli.files import write_atomically

from . import compare, limits, scaling
from .peers import peers_of
from .problem import dtype_name
from .report import print_report
from .results import Results, commit_id, load
from .runner import FULL, QUICK, Runner, Selection

EXTRA = "pip install ptkernels[bench]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_options(parser)
    parser.set_defaults(action=measure)
    actions = parser.add_subparsers(metavar="[compare | page | scaling]")
    comparison = actions.add_parser("compare", help="put two result files side by side", description=compare.__doc__)
    comparison.add_argument("before", metavar="BEFORE.json")
    comparison.add_argument("after", metavar="AFTER.json")
    comparison.add_argument("--html", metavar="FILE", help="also write a page with a plot")
    comparison.set_defaults(action=compare.run)
    drawing = actions.add_parser("page", help="write the page of a result file", description=page.__doc__)
    drawing.add_argument("results", metavar="FILE.json")
    drawing.add_argument("html", metavar="FILE.html")
    drawing.set_defaults(action=page)
    growing = actions.add_parser("scaling", help="attention at lengths that double", description=scaling.__doc__)
    scaling.add_arguments(growing)
    growing.set_defaults(action=scale)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this operator (may be repeated)"
    )
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only cases whose name has this")
    parser.add_argument("--dtype", action="append", default=[], help="only this dtype (may be repeated)")
    parser.add_argument("--direction", choices=("forward", "forward+backward"), action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="fewer cases, within two minutes")
    parser.add_argument("--peers", metavar="NAME,...", help="only these peers, or none (default: all installed)")
    parser.add_argument("--threads", type=int, metavar="N", help="for every contender (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write the results there, after every case")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page with plots there")


def run(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def measure(arguments: argparse.Namespace) -> int:
    """Run the benchmark; 0 when every case passed its check, 1 when one failed, 130 when interrupted."""
    _require_extra(page=arguments.html is not None)
    specs = [_registry.get(name) for name in arguments.op or _registry.all_ops()]
    selection = _selection(arguments, specs)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results, measured = _open_results(specs)

    def save() -> None:
        if arguments.json:
            write_atomically(arguments.json, results.to_json())

    effort = QUICK if arguments.quick else FULL
    runner = Runner(specs, selection, effort, arguments.quick, measured, torch.get_num_threads(), results, save)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        try:
            runner.run()
        except KeyboardInterrupt:
            results.status = "interrupted"
            # A second Ctrl-C must not cut short the writing of what was measured.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        save()
        if arguments.html:
            from .html import report_page

            write_atomically(arguments.html, report_page(results))
        print_report(results)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if results.status == "interrupted":
        print("interrupted: the results are partial", file=sys.stderr)
        return 130
    if not results.rows:
        raise ValueError("no case was run: nothing matches the selection, or every case was skipped")
    return 1 if results.failures() else 0


def scale(arguments: argparse.Namespace) -> int:
    """Measure attention at lengths that double, with several numbers of threads."""
    _require_extra(page=arguments.html is not None)
    specs = [_registry.get("attention")]
    results, _ = _open_results(specs)
    return scaling.run(arguments, results, _selection(arguments, specs))


def page(arguments: argparse.Namespace) -> int:
    """Write the self-contained page of a result file."""
    _require_extra(page=True)
    from .html import report_page

    write_atomically(arguments.html, report_page(load(arguments.results)))
    return 0


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _require_extra(page: bool) -> None:
    needed = ["rich", *(["matplotlib"] if page else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"bench needs {' and '.join(missing)}: {EXTRA}")


def _selection(arguments: argparse.Namespace, specs: Sequence[OpSpec]) -> Selection:
    peers = None
    if arguments.peers is not None:
        known = {peer.name for spec in specs for peer in peers_of(spec)}
        peers = tuple(name for name in arguments.peers.split(",") if name not in ("", "none"))
        unknown = [name for name in peers if name not in known]
        if unknown:
            raise ValueError(f"peers: got {unknown[0]!r}, expected none or some of {', '.join(sorted(known))}")
    return Selection(
        patterns=tuple(arguments.case),
        dtypes=tuple(dtype_name(parse_dtype(name)) for name in arguments.dtype),
        directions=tuple(arguments.direction),
        peers=peers,
    )


def _open_results(specs: Sequence[OpSpec]) -> tuple[Results, limits.Limits]:
    threads = torch.get_num_threads()
    measured = limits.measure(threads)
    about = {
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "memory_bytes": limits.total_memory(),
        "isa": machine.isa(),
        "versions": machine.versions("onnxruntime", "openvino", "triton"),
        "build": machine.build(),
        "limits": {
            "peak_flops": measured.peak_flops,
            "read_bandwidth": measured.read_bandwidth,
            "unknown": measured.unknown,
        },
    }
    return Results(about, commit_id()), measured
