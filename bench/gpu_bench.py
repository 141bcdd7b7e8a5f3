"""Attention of named models on a GPU, checked against float64 and timed beside PyTorch's; writes bench's JSON.

Times are medians of CUDA event intervals, contenders in alternating blocks. A row whose check failed has no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from ptkernels._registry import BenchCase, get
from ptkernels.cli.bench.gate import Oracle
from ptkernels.cli.bench.peers import parts_of
from ptkernels.cli.bench.problem import Problem, dtype_name
from ptkernels.cli.bench.results import Note, Results, Row, commit_id
from ptkernels.cli.bench.runner import label
from ptkernels.cli.files import write_atomically

PEER = "torch-sdpa"
ROUNDS, BLOCK_MILLISECONDS = 9, 20.0
CHECK_FLOPS = 1e12


def on_gpu(case: BenchCase) -> BenchCase:
    def move(value: Any) -> Any:
        return value.detach().cuda().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value

    def make(generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.make(generator)
        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}

    return dataclasses.replace(case, make=make)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def interleave(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call."""
    repeats = {}
    for name, call in calls.items():
        milliseconds(call, 2)
        repeats[name] = max(1, min(200, int(BLOCK_MILLISECONDS / max(milliseconds(call, 1), 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(ROUNDS):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            samples[name].append(milliseconds(calls[name], repeats[name]))
    return {name: statistics.median(values) / 1e3 for name, values in samples.items()}


def measure(case: BenchCase, results: Results) -> Row:
    spec = get("attention")
    problem = Problem(spec, on_gpu(case))
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
    ours = problem.contender("ptkernels", spec.function)
    outputs = ours.outputs()
    given = outputs[: len(outputs) - len(problem.leaves)]
    verdict = Oracle(problem, parts_of(problem, CHECK_FLOPS), given).check(outputs)
    row.error, row.error_bound = verdict.error, verdict.bound
    if verdict.passed:
        peer = problem.contender(PEER, spec.baseline)
        row.peers = interleave({"ptkernels": ours.call, PEER: peer.call})
        row.seconds = row.peers.pop("ptkernels")
        row.settle()
    else:
        results.notes.append(Note(label(case), verdict.text, "ptkernels", failure=True))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name has this")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False  # the peer of a float32 case computes in float32
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    results = Results({"gpu": torch.cuda.get_device_name(), **versions}, commit_id())
    for case in get("attention").bench_cases():
        if arguments.case in case.name:
            row = measure(case, results)
            results.rows.append(row)
            write_atomically(arguments.json, results.to_json())
            took = "failed" if row.seconds is None else f"{row.seconds * 1e3:9.3f} ms {row.ratio:6.2f}x {PEER}"
            print(f"{label(case):55} {took}", flush=True)
    results.status = "complete"
    write_atomically(arguments.json, results.to_json())
    return 1 if results.failures() else 0


if __name__ == "__main__":
    raise SystemExit(main())
