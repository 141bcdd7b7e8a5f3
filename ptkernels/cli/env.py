"""Print what an issue report needs: versions, libraries, instruction sets, threads, settings, kernels per operator."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch

from ptkernels import _env, _loader, _registry
from ptkernels.cli import machine
from ptkernels.cli.console import print_table

EXTRAS = ("triton", "transformers", "numpy", "onnxruntime", "openvino")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def report() -> dict[str, Any]:
    """Everything the command prints, ready for JSON."""
    return {
        "versions": machine.versions(*EXTRAS),
        "os": platform.platform(),
        "cuda": {
            "torch": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "build": machine.build(),
        "cpu": {"model": machine.cpu_model(), "cores": machine.cores(), "threads": torch.get_num_threads()},
        "isa": machine.isa(),
        "libraries": [asdict(library) | {"path": str(library.path)} for library in _loader.load()],
        "settings": {
            f"PTKERNELS_{name.upper()}": value if isinstance(value, bool) else str(value)
            for name, value in asdict(_env.settings).items()
            if value
        },
        "ops": {name: [asdict(kernel) for kernel in spec.kernels()] for name, spec in _registry.all_ops().items()},
    }


def run(arguments: argparse.Namespace) -> int:
    content = report()
    if arguments.json:
        json.dump(content, sys.stdout, indent=1)
        print()
        return 0
    cpu, isa = content["cpu"], content["isa"]
    lines = [*content["versions"].items(), ("os", content["os"])]
    cuda = content["cuda"]
    lines.append(("cuda", f"torch built for {cuda['torch']}, devices: {', '.join(cuda['devices']) or 'none'}"))
    lines += [(f"build {name}", value) for name, value in content["build"].items() if value]
    lines.append(("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads"))
    lines.append(("isa detected", isa["detected"] + (" (emulated)" if isa["emulated"] else "")))
    lines.append(("isa active", isa["active"] + (f" (capped at {isa['cap']})" if isa["cap"] else "")))
    for library in content["libraries"]:
        state = "loaded" if library["loaded"] else "not loaded"
        lines.append((library["name"], f"{state}: {library['reason']} ({library['path']})"))
    lines += list(content["settings"].items()) or [("PTKERNELS_*", "none set")]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    for op, kernels in content["ops"].items():
        rows = [
            (k["name"], k["backend"], ", ".join(k["dtypes"]), "yes" if k["available"] else "no", k["note"])
            for k in kernels
        ]
        print()
        print_table(op, ("kernel", "backend", "dtypes", "available", "note"), rows)
    return 0
