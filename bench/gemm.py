"""How much of the machine the matrix-product engine reaches, per dtype and ISA level.

    python bench/gemm.py [--json FILE] [--isa LEVEL ...]

Every level runs in a process of its own. `warm` is one thread on operands that stay in L2; `peak` is a loop in the same
process that only touches registers; `2048^3` is a whole product with all threads, packing included, against
torch.matmul, whose libraries are capped at the same level.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

DTYPES = ["float64", "float32", "bfloat16", "float16", "int8", "uint8"]
# m, n, k of one tile of work: as attention, convolutions and linear layers hand it to the engine.
WARM = [(112, 256, 256), (112, 256, 128), (112, 256, 64), (48, 512, 256)]
SIZE = 2048
ROUNDS = 5
# PyTorch's own kernels, oneDNN and MKL at each level.
PEER_CAPS = {
    "baseline": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "DEFAULT", "AVX512"),
}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_level() -> list[dict[str, Any]]:
    """Rows of the level this process runs at."""
    import torch

    import ptkernels  # noqa: F401 - loads the library

    ops = torch.ops.ptkernels
    rows = []
    for dtype in DTYPES:
        # Alternating, so that a change of clock reaches both sides of the fraction.
        rates: list[list[float]] = []
        for _ in range(ROUNDS):
            rates.append([ops._peak_flops(dtype, 1), *(ops._gemm_rate(dtype, *shape, 0.1) for shape in WARM)])
        best = [max(column) for column in zip(*rates, strict=True)]
        row: dict[str, Any] = {
            "dtype": dtype,
            "peak": best[0],
            "warm": {"x".join(map(str, shape)): rate / best[0] for shape, rate in zip(WARM, best[1:], strict=True)},
        }
        if dtype in ("float64", "float32", "bfloat16"):
            a, b = (torch.randn(SIZE, SIZE).to(getattr(torch, dtype)) for _ in range(2))
            ours, theirs = [], []
            # On CPUs without bfloat16 instructions torch's product takes minutes.
            slow = seconds(lambda x=a[:64], y=b: x @ y) > 0.5
            for _ in range(0 if slow else ROUNDS):
                ours.append(seconds(lambda x=a[None], y=b[None]: ops._gemm(x, y)))
                theirs.append(seconds(lambda x=a, y=b: x @ y))
            if not slow:
                row["product"] = {"flops": 2 * SIZE**3 / median(ours), "ratio_to_torch": median(theirs) / median(ours)}
        rows.append(row)
    return rows


def run_level(level: str) -> list[dict[str, Any]]:
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    caps = {"PTKERNELS_MAX_ISA": level, **dict(zip(names, PEER_CAPS[level], strict=True))}
    result = subprocess.run(
        [sys.executable, __file__, "--child"],
        env={**os.environ, **caps, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return [{"isa": level, **row} for row in rows]


def describe_machine() -> dict[str, Any]:
    from ptkernels.cli import machine

    return {"cpu": machine.cpu_model(), "cores": machine.cores(), "isa": machine.isa(), "build": machine.build()}


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shapes = list(rows[0]["warm"])
    table = Table("isa", "dtype", "peak Gop/s", *(f"{shape} % of peak" for shape in shapes), f"{SIZE}^3 vs torch")
    for row in rows:
        product = row.get("product")
        fractions = [f"{100 * row['warm'][shape]:.0f}" for shape in shapes]
        ratio = f"{product['ratio_to_torch']:.2f}x" if product else ""
        table.add_row(row["isa"], row["dtype"], f"{row['peak'] / 1e9:.0f}", *fractions, ratio)
    Console(width=150).print(table)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from ptkernels import _env, _loader
    from ptkernels.cli import files

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--isa", nargs="+", choices=_env.ISA_LEVELS)
    options = parser.parse_args()
    introspection = _loader.introspection()
    detected = "baseline" if introspection is None else introspection.detected_isa()
    levels = options.isa or _env.ISA_LEVELS[: _env.ISA_LEVELS.index(detected) + 1]
    rows = [row for level in levels for row in run_level(level)]
    print_table(rows)
    if options.json:
        files.write_atomically(options.json, json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(measure_level()))
    else:
        main()
