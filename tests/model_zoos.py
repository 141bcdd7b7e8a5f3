"""torchvision and timm for the tests that replace operators in their models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(sys.prefix) / "zoo"  # where the Makefile puts them


def zoo(name: str) -> ModuleType:
    """The package of that name, or a skip that says it is not here."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        _declare_operators()
    return pytest.importorskip(name)


def _declare_operators() -> None:
    """What torchvision registers shapes for while it is imported, operators there or not (a CPU build of torch)."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared = torch.library.Library("torchvision", "FRAGMENT")
