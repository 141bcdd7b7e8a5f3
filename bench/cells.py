"""Cells that torch lacks, as the operator runs them and composed of torch's operators step by step.

    python bench/cells.py [FILE]        a table; its rows as JSON into FILE

Alternating calls in one process, on one thread; the median of the processor's time, which other work on the machine
moves little. Every pair is checked against the float64 reference before it is timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels.cli import machine
from ptkernels.cli.bench.results import commit_id
from ptkernels.ops.packed_rnn import reference
from ptkernels.ops.packed_rnn.spec import torch_layer

MODES = ("peephole_lstm", "reset_before_gru", "layer_norm_lstm", "layer_norm_gru")
# units, sequences, steps of the longest
SHAPES = ((128, 8, 64), (256, 16, 64))
ROUNDS = 5


def problem(mode: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call: as many features as units, lengths from the longest down to an eighth of it."""
    hidden, batch, steps = shape
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int, scale: float = hidden**-0.5) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype).requires_grad_()

    lengths = [steps - (steps - steps // 8) * index // (batch - 1) for index in range(batch)]
    running = torch.tensor([sum(length > step for length in lengths) for step in range(steps)])
    rows, names = reference.GATES[mode] * hidden, reference.param_orders(mode)[-1]
    sizes = {
        "weight_ih": (rows, hidden),
        "weight_hh": (rows, hidden),
        "bias_ih": (rows,),
        "weight_peephole": (3, hidden),
        "norm_hidden": (2, rows),
        "norm_cell": (2, hidden),
    }
    weights = {name: draw(*sizes[name]) for name in names}
    features = hidden if "weight_ih" in names else rows
    data = draw(sum(lengths), features, scale=1.0)
    return {"input": data, "weight_ih": None, **weights, "mode": mode, "sizes": running, "batch_size": batch}


def step_of(function: Callable[..., tuple[Tensor, ...]], named: dict[str, Any], backward: bool) -> Callable[[], Any]:
    leaves = [value for value in named.values() if isinstance(value, Tensor) and value.requires_grad]

    def run() -> Any:
        if not backward:
            with torch.no_grad():
                return function(**named)
        output = function(**named)[0]
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    return run


def seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def error(found: Any, exact: Any) -> float:
    return max((a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, exact, strict=True))


def measure(
    mode: str, shape: tuple[int, int, int], dtype: torch.dtype, backward: bool, zoneout: float
) -> dict[str, Any]:
    named = problem(mode, shape, dtype) | {"zoneout": zoneout, "train": True}
    calls = [step_of(function, named, backward) for function in (ptk.packed_rnn, torch_layer)]
    wide = {k: v.detach().double().requires_grad_() if isinstance(v, Tensor) and v.requires_grad else v
            for k, v in named.items()}  # fmt: skip
    results = []
    for call in (*calls, step_of(ptk.reference.packed_rnn, wide, backward)):
        torch.manual_seed(0)
        results.append(call())
    ours, theirs = (error(found, results[2]) for found in results[:2])
    bound = 3 * theirs + 1e-5
    if ours > bound:
        raise AssertionError(f"{mode} {shape} {dtype}: error {ours}, bound {bound}")
    times = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
    of_ours, of_theirs = (median(column) for column in zip(*times, strict=True))
    return {
        "cell": mode + (f", zoneout {zoneout}" if zoneout else ""),
        "units, sequences, steps": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": "forward + backward" if backward else "forward",
        "seconds": of_ours,
        "composition": of_theirs,
        "ratio": of_theirs / of_ours,
        "error": ours,
        "error_bound": bound,
    }


def about() -> dict[str, Any]:
    return {
        "cpu": machine.cpu_model(),
        "isa": machine.isa()["active"],
        "threads": torch.get_num_threads(),
        "time": "processor",
        "commit": commit_id(),
        **machine.versions(),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        for mode in MODES:
            for zoneout in (0.0, 0.1) if mode == "peephole_lstm" else (0.0,):
                for dtype in (torch.float32, torch.bfloat16):
                    for backward in (False, True):
                        row = measure(mode, shape, dtype, backward, zoneout)
                        rows.append(row)
                        print("{cell:28} {units, sequences, steps} {dtype:8} {direction:18}".format(**row), end=" ")
                        print(f"{row['composition'] * 1e3:8.2f} -> {row['seconds'] * 1e3:7.2f} ms {row['ratio']:6.1f}x")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"machine": about(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
