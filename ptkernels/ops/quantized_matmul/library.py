"""The operators that libptkernels.so registers, loaded, and the devices they have kernels for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


class LinearArguments(NamedTuple):
    """What ``ptkernels::quantized_linear`` is called with; at the end, what is at its default may be missing."""

    input: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    code_format: str = "s8"
    group_size: int = -1
    quantize_input: bool = False
    input_scale: Tensor | None = None
    activation: str = "none"
    out_dtype: torch.dtype | None = None
    counts: Tensor | None = None
