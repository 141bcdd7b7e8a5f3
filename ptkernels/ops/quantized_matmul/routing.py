"""Where a call of the quantized linear layer runs, and why: the decision, and the account of it ``explain`` gives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend, _loader, _triton
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.quantized_matmul import library, register
from ptkernels.ops.quantized_matmul.checks import DTYPES, check_inputs
from ptkernels.ops.quantized_matmul.weight import OP, QuantizedWeight

NAME = "quantized_matmul"
_COMPOSITION = "plain torch composition"


def fallback_reason(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    if _backend.runs_on_triton(x.device.type, library.DEVICES):
        uncovered = _triton.uncovered(x) or _triton.uncovered_codes(x.dtype)
        return uncovered or register.uncovered(x, bias, residual)
    # On the meta device a call is shape propagation, which the operators have for every device.
    if x.device.type not in (*library.DEVICES, "meta"):
        return _backend.no_kernel(x.device.type)
    return register.uncovered(x, bias, residual)


def runs_on_reference(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(OP, x.device.type)
    reason = fallback_reason(x, bias, residual)
    if reason is not None:
        _backend.fallback(OP, reason)
    return reason is not None


def _cpu_kernel(x: Tensor, qweight: QuantizedWeight) -> str:
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so (ptkernels._introspect, which names its kernels, is not built for this Python)"
    whole = max(qweight.in_features, 1)
    name: str = introspection.quantized_matmul_kernel(
        dtype=str(x.dtype).removeprefix("torch."),
        m=math.prod(x.shape[:-1]),
        n=qweight.out_features,
        k=qweight.in_features,
        code_format=qweight.spec.code.name,
        group_size=whole if qweight.group_size == -1 else min(qweight.group_size, whole),
        quantize_input=qweight.spec.quantizes_input,
    )
    return name


def _hints(x: Tensor, qweight: QuantizedWeight, activation: str | None) -> list[str]:
    hints: list[str] = []
    if x.device.type == "cpu":
        hints += _loader.isa_hints(torch.int8 if qweight.spec.quantizes_input else x.dtype)
    if not qweight.spec.quantizes_input and math.prod(x.shape[:-1]) >= 64:
        hints.append("for this many rows int8_dynamic multiplies integers, which is faster than decoding the weight")
    if activation is not None and x.requires_grad and torch.is_grad_enabled():
        hints.append("without gradients the activation would be part of the kernel")
    return hints


def explain(
    x: Any,
    qweight: Any,
    bias: Any = None,
    *,
    residual: Any = None,
    activation: Any = None,
    out_dtype: Any = None,
    counts: Any = None,
) -> Explanation:
    """Account of the call :func:`ptkernels.quantized_linear` would make with these arguments, without making it.

    Raises what the call would raise for bad arguments.
    """
    x, bias, residual = register.autocast_if_enabled(x, bias, residual)
    check_inputs(x, qweight, bias, residual, activation, out_dtype, counts)
    if _backend.state.backend == "reference":
        reason = "backend 'reference' was asked for"
        return Explanation(NAME, _COMPOSITION, "reference", reason, ["leave ptkernels.backend('reference')"])
    device = x.device.type
    _backend.check_requested(OP, device)
    if uncovered := fallback_reason(x, bias, residual):
        return Explanation(NAME, _COMPOSITION, "reference", uncovered)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    if _backend.runs_on_triton(device, library.DEVICES):
        why = f"{reason}; {_triton.NOT_YET_RUN}"
        return Explanation(NAME, "Triton", "triton", why, _hints(x, qweight, activation))
    kernel = _cpu_kernel(x, qweight) if device == "cpu" else "shape propagation"
    return Explanation(NAME, kernel, device, reason, _hints(x, qweight, activation))


def kernels() -> list[KernelInfo]:
    """Every implementation and whether it can run in this process."""
    introspection = _loader.introspection()
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    by_name: dict[str, list[str]] = {}
    if introspection is not None:
        for dtype, name in introspection.kernel_table()[NAME].items():
            by_name.setdefault(name, []).append(dtype)
    cpu = [KernelInfo(name, "cpu", tuple(names), True) for name, names in by_name.items()]
    return [
        *(cpu or [KernelInfo("libptkernels.so", "cpu", dtypes, True, "ptkernels._introspect is not built")]),
        triton_row(),
        KernelInfo(_COMPOSITION, "reference", dtypes, True),
    ]
