"""The public function on the Triton backend: autograd, refusals, and what torch.compile is shown."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels import _triton
from ptkernels.errors import BackendError


def operands(device: str, *, requires_grad: bool = False) -> list[Tensor]:
    shapes = [(2, 4, 20, 16), (2, 2, 33, 16), (2, 2, 33, 16)]
    return [torch.randn(shape, device=device).requires_grad_(requires_grad) for shape in shapes]


def test_public_function_and_its_gradients(device: str) -> None:
    tensors = [*operands(device, requires_grad=True), torch.randn(20, 33, device=device, requires_grad=True)]
    want = ptk.reference.attention(*tensors, is_causal=True, enable_gqa=True)
    with ptk.backend("triton"):
        got = ptk.attention(*tensors, is_causal=True, enable_gqa=True)
        assert ptk.explain(ptk.attention, *tensors, enable_gqa=True).backend == "triton"
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for ours, reference in zip(
        torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_dropout_follows_the_seed(device: str) -> None:
    tensors = operands(device)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with ptk.backend("triton"):
            return ptk.attention(*tensors, dropout_p=0.4, enable_gqa=True)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_second_derivatives_are_refused(device: str) -> None:
    tensors = operands(device, requires_grad=True)
    with ptk.backend("triton"):
        out = ptk.attention(*tensors, enable_gqa=True)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_wide_heads_of_float64_are_refused_by_name(device: str) -> None:
    query = torch.randn(1, 1, 3, 130, dtype=torch.float64, device=device)
    with ptk.backend("triton"), pytest.raises(BackendError, match="no float64 above a head dim of 128, got 130"):
        ptk.attention(query, query, query)


def test_gradcheck(device: str) -> None:
    query, key, value = operands(device, requires_grad=True)
    leaves = [tensor.detach()[:1, :2, :5].double().requires_grad_() for tensor in (query, key, value)]

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ptk.attention(*tensors, is_causal=True, softcap=2.0, enable_gqa=True, return_lse=True)

    with ptk.backend("triton"):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_opcheck(device: str) -> None:
    from ptkernels.ops.attention import triton_ops  # defines kernels, which the first import of Triton decides about

    query, key, value = operands(device, requires_grad=True)
    checks = ["test_schema", "test_autograd_registration"]
    if not _triton.interpreted():  # which reads the memory of its arguments, and fake ones have none
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(triton_ops.attention_op, (query, key, value, None, True), test_utils=checks)
