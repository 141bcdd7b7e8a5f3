"""Rotary embedding's Triton kernels, where the operator's samples do not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_close
from torch import Tensor

import ptkernels as ptk


def tables(rows: int, pairs: int) -> list[Tensor]:
    angles = torch.rand(rows, pairs) * 6.0
    return [angles.cos(), angles.sin()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("learned", [(0, 1, 2, 3), (3,), (1, 2)], ids=str)
def test_several_slices_of_heads(learned: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Blocks of tokens of more than one sequence, heads that fill no slice, a part of the gradients."""
    torch.manual_seed(0)
    shape = (5, 3, 26)
    tensors = [torch.randn(5, heads, *shape[1:], dtype=dtype) for heads in (9, 5)]
    tensors += [torch.randn(26, dtype=dtype) for _ in range(2)]
    cos_sin, positions = tables(11, 5), torch.randint(0, 11, (5, 3))

    def call(function: Any, where: str, kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(where, kind).requires_grad_(at in learned) for at, t in enumerate(tensors)]
        angles = [t.to(where, torch.promote_types(kind, torch.float32)) for t in cos_sin]
        names = ("query_norm_weight", "key_norm_weight")
        options: Any = dict(zip(names, leaves[2:], strict=True), interleaved=True, positions=positions.to(where))
        out = function(*leaves[:2], *angles, **options)
        loss = sum((t.double() * torch.linspace(-1, 1, t.numel(), device=where).view(t.shape)).sum() for t in out)
        return *out, *torch.autograd.grad(loss, [leaves[at] for at in learned])

    with ptk.backend("triton"):
        ours = call(ptk.rotary_embedding, device, dtype)
    peer, want = (call(ptk.reference.rotary_embedding, "cpu", kind) for kind in (dtype, torch.float64))
    for at, (got, rounded, expected) in enumerate(zip(ours, peer, want, strict=True)):
        assert_close(str(at), got, rounded, expected, dtype)


def test_a_position_without_angles_gives_nan(device: str) -> None:
    x = torch.randn(1, 2, 4, 8, device=device)
    positions = torch.tensor([2, 3, -1, 0], device=device)
    with ptk.backend("triton"):
        out, _ = ptk.rotary_embedding(x, x, *(t.to(device) for t in tables(3, 3)), positions=positions)
    assert out[..., :6].isnan().all((0, 1, 3)).tolist() == [False, True, True, False]
    assert torch.equal(out[..., 6:], x[..., 6:])
