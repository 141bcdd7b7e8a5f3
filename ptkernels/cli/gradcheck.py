"""Check first and second derivatives of every operator against finite differences in float64."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ptkernels import _registry
from ptkernels._registry import OpSpec, Sample
from ptkernels.cli.arguments import bind
from ptkernels.cli.console import progress
from ptkernels.cli.files import write_atomically

Check = Literal["gradcheck", "gradgradcheck"]
CHECKS: tuple[Check, ...] = ("gradcheck", "gradgradcheck")


@dataclass(frozen=True)
class Outcome:
    """One check of one sample; ``message`` says what disagreed."""

    op: str
    sample: str
    check: Check
    passed: bool
    seconds: float
    message: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", metavar="NAME", help="only this operator (may be repeated)")
    parser.add_argument(
        "--level",
        choices=("quick", "full"),
        default="quick",
        help="quick compares random projections of the Jacobian, full every element (default: quick)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the outcomes there")


def run(arguments: argparse.Namespace) -> int:
    specs = [_registry.get(name) for name in arguments.op or _registry.all_ops()]
    fast = arguments.level == "quick"
    work = [(spec, sample, check) for spec in specs for sample in samples_of(spec) for check in CHECKS]
    outcomes = []
    with progress("gradcheck", len(work)) as bar:
        for spec, sample, check in work:
            bar.describe(f"{spec.name} {sample.name} {check}")
            outcomes.append(attempt(spec, sample, check, fast))
            bar.advance()
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        print(f"FAILED {outcome.op} {outcome.sample} {outcome.check}: {outcome.message}", file=sys.stderr)
    print(f"gradcheck: {len(outcomes) - len(failed)} passed, {len(failed)} failed")
    if arguments.json:
        content = {"passed": not failed and bool(outcomes), "outcomes": [asdict(outcome) for outcome in outcomes]}
        write_atomically(arguments.json, json.dumps(content, indent=1) + "\n")
    # Nothing checked is not a success.
    return 0 if outcomes and not failed else 1


def samples_of(spec: OpSpec) -> list[Sample]:
    """The operator's samples that have something to differentiate, small enough for finite differences."""
    return [sample for sample in spec.samples(torch.float64, "cpu", True, "gradcheck") if sample.grad_inputs]


def attempt(spec: OpSpec, sample: Sample, check: Check, fast: bool) -> Outcome:
    """Run one check; whatever it raises becomes the outcome's message."""
    names = sample.grad_inputs
    named = bind(spec.reference, sample.args, sample.kwargs)

    def function(*inputs: Tensor) -> Any:
        return spec.function(**{**named, **dict(zip(names, inputs, strict=True))})

    inputs = tuple(named[name] for name in names)
    start = time.monotonic()
    try:
        if check == "gradcheck":
            torch.autograd.gradcheck(function, inputs, fast_mode=fast)
        else:
            torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)
        message = ""
    except Exception as error:  # a failing operator may raise anything; the remaining checks still run
        # Past the first paragraph gradcheck prints whole Jacobians.
        message = f"{type(error).__name__}: {' '.join(str(error).partition(chr(10) * 2)[0].split())}"
    return Outcome(spec.name, sample.name, check, not message, time.monotonic() - start, message)
