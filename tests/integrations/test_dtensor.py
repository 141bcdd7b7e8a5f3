"""Operators on distributed tensors, on 2 and 4 gloo processes: the results and gradients of whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("torch.distributed", reason="this torch has no distributed package")

import torch.distributed as dist
from jobs_dtensor import CASES, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ptkernels as ptk


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_distributed_is_whole(outcome: Callable[[str, int], list[Any]], case: str, world: int) -> None:
    expected, _ = run(case)
    for found, placements in outcome(case, world):
        assert placements == list(CASES[case].placements)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=1e-9, atol=1e-9)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_compiled(mesh: Any) -> None:
    query, key, value = (distribute_tensor(torch.randn(2, 4, 5, 8), mesh, [Shard(1)]) for _ in range(3))

    def block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ptk.attention(query * 2, key, value, is_causal=True).relu()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(query, key, value)
    assert compiled.placements == (Shard(1),)
    torch.testing.assert_close(compiled.full_tensor(), block(query, key, value).full_tensor())


def test_dropout_does_not_depend_on_the_cut(mesh: Any) -> None:
    """Which weights it drops is a matter of where they are, so nothing is cut."""
    x = torch.randn(2, 4, 5, 8)
    torch.manual_seed(3)
    expected = ptk.attention(x, x, x, dropout_p=0.5)
    spread = distribute_tensor(x, mesh, [Shard(1)])
    torch.manual_seed(3)
    found = ptk.attention(spread, spread, spread, dropout_p=0.5)
    assert found.placements == (Replicate(),)
    assert torch.equal(found.full_tensor(), expected)


def test_what_would_be_wrong_is_refused(mesh: Any) -> None:
    x = distribute_tensor(torch.randn(2, 4, 5, 8), mesh, [Shard(1)])
    bias = torch.zeros(5, 5, requires_grad=True)
    with pytest.raises(ValueError, match="attention: attn_mask: got a plain tensor that requires grad among DTensors"):
        ptk.attention(x, x, x, bias)
    with pytest.raises(ValueError, match="attention: key: got 3 heads, expected 4"):
        ptk.attention(x, x[:, :3], x)
    weight = distribute_tensor(torch.randn(8, 4, 1, 1), mesh, [Shard(0)])
    mean, var = torch.zeros(8), torch.ones(8)
    spread = {"running_mean": distribute_tensor(mean, mesh, [Replicate()]), "running_var": var}
    out = ptk.conv_bn_relu(x, weight, training=True, **spread)
    assert isinstance(out, DTensor)
    halves = {"running_mean": distribute_tensor(mean, mesh, [Replicate()]), "running_var": weight[:, 0, 0, 0] + 9}
    with pytest.raises(ValueError, match="conv_bn_relu: running_mean, running_var: got placements that fit"):
        ptk.conv_bn_relu(x, weight, training=True, **halves)
