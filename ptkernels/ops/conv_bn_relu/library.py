"""The operators that libptkernels.so registers, loaded, and the devices they have kernels for."""

from __future__ import annotations

import torch

from ptkernels import _loader

_loader.load()

conv_op = torch.ops.ptkernels.conv_bn_relu.default
backward_op = torch.ops.ptkernels._conv_bn_relu_backward.default

DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("ptkernels::conv_bn_relu", key)
)
