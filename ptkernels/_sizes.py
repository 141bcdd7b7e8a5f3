"""Comparisons of sizes, which are symbols or tensors while torch traces."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def holds(condition: Any) -> bool:
    """Truth of a comparison of sizes.

    An undecidable symbolic one becomes an assumption of the trace. torch.jit.trace makes tensors of sizes: there it is
    left to the operators, which look at those of every call.
    """
    if isinstance(condition, bool):
        return condition
    if isinstance(condition, Tensor):
        return True
    from torch.fx.experimental.symbolic_shapes import expect_true  # imports sympy: only when tracing has already

    return expect_true(condition)
