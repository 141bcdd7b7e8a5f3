"""The operators of packed attention that libptkernels.so registers, loaded."""

from __future__ import annotations

import torch

from ptkernels import _loader

_loader.load()

varlen_op = torch.ops.ptkernels.attention_varlen.default
varlen_backward_op = torch.ops.ptkernels._attention_varlen_backward.default

DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("ptkernels::attention_varlen", key)
)
