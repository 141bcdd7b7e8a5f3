"""Ring attention on several gloo processes gives what one process gives, forward and backward."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ptkernels as ptk
from ptkernels.integrations.context_parallel import gather_sequence, ring_attention, shard_sequence

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

CASES = [(dtype, is_causal) for dtype in (torch.float64, torch.bfloat16) for is_causal in (False, True)]


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 24, 8), (2, 2, 24, 8), (2, 2, 24, 5), (2, 4, 24, 5)]
    # Some scores far from 0: the backward recomputes the weights of such rows differently.
    query, *rest = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [20 * query, *rest]


def whole(dtype: torch.dtype, is_causal: bool, exact: bool) -> list[torch.Tensor]:
    *inputs, grad_out = (tensor.double() if exact else tensor for tensor in operands(dtype))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    attention = ptk.reference.attention if exact else ptk.attention
    out = attention(*inputs, is_causal=is_causal, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def process(rank: int, world: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for index, (dtype, is_causal) in enumerate(CASES):
        *inputs, grad_out = (shard_sequence(tensor) for tensor in operands(dtype))
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = ring_attention(*inputs, is_causal=is_causal)
        grads = torch.autograd.grad(out, inputs, grad_out)
        gathered = [gather_sequence(tensor) for tensor in (out, *grads)]
        if rank == 0:
            results[index] = gathered
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ring_is_one_process(world: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(process, (world, port, shared), nprocs=world)
        results = dict(shared)
    for index, (dtype, is_causal) in enumerate(CASES):
        exact, alone = whole(dtype, is_causal, exact=True), whole(dtype, is_causal, exact=False)
        largest = max(float(expected.abs().max()) for expected in exact)
        for ring, one, expected in zip(results[index], alone, exact, strict=True):
            # Weights are exponentials of differences of log-sum-exps of about 100: so many roundings.
            slack = 256 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest
            # Results of the pieces are rounded to the operands' dtype.
            slack += 2 * torch.finfo(dtype).eps * float(expected.abs().max())
            error, error_alone = (float((tensor.double() - expected).abs().max()) for tensor in (ring, one))
            assert error <= 2 * error_alone + slack


def test_shard_needs_a_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    with pytest.raises(ValueError, match="shard_sequence: tensor: got length 6, expected a multiple of 4"):
        shard_sequence(torch.zeros(6, 2))
    assert shard_sequence(torch.arange(8)[:, None], dim=0).flatten().tolist() == [0, 1, 6, 7]


def test_causal_needs_two_slices() -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="ring_attention: query: got length 3, expected an even one"):
        ring_attention(x, x, x, is_causal=True)
