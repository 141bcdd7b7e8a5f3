"""The operators that libptkernels.so registers, loaded, and the devices they have kernels for."""

from __future__ import annotations

import torch

from ptkernels import _loader

_loader.load()

linear_op = torch.ops.ptkernels.quantized_linear.default
backward_op = torch.ops.ptkernels._quantized_linear_backward.default
embedding_op = torch.ops.ptkernels.quantized_embedding.default

DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("ptkernels::quantized_linear", key)
)
