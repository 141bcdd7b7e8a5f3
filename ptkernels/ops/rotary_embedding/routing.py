"""Where a call of rotary_embedding runs, and why: the decision itself, and the account that ``explain`` gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptkernels import _backend, _loader, _triton
from ptkernels._autograd import has_tangent
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.rotary_embedding import library, register
from ptkernels.ops.rotary_embedding.checks import DTYPES, OP, check_inputs

_COMPOSITION = "plain torch composition"
_REQUESTED = "backend 'reference' was asked for"
_LEVELS = ("baseline", "avx2", "avx512")


def fallback_reason(query: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    tangent = register.FORWARD_MODE if has_tangent(query, *others) else None
    if _backend.runs_on_triton(query.device.type, library.DEVICES):
        return _triton.uncovered(query) or tangent
    # On the meta device a call is shape propagation, which the operators have for every device.
    if query.device.type not in (*library.DEVICES, "meta"):
        return _backend.no_kernel(query.device.type)
    return tangent


def runs_on_reference(query: Tensor, *others: Tensor | None) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(OP, query.device.type)
    reason = fallback_reason(query, *others)
    if reason is not None:
        _backend.fallback(OP, reason)
    return reason is not None


def _cpu_kernel() -> str:
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so"
    active: str = introspection.active_isa()
    return f"cpu.{active if active in _LEVELS else _LEVELS[-1]}.rows"


def explain(
    query: Any,
    key: Any,
    cos: Any,
    sin: Any,
    *,
    positions: Any = None,
    query_norm_weight: Any = None,
    key_norm_weight: Any = None,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
) -> Explanation:
    """Account of the call :func:`ptkernels.rotary_embedding` would make with these arguments, without making it.

    Raises what the call would raise for bad arguments.
    """
    options = (positions, query_norm_weight, key_norm_weight, interleaved, norm_eps)
    query, key, *others = register.autocast_if_enabled((query, key, cos, sin, *options))
    check_inputs(query, key, *others)
    if _backend.state.backend == "reference":
        return Explanation(OP, _COMPOSITION, "reference", _REQUESTED, ["leave ptkernels.backend('reference')"])
    device = query.device.type
    _backend.check_requested(OP, device)
    if reason := fallback_reason(query, key, query_norm_weight, key_norm_weight):
        return Explanation(OP, _COMPOSITION, "reference", reason)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    hints = [
        f"{name}: its last dimension has stride {tensor.stride(-1)}; kernels read rows fastest with stride 1"
        for name, tensor in (("query", query), ("key", key))
        if tensor.numel() > 0 and tensor.size(-1) > 1 and tensor.stride(-1) != 1
    ]
    if _backend.runs_on_triton(device, library.DEVICES):
        return Explanation(OP, "Triton", "triton", f"{reason}; {_triton.NOT_YET_RUN}", hints)
    return Explanation(OP, _cpu_kernel() if device == "cpu" else "shape propagation", device, reason, hints)


def kernels() -> list[KernelInfo]:
    """Every implementation of rotary_embedding and whether it can run in this process."""
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return [
        KernelInfo(_cpu_kernel(), "cpu", dtypes, True),
        triton_row(),
        KernelInfo(_COMPOSITION, "reference", dtypes, True),
    ]
