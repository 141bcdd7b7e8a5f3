"""The operators that libptkernels.so registers, loaded, and the devices they have kernels for."""

from __future__ import annotations

import torch

from ptkernels import _loader

_loader.load()

rotary_op = torch.ops.ptkernels.rotary_embedding.default
backward_op = torch.ops.ptkernels._rotary_embedding_backward.default

DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("ptkernels::rotary_embedding", key)
)
