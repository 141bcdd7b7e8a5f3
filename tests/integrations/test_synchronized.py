"""Statistics over several gloo processes are those of one process that has all batches, and so are the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torch.distributed", reason="this torch has no distributed package")

from jobs_synchronized import CLASSES, block, data, part, step

import ptkernels as ptk

each_class = pytest.mark.parametrize("kind", CLASSES)


@each_class
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_are_one(outcome: Callable[[str, int], list[Any]], kind: str, world: int) -> None:
    alone = block()
    expected = step(alone, 0, 5)
    for rank, (found, grads, buffers, evaluated) in enumerate(outcome(f"SyncBN, {kind}", world)):
        begin, end = part(rank, world)
        for ours, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, whole[begin:end], rtol=1e-9, atol=1e-9)
        for ours, parameter in zip(grads, alone.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-9)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(evaluated, copy.deepcopy(alone).eval()(data()[0]), rtol=1e-9, atol=1e-9)


def test_the_normalisation_alone(outcome: Callable[[str, int], list[Any]]) -> None:
    expected = nn.BatchNorm2d(3).double()(data()[0])
    torch.testing.assert_close(torch.cat(outcome("SyncBN, alone", 4)), expected, rtol=1e-9, atol=1e-9)


@each_class
def test_without_a_group_it_is_batch_normalisation(kind: str) -> None:
    module = CLASSES[kind].convert_sync_batchnorm(block())
    for ours, expected in zip(step(module, 0, 5), step(block(), 0, 5), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_conversion_keeps_what_there_is(momentum: float | None) -> None:
    """Parameters, hooks' order of calls and all options; a state loads both ways."""
    plain = nn.Sequential(nn.BatchNorm1d(4, 1e-3, momentum, dtype=torch.float64), nn.ReLU()).train()
    module = ptk.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(module(x), plain(x))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    plain.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module.eval()(x), plain.eval()(x))
    weight = plain[0].weight
    assert ptk.nn.SyncBatchNorm.convert_sync_batchnorm(plain)[0].weight is weight
    with pytest.raises(ValueError, match="SyncBatchNorm: input: got 1 dimensions, expected at least 2"):
        module(x[0, 0])
