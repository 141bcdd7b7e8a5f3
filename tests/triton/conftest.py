"""Triton kernels against float64, on a GPU or in Triton's interpreter; skipped where this process has neither.

`tests/test_triton.py` runs this folder in the interpreter, in a process of its own: Triton decides when a kernel is
defined whether it will be interpreted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptkernels import _triton

DEVICE = "cuda" if torch.cuda.is_available() and not _triton.interpreted() else "cpu"
collect_ignore_glob = ["test_*.py"] if _triton.unavailable() else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.triton)


@pytest.fixture
def device() -> str:
    return DEVICE
