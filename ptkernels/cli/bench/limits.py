"""The machine's limits, measured once per run: peak arithmetic rate per dtype and read bandwidth."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

REPEATS = 3
DTYPES = ("float64", "float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class Limits:
    """Peak FLOP/s per dtype name and read bandwidth in bytes/s; None where it could not be measured."""

    peak_flops: dict[str, float | None]
    read_bandwidth: float | None
    unknown: dict[str, str]

    def fraction(self, dtype: str, seconds: float, flops: float, moved_bytes: float) -> float | None:
        """The roofline time over the measured time: 1.0 means nothing faster is possible on this machine."""
        peak = self.peak_flops.get(dtype)
        if peak is None or self.read_bandwidth is None or seconds <= 0:
            return None
        return max(flops / peak, moved_bytes / self.read_bandwidth) / seconds


def _meminfo(field: str, fallback: str) -> int | None:
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf(fallback) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    return _meminfo("MemAvailable", "SC_AVPHYS_PAGES")


def total_memory() -> int | None:
    """Bytes of memory the machine has, or None where the system does not say."""
    return _meminfo("MemTotal", "SC_PHYS_PAGES")


def measure(threads: int) -> Limits:
    """Run the register-resident arithmetic loop for every dtype and one large read, on ``threads`` threads."""
    unknown: dict[str, str] = {}

    def attempt(name: str, op: str, *args: object) -> float | None:
        try:
            # Interruptions only ever make it slower: the best of a few is the machine's.
            return max(float(getattr(torch.ops.ptkernels, op)(*args)) for _ in range(REPEATS))
        except (AttributeError, RuntimeError) as error:
            unknown[name] = str(error).splitlines()[0]
            return None

    peaks = {dtype: attempt(f"peak {dtype}", "_peak_flops", dtype, threads) for dtype in DTYPES}
    # Far larger than any last-level cache, yet small beside the machine's memory.
    size = min(512 << 20, (available_memory() or 4 << 30) // 8)
    return Limits(peaks, attempt("read bandwidth", "_read_bandwidth", size), unknown)
