"""Batch normalisation over several processes: what test_synchronized.py compares with one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ptkernels as ptk

# Of every process, where its part of the batch of 5 ends: unequal parts, since a mean of means would be another one.
ENDS = {2: (2, 5), 4: (1, 3, 4, 5)}
CLASSES = {"torch's": nn.SyncBatchNorm, "ours": ptk.nn.SyncBatchNorm}


def block() -> Any:
    torch.manual_seed(0)
    made = ptk.nn.ConvBNReLU2d(3, 4, 3, padding=1, activation="silu").double()
    nn.init.uniform_(made.bn.weight, 0.5, 1.5)
    return made


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, *rest = (torch.randn(5, c, 6, 7, generator=generator, dtype=torch.float64) for c in (3, 4, 4))
    return x + 5, rest[0], rest[1]


def step(module: nn.Module, begin: int, end: int) -> list[Tensor]:
    x, residual, flowing = (tensor[begin:end].clone() for tensor in data())
    x.requires_grad_(), residual.requires_grad_()
    y = module(x, residual)
    y.backward(flowing)
    return [y.detach(), x.grad, residual.grad]  # type: ignore[list-item]


def part(rank: int, world: int) -> tuple[int, int]:
    return (ENDS[world][rank - 1] if rank else 0), ENDS[world][rank]


def synchronized(kind: str) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor], Tensor]:
    module = CLASSES[kind].convert_sync_batchnorm(block())
    found = step(module, *part(dist.get_rank(), dist.get_world_size()))
    grads = [parameter.grad.clone() for parameter in module.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return found, grads, buffers, module.eval()(data()[0]).detach()


def alone() -> Tensor:
    """The normalisation without a convolution before it."""
    module = ptk.nn.SyncBatchNorm(3).double()
    begin, end = part(dist.get_rank(), dist.get_world_size())
    return module(data()[0][begin:end]).detach()


JOBS: dict[str, Callable[[], Any]] = {f"SyncBN, {kind}": partial(synchronized, kind) for kind in CLASSES}
JOBS["SyncBN, alone"] = alone
