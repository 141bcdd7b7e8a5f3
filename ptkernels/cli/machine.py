"""What this process runs on: processor, instruction sets, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ptkernels import _env, _loader
from ptkernels._version import __version__


def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not tell the name."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors this process may run on (a container or ``taskset`` can allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def isa() -> dict[str, Any]:
    """Instruction-set levels: detected, fastest, active, asked for, compiled in, and whether they are emulated."""
    module = _loader.introspection()
    if module is None:
        unknown = "unknown (ptkernels._introspect is not built for this Python)"
        return {
            "detected": unknown,
            "preferred": unknown,
            "active": unknown,
            "cap": _env.settings.max_isa,
            "compiled": [],
            "emulated": None,
        }
    return {
        "detected": module.detected_isa(),
        "preferred": module.preferred_isa(),
        "active": module.active_isa(),
        "cap": _env.settings.max_isa,
        "compiled": module.compiled_isas(),
        "emulated": module.emulated(),
    }


def build() -> dict[str, str]:
    """Compiler, flags and targets the library was built with; empty where that cannot be read."""
    module = _loader.introspection()
    return {} if module is None else dict(module.build_info())


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*distributions: str) -> dict[str, str]:
    """Versions of ptkernels, torch, Python, and those of the named distributions that are installed."""
    found = {"ptkernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | {name: version for name in distributions if (version := version_of(name)) is not None}
