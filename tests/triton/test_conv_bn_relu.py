"""Convolution's Triton kernels, where the operator's samples do not reach."""

from __future__ import annotations

import pytest
import torch

import ptkernels as ptk


def test_a_large_mean_costs_no_digits_of_the_variance(device: str) -> None:
    x = torch.randn(3, 2, 20, 25) + 1e4
    weight = torch.eye(2).view(2, 2, 1, 1)
    mean, var = torch.zeros(2, device=device), torch.zeros(2, device=device)
    with ptk.backend("triton"):
        ptk.conv_bn_relu(x.to(device), weight.to(device), None, None, None, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var.cpu(), x.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.cpu(), x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_no_images(training: bool, device: str) -> None:
    x = torch.randn(0, 3, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    with ptk.backend("triton"):
        out = ptk.conv_bn_relu(x, weight)
        grads = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == (0, 4, 3, 3)
    assert not grads[1].any()
