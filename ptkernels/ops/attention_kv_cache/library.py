"""The operators on a cache that libptkernels.so registers, loaded, and the devices they have kernels for."""

from __future__ import annotations

import torch

from ptkernels import _loader

_loader.load()

attend_op = torch.ops.ptkernels.attention_with_kv_cache.default
append_op = torch.ops.ptkernels.attention_with_kv_cache_append.default

DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("ptkernels::attention_with_kv_cache", key)
)
