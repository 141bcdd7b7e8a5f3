"""What batch invariance costs: time under `ptk.batch_invariant()` over the default's, on Llama-3-8B's heads.

python bench/batch_invariant.py [--json FILE]

Causal prefill and decoding against a cache; both kernels are timed in alternating blocks, and their results compared
before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEADS, KV_HEADS, DIM = 32, 8, 128
CASES = [("prefill", 512), ("prefill", 2048), ("decode", 4096), ("decode", 32768)]
BLOCKS_OF_SECONDS = 2.0


def calls(kind: str, length: int, dtype: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The default and the batch invariant call of one case."""
    import torch

    import ptkernels as ptk

    query = torch.randn(1, HEADS, length if kind == "prefill" else 1, DIM).to(dtype)
    key, value = (torch.randn(1, KV_HEADS, length, DIM).to(dtype) for _ in range(2))

    def plain() -> torch.Tensor:
        if kind == "prefill":
            return ptk.attention(query, key, value, is_causal=True, enable_gqa=True)
        return ptk.attention_with_kv_cache(query, key, value, cache_seqlens=length)

    def invariant() -> torch.Tensor:
        with ptk.batch_invariant():
            return plain()

    torch.testing.assert_close(invariant(), plain(), rtol=2e-2, atol=2e-2)
    return plain, invariant


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from ptkernels.cli import files, machine
    from ptkernels.cli.bench.timing import interleave

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for kind, length in CASES:
            plain, invariant = calls(kind, length, dtype)
            seconds = interleave({"default": plain, "invariant": invariant}, BLOCKS_OF_SECONDS)
            name = str(dtype).removeprefix("torch.")
            row = {"case": kind, "length": length, "dtype": name, **seconds}
            row["ratio"] = seconds["invariant"] / seconds["default"]
            rows.append(row)
            print(f"{name} {kind} {length}: {seconds['default'] * 1e3:.3f} ms, invariant x{row['ratio']:.2f}")
    if options.json:
        about = {"cpu": machine.cpu_model(), "threads": torch.get_num_threads(), "isa": machine.isa()}
        files.write_atomically(options.json, json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
