"""Measure the candidate tiles of every Triton kernel that the benchmark's cases launch, and store the best.

Writes the machine's own table; a table that is to be shipped is moved to ptkernels/_triton/tables.
"""

from __future__ import annotations

import argparse
import time

import torch
from gpu_bench import cases_of, interleave, on_gpu
from gpu_peers import PEERS

import ptkernels as ptk
from ptkernels._registry import BenchCase, OpSpec, get
from ptkernels._triton import tuning
from ptkernels.cli.bench.problem import Problem


def tune(spec: OpSpec, case: BenchCase, known: dict[str, int]) -> None:
    """Try each candidate of each choice that the case makes, the others at their best so far."""
    call = Problem(spec, on_gpu(spec, case)).contender("ptkernels", spec.function).call
    with tuning.recording(known) as asked:
        call()
        choices = {entry: count for entry, count in asked.items() if count > 1 and entry not in known}
    for entry, count in choices.items():
        seconds = []
        for index in range(count):
            with tuning.recording({**known, entry: index}):
                try:
                    seconds.append(interleave({"": call})[""])
                except RuntimeError:  # a tile that this GPU has no room for
                    seconds.append(float("inf"))
        known[entry] = min(range(count), key=seconds.__getitem__)
        print(f"{entry:60} {known[entry]}  " + " ".join(f"{s * 1e3:.3f} ms" for s in seconds), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=PEERS, help="default: every operator")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no case after so long")
    arguments = parser.parse_args()
    known: dict[str, int] = {}
    until = time.monotonic() + arguments.seconds
    with ptk.backend("triton"):
        for op in arguments.op or PEERS:
            for case in cases_of(op):
                if time.monotonic() < until:
                    tune(get(op), case, known)
    print(tuning.store(torch.device("cuda", torch.cuda.current_device()), known))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
