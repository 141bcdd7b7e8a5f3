"""Statistics over two gloo processes are those of one process that has both batches, and so are the gradients."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import ptkernels.nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

# Unequal batches: a mean of means would be another one.
BATCHES = ((0, 2), (2, 5))


def block() -> Any:
    torch.manual_seed(0)
    made = ptkernels.nn.ConvBNReLU2d(3, 4, 3, padding=1, activation="silu").double()
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


def process(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    found = step(module, *BATCHES[rank])
    grads = [copy.deepcopy(parameter.grad) for parameter in module.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    evaluated = module.eval()(data()[0])
    results[rank] = (found, grads, dict(module.named_buffers()), evaluated.detach())
    dist.destroy_process_group()


def test_two_processes_are_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(process, (port, shared), nprocs=2)
        results = dict(shared)
    alone = block()
    expected = step(alone, 0, 5)
    for rank, (begin, end) in enumerate(BATCHES):
        found, grads, buffers, evaluated = results[rank]
        for ours, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, whole[begin:end], rtol=1e-9, atol=1e-9)
        for ours, parameter in zip(grads, alone.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-9)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(evaluated, copy.deepcopy(alone).eval()(data()[0]), rtol=1e-9, atol=1e-9)


def test_without_a_group_it_is_batch_normalisation() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    for ours, expected in zip(step(module, 0, 5), step(block(), 0, 5), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
