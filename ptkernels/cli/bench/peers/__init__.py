"""Who an operator is timed against, and how its problems are cut for checking.

A module of this package named after an operator says both: ``peers()`` lists the contenders, ``parts(problem, flops)``
cuts a problem whose float64 check would cost more than ``flops``. An operator without one is timed against PyTorch's
own version and what its spec lists, and checked whole.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ptkernels._registry import OpSpec
from ptkernels.cli.bench.gate import Part, whole
from ptkernels.cli.bench.problem import Contender, Peer, Problem

SDPA, EAGER, COMPILE = "torch-sdpa", "torch-eager", "torch-compile"


def _module(op: str) -> ModuleType | None:
    name = f"{__name__}.{op}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def peers_of(spec: OpSpec) -> list[Peer]:
    """The contenders of an operator, in the order they are listed in reports."""
    module = _module(spec.name)
    if module is not None:
        return list(module.peers())
    peers = [torch_peer("torch", spec.baseline), compile_peer(spec.reference)]
    return peers + [torch_peer(name, function) for name, function in spec.peers.items()]


def parts_of(problem: Problem, flops: float) -> list[Part]:
    """The pieces of a problem to check, spending about ``flops`` on the float64 reference."""
    module = _module(problem.spec.name)
    return whole(problem) if module is None else list(module.parts(problem, flops))


def torch_peer(name: str, function: Callable[..., Any]) -> Peer:
    """A torch function with the operator's signature."""
    return Peer(name, lambda: torch.__version__, lambda problem, threads: problem.contender(name, function))


def compile_peer(function: Callable[..., Any]) -> Peer:
    """``torch.compile`` of the plain composition; Inductor may recognise and replace it."""

    def prepare(problem: Problem, threads: int) -> Contender:
        from torch._inductor import config

        # Worker processes would compete with the contenders that are being timed.
        config.compile_threads = 1
        torch.compiler.reset()
        return problem.contender(COMPILE, torch.compile(function, fullgraph=True, dynamic=False))

    return Peer(COMPILE, lambda: torch.__version__, prepare)
