"""A training loop for tests that a model learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def learn(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    steps: int,
    clip: float | None = None,
    after: Callable[[], Any] = lambda: None,
) -> list[float]:
    """The losses before every one of ``steps`` steps; ``clip`` bounds the norm of the gradients."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        after()
        losses.append(value.item())
    return losses
