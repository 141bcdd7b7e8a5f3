"""The command line with attention's benchmark cut down to cases of a few milliseconds.

Run as a script, for tests that need a process of their own; imported, for those that replace more.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ptkernels
from ptkernels import _registry
from ptkernels._registry import BenchCase, Direction
from ptkernels.cli import bench, main
from ptkernels.cli.bench import limits

PAUSE = "PTK_TEST_SECONDS_PER_CASE"
HEADS, KV_HEADS, LENGTH, DIM = 4, 2, 24, 16


def _make(
    dtype: torch.dtype, direction: Direction, causal: bool, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    time.sleep(float(os.environ.get(PAUSE, 0)))
    operands = tuple(
        torch.randn(2, heads, LENGTH, DIM, generator=generator).to(dtype).requires_grad_(direction != "forward")
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return operands, {"is_causal": causal, "enable_gqa": True}


def cases() -> list[BenchCase]:
    directions: tuple[Direction, ...] = ("forward", "forward+backward")
    return [
        BenchCase(
            name=name,
            model=name,
            shape={"B": 2, "Hq": HEADS, "Hkv": KV_HEADS, "L": LENGTH, "D": DIM, "causal": causal},
            dtype=dtype,
            direction=direction,
            make=partial(_make, dtype, direction, causal),
            work_flops=4 * 2 * HEADS * LENGTH * LENGTH * DIM,
            work_bytes=2 * (2 * HEADS + 2 * KV_HEADS) * LENGTH * DIM * dtype.itemsize,
        )
        for name, causal in (("tiny-full", False), ("tiny-causal", True))
        for dtype in (torch.float32, torch.bfloat16)
        for direction in directions
    ]


def environment(**changes: str) -> dict[str, str]:
    """For a process that must find the same ptkernels as this one, wherever it starts."""
    return {**os.environ, "PYTHONPATH": str(Path(ptkernels.__file__).parents[1]), **changes}


@contextmanager
def replaced(**changes: Callable[..., Any]) -> Iterator[None]:
    """Attention alone, with other fields and the tiny cases, and ``--quick`` with next to no time for each."""
    ops, effort, repeats = dict(_registry._ops), bench.QUICK, limits.REPEATS
    _registry._ops.clear()
    _registry._ops["attention"] = dataclasses.replace(ops["attention"], **{"bench_cases": cases, **changes})
    bench.QUICK, limits.REPEATS = dataclasses.replace(effort, contender_seconds=0.01), 1
    try:
        yield
    finally:
        _registry._ops.update(ops)
        bench.QUICK, limits.REPEATS = effort, repeats


if __name__ == "__main__":
    with replaced():
        sys.exit(main())
