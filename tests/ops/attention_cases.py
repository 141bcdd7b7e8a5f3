"""Operands and comparisons that the tests of attention share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ptkernels as ptk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Query and key lengths on which other implementations have leaked future keys or dropped the last block.
LENGTHS = [(1, 1), (1, 7), (7, 1), (239, 1), (113, 203), (203, 113), (65, 64), (64, 65), (192, 192), (255, 257)]


def operands(lq: int, lk: int, d: int = 16, *, heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, heads, length, d, dtype=torch.float64).to(dtype) for length in (lq, lk, lk)]


def exact(*tensors: Tensor, **options: Any) -> Any:
    return ptk.reference.attention(*(tensor.double() for tensor in tensors), **options)


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().max().item() if actual.numel() else 0.0


def results_and_gradients(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, ...]:
    """``out``, ``lse`` and the gradients, of a fixed projection of both, of all tensors that require grad."""
    out, lse = function(*inputs, **options, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    projections = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    leaves = [t for t in (*inputs, *options.values()) if isinstance(t, Tensor) and t.requires_grad]
    return (out, lse, *torch.autograd.grad((out, lse), leaves, projections))


def assert_as_reference(inputs: tuple[Tensor, ...], tolerance: float = 1e-11, **options: Any) -> None:
    """float64 results and gradients of the kernels and of the reference, after the same seed."""
    found = []
    for function in (ptk.attention, ptk.reference.attention):
        torch.manual_seed(3)
        found.append(results_and_gradients(function, inputs, **options))
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)
