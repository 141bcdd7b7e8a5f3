"""Where a call of conv_bn_relu runs, and why: the decision itself, and the account of it that ``explain`` gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptkernels import _backend, _loader, _triton
from ptkernels._autograd import has_tangent
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.conv_bn_relu import library, register
from ptkernels.ops.conv_bn_relu.checks import DTYPES, out_shape, spatial
from ptkernels.ops.conv_bn_relu.variant import OP, Variant

_COMPOSITION = "plain torch composition"
_REQUESTED = "backend 'reference' was asked for"


def uncovered_by_triton(variant: Variant) -> str | None:
    """What a call has that the Triton kernels have not."""
    if variant.transposed:
        return "the Triton kernels have no transposed convolutions"
    return "the Triton kernels have no statistics of every image" if variant.num_groups else None


def fallback_reason(variant: Variant, input: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    if _backend.runs_on_triton(input.device.type, library.DEVICES):
        uncovered = _triton.uncovered(input) or uncovered_by_triton(variant)
        return uncovered or (register.FORWARD_MODE if has_tangent(input, *others) else None)
    # On the meta device a call is shape propagation, which the operators have for every device.
    if input.device.type not in (*library.DEVICES, "meta"):
        return _backend.no_kernel(input.device.type)
    return register.FORWARD_MODE if has_tangent(input, *others) else None


def runs_on_reference(variant: Variant, input: Tensor, *others: Tensor | None) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(variant.op, input.device.type)
    reason = fallback_reason(variant, input, *others)
    if reason is not None:
        _backend.fallback(variant.op, reason)
    return reason is not None


def _cpu_kernel(args: tuple[Any, ...], variant: Variant) -> str:
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so (ptkernels._introspect, which names its kernels, is not built for this Python)"
    input, weight, (stride, padding, dilation, groups) = args[0], args[1], args[10:14]
    missing = 5 - input.dim()
    lists = [
        spatial(OP, name, value, 3 - missing, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    ]
    shape = out_shape(input, weight, lists, groups, variant)
    name: str = introspection.conv_kernel(
        dtype=str(input.dtype).removeprefix("torch."),
        batch=input.size(0),
        channels=(input.size(1), shape[1]),
        groups=groups,
        size=[1] * missing + list(input.shape[2:]),
        kernel=[1] * missing + list(weight.shape[2:]),
        stride=[1] * missing + lists[0],
        padding=[0] * missing + lists[1],
        dilation=[1] * missing + lists[2],
        result=[1] * missing + shape[2:],
        transposed=variant.transposed,
        channels_last=register._is_channels_last(input),
        norm_groups=variant.num_groups,
        pre_activation=variant.pre_activation != "none",
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
        hints.append("input: the kernel works on channels last; memory_format=torch.channels_last spares a copy")
    if input.device.type == "cpu":
        hints += _loader.isa_hints(input.dtype)
    return hints


def account(args: tuple[Any, ...]) -> Explanation:
    """Account of a checked call with the operator's arguments but ``save_conv``."""
    input = args[0]
    variant = Variant(*args[16:])
    op = variant.op
    if _backend.state.backend == "reference":
        return Explanation(op, _COMPOSITION, "reference", _REQUESTED, ["leave ptkernels.backend('reference')"])
    device = input.device.type
    _backend.check_requested(op, device)
    if reason := fallback_reason(variant, *(args[index] for index in (0, 1, 2, 3, 4, 7))):
        return Explanation(op, _COMPOSITION, "reference", reason)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    if _backend.runs_on_triton(device, library.DEVICES):
        return Explanation(op, "Triton", "triton", f"{reason}; {_triton.NOT_YET_RUN}", _hints(input, "Triton"))
    kernel = _cpu_kernel(args, variant) if device == "cpu" else "shape propagation"
    if variant.transposed:
        reason += "; one convolution for each residue of the result's coordinates modulo the stride"
    return Explanation(op, kernel, device, reason, _hints(input, kernel))


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
