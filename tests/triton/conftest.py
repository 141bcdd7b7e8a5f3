"""Triton kernels against float64, on a GPU or in Triton's interpreter; skipped where this process has neither.

`tests/test_triton.py` runs this folder in the interpreter, in a process of its own: Triton decides when a kernel is
defined whether it will be interpreted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ptkernels import _triton

sys.path.insert(0, str(Path(__file__).parent.parent))  # the folder of the tests that every operator shares
collect_ignore_glob = ["test_*.py"] if _triton.unavailable() else []


def _widen_products_of_bfloat16() -> None:
    """The interpreter keeps bfloat16 as bit patterns, and multiplies those."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    product = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.create_fp_ext(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return product(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


if not _triton.unavailable() and _triton.interpreted():
    _widen_products_of_bfloat16()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.triton)


@pytest.fixture
def device() -> str:
    from comparing import DEVICE

    return DEVICE
