"""The Triton kernel of convolution, batch normalisation and activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from torch import Tensor

from ptkernels.ops.conv_bn_relu.triton import conv_bn_act

ACTIVATIONS = {
    "none": lambda t: t,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
}

# batch, channels, height, width, filters, taps, options
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one": ((1, 1, 1, 1, 1, 1, 1), {}),
    "3x3": ((2, 5, 7, 9, 11, 3, 3), {"padding": (1, 1)}),
    "1x1": ((2, 40, 5, 3, 35, 1, 1), {}),
    "stride": ((1, 3, 11, 13, 8, 3, 3), {"stride": (2, 3), "padding": (1, 0)}),
    "dilation": ((1, 4, 9, 9, 6, 3, 2), {"dilation": (2, 3), "padding": (2, 1)}),
    "groups": ((2, 6, 5, 7, 9, 3, 3), {"groups": 3, "padding": (1, 1)}),
    "depthwise": ((1, 7, 6, 6, 7, 3, 3), {"groups": 7, "padding": (1, 1)}),
    "stem": ((1, 3, 17, 15, 20, 7, 7), {"stride": (2, 2), "padding": (3, 3)}),
    "only-padding": ((1, 2, 1, 1, 3, 3, 3), {"padding": (2, 2)}),
}


def check(name: str, dtype: torch.dtype, device: str, layout: torch.memory_format, activation: str = "relu") -> None:
    torch.manual_seed(3)
    (batch, channels, height, width, filters, taps_h, taps_w), options = CASES[name]
    groups = options.get("groups", 1)
    x = torch.randn(batch, channels, height, width).to(dtype).to(memory_format=layout)
    weight = torch.randn(filters, channels // groups, taps_h, taps_w).to(dtype).to(memory_format=layout)
    scale, shift = torch.rand(filters) + 0.5, torch.randn(filters)

    def reference(kind: torch.dtype, residual: Tensor | None) -> Tensor:
        result = F.conv2d(x.to(kind), weight.to(kind), None, **options)
        result = result * scale.to(kind)[:, None, None] + shift.to(kind)[:, None, None]
        return ACTIVATIONS[activation](result if residual is None else result + residual.to(kind))

    residual = torch.randn_like(reference(torch.float32, None)).to(dtype)
    got = conv_bn_act(
        *(t.to(device) for t in (x, weight, scale, shift)),
        residual=residual.to(device),
        activation=activation,
        **options,
    )
    assert_close(name, got, reference(dtype, residual), reference(torch.float64, residual), dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_float32(name: str, layout: torch.memory_format, device: str) -> None:
    check(name, torch.float32, device, layout)


@pytest.mark.parametrize("name", ["3x3", "groups", "1x1"])
def test_bfloat16(name: str, device: str) -> None:
    check(name, torch.bfloat16, device, torch.channels_last)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_activations(activation: str, device: str) -> None:
    check("3x3", torch.float32, device, torch.channels_last, activation)


def test_no_images(device: str) -> None:
    out = conv_bn_act(torch.randn(0, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device))
    assert out.shape == (0, 4, 3, 3)


def test_bare_convolution_keeps_the_layout(device: str) -> None:
    x = torch.randn(2, 8, 6, 6, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(5, 8, 3, 3, device=device)
    out = conv_bn_act(x, weight, activation="none")
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.conv2d(x, weight), rtol=1e-4, atol=1e-4)
