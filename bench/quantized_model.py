"""A real pretrained network under every scheme: all-MiniLM-L6-v2 on English and Vietnamese sentences.

    python bench/quantized_model.py [--json FILE] [--every N] [--schemes NAME ...]

Quantizes every linear layer of the encoder and reports, against its float32 embeddings: mean and smallest cosine, the
share of sentences that keep their nearest neighbour, the bytes of the layers, and processor time for all sentences.
PyTorch's own dynamically quantized layers stand beside. Runs alternate in one process on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 3
TORCH_DYNAMIC = "torch quantize_dynamic"


def models(encoder: Any, schemes: list[str]) -> dict[str, Any]:
    import torch

    import ptkernels as ptk

    found: dict[str, Any] = {"float32": encoder}
    for scheme in schemes:
        found[scheme] = copy.deepcopy(encoder)
        ptk.nn.quantize_(found[scheme], scheme)
    found[TORCH_DYNAMIC] = torch.ao.quantization.quantize_dynamic(copy.deepcopy(encoder), {torch.nn.Linear})
    return found


def layer_bytes(model: Any) -> int | None:
    """Bytes of the linear layers' weights; unknown for PyTorch's packed ones."""
    from torch import nn

    import ptkernels as ptk

    sizes = [
        module.weight.nbytes for module in model.modules() if isinstance(module, (nn.Linear, ptk.nn.QuantizedLinear))
    ]
    return sum(sizes) if sizes else None


def measure(every: int, schemes: list[str]) -> list[dict[str, Any]]:
    import torch

    from ptkernels.cli.bench import pretrained
    from ptkernels.cli.bench.peers.attention import sdpa

    torch.set_num_threads(1)
    directory = pretrained.model_directory()
    corpus = pretrained.tokenize(pretrained.sentences()[::every], directory)
    encoder = pretrained.load_sentence_encoder(directory).float().eval()
    contenders = models(encoder, schemes)
    embeddings = {name: pretrained.embed(model, corpus, sdpa) for name, model in contenders.items()}
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, model in contenders.items():
            start = time.thread_time()
            pretrained.embed(model, corpus, sdpa)
            seconds[name] = min(seconds[name], time.thread_time() - start)
    expected = embeddings["float32"]
    nearest = pretrained.neighbours(expected)
    rows = []
    for name, actual in embeddings.items():
        cosine = torch.cosine_similarity(actual, expected)
        rows.append(
            {
                "scheme": name,
                "sentences": len(corpus.sentences),
                "cosine": cosine.mean().item(),
                "least_cosine": cosine.min().item(),
                "same_neighbour": (pretrained.neighbours(actual) == nearest).float().mean().item(),
                "bytes": layer_bytes(contenders[name]),
                "seconds": seconds[name],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("scheme", "cosine", "least", "same neighbour", "MiB", "time", "vs float32")
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.1f}"
        table.add_row(
            row["scheme"],
            f"{row['cosine']:.4f}",
            f"{row['least_cosine']:.4f}",
            f"{100 * row['same_neighbour']:.1f} %",
            size,
            f"{row['seconds']:.2f} s",
            f"{rows[0]['seconds'] / row['seconds']:.2f}x",
        )
    Console(width=110).print(table)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from ptkernels.cli import files
    from ptkernels.ops.quantized_matmul.formats import SCHEMES

    known = [name for name, scheme in SCHEMES.items() if not scheme.is_static]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every", type=int, default=1, help="use only every n-th sentence")
    parser.add_argument("--schemes", nargs="+", choices=known, default=known)
    options = parser.parse_args()
    rows = measure(options.every, options.schemes)
    print_table(rows)
    if options.json:
        files.write_atomically(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
