"""Generating tokens with a decoder under every scheme: tokens a second, memory, and what it does to perplexity.

    python bench/quantized_decoder.py [--model gpt2|llama] [--tokens N] [--json FILE] [--schemes NAME ...]

The weights are random (GPT-2 small, or TinyLlama's sizes): speed and memory are those of a trained model, the change of
perplexity is of the size that rounding makes on one. Every variant continues the same prompt greedily, bfloat16 first.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

PROMPT, ROUNDS = 16, 3
SCHEMES = ["int8_dynamic", "int8_weight_only", "int4_weight_only", "int4_int8"]


def linear_bytes(model: Any) -> int:
    """Bytes of the linear layers' weights, the last one apart (it is the embedding's)."""
    from torch import nn

    import ptkernels as ptk

    return sum(
        module.weight.nbytes
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, ptk.nn.QuantizedLinear)) and name != "lm_head"
    )


def measure(kind: str, count: int, schemes: list[str]) -> list[dict[str, Any]]:
    import torch

    from ptkernels.models import DecoderConfig, DecoderLM, generate

    torch.manual_seed(0)
    config = getattr(DecoderConfig, kind)(dropout=0.0)
    plain = DecoderLM(config).bfloat16().eval()
    contenders = {"bfloat16": plain}
    for scheme in schemes:
        contenders[scheme] = copy.deepcopy(plain)
        contenders[scheme].quantize_(scheme)
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    text = torch.randint(config.vocab_size, (1, 256))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, model in contenders.items():
                start = time.perf_counter()
                generate(model, prompt, max_new_tokens=count)
                seconds[name].append(time.perf_counter() - start)
        losses = {name: float(model.loss(text)) for name, model in contenders.items()}
    return [
        {
            "scheme": name,
            "tokens_per_second": count / median(seconds[name]),
            "bytes": linear_bytes(model),
            "perplexity_ratio": float(torch.tensor(losses[name] - losses["bfloat16"]).exp()),
        }
        for name, model in contenders.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("scheme", "tokens/s", "vs bfloat16", "MiB of linear layers", "perplexity / bfloat16's")
    for row in rows:
        table.add_row(
            row["scheme"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / rows[0]['tokens_per_second']:.2f}x",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['perplexity_ratio']:.4f}",
        )
    Console(width=110).print(table)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from ptkernels.cli import files

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    options = parser.parse_args()
    rows = measure(options.model, options.tokens, options.schemes)
    print_table(rows)
    if options.json:
        files.write_atomically(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
