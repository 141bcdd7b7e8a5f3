"""Telling tensors of ``torch.distributed`` from others, without importing it."""

from __future__ import annotations

from typing import Any


def is_distributed(tensor: Any) -> bool:
    """Whether it is a ``torch.distributed.tensor.DTensor``, for :mod:`ptkernels.integrations.dtensor` to take."""
    return type(tensor).__name__ == "DTensor"
