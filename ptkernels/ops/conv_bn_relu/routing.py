"""Where a call of conv_bn_relu runs, and why: the decision itself, and the account of it that ``explain`` gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptkernels import _backend, _loader, _triton
from ptkernels._autograd import has_tangent
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.conv_bn_relu import library, register
from ptkernels.ops.conv_bn_relu.checks import DTYPES, OP, spatial

_COMPOSITION = "plain torch composition"
_REQUESTED = "backend 'reference' was asked for"


def fallback_reason(input: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    if _backend.runs_on_triton(input.device.type, library.DEVICES):
        return _triton.uncovered(input) or (register.FORWARD_MODE if has_tangent(input, *others) else None)
    # On the meta device a call is shape propagation, which the operators have for every device.
    if input.device.type not in (*library.DEVICES, "meta"):
        return _backend.no_kernel(input.device.type)
    return register.FORWARD_MODE if has_tangent(input, *others) else None


def runs_on_reference(input: Tensor, *others: Tensor | None) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(OP, input.device.type)
    reason = fallback_reason(input, *others)
    if reason is not None:
        _backend.fallback(OP, reason)
    return reason is not None


def _cpu_kernel(args: tuple[Any, ...]) -> str:
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so (ptkernels._introspect, which names its kernels, is not built for this Python)"
    input, weight, (stride, padding, dilation, groups) = args[0], args[1], args[10:14]
    missing = 5 - input.dim()
    name: str = introspection.conv_kernel(
        dtype=str(input.dtype).removeprefix("torch."),
        batch=input.size(0),
        channels=(input.size(1), weight.size(0)),
        groups=groups,
        size=[1] * missing + list(input.shape[2:]),
        kernel=[1] * missing + list(weight.shape[2:]),
        stride=[1] * missing + spatial("stride", stride, 3 - missing, 1),
        padding=[0] * missing + spatial("padding", padding, 3 - missing, 0),
        dilation=[1] * missing + spatial("dilation", dilation, 3 - missing, 1),
        channels_last=register._is_channels_last(input),
    )
    return name


def _hints(input: Tensor, kernel: str) -> list[str]:
    hints = []
    if (
        input.dim() > 3
        and input.size(1) > 1
        and not register._is_channels_last(input)
        and not kernel.endswith("planes")
    ):
        hints.append("input: the kernel works on channels last; memory_format=torch.channels_last saves a transposition")
    if input.device.type == "cpu":
        hints += _loader.isa_hints(input.dtype)
    return hints


def account(args: tuple[Any, ...]) -> Explanation:
    """Account of a checked call with the operator's arguments."""
    input = args[0]
    if _backend.state.backend == "reference":
        return Explanation(OP, _COMPOSITION, "reference", _REQUESTED, ["leave ptkernels.backend('reference')"])
    device = input.device.type
    _backend.check_requested(OP, device)
    if reason := fallback_reason(*(args[index] for index in (0, 1, 2, 3, 4, 7))):
        return Explanation(OP, _COMPOSITION, "reference", reason)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    if _backend.runs_on_triton(device, library.DEVICES):
        return Explanation(OP, "Triton", "triton", f"{reason}; {_triton.NOT_YET_RUN}", _hints(input, "Triton"))
    kernel = _cpu_kernel(args) if device == "cpu" else "shape propagation"
    return Explanation(OP, kernel, device, reason, _hints(input, kernel))


def kernels() -> list[KernelInfo]:
    """Every implementation of conv_bn_relu and whether it can run in this process."""
    introspection = _loader.introspection()
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    by_name: dict[str, list[str]] = {}
    if introspection is not None:
        table = introspection.kernel_table()
        for key in (key for key in table if key.startswith("conv_bn_relu")):
            for dtype, name in table[key].items():
                by_name.setdefault(name, []).append(dtype)
    cpu = [KernelInfo(name, "cpu", tuple(names), True) for name, names in by_name.items()]
    return [
        *(cpu or [KernelInfo("libptkernels.so", "cpu", dtypes, True, "ptkernels._introspect is not built")]),
        triton_row(),
        KernelInfo(_COMPOSITION, "reference", dtypes, True),
    ]
