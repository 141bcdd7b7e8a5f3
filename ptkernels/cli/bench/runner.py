"""Runs the cases: check first, then time, one row after the other, saved as they come."""

from __future__ import annotations

import fnmatch
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ptkernels._registry import BenchCase, OpSpec
from ptkernels.cli.console import Progress, progress

from . import pretrained
from .gate import PEER_SLACK, Oracle
from .limits import Limits, available_memory
from .peers import COMPILE, parts_of, peers_of
from .problem import Contender, Peer, Problem, UnsupportedError, dtype_name
from .results import Note, Results, Row
from .timing import interleave

OURS = "ptkernels"


@dataclass(frozen=True)
class Selection:
    """Which cases and peers to run; empty tuples select everything."""

    ops: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    peers: tuple[str, ...] | None = None

    def cases(self, spec: OpSpec) -> list[BenchCase]:
        return [case for case in spec.bench_cases() if self._takes(case)]

    def takes_model(self) -> bool:
        """Whether the pretrained model (float32, forward) belongs to the selection."""
        return (
            not self.patterns
            and (not self.dtypes or "float32" in self.dtypes)
            and (not self.directions or "forward" in self.directions)
        )

    def _takes(self, case: BenchCase) -> bool:
        return (
            (not self.patterns or any(fnmatch.fnmatch(case.name, f"*{pattern}*") for pattern in self.patterns))
            and (not self.dtypes or dtype_name(case.dtype) in self.dtypes)
            and (not self.directions or case.direction in self.directions)
        )


@dataclass(frozen=True)
class Effort:
    """How much time a run may take.

    ``total_seconds`` bounds the run (None: no bound); ``contender_seconds`` is the timing budget per contender of a
    case; ``check_flops`` is what the float64 check of one case may cost; ``compiled_cases`` is how many cases are also
    given to torch.compile, which costs seconds of compilation each (None: all); ``max_flops`` leaves out larger cases.
    """

    total_seconds: float | None = None
    contender_seconds: float = 1.0
    check_flops: float = 2e10
    compiled_cases: int | None = None
    max_flops: float = math.inf
    model_seconds: float = 30.0
    model_every: int = 1


FULL = Effort()
QUICK = Effort(
    total_seconds=95.0,
    contender_seconds=0.3,
    check_flops=1e9,
    compiled_cases=1,
    max_flops=2e10,
    model_seconds=6.0,
    model_every=8,
)


def label(case: BenchCase) -> str:
    """What tells a case from all others of its operator."""
    return f"{case.name} {dtype_name(case.dtype)} {case.direction}"


def quick_cases(cases: Sequence[BenchCase]) -> list[BenchCase]:
    """The smallest case per model, dtype and direction, cheapest first: what is cut off for time is the largest."""
    smallest: dict[tuple[str, torch.dtype, str], BenchCase] = {}
    for case in cases:
        key = (case.model, case.dtype, case.direction)
        if key not in smallest or case.work_flops < smallest[key].work_flops:
            smallest[key] = case
    return sorted(smallest.values(), key=lambda case: case.work_flops)


@dataclass
class Runner:
    """State of one run: what was asked for, what came out."""

    specs: Sequence[OpSpec]
    selection: Selection
    effort: Effort
    quick: bool
    limits: Limits
    threads: int
    results: Results
    save: Callable[[], None] = lambda: None
    _started: float = field(default_factory=time.monotonic)
    _compiled: int = 0

    def run(self) -> None:
        """Run every selected case and the pretrained model; the results are complete up to the last finished row."""
        plan = self._plan()
        with_model = self.selection.takes_model() and any(spec.name == "attention" for spec in self.specs)
        with progress("bench", len(plan) + with_model) as bar:
            for done, (spec, case) in enumerate(plan):
                bar.describe(label(case))
                if self._out_of_time():
                    left = [label(case) for _, case in plan[done:]]
                    self.results.notes += [Note(name, "not run: the time of --quick was used up") for name in left]
                    break
                self._case(spec, case, bar)
                self.save()
                bar.advance()
            if with_model:
                bar.describe(pretrained.NAME)
                self._model(next(spec for spec in self.specs if spec.name == "attention"))
                bar.advance()
        self.results.status = "complete"
        self.save()

    def _plan(self) -> list[tuple[OpSpec, BenchCase]]:
        queues = [[(spec, case) for case in self._cases(spec)] for spec in self.specs]
        if self.quick:
            # What is cut off for time is cut off every operator.
            return [item for turn in itertools.zip_longest(*queues) for item in turn if item is not None]
        return [item for queue in queues for item in queue]

    def _cases(self, spec: OpSpec) -> list[BenchCase]:
        cases = self.selection.cases(spec)
        if not self.quick:
            return cases
        chosen = quick_cases([case for case in cases if case.work_flops <= self.effort.max_flops])
        if len(chosen) < len(cases):
            self._note("selection", f"--quick runs {len(chosen)} of {len(cases)} cases: the smallest of every model")
        return chosen

    def _out_of_time(self) -> bool:
        total = self.effort.total_seconds
        return total is not None and time.monotonic() - self._started > total - 3 * self.effort.model_seconds

    def _note(self, case: str, text: str, contender: str | None = None, failure: bool = False) -> None:
        self.results.notes.append(Note(case, text, contender, failure))

    def _case(self, spec: OpSpec, case: BenchCase, bar: Progress) -> None:
        memory = available_memory()
        # Four times: the tensors, a float64 copy of what is checked, and room for a peer's own copies.
        if memory is not None and 4 * case.work_bytes > memory:
            self._note(
                label(case), f"skipped: needs about {4 * case.work_bytes >> 20} MiB, {memory >> 20} MiB are free"
            )
            return
        problem = Problem(spec, case)
        explanation = spec.explain(*problem.args, **problem.kwargs)
        row = Row(
            op=spec.name,
            case=case.name,
            shape=case.shape,
            dtype=dtype_name(case.dtype),
            direction=case.direction,
            backend=explanation.backend,
            kernel=explanation.kernel,
            work_flops=case.work_flops,
            work_bytes=case.work_bytes,
        )
        ours = problem.contender(OURS, spec.function)
        bar.describe(f"{label(case)}: check")
        oracle = self._check_ours(problem, ours, row)
        if oracle is not None:
            contenders = [ours, *self._peers(problem, oracle, bar)]
            bar.describe(f"{label(case)}: time")
            self._time(contenders, row, case.multiplied or case.dtype)
        self.results.rows.append(row)

    def _check_ours(self, problem: Problem, ours: Contender, row: Row) -> Oracle | None:
        try:
            outputs = ours.outputs()
            parts = parts_of(problem, self.effort.check_flops)
            results = outputs[: len(outputs) - len(problem.leaves)]
            oracle = Oracle(problem, parts, results)
        except Exception as error:  # a kernel that raises is a failed case, not the end of the run
            self._note(label(problem.case), _first_line(error), OURS, failure=True)
            return None
        if parts[0].named is not problem.named:
            self._note(label(problem.case), "checked on evenly spread groups of heads, not on all")
        verdict = oracle.check(outputs)
        row.error, row.error_bound = verdict.error, verdict.bound
        if not verdict.passed:
            self._note(
                label(problem.case), f"does not agree with the float64 reference: {verdict.text}", OURS, failure=True
            )
            return None
        return oracle

    def _peers(self, problem: Problem, oracle: Oracle, bar: Progress) -> Iterator[Contender]:
        case = problem.case
        for peer in peers_of(problem.spec):
            if not self._wanted(peer.name):
                continue
            bar.describe(f"{label(case)}: {peer.name}")
            try:
                contender = self._prepare(peer, problem)
                verdict = oracle.check(contender.outputs(), PEER_SLACK, contender.noise)
            except UnsupportedError as error:
                self._note(label(case), str(error), peer.name)
                continue
            except Exception as error:  # whatever a peer raises concerns the peer alone
                self._note(label(case), _first_line(error), peer.name)
                continue
            if verdict.passed:
                yield contender
            else:
                self._note(label(case), f"not timed, wrong result: {verdict.text}", peer.name)

    def _wanted(self, name: str) -> bool:
        return self.selection.peers is None or name in self.selection.peers

    def _prepare(self, peer: Peer, problem: Problem) -> Contender:
        try:
            peer.version()
        except ImportError as error:
            raise UnsupportedError(f"{error.name} is not installed (pip install ptkernels[bench])") from error
        if peer.name == COMPILE and self.effort.compiled_cases is not None:
            if self._compiled >= self.effort.compiled_cases:
                raise UnsupportedError("left out by --quick after the first case: compiling takes seconds")
            self._compiled += 1
        return peer.prepare(problem, self.threads)

    def _time(self, contenders: Sequence[Contender], row: Row, multiplied: torch.dtype) -> None:
        budget = self.effort.contender_seconds * len(contenders)
        seconds = interleave({contender.name: contender.call for contender in contenders}, budget)
        row.seconds = seconds.pop(OURS)
        row.peers = seconds
        row.settle()
        row.limit_fraction = self.limits.fraction(dtype_name(multiplied), row.seconds, row.work_flops, row.work_bytes)

    def _model(self, spec: OpSpec) -> None:
        try:
            section, row = pretrained.run(spec, self.effort.model_seconds, self.effort.model_every)
        except UnsupportedError as error:
            self._note(pretrained.NAME, str(error))
            return
        except Exception as error:  # as in the cases: a kernel that raises must not take the results with it
            self._note(pretrained.NAME, _first_line(error), OURS, failure=True)
            return
        self.results.model = section
        self.results.rows.append(row)
        if row.seconds is None:
            self._note(row.case, "embeddings are not those of the plain torch model", OURS, failure=True)
        else:
            row.limit_fraction = self.limits.fraction(row.dtype, row.seconds, row.work_flops, row.work_bytes)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
