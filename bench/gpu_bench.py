"""Every operator on a GPU, checked against float64 and timed beside PyTorch's best paths; writes bench's JSON.

Times are medians of CUDA event intervals, contenders in alternating blocks; forward cases are replays of captured
graphs where a contender can be captured, so that they are the GPU's and not the interpreter's. A row whose check failed
has no time. What the device can do (copies, and products of each dtype) is measured first and stored with the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS
from torch import Tensor

from ptkernels._registry import BenchCase, OpSpec, get
from ptkernels.cli.bench.gate import Oracle
from ptkernels.cli.bench.peers import parts_of
from ptkernels.cli.bench.problem import Contender, Problem, UnsupportedError, dtype_name
from ptkernels.cli.bench.results import Note, Results, Row, commit_id
from ptkernels.cli.bench.runner import label
from ptkernels.cli.files import write_atomically
from ptkernels.ops.conv_bn_relu import spec as conv
from ptkernels.ops.quantized_matmul import spec as quantized
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight

ROUNDS, BLOCK_MILLISECONDS = 7, 15.0
CHECK_FLOPS = 2e11
SCHEMES = (
    ("int8_dynamic", -1),
    ("int4_weight_only", 128),
    ("fp8", -1),
    ("int8_weight_only", -1),
    ("int4_int8", 128),
    ("nf4", 64),
    ("mxfp4", 32),
)


def on_gpu(spec: OpSpec, case: BenchCase) -> BenchCase:
    """The case with its tensors on the GPU, but for those that are read on the host."""

    def move(name: str, value: Any) -> Any:
        if isinstance(value, QuantizedWeight):
            return value.to("cuda")
        if not isinstance(value, Tensor) or name in spec.host_inputs:
            return value
        return value.detach().cuda().requires_grad_(value.requires_grad)

    def make(generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.make(generator)
        return tuple(move("", arg) for arg in args), {name: move(name, value) for name, value in kwargs.items()}

    return dataclasses.replace(case, make=make)


def cases_of(op: str) -> Iterator[BenchCase]:
    """Shapes of named models; convolutions and quantized layers at the sizes that fill a GPU."""
    if op == "conv_bn_relu":
        for name, model, ins, outs, size, kernel, stride, groups, activation in conv._LAYERS:
            shape = {"N": 64, "C": ins, "O": outs, "H": size, "K": kernel, "S": stride}
            shape |= {"groups": groups, "activation": activation}
            for direction in ("forward+backward", "forward"):
                yield conv._bench_case(f"{name}-n64", model, shape, torch.bfloat16, direction)  # type: ignore[arg-type]
    elif op == "quantized_matmul":
        for rows in (16, 4096, 1, 1024):
            for scheme, group in SCHEMES:
                shape = {"M": rows, "N": 4096, "K": 4096, "scheme": scheme, "group": group}
                yield quantized._bench_case(f"4096-{scheme}-{rows}", "Llama", shape, torch.bfloat16, "forward")
    else:
        found = get(op).bench_cases()
        yield from (case for case in found if case.dtype == torch.bfloat16)
        yield from (case for case in found if case.dtype == torch.float32)


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


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replays of a graph of the call, or the call itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            call()
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def ceilings() -> dict[str, float]:
    """What the device was measured to do: bytes/s of a copy, FLOP/s of products; without those it has not."""
    size, n = 1 << 29, 8192
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    found = {"copy_bandwidth": 2 * size / interleave({"copy": lambda: target.copy_(source)})["copy"]}
    one = torch.ones(n, 1, device="cuda")

    def fp8(a: Tensor, b: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one.t(), out_dtype=torch.bfloat16)

    products: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
        "float32": (torch.float32, torch.mm),
        "bfloat16": (torch.bfloat16, torch.mm),
        "float16": (torch.float16, torch.mm),
        "int8": (torch.int8, lambda a, b: torch._int_mm(a, b.t())),
        "float8_e4m3fn": (torch.float8_e4m3fn, fp8),
    }
    for name, (dtype, multiply) in products.items():
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        try:
            seconds = interleave({name: lambda a=a, b=b, multiply=multiply: multiply(a, b)})[name]
        except RuntimeError:
            continue
        found[name] = 2 * n**3 / seconds
    return found


def measure(spec: OpSpec, case: BenchCase, results: Results) -> Row:
    problem = Problem(spec, on_gpu(spec, case))
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
    begun = time.perf_counter()
    ours = problem.contender("ptkernels", spec.function)
    outputs = ours.outputs()
    torch.cuda.synchronize()
    first_call = time.perf_counter() - begun
    given = outputs[: len(outputs) - len(problem.leaves)]
    verdict = Oracle(problem, parts_of(problem, CHECK_FLOPS), given).check(outputs)
    row.error, row.error_bound = verdict.error, verdict.bound
    if not verdict.passed:
        results.notes.append(Note(label(case), verdict.text, "ptkernels", failure=True))
        return row
    results.notes.append(Note(label(case), f"first call, compilation included: {first_call:.1f} s", "ptkernels"))
    contenders: list[Contender] = [ours]
    for name, prepare in PEERS[spec.name].items():
        try:
            contender = prepare(problem)
            contender.call()
            contenders.append(dataclasses.replace(contender, name=name))
        except (UnsupportedError, RuntimeError) as error:
            results.notes.append(Note(label(case), str(error).splitlines()[0], name))
    wrap = (lambda call: call) if problem.backward else captured
    row.peers = interleave({contender.name: wrap(contender.call) for contender in contenders})
    row.seconds = row.peers.pop("ptkernels")
    row.settle()
    limits = results.machine["ceilings"]
    integers = case.shape.get("scheme") in ("int8_dynamic", "int4_int8")
    peak = limits.get("int8" if integers else row.dtype, math.inf)
    row.limit_fraction = max(row.work_flops / peak, row.work_bytes / limits["copy_bandwidth"]) / row.seconds
    return row


def run(op: str, arguments: argparse.Namespace, machine: dict[str, Any]) -> bool:
    """One operator's cases into a file of its own; whether every check passed."""
    results = Results(machine, commit_id())
    path = Path(arguments.out) / f"gpu_{op}.json"
    until = time.monotonic() + arguments.seconds
    for case in cases_of(op):
        if arguments.case not in case.name:
            continue
        if time.monotonic() > until:
            results.notes.append(Note(label(case), f"left out after {arguments.seconds:.0f} s"))
            continue
        row = measure(get(op), case, results)
        results.rows.append(row)
        write_atomically(str(path), results.to_json())
        took = "failed"
        if row.seconds is not None:
            took = f"{row.seconds * 1e3:9.3f} ms {row.limit_fraction:5.0%} of the limit"
            took += f" {row.ratio:6.2f}x {row.best_peer}" if row.ratio is not None else ""
        print(f"{label(case):55} {row.kernel:22} {took}", flush=True)
        torch.cuda.empty_cache()
    results.status = "complete"
    write_atomically(str(path), results.to_json())
    return not results.failures()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/results", metavar="FOLDER", help="of gpu_<op>.json")
    parser.add_argument("--op", action="append", choices=PEERS, help="default: every operator")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name has this")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no case of an operator after so long")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 peers compute in float32
    torch.backends.cudnn.benchmark = True
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    machine = {"gpu": torch.cuda.get_device_name(), **versions, "ceilings": ceilings()}
    for name, value in machine["ceilings"].items():
        print(f"{name:20} {value / 1e12:8.2f} {'TB/s' if name == 'copy_bandwidth' else 'TFLOP/s'}", flush=True)
    passed = [run(op, arguments, machine) for op in arguments.op or PEERS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
