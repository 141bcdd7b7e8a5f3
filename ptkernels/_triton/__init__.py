"""What every Triton kernel of the package shares: whether Triton can run here, and what a launch needs to know.

Importing this module does not import Triton. Kernels live in ``ptkernels/ops/<op>/triton.py``, which does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re

import torch
from torch import Tensor

MIN_VERSION = (3, 6)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The oldest that compiles a product in float64 whose operand was loaded in fewer bits than it has.
FLOAT64_OF_CODES = (3, 9)
NOT_YET_RUN = "not yet run on a GPU"

# Shared memory that one block may ask for, in bytes, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


def version() -> tuple[int, ...] | None:
    """Version of the installed Triton, or None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))[:3]))
        except importlib.metadata.PackageNotFoundError:
            continue
    return ()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of any device: ``TRITON_INTERPRET=1``.

    Triton reads its variable when a kernel is defined, so it has to be set before the process starts.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def _package_unavailable() -> str | None:
    found, wanted = version(), ".".join(map(str, MIN_VERSION))
    if found is None:
        return f"triton is not installed: pip install 'triton>={wanted}'"
    if found < MIN_VERSION:
        return f"triton {'.'.join(map(str, found)) or 'of unknown version'} is too old, expected {wanted} or newer"
    return None


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None where some can."""
    if reason := _package_unavailable():
        return reason
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    return None


def unavailable_for(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot run on the tensor's device, or None where they can."""
    if reason := unavailable():
        return reason
    if interpreted():
        return None
    if tensor.device.type != "cuda":
        return f"Triton kernels need tensors on a GPU, got {tensor.device.type}"
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < MIN_CAPABILITY:
        return f"Triton kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, got {capability}"
    return None


def arch_of(tensor: Tensor) -> int:
    """Compute capability as one number, 90 for an H100; of the oldest supported GPU in the interpreter."""
    if tensor.device.type != "cuda" or not torch.cuda.is_available():
        return 10 * MIN_CAPABILITY[0] + MIN_CAPABILITY[1]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that a block may use; of the smallest GPU where the architecture is not known."""
    return SHARED_MEMORY.get(arch, min(SHARED_MEMORY.values()))


def has_float8(arch: int) -> bool:
    """Whether a GPU converts and multiplies float8."""
    return arch >= 89


def uncovered(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot take an operand, whatever the operator; None where they can."""
    if tensor.dtype not in DTYPES:
        return f"the Triton kernels have no {str(tensor.dtype).removeprefix('torch.')}"
    return unavailable_for(tensor)


def uncovered_codes(dtype: torch.dtype) -> str | None:
    """Why Triton cannot multiply numbers of a dtype that are stored in 8 bits or fewer; None where it can."""
    if dtype != torch.float64 or interpreted() or (version() or ()) >= FLOAT64_OF_CODES:
        return None
    return f"the Triton kernels have no float64 of stored codes before Triton {'.'.join(map(str, FLOAT64_OF_CODES))}"


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product: ``ieee``, unless torch's settings allow float32 products in TF32."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 of float64, float32 of everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def number(value: float, like: Tensor) -> float | Tensor:
    """An argument of a kernel that computes in the dtype of sums of a tensor.

    Triton passes Python's floats as float32: for float64 they go by way of memory, written there by the device.
    """
    return value if like.dtype != torch.float64 else like.new_full((), value)


def power_of_2(size: int, least: int = 16) -> int:
    """The smallest power of two that is neither below ``size`` nor below ``least``."""
    return max(least, 1 << max(size - 1, 0).bit_length())
